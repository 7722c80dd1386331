"""The bundled server: a backend, the service, the pump and the signals, on any of the loops.

anyio serves what is neither per token nor per loop: the task group and the signals.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import anyio
import anyio.abc
from msgspec import Struct

from tokenwire.backends.base import Backend, UsesNetwork
from tokenwire.core.actions import Record
from tokenwire.core.connection import ConnectionOptions
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.peers import PeerLimits
from tokenwire.core.service import Service, ServiceOptions

from .dialer import SocketDialer
from .loop_lag import watch_loop
from .pump import Pump, Readiness
from .runtime import LoopRuntime, WorldFacts, log_record, report_failure

__all__ = ["LOOPS", "Server", "ServerOptions", "bind", "run"]

_log = logging.getLogger("tokenwire.server")

_SECOND: Final = 1_000_000_000
_BACKLOG: Final = 1024
_NO_SUCH_ADDRESS: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


class ServerOptions(Struct, frozen=True, kw_only=True):
    """What an operator may set about the server as a whole."""

    service: ServiceOptions = ServiceOptions()
    """What may be asked."""
    connection: ConnectionOptions = ConnectionOptions()
    """How patient connections are."""
    max_connections: int = 4096
    """Peers at once."""
    peers: PeerLimits = PeerLimits()
    """What one client's address may hold."""
    drain_ns: int = 30 * _SECOND
    """How long running streams may go on after the first signal."""
    log: Callable[[Record], None] = log_record
    """Takes each answered request's record; it must not raise."""


class Server:
    """A running server, inside an event loop.

    Args:
        backend: where events come from.
        readiness: the loop.
        options: what the operator set.
        clock: the monotonic clock, in nanoseconds; `readiness` keeps its timer by the same.
    """

    def __init__(
        self,
        backend: Backend,
        readiness: Readiness,
        options: ServerOptions | None = None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.options = options or ServerOptions()
        self.service = Service(
            models=backend.models, honours=backend.honours, facts=WorldFacts(), options=self.options.service
        )
        self.pump = Pump(
            self.service,
            readiness,
            clock,
            max_connections=self.options.max_connections,
            options=self.options.connection,
            peer_limits=self.options.peers,
        )
        self.pump.dispatcher = Dispatcher(
            self.service,
            backend,
            log=self.options.log,
            report=report_failure,
            yield_to_loop=lambda: readiness.wake_soon(self._resume),
            clock=clock,
        )
        watch_loop(self.service.accountant, self.pump.timers.call_at, clock)
        self._backend = backend
        self._stopping = anyio.Event()
        self._idle = anyio.Event()
        self._signals = 0
        if isinstance(backend, UsesNetwork):
            backend.use_dialer(SocketDialer(readiness, self.pump.timers, clock))
        backend.attach(LoopRuntime(readiness, self.pump.timers, clock), self.pump.dispatcher)

    async def serve(self, listeners: Sequence[socket.socket]) -> None:
        """Serve until `stop` is called twice, or once and every stream has ended; then let go of everything."""
        for sock in listeners:
            self.pump.listen(sock)
        try:
            await self._stopping.wait()
            if not await self._wait_until_idle(self.options.drain_ns / _SECOND):
                self.pump.end_streams()
                await self._wait_until_idle(self.options.connection.linger_ns / _SECOND)
        finally:
            self.pump.close()
            self._backend.close()

    def stop(self) -> None:
        """Drain on the first call, end at once on the second."""
        self._signals += 1
        if self._signals == 1:
            _log.info("draining: %d streams run; ask again to stop now", self.pump.dispatcher.streams)
            self._stopping.set()
            self.pump.drain(self._idle.set)
        elif not self._idle.is_set():
            _log.info("stopping now")
            self.pump.end_streams()
            self._idle.set()

    async def _wait_until_idle(self, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            await self._idle.wait()
        return self._idle.is_set()

    def _resume(self) -> None:
        self.pump.dispatcher.resume(self.pump.now())


class _Loop(NamedTuple):
    """How to run on one kind of loop."""

    backend: str
    """anyio's name for it."""
    options: Mapping[str, Any]
    """anyio's options for it."""
    module: str
    """Our module with its readiness."""


LOOPS: Final[Mapping[str, _Loop]] = {
    "asyncio": _Loop("asyncio", {}, "asyncio_server"),
    "uvloop": _Loop("asyncio", {"use_uvloop": True}, "asyncio_server"),
    "trio": _Loop("trio", {}, "trio_server"),
}
"""The loops by the names that `--loop` takes."""


def run(
    backend: Backend,
    listeners: Sequence[socket.socket],
    *,
    loop: str = "asyncio",
    options: ServerOptions | None = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve on a loop of its own until SIGTERM or SIGINT.

    Args:
        backend: where events come from.
        listeners: listening sockets, owned by the server from now on.
        loop: a key of `LOOPS`.
        options: what the operator set.
        started: called once the server accepts.

    Raises:
        ImportError: the loop's package is not installed.
    """
    choice = LOOPS[loop]
    module = importlib.import_module(f"tokenwire.adapters.{choice.module}")
    main = partial(_main, module.readiness, backend, listeners, options, started)
    anyio.run(main, backend=choice.backend, backend_options=dict(choice.options))


async def _main(
    readiness: Callable[[anyio.abc.TaskGroup], Readiness],
    backend: Backend,
    listeners: Sequence[socket.socket],
    options: ServerOptions | None,
    started: Callable[[], None],
) -> None:
    async with anyio.create_task_group() as tasks:
        server = Server(backend, readiness(tasks), options)
        await tasks.start(_obey_signals, server)
        started()
        await server.serve(listeners)
        tasks.cancel_scope.cancel()


async def _obey_signals(server: Server, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            server.stop()


def bind(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of a host name.

    Args:
        host: a name or an address.
        port: the port; 0 for any, then the same for all addresses.

    Returns:
        Non-blocking listening sockets, at least one.

    Raises:
        OSError: the name is unknown, or the port is taken. An address that this machine does not have, such as the IPv6
            one of localhost where there is no IPv6, is passed over if there is another.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"cannot listen on {host!r}: there is no such host") from error
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as opened:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            chosen = listeners[0].getsockname()[1] if listeners and not port else port
            try:
                listeners.append(_listen(family, (address[0], chosen, *address[2:])))
            except OSError as error:
                missing = OSError(error.errno, f"cannot listen on {host} port {chosen}: {error.strerror}")
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise missing from error
            else:
                opened.callback(listeners[-1].close)
        if missing is not None and not listeners:
            raise missing
        opened.pop_all()
    return listeners


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
