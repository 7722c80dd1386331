"""The byte path, one for all loops: accept, receive, hand over, write, block, close.

It works on non-blocking sockets and calls the system itself: a token is written in the very call that made it. What a
loop has to offer is in `Readiness`; the two server modules hold nothing else. The pump knows no protocol: what bytes mean
is the connection's business.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from tokenwire.core.actions import Abort, Action, Close, PeerMachine, Resume, Upgrade
from tokenwire.core.connection import Connection, ConnectionOptions
from tokenwire.core.contracts import Principal
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.events import StreamError
from tokenwire.core.http import ResponseWriter
from tokenwire.core.peers import PeerLimits, PeerShare, PeerTable
from tokenwire.core.routes import PLAIN
from tokenwire.core.service import Service

from .byte_path import BytePath, Readiness
from .timers import Deadline, Timers

__all__ = ["Peer", "Pump", "Readiness"]

_log = logging.getLogger("tokenwire.server")

_BACKLOG_PER_TURN: Final = 64
"""Connections accepted before the loop goes on: a burst of clients must not hold up running streams."""

_ACCEPT_PAUSE_NS: Final = 200_000_000
"""How long accepting rests when it has failed: when the process is out of file descriptors, above all."""

_NOTSENT_LOWAT: Final = 16 * 1024
"""Bytes that the kernel takes beyond what is in flight. Without it a stalled reader swallows megabytes, tens of thousands
of tokens, before anybody notices."""

_TURNED_AWAY_BYTES: Final = 64 * 1024
"""What is read of a connection that is turned away, so that its end is no reset that overtakes the answer."""

_SEND_BUFFER: Final = 64 * 1024
"""The send buffer where the system has no TCP_NOTSENT_LOWAT."""

_OURS: Final[frozenset[type]] = frozenset({Close, Abort, Upgrade})
"""Actions that are the peer's to perform; the dispatcher does the others."""

_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)
_LINGER_RESET: Final = struct.pack("ii", 1, 0)


class Peer(BytePath):
    """One connected socket; a `tokenwire.core.contracts.Carrier`.

    Attributes:
        share: what its address has, where that is counted.
    """

    __slots__ = ("_closing", "_connection", "_deadline", "_eof", "_pump", "share")

    def __init__(
        self, sock: socket.socket, connection: PeerMachine, pump: Pump, share: PeerShare | None = None
    ) -> None:
        super().__init__(sock, pump.readiness, pump.now)
        self.share = share
        self._connection = connection
        self._pump = pump
        self._deadline = Deadline(pump.timers.call_at, self._on_deadline)
        self._closing = False
        self._eof = False

    def settle(self, now: int) -> None:
        """A delivery has ended or given up: let the connection go on."""
        self._perform(self._connection.settle(now), now)

    def start(self, now: int) -> None:
        """Begin to receive."""
        self._watch()
        self._deadline.expect(self._connection.next_deadline(), now)

    def _receive_data(self, data: bytes, now: int) -> None:
        self._perform(self._connection.receive_data(data, now), now)

    def _receive_eof(self, now: int) -> None:
        self._eof = True
        self._perform(self._connection.receive_eof(now), now)
        self._drop_if_done()

    def drain(self, now: int) -> None:
        """The server is going down."""
        self._perform(self._connection.drain(now), now)

    def lose(self) -> None:
        """The transport is gone, or must go: nothing more can be sent or received."""
        if self._gone:
            return
        now = self._pump.now()
        self._drop()
        self._pump.dispatcher.perform(self._connection.lost(now), self, now)

    def _broken(self, error: OSError) -> None:
        del error  # a client that has gone is nothing to tell anybody
        self.lose()

    def _set_blocked(self, blocked: bool, now: int) -> None:
        self._perform(self._connection.set_blocked(blocked, now), now)
        if self._closing and self._out is None:
            self._shut_down()

    def _perform(self, actions: Sequence[Action], now: int) -> None:
        """Write what the connection has to say, then do what it asks."""
        data = b"".join(self._connection.data_to_send())
        if data:
            self.write(data)
            if self._out is not None:  # this write has blocked and told the source: an older Resume must not come after
                actions = [action for action in actions if not isinstance(action, Resume)]
        self._pump.dispatcher.perform(actions, self, now)
        for action in actions:
            if type(action) not in _OURS:
                continue
            if isinstance(action, Close):
                self._close()
            elif isinstance(action, Abort):
                self._reset()
            elif isinstance(action, Upgrade):
                self._upgrade(action, now)
        self._deadline.expect(self._connection.next_deadline(), now)

    def _upgrade(self, action: Upgrade, now: int) -> None:
        self._connection = action.machine
        if self._out is not None:
            self._perform(self._connection.set_blocked(True, now), now)
        self._perform(self._connection.receive_data(action.rest, now), now)

    def _close(self) -> None:
        self._closing = True
        if self._out is None:
            self._shut_down()

    def _shut_down(self) -> None:
        """Say that we send no more; the peer's own end is awaited, so that it can read what we said last."""
        if self._gone:
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop()
            return
        self._drop_if_done()

    def _reset(self) -> None:
        """Drop the connection with what has not been read of it; what was said to the end is left to the kernel."""
        if self._gone:
            return
        if not self._closing or self._out is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self._drop()

    def _drop_if_done(self) -> None:
        if self._eof and self._closing and self._out is None:
            self._drop()

    def _drop(self) -> None:
        if self._gone:
            return
        self._close_socket()
        self._deadline.cancel()
        self._pump.forget(self)

    def _on_deadline(self) -> None:
        now = self._pump.now()
        self._perform(self._connection.handle_deadline(now), now)


class Pump:
    """Listening sockets and their peers.

    Args:
        service: the application.
        readiness: the loop.
        now: the monotonic clock, in nanoseconds.
        max_connections: peers at once; while there are as many, further ones wait in the kernel's backlog.
        options: how patient connections are.
        peer_limits: what one client's address may hold.

    Attributes:
        dispatcher: the sink and the doer of actions; set before the first `listen`.
        timers: the server's deadlines.
    """

    def __init__(
        self,
        service: Service,
        readiness: Readiness,
        now: Callable[[], int],
        *,
        max_connections: int = 4096,
        options: ConnectionOptions | None = None,
        peer_limits: PeerLimits | None = None,
    ) -> None:
        self.service = service
        self.readiness = readiness
        self.now = now
        self.timers = Timers(self._arm)
        self.dispatcher: Dispatcher
        self._max_connections = max_connections
        self._options = options or ConnectionOptions()
        self._principal = Principal()
        self._listeners: list[socket.socket] = []
        self._peers: set[Peer] = set()
        self._clients = PeerTable(peer_limits or PeerLimits())
        self._resting: set[socket.socket] = set()
        self._idle: Callable[[], None] | None = None

    @property
    def connections(self) -> int:
        """How many peers are connected."""
        return len(self._peers)

    def listen(self, sock: socket.socket) -> None:
        """Accept from a listening, non-blocking socket, which the pump owns from now on."""
        self._listeners.append(sock)
        self._resting.add(sock)
        self._accept_again()

    def drain(self, when_idle: Callable[[], None]) -> None:
        """Take no new connection and no new stream; call back once the last peer has gone."""
        self._idle = when_idle
        self.service.draining = True
        for sock in self._listeners:
            self.readiness.close(sock)
        self._listeners.clear()
        self._resting.clear()
        now = self.now()
        for peer in list(self._peers):
            peer.drain(now)
        self._tell_idle()

    def end_streams(self) -> None:
        """End every stream that still runs with an error that says why."""
        self.dispatcher.shut_down(self.service.shutting_down(), self.now())

    def close(self) -> None:
        """Drop every peer and listener."""
        for sock in self._listeners:
            self.readiness.close(sock)
        self._listeners.clear()
        self._resting.clear()
        for peer in list(self._peers):
            peer.lose()

    def forget(self, peer: Peer) -> None:
        """A peer has gone. Called once for each."""
        self._peers.discard(peer)
        if peer.share is not None:
            peer.share.leave()
        if self._resting:
            self._accept_again()
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self._idle is not None and not self._peers:
            callback, self._idle = self._idle, None
            callback()

    def _arm(self, deadline: int) -> None:
        self.readiness.set_timer(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self.timers.run(self.now())

    def _accept_again(self) -> None:
        if len(self._peers) >= self._max_connections:
            return
        resting, self._resting = self._resting, set()
        for sock in resting:
            self.readiness.add_reader(sock, partial(self._accept, sock))

    def _rest(self, listener: socket.socket) -> None:
        """Accept nothing more from a listener for now; called from within its callback."""
        self._resting.add(listener)
        self.readiness.remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_BACKLOG_PER_TURN):
            if len(self._peers) >= self._max_connections:
                self._rest(listener)
                return
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except (
                OSError
            ) as error:  # out of descriptors or memory; or trouble of the network, which accept(2) passes on
                _log.warning("cannot accept: %s; resting", error.strerror)
                self._rest(listener)
                self.timers.call_at(self.now() + _ACCEPT_PAUSE_NS, self._accept_again)
                return
            self._begin(sock, address[0] if sock.family in _INTERNET else "")

    def _begin(self, sock: socket.socket, address: str = "") -> None:
        try:
            sock.setblocking(False)
            _tune(sock)
        except OSError:  # reset already; only some systems say so here
            sock.close()
            return
        share = self._clients.enter(address)
        if isinstance(share, StreamError):
            self._turn_away(sock, share)
            return
        now = self.now()
        peer = Peer(sock, Connection(self.service, self._principal, now, self._options, share), self, share)
        self._peers.add(peer)
        peer.start(now)

    def _turn_away(self, sock: socket.socket, error: StreamError) -> None:
        """Answer a connection without reading a request, and end it: it gets no place that could be held."""
        _log.info("turned a connection away: %s", error.message)
        answer = ResponseWriter(keep_alive=False).reply(self.service.refuse(PLAIN, error, None, close=True))
        with contextlib.suppress(OSError):  # a client that has gone already, or whose request has not come yet
            sock.send(answer)
            sock.recv(_TURNED_AWAY_BYTES)
        sock.close()


def _tune(sock: socket.socket) -> None:
    """Send each token at once, and notice a reader that has stopped before megabytes are in the kernel."""
    if sock.family not in _INTERNET:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lowat = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if lowat is not None:
        sock.setsockopt(socket.IPPROTO_TCP, lowat, _NOTSENT_LOWAT)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
