"""The bodies of requests, taken out of their framing (RFC 9112, 6): strict, bounded, and without copies where it is a length.

A reader has `receive_data(data, out)`: it appends to `out` what is in the body, and returns None as long as the body goes
on, else what came behind its end.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from .errors import LimitExceeded, RemoteProtocolError

__all__ = [
    "FORBIDDEN_TRAILERS",
    "MAX_CHUNK_LINE_BYTES",
    "MAX_EXTENSION_BYTES",
    "MAX_TRAILER_BYTES",
    "BodyReader",
    "ChunkedBody",
    "LengthBody",
]

MAX_CHUNK_LINE_BYTES: Final = 1024
"""One chunk's size with its extensions. Nobody in use sends extensions; what is bounded here is who plays with them."""

MAX_EXTENSION_BYTES: Final = 16 * 1024
"""All extensions of a body: else a body within its limit could come with any number of bytes around it."""

MAX_TRAILER_BYTES: Final = 8 * 1024
"""All trailer lines together: checksums and signatures are some hundred bytes."""

FORBIDDEN_TRAILERS: Final = frozenset(
    b"authorization cache-control connection content-encoding content-length content-range content-type cookie expect "
    b"forwarded host keep-alive max-forwards origin proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade x-forwarded-for x-forwarded-host x-forwarded-proto".split()
)
"""Fields of framing, routing and authority, which decided the request long before its trailers (RFC 9110, 6.5.1)."""

# RFC 9112, 7.1.1 knows spaces before an extension. Nobody sends them, and parsers that strip them have been fooled by them.
_match_size: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(;[\t -~\x80-\xff]*+)?\r\n").fullmatch
_match_trailer: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]++):[\t -~\x80-\xff]*+\r\n").fullmatch


class BodyReader(Protocol):
    """What reads one body."""

    def receive_data(self, data: bytes, out: list[bytes]) -> bytes | None:
        """Take bytes; see the module.

        Raises:
            RemoteProtocolError: it is not the framing. What came before the fault is in `out`; nothing more may be taken.
        """
        ...


class LengthBody:
    """A body of a known length.

    Args:
        length: its bytes.
    """

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        self._left = length

    def receive_data(self, data: bytes, out: list[bytes]) -> bytes | None:
        """Take bytes; see the module."""
        left = self._left
        if len(data) < left:
            self._left = left - len(data)
            if data:
                out.append(data)
            return None
        self._left = 0
        if left:
            out.append(data[:left])
        return data[left:]


class ChunkedBody:
    """A body in chunks. Extensions are dropped, and so are trailers: nothing here reads any."""

    __slots__ = ("_extensions", "_held", "_left", "_room", "_trailing")

    def __init__(self) -> None:
        self._left = 0  # of the chunk, and of the CRLF behind it
        self._held = b""
        self._extensions = 0
        self._trailing = False
        self._room = MAX_TRAILER_BYTES

    def receive_data(self, data: bytes, out: list[bytes]) -> bytes | None:
        """Take bytes; see the module."""
        if self._held:
            data, self._held = self._held + data, b""
        at, size = 0, len(data)
        while at < size:
            if self._left:
                at = self._take_chunk(data, at, out)
                continue
            end = data.find(b"\n", at) + 1
            limit = self._room if self._trailing else MAX_CHUNK_LINE_BYTES
            if (end or size) - at > limit:
                raise self._too_long()
            if not end:
                self._held = data[at:]
                return None
            line = data[at:end]
            at = end
            if self._trailing:
                if line == b"\r\n":
                    return data[at:]
                self._take_trailer(line)
            else:
                self._take_size(line)
        return None

    def _take_chunk(self, data: bytes, at: int, out: list[bytes]) -> int:
        """Take what is there of a chunk; return where it ends."""
        if self._left > 2:
            piece = data[at : at + self._left - 2]
            out.append(piece)
            at += len(piece)
            self._left -= len(piece)
        if self._left > 2:
            return at
        ending = data[at : at + self._left]
        if ending != b"\r\n"[2 - self._left :][: len(ending)]:
            raise RemoteProtocolError("a chunk is longer than its size")
        self._left -= len(ending)
        return at + len(ending)

    def _take_size(self, line: bytes) -> None:
        match = _match_size(line)
        if match is None:
            raise RemoteProtocolError("a chunk's size is malformed")
        digits, extension = match.groups()
        if extension is not None:
            self._extensions += len(extension)
            if self._extensions > MAX_EXTENSION_BYTES:
                raise LimitExceeded("MAX_EXTENSION_BYTES", MAX_EXTENSION_BYTES)
        length = int(digits, 16)
        if length:
            self._left = length + 2
        else:
            self._trailing = True

    def _take_trailer(self, line: bytes) -> None:
        match = _match_trailer(line)
        if match is None:
            raise RemoteProtocolError("a trailer is malformed")
        if match[1].lower() in FORBIDDEN_TRAILERS:
            raise RemoteProtocolError("a field stands among the trailers that must stand in the head")
        self._room -= len(line)

    def _too_long(self) -> LimitExceeded:
        if self._trailing:
            return LimitExceeded("MAX_TRAILER_BYTES", MAX_TRAILER_BYTES, status=431)
        return LimitExceeded("MAX_CHUNK_LINE_BYTES", MAX_CHUNK_LINE_BYTES, status=400)
