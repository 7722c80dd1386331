"""Connections to other servers, on any loop: look the name up, try its addresses, shake hands, then bytes both ways.

It works on non-blocking sockets over what the loop gives, as the pump does. Only the look-up of a name waits, in a thread.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any, Final, cast

from tokenwire.backends.base import Link, Peer
from tokenwire.backends.threads import ThreadPool

from ._dialed import DialedPath, PlainPath, TlsPath, in_words
from .byte_path import Readiness
from .runtime import RunningLoop
from .timers import Alarm, Timers
from .tls import ClientTls, TlsNameError, default_context

__all__ = ["Address", "SocketDialer", "dialer_on", "look_up"]

_log = logging.getLogger("tokenwire.dialer")

_HEAD_START_NS: Final = 250_000_000
"""How long an address is tried alone before the next one is tried beside it (RFC 8305 section 5)."""

_MAX_ADDRESSES: Final = 16
"""Addresses of a name that are tried: a name with hundreds would only use up the deadline."""

_NAMES: Final = ThreadPool("tokenwire-names", max_threads=4, max_waiting=256)
"""Look-ups of the whole process; an unreachable name server must not use up its threads."""

Address = tuple[int, tuple[Any, ...]]
"""A socket's family and its address."""


def look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    """Look a name up; it may wait for a name server.

    Raises:
        OSError: there is no such name, or no answer.
        ValueError: it can be no name.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except OverflowError as error:
        raise ValueError(f"there is no port {port}") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


class SocketDialer:
    """A `tokenwire.backends.base.Dialer` over TCP.

    Args:
        readiness: the loop.
        timers: its deadlines.
        now: the monotonic clock that they are on, in nanoseconds.
        context: whom to trust where TLS is spoken; the system's authorities by default.
        look_up: finds a name's addresses, in a thread; an address is never looked up.
    """

    def __init__(
        self,
        readiness: Readiness,
        timers: Timers,
        now: Callable[[], int],
        *,
        context: ssl.SSLContext | None = None,
        look_up: Callable[[str, int], list[Address]] = look_up,
    ) -> None:
        self.readiness = readiness
        self.timers = timers
        self.now = now
        self.look_up = look_up
        self._context = context

    def connect(self, host: str, port: int, peer: Peer, *, tls: bool, deadline: int) -> Link:
        """Begin to connect; see `Dialer`."""
        context = (self._context or default_context()) if tls else None
        dial = _Dial(self, host, port, peer, context, deadline)
        dial.begin()
        return dial


def dialer_on(running: RunningLoop, context: ssl.SSLContext | None = None) -> SocketDialer:
    """Make a dialer on the loop that runs here, in somebody else's program."""
    # Both loops' own objects watch sockets, too; an application under ASGI has no use for it.
    return SocketDialer(cast("Readiness", running.loop), running.timers, running.now, context=context)


class _Dial:
    """One connection from the look-up to its end; a `tokenwire.backends.base.Link`."""

    __slots__ = (
        "_addresses",
        "_alarm",
        "_context",
        "_deadline",
        "_dialer",
        "_faults",
        "_host",
        "_over",
        "_path",
        "_peer",
        "_port",
        "_reading",
        "_tried",
        "_trying",
        "_work",
    )

    def __init__(
        self,
        dialer: SocketDialer,
        host: str,
        port: int,
        peer: Peer,
        context: ssl.SSLContext | None,
        deadline: int,
    ) -> None:
        self._dialer = dialer
        self._host = host
        self._port = port
        self._peer = peer
        self._context = context
        self._deadline = deadline
        self._work: Callable[[], None] | None = None
        self._addresses: deque[Address] = deque()
        self._tried = 0
        self._trying: set[socket.socket] = set()
        self._faults: dict[str, None] = {}
        self._path: DialedPath | None = None
        self._alarm: Alarm | None = None
        self._reading = True
        self._over = False

    # ------------------------------------------------------------------------------------------------- as its owner sees it

    def write(self, data: bytes) -> None:
        """Send bytes; see `Link`."""
        if self._path is not None:
            self._path.write(data)

    def set_reading(self, reading: bool) -> None:
        """Take no more bytes, or go on; see `Link`."""
        self._reading = reading
        if self._path is not None:
            self._path.set_reading(reading)

    def close(self) -> None:
        """Drop the connection; see `Link`."""
        self._over = True
        if self._path is not None:
            self._path.close()
        self._stop_trying()

    # ---------------------------------------------------------------------------------------------------------- the name

    def begin(self) -> None:
        """Start to look the host up, unless it is an address."""
        self._alarm = self._dialer.timers.call_at(self._deadline, self._on_deadline)
        try:
            found = look_up(self._host, self._port, socket.AI_NUMERICHOST)
        except socket.gaierror:
            self._work = self._look_up
            if not _NAMES.submit(self._work):
                self._fail_soon("too many names are being looked up")
        except (OSError, ValueError) as error:
            self._fail_soon(f"the name is not found: {in_words(error)}")
        else:
            self._found(found)

    def _look_up(self) -> None:
        """Look the name up; in a thread."""
        wake_soon = self._dialer.readiness.wake_soon
        try:
            found = self._dialer.look_up(self._host, self._port)
        except (OSError, ValueError) as error:
            wake_soon(partial(self._fail, f"the name is not found: {in_words(error)}"))
        else:
            wake_soon(partial(self._found, found))

    def _found(self, addresses: Sequence[Address]) -> None:
        self._work = None
        if not self._is_trying():
            return
        # The families take turns, so that one that leads nowhere costs a single head start (RFC 8305 section 4).
        families = dict.fromkeys(family for family, _ in addresses)
        queues = [[one for one in addresses if one[0] == family] for family in families]
        in_turn = [one for one in chain.from_iterable(zip_longest(*queues)) if one is not None]
        self._addresses.extend(in_turn[:_MAX_ADDRESSES])
        self._try_next()

    # ----------------------------------------------------------------------------------------------------- the addresses

    def _try_next(self) -> None:
        """Begin with the next address that can be begun with; where there is none and none is tried, fail."""
        while self._addresses:
            family, address = self._addresses.popleft()
            self._tried += 1
            if self._try(family, address):
                if self._addresses:
                    head_start = self._dialer.now() + _HEAD_START_NS
                    self._dialer.timers.call_at(head_start, partial(self._on_late, self._tried))
                return
        if not self._trying:
            self._fail_soon("; ".join(self._faults) or "the name has no address")

    def _try(self, family: int, address: tuple[Any, ...]) -> bool:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            self._note(error)
            return False
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(address)
            if code not in (0, errno.EINPROGRESS, errno.EINTR):
                raise OSError(code, os.strerror(code))  # noqa: TRY301  # it ends like those that the calls above raise
        except (OSError, OverflowError) as error:
            sock.close()
            self._note(error)
            return False
        self._trying.add(sock)
        self._dialer.readiness.add_writer(sock, partial(self._on_writable, sock))
        return True

    def _on_late(self, tried: int) -> None:
        if self._is_trying() and tried == self._tried:
            self._try_next()

    def _on_writable(self, sock: socket.socket) -> None:
        readiness = self._dialer.readiness
        self._trying.discard(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code and _is_connected(sock):
            readiness.remove_writer(sock)
            self._stop_trying()
            self._stand(sock)
            return
        code = code or errno.ECONNREFUSED
        readiness.close(sock)
        self._note(OSError(code, os.strerror(code)))
        self._try_next()

    def _note(self, error: Exception) -> None:
        self._faults[in_words(error)] = None

    def _stop_trying(self) -> None:
        if self._work is not None:
            _NAMES.withdraw(self._work)
            self._work = None
        if self._alarm is not None:
            self._alarm.cancel()
        self._addresses.clear()
        while self._trying:
            self._dialer.readiness.close(self._trying.pop())

    # ----------------------------------------------------------------------------------------------------- the connection

    def _stand(self, sock: socket.socket) -> None:
        """TCP stands: shake hands where TLS is spoken, then tell the peer."""
        readiness, now = self._dialer.readiness, self._dialer.now
        if self._context is None:
            self._path = PlainPath(sock, readiness, now, self._peer)
        else:
            try:
                tls = ClientTls(self._context, self._host)
            except TlsNameError as error:
                readiness.close(sock)
                self._fail(str(error))
                return
            self._path = path = TlsPath(sock, readiness, now, self._peer, tls)
            path.alarm = self._dialer.timers.call_at(self._deadline, path.on_deadline)
        self._path.begin(reading=self._reading)

    def _is_trying(self) -> bool:
        return not self._over and self._path is None

    def _on_deadline(self) -> None:
        if self._is_trying():
            looking = self._work is not None
            self._stop_trying()
            self._fail("the name is not found in time" if looking else "nothing answers in time")

    def _fail_soon(self, reason: str) -> None:
        self._stop_trying()
        self._dialer.readiness.wake_soon(partial(self._fail, reason))

    def _fail(self, reason: str) -> None:
        self._work = None
        if self._over:
            return
        self._over = True
        try:
            self._peer.failed(reason, self._dialer.now())
        except Exception:  # noqa: BLE001  # it would end trio's loop, and only be logged by asyncio's
            _log.exception("the peer of a connection failed")


def _is_connected(sock: socket.socket) -> bool:
    """Say whether there is another end: a socket that is given the very port that it calls is connected to itself."""
    try:
        return bool(sock.getsockname() != sock.getpeername())
    except OSError:
        return False  # reset already
