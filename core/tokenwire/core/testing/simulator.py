"""The whole line in one thread from one seed: clients, faulty networks, connections, service, deliveries and a backend.

    report = simulate(7)
    report.check()

Everything that happens is drawn from the seed, so a seed that fails fails again, with the same story. What holds in
every run, whatever is drawn, is checked as it goes and at its end:

- each stream has one end and gives its place back; nothing is left: no stream, job, place in the queue or peer;
- a client that stayed has exactly what the backend said, cut where the request wants it cut, no more and no less;
- a client that was cut off has a beginning of that, and no clean end unless the stream came to one;
- an error before the first token is a status, a later one an event, and both are the backend's own or explained;
- each stream and each answered request has one Record; 429 and 503 come only from a full queue and a closing server;
- what waits for a slow reader stays within its budget, and what is sent ahead within its limit;
- a backend is called as its contract says: once to cancel, never after its end, never in the middle of its batch.

Your own backend is simulated in the place of the scripted one, if it needs neither tasks nor threads:

    for seed in range(1000):
        Simulation(seed, backend=MyBackend()).run().check()

So is your own policy: give `service_options` and `connection_options`.
"""

from __future__ import annotations

import hashlib
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Final, cast

from msgspec import Struct

from tokenwire.core.actions import Record
from tokenwire.core.connection import ConnectionOptions, Phase
from tokenwire.core.conversation import Conversation
from tokenwire.core.delivery import DeliveryOptions, StreamDelivery
from tokenwire.core.http import MAX_HEAD_BYTES, MAX_PIPELINED_BYTES
from tokenwire.core.peers import PeerLimits
from tokenwire.core.service import Exchange, Service, ServiceOptions
from tokenwire.core.upgraded import UpgradedConnection

from .backend import Backend, ScriptedSource, SimulatedRuntime
from .client import Habits, SimulatedClient, draw_habits, draw_requests
from .clock import VirtualClock
from .judge import Judge
from .ledger import Ledger, tell
from .network import Faults, Link
from .peer import SimulatedPeer, SimulatedServer
from .websocket_client import WebSocketClient, draw_manners, look_at_answers, look_for_end

__all__ = ["Report", "Simulation", "simulate"]

_MILLISECOND: Final = 1_000_000
_SECOND: Final = 1_000_000_000

_MAX_CALLS: Final = 200_000
"""What a run may do before it counts as one that never comes to rest."""

_FIRST_SOCKET: Final = 100
"""The number of a run's first WebSocket."""

_MAX_UNSENT: Final = 256 * 1024
"""What may wait in a carrier of a simulation: one write of a budget and a batch, escaped and framed."""


class Report(Struct, frozen=True):
    """What came of one run."""

    seed: int
    """What it was drawn from."""
    digest: str
    """A hash of all that happened: equal for equal runs."""
    counts: dict[str, int]
    """How often things happened, by name."""
    violations: tuple[str, ...]
    """What should never happen and did, a sentence each."""
    story: tuple[tuple[int, str, str, object], ...]
    """All that happened: when, to whom, what, and with what."""

    def tell(self, last: int = 200) -> str:
        """Write the violations and the end of the story, a line for each thing that happened."""
        lines = [f"seed {self.seed}: {len(self.violations)} violations", *self.violations, ""]
        lines += [
            f"{when / 1e6:12.3f} ms  {who:10} {what:10} {detail!r}" for when, who, what, detail in self.story[-last:]
        ]
        return "\n".join(lines)

    def check(self) -> None:
        """Raise where something happened that never should.

        Raises:
            AssertionError: with the violations and the story.
        """
        if self.violations:
            raise AssertionError(self.tell())


class _Facts:
    """Ids that count, and a wall clock that follows the virtual one."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.given = 0
        self.on_new: Callable[[], None] = lambda: None

    def new_id(self) -> str:
        self.on_new()
        self.given += 1
        return f"s{self.given}"

    def wall_s(self) -> int:
        return 1_790_000_000 + self._clock.now() // _SECOND


class Simulation:
    """One run, set up and ready.

    Args:
        seed: what everything is drawn from.
        backend: fresh; the scripted one where it is None. It must not draw from anything but what it was made with, or
            the seed does not replay.
        service_options: policy and limits; drawn where None.
        connection_options: patience; drawn where None, and so is how many streams an address may have.
        clients: how many connections; drawn where None.
        habits: how every client behaves; drawn where None.
        faults: what is wrong with every link, upward and downward; drawn where None.
        sockets: how many WebSockets besides; none where None and clients are given, else drawn.
        ends_at: when the server drains, in virtual nanoseconds; drawn where None.

    Attributes:
        clock: the time.
        service: the application.
        server: its carriers and dispatcher.
        ledger: what the backend said.
        clients: those that have come, by number.
        sockets: those of WebSocket, by number; they have draws of their own.
    """

    def __init__(
        self,
        seed: int,
        *,
        backend: Backend | None = None,
        service_options: ServiceOptions | None = None,
        connection_options: ConnectionOptions | None = None,
        clients: int | None = None,
        habits: Habits | None = None,
        faults: tuple[Faults, Faults] | None = None,
        sockets: int | None = None,
        ends_at: int | None = None,
    ) -> None:
        self.seed = seed
        self.clock = VirtualClock(_SECOND)
        self.clients: dict[int, SimulatedClient] = {}
        self.sockets: dict[int, WebSocketClient] = {}
        self._random = random = Random(seed)  # noqa: S311  # a simulation has to be repeated, not kept secret
        self._story: list[tuple[int, str, str, object]] = []
        self._violations: list[str] = []
        self._counts: Counter[str] = Counter()
        self._habits = habits
        self._faults = faults
        self._sound: set[int] = set()
        self._peers: dict[int, SimulatedPeer] = {}
        self._drained_at = 0
        facts = self._facts = _Facts(self.clock)
        facts.on_new = self._on_new_stream
        if backend is None:
            backend = ScriptedSource(Random(random.random()))  # noqa: S311  # as above
        self.ledger = Ledger(backend, self._complain)
        self.service = Service(
            models=self.ledger.models,
            honours=self.ledger.honours,
            facts=facts,
            options=service_options or _draw_service_options(random),
        )
        self.server = SimulatedServer(
            self.service,
            self.ledger,
            self.clock,
            options=connection_options or _draw_connection_options(random),
            limits=PeerLimits(max_streams=0 if connection_options else random.choice((0, 0, 0, 1, 2))),
            log=self._on_record,
            report=self._on_report,
            inspect=self._inspect,
        )
        self.ledger.sink = self.server.dispatcher
        self.ledger.delivered = self._inspect_all
        self.ledger.feeding = self._is_feeding
        backend.attach(SimulatedRuntime(self.clock), self.ledger)
        for number in range(random.choice((1, 1, 2, 3, 5)) if clients is None else clients):
            self.clock.call_at(_SECOND + random.randrange(400) * _MILLISECOND, partial(self._connect, number))
        self._ends_at = _draw_end(random) if ends_at is None else ends_at
        drawing = Random(f"sockets of {seed}")  # noqa: S311  # as above
        if sockets is None:
            sockets = drawing.choice((0, 0, 1)) if clients is None else 0
        for number in range(_FIRST_SOCKET, _FIRST_SOCKET + sockets):
            at = _SECOND + drawing.randrange(400) * _MILLISECOND
            self.clock.call_at(at, partial(self._connect_socket, number, drawing))

    def run(self) -> Report:
        """Let it happen, and look at what is left.

        Returns:
            The report. The simulation is over; make another one to run again.
        """
        at = self.clock.now() + self._ends_at
        grace = self._random.choice((0, 100, 3000)) * _MILLISECOND
        linger = 200 * _SECOND
        self.clock.call_at(at, self._drain)
        self.clock.call_at(at + grace, self._end_streams)
        self.clock.call_at(at + grace + linger, self._close)
        self.clock.call_at(at + grace + linger, self._tired)
        calls = 0
        try:
            calls = self.clock.run_until_idle(max_calls=_MAX_CALLS)
        except Exception:  # noqa: BLE001  # whatever it is, the story that led to it must be told
            self._complain(traceback.format_exc())
        self._counts["calls"] = calls
        if calls == _MAX_CALLS:
            self._complain(f"it does not come to rest: {len(self.clock)} callbacks wait after {calls}")
        self._look_at_the_end()
        digest = hashlib.blake2b(repr(self._story).encode(), digest_size=16).hexdigest()
        counts = dict(self._counts)
        return Report(self.seed, digest, counts, tuple(self._violations), tuple(self._story))

    # -- what happens ------------------------------------------------------------------------------------------------

    def _note(self, who: str, what: str, detail: object = "") -> None:
        self._story.append((self.clock.now(), who, what, detail))

    def _complain(self, sentence: str) -> None:
        self._note("simulator", "VIOLATION", sentence)
        self._violations.append(sentence)

    def _connect(self, number: int) -> None:
        random = self._random
        upward, downward = self._faults or (
            _draw_faults(random, self.clock.now()),
            _draw_faults(random, self.clock.now()),
        )
        if _is_sound(upward) and _is_sound(downward):
            self._sound.add(number)
        link = Link(self.clock, random, upward=upward, downward=downward)
        habits = self._habits or draw_habits(random)
        requests = draw_requests(
            random,
            random.choice((1, 1, 2, 3, 5)),
            model=self.ledger.models[0].name,
            honours=self.ledger.honours,
            max_body_bytes=self.service.options.max_body_bytes,
        )
        self._note(f"client {number}", "connects", (habits, upward, downward))
        client = SimulatedClient(link.client, self.clock, requests, habits, partial(self._note, f"client {number}"))
        self.clients[number] = client
        peer = self.server.accept(number, link.server)
        if peer is not None:
            self._peers[number] = peer
        client.start()

    def _connect_socket(self, number: int, random: Random) -> None:
        now = self.clock.now()
        upward, downward = self._faults or (_draw_faults(random, now), _draw_faults(random, now))
        if _is_sound(upward) and _is_sound(downward):
            self._sound.add(number)
        link = Link(self.clock, random, upward=upward, downward=downward)
        manners = draw_manners(random)
        who = f"client {number}"
        self._note(who, "connects", (manners, upward, downward))
        client = WebSocketClient(link.client, self.clock, random, manners, partial(self._note, who))
        self.sockets[number] = client
        peer = self.server.accept(number, link.server)
        if peer is not None:
            self._peers[number] = peer
        client.start()

    def _drain(self) -> None:
        self._note("server", "drains")
        self._inspect_all()
        self._drained_at = self.clock.now()
        self.server.drain()

    def _end_streams(self) -> None:
        self._note("server", "ends", self.server.dispatcher.streams)
        self._inspect_all()
        self.server.end_streams()
        if self.server.dispatcher.streams:
            self._complain(f"{self.server.dispatcher.streams} streams outlive the end of all streams")

    def _close(self) -> None:
        self._note("server", "closes", len(self.server.peers))
        for peer in self.server.peers.values():
            if isinstance(peer.machine, UpgradedConnection):
                self._complain(f"nobody lost patience with the WebSocket of client {peer.number}")
        self.server.close()

    def _tired(self) -> None:
        """Let clients go that would wait for ever."""
        for client in self.clients.values():
            client.give_up()
        for socket in self.sockets.values():
            socket.give_up()

    def _is_feeding(self) -> bool:
        return self.server.writing > 0 and not self.server.settling

    def _on_new_stream(self) -> None:
        if self._drained_at:
            self._complain("a stream is begun while the server drains")

    def _on_record(self, record: Record) -> None:
        self._note("server", "records", record)
        self._counts[f"record {record.end}"] += 1
        self._counts["streams recorded"] += record.stream_id is not None
        admission = self.service.admission
        room = admission.running < self.service.options.max_running
        by_address = "of this address" in (record.error or "")
        self._counts["refused by address"] += by_address
        if by_address and not self.server.addresses.limits.max_streams:
            self._complain("429 by address, and there is no such limit")
        if record.status == 429 and not record.stream_id and not by_address and (room or self._has_room_to_wait()):
            self._complain(f"429 while {admission.running} run and {admission.waiting} wait")
        if record.status == 503 and record.stream_id is None and not self._drained_at:
            self._complain("503 from a server that does not drain")

    def _has_room_to_wait(self) -> bool:
        return self.service.admission.waiting < self.service.options.max_waiting

    def _on_report(self, error: Exception, stream_id: str) -> None:
        self._note("server", "reports", f"{stream_id}: {error!r}")
        self._counts["reports"] += 1

    # -- what must hold at every moment ------------------------------------------------------------------------------

    def _inspect_all(self) -> None:
        for peer in list(self.server.peers.values()):
            self._inspect(peer)
        for line in self.server.dispatcher._lines:  # noqa: SLF001  # who a stream runs for has no public name
            if line.carrier is None or cast("SimulatedPeer", line.carrier).gone:
                self._complain(f"stream {line.stream.start.id} runs for a client that is gone")

    def _inspect(self, peer: SimulatedPeer) -> None:
        admission, options = self.service.admission, self.service.options
        if not 0 <= admission.running <= options.max_running or admission.waiting > options.max_waiting:
            self._complain(f"{admission.running} streams run and {admission.waiting} wait")
        if peer.ended and not peer.gone and peer.connection.phase not in (Phase.CLOSING, Phase.CLOSED):
            self._complain(f"the connection of client {peer.number} goes on after its end")
        if peer.unsent_bytes > _MAX_UNSENT:
            self._complain(f"{peer.unsent_bytes} bytes wait in the carrier of client {peer.number}")
        reader = peer.connection._reader  # noqa: SLF001  # a bound has no public name
        held = len(reader._buffer)  # noqa: SLF001  # as above
        if held > (MAX_PIPELINED_BYTES if reader.holding else MAX_HEAD_BYTES):
            self._complain(f"{held} bytes of requests are held for client {peer.number}")
        if reader.overflowed and peer.connection.phase in (Phase.WAITING, Phase.RECEIVING):
            self._complain(f"the connection of client {peer.number} goes on though some of its bytes were dropped")
        exchange = peer.connection._exchange  # noqa: SLF001
        if isinstance(peer.machine, UpgradedConnection):
            exchange = self._inspect_socket(peer, peer.machine.conversation)
        if exchange is not None and isinstance(exchange.delivery, StreamDelivery):
            self._inspect_delivery(exchange, exchange.delivery)

    def _inspect_socket(self, peer: SimulatedPeer, conversation: Conversation) -> Exchange | None:
        waiting = conversation._waiting or ()  # noqa: SLF001  # as above
        if len(waiting) > self.service.options.max_prompts:
            self._complain(f"{len(waiting)} prompts of client {peer.number} wait")
        if peer.ended and not conversation.closing:
            self._complain(f"the WebSocket of client {peer.number} goes on after its end")
        return conversation._exchange  # noqa: SLF001

    def _inspect_delivery(self, exchange: Exchange, delivery: StreamDelivery) -> None:
        pending = delivery._pending  # noqa: SLF001  # as above
        waiting = pending.pending_bytes if pending else 0
        if waiting <= self.service.options.delivery.budget_bytes or exchange.line is None:
            return
        largest = self.ledger.largest_run(exchange.line)
        if waiting > self.service.options.delivery.budget_bytes + largest:
            self._complain(f"{waiting} bytes wait for a reader, more than the budget and a batch of {largest}")

    # -- what must hold at the end -----------------------------------------------------------------------------------

    def _look_at_the_end(self) -> None:
        dispatcher, admission = self.server.dispatcher, self.service.admission
        left = {
            "streams": dispatcher.streams,
            "running": admission.running,
            "waiting": admission.waiting,
            "peers": len(self.server.peers),
            "addresses": len(self.server.addresses),
            "parts of batches": int(dispatcher.deferred),
        }
        for name, count in left.items():
            if count:
                self._complain(f"{count} {name} left over")
        if self._counts["streams recorded"] != self._facts.given:
            self._complain(f"{self._facts.given} streams were begun, {self._counts['streams recorded']} recorded")
        self._look_at_jobs()
        judge = Judge(self.ledger, self._complain)
        for number, client in self.clients.items():
            self._look_at_client(number, client, judge)
        for number, socket in self.sockets.items():
            self._look_at_socket(number, socket)

    def _look_at_jobs(self) -> None:
        self._counts["streams"] = self._facts.given
        for account in self.ledger.accounts.values():
            if account.failed_to_start:
                continue
            telling = tell(account, self.ledger.honours)
            if telling.done_saying and account.cancelled and not account.deferred:
                self._complain(f"stream {account.stream_id} was cancelled after its own end")
            if not telling.done_saying and not account.cancelled:
                self._complain(f"the job of stream {account.stream_id} was left running")

    def _look_at_socket(self, number: int, client: WebSocketClient) -> None:
        who, peer = f"client {number}", self._peers.get(number)
        if peer is None:
            return
        self._counts["prompts answered"] += sum(record.end == "finished" for record in peer.prompts)
        look_at_answers(client, who, peer.prompts, self.ledger, self._complain)
        if number in self._sound and client.manners.faithful:
            draining = bool(self._drained_at) and client.ended_at >= self._drained_at
            slow = peer.dropped_as_slow
            look_for_end(client, who, peer.prompts, slow=slow, draining=draining, complain=self._complain)

    def _look_at_client(self, number: int, client: SimulatedClient, judge: Judge) -> None:
        who = f"client {number}"
        peer = self._peers.get(number)
        records = peer.records if peer else 0
        complete = sum(answer.complete for answer in client.answers)
        self._counts["answers"] += complete
        if client.error is not None:
            self._complain(f"{who}: {client.error}")
        if complete > records:
            self._complain(f"{who} has {complete} answers, and {records} records were made")
        for answer in client.answers:
            judge.look(answer, who, sound=number in self._sound)
        if number in self._sound and client.habits.faithful and peer is not None:
            judge.look_for_silence(client, who, slow=peer.dropped_as_slow, records=records, drained_at=self._drained_at)


def simulate(seed: int, *, backend: Backend | None = None) -> Report:
    """Run one simulation.

    Args:
        seed: what it is drawn from.
        backend: fresh; the scripted one where it is None.
    """
    return Simulation(seed, backend=backend).run()


def _is_sound(faults: Faults) -> bool:
    """Whether all that was written arrives, and soon enough for a server that lingers a second before it resets."""
    emptied_ns = faults.latency_ns + faults.jitter_ns + faults.capacity * faults.byte_ns
    return faults.reset_at is None and faults.black_hole_at is None and emptied_ns < _SECOND // 2


# ------------------------------------------------------------------------------------------------------- what is drawn


def _draw_service_options(random: Random) -> ServiceOptions:
    delivery = DeliveryOptions(
        heartbeat_ns=random.choice((50, 400, 15_000)) * _MILLISECOND,
        budget_bytes=random.choice((60, 500, 4000, 4000)),
        stall_ns=random.choice((1, 4, 60)) * _SECOND,
        merge=random.random() < 0.8,
    )
    return ServiceOptions(
        max_body_bytes=2000,
        max_running=random.choice((1, 2, 100, 100)),
        max_waiting=random.choice((0, 1, 100)),
        delivery=delivery,
    )


def _draw_connection_options(random: Random) -> ConnectionOptions:
    return ConnectionOptions(
        head_ns=random.choice((5, 10)) * _SECOND,
        body_ns=random.choice((5, 60)) * _SECOND,
        body_grace_ns=random.choice((3, 20)) * _SECOND,
        max_requests=random.choice((2, 1000, 1000, 1000)),
        idle_ns=random.choice((6, 75)) * _SECOND,
        linger_ns=random.choice((1, 2)) * _SECOND,
        stall_ns=random.choice((2, 60)) * _SECOND,
    )


def _draw_end(random: Random) -> int:
    return random.choice((random.randrange(1000) * _MILLISECOND, 4 * _SECOND, 15 * _SECOND, 15 * _SECOND))


def _draw_faults(random: Random, now: int) -> Faults:
    lot = random.random()
    return Faults(
        latency_ns=random.choice((0, 1, 30)) * _MILLISECOND,
        jitter_ns=random.choice((0, 0, 20)) * _MILLISECOND,
        cuts=random.choice((0, 0, 0, 2, 6)),
        byte_ns=random.choice((0, 0, 0, 0, 5_000, 100_000)),
        capacity=random.choice((1 << 16, 1 << 16, 4000, 400, 90)),
        reset_at=random.choice((random.randrange(300), random.randrange(3000))) if lot < 0.06 else None,
        black_hole_at=now + random.randrange(2000) * _MILLISECOND if 0.06 < lot < 0.11 else None,
    )
