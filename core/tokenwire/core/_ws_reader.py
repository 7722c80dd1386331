"""Reading WebSocket frames and assembling messages (RFC 6455, 5 and 8.1): bytes in, events out, every limit held.

Payloads are unmasked, inflated and checked for UTF-8 as they come, so that the first wrong byte ends the connection and
not the frame's last. What is kept is the message so far, and of an unfinished header or control frame at most 139 bytes.
"""

from __future__ import annotations

from codecs import utf_8_decode
from typing import Final

from msgspec import Struct

from ._ws_deflate import WRONG_TEXT_OR_DATA, Inflater
from ._ws_frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    FIN,
    MASKED,
    MAX_CONTROL_BYTES,
    PING,
    PONG,
    RSV1,
    TEXT,
    CloseCode,
    Fault,
    apply_mask,
    parse_close,
)

__all__ = [
    "MAX_FRAGMENTS",
    "MAX_MESSAGE_BYTES",
    "BinaryMessage",
    "Closed",
    "MessageReader",
    "Ping",
    "Pong",
    "TextMessage",
    "WebSocketEvent",
]

MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""A message's payload, inflated. A prompt of a million tokens has 4 MiB, but the usual one some KiB."""

MAX_FRAGMENTS: Final = 4096
"""Frames of one message: a peer that sends a message of the greatest size in pieces of 256 bytes stays under it."""


class TextMessage(Struct, frozen=True, gc=False):
    """A whole text message."""

    text: str
    """The text, whose UTF-8 was checked."""


class BinaryMessage(Struct, frozen=True, gc=False):
    """A whole binary message."""

    data: bytes
    """The bytes."""


class Ping(Struct, frozen=True, gc=False):
    """The peer pings; its pong is in `data_to_send` already, unless our close frame was made before."""

    payload: bytes
    """What the pong repeats."""


class Pong(Struct, frozen=True, gc=False):
    """The peer answers a ping, or says unasked that it lives."""

    payload: bytes
    """The ping's payload, where it is an answer."""


class Closed(Struct, frozen=True, gc=False):
    """No message comes any more; the last event, exactly once."""

    code: int
    """The peer's close code, CloseCode.NO_STATUS where it named none; our own where it broke a rule;
    CloseCode.ABNORMAL for an end of input without a close frame."""
    reason: str
    """What goes with the code."""
    clean: bool
    """Whether the peer sent a close frame."""
    fault: bool = False
    """Whether the peer broke a rule; `reason` names it."""


WebSocketEvent = TextMessage | BinaryMessage | Ping | Pong | Closed

_OPCODE: Final = 0x0F
_LENGTH: Final = 0x7F
_RESERVED: Final = 0x70
_CONTROL: Final = 0x08
_WHOLE_TEXT: Final = FIN | TEXT
_LENGTH_16: Final = 126
_MIN_LENGTH_64: Final = 0x10000
_NO_KEY: Final = b""
_DENSE: Final = 1024  # a peer that sends a byte at a time must not make us keep an object for each


def _first_byte_fault(byte: int, reserved: int) -> str | None:
    """Say what is wrong with a frame's first byte, whatever comes before and after it (5.2, 5.5)."""
    opcode = byte & _OPCODE
    if byte & reserved or (byte & _RESERVED and opcode not in (TEXT, BINARY)):
        return "reserved bit set without an extension that means it"
    if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
        return "reserved opcode"
    if opcode & _CONTROL and not byte & FIN:
        return "fragmented control frame"
    return None


_FAULTS: Final = tuple(_first_byte_fault(byte, _RESERVED) for byte in range(256))
_FAULTS_DEFLATED: Final = tuple(_first_byte_fault(byte, _RESERVED & ~RSV1) for byte in range(256))


class MessageReader:
    """Reads one direction of an open connection.

    Args:
        server: whether we are the server: then the peer must mask, else it must not (5.1).
        inflater: where permessage-deflate was agreed.
        max_message_bytes: the longest message, inflated.
        max_fragments: the most frames of one message.

    Attributes:
        stirred: whether the last call gave anything but messages.
    """

    __slots__ = (
        "_binary",
        "_carry",
        "_compressed",
        "_faults",
        "_final",
        "_fragments",
        "_held",
        "_inflater",
        "_key",
        "_left",
        "_mask_bit",
        "_max_fragments",
        "_max_message",
        "_opcode",
        "_quick_bytes",
        "_rest_bytes",
        "_size",
        "_text",
        "_texts",
        "_wire_room",
        "stirred",
    )

    def __init__(self, *, server: bool, inflater: Inflater | None, max_message_bytes: int, max_fragments: int) -> None:
        self._mask_bit = MASKED if server else 0
        self._inflater = inflater
        self._faults = _FAULTS if inflater is None else _FAULTS_DEFLATED
        self._max_message = max_message_bytes
        self._max_fragments = max_fragments
        self._held = b""  # the beginning of a header or of a control frame
        self._left = 0  # bytes of the present data frame that have not come
        self._key = _NO_KEY
        self._final = False
        self._opcode = CONTINUATION  # of the message in progress; CONTINUATION while there is none
        self._size = 0  # of the message in progress, inflated
        # What there is of it. Text is decoded as it comes, and once.
        self._texts: list[str] | None = None
        self._text = ""  # behind them, shorter than _DENSE
        self._binary: bytearray | None = None
        self._carry = b""  # the beginning of a character
        self._fragments = 0
        self._compressed = False
        self._wire_room = 0  # bytes that a compressed message may still have on the wire
        # The longest payload of the usual frame that is read in one go, at rest and now; -1 while anything waits.
        self._rest_bytes = max_message_bytes if server else -1
        self._quick_bytes = self._rest_bytes
        self.stirred = False

    def receive_data(self, data: bytes) -> list[WebSocketEvent]:
        """Take bytes, return what they complete.

        A fault or a close frame makes Closed the last event; nothing may be given to the reader after it.
        """
        # The usual read is one masked text frame, whole, as browsers send it. Any doubt is left to the long way.
        size = len(data)
        if size >= 6 and data[0] == _WHOLE_TEXT:
            length, start = data[1] - MASKED, 6
            if length > MAX_CONTROL_BYTES:
                # Only a length of 2 bytes, in its shortest form, can be that of the whole read.
                long = length == _LENGTH_16 and size > 8 + MAX_CONTROL_BYTES
                length, start = (data[2] << 8 | data[3], 8) if long else (-1, 0)
            if size - start == length <= self._quick_bytes:
                try:
                    text = apply_mask(data[start:], data[start - 4 : start]).decode()
                except UnicodeDecodeError:
                    pass
                else:
                    self.stirred = False
                    return [TextMessage(text)]
        return self._receive(data)

    def _receive(self, data: bytes) -> list[WebSocketEvent]:
        events: list[WebSocketEvent] = []
        self.stirred = False
        if self._held:
            data = self._held + data
        try:
            self._read_frames(data, events)
        except Fault as fault:
            self.stirred = True
            events.append(Closed(fault.code, fault.reason, clean=False, fault=True))
        rests = not (self._held or self._left or self._opcode)
        self._quick_bytes = self._rest_bytes if rests else -1
        return events

    def _read_frames(self, data: bytes, events: list[WebSocketEvent]) -> None:
        at, end = 0, len(data)
        if self._left and end:
            at = self._take_payload(data, 0, events)
        while at < end:
            after = self._take_frame(data, at, end, events)
            if not after:
                break
            at = after
        self._held = data[at:]

    def _take_frame(self, data: bytes, at: int, end: int, events: list[WebSocketEvent]) -> int:
        """Take a frame's header and what has come of its payload.

        Returns:
            Where the next frame begins, or the end of the data; 0 when the header or a control frame is not whole: then
            nothing has changed.
        """
        if end - at < 2:
            return 0
        first, second = data[at], data[at + 1]
        if (fault := self._faults[first]) is not None:
            raise Fault(CloseCode.PROTOCOL_ERROR, fault)
        if second & MASKED != self._mask_bit:
            raise Fault(CloseCode.PROTOCOL_ERROR, "frame is not masked" if self._mask_bit else "frame is masked")
        opcode, length = first & _OPCODE, second & _LENGTH
        at += 2
        if opcode & _CONTROL:
            return self._take_control(opcode, length, data, at, end, events)
        if (opcode == CONTINUATION) == (self._opcode == CONTINUATION):
            what = "a message inside a message" if opcode else "a continuation of nothing"
            raise Fault(CloseCode.PROTOCOL_ERROR, what)
        if length > MAX_CONTROL_BYTES:
            width = 2 if length == _LENGTH_16 else 8
            if end - at < width:
                return 0
            length = _long_length(data[at : at + width])
            at += width
        self._check_limits(first, length)
        if self._mask_bit:
            if end - at < 4:
                return 0
            self._key = data[at : at + 4]
            at += 4
        self._begin_data(first, length)
        return self._take_payload(data, at, events)

    def _take_control(
        self, opcode: int, length: int, data: bytes, at: int, end: int, events: list[WebSocketEvent]
    ) -> int:
        """Take a control frame, whole or not at all; it may stand between two fragments (5.4, 5.5)."""
        if length > MAX_CONTROL_BYTES:
            raise Fault(CloseCode.PROTOCOL_ERROR, "long control frame")
        start = at + 4 if self._mask_bit else at
        after = start + length
        if end < after:
            return 0
        payload = data[start:after]
        if self._mask_bit:
            payload = bytes(apply_mask(payload, data[at:start]))
        self.stirred = True
        if opcode == CLOSE:
            code, reason = parse_close(payload)
            events.append(Closed(code, reason, clean=True))
            return end  # 5.5.1: nothing is sent after a close frame, so nothing is read
        events.append(Ping(payload) if opcode == PING else Pong(payload))
        return after

    def _check_limits(self, first: int, length: int) -> None:
        """Refuse a data frame by its header, before its payload is awaited."""
        begins = bool(first & _OPCODE)
        compressed = bool(first & RSV1) if begins else self._compressed
        if not begins and self._fragments >= self._max_fragments:
            raise Fault(CloseCode.MESSAGE_TOO_BIG, f"more than max_fragments={self._max_fragments}")
        room = self._max_message - self._size
        if compressed:
            room = self._max_wire_bytes if begins else self._wire_room
        if length > room:
            raise self._too_big()

    @property
    def _max_wire_bytes(self) -> int:
        """The most that a message within the limit takes when it is deflated, by whatever encoder that is not absurd."""
        return self._max_message + (self._max_message >> 3) + 64

    def _too_big(self) -> Fault:
        return Fault(CloseCode.MESSAGE_TOO_BIG, f"more than max_message_bytes={self._max_message}")

    def _not_utf8(self) -> Fault:
        return Fault(CloseCode.INVALID_DATA, WRONG_TEXT_OR_DATA if self._compressed else "text that is not UTF-8")

    def _begin_data(self, first: int, length: int) -> None:
        opcode = first & _OPCODE
        if opcode:
            self._opcode = opcode
            self._fragments = 0
            self._compressed = bool(first & RSV1)
            self._wire_room = self._max_wire_bytes
        self._fragments += 1
        self._wire_room -= length
        self._final = bool(first & FIN)
        self._left = length

    def _take_payload(self, data: bytes, at: int, events: list[WebSocketEvent]) -> int:
        """Take what has come of the present frame's payload; return where it ends."""
        after = min(at + self._left, len(data))
        size = after - at
        piece: bytes | bytearray = data[at:after]
        self._left -= size
        if size and self._mask_bit:
            piece = apply_mask(piece, self._key)
            if turn := size & 3:
                self._key = self._key[turn:] + self._key[:turn]
        ends = self._final and not self._left
        if self._compressed and self._inflater is not None:
            piece = self._inflate(self._inflater, piece, ends=ends)
        if ends:
            events.append(self._end(piece))
        elif piece:
            self._keep(piece)
        return after

    def _inflate(self, inflater: Inflater, piece: bytes | bytearray, *, ends: bool) -> bytes:
        room = self._max_message - self._size
        out = inflater.inflate(piece, room) if piece else b""
        if ends and len(out) <= room and not inflater.crowded:
            out += inflater.end(room - len(out))
        if len(out) > room or inflater.crowded:
            if self._opcode == TEXT:
                self._decode(out[:room])  # what is wrong first is told, however the bytes were cut
            raise self._too_big() if len(out) > room else _crowded()
        return out

    def _end(self, piece: bytes | bytearray) -> WebSocketEvent:
        """Make the message of what was kept and its last piece."""
        if self._size:
            self._keep(piece)
            if self._carry:
                raise self._not_utf8()
        opcode, self._opcode = self._opcode, CONTINUATION
        size, self._size = self._size, 0
        if opcode == BINARY:
            kept, self._binary = self._binary, None
            return BinaryMessage(bytes(piece if kept is None else kept))
        if size:
            last, self._text = self._text, ""
            texts, self._texts = self._texts, None
            return TextMessage(last if texts is None else "".join((*texts, last)))
        try:
            return TextMessage(piece.decode())
        except UnicodeDecodeError:
            raise self._not_utf8() from None

    def _keep(self, piece: bytes | bytearray) -> None:
        self._size += len(piece)
        if self._opcode == BINARY:
            if self._binary is None:
                self._binary = bytearray()
            self._binary += piece
        else:
            text = self._text + self._decode(piece)
            if len(text) >= _DENSE:
                if self._texts is None:
                    self._texts = []
                self._texts.append(text)
                text = ""
            self._text = text

    def _decode(self, piece: bytes | bytearray) -> str:
        """Decode the next piece of a text; the beginning of a character waits for the rest of it."""
        data = self._carry + piece if self._carry else piece
        try:
            text, used = utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            raise self._not_utf8() from None
        self._carry = bytes(data[used:])
        return text


def _long_length(field: bytes) -> int:
    """Read a length of 2 or 8 bytes: the shortest form only, and no sign bit (5.2)."""
    length = int.from_bytes(field, "big")
    least = MAX_CONTROL_BYTES + 1 if len(field) == 2 else _MIN_LENGTH_64
    if length < least or length >> 63:
        raise Fault(CloseCode.PROTOCOL_ERROR, "length is not in its shortest form or is negative")
    return length


def _crowded() -> Fault:
    return Fault(CloseCode.MESSAGE_TOO_BIG, "too many deflate streams in a message")
