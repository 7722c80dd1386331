"""Dialled connections inside the test's own event loop, and the other ends, whose every byte is the test's.

Nothing here waits for time: what has a deadline has it on the clock that the test moves.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import anyio
from anyio.abc import TaskGroup
from tests.adapters.serving import SECOND, Clock, WatchedReadiness, until

from tokenwire.adapters.dialer import Address, SocketDialer
from tokenwire.adapters.pump import Readiness
from tokenwire.adapters.timers import Timers
from tokenwire.backends.base import Link

__all__ = ["Connected", "Dialing", "Failed", "FarEnd", "Heard", "Listener", "Near", "OpenDialing", "open_dialing"]


class Connected(NamedTuple):
    """`Peer.connected` was called."""


class Failed(NamedTuple):
    """`Peer.failed` was called."""

    reason: str


class Ended(NamedTuple):
    """`Peer.receive_eof` was called."""


class Heard:
    """A `tokenwire.backends.base.Peer` that writes down what it hears.

    Attributes:
        received: all bytes so far.
        calls: all other calls, in order; a bool is what `set_blocked` was told.
        on_connected: called with `connected`.
        on_data: called after bytes were taken.
    """

    link: Link

    def __init__(self) -> None:
        self.received = bytearray()
        self.calls: list[Connected | Ended | Failed | bool] = []
        self.on_connected: Callable[[], None] = lambda: None
        self.on_data: Callable[[], None] = lambda: None
        self.over = False

    def connected(self, now: int) -> None:
        del now
        self._note(Connected())
        self.on_connected()

    def receive_data(self, data: bytes, now: int) -> None:
        del now
        assert Connected() in self.calls
        assert not self.over
        assert data
        self.received += data
        self.on_data()

    def set_blocked(self, blocked: bool, now: int) -> None:
        del now
        self._note(blocked)

    def receive_eof(self, now: int) -> None:
        del now
        self._note(Ended())
        self.over = True

    def failed(self, reason: str, now: int) -> None:
        del now
        self._note(Failed(reason))
        self.over = True

    @property
    def stands(self) -> bool:
        return Connected() in self.calls

    @property
    def ended(self) -> bool:
        """Whether the other side has said all."""
        return self.calls[-1:] == [Ended()]

    @property
    def reason(self) -> str:
        """Why it failed; "" if it has not."""
        last = self.calls[-1] if self.calls else None
        return last.reason if isinstance(last, Failed) else ""

    def _note(self, call: Connected | Ended | Failed | bool) -> None:
        assert not self.over, "called after the end"
        self.calls.append(call)


class FarEnd:
    """The other end of one connection.

    Attributes:
        received: all that came, without TLS where there is one.
        ended: the near side has said its last byte, or has reset the connection.
        tls: its TLS.
        notified: the near side's close_notify has come.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None = None) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a reset overtakes what was said before it
        self.sock = sock
        self.received = bytearray()
        self.ended = False
        self.notified = False
        self.failure: ssl.SSLError | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls: ssl.SSLObject | None = None
        if context is not None:
            self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.shaken = False

    def take(self) -> None:
        """Take what has come, if anything has."""
        try:
            while data := self.sock.recv(256 * 1024):
                if self.tls is None:
                    self.received += data
                else:
                    self._incoming.write(data)
                    self._decrypt(self.tls)
            self.ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True

    async def until(self, condition: Callable[[], object]) -> None:
        """Take what comes until something is so."""
        while not condition():
            await anyio.lowlevel.checkpoint()
            self.take()

    async def until_received(self, data: bytes) -> None:
        await self.until(lambda: len(self.received) >= len(data))
        assert self.received == data

    async def until_ended(self) -> None:
        await self.until(lambda: self.ended)

    def say(self, data: bytes) -> None:
        """Send little."""
        if self.tls is not None:
            self.tls.write(data)
            data = self._outgoing.read()
        self.say_raw(data)

    def say_raw(self, data: bytes) -> None:
        assert self.sock.send(data) == len(data)

    async def say_much(self, data: bytes) -> None:
        """Send as much as there is, waiting for room."""
        if self.tls is not None:
            view = memoryview(data)
            while view:
                view = view[self.tls.write(view) :]
            data = self._outgoing.read()
        rest = memoryview(data)
        while rest:
            with contextlib.suppress(BlockingIOError):
                rest = rest[self.sock.send(rest) :]
            await anyio.lowlevel.checkpoint()

    def notify(self) -> None:
        """Say close_notify."""
        assert self.tls is not None
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.say_raw(self._outgoing.read())

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        try:
            if not self.shaken:
                tls.do_handshake()
                self.shaken = True
            while piece := tls.read(256 * 1024):
                self.received += piece
            self.notified = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.notified = True
        except ssl.SSLError as error:
            self.failure = error
        if out := self._outgoing.read():
            self.sock.send(out)


class Listener:
    """A listening socket.

    Attributes:
        address: where it listens.
    """

    def __init__(self, context: ssl.SSLContext | None = None, *, host: str = "127.0.0.1") -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.sock.bind((host, 0))
        self.sock.listen()
        self.sock.setblocking(False)
        self.address: tuple[Any, ...] = self.sock.getsockname()
        self.port: int = self.address[1]
        self._context = context
        self._ends: list[FarEnd] = []

    @property
    def resolved(self) -> Address:
        """What a look-up of its name gives."""
        return (self.sock.family, self.address)

    async def accept(self) -> FarEnd:
        """Wait for a connection, and accept it."""
        while True:
            try:
                sock, _ = self.sock.accept()
            except BlockingIOError:
                await anyio.lowlevel.checkpoint()
                continue
            self._ends.append(FarEnd(sock, self._context))
            return self._ends[-1]

    def waiting(self) -> bool:
        """Whether a connection waits to be accepted; it is then."""
        try:
            sock, _ = self.sock.accept()
        except BlockingIOError:
            return False
        self._ends.append(FarEnd(sock))
        return True

    def close(self) -> None:
        self.sock.close()
        for end in self._ends:
            end.close()


class Near(WatchedReadiness):
    """The near side's loop.

    Attributes:
        mute: addresses that nobody answers at: how a connection to one goes is not told.
    """

    def __init__(self, real: Readiness, clock: Clock) -> None:
        super().__init__(real, clock)
        self.mute: set[tuple[Any, ...]] = set()
        self._untold: dict[tuple[Any, ...], tuple[socket.socket, Callable[[], None]]] = {}

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        address = _called(sock)
        if address in self.mute:
            self.watched.add((sock, "write"))
            self._untold[address] = (sock, callback)
            return
        super().add_writer(sock, callback)

    def speak(self, address: tuple[Any, ...]) -> None:
        """Tell after all how the connection to a mute address goes."""
        sock, callback = self._untold.pop(address)
        self.watched.remove((sock, "write"))
        super().add_writer(sock, callback)


def _called(sock: socket.socket) -> tuple[Any, ...]:
    try:
        name: tuple[Any, ...] = sock.getpeername()
    except OSError:
        return ()
    return name


class Dialing:
    """A dialer, its loop and its clock.

    Attributes:
        names: what the look-up knows.
    """

    def __init__(self, readiness: Near, clock: Clock, context: ssl.SSLContext | None) -> None:
        self.readiness = readiness
        self.clock = clock
        self.names: dict[str, list[Address]] = {}
        self._dialled: list[Heard] = []
        self.timers = Timers(lambda deadline: readiness.set_timer(deadline, lambda: self.timers.run(clock.now())))
        self.dialer = SocketDialer(readiness, self.timers, clock.now, context=context, look_up=self._look_up)

    def dial(self, host: str, port: int, *, tls: bool = False, seconds: float = 10) -> Heard:
        """Begin to connect."""
        heard = Heard()
        self._dialled.append(heard)
        deadline = self.clock.now() + round(seconds * SECOND)
        heard.link = self.dialer.connect(host, port, heard, tls=tls, deadline=deadline)
        assert heard.calls == []
        return heard

    def drop(self) -> None:
        """Close every link."""
        for heard in self._dialled:
            heard.link.close()

    async def stand(self, listener: Listener, host: str | None = None, *, tls: bool = False) -> tuple[Heard, FarEnd]:
        """Connect to a listener, TLS included."""
        heard = self.dial(host or listener.address[0], listener.port, tls=tls)
        far = await listener.accept()
        await far.until(lambda: heard.calls)
        assert heard.calls == [Connected()]
        if tls:
            await far.until(lambda: far.shaken)
        return heard, far

    def _look_up(self, host: str, port: int) -> list[Address]:
        del port
        try:
            return self.names[host]
        except KeyError:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None


OpenDialing = Callable[..., contextlib.AbstractAsyncContextManager[Dialing]]
"""The fixture `dialing`."""


@asynccontextmanager
async def open_dialing(
    make_readiness: Callable[[TaskGroup], Readiness], context: ssl.SSLContext | None = None
) -> AsyncGenerator[Dialing]:
    """Run a dialer; at its end no socket of it may be watched."""
    clock = Clock()
    async with anyio.create_task_group() as tasks:
        readiness = Near(make_readiness(tasks), clock)
        yield Dialing(readiness, clock, context)
        await until(lambda: not readiness.watched)
        tasks.cancel_scope.cancel()
    gc.collect()
