"""Folding a dialect's template into a framing: what is left to do for each token.

A frame of a stream is constant bytes, escaped text, constant bytes. The framing's own bytes go into the constants once a
stream. Only what stands before the frame depends on the text, and only on its length: an HTTP chunk's size line, a
WebSocket frame's header. A table holds these leads for every usual length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

__all__ = ["Folded", "Template", "chunk", "fold_bare", "fold_chunked"]

_TABLED: Final = 4096
"""Frames shorter than this take their lead from a table: an OpenAI chunk of one token has about 200 bytes."""

_SIZE_LINES: Final = tuple(b"%x\r\n" % size for size in range(_TABLED))
_NO_LEADS: Final = (b"",) * _TABLED


class Template(NamedTuple):
    """The bytes around the one thing that changes from token to token.

    A frame is prefix, escape(text), suffix; where `tail` is not None the event's number in ASCII digits and then the
    tail follow the suffix.
    """

    prefix: bytes
    suffix: bytes
    escape: Callable[[str], bytes]
    """Makes text a JSON string with its quotes, or whatever the dialect writes there; never raises."""
    tail: bytes | None = None


class Folded:
    """A template with its framing around it: text and event number in, wire bytes out.

    Args:
        template: the dialect's.
        leads: what stands before a payload, by its length; longer payloads go to `lead`.
        lead: makes what stands before a payload of any length.
        trail: what stands after each payload.
    """

    __slots__ = ("_constant", "_escape", "_lead", "_leads", "_prefix", "_suffix", "_tail", "_trail")

    def __init__(
        self, template: Template, leads: Sequence[bytes], lead: Callable[[int], bytes], trail: bytes = b""
    ) -> None:
        self._prefix, suffix, self._escape, self._tail = template
        self._leads = leads
        self._lead = lead
        self._trail = trail
        self._constant = len(self._prefix) + len(suffix) + len(self._tail or b"")
        self._suffix = suffix + trail if self._tail is None else suffix

    def __call__(self, text: str, number: int) -> bytes:
        """Make one frame."""
        escaped = self._escape(text)
        size = self._constant + len(escaped)
        if self._tail is not None:
            digits = b"%d" % number
            frame = b"%b%b%b%b%b%b" % (self._prefix, escaped, self._suffix, digits, self._tail, self._trail)
            return self._lead(size + len(digits)) + frame
        lead = self._leads[size] if size < _TABLED else self._lead(size)
        return lead + self._prefix + escaped + self._suffix


def chunk(payload: bytes) -> bytes:
    """Wrap a payload in one HTTP chunk (RFC 9112, 7.1); nothing stays nothing, for an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def fold_bare(template: Template) -> Folded:
    """Fold a template into no framing at all: ASGI bodies, and HTTP bodies that end with the connection."""
    return Folded(template, _NO_LEADS, _no_lead)


def fold_chunked(template: Template) -> Folded:
    """Fold a template into one HTTP chunk a token (RFC 9112, 7.1)."""
    return Folded(template, _SIZE_LINES, _size_line, b"\r\n")


def _no_lead(size: int) -> bytes:
    del size
    return b""


def _size_line(size: int) -> bytes:
    return _SIZE_LINES[size] if size < _TABLED else b"%x\r\n" % size
