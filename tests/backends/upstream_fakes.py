"""Another server as the gateway sees it: connections that the test steers, on a clock that jumps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from tests.backends.fakes import RecordingSink, heard

from tokenwire.backends.base import Peer
from tokenwire.backends.upstream import UpstreamBackend, UpstreamOptions
from tokenwire.core.contracts import Job
from tokenwire.core.events import Event
from tokenwire.core.request import GenerationRequest
from tokenwire.core.testing.clock import VirtualClock

__all__ = [
    "DONE",
    "HELLO",
    "SECOND",
    "STREAM",
    "FakeDialer",
    "FakeLink",
    "Gateway",
    "answer",
    "chunk",
    "chunked",
    "head",
]

SECOND: Final = 1_000_000_000


class Call(NamedTuple):
    """How a connection was asked for."""

    host: str
    port: int
    tls: bool
    deadline: int


class FakeLink:
    """One connection, from both sides; what the server does is called by the test.

    Attributes:
        call: how it was asked for.
        written: what the gateway has sent.
        closed: the gateway has dropped it, or it has ended.
        dropped: the gateway has dropped it.
        reading: whether the gateway takes bytes.
    """

    def __init__(self, clock: VirtualClock, peer: Peer, call: Call) -> None:
        self._clock = clock
        self._peer = peer
        self._held: list[bytes] = []
        self._stands = False
        self.call = call
        self.written = bytearray()
        self.closed = False
        self.dropped = False
        self.reading = True

    def write(self, data: bytes) -> None:
        if self._stands and not self.closed:
            self.written += data

    def set_reading(self, reading: bool) -> None:
        self.reading = reading
        if reading and self._held:
            self._clock.call_soon(self._flush)

    def close(self) -> None:
        if not self.closed:
            self.closed = self.dropped = True

    def stand(self) -> None:
        """The server takes the connection."""
        if not self.closed:
            self._stands = True
            self._peer.connected(self._clock.now())

    def say(self, *pieces: bytes) -> None:
        """The server sends bytes, each piece a read of its own; they wait while the gateway does not read."""
        self._held += pieces
        self._flush()

    def end(self) -> None:
        """The server hangs up."""
        if not self.closed:
            self.closed = True
            self._peer.receive_eof(self._clock.now())

    def fail(self, reason: str = "Connection refused") -> None:
        """The connection cannot be made, or breaks."""
        if not self.closed:
            self.closed = True
            self._peer.failed(reason, self._clock.now())

    def _flush(self) -> None:
        while self._held and self.reading and not self.closed:
            self._peer.receive_data(self._held.pop(0), self._clock.now())

    @property
    def request(self) -> tuple[list[str], Any]:
        """The last request's head, line by line, and its body."""
        lines, _, body = bytes(self.written).rpartition(b"\r\n\r\n")
        start = lines.rfind(b" HTTP/1.1\r\n")
        begin = max(lines.rfind(b"POST ", 0, start), lines.rfind(b"GET ", 0, start))
        return lines[begin:].decode().split("\r\n"), msgspec.json.decode(body) if body else None


class FakeDialer:
    """Makes connections that do nothing by themselves.

    Attributes:
        links: all that were asked for.
        on_connect: called in the loop's next turn with each.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.links: list[FakeLink] = []
        self.on_connect: Callable[[FakeLink], None] | None = None

    def connect(self, host: str, port: int, peer: Peer, *, tls: bool, deadline: int) -> FakeLink:
        link = FakeLink(self._clock, peer, Call(host, port, tls, deadline))
        self.links.append(link)
        if self.on_connect is not None:
            on_connect = self.on_connect
            self._clock.call_soon(lambda: on_connect(link))
        return link


class FakeRuntime(VirtualClock):
    """A virtual clock with the rest of a runtime."""

    def wake_soon(self, callback: Callable[[], None]) -> None:
        self.call_soon(callback)

    def start_task(self, main: Callable[[], Any]) -> None:
        raise AssertionError(f"{main} is not for a gateway")


class Gateway:
    """A backend with its fakes. The model is configured, so that only requests go out."""

    def __init__(self, url: str = "http://up.test:8080/v1", *, models: Sequence[str] = ("m",), **options: Any) -> None:
        key = options.pop("key", "sk-own")
        self.clock = FakeRuntime(1_000)
        self.dialer = FakeDialer(self.clock)
        self.sink = RecordingSink()
        self.backend = UpstreamBackend(
            url, key=key, models=models, options=UpstreamOptions(**options), wall_s=lambda: 1_445_412_480
        )
        self.backend.use_dialer(self.dialer)
        self.backend.attach(self.clock, self.sink)

    @property
    def link(self) -> FakeLink:
        """The newest connection."""
        return self.dialer.links[-1]

    def start(self, request: GenerationRequest, stream: str = "s", *, stands: bool = True) -> Job:
        """Begin a stream, whose connection stands at once."""
        before = len(self.dialer.links)
        job = self.backend.start(stream, request)
        if stands and len(self.dialer.links) > before:
            self.link.stand()
        return job

    def advance(self, ns: int) -> None:
        self.clock.advance(self.clock.now() + ns)

    def events(self, stream: str = "s", choices: int = 1) -> list[Event]:
        """What the core lets out of a stream; it is legal, and ends with its only terminal event."""
        return heard(self.sink.said[stream], choices)


def head(status: int, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} .", *lines, "", ""]).encode()


def answer(status: int, body: bytes, *lines: str) -> bytes:
    return head(status, *lines, f"content-length: {len(body)}") + body


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def chunk(**members: Any) -> bytes:
    choice = dict[str, Any](index=0, delta=dict[str, Any]()) | members
    return b"data: %b\n\n" % msgspec.json.encode({"id": "up", "created": 1, "model": "up-m", "choices": [choice]})


HELLO: Final = chunk(delta={"role": "assistant", "content": ""}) + chunk(delta={"content": "hello"})
DONE: Final = chunk(finish_reason="stop") + b"data: [DONE]\n\n"
STREAM: Final = head(200, "content-type: text/event-stream", "transfer-encoding: chunked")
