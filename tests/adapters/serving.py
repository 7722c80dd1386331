"""A whole server inside the test's own event loop, on a clock that the test moves, and clients on real sockets.

Nothing here waits for time: `until` lets the loop turn until something is so, and `Clock.advance` fires timers.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskGroup
from tests.carriers import Answer, Asked, ScriptedJob, ScriptedSource, read_answers, request_bytes

from tokenwire.adapters.pump import Readiness
from tokenwire.adapters.server import Server, ServerOptions, bind
from tokenwire.backends.base import Backend, Runtime
from tokenwire.core.contracts import ModelCard, Sink
from tokenwire.core.stream import Item

__all__ = [
    "MILLISECOND",
    "SECOND",
    "Client",
    "Clock",
    "Push",
    "Serving",
    "Start",
    "WatchedReadiness",
    "plain_data",
    "plain_text",
    "plateau",
    "turns",
    "until",
]

SECOND = 1_000_000_000
MILLISECOND = 1_000_000
CHAT = Asked("GET", "/chat?prompt=hi")

_ENOUGH_TURNS = 30
"""Turns of the loop after which a loopback socket has carried what was written to it."""


async def turns(count: int = _ENOUGH_TURNS) -> None:
    """Let the loop turn."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something is so."""
    while not condition():
        await anyio.lowlevel.checkpoint()


async def plateau(count: Callable[[], int]) -> int:
    """Let the loop turn until a count stays as it is."""
    before = -1
    while (now := count()) != before:
        before = now
        await turns()
    return now


class Clock:
    """Virtual time with one timer, which fires when the test moves the clock up to it."""

    def __init__(self) -> None:
        self.time = 1_000 * SECOND
        self.timer: tuple[int, Callable[[], None]] | None = None

    def now(self) -> int:
        return self.time

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        self.timer = (deadline, callback)

    def advance(self, nanoseconds: int) -> None:
        """Move on, and fire what is due on the way, at its time."""
        target = self.time + nanoseconds
        while self.timer is not None and self.timer[0] <= target:
            (deadline, callback), self.timer = self.timer, None
            self.time = max(self.time, deadline)
            callback()
        self.time = target


class WatchedReadiness:
    """A loop's own readiness on virtual time, whose sockets and tasks are written down.

    Attributes:
        sockets: every socket that was ever watched.
        watched: what is watched now, and for what.
        tasks: how many tasks of `start_task` run.
    """

    def __init__(self, real: Readiness, clock: Clock) -> None:
        self.sockets: list[socket.socket] = []
        self.watched: set[tuple[socket.socket, str]] = set()
        self.tasks = 0
        self.repeats = real.repeats
        self.set_timer = clock.set_timer
        self.wake_soon = real.wake_soon
        self._real = real

    def add_reader(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        assert (sock, "read") not in self.watched
        self.sockets.append(sock)
        self.watched.add((sock, "read"))
        self._real.add_reader(sock, callback)

    def remove_reader(self, sock: socket.socket) -> None:
        self.watched.remove((sock, "read"))
        self._real.remove_reader(sock)

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        assert (sock, "write") not in self.watched
        self.watched.add((sock, "write"))
        self._real.add_writer(sock, callback)

    def remove_writer(self, sock: socket.socket) -> None:
        self.watched.remove((sock, "write"))
        self._real.remove_writer(sock)

    def close(self, sock: socket.socket) -> None:
        self.watched -= {(sock, "read"), (sock, "write")}
        self._real.close(sock)

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._real.start_task(partial(self._run, main))

    async def _run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.tasks += 1
        try:
            await main()
        finally:
            self.tasks -= 1


class Push(ScriptedSource):
    """A push backend that says what the test tells it.

    Attributes:
        runtime: the server's.
        closed: how often it was closed.
    """

    runtime: Runtime
    _sink: Sink

    def __init__(self) -> None:
        super().__init__((ModelCard("tiny"),), frozenset())
        self.closed = 0

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        self.runtime = runtime
        self._sink = sink

    def close(self) -> None:
        self.closed += 1

    def say(self, job: ScriptedJob, *items: Item) -> None:
        """Make an engine step of one stream."""
        self.step((job, items))

    def step(self, *batch: tuple[ScriptedJob, Sequence[Item]]) -> None:
        """Make an engine step of several streams."""
        self._sink.deliver([(job.stream, items) for job, items in batch], self.runtime.now())


class Client:
    """A client on a socket of its own. It reads when the test says so, and never else.

    Args:
        address: the server's.
        receive_buffer: bytes that the kernel may take for it while it does not read; the kernel's own choice if None.

    Attributes:
        received: all that has come.
        ended: the server has sent its last byte.
        broken: the server has reset the connection.
    """

    def __init__(self, address: tuple[str, int], *, receive_buffer: int | None = None) -> None:
        self._sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        if receive_buffer is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._sock.connect(address)
        self._sock.setblocking(False)
        self._methods: list[str] = []
        self.received = bytearray()
        self.ended = False
        self.broken = False

    def ask(self, asked: Asked = CHAT) -> None:
        """Send a request."""
        self.send(request_bytes(asked), asked.method)

    def send(self, data: bytes, *methods: str) -> None:
        """Send bytes that hold requests with these methods."""
        self._methods += methods
        assert self._sock.send(data) == len(data)

    def hurry(self) -> None:
        """Be a slow reader no more."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)

    async def read(self) -> None:
        """Wait for bytes or the end, and take them."""
        await anyio.wait_readable(self._sock)
        try:
            data = self._sock.recv(256 * 1024)
        except ConnectionResetError:
            self.broken = self.ended = True
            return
        self.received += data
        self.ended = not data

    async def until(self, *wanted: bytes) -> None:
        """Read until all of these have come."""
        while not all(one in self.received for one in wanted):
            assert not self.ended, f"the end came after {bytes(self.received)!r}"
            await self.read()

    async def until_end(self) -> None:
        while not self.ended:
            await self.read()

    async def answer(self) -> Answer:
        """Read until the last request's answer is whole, and give it."""
        return (await self.answers())[-1]

    async def answers(self) -> list[Answer]:
        """Read until every request's answer is whole, and give them."""
        while not (len(found := self.heard()) == len(self._methods) and found[-1].whole):
            assert not self.ended, f"the end came after {bytes(self.received)!r}"
            await self.read()
        return found

    def heard(self) -> list[Answer]:
        """The answers as far as they have come."""
        return read_answers(bytes(self.received), self._methods, ended=self.ended and not self.broken)

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()

    def reset(self) -> None:
        """Drop the connection, so that the server's kernel reports a reset."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


class Serving:
    """A server that runs while the `async with` does; at its end nothing of it may be left.

    Attributes:
        server: the server.
        clock: its clock.
        readiness: its loop.
        address: where it listens.
        ended: `Server.serve` has returned.
    """

    server: Server
    readiness: WatchedReadiness
    address: tuple[str, int]

    def __init__(
        self,
        backend: Backend,
        options: ServerOptions | None,
        make_readiness: Callable[[TaskGroup], Readiness],
        clock: Clock,
        caplog: pytest.LogCaptureFixture,
        host: str,
    ) -> None:
        self.clock = clock
        self.ended = anyio.Event()
        self._backend = backend
        self._options = options
        self._make_readiness = make_readiness
        self._caplog = caplog
        self._host = host
        self._clients: list[Client] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._tasks_before = {task.id for task in anyio.get_running_tasks()}
        self._group = await self._stack.enter_async_context(anyio.create_task_group())
        self.readiness = WatchedReadiness(self._make_readiness(self._group), self.clock)
        self.server = Server(self._backend, self.readiness, self._options, clock=self.clock.now)
        self.listeners = bind(self._host, 0)
        host, port, *_ = self.listeners[0].getsockname()
        self.address = (host, port)
        self._group.start_soon(self._serve)
        await until(lambda: self.readiness.watched)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()
        if error is None and not self._group.cancel_scope.cancel_called:
            self.server.stop()
            self.server.stop()
            await self.ended.wait()
        self._group.cancel_scope.cancel()
        await self._stack.__aexit__(kind, error, traceback)
        if error is None:
            self._check_that_nothing_is_left()

    def connect(self, *, receive_buffer: int | None = None) -> Client:
        """Connect a client, which is closed at the server's end if not before."""
        client = Client(self.address, receive_buffer=receive_buffer)
        self._clients.append(client)
        return client

    def cancel(self) -> None:
        """Cancel the task group that the server runs in, as the program around it may."""
        self._group.cancel_scope.cancel()

    @property
    def connections(self) -> int:
        return self.server.pump.connections

    @property
    def streams(self) -> int:
        return self.server.pump.dispatcher.streams

    @property
    def access(self) -> list[str]:
        """The access log so far, as "METHOD PATH STATUS END"."""
        return [" ".join(line.split()[:4]) for line in self.access_lines]

    @property
    def access_lines(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name == "tokenwire.access"]

    @property
    def complaints(self) -> list[str]:
        """What was logged as a warning or worse."""
        return [record.getMessage() for record in self._caplog.records if record.levelname in {"WARNING", "ERROR"}]

    async def _serve(self) -> None:
        try:
            await self.server.serve(self.listeners)
        finally:
            self.ended.set()

    def _check_that_nothing_is_left(self) -> None:
        assert self.connections == 0
        assert self.streams == 0
        assert self.server.service.admission.running == 0
        assert self.server.service.admission.waiting == 0
        assert self.readiness.watched == set()
        assert self.readiness.tasks == 0
        sockets = {*self.readiness.sockets, *self.listeners}
        assert [sock for sock in sockets if sock.fileno() >= 0] == []
        assert {task.id for task in anyio.get_running_tasks()} - self._tasks_before == set()


Start = Callable[..., Serving]
"""The fixture `start`."""


def plain_data(body: bytes) -> list[Any]:
    """The objects of a plain stream, which must have its end."""
    data = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert data[-1] == b"[DONE]"
    return [json.loads(one) for one in data[:-1]]


def plain_text(body: bytes) -> str:
    """The text of a plain stream, which must have its end."""
    return "".join(one["token"] for one in plain_data(body))
