"""WebSocket, both sides, as bytes: RFC 6455 with permessage-deflate of RFC 7692.

A connection begins with a handshake: `accept_upgrade` answers a request's head as a server, `ClientHandshake` asks as a
client. Then a `WebSocketConnection` takes the peer's bytes and gives events, and turns messages into frames; `Keepalive`
says when to ping and when the peer is gone.

wsproto is the oracle of the tests and nothing here imports it. Its handshake owns an h11 connection and wants the request
as bytes, while ours comes as a head that the service has judged; it lets ValueError and UnicodeError out for hostile
headers; its frame writer costs some twenty times a look-up and a concatenation.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from ._ws_deflate import Deflate, DeflateOptions, Deflater, Inflater
from ._ws_frames import (
    BINARY,
    CLOSE,
    FIN,
    MASKED,
    MAX_CONTROL_BYTES,
    PING,
    PONG,
    RSV1,
    TABLED,
    TEXT,
    TEXT_LEADS,
    CloseCode,
    apply_mask,
    close_payload,
    fold_websocket,
    frame_header,
    text_header,
)
from ._ws_handshake import Accepted, ClientHandshake, UpgradeRefused, accept_upgrade
from ._ws_keepalive import LATE_NS, Keepalive, Step
from ._ws_reader import (
    MAX_FRAGMENTS,
    MAX_MESSAGE_BYTES,
    BinaryMessage,
    Closed,
    MessageReader,
    Ping,
    Pong,
    TextMessage,
    WebSocketEvent,
)
from .errors import LocalProtocolError
from .framing import Folded, Template

__all__ = [
    "LATE_NS",
    "MAX_FRAGMENTS",
    "MAX_MESSAGE_BYTES",
    "MAX_PONGS",
    "Accepted",
    "BinaryMessage",
    "ClientHandshake",
    "CloseCode",
    "Closed",
    "Deflate",
    "DeflateOptions",
    "Keepalive",
    "Ping",
    "Pong",
    "Role",
    "State",
    "Step",
    "TextMessage",
    "UpgradeRefused",
    "WebSocketConnection",
    "WebSocketEvent",
    "accept_upgrade",
    "fold_websocket",
    "text_header",
]

MAX_PONGS: Final = 16
"""Pongs that wait to be fetched. RFC 6455, 5.5.3 lets us answer only the latest of a flood of pings."""


class Role(Enum):
    """Which side of the connection we are."""

    SERVER = "server"
    CLIENT = "client"


class State(Enum):
    """How far the closing handshake is (RFC 6455, 7); the opening handshake is over when a connection is made."""

    OPEN = "open"
    """Messages may be sent. They may be received until Closed has come: then what came before it may still be answered,
    until `data_to_send` is fetched."""
    CLOSING = "closing"
    """Our close frame was made and the peer's has not come: messages may still be received."""
    CLOSED = "closed"
    """Nothing is sent or received any more. A server sends what `data_to_send` still gives and ends the transport; a
    client does so when the server has, or after a while (7.1.1)."""


_NO_LEADS: Final = (b"",) * TABLED
_OPEN: Final = State.OPEN
_CLOSING: Final = State.CLOSING
_CLOSED: Final = State.CLOSED


class WebSocketConnection:
    """One open WebSocket: bytes in, events out; messages in, frames out.

    What is sent is returned by the method that makes it, and the caller writes it in the order of the calls. What the
    protocol answers by itself (pongs, our close frame) waits for `data_to_send`; pongs that wait leave with the next
    message, in front of it, so that answers come in the order of the questions.

    The peer's faults raise nothing: they give Closed, and a close frame in `data_to_send` where none was sent. With that
    fetch the state is CLOSED; so after each `receive_data` answer the events first and fetch then. Cutting the input
    differently changes no event, but for deflated data that reaches back beyond the window agreed on: zlib finds that out
    only where the rest has left its buffer.

    Args:
        role: which side we are.
        deflate: what the handshake agreed on; None for no compression.
        mask: gives 4 unpredictable bytes at each call; a client must have it (5.3), a server has no use for it.
        max_message_bytes: the longest message taken, inflated; also the longest frame. Beyond it: close code 1009.
        max_fragments: the most frames of one message taken. Beyond it: close code 1009.

    Raises:
        ValueError: a client without mask.
    """

    __slots__ = ("_deflater", "_ended", "_farewell", "_is_plain", "_mask", "_pongs", "_reader", "_server", "_state")

    def __init__(
        self,
        role: Role,
        *,
        deflate: Deflate | None = None,
        mask: Callable[[], bytes] | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_fragments: int = MAX_FRAGMENTS,
    ) -> None:
        self._server = role is Role.SERVER
        if mask is None and not self._server:
            raise ValueError("a client masks what it sends")
        self._mask = None if self._server else mask
        self._state = _OPEN
        self._ended = False  # whether Closed was given
        self._deflater = None if deflate is None else Deflater(deflate, server=self._server)
        # Whether a text frame is its header and the text: open, no mask, no compression, no pong that waits.
        self._is_plain = self._server and deflate is None
        self._pongs: list[bytes] | None = None  # most connections never need a list
        self._farewell = b""  # our answer to the peer's close frame or fault
        self._reader = MessageReader(
            server=self._server,
            inflater=None if deflate is None else Inflater(deflate, server=self._server),
            max_message_bytes=max_message_bytes,
            max_fragments=max_fragments,
        )

    @property
    def state(self) -> State:
        """How far the closing handshake is."""
        return self._state

    @property
    def role(self) -> Role:
        """Which side we are."""
        return Role.SERVER if self._server else Role.CLIENT

    def receive_data(self, data: bytes) -> list[WebSocketEvent]:
        """Take bytes, return the events that they complete.

        Args:
            data: bytes as they came, cut anywhere; empty bytes mean nothing. After Closed they are passed over: 5.5.1 has
                nothing follow a close frame, and what follows a fault is not to be read (7.1.7).

        Returns:
            The events; after Closed there is none. With Closed the state is CLOSED, but where our own close frame is
            still to leave: then `data_to_send` gives it and makes it so.
        """
        if self._ended:
            return []
        events = self._reader.receive_data(data)
        if self._reader.stirred:
            self._answer(events)
        return events

    def receive_eof(self) -> list[WebSocketEvent]:
        """Take the end of input: Closed with CloseCode.ABNORMAL and state CLOSED, unless Closed was given before."""
        if self._ended:
            return []
        self._ended = True
        self._become(_CLOSED)
        return [Closed(CloseCode.ABNORMAL, "", clean=False)]

    def data_to_send(self) -> list[bytes]:
        """Give what the protocol has to say by itself, once.

        Fetch it when it can be written: until then a flood of pings costs at most `MAX_PONGS` pongs. The state is CLOSED
        when it was OPEN and Closed was given: the last bytes are our close frame.
        """
        out = self._take_pongs()
        if self._farewell:
            out.append(self._farewell)
            self._become(_CLOSED)
        return out

    def send_text(self, text: str) -> bytes:
        """Make a text message.

        Raises:
            LocalProtocolError: the state is not OPEN.
            UnicodeEncodeError: the text has a surrogate. The state is as it was.
        """
        payload = text.encode()
        if self._is_plain:
            size = len(payload)
            return (TEXT_LEADS[size] if size < TABLED else text_header(size)) + payload
        return self._message(TEXT, payload)

    def send_utf8(self, payload: bytes) -> bytes:
        """Make a text message of bytes that are UTF-8 already, unchecked.

        Raises:
            LocalProtocolError: the state is not OPEN.
        """
        if self._is_plain:
            size = len(payload)
            return (TEXT_LEADS[size] if size < TABLED else text_header(size)) + payload
        return self._message(TEXT, payload)

    def send_binary(self, data: bytes) -> bytes:
        """Make a binary message.

        Raises:
            LocalProtocolError: the state is not OPEN.
        """
        return self._message(BINARY, data)

    def send_ping(self, payload: bytes = b"") -> bytes:
        """Make a ping.

        Raises:
            LocalProtocolError: the state is not OPEN.
            ValueError: the payload has more than 125 bytes.
        """
        return self._control(PING, payload)

    def send_pong(self, payload: bytes = b"") -> bytes:
        """Make a pong that nobody asked for (5.5.3); the peer's pings are answered without it.

        Raises:
            LocalProtocolError: the state is not OPEN.
            ValueError: the payload has more than 125 bytes.
        """
        return self._control(PONG, payload)

    def send_close(self, code: int = CloseCode.NORMAL, reason: str = "") -> bytes:
        """Close: begin the closing handshake, or answer the peer's otherwise than by its own code.

        The state is CLOSING, or CLOSED where Closed was given.

        Args:
            code: one that may stand on the wire (7.4), or CloseCode.NO_STATUS for an empty close frame.
            reason: beyond 123 bytes of UTF-8 it is cut off between two characters.

        Returns:
            The close frame, and before it the pongs that waited.

        Raises:
            LocalProtocolError: the state is not OPEN.
            ValueError: the code may not be sent, or a reason comes without a code. The state is as it was.
        """
        self._check_open()
        out = self._after_pongs(self._frame(CLOSE, close_payload(code, reason)))
        self._become(_CLOSED if self._ended else _CLOSING)
        return out

    def fold(self, template: Template) -> Folded:
        """Fold a template into one text message a token.

        The frames it makes are not held against the state: make them in state OPEN only.
        """
        if self._server and self._deflater is None:
            return fold_websocket(template)
        return _FoldedMessage(template, self)

    def _check_open(self) -> None:
        if self._state is not _OPEN:
            raise LocalProtocolError(f"nothing can be sent in state {self._state.name}")

    def _message(self, opcode: int, payload: bytes) -> bytes:
        self._check_open()
        if self._deflater is None:
            return self._after_pongs(self._frame(opcode, payload))
        return self._after_pongs(self._frame(opcode, self._deflater.deflate(payload), FIN | RSV1))

    def _control(self, opcode: int, payload: bytes) -> bytes:
        self._check_open()
        if len(payload) > MAX_CONTROL_BYTES:
            raise ValueError(f"a control frame holds no more than {MAX_CONTROL_BYTES} bytes")
        return self._frame(opcode, payload)

    def _frame(self, opcode: int, payload: bytes, flags: int = FIN) -> bytes:
        if self._mask is None:
            return frame_header(opcode, len(payload), flags=flags) + payload
        key = self._mask()
        header = frame_header(opcode, len(payload), flags=flags, masked=MASKED)
        return b"".join((header, key, apply_mask(payload, key)))

    def _after_pongs(self, frame: bytes) -> bytes:
        return b"".join((*self._take_pongs(), frame)) if self._pongs else frame

    def _take_pongs(self) -> list[bytes]:
        pongs, self._pongs = self._pongs, None
        self._is_plain = self._server and self._deflater is None and self._state is _OPEN
        return pongs or []

    def _become(self, state: State) -> None:
        """Leave the state OPEN."""
        self._state = state
        self._is_plain = False
        self._farewell = b""
        if state is _CLOSED:
            self._pongs = None

    def _answer(self, events: list[WebSocketEvent]) -> None:
        for event in events:
            if type(event) is Ping and self._state is _OPEN:
                self._add_pong(self._frame(PONG, event.payload))
            elif type(event) is Closed:
                self._ended = True
                if self._state is not _OPEN:
                    self._become(_CLOSED)
                    return
                reason = event.reason if event.fault else ""  # 5.5.1: an answer repeats the code
                self._farewell = self._frame(CLOSE, close_payload(event.code, reason))

    def _add_pong(self, frame: bytes) -> None:
        if self._pongs is None:
            self._pongs = []
            self._is_plain = False
        elif len(self._pongs) >= MAX_PONGS:
            del self._pongs[0]
        self._pongs.append(frame)


class _FoldedMessage(Folded):
    """A template whose frames are compressed or masked."""

    __slots__ = ("_connection",)

    def __init__(self, template: Template, connection: WebSocketConnection) -> None:
        super().__init__(template, _NO_LEADS, _no_lead)
        self._connection = connection

    def encode(self, text: str, number: int) -> bytes:
        """Make one message."""
        return self._connection.send_utf8(super().encode(text, number))


def _no_lead(size: int) -> bytes:
    del size
    return b""
