"""The chunked transfer coding (RFC 9112, 7.1), read: bounded, strict, and at no call of ours for each chunk."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

from .errors import LimitExceeded, RemoteProtocolError

__all__ = ["MAX_CHUNK_LINE_BYTES", "MAX_TRAILER_BYTES", "ChunkedBody"]

MAX_CHUNK_LINE_BYTES: Final = 1024
"""A chunk's size, its extensions and CRLF. Nobody in use sends extensions; what is bounded here is who plays with them."""

MAX_TRAILER_BYTES: Final = 8 * 1024
"""All trailer lines together: checksums and timings are some hundred bytes."""

_MAX_SIZE_DIGITS: Final = 15
_LINE: Final = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_FIELD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_split_usual: Final = re.compile(rb"\r\n([0-9A-Fa-f]{1,4})\r\n").split
# It begins with bytes and with nothing to choose from, so that re searches for them: that is seven times as fast.

_USUAL: Final = 0x4000
_size_of_usual: Final = {
    text: size for size in range(1, _USUAL) for text in (b"%x" % size, b"%X" % size)
}.get  # fmt: skip  # A look-up is a third of int(text, 16), and knows no sign, space, prefix or underscore.


class _Part(Enum):
    SIZE = "size"
    DATA = "data"
    DATA_END = "data end"
    TRAILERS = "trailers"
    COMPLETE = "complete"


class ChunkedBody:
    """Removes the coding from one body.

    Attributes:
        complete: the last chunk and the trailers have come.
        rest: what came after the end of the body.
    """

    __slots__ = ("_held", "_left", "_part", "_room", "_usual", "rest")

    def __init__(self) -> None:
        self._part = _Part.SIZE
        self._left = 0
        self._room = MAX_TRAILER_BYTES
        self._held = b""
        self._usual = True  # whether the next byte begins a chunk
        self.rest = b""

    @property
    def complete(self) -> bool:
        """Whether the last chunk and the trailers have come."""
        return self._part is _Part.COMPLETE

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

    def receive_data(self, data: bytes, out: list[bytes]) -> None:
        """Take bytes, append what they hold of the body; an error leaves in `out` what came before it.

        Raises:
            RemoteProtocolError: it is not the coding. Nothing more may be taken.
        """
        if self._held:
            data, self._held = self._held + data, b""
        at, end = 0, len(data)
        while at < end and self._part is not _Part.COMPLETE:
            if self._part is _Part.SIZE:
                # A whole chunk of a usual size costs no call of ours, here too: a late reader's reads hold many, and a part.
                line_end = data.find(b"\r\n", at, at + 6)
                size = _size_of_usual(data[at:line_end]) if line_end > 0 else None
                stop = line_end + 2 + (size or 0)
                if size and data[stop : stop + 2] == b"\r\n":
                    out.append(data[line_end + 2 : stop])
                    at = stop + 2
                    continue
            if self._part is _Part.DATA:
                piece = data[at : at + self._left]
                out.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._part = _Part.DATA_END
            else:
                taken = self._take_line(data, at)
                if not taken:
                    self._held = data[at:]
                    at = end
                at += taken
        self._usual = self._part is _Part.SIZE and not self._held
        if self._part is _Part.COMPLETE:
            self.rest += data[at:]

    def _take_line(self, data: bytes, at: int) -> int:
        """Take one line of the coding; return its length with CRLF, 0 where it is not whole."""
        if self._part is _Part.DATA_END:
            ending = data[at : at + 2]
            if ending == b"\r\n":
                self._part = _Part.SIZE
                return 2
            if ending != b"\r":
                raise RemoteProtocolError("a chunk is longer than its size", status=502)
            return 0
        is_size = self._part is _Part.SIZE
        line = _line(data[at : at + (MAX_CHUNK_LINE_BYTES if is_size else self._room)])
        if line is None:
            if is_size and len(data) - at >= MAX_CHUNK_LINE_BYTES:
                raise LimitExceeded("MAX_CHUNK_LINE_BYTES", MAX_CHUNK_LINE_BYTES, status=502)
            if not is_size and len(data) - at >= self._room:
                raise LimitExceeded("MAX_TRAILER_BYTES", MAX_TRAILER_BYTES, status=502)
            return 0
        if is_size:
            self._take_size(line)
        else:
            self._take_trailer(line)
        return len(line) + 2

    def _take_size(self, line: bytes) -> None:
        match = _LINE.fullmatch(line)
        if match is None or len(match[1]) > _MAX_SIZE_DIGITS:
            raise RemoteProtocolError("a chunk's size is malformed", status=502)
        self._left = int(match[1], 16)
        self._part = _Part.DATA if self._left else _Part.TRAILERS

    def _take_trailer(self, line: bytes) -> None:
        """Check and drop a trailer: nothing here reads any, and merging them into the head is how they do harm."""
        if not line:
            self._part = _Part.COMPLETE
        elif _FIELD.fullmatch(line) is None:
            raise RemoteProtocolError("a trailer is malformed", status=502)
        self._room -= len(line) + 2


def _line(data: bytes) -> bytes | None:
    """Find the line that ends in CRLF; None where there is no end yet.

    Raises:
        RemoteProtocolError: the line ends in a bare LF, which others may take for its end (RFC 9112, 2.2 and 7.1.1).
    """
    end = data.find(b"\r\n")
    if b"\n" in (data if end < 0 else data[:end]):
        raise RemoteProtocolError("a line of the chunked coding ends in a bare LF", status=502)
    return None if end < 0 else data[:end]
