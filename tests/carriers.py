"""A service with a scripted backend on a clock that the test moves, and the carriers through which it can be asked.

A policy test takes the fixture `carrier`, opens a `House` with it and asks; it knows nothing of the wire, so that it holds
for every carrier in `CARRIERS`. A carrier's author writes a `Client` and adds it there.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

import h11

from tokenwire.adapters.asgi_carrier import Hall, serve
from tokenwire.adapters.asgi_messages import Message
from tokenwire.adapters.timers import Timers
from tokenwire.core.actions import Abort, Action, Close, PeerMachine, Record, Upgrade
from tokenwire.core.connection import Connection, ConnectionOptions
from tokenwire.core.contracts import ModelCard, Principal, StreamHandle
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.events import StreamEnd
from tokenwire.core.peers import PeerShare
from tokenwire.core.request import GenerationRequest
from tokenwire.core.service import Service, ServiceOptions
from tokenwire.core.stream import Item

__all__ = [
    "CARRIERS",
    "HOST",
    "SECOND",
    "Answer",
    "AsgiClient",
    "Asked",
    "Carriage",
    "Client",
    "House",
    "HttpClient",
    "MemoryPeer",
    "ScriptedJob",
    "ScriptedSource",
    "Steps",
    "asgi_loop",
    "read_answers",
    "request_bytes",
    "settled",
]

SECOND = 1_000_000_000
HOST = "127.0.0.1:8000"
WALL_S = 1_700_000_000
_ENOUGH_TURNS = 12
"""Turns of an event loop after which tasks that only wait for each other have come to rest."""

Headers = tuple[tuple[str, str], ...]
Steps = Sequence[Sequence[Item]]
"""What a backend says to one request, engine step by engine step."""

HELLO: Steps = (["Hel"], ["lo"], [StreamEnd()])


class Asked(NamedTuple):
    """A request in the words of HTTP's semantics, without any framing."""

    method: str
    target: str
    headers: Headers = ()
    body: bytes = b""


class Answer(NamedTuple):
    """What came back, framing removed.

    `whole` says whether its end has come, `closed` whether the server lets nothing follow it, `records` what was logged
    since the question.
    """

    status: int
    headers: Headers
    body: bytes
    whole: bool = True
    closed: bool = False
    records: tuple[Record, ...] = ()

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key == name]
        assert len(found) < 2, f"{name} came {len(found)} times"
        return found[0] if found else None

    def json(self) -> Any:
        return json.loads(self.body)


class ScriptedJob:
    """A backend's work on one stream, as far as a test wants to see it."""

    def __init__(self, stream: StreamHandle, request: GenerationRequest) -> None:
        self.stream = stream
        self.request = request
        self.cancels = 0
        self.blocked: list[bool] = []
        self.played = False

    def cancel(self) -> None:
        self.cancels += 1

    def set_blocked(self, blocked: bool) -> None:
        self.blocked.append(blocked)


class ScriptedSource:
    """A push backend that says what the test tells it.

    Attributes:
        script: what it says to a request by itself; None for silence.
        fault: what `start` raises, or None.
        jobs: all that were started, in order.
    """

    def __init__(self, models: Sequence[ModelCard], honours: frozenset[str]) -> None:
        self.models = models
        self.honours = honours
        self.script: Callable[[GenerationRequest], Steps] | None = lambda _: HELLO
        self.fault: Exception | None = None
        self.jobs: list[ScriptedJob] = []

    def start(self, stream: StreamHandle, request: GenerationRequest) -> ScriptedJob:
        if self.fault is not None:
            raise self.fault
        job = ScriptedJob(stream, request)
        self.jobs.append(job)
        return job


class _Facts:
    def __init__(self) -> None:
        self._count = 0

    def new_id(self) -> str:
        self._count += 1
        return f"{self._count:04d}"

    def wall_s(self) -> int:
        return WALL_S


class Party(Protocol):
    """Whoever is at the other end of a carrier."""

    def tick(self) -> None:
        """The clock has moved."""
        ...

    def drain(self) -> None:
        """The server is going down."""
        ...


class Client(Party, Protocol):
    """One client on one carrier; requests follow each other."""

    @property
    def closed(self) -> bool:
        """Whether the server lets no further request follow."""
        ...

    def begin(self, asked: Asked) -> None:
        """Send a whole request, and let the core do all that it can do now."""
        ...

    def answer(self) -> Answer:
        """Give what has come of the last request's answer so far."""
        ...

    def leave(self) -> None:
        """Go away, in the middle of an answer or after it."""
        ...


class House:
    """Everything behind a carrier, and the clients in front of it.

    Attributes:
        now: the clock, in nanoseconds; `advance` moves it.
        records: all that was logged.
        reports: exceptions that were reported, with stream ids.
        turns: how often the dispatcher asked for another turn.
        others: who is told of the time, and of the server's going down, besides the clients.
    """

    def __init__(
        self,
        new_client: Callable[[House], Client],
        *,
        options: ServiceOptions | None = None,
        honours: frozenset[str] = frozenset(),
        models: Sequence[ModelCard] = (ModelCard("tiny-1"), ModelCard("tiny-2")),
    ) -> None:
        self.now = 5 * SECOND
        self.records: list[Record] = []
        self.reports: list[tuple[Exception, str]] = []
        self.turns = 0
        self.source = ScriptedSource(models, honours)
        self.service = Service(models=models, honours=honours, facts=_Facts(), options=options)
        self.dispatcher = Dispatcher(
            self.service,
            self.source,
            log=self.records.append,
            report=lambda error, stream_id: self.reports.append((error, stream_id)),
            yield_to_loop=self._yield_to_loop,
        )
        self._new_client = new_client
        self._clients: list[Client] = []
        self.others: list[Party] = []

    def connect(self) -> Client:
        client = self._new_client(self)
        self._clients.append(client)
        return client

    def ask(self, asked: Asked) -> Answer:
        """Ask on the connection that was used last where that still goes, else on a new one; play the script."""
        client = self._clients[-1] if self._clients and not self._clients[-1].closed else self.connect()
        return self.ask_on(client, asked)

    def ask_on(self, client: Client, asked: Asked) -> Answer:
        before = len(self.records)
        client.begin(asked)
        self.play()
        return client.answer()._replace(records=tuple(self.records[before:]))

    def play(self) -> None:
        """Let the backend say its script to every request that it has not answered yet."""
        while self.source.script is not None and (jobs := [job for job in self.source.jobs if not job.played]):
            for job in jobs:
                job.played = True
                for items in self.source.script(job.request):
                    self.say(job, *items)

    def say(self, job: ScriptedJob, *items: Item) -> None:
        """Deliver one engine step of one stream, and what was put off."""
        self.dispatcher.deliver([(job.stream, items)], self.now)
        while self.dispatcher.deferred:
            self.dispatcher.resume(self.now)

    def advance(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        for party in (*self._clients, *self.others):
            party.tick()

    def drain(self) -> None:
        self.service.draining = True
        for party in (*self._clients, *self.others):
            party.drain()

    def _yield_to_loop(self) -> None:
        self.turns += 1


class MemoryPeer:
    """A connection's carrier whose wire is memory; the test is the transport and the peer.

    Attributes:
        connection: the one on HTTP/1.1.
        machine: what is driven: the connection, and after an upgrade another.
        received: what the peer has got so far.
        writes: what the core has written, call by call.
        actions: what the connection has asked for, in order.
        room: how many bytes the transport still takes; None for any number.
    """

    def __init__(self, house: House, options: ConnectionOptions | None = None, share: PeerShare | None = None) -> None:
        self.connection = Connection(house.service, Principal(), house.now, options, share)
        self.machine: PeerMachine = self.connection
        self.received = bytearray()
        self.writes: list[bytes] = []
        self.actions: list[Action] = []
        self.room: int | None = None
        self._house = house
        self._waiting = bytearray()
        self._gone = False

    @property
    def ended(self) -> bool:
        """Whether the peer has seen our end: a FIN behind all that was said, or a reset."""
        return self.aborted or (any(isinstance(action, Close) for action in self.actions) and not self._waiting)

    @property
    def aborted(self) -> bool:
        return self._gone

    def write(self, data: bytes) -> None:
        assert data, "an empty write"
        self.writes.append(data)
        if self._gone:
            return
        blocked = bool(self._waiting)
        self._waiting += data
        if not blocked:
            self._transmit()
            if self._waiting:
                self._perform(self.machine.set_blocked(True, self._house.now))

    def settle(self, now: int) -> None:
        self._perform(self.machine.settle(now))

    def receive(self, data: bytes) -> None:
        self._perform(self.machine.receive_data(data, self._house.now))

    def end(self) -> None:
        """The peer has ended its side."""
        self._perform(self.machine.receive_eof(self._house.now))

    def lose(self) -> None:
        """The peer has reset the connection."""
        self._gone = True
        actions = self.machine.lost(self._house.now)
        self.actions += actions
        self._house.dispatcher.perform(actions, self, self._house.now)

    def take(self, size: int | None = None) -> None:
        """The peer reads: the transport has room for so many bytes more."""
        self.room = None if size is None else (self.room or 0) + size
        before = len(self._waiting)
        self._transmit()
        if before and len(self._waiting) < before:
            self._perform(self.machine.set_blocked(bool(self._waiting), self._house.now))

    def tick(self) -> None:
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline <= self._house.now and not self._gone:
            self._perform(self.machine.handle_deadline(self._house.now))

    def drain(self) -> None:
        self._perform(self.machine.drain(self._house.now))

    def _transmit(self) -> None:
        size = len(self._waiting) if self.room is None else min(self.room, len(self._waiting))
        self.received += self._waiting[:size]
        del self._waiting[:size]
        if self.room is not None:
            self.room -= size

    def _perform(self, actions: Sequence[Action]) -> None:
        """As the pump does it: write what there is to say, then do what is asked."""
        data = b"".join(self.machine.data_to_send())
        if data:
            self.write(data)
        self.actions += actions
        self._house.dispatcher.perform(actions, self, self._house.now)
        if any(isinstance(action, Abort) for action in actions):
            self._gone = True
            self._waiting.clear()
        for action in actions:
            if isinstance(action, Upgrade):
                self._upgrade(action)

    def _upgrade(self, action: Upgrade) -> None:
        self.machine = action.machine
        if self._waiting:
            self._perform(self.machine.set_blocked(True, self._house.now))
        self._perform(self.machine.receive_data(action.rest, self._house.now))


class HttpClient:
    """A client of HTTP bytes over a `Connection`; a `Client`, and more for tests of bytes."""

    def __init__(self, house: House, options: ConnectionOptions | None = None) -> None:
        self.peer = MemoryPeer(house, options)
        self._house = house
        self._methods: list[str] = []

    @property
    def closed(self) -> bool:
        return self.peer.ended

    def begin(self, asked: Asked) -> None:
        self.begin_bytes(request_bytes(asked), asked.method)

    def begin_bytes(self, data: bytes, method: str = "GET") -> None:
        self._methods.append(method)
        self.peer.receive(data)

    def ask_bytes(self, data: bytes, method: str = "GET", *, eof: bool = False) -> Answer:
        """Send what may be no request at all, then perhaps the end of input; play the script."""
        before = len(self._house.records)
        self.begin_bytes(data, method)
        if eof:
            self.peer.end()
        self._house.play()
        return self.answer()._replace(records=tuple(self._house.records[before:]))

    def answer(self) -> Answer:
        answers = self.answers()
        assert len(answers) == len(self._methods), f"{len(answers)} answers to {len(self._methods)} requests"
        return answers[-1]

    def answers(self) -> list[Answer]:
        return read_answers(bytes(self.peer.received), self._methods, ended=self.peer.ended)

    def leave(self) -> None:
        self.peer.end()

    def tick(self) -> None:
        self.peer.tick()

    def drain(self) -> None:
        self.peer.drain()


class AsgiClient:
    """A client of ASGI messages; a `Client`. Each request is a scope of its own, in an event loop that the client turns."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._timers = Timers(lambda _: None)
        self._loop = asgi_loop()
        self._hall = Hall(
            house.service, house.dispatcher, lambda: house.now, self._timers.call_at, self._loop.create_future
        )
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._sent: list[Message] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether the application has asked for the connection's end, which it can do in the head only."""
        return (b"connection", b"close") in self._sent[0]["headers"] if self._sent else False

    def begin(self, asked: Asked) -> None:
        self._turn()
        self._inbox = asyncio.Queue()
        sent: list[Message] = []
        self._sent = sent
        path, _, query = asked.target.partition("?")
        for message in _body_messages(asked):
            self._inbox.put_nowait(message)

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": asked.method,
            "path": unquote(path),
            "query_string": query.encode(),
            "root_path": "",
            "headers": _asgi_headers(asked),
        }
        self._task = self._loop.create_task(serve(self._hall, scope, self._inbox.get, send))
        self._turn()

    def answer(self) -> Answer:
        self._turn()
        assert self._sent, "no answer yet"
        start, *bodies = self._sent
        assert start["type"] == "http.response.start"
        headers = [(name.decode(), value.decode("latin-1")) for name, value in start["headers"]]
        assert "date" not in dict(headers), "servers write the date themselves"
        dated = (*headers, ("date", formatdate(WALL_S, usegmt=True)))
        body = b"".join(message["body"] for message in bodies)
        whole = bool(bodies) and not bodies[-1]["more_body"]
        return Answer(
            start["status"], tuple(header for header in dated if header[0] != "connection"), body, whole, self.closed
        )

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})
        self._turn()

    def tick(self) -> None:
        self._timers.run(self._house.now)
        self._turn()

    def drain(self) -> None:
        self._turn()

    def _turn(self) -> None:
        """Let the loop turn until nothing moves any more."""
        self._loop.run_until_complete(settled())
        if self._task is not None and self._task.done():
            self._task.result()


@functools.cache
def asgi_loop() -> asyncio.AbstractEventLoop:
    """The one loop of all of these clients, which is closed with the tests' process."""
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


async def settled() -> None:
    """Let the loop turn until nothing moves any more."""
    for _ in range(_ENOUGH_TURNS):
        await asyncio.sleep(0)


def _asgi_headers(asked: Asked) -> list[tuple[bytes, bytes]]:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in asked.headers]
    names = {name for name, _ in headers}
    if b"host" not in names:
        headers.insert(0, (b"host", HOST.encode()))
    if asked.body and not names & {b"content-length", b"transfer-encoding"}:
        headers.append((b"content-length", b"%d" % len(asked.body)))
    return headers


def _body_messages(asked: Asked) -> list[Message]:
    """The body as a server hands it on: chunks are taken out of their coding."""
    pieces = [asked.body]
    if ("transfer-encoding", "chunked") in asked.headers:
        server = h11.Connection(h11.SERVER)
        server.receive_data(request_bytes(asked))
        events = iter(server.next_event, h11.NEED_DATA)
        pieces = [bytes(event.data) for event in events if isinstance(event, h11.Data)]
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False
    return messages


class Carriage:
    """What the fixture `carrier` gives: a way to open houses that are reached through one kind of carrier."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def closes_late(self) -> bool:
        """Whether it can let nothing follow an answer whose head has left. An ASGI application has no say in that."""
        return self.name != "asgi"

    def house(
        self,
        *,
        options: ServiceOptions | None = None,
        honours: frozenset[str] = frozenset(),
        models: Sequence[ModelCard] = (ModelCard("tiny-1"), ModelCard("tiny-2")),
    ) -> House:
        return House(CARRIERS[self.name], options=options, honours=honours, models=models)


CARRIERS: dict[str, Callable[[House], Client]] = {"asgi": AsgiClient, "http": HttpClient}
"""Every carrier that the policy tests run through."""


def request_bytes(asked: Asked) -> bytes:
    """Write a request in HTTP/1.1, with a Host and a Content-Length where they are missing and needed."""
    names = {name for name, _ in asked.headers}
    lines = [f"{asked.method} {asked.target} HTTP/1.1"]
    if "host" not in names:
        lines.append(f"host: {HOST}")
    lines += [f"{name}: {value}" for name, value in asked.headers]
    if asked.body and not names & {"content-length", "transfer-encoding"}:
        lines.append(f"content-length: {len(asked.body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + asked.body


def read_answers(data: bytes, methods: Sequence[str], *, ended: bool) -> list[Answer]:
    """Read answers with somebody else's parser.

    Args:
        data: all that came.
        methods: of the requests, in order: the answer to HEAD has no body.
        ended: whether the connection's end came after the data.
    """
    answers: list[Answer] = []
    for method in methods:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("host", "test")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        if ended:
            client.receive_data(b"")
        answer = _read_answer(client) if b"\r\n\r\n" in data else None
        if answer is None:
            break
        answers.append(answer)
        data = client.trailing_data[0]
        if not answer.whole:
            break
    if ended and answers:
        answers[-1] = answers[-1]._replace(closed=True)
    return answers


def _read_answer(client: h11.Connection) -> Answer | None:
    head: h11.Response | None = None
    body = bytearray()
    whole = False
    while not whole:
        try:
            event = client.next_event()
        except h11.RemoteProtocolError:
            if client.trailing_data[0] or not client.trailing_data[1]:
                raise  # it is no answer; else its end is missing
            break
        if isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
            break
        whole = isinstance(event, h11.EndOfMessage)
    if head is None:
        return None
    headers = tuple((bytes(name).decode(), bytes(value).decode("latin-1")) for name, value in head.headers)
    return Answer(head.status_code, headers, bytes(body), whole)
