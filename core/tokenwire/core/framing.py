"""Folding a dialect's template into a framing: what is left to do for each token.

A frame of a stream is constant bytes, escaped text, constant bytes. The framing's own bytes go into the constants once a
stream; only an HTTP chunk's size depends on the text, and a table holds the size lines of every usual length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .contracts import Folded, Template

__all__ = ["chunk", "fold_bare", "fold_chunked"]

_TABLED: Final = 4096
"""Frames shorter than this take their size line from a table: an OpenAI chunk of one token has about 200 bytes."""

_SIZE_LINES: Final = tuple(b"%x\r\n" % size for size in range(_TABLED))


def chunk(payload: bytes) -> bytes:
    """Wrap a payload in one HTTP chunk (RFC 9112, 7.1); nothing stays nothing, for an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def fold_bare(template: Template) -> Folded:
    """Fold a template into no framing at all: ASGI bodies, and HTTP bodies that end with the connection."""
    prefix, suffix, escape, tail = template
    if tail is not None:

        def numbered(text: str, number: int) -> bytes:
            return b"%b%b%b%d%b" % (prefix, escape(text), suffix, number, tail)

        return numbered

    def plain(text: str, number: int) -> bytes:  # noqa: ARG001  # one signature for all folded templates
        return prefix + escape(text) + suffix

    return plain


def fold_chunked(template: Template) -> Folded:
    """Fold a template into one HTTP chunk a token (RFC 9112, 7.1)."""
    prefix, suffix, escape, tail = template
    if tail is not None:
        return _fold_numbered_chunk(prefix, suffix, escape, tail)
    constant = len(prefix) + len(suffix)
    last = suffix + b"\r\n"
    size_lines = _SIZE_LINES

    def chunked(text: str, number: int) -> bytes:  # noqa: ARG001  # one signature for all folded templates
        escaped = escape(text)
        size = constant + len(escaped)
        if size < _TABLED:
            return size_lines[size] + prefix + escaped + last
        return b"%x\r\n%b%b%b" % (size, prefix, escaped, last)

    return chunked


def _fold_numbered_chunk(prefix: bytes, suffix: bytes, escape: Callable[[str], bytes], tail: bytes) -> Folded:
    constant = len(prefix) + len(suffix) + len(tail)
    last = tail + b"\r\n"

    def chunked(text: str, number: int) -> bytes:
        escaped = escape(text)
        digits = b"%d" % number
        return b"%x\r\n%b%b%b%b%b" % (constant + len(escaped) + len(digits), prefix, escaped, suffix, digits, last)

    return chunked
