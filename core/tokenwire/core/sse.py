"""Server-sent events: the framing of WHATWG HTML section 9.2, both ways.

The decoder follows 9.2.5 (parsing) and 9.2.6 (interpreting) to the letter. The encoder writes less than the grammar
allows, because official SDKs break on streams that are valid: LF only, no byte order mark, no block without data, no
event whose data is empty. What cannot be written so that it is read back unchanged is refused, never altered.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from .errors import LimitExceeded, MalformedData
from .lines import DEFAULT_MAX_ITEMS_PER_CALL, DEFAULT_MAX_LINE_BYTES, AnyEndSplitter, LineDecoder

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT_MAX_EVENT_BYTES", "MAX_RETRY_MS", "Decoder", "ServerSentEvent", "comment", "encode"]

# The events in use carry one line of data. More lines are for text, which is small: no more than one line may hold.
DEFAULT_MAX_EVENT_BYTES = DEFAULT_MAX_LINE_BYTES

# Fifteen digits, some 31,000 years: all that a double holds exactly, so that every client reads the same number.
MAX_RETRY_MS: Final = 999_999_999_999_999

_MAX_RETRY_DIGITS = len(str(MAX_RETRY_MS))
_MIN_EVENT_BYTES = len(b"data\n\n")
_BOM = b"\xef\xbb\xbf"
_CR = 0x0D
_LF = 0x0A
# What the dialects send: one data line, the event's type before it, its id after it. A dot is anything but LF.
_match_usual_block = re.compile("(?:event: (.*)\n)?data: (.*)(?:\nid: ([^\0\n]*))?").fullmatch


class ServerSentEvent(msgspec.Struct, frozen=True, gc=False):
    """One event as an EventSource would dispatch it."""

    event: str = "message"
    """The event's type."""
    data: str = ""
    """The data lines, joined with LF. A single empty data line makes it empty."""
    id: str = ""
    """The stream's last event ID, which an event may have from an earlier one; "" when there is none."""


class Decoder(LineDecoder[ServerSentEvent]):
    """Decodes an event stream.

    Invalid UTF-8 is replaced, one U+FFFD per maximal subpart, as the standard says; in strict mode it is an error,
    wherever in the stream it is, as soon as its line has ended.

    Cutting the input differently changes neither the events nor the error nor their order: when one read completes
    events and then breaks a rule, the events are returned and the next call, whichever it is, raises the error. An
    error closes the decoder: what it holds is dropped, `receive_data` raises LocalProtocolError from then on,
    `receive_eof` returns nothing, and `truncated` is True because what follows the fault is never read.

    Args:
        max_line_bytes: the longest line, without its end.
        max_event_bytes: the most UTF-8 bytes of one event's data, with an LF between two lines of it.
        max_items_per_call: the most events that one call may give: it bounds what a read of many tiny events costs.
        strict: refuse invalid UTF-8 instead of replacing it.

    Attributes:
        last_event_id: the last event ID string of 9.2.6: what a client sends as Last-Event-ID to resume.
        retry_ms: the reconnection time in milliseconds that the peer asked for last; None when it never did.
    """

    __slots__ = ("_data", "_event", "_fast_bytes", "_id", "_max_event_bytes", "_max_fast_bytes", "_start", "_strict",
                 "last_event_id", "retry_ms")  # fmt: skip

    def __init__(
        self,
        *,
        max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
        max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES,
        max_items_per_call: int = DEFAULT_MAX_ITEMS_PER_CALL,
        strict: bool = False,
    ) -> None:
        super().__init__(AnyEndSplitter(max_line_bytes=max_line_bytes), max_items_per_call)
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self._max_event_bytes = max_event_bytes
        self._strict = strict
        self._max_fast_bytes = min(max_line_bytes, max_event_bytes, max_items_per_call * _MIN_EVENT_BYTES)
        # The longest read that can be whole events within the limits; -1 while something waits for the next byte.
        self._fast_bytes = -1
        self._start: bytes | None = b""  # the beginning of what may be a byte order mark; None when that is decided
        self._data: bytes | bytearray | None = None
        self._event = ""
        self._id = ""

    def receive_data(self, data: bytes) -> list[ServerSentEvent]:
        """Takes bytes and gives the events that they complete.

        Args:
            data: bytes as they came, cut anywhere; empty bytes mean nothing.

        Returns:
            The events that are complete now, in order.

        Raises:
            LimitExceeded: a line or an event is too long, or there are too many. The decoder is closed.
            MalformedData: strict mode, and a line is not UTF-8. The decoder is closed.
            LocalProtocolError: data after the end of input or after an error. The decoder stays closed.
        """
        # The usual read is one event that is one line of data, and costs no call of ours. Bytes are searched for one
        # byte, given as an int, several times as fast as by any method. A read that takes a fast way leaves nothing
        # waiting, as it found it, so the next may take one too.
        if len(data) <= self._fast_bytes:
            try:
                if data[-2:] == b"\n\n" and _CR not in data:
                    if data[:6] == b"data: " and _LF not in (value := data[6:-2]):
                        return [ServerSentEvent("message", value.decode(), self.last_event_id)]
                    return self._take_blocks(data[:-2].decode())
                if data[-4:] == b"\r\n\r\n" and _CR not in (unified := data.replace(b"\r\n", b"\n")):
                    return self._take_blocks(unified[:-2].decode())
            except UnicodeDecodeError:
                pass  # the long way replaces it or raises
        if self._start is not None:
            data = self._after_start(data, self._start)
        self._fast_bytes = -1
        events = super().receive_data(data)
        if self._nothing_waits():
            self._fast_bytes = self._max_fast_bytes
        return events

    @property
    def holds(self) -> bool:
        """Whether an end of input would cut something off now: a line, or an event that its blank line would dispatch."""
        return not self._closed and (bool(self._start) or self._lines.held > 0 or self._in_event())

    def _take_blocks(self, text: str) -> list[ServerSentEvent]:
        """Interprets blocks with LF only, within the limits.

        The usual block is read in one go.
        """
        events: list[ServerSentEvent] = []
        for block in text.split("\n\n"):
            usual = _match_usual_block(block)
            if usual is None:
                self._take_lines([line.encode() for line in [*block.split("\n"), ""]], events)
                continue
            event, value, identity = usual.groups()
            if identity is not None:
                self._id = self.last_event_id = identity
            events.append(ServerSentEvent(event or "message", value, self._id))
        return events

    def _after_start(self, data: bytes, held: bytes) -> bytes:
        """Drops one leading byte order mark, as the UTF-8 decode algorithm of the Encoding Standard does."""
        data = held + data
        if len(data) < len(_BOM) and _BOM.startswith(data):
            self._start = data
            return b""
        self._start = None
        return data.removeprefix(_BOM)

    def _nothing_waits(self) -> bool:
        # The LF of a CRLF may wait still. Here it would be a blank line, and that changes nothing.
        return self._start is None and not self._closed and not self._lines.held and not self._in_event()

    def _in_event(self) -> bool:
        """Whether a blank line would change anything: only then does an end of input lose something."""
        return self._data is not None or self._event != "" or self._id != self.last_event_id

    def _close(self, *, truncated: bool) -> None:
        super()._close(truncated=truncated)
        self._fast_bytes = -1
        self._start = self._data = None

    def _take_rest(self) -> tuple[list[ServerSentEvent], bool]:
        # 9.2.5: an incomplete event is not dispatched.
        return [], self.holds

    def _take_lines(self, lines: list[bytes], items: list[ServerSentEvent]) -> None:
        for line in lines:
            if self._strict:
                _check_utf8(line)
            if not line:
                self._dispatch(items)
                continue
            # A comment is a line whose field name is empty, and no field has that name.
            name, _, value = line.partition(b":")
            take_field = self._FIELDS.get(name)
            if take_field is not None:
                take_field(self, value.removeprefix(b" "))

    def _dispatch(self, items: list[ServerSentEvent]) -> None:
        self.last_event_id = self._id
        data, self._data = self._data, None
        event, self._event = self._event, ""
        if data is not None:
            self._add(ServerSentEvent(event or "message", data.decode("utf-8", "replace"), self._id), items)

    def _take_data(self, value: bytes) -> None:
        data = self._data
        size = len(value) if data is None else len(data) + 1 + len(value)
        if size > self._max_event_bytes:
            raise LimitExceeded("max_event_bytes", self._max_event_bytes)
        if data is None:
            self._data = value
            return
        if not isinstance(data, bytearray):
            self._data = data = bytearray(data)
        data += b"\n"
        data += value

    def _take_event(self, value: bytes) -> None:
        self._event = value.decode("utf-8", "replace")

    def _take_id(self, value: bytes) -> None:
        if b"\0" not in value:
            self._id = value.decode("utf-8", "replace")

    def _take_retry(self, value: bytes) -> None:
        # bytes.isdigit knows ASCII digits only and is False for empty bytes.
        if value.isdigit() and len(value := value.lstrip(b"0")) <= _MAX_RETRY_DIGITS:
            self.retry_ms = int(value or b"0")

    _FIELDS: ClassVar[dict[bytes, Callable[[Decoder, bytes], None]]] = {
        b"data": _take_data,
        b"event": _take_event,
        b"id": _take_id,
        b"retry": _take_retry,
    }


def _check_utf8(line: bytes) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise MalformedData(f"the event stream is not UTF-8: {error.reason}") from None


def encode(
    data: str | bytes, *, event: str | bytes | None = None, id: str | bytes | None = None, retry_ms: int | None = None
) -> bytes:
    r"""Encodes one event, so that a decoder reads back exactly what was given. Bytes are UTF-8.

    Each line of the data becomes a data line. Only LF ends such a line: a CR, also one before an LF, would be read back
    as LF, so data with a CR in it is refused and not altered.

    Args:
        data: what the event carries; at least one character, for official SDKs break on empty data.
        event: the event's type; None for the default, "message".
        id: the new last event ID; "" resets it; None leaves it as it is.
        retry_ms: the reconnection time in milliseconds, from 0 to MAX_RETRY_MS.

    Returns:
        The event with the blank line that ends it.

    Raises:
        ValueError: data is empty or has a CR; event is empty; event or id has a CR, LF or NUL; retry_ms is out of
            range; anything has a lone surrogate or is not UTF-8 (then it is a UnicodeError).
    """
    if isinstance(data, bytes):
        data = data.decode()
    if not data or "\r" in data:
        raise ValueError("data has a CR, which would be read back as LF" if data else "data is empty")
    if "\n" in data:
        data = data.replace("\n", "\ndata: ")
    if event is None and id is None and retry_ms is None:
        return f"data: {data}\n\n".encode()
    return f"{_fields(event, id, retry_ms)}data: {data}\n\n".encode()


def comment(text: str | bytes) -> bytes:
    """Encodes a comment: one line, and no blank line after it, for some SDKs take any blank line for an event.

    Args:
        text: what the comment says.

    Raises:
        ValueError: text has a CR, LF or NUL; it has a lone surrogate or is not UTF-8 (then it is a UnicodeError).
    """
    return f": {_one_line('comment', text)}\n".encode()


def _fields(event: str | bytes | None, id: str | bytes | None, retry_ms: int | None) -> str:
    lines = ""
    if event is not None:
        if not event:
            raise ValueError("event is empty, which would be read back as message")
        lines = f"event: {_one_line('event', event)}\n"
    if id is not None:
        lines += f"id: {_one_line('id', id)}\n"
    if retry_ms is not None:
        if not 0 <= retry_ms <= MAX_RETRY_MS:
            raise ValueError(f"retry_ms is not between 0 and {MAX_RETRY_MS}")
        lines += f"retry: {retry_ms:d}\n"
    return lines


def _one_line(name: str, text: str | bytes) -> str:
    if isinstance(text, bytes):
        text = text.decode()
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError(f"{name} has a CR, LF or NUL")
    return text
