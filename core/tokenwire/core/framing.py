"""Folding a dialect's template into a framing: what is left to do for each token.

A frame of a stream is constant bytes, escaped text, constant bytes. The framing's own bytes go into the constants once a
stream. Only what stands before the frame depends on the text, and only on its length: an HTTP chunk's size line, a
WebSocket frame's header. A table holds these leads for every usual length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from .text import repair_surrogates

__all__ = ["BORDER", "Folded", "Template", "chunk", "fold_bare", "fold_chunked", "fold_messages"]

_TABLED: Final = 4096
"""Frames shorter than this take their lead from a table: an OpenAI chunk of one token has about 200 bytes."""

_SIZE_LINES: Final = tuple(b"%x\r\n" % size for size in range(_TABLED))
_NO_LEADS: Final = (b"",) * _TABLED


BORDER: Final = b"\xff"
"""Stands between the messages of one payload where a dialect says several at once; a byte that no UTF-8 text has."""


class Template(NamedTuple):
    """The bytes around the one thing that changes from token to token.

    A frame is prefix, escape(text), suffix; where `tail` is not None the event's number in ASCII digits and then the
    tail follow the suffix.
    """

    prefix: bytes
    suffix: bytes
    escape: Callable[[str], bytes]
    """Makes text a JSON string with its quotes, or whatever the dialect writes there.

    It may raise UnicodeEncodeError for text with surrogates, and is then asked again for the repaired text: so it can be
    a C function, and text that a `Stream` has let out, which has none, costs no Python call.
    """
    tail: bytes | None = None


class Folded:
    """A template with its framing around it: text and event number in, wire bytes out.

    Args:
        template: the dialect's.
        leads: what stands before a payload, by its length; longer payloads go to `lead`.
        lead: makes what stands before a payload of any length.
        trail: what stands after each payload.
    """

    __slots__ = ("_constant", "_escape", "_lead", "_leads", "_prefix", "_suffix", "_tail")

    def __init__(
        self, template: Template, leads: Sequence[bytes], lead: Callable[[int], bytes], trail: bytes = b""
    ) -> None:
        self._prefix, suffix, self._escape, self._tail = template
        self._leads = leads
        self._lead = lead
        self._constant = len(self._prefix) + len(suffix) + len(self._tail or b"")
        self._suffix = suffix + trail if self._tail is None else suffix
        self._tail = None if self._tail is None else self._tail + trail

    def encode(self, text: str, number: int) -> bytes:
        """Make one frame."""
        # A method and not __call__, which would go through C; and join copies once.
        try:
            escaped = self._escape(text)
        except UnicodeEncodeError:
            escaped = self._escape(repair_surrogates(text))
        size = self._constant + len(escaped)
        if self._tail is None:
            lead = self._leads[size] if size < _TABLED else self._lead(size)
            return b"".join((lead, self._prefix, escaped, self._suffix))
        digits = b"%d" % number
        size += len(digits)
        lead = self._leads[size] if size < _TABLED else self._lead(size)
        return b"".join((lead, self._prefix, escaped, self._suffix, digits, self._tail))


def chunk(payload: bytes) -> bytes:
    """Wrap a payload in one HTTP chunk (RFC 9112, 7.1); nothing stays nothing, for an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def fold_bare(template: Template) -> Folded:
    """Fold a template into no framing at all: ASGI bodies, and HTTP bodies that end with the connection."""
    return Folded(template, _NO_LEADS, _no_lead)


def fold_chunked(template: Template) -> Folded:
    """Fold a template into one HTTP chunk a token (RFC 9112, 7.1)."""
    return Folded(template, _SIZE_LINES, _size_line, b"\r\n")


def fold_messages(template: Template) -> Folded:
    """Fold a template into messages that somebody else frames: each has a BORDER behind it."""
    return Folded(template, _NO_LEADS, _no_lead, BORDER)


def _no_lead(size: int) -> bytes:
    del size
    return b""


def _size_line(size: int) -> bytes:
    return _SIZE_LINES[size] if size < _TABLED else b"%x\r\n" % size
