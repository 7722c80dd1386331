"""The chunked transfer coding (RFC 9112, 7.1), read: bounded, strict, and at no call of ours for each usual chunk."""

from __future__ import annotations

import re
from typing import Final

from .errors import LimitExceeded, RemoteProtocolError

__all__ = ["FORBIDDEN_TRAILERS", "MAX_CHUNK_LINE_BYTES", "MAX_EXTENSION_BYTES", "MAX_TRAILER_BYTES", "ChunkedBody"]

MAX_CHUNK_LINE_BYTES: Final = 1024
"""A chunk's size, its extensions and CRLF. Nobody in use sends extensions; what is bounded here is who plays with them."""

MAX_EXTENSION_BYTES: Final = 16 * 1024
"""All extensions of a body: else a body within its limit could come with any number of bytes around it."""

MAX_TRAILER_BYTES: Final = 8 * 1024
"""All trailer lines together: checksums, signatures and timings are some hundred bytes."""

FORBIDDEN_TRAILERS: Final = frozenset(
    b"authorization cache-control connection content-encoding content-length content-range content-type cookie expect "
    b"forwarded host keep-alive max-forwards origin proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade x-forwarded-for x-forwarded-host x-forwarded-proto".split()
)
"""Fields of framing, routing and authority, which decided a request long before its trailers (RFC 9110, 6.5.1)."""

_match_size: Final = re.compile(rb"([0-9A-Fa-f]{1,15})([ \t]*+)(;[\t -~\x80-\xff]*+)?\r\n").fullmatch
_match_trailer: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]++):[\t -~\x80-\xff]*+\r\n").fullmatch
_split_usual: Final = re.compile(rb"\r\n([0-9A-Fa-f]{1,4})\r\n").split
# It begins with bytes and with nothing to choose from, so that re searches for them: that is seven times as fast.

_USUAL: Final = 0x4000
_size_of_usual: Final = {
    text: size for size in range(1, _USUAL) for text in (b"%x" % size, b"%X" % size)
}.get  # fmt: skip  # A look-up is a third of int(text, 16), and knows no sign, space, prefix or underscore.


class ChunkedBody:
    """Takes the coding off one body; a `tokenwire.core._body.BodyReader`.

    Extensions and trailers are dropped: nothing here reads any, and merging trailers into the head is how they do harm.

    Args:
        of_response: whether a server of others sends it. Then every error is a bad gateway's, spaces are taken behind a
            chunk's size, where servers that fill a field of fixed width leave them, and neither the sum of the extensions
            nor a trailer's name matters: an answer may be as long as it likes, and decides nothing.
    """

    __slots__ = ("_extensions", "_held", "_left", "_of_response", "_room", "_trailing", "_usual")

    def __init__(self, *, of_response: bool = False) -> None:
        self._of_response = of_response
        self._left = 0  # of the chunk, and of the CRLF behind it
        self._held = b""
        self._extensions = 0
        self._trailing = False
        self._room = MAX_TRAILER_BYTES
        self._usual = True  # whether the next byte begins a chunk

    def receive_whole(self, data: bytes) -> bytes | None:
        """Take a read that is whole chunks of usual sizes and nothing else, as nearly every read of a stream is.

        Returns:
            What is in the chunks; None where the read is of another kind, and then nothing has changed.
        """
        if not self._usual or data[-2:] != b"\r\n":
            return None
        end = data.find(b"\r\n", 1, 6)
        size = _size_of_usual(data[:end])
        if size is None:
            return None
        if len(data) == size + end + 4:
            return data[end + 2 : -2]
        parts = _split_usual(b"\r\n" + data[:-2])
        bodies = parts[2::2]
        # A match inside a chunk, or a chunk of another kind, makes the sizes disagree: then the long way decides.
        agree = list(map(_size_of_usual, parts[1::2])) == list(map(len, bodies))
        return b"".join(bodies) if bodies and agree else None

    def receive_data(self, data: bytes, out: list[bytes]) -> bytes | None:
        """Take bytes, append what they hold of the body.

        Returns:
            None as long as the body goes on, else what came behind its end.

        Raises:
            RemoteProtocolError: it is not the coding. What came before the fault is in `out`; nothing more may be taken.
        """
        if self._held:
            data, self._held = self._held + data, b""
        at, size = 0, len(data)
        while at < size:
            if self._left:
                at = self._take_chunk(data, at, out)
                continue
            if not self._trailing:
                # A whole chunk of a usual size costs no call of ours, here too: a late reader's reads hold many, and a part.
                line_end = data.find(b"\r\n", at, at + 6)
                length = _size_of_usual(data[at:line_end]) if line_end > 0 else None
                stop = line_end + 2 + (length or 0)
                if length and data[stop : stop + 2] == b"\r\n":
                    out.append(data[line_end + 2 : stop])
                    at = stop + 2
                    continue
            end = data.find(b"\n", at) + 1
            if (end or size) - at > (self._room if self._trailing else MAX_CHUNK_LINE_BYTES):
                raise self._too_long()
            if not end:
                self._held = data[at:]
                self._usual = False
                return None
            line, at = data[at:end], end
            if self._trailing and line == b"\r\n":
                return data[at:]
            self._take_line(line)
        self._usual = not (self._left or self._trailing)
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
            raise self._malformed("a chunk is longer than its size")
        self._left -= len(ending)
        return at + len(ending)

    def _take_line(self, line: bytes) -> None:
        if line[-2:] != b"\r\n":
            # Others may take it for a line's end (RFC 9112, 2.2 and 7.1.1).
            raise self._malformed("a line of the chunked coding ends in a bare LF")
        if self._trailing:
            self._take_trailer(line)
        else:
            self._take_size(line)

    def _take_size(self, line: bytes) -> None:
        match = _match_size(line)
        # RFC 9112, 7.1.1 knows spaces before an extension. No client sends them, and parsers that strip them have been fooled.
        if match is None or (match[2] and not self._of_response):
            raise self._malformed("a chunk's size is malformed")
        self._extensions += len(match[3] or b"")
        if self._extensions > MAX_EXTENSION_BYTES and not self._of_response:
            raise LimitExceeded("MAX_EXTENSION_BYTES", MAX_EXTENSION_BYTES)
        length = int(match[1], 16)
        if length:
            self._left = length + 2
        else:
            self._trailing = True

    def _take_trailer(self, line: bytes) -> None:
        match = _match_trailer(line)
        if match is None:
            raise self._malformed("a trailer is malformed")
        if match[1].lower() in FORBIDDEN_TRAILERS and not self._of_response:
            raise self._malformed("a field stands among the trailers that must stand in the head")
        self._room -= len(line)

    def _too_long(self) -> LimitExceeded:
        if self._trailing:
            return self._exceeded("MAX_TRAILER_BYTES", MAX_TRAILER_BYTES, 431)
        return self._exceeded("MAX_CHUNK_LINE_BYTES", MAX_CHUNK_LINE_BYTES, 400)

    def _exceeded(self, limit: str, maximum: int, status: int) -> LimitExceeded:
        return LimitExceeded(limit, maximum, status=502 if self._of_response else status)

    def _malformed(self, message: str) -> RemoteProtocolError:
        return RemoteProtocolError(message, status=502 if self._of_response else 400)
