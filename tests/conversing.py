"""WebSockets to a house, through each carrier that has them: frames of RFC 6455 by wsproto's client, and ASGI's messages.

A test takes the fixture `wire`, opens a `Socket` with it and talks; it knows nothing of frames, so that it holds for both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple, Protocol

from tests.carriers import HOST, Answer, House, MemoryPeer, asgi_loop, settled
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from tokenwire.adapters.asgi_carrier import Hall
from tokenwire.adapters.asgi_messages import Message, Scope
from tokenwire.adapters.asgi_websocket import converse
from tokenwire.adapters.timers import Timers
from tokenwire.core.connection import ConnectionOptions
from tokenwire.core.conversation import SUBPROTOCOLS
from tokenwire.core.peers import PeerShare

__all__ = ["DONE", "OBJECTS", "WIRES", "ByteSocket", "Frame", "MessageSocket", "Socket", "Wire", "read_frames"]

DONE: Final = "[DONE]"
OBJECTS: Final = SUBPROTOCOLS
"""The subprotocols of a client that wants objects."""

_CLOSE: Final = 0x8
Headers = tuple[tuple[str, str], ...]


class Socket(Protocol):
    """One WebSocket as its client sees it.

    Attributes:
        accepted: the handshake has succeeded.
        subprotocol: what was agreed on.
        rejected: the answer of HTTP to a handshake that did not.
        texts: the messages that have come.
        closed: the close code and reason that have come; 1006 where the server only ended the connection.
    """

    accepted: bool
    subprotocol: str | None
    rejected: Answer | None
    texts: list[str]
    closed: tuple[int, str] | None

    def is_open(self) -> bool:
        """Whether no close has come."""
        ...

    def within(self, call: Callable[[], object]) -> None:
        """Do what the server's own loop would call."""
        ...

    def say(self, text: str) -> None:
        """Send a text message."""
        ...

    def say_bytes(self, data: bytes) -> None:
        """Send a binary message."""
        ...

    def close(self, code: int = 1000) -> None:
        """Close, as RFC 6455 says."""
        ...

    def vanish(self) -> None:
        """Be gone without a word."""
        ...

    def stall(self) -> None:
        """Take nothing any more."""
        ...

    def read_on(self) -> None:
        """Take all that has waited, and all that comes."""
        ...

    def tick(self) -> None:
        """The clock has moved."""
        ...

    def drain(self) -> None:
        """The server is going down."""
        ...


class Frame(NamedTuple):
    """A frame of a server."""

    opcode: int
    payload: bytes


def read_frames(data: bytes) -> list[Frame]:
    """Read a server's frames, all of them whole, unmasked and of one piece each.

    Raises:
        AssertionError: they are not.
    """
    frames: list[Frame] = []
    while data:
        assert data[0] & 0xF0 == 0x80, "not the only frame of its message"
        size, start = data[1], 2
        if size >= 126:
            start = 4 if size == 126 else 10
            size = int.from_bytes(data[2:start], "big")
        assert len(data) >= start + size, "half a frame"
        frames.append(Frame(data[0] & 0xF, data[start : start + size]))
        data = data[start + size :]
    return frames


class ByteSocket:
    """A client of frames over a `Connection` and what it is upgraded to; a `Socket`.

    Attributes:
        peer: the carrier; its wire is memory.
        client: wsproto's side.
        pings: how many have come.
        polite: whether pings and closes are answered.
    """

    def __init__(
        self,
        house: House,
        target: str = "/ws/chat",
        *,
        headers: Headers = (),
        subprotocols: Sequence[str] = (),
        host: str = HOST,
        options: ConnectionOptions | None = None,
        share: PeerShare | None = None,
        first: bytes = b"",
    ) -> None:
        self.accepted = False
        self.subprotocol: str | None = None
        self.rejected: Answer | None = None
        self.texts: list[str] = []
        self.closed: tuple[int, str] | None = None
        self.pings = 0
        self.polite = True
        self.peer = MemoryPeer(house, options, share)
        self.client = WSConnection(ConnectionType.CLIENT)
        self._seen = 0
        self._text = ""
        self._ended = False
        house.others.append(self)
        extra = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        asked = Request(host=host, target=target, extra_headers=extra, subprotocols=list(subprotocols))
        self.peer.receive(self.client.send(asked) + first)
        self.read()

    @property
    def frames(self) -> list[Frame]:
        """All frames that have come; none may follow a close frame."""
        received = bytes(self.peer.received)
        frames = read_frames(received[received.index(b"\r\n\r\n") + 4 :])
        assert all(frame.opcode != _CLOSE for frame in frames[:-1]), "something follows the close frame"
        return frames

    def is_open(self) -> bool:
        return self.closed is None

    def within(self, call: Callable[[], object]) -> None:
        call()
        self.read()

    def say(self, text: str) -> None:
        self.send(TextMessage(text))

    def say_bytes(self, data: bytes) -> None:
        self.send(BytesMessage(data))

    def close(self, code: int = 1000) -> None:
        self.send(CloseConnection(code))

    def send(self, event: Event) -> None:
        """Send what wsproto makes of an event, unless the WebSocket is closed."""
        if self.client.state is ConnectionState.OPEN:
            self.send_raw(self.client.send(event))

    def send_raw(self, data: bytes) -> None:
        """Send any bytes."""
        if not self.peer.ended:
            self.peer.receive(data)
        self.read()

    def vanish(self) -> None:
        self.peer.lose()

    def stall(self) -> None:
        self.peer.room = 0

    def read_on(self) -> None:
        self.peer.take()
        self.read()

    def tick(self) -> None:
        self.peer.tick()
        self.read()

    def drain(self) -> None:
        self.peer.drain()
        self.read()

    def read(self) -> None:
        """Look at what has come."""
        data, self._seen = bytes(self.peer.received[self._seen :]), len(self.peer.received)
        if data:
            self.client.receive_data(data)
            for event in self.client.events():
                self._on(event)
        if self.peer.ended and not self._ended:
            self._ended = True
            self.closed = self.closed or (1006, "")
            if not self.peer.aborted:
                self.peer.end()

    def _on(self, event: Event) -> None:
        match event:
            case AcceptConnection():
                self.accepted = True
                self.subprotocol = event.subprotocol
            case RejectConnection():
                headers = tuple((name.decode(), value.decode("latin-1")) for name, value in event.headers)
                self.rejected = Answer(event.status_code, headers, b"", whole=not event.has_body)
            case RejectData():
                assert self.rejected is not None
                body = self.rejected.body + event.data
                self.rejected = self.rejected._replace(body=body, whole=event.body_finished)
            case TextMessage():
                self._text += event.data
                if event.message_finished:
                    self.texts.append(self._text)
                    self._text = ""
            case Ping():
                self.pings += 1
                if self.polite and self.client.state is ConnectionState.OPEN:
                    self.peer.receive(self.client.send(event.response()))
            case Pong():
                assert self.peer.machine is not self.peer.connection
            case CloseConnection():
                self.closed = (event.code, event.reason or "")
                if self.polite and self.client.state is ConnectionState.REMOTE_CLOSING:
                    self.peer.receive(self.client.send(event.response()))
            case _:
                raise AssertionError(f"{event} from a server")


class MessageSocket:
    """A client of ASGI messages, in an event loop that it turns; a `Socket`.

    Attributes:
        sent: all that the application has sent.
    """

    def __init__(
        self,
        house: House,
        target: str = "/ws/chat",
        *,
        headers: Headers = (),
        subprotocols: Sequence[str] = (),
        host: str = HOST,
    ) -> None:
        self.accepted = False
        self.subprotocol: str | None = None
        self.rejected: Answer | None = None
        self.texts: list[str] = []
        self.closed: tuple[int, str] | None = None
        self.sent: list[Message] = []
        self._loop = asgi_loop()
        self._timers = Timers(lambda _: None)
        self._house = house
        hall = Hall(house.service, house.dispatcher, lambda: house.now, self._timers.call_at, self._loop.create_future)
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        self._room: asyncio.Event | None = None
        path, _, query = target.partition("?")
        named = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        scope: Scope = {
            "type": "websocket",
            "path": path,
            "query_string": query.encode(),
            "headers": [(b"host", host.encode()), (b"upgrade", b"websocket"), *named],
            "subprotocols": list(subprotocols),
            "extensions": {"websocket.http.response": {}},
        }
        house.others.append(self)
        self._task = self._loop.create_task(converse(hall, scope, self._inbox.get, self._send))
        self._turn()

    def is_open(self) -> bool:
        return self.closed is None

    def within(self, call: Callable[[], object]) -> None:
        async def run() -> None:
            call()

        self._loop.run_until_complete(run())
        self._turn()

    def say(self, text: str) -> None:
        self._hand_in({"type": "websocket.receive", "text": text})

    def say_bytes(self, data: bytes) -> None:
        self._hand_in({"type": "websocket.receive", "bytes": data})

    def close(self, code: int = 1000) -> None:
        self._hand_in({"type": "websocket.disconnect", "code": code})

    def vanish(self) -> None:
        self.close(1006)

    def stall(self) -> None:
        self._room = asyncio.Event()

    def read_on(self) -> None:
        if self._room is not None:
            self._room.set()
        self._room = None
        self._turn()

    def tick(self) -> None:
        self.within(partial(self._timers.run, self._house.now))

    def drain(self) -> None:
        self._turn()

    def read(self) -> None:
        """Let the application come to rest."""
        self._turn()

    def _hand_in(self, message: Message) -> None:
        if self.closed is None:
            self._inbox.put_nowait(message)
        self._turn()

    async def _send(self, message: Message) -> None:
        if self._room is not None:
            await self._room.wait()
        self.sent.append(message)
        assert self.closed is None, f"{message} follows the close"
        match message["type"]:
            case "websocket.accept":
                self.accepted = True
                self.subprotocol = message["subprotocol"]
            case "websocket.send":
                self.texts.append(message["text"])
            case "websocket.close":
                self.closed = (message["code"], message["reason"])
            case "websocket.http.response.start":
                headers = tuple((name.decode(), value.decode("latin-1")) for name, value in message["headers"])
                self.rejected = Answer(message["status"], headers, b"", whole=False)
            case _:
                assert message["type"] == "websocket.http.response.body"
                assert self.rejected is not None
                self.rejected = self.rejected._replace(body=message["body"], whole=True)

    def _turn(self) -> None:
        self._loop.run_until_complete(settled())
        if self._task.done():
            self._task.result()
            self.closed = self.closed or (1006, "")


class Wire(NamedTuple):
    """What the fixture `wire` gives."""

    name: str
    open: Callable[..., ByteSocket | MessageSocket]


WIRES: Final = {"asgi": Wire("asgi", MessageSocket), "http": Wire("http", ByteSocket)}
"""Every carrier of conversations."""
