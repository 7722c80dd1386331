"""Bounded, linear line splitting, and the life of a decoder of lines, shared by SSE and NDJSON.

Only bytes that have just come are searched for a line end: what is held was searched when it came and has none. Held
bytes lie in one growing buffer and are copied out once, when their line ends, so the work is linear in the input for
every way in which the input is cut, and what is held never exceeds the limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from .errors import LimitExceeded, LocalProtocolError, RemoteProtocolError

__all__ = ["DEFAULT_MAX_ITEMS_PER_CALL", "DEFAULT_MAX_LINE_BYTES", "AnyEndSplitter", "LfSplitter", "LineDecoder"]

# A line carries one JSON document. The largest in use hold a picture in base64: 16 MiB hold 12 MiB of picture.
DEFAULT_MAX_LINE_BYTES = 16 * 1024 * 1024

# An item in memory is some twenty times the six bytes that it may have on the wire. The largest reads of a socket in use,
# 256 KiB, hold fewer than this many of the smallest events.
DEFAULT_MAX_ITEMS_PER_CALL = 65_536

_LF = 0x0A
_CR = 0x0D

Item = TypeVar("Item")


class LfSplitter:
    """Splits bytes into lines that end in LF and in nothing else.

    A line's end is not part of the line and does not count against the limit.

    Args:
        max_line_bytes: the longest line that is let through.

    Attributes:
        max_line_bytes: as given.
    """

    __slots__ = ("_exceeded", "_held", "max_line_bytes")

    def __init__(self, *, max_line_bytes: int = DEFAULT_MAX_LINE_BYTES) -> None:
        self.max_line_bytes = max_line_bytes
        self._held = bytearray()
        self._exceeded = False

    @property
    def held(self) -> int:
        """How many bytes of an unfinished line are held."""
        return len(self._held)

    def receive_data(self, data: bytes) -> list[bytes]:
        """Takes bytes and gives the lines that they complete.

        Args:
            data: bytes as they came; empty bytes mean nothing.

        Returns:
            The lines before the first one that is too long. After that one there are no more: `check` raises.
        """
        return self._join(data.split(b"\n"), len(data))

    def check(self) -> None:
        """Reports a line that was too long.

        Raises:
            LimitExceeded: a line went past max_line_bytes. Nothing is held any more, and no further line is given.
        """
        if self._exceeded:
            raise LimitExceeded("max_line_bytes", self.max_line_bytes)

    def take_rest(self) -> bytes:
        """Takes the bytes of the unfinished line, at the end of input. The splitter is between lines afterwards."""
        rest = bytes(self._held)
        self._held = bytearray()
        return rest

    def _join(self, parts: list[bytes], size: int) -> list[bytes]:
        """Makes lines of pieces, of which the last is the beginning of a line that has not ended."""
        if self._exceeded:
            return []
        if len(self._held) + size > self.max_line_bytes and self._cut(parts):
            lines = self._whole(parts)
            self._held = bytearray()
            return lines
        rest = parts.pop()
        lines = self._whole(parts)
        self._held += rest
        return lines

    def _cut(self, parts: list[bytes]) -> bool:
        """Drops the first piece that makes its line too long, and all that follow; returns whether there was one."""
        sizes = [len(part) for part in parts]
        sizes[0] += len(self._held)
        for index, size in enumerate(sizes):
            if size > self.max_line_bytes:
                self._exceeded = True
                del parts[index:]
                break
        return self._exceeded

    def _whole(self, parts: list[bytes]) -> list[bytes]:
        """Puts what is held before the first of these lines, if there is one."""
        if self._held and parts:
            self._held += parts[0]
            parts[0] = self.take_rest()
        return parts


class AnyEndSplitter(LfSplitter):
    """Splits bytes into lines that end in CR, LF or CRLF and in nothing else (WHATWG HTML 9.2.5).

    A CR ends its line at once. Whether it was the first half of a CRLF shows with the next byte, which may come with
    the next read: waiting for it would hold an event back until the peer sends its next one.
    """

    __slots__ = ("_after_cr",)

    def __init__(self, *, max_line_bytes: int = DEFAULT_MAX_LINE_BYTES) -> None:
        super().__init__(max_line_bytes=max_line_bytes)
        self._after_cr = False

    def receive_data(self, data: bytes) -> list[bytes]:
        """Takes bytes and gives the lines that they complete.

        Args:
            data: bytes as they came; empty bytes mean nothing.

        Returns:
            The lines before the first one that is too long. After that one there are no more: `check` raises.
        """
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if not data:
            return []
        # On bytes, unlike on str, splitlines knows CR, LF and CRLF only.
        parts = data.splitlines()
        last = data[-1]
        if last == _LF or last == _CR:
            parts.append(b"")
            self._after_cr = last == _CR
        return self._join(parts, len(data))


class LineDecoder(ABC, Generic[Item]):
    """What the decoders of lines have in common: from open to closed, items and errors in the order of the bytes.

    Cutting the input differently changes neither the items nor the error nor their order: when one read completes items
    and then breaks a rule, the items are returned and the next call, whichever it is, raises the error. The limit on the
    items of one call is the exception: it is about the size of the caller's reads.

    An error closes the decoder: held bytes are dropped, `truncated` becomes True because what follows the fault is not
    read, `receive_data` raises LocalProtocolError from then on, and `receive_eof` returns nothing.
    """

    __slots__ = ("_closed", "_fault", "_lines", "_max_items", "_truncated")

    def __init__(self, lines: LfSplitter, max_items_per_call: int) -> None:
        self._lines = lines
        self._max_items = max_items_per_call
        self._closed = False
        self._fault: RemoteProtocolError | None = None
        self._truncated = False

    @property
    def truncated(self) -> bool:
        """Whether the input ended, or was given up for an error, inside an item."""
        return self._truncated

    def receive_data(self, data: bytes) -> list[Item]:
        """Takes bytes and gives what they complete.

        Args:
            data: bytes as they came; empty bytes mean nothing.

        Returns:
            The items that are complete now, in order.

        Raises:
            LimitExceeded: the peer went past a limit that the constructor names. The decoder is closed.
            MalformedData: the peer sent bytes that are not what the framing promises. The decoder is closed.
            LocalProtocolError: data after the end of input or after an error. The decoder stays closed.
        """
        self._raise_fault()
        if self._closed:
            raise LocalProtocolError("data after the end of input or after an error")
        items: list[Item] = []
        try:
            self._take_lines(self._lines.receive_data(data), items)
            self._lines.check()
        except RemoteProtocolError as error:
            self._close(truncated=True)
            if not items:
                raise
            self._fault = error
        return items

    def receive_eof(self) -> list[Item]:
        """Takes the end of input. It may be called again and then does nothing.

        Returns:
            What only the end of input completes.

        Raises:
            LimitExceeded, MalformedData: the error of an earlier read that returned items first. The decoder is closed.
        """
        self._raise_fault()
        if self._closed:
            return []
        items, truncated = self._take_rest()
        self._close(truncated=truncated)
        return items

    def _raise_fault(self) -> None:
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _close(self, *, truncated: bool) -> None:
        self._closed = True
        self._truncated = truncated
        self._lines.take_rest()

    def _add(self, item: Item, items: list[Item]) -> None:
        if len(items) >= self._max_items:
            raise LimitExceeded("max_items_per_call", self._max_items)
        items.append(item)

    @abstractmethod
    def _take_lines(self, lines: list[bytes], items: list[Item]) -> None:
        """Interprets whole lines and appends what they complete."""

    @abstractmethod
    def _take_rest(self) -> tuple[list[Item], bool]:
        """Interprets what is held at the end of input; returns the items and whether something was cut off."""
