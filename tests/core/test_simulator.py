"""Thousands of drawn lives of a server, each from one seed; and proof that a broken server would have been noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from tokenwire.backends.mock import MockBackend
from tokenwire.core.actions import Action, Cancel, Pause, Record, Resume
from tokenwire.core.admission import Admission
from tokenwire.core.connection import Connection
from tokenwire.core.contracts import Job, StreamHandle
from tokenwire.core.delivery import StreamDelivery
from tokenwire.core.dialects.openai_chat import ChatEncoder
from tokenwire.core.dialects.plain import PlainEncoder
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.events import ErrorKind, Event, StreamEnd, StreamError, TextDelta, UsageReport
from tokenwire.core.http import RequestReader, ResponseWriter
from tokenwire.core.line import Line
from tokenwire.core.merge import MergeBuffer
from tokenwire.core.request import GenerationRequest
from tokenwire.core.service import Service
from tokenwire.core.stream import Stream
from tokenwire.core.testing.client import Habits
from tokenwire.core.testing.clock import VirtualClock
from tokenwire.core.testing.network import Faults, Link
from tokenwire.core.testing.simulator import Simulation, simulate
from tokenwire.core.text import StopScanner

SEEDS = 3000
SHARE = 250
_MILLISECOND = 1_000_000

Patch = pytest.MonkeyPatch


# ------------------------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("begin", range(0, SEEDS, SHARE))
def test_no_seed_finds_a_broken_promise(begin: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(begin, begin + SHARE):
        report = simulate(seed)
        report.check()
        counts.update(report.counts)
    # A simulation in which nothing happens finds nothing.
    assert counts["streams"] > SHARE
    assert counts["answers"] > 2 * SHARE
    assert min(counts[f"record {end}"] for end in ("finished", "failed", "cancelled", "slow_reader", "refused")) > 0


@pytest.mark.parametrize("seed", [0, 7, 79, 1132])
def test_a_seed_replays_exactly(seed: int) -> None:
    first, second = simulate(seed), simulate(seed)
    assert first == second
    assert first.digest == second.digest
    assert first.digest != simulate(seed + 1).digest


def test_a_perfect_world_answers_everything() -> None:
    perfect = (Faults(), Faults())
    counts: Counter[str] = Counter()
    for seed in range(60):
        simulation = Simulation(seed, clients=3, habits=Habits(), faults=perfect, ends_at=60_000 * _MILLISECOND)
        report = simulation.run()
        report.check()
        counts.update(report.counts)
        assert all(
            answer.complete for client in simulation.clients.values() for answer in client.answers if not client.lost
        )
    assert counts["record cancelled"] == counts["record slow_reader"] == 0
    assert counts["record finished"] > 100


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_another_backend_takes_the_place_of_the_scripted_one(jitter: float) -> None:
    counts: Counter[str] = Counter()
    for seed in range(60):
        backend = MockBackend(ttft_ns=30 * _MILLISECOND, itl_ns=10 * _MILLISECOND, jitter=jitter, seed=seed)
        report = Simulation(seed, backend=backend).run()
        report.check()
        counts.update(report.counts)
    assert counts["streams"] > 60


def test_a_failing_report_tells_its_story() -> None:
    report = simulate(3)
    report = msgspec.structs.replace(report, violations=("it rained",), story=report.story[:100])
    with pytest.raises(AssertionError, match="seed 3: 1 violations\nit rained\n") as caught:
        report.check()
    assert "connects" in str(caught.value)


# ------------------------------------------------------------------------------------------------- broken on purpose


def _returns(value: object) -> Callable[..., object]:
    """Make a method that does nothing but return a value."""

    def method(*_: object, **__: object) -> object:
        return value

    return method


def _drops_while_blocked(patch: Patch) -> None:
    honest = StreamDelivery._deliver

    def deliver(self: StreamDelivery, events: Sequence[Event], now: int) -> bytes:
        if self.blocked:
            events = [event for event in events if not isinstance(event, TextDelta)]
        return honest(self, events, now)

    patch.setattr(StreamDelivery, "_deliver", deliver)


def _forgets_to_leave(patch: Patch) -> None:
    patch.setattr(Dispatcher, "_leave", _returns(None))


def _leaves_twice(patch: Patch) -> None:
    honest = Dispatcher._leave

    def leave(self: Dispatcher, line: Line) -> None:
        honest(self, line)
        honest(self, line)

    patch.setattr(Dispatcher, "_leave", leave)


def _overlooks_eof(patch: Patch) -> None:
    patch.setattr(Connection, "receive_eof", _returns(()))


def _cancels_nobody(patch: Patch) -> None:
    honest = Connection._drop

    def drop(self: Connection, end: str, by: str, now: int) -> list[Action]:
        return [action for action in honest(self, end, by, now) if not isinstance(action, Cancel)]

    patch.setattr(Connection, "_drop", drop)


def _records_twice(patch: Patch) -> None:
    honest = Connection._drop

    def drop(self: Connection, end: str, by: str, now: int) -> list[Action]:
        actions = honest(self, end, by, now)
        return actions + [action for action in actions if isinstance(action, Record)]

    patch.setattr(Connection, "_drop", drop)


def _done_after_an_error(patch: Patch) -> None:
    honest = ChatEncoder.encode

    def encode(self: ChatEncoder, event: Event, number: int) -> bytes:
        return honest(self, event, number) + (b"data: [DONE]\n\n" if isinstance(event, StreamError) else b"")

    patch.setattr(ChatEncoder, "encode", encode)


def _clean_end_for_an_error(patch: Patch) -> None:
    honest = PlainEncoder.encode

    def encode(self: PlainEncoder, event: Event, number: int) -> bytes:
        return honest(self, StreamEnd() if isinstance(event, StreamError) else event, number)

    patch.setattr(PlainEncoder, "encode", encode)


def _no_last_chunk(patch: Patch) -> None:
    patch.setattr(ResponseWriter, "end", _returns(b""))


def _doubles_what_is_merged(patch: Patch) -> None:
    honest = MergeBuffer.drain

    def drain(self: MergeBuffer) -> list[tuple[Event, int]]:
        run = honest(self)
        return run + [entry for entry in run[-1:] if len(run) > 1 and isinstance(entry[0], TextDelta)]

    patch.setattr(MergeBuffer, "drain", drain)


def _merges_across_choices(patch: Patch) -> None:
    def key_of(event: Event) -> tuple[int, int | None]:
        return (0, None) if isinstance(event, TextDelta) else (-2, None)

    patch.setattr("tokenwire.core.merge._key_of", key_of)


def _knows_no_budget(patch: Patch) -> None:
    patch.setattr(StreamDelivery, "_give_up", _returns(None))


def _forgets_held_back_text(patch: Patch) -> None:
    patch.setattr(StopScanner, "flush", _returns(""))


def _forgets_the_limit(patch: Patch) -> None:
    honest = Stream.__init__

    def begin(self: Stream, *args: Any, **limits: Any) -> None:
        honest(self, *args, **(limits | {"max_tokens": None}))

    patch.setattr(Stream, "__init__", begin)


def _miscounts(patch: Patch) -> None:
    honest = Stream._TAKERS[UsageReport]

    def report(self: Stream, usage: UsageReport, out: list[Event]) -> None:
        honest(self, msgspec.structs.replace(usage, output_tokens=usage.output_tokens + 1), out)

    patch.setattr(Stream, "_TAKERS", {**Stream._TAKERS, UsageReport: report})
    patch.setattr(Stream, "_take_usage", report)


def _lets_jobs_run_on_at_the_end(patch: Patch) -> None:
    patch.setattr(Dispatcher, "_cancel_job", _returns(None))


def _starts_for_lost_peers(patch: Patch) -> None:
    honest = Dispatcher._bind

    def bind(self: Dispatcher, line: Line, carrier: Any) -> None:
        self._lines[line] = None
        honest(self, line, carrier)

    patch.setattr(Dispatcher, "_bind", bind)


def _pauses_in_the_middle_of_a_batch(patch: Patch) -> None:
    honest = Dispatcher.perform

    def perform(self: Dispatcher, actions: Sequence[Action], carrier: Any, now: int) -> None:
        for action in actions:
            if isinstance(action, Pause | Resume) and action.stream.job is not None:
                action.stream.job.set_blocked(isinstance(action, Pause))
        honest(self, actions, carrier, now)

    patch.setattr(Dispatcher, "perform", perform)


def _tells_all_after_an_offence(patch: Patch) -> None:
    def broken(self: Dispatcher, line: Line, error: Exception) -> Sequence[Event]:
        self._report(error, line.stream.start.id)
        line.stream.cut_short = True
        return line.stream.accept((StreamError(ErrorKind.SERVER, "It broke.", "backend_error"),))

    patch.setattr(Dispatcher, "_broken", broken)


def _queues_without_end(patch: Patch) -> None:
    patch.setattr(Admission, "full", property(_returns(False)))
    honest = Admission.__init__

    def begin(self: Admission, *, max_running: int, max_waiting: int) -> None:
        honest(self, max_running=max_running, max_waiting=max_waiting + 50)

    patch.setattr(Admission, "__init__", begin)


def _always_says_the_queue_is_full(patch: Patch) -> None:
    patch.setattr("tokenwire.core.service.Admission", _Full)


class _Full(Admission):
    """Turns everybody away who comes while one runs, however many may."""

    @property
    def full(self) -> bool:
        return self.running >= 1


def _begins_streams_while_it_drains(patch: Patch) -> None:
    honest = Service.begin

    def begin(self: Service, *args: Any) -> Any:
        draining, self.draining = self.draining, False
        try:
            return honest(self, *args)
        finally:
            self.draining = draining

    patch.setattr(Service, "begin", begin)


def _drops_what_is_sent_ahead(patch: Patch) -> None:
    def hold(self: RequestReader, data: bytes) -> None:
        if len(self._buffer) + len(data) <= 200:
            self._buffer += data

    patch.setattr(RequestReader, "_hold", hold)


def _holds_all_that_is_sent_ahead(patch: Patch) -> None:
    def hold(self: RequestReader, data: bytes) -> None:
        self._buffer += data

    patch.setattr(RequestReader, "_hold", hold)


def _heartbeats_in_the_wrong_place(patch: Patch) -> None:
    dot = b'data: {"choices":[{"index":0,"delta":{"content":"."}}]}\n\n'
    patch.setattr(ChatEncoder, "heartbeat", property(_returns(dot)))


def _opens_before_the_first_token(patch: Patch) -> None:
    patch.setattr("tokenwire.core.delivery._HELD_WITH_HEAD", ())


MUTANTS: list[tuple[Callable[[Patch], None], int]] = [
    (_drops_while_blocked, 1500),
    (_forgets_to_leave, 1500),
    (_leaves_twice, 1500),
    (_overlooks_eof, 1500),
    (_cancels_nobody, 1500),
    (_records_twice, 1500),
    (_done_after_an_error, 1500),
    (_clean_end_for_an_error, 1500),
    (_no_last_chunk, 1500),
    (_doubles_what_is_merged, 1500),
    (_merges_across_choices, 1500),
    (_knows_no_budget, 1500),
    (_forgets_held_back_text, 1500),
    (_forgets_the_limit, 1500),
    (_miscounts, 1500),
    (_lets_jobs_run_on_at_the_end, 1500),
    (_starts_for_lost_peers, 6000),
    (_pauses_in_the_middle_of_a_batch, 1500),
    (_tells_all_after_an_offence, 1500),
    (_queues_without_end, 1500),
    (_always_says_the_queue_is_full, 1500),
    (_begins_streams_while_it_drains, 1500),
    (_drops_what_is_sent_ahead, 1500),
    (_holds_all_that_is_sent_ahead, 1500),
    (_heartbeats_in_the_wrong_place, 1500),
    (_opens_before_the_first_token, 1500),
]


@pytest.mark.parametrize(("mutate", "seeds"), MUTANTS, ids=[mutate.__name__.strip("_") for mutate, _ in MUTANTS])
def test_a_broken_server_is_found_out(
    mutate: Callable[[Patch], None], seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    assert any(simulate(seed).violations for seed in range(seeds))


class _Rude:
    """A backend that goes on after its end, and cannot be stopped."""

    def __init__(self, honest: MockBackend) -> None:
        self._honest = honest
        self.models, self.honours = honest.models, honest.honours
        self.attach = honest.attach

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        job = self._honest.start(stream, request)
        job.cancel()
        return job


def test_a_backend_that_never_speaks_is_ended_by_the_server() -> None:
    honest = MockBackend(ttft_ns=0, itl_ns=_MILLISECOND)
    report = Simulation(2, backend=_Rude(honest), ends_at=5_000 * _MILLISECOND).run()
    report.check()
    assert report.counts["streams"] > 0
    assert "record finished" not in report.counts


# ------------------------------------------------------------------------------------------------------ the network


def _carried(seed: int, faults: Faults, data: bytes) -> bytes:
    """Send bytes over a link as fast as it takes them, read them as they come."""
    clock, came = VirtualClock(), bytearray()
    link = Link(clock, Random(seed), upward=faults, downward=Faults())
    rest = data

    def write() -> None:
        nonlocal rest
        try:
            while rest:
                rest = rest[link.client.send(rest) :]
        except BlockingIOError:
            return
        link.client.set_writer(None)
        link.client.shutdown()

    def read() -> None:
        piece = link.server.recv(1000)
        if not piece:
            link.server.set_reader(None)
        came.extend(piece)

    link.server.set_reader(read)
    link.client.set_writer(write)
    clock.run_until_idle(max_calls=100_000)
    return bytes(came)


@pytest.mark.parametrize("seed", range(20))
def test_a_slow_and_slicing_link_loses_nothing(seed: int) -> None:
    random = Random(seed)
    data = random.randbytes(random.randrange(5000))
    faults = Faults(latency_ns=5, jitter_ns=50, cuts=random.randrange(5), byte_ns=3, capacity=random.randrange(1, 900))
    assert _carried(seed, faults, data) == data


def test_a_black_hole_swallows_the_rest() -> None:
    data = bytes(range(256))
    came = _carried(1, Faults(cuts=3, byte_ns=10, capacity=50, black_hole_at=900), data)
    assert 0 < len(came) < len(data)
    assert data.startswith(came)


def test_a_reset_is_seen_on_both_sides() -> None:
    clock = VirtualClock()
    link = Link(clock, Random(0), upward=Faults(reset_at=10), downward=Faults())
    assert link.client.send(b"0123456789") == 10
    with pytest.raises(ConnectionResetError):
        link.client.send(b"x")
    clock.run_until_idle()
    for end in (link.client, link.server):
        with pytest.raises(ConnectionResetError):
            end.recv(10)
        with pytest.raises(ConnectionResetError):
            end.send(b"x")


def test_a_full_link_blocks_its_writer_until_somebody_reads() -> None:
    clock = VirtualClock()
    link = Link(clock, Random(0), upward=Faults(capacity=4), downward=Faults())
    assert link.client.send(b"012345") == 4
    with pytest.raises(BlockingIOError):
        link.client.send(b"45")
    clock.run_until_idle()
    assert link.server.recv(3) == b"012"
    assert link.client.send(b"45678") == 3
    with pytest.raises(BlockingIOError):
        Link(clock, Random(0), upward=Faults(), downward=Faults()).client.recv(1)


def test_bytes_for_an_end_that_was_closed_come_back_as_a_reset() -> None:
    clock = VirtualClock()
    link = Link(clock, Random(0), upward=Faults(latency_ns=1), downward=Faults(latency_ns=1))
    link.server.close()
    with pytest.raises(BrokenPipeError):
        link.server.send(b"x")
    clock.run_until_idle()
    assert link.client.recv(1) == b""
    assert link.client.send(b"late") == 4
    clock.run_until_idle()
    with pytest.raises(ConnectionResetError):
        link.client.send(b"later")
