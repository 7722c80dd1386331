"""A server without sockets: the carrier of one simulated connection, and what accepts, drains and closes them all.

It drives a `Connection` by the rules that every carrier follows: first write what the connection has to say, then hand
its actions to the dispatcher, then obey Close and Abort; tell it of every block and of every progress; look at its next
deadline after each call. Whoever writes a carrier of his own can read the rules here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from tokenwire.core.actions import Abort, Action, Close, PeerMachine, Record, Upgrade
from tokenwire.core.connection import Connection, ConnectionOptions
from tokenwire.core.contracts import Principal, Source
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.events import StreamError
from tokenwire.core.peers import PeerLimits, PeerShare, PeerTable
from tokenwire.core.service import Service

from .clock import VirtualClock
from .network import Endpoint

__all__ = ["SimulatedPeer", "SimulatedServer"]

_RECEIVE_BYTES: Final = 64 * 1024
_SWITCHED: Final = 101


class SimulatedPeer:
    """One connected client, as the server sees it; a `tokenwire.core.contracts.Carrier`.

    Args:
        number: which connection it is, from 0.
        endpoint: the server's end of the link.
        connection: fresh.
        server: whose peer it is.

    Attributes:
        connection: the one on HTTP/1.1.
        machine: what it drives: the connection, and after an upgrade another.
        unsent_bytes: what waits because the endpoint takes no more.
        records: how many answered requests the connection has reported.
        prompts: the records of a WebSocket's prompts, in order.
        dropped_as_slow: whether one of them was given up because its reader was too slow.
        ended: the client sends no more.
        gone: nothing is sent or received any more.
        share: what its address has, where that is counted.
    """

    __slots__ = (
        "_closing",
        "_due",
        "_endpoint",
        "_out",
        "_server",
        "connection",
        "dropped_as_slow",
        "ended",
        "gone",
        "machine",
        "number",
        "prompts",
        "records",
        "share",
        "unsent_bytes",
    )

    def __init__(self, number: int, endpoint: Endpoint, connection: Connection, server: SimulatedServer) -> None:
        self.number = number
        self.connection = connection
        self.machine: PeerMachine = connection
        self.gone = False
        self.share: PeerShare | None = None
        self.unsent_bytes = 0
        self.records = 0
        self.prompts: list[Record] = []
        self.dropped_as_slow = False
        self._endpoint = endpoint
        self._server = server
        self._out: deque[bytes] = deque()
        self._due: int | None = None
        self._closing = False
        self.ended = False

    def start(self) -> None:
        """Begin to receive."""
        self._endpoint.set_reader(self._receive)
        self._schedule(self._server.now())

    def write(self, data: bytes) -> None:
        """Send bytes as far as they go and keep the rest; see `Carrier`."""
        self._server.writing += 1
        self._write(data)
        self._server.writing -= 1

    def _write(self, data: bytes) -> None:
        if self.gone:
            return
        if self._out:
            self._keep(data)
            return
        try:
            sent = self._endpoint.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lose()
            return
        if sent != len(data):
            self._keep(data[sent:])
            self._endpoint.set_writer(self._flush)
            self._perform(self.machine.set_blocked(True, self._server.now()))

    def settle(self, now: int) -> None:
        """A delivery has ended or given up: let the connection go on."""
        self._server.settling += 1
        self._perform(self.machine.settle(now))
        self._server.settling -= 1

    def drain(self) -> None:
        """The server is going down."""
        self._perform(self.machine.drain(self._server.now()))

    def lose(self) -> None:
        """The transport is gone, or must go."""
        if self.gone:
            return
        self._drop()
        now = self._server.now()
        self._server.dispatcher.perform(self._seen(self.machine.lost(now)), self, now)

    def _receive(self) -> None:
        now = self._server.now()
        try:
            data = self._endpoint.recv(_RECEIVE_BYTES)
        except OSError:
            self.lose()
            return
        if data:
            self._perform(self.machine.receive_data(data, now))
            return
        self.ended = True
        self._endpoint.set_reader(None)
        self._perform(self.machine.receive_eof(now))
        self._drop_if_done()

    def _keep(self, data: bytes) -> None:
        self._out.append(data)
        self.unsent_bytes += len(data)

    def _flush(self) -> None:
        now = self._server.now()
        try:
            while self._out:
                sent = self._endpoint.send(self._out[0])
                self.unsent_bytes -= sent
                if sent != len(self._out[0]):
                    self._out[0] = self._out[0][sent:]
                    break
                self._out.popleft()
        except BlockingIOError:
            pass  # the usual end of a flush that has more to say; the writer stays set
        except OSError:
            self.lose()
            return
        if self._out:
            self._perform(self.machine.set_blocked(True, now))
            return
        self._endpoint.set_writer(None)
        self._perform(self.machine.set_blocked(False, now))
        if self._closing and not self._out:
            self._shut_down()

    def _perform(self, actions: Sequence[Action]) -> None:
        now = self._server.now()
        data = b"".join(self.machine.data_to_send())
        if data:
            self.write(data)
        self._server.dispatcher.perform(self._seen(actions), self, now)
        for action in actions:
            if isinstance(action, Close):
                self._closing = True
                if not self._out:
                    self._shut_down()
            elif isinstance(action, Abort):
                self._reset()
            elif isinstance(action, Upgrade):
                self._upgrade(action)
        self._schedule(now)
        self._server.inspect(self)

    def _upgrade(self, action: Upgrade) -> None:
        now = self._server.now()
        self.machine = action.machine
        if self._out:
            self._perform(self.machine.set_blocked(True, now))
        self._perform(self.machine.receive_data(action.rest, now))

    def _seen(self, actions: Sequence[Action]) -> Sequence[Action]:
        for action in actions:
            if isinstance(action, Record):
                self.records += 1
                if action.status == _SWITCHED and action.end != "answered":
                    self.prompts.append(action)
                self.dropped_as_slow |= action.end == "slow_reader"
        return actions

    def _shut_down(self) -> None:
        if self.gone:
            return
        try:
            self._endpoint.shutdown()
        except OSError:
            self._drop()
            return
        self._drop_if_done()

    def _reset(self) -> None:
        if not self.gone:
            self._endpoint.reset()
            self._drop()

    def _drop_if_done(self) -> None:
        if self.ended and self._closing and not self._out:
            self._drop()

    def _drop(self) -> None:
        if self.gone:
            return
        self.gone = True
        self._out.clear()
        self.unsent_bytes = 0
        self._endpoint.close()
        self._server.forget(self)

    def _schedule(self, now: int) -> None:
        deadline = None if self.gone else self.machine.next_deadline()
        if deadline is not None and (self._due is None or deadline < self._due):
            self._due = deadline
            self._server.clock.call_at(max(deadline, now), self._on_deadline)

    def _on_deadline(self) -> None:
        now = self._server.now()
        if self.gone or self._due is None or self._due > now:
            return
        self._due = None
        self._perform(self.machine.handle_deadline(now))


class SimulatedServer:
    """What a pump is on real sockets: peers, the dispatcher, drain and the end.

    Args:
        service: the application.
        source: the backend; it is to deliver to `dispatcher`.
        clock: the time.
        options: how patient connections are.
        log: takes each answered request's Record.
        report: takes a backend's exception with the stream's id.
        inspect: called after each thing that a peer has done, to look at it.
        limits: what one client's address may hold.

    Attributes:
        dispatcher: the sink and the doer of actions.
        addresses: what each client's address has; two are shared by all clients.
        peers: the number of each connected peer, and it.
        writing: how many writes are under way, one inside the other.
        settling: how many settlings are.
    """

    def __init__(
        self,
        service: Service,
        source: Source,
        clock: VirtualClock,
        *,
        options: ConnectionOptions,
        log: Callable[[Record], None],
        report: Callable[[Exception, str], None],
        inspect: Callable[[SimulatedPeer], None],
        limits: PeerLimits | None = None,
    ) -> None:
        self.service = service
        self.clock = clock
        self.now = clock.now
        self.inspect = inspect
        self.peers: dict[int, SimulatedPeer] = {}
        self.addresses = PeerTable(limits or PeerLimits())
        self.writing = 0
        self.settling = 0
        self.dispatcher = Dispatcher(
            service,
            source,
            log=log,
            report=report,
            yield_to_loop=lambda: clock.call_soon(self._resume),
        )
        self._options = options

    def accept(self, number: int, endpoint: Endpoint) -> SimulatedPeer | None:
        """Take a client's connection, or refuse it while the server drains."""
        if self.service.draining:
            endpoint.reset()
            return None
        share = self.addresses.enter(f"192.0.2.{number % 2}")
        if isinstance(share, StreamError):
            endpoint.reset()
            return None
        connection = Connection(self.service, Principal(), self.now(), self._options, share)
        peer = self.peers[number] = SimulatedPeer(number, endpoint, connection, self)
        peer.share = share
        peer.start()
        return peer

    def forget(self, peer: SimulatedPeer) -> None:
        """A peer has gone."""
        del self.peers[peer.number]
        if peer.share is not None:
            peer.share.leave()

    def drain(self) -> None:
        """Take no new connection and no new stream."""
        self.service.draining = True
        for peer in list(self.peers.values()):
            peer.drain()

    def end_streams(self) -> None:
        """End every stream that still runs with an error that says why."""
        self.dispatcher.shut_down(self.service.shutting_down(), self.now())

    def close(self) -> None:
        """Drop every peer."""
        for peer in list(self.peers.values()):
            peer.lose()

    def _resume(self) -> None:
        self.dispatcher.resume(self.now())
