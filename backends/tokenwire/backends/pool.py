"""Connections to one server that outlive their requests: bounded, and never lent out once they have said anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .base import Dialer, Link, Peer, Runtime

__all__ = ["DEFAULT_IDLE_NS", "DEFAULT_MAX_IDLE", "Connection", "Pool"]

DEFAULT_MAX_IDLE: Final = 64
"""Connections that are kept for later: each is a file here and there. A burst of more opens more and keeps these."""

DEFAULT_IDLE_NS: Final = 4_000_000_000
"""How long one is kept: uvicorn, Node and llama.cpp close theirs after 5 s, and who sends at that moment loses a request."""


class Connection:
    """One connection: a `Link` for whoever has acquired it, and the `Peer` of the dialer, which it passes on.

    Attributes:
        ready: bytes can be written; until then the peer will be told by `connected`.
        reused: it has carried a request before.
    """

    __slots__ = ("_idle_since", "_link", "_peer", "_pool", "ready", "reused")

    _link: Link

    def __init__(self, pool: Pool, peer: Peer) -> None:
        self._pool = pool
        self._peer: Peer | None = peer
        self._idle_since = 0
        self.ready = False
        self.reused = False

    # ------------------------------------------------------------------------------------------ as its owner steers it

    def write(self, data: bytes) -> None:
        """Send bytes; see `Link`."""
        self._link.write(data)

    def set_reading(self, reading: bool) -> None:
        """Stop taking bytes, or go on; see `Link`."""
        self._link.set_reading(reading)

    def close(self) -> None:
        """Drop the connection at once; see `Link`."""
        self._peer = None
        self._link.close()

    def release(self, now: int) -> None:
        """Give the connection back, whose last answer was whole: its peer hears nothing more."""
        self._peer = None
        self._link.set_reading(True)
        self.reused = True
        self._idle_since = now
        self._pool.keep(self, now)

    # ------------------------------------------------------------------------------------------- as the dialer sees it

    def connected(self, now: int) -> None:
        """The connection stands; see `Peer`."""
        self.ready = True
        if self._peer is not None:
            self._peer.connected(now)

    def receive_data(self, data: bytes, now: int) -> None:
        """Bytes came; see `Peer`.

        While nobody uses the connection they answer no question, such as a 408 before a close; the next answer could not
        be told from them.
        """
        if self._peer is not None:
            self._peer.receive_data(data, now)
        else:
            self._pool.forget(self)
            self.close()

    def set_blocked(self, blocked: bool, now: int) -> None:
        """The other side takes no more, or takes it again; see `Peer`."""
        if self._peer is not None:
            self._peer.set_blocked(blocked, now)

    def receive_eof(self, now: int) -> None:
        """The other side will send no more; see `Peer`."""
        peer = self._end()
        if peer is not None:
            peer.receive_eof(now)

    def failed(self, reason: str, now: int) -> None:
        """The connection could not be made, or broke; see `Peer`."""
        peer = self._end()
        if peer is not None:
            peer.failed(reason, now)

    # ------------------------------------------------------------------------------------------- as its pool treats it

    def dial(self, dialer: Dialer, host: str, port: int, *, tls: bool, deadline: int) -> None:
        """Begin to connect."""
        self._link = dialer.connect(host, port, self, tls=tls, deadline=deadline)

    def lend(self, peer: Peer) -> None:
        """Hand the idle connection to somebody."""
        self._peer = peer

    def idle_ns(self, now: int) -> int:
        """Say for how long it has been idle."""
        return now - self._idle_since

    def _end(self) -> Peer | None:
        peer, self._peer = self._peer, None
        self._pool.forget(self)
        return peer


class Pool:
    """Connections to one server; used on the loop's thread only.

    Args:
        dialer: how to connect.
        runtime: the clock.
        host: a name or an address.
        port: the TCP port.
        tls: whether to speak TLS.
        connect_ns: how long connecting may take.
        max_idle: how many are kept for later.
        idle_ns: how long one is kept.
    """

    __slots__ = ("_closed", "_connect_ns", "_dialer", "_host", "_idle", "_idle_ns", "_max_idle", "_port", "_runtime",
                 "_sweeps", "_tls")  # fmt: skip

    def __init__(
        self,
        dialer: Dialer,
        runtime: Runtime,
        host: str,
        port: int,
        *,
        tls: bool,
        connect_ns: int,
        max_idle: int = DEFAULT_MAX_IDLE,
        idle_ns: int = DEFAULT_IDLE_NS,
    ) -> None:
        self._dialer = dialer
        self._runtime = runtime
        self._host = host
        self._port = port
        self._tls = tls
        self._connect_ns = connect_ns
        self._max_idle = max_idle
        self._idle_ns = idle_ns
        self._idle: dict[Connection, None] = {}  # longest idle first
        self._sweeps = False
        self._closed = False

    @property
    def idle(self) -> int:
        """How many connections wait for somebody."""
        return len(self._idle)

    def acquire(self, peer: Peer, *, fresh: bool = False) -> Connection:
        """Get a connection: the one that was used last, for its server has had the least time to close it; or a new one.

        Args:
            peer: whom to tell; never before this call returns.
            fresh: whether it must be a new one.
        """
        now = self._runtime.now()
        if self._idle and not fresh:
            connection, _ = self._idle.popitem()
            if connection.idle_ns(now) < self._idle_ns:
                connection.lend(peer)
                return connection
            connection.close()
        connection = Connection(self, peer)
        connection.dial(self._dialer, self._host, self._port, tls=self._tls, deadline=now + self._connect_ns)
        return connection

    def keep(self, connection: Connection, now: int) -> None:
        """Keep a connection for later, or close it where there are enough."""
        if self._closed or len(self._idle) >= self._max_idle:
            connection.close()
            return
        self._idle[connection] = None
        if not self._sweeps:
            self._sweeps = True
            self._runtime.call_at(now + self._idle_ns, self._sweep)

    def forget(self, connection: Connection) -> None:
        """Let go of a connection that has ended."""
        self._idle.pop(connection, None)

    def close(self) -> None:
        """Close what is idle, and from now on what is given back."""
        self._closed = True
        while self._idle:
            self._idle.popitem()[0].close()

    def _sweep(self) -> None:
        """Close what has been idle for too long, and look again when the next one will have been."""
        now = self._runtime.now()
        self._sweeps = False
        for connection in list(self._idle):
            left = self._idle_ns - connection.idle_ns(now)
            if left > 0:
                self._sweeps = True
                self._runtime.call_at(now + left, self._sweep)
                return
            self.forget(connection)
            connection.close()
