"""Batches in, deliveries fed, cancellations out: turns, order, and backends that are called after a batch and never in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.carriers import SECOND, Asked, Carriage, House, HttpClient, ScriptedJob

from tokenwire.core.actions import Cancel, Close, Pause, Record, Resume
from tokenwire.core.contracts import StreamHandle
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.dispatch import STREAMS_PER_TURN
from tokenwire.core.events import ChoiceEnd, ErrorKind, StreamEnd, StreamError, TextDelta
from tokenwire.core.line import Line
from tokenwire.core.request import GenerationRequest
from tokenwire.core.service import ServiceOptions
from tokenwire.core.stream import Item

ASK = Asked("GET", "/chat?prompt=a")
WHOLE = Asked("GET", "/chat?prompt=a&stream=false")


class Busy:
    """A house whose clients have all asked, and whose backend is silent until the test speaks for it."""

    def __init__(self, streams: int, options: ServiceOptions | None = None, asked: Asked = ASK) -> None:
        self.house = Carriage("http").house(options=options)
        self.house.source.script = None
        self.clients: list[HttpClient] = []
        for _ in range(streams):
            client = self.house.connect()
            assert isinstance(client, HttpClient)
            client.begin(asked)
            self.clients.append(client)
        self.dispatcher = self.house.dispatcher

    @property
    def jobs(self) -> list[ScriptedJob]:
        return self.house.source.jobs

    def deliver(self, *items: Item, jobs: Sequence[ScriptedJob] | None = None) -> None:
        """Hand one batch over and go no further."""
        batch = [(job.stream, items) for job in (self.jobs if jobs is None else jobs)]
        self.dispatcher.deliver(batch, self.house.now)

    def writes(self) -> list[int]:
        return [len(client.peer.writes) for client in self.clients]

    def ends(self) -> list[str]:
        return [record.end for record in self.house.records]


def test_a_batch_is_written_in_the_call_that_delivers_it() -> None:
    busy = Busy(3)
    busy.deliver("a")
    assert busy.writes() == [1, 1, 1]
    busy.deliver("b", "c")
    assert busy.writes() == [2, 2, 2]  # one write a stream and step, not one a token
    busy.deliver(StreamEnd())
    assert busy.ends() == ["finished"] * 3
    assert busy.dispatcher.streams == 0
    assert [job.cancels for job in busy.jobs] == [0, 0, 0]


def test_a_batch_may_be_an_iterator_and_is_read_once() -> None:
    busy = Busy(2)
    read: list[int] = []

    def batch() -> Iterator[tuple[StreamHandle, Sequence[Item]]]:
        for number, job in enumerate(busy.jobs):
            read.append(number)
            yield job.stream, ["a"]

    busy.dispatcher.deliver(batch(), busy.house.now)
    assert read == [0, 1]
    assert busy.writes() == [1, 1]


def test_one_clock_for_the_whole_batch() -> None:
    busy = Busy(3)
    busy.house.now += 5
    busy.deliver("a")
    busy.house.now += 5
    busy.deliver(StreamEnd())
    assert [(record.first_token_ns, record.duration_ns) for record in busy.house.records] == [(5, 10)] * 3


def test_the_loop_gets_a_turn_after_so_many_streams() -> None:
    busy = Busy(2 * STREAMS_PER_TURN + 1, ServiceOptions(max_running=10_000))
    busy.deliver("a")
    assert sum(busy.writes()) == STREAMS_PER_TURN
    assert busy.writes()[:STREAMS_PER_TURN] == [1] * STREAMS_PER_TURN
    assert (busy.house.turns, busy.dispatcher.deferred) == (1, True)
    busy.dispatcher.resume(busy.house.now)
    assert (sum(busy.writes()), busy.house.turns, busy.dispatcher.deferred) == (2 * STREAMS_PER_TURN, 2, True)
    busy.dispatcher.resume(busy.house.now)
    assert (sum(busy.writes()), busy.house.turns, busy.dispatcher.deferred) == (2 * STREAMS_PER_TURN + 1, 2, False)
    busy.dispatcher.resume(busy.house.now)
    assert busy.house.turns == 2


def test_what_was_put_off_keeps_its_order() -> None:
    busy = Busy(STREAMS_PER_TURN + 1, ServiceOptions(max_running=10_000))
    busy.deliver("a")
    busy.deliver("b", jobs=busy.jobs[-1:])  # comes behind the "a" that waits for the next turn
    busy.deliver("c", StreamEnd(), jobs=[busy.jobs[0], busy.jobs[-1]])
    assert busy.writes()[-1] == 0
    assert busy.writes()[0] == 1
    while busy.dispatcher.deferred:
        busy.dispatcher.resume(busy.house.now)
    said = busy.clients[-1].answer().body
    assert said.index(b'"a"') < said.index(b'"b"') < said.index(b'"c"') < said.index(b"[DONE]")
    assert busy.clients[0].answer().body.index(b'"a"') < busy.clients[0].answer().body.index(b'"c"')


def test_a_turn_is_asked_for_once_while_a_batch_waits() -> None:
    busy = Busy(STREAMS_PER_TURN + 1, ServiceOptions(max_running=10_000))
    busy.deliver("a")
    busy.deliver("b")
    assert busy.house.turns == 1


# ------------------------------------------------------------------------------------------------- after, never inside


class Watch:
    """Notes in which order writes and calls of the backend happen."""

    def __init__(self, busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for number, client in enumerate(busy.clients):
            self._note(monkeypatch, client.peer, "write", f"write {number}")
        for number, job in enumerate(busy.jobs):
            self._note(monkeypatch, job, "cancel", f"cancel {number}")
            self._note(monkeypatch, job, "set_blocked", f"blocked {number}")
        self._note(monkeypatch, busy.house.source, "start", "start")

    def _note(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, words: str) -> None:
        method = getattr(owner, name)

        def noted(*args: object) -> object:
            self.seen.append(words)
            return method(*args)

        monkeypatch.setattr(owner, name, noted)


def test_cancellations_follow_after_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(3, asked=Asked("GET", "/chat?prompt=a&max_tokens=1"))
    watch = Watch(busy, monkeypatch)
    busy.deliver("a")
    assert watch.seen == ["write 0", "write 1", "write 2", "cancel 0", "cancel 1", "cancel 2"]


def test_pauses_follow_after_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(3)
    busy.clients[0].peer.room = 0
    watch = Watch(busy, monkeypatch)
    busy.deliver("a")
    assert watch.seen == ["write 0", "write 1", "write 2", "blocked 0"]


def test_a_peer_lost_in_a_write_is_cancelled_after_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(3)
    watch = Watch(busy, monkeypatch)
    lost = busy.clients[0].peer

    def write(data: bytes) -> None:
        del data
        lost.lose()

    monkeypatch.setattr(lost, "write", write)
    busy.deliver("a")
    assert watch.seen == ["write 1", "write 2", "cancel 0"]
    assert busy.ends() == ["cancelled"]
    busy.deliver("b", StreamEnd())
    assert busy.ends() == ["cancelled", "finished", "finished"]


def test_what_waited_starts_after_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(4, ServiceOptions(max_running=2, max_waiting=2))
    assert len(busy.jobs) == 2
    watch = Watch(busy, monkeypatch)
    busy.deliver("a", StreamEnd())
    assert watch.seen == ["write 0", "write 1", "start", "start"]
    assert [job.stream for job in busy.jobs[2:]] == [busy.jobs[2].stream, busy.jobs[3].stream]
    busy.deliver("b", StreamEnd(), jobs=busy.jobs[2:])
    assert busy.ends() == ["finished"] * 4
    assert [b'"a"' in client.answer().body for client in busy.clients] == [True, True, False, False]


def test_a_backend_that_delivers_from_its_own_start() -> None:
    """The contract forbids it; what comes of it must still be in order."""
    busy = Busy(0)
    source = busy.house.source
    start = source.start

    def eager(stream: StreamHandle, request: GenerationRequest) -> ScriptedJob:
        job = start(stream, request)
        busy.dispatcher.deliver([(stream, ["a"])], busy.house.now)
        return job

    source.start = eager  # type: ignore[method-assign]  # this one test's own backend
    client = busy.house.connect()
    client.begin(ASK)
    busy.deliver("b", StreamEnd())
    assert busy.ends() == ["finished"]
    assert client.answer().body.index(b'"a"') < client.answer().body.index(b'"b"')


# ---------------------------------------------------------------------------------------------------- failing backends


def test_a_broken_grammar_ends_its_own_stream_only() -> None:
    busy = Busy(3)
    busy.deliver("a")
    bad: list[Item] = [TextDelta("b"), ChoiceEnd(7)]
    steps = [(job.stream, bad if job is busy.jobs[1] else ["b"]) for job in busy.jobs]
    busy.dispatcher.deliver(steps, busy.house.now)
    assert busy.ends() == ["failed"]
    assert [job.cancels for job in busy.jobs] == [0, 1, 0]
    ((error, stream_id),) = busy.house.reports
    assert "ChoiceEnd" in str(error)
    assert stream_id == "tw0002"
    busy.deliver("c", StreamEnd())
    assert busy.ends() == ["failed", "finished", "finished"]
    assert b'"b"' in busy.clients[0].answer().body
    assert [job.cancels for job in busy.jobs] == [0, 1, 0]
    assert busy.dispatcher.streams == 0


def test_a_start_that_raises_ends_its_own_stream_and_lets_the_next_run() -> None:
    busy = Busy(2, ServiceOptions(max_running=1, max_waiting=2))
    busy.house.source.fault = RuntimeError("no")
    busy.deliver("a", StreamEnd(), jobs=busy.jobs[:1])
    assert busy.ends() == ["finished", "failed"]
    assert busy.clients[1].answer().status == 500
    assert len(busy.house.reports) == 1
    busy.house.source.fault = None
    assert busy.house.service.admission.running == 0
    busy.clients[0].begin(ASK)
    busy.deliver("b", StreamEnd(), jobs=busy.jobs[-1:])
    assert busy.ends() == ["finished", "failed", "finished"]


def test_a_job_that_raises_is_reported_and_the_others_are_told() -> None:
    class Raising(ScriptedJob):
        def cancel(self) -> None:
            raise RuntimeError("no")

    busy = Busy(2)
    busy.jobs[0].__class__ = Raising
    for client in busy.clients:
        client.leave()
    assert [str(error) for error, _ in busy.house.reports] == ["no"]
    assert busy.jobs[1].cancels == 1
    assert busy.ends() == ["cancelled", "cancelled"]
    assert busy.dispatcher.streams == 0


def test_streams_that_have_ended_are_passed_over() -> None:
    busy = Busy(2)
    busy.deliver("a", StreamEnd(), jobs=busy.jobs[:1])
    busy.clients[1].leave()
    before = busy.writes()
    busy.deliver("late", StreamEnd())
    assert busy.writes() == before
    assert busy.ends() == ["finished", "cancelled"]
    assert [job.cancels for job in busy.jobs] == [0, 1]


# -------------------------------------------------------------------------------------------------------- slow readers


@pytest.mark.parametrize("stalled", [0, 1, 2])
def test_a_slow_reader_that_is_given_up_delays_nobody(stalled: int) -> None:
    busy = Busy(3, ServiceOptions(delivery=DeliveryOptions(budget_bytes=100)))
    busy.clients[stalled].peer.room = 0
    for _ in range(20):
        busy.deliver("x" * 10)
    expected = [20, 20, 20]
    expected[stalled] = 1
    assert busy.writes() == expected
    assert busy.ends() == ["slow_reader"]
    assert [job.cancels for job in busy.jobs] == [int(number == stalled) for number in range(3)]
    assert busy.clients[stalled].peer.aborted
    busy.deliver(StreamEnd())
    assert busy.ends() == ["slow_reader", "finished", "finished"]
    assert busy.dispatcher.streams == 0


def test_a_waiting_line_learns_that_its_reader_is_slow() -> None:
    busy = Busy(2, ServiceOptions(max_running=1, max_waiting=1, delivery=DeliveryOptions(heartbeat_ns=SECOND)))
    busy.clients[1].peer.room = 10
    busy.house.advance(SECOND)  # its heartbeat does not fit
    busy.deliver("a", StreamEnd())
    assert busy.jobs[1].blocked == [True]
    busy.clients[1].peer.take()
    assert busy.jobs[1].blocked == [True, False]


# ------------------------------------------------------------------------------------------------------------- the end


def test_shutting_down_ends_every_stream() -> None:
    busy = Busy(STREAMS_PER_TURN + 5, ServiceOptions(max_running=STREAMS_PER_TURN + 3, max_waiting=2))
    busy.deliver("a")
    busy.dispatcher.shut_down(busy.house.service.shutting_down(), busy.house.now)
    assert busy.dispatcher.streams == 0
    assert not busy.dispatcher.deferred
    assert busy.ends() == ["failed"] * len(busy.clients)
    assert {job.cancels for job in busy.jobs} == {1}
    admission = busy.house.service.admission
    assert (admission.running, admission.waiting) == (0, 0)
    busy.deliver("late")
    assert busy.ends() == ["failed"] * len(busy.clients)


@pytest.mark.parametrize("asked", [ASK, WHOLE], ids=["stream", "whole"])
def test_one_record_for_each_answer(asked: Asked) -> None:
    busy = Busy(2, asked=asked)
    busy.deliver("a")
    busy.deliver("b", StreamEnd(), jobs=busy.jobs[:1])
    busy.deliver(StreamError(ErrorKind.SERVER, "It broke."), jobs=busy.jobs[1:])
    finished, failed = busy.house.records
    assert (finished.end, finished.tokens, finished.status, finished.error) == ("finished", 2, 200, None)
    assert finished.sent_bytes == len(busy.clients[0].peer.received)
    assert (failed.end, failed.tokens, failed.error) == ("failed", 1, "It broke.")
    assert failed.status == (200 if asked is ASK else 500)


def test_actions_of_other_kinds_are_for_the_carrier() -> None:
    busy = Busy(1)
    peer = busy.clients[0].peer
    line = busy.jobs[0].stream
    assert isinstance(line, Line)
    busy.dispatcher.perform([Close(), Pause(line), Resume(line)], peer, busy.house.now)
    assert busy.dispatcher.streams == 1
    busy.dispatcher.perform([Cancel(line, "operator"), Cancel(line, "operator")], peer, busy.house.now)
    assert busy.dispatcher.streams == 0
    assert busy.jobs[0].cancels == 1
    busy.dispatcher.perform([Pause(line)], peer, busy.house.now)
    assert busy.house.records == []
    record = Record(method="-", path="-", status=400, end="refused")
    busy.dispatcher.perform([record], peer, busy.house.now)
    assert busy.house.records == [record]


# ----------------------------------------------------------------------------------------------------------- the machine

WORDS = st.lists(
    st.sampled_from(
        ["a", "b" * 30, "", b"\xe2", StreamEnd(), StreamError(ErrorKind.SERVER, "It broke."), ChoiceEnd(4)]
    ),
    min_size=1,
    max_size=3,
)


class DispatchMachine(RuleBasedStateMachine):
    """Clients that come, stall and go, and a backend that says anything of any stream at any time."""

    house: House

    @initialize(running=st.integers(1, 3), waiting=st.integers(0, 2))
    def begin(self, running: int, waiting: int) -> None:
        delivery = DeliveryOptions(heartbeat_ns=3 * SECOND, stall_ns=9 * SECOND, budget_bytes=200)
        options = ServiceOptions(max_running=running, max_waiting=waiting, delivery=delivery)
        self.house = Carriage("http").house(options=options)
        self.house.source.script = None
        self.clients: list[HttpClient] = []

    @rule(whole=st.booleans(), room=st.none() | st.integers(0, 900))
    def ask(self, whole: bool, room: int | None) -> None:
        client = self.house.connect()
        assert isinstance(client, HttpClient)
        client.peer.room = room
        client.begin(WHOLE if whole else ASK)
        self.clients.append(client)

    @rule(data=st.data(), words=WORDS)
    def say(self, data: st.DataObject, words: list[Item]) -> None:
        jobs = data.draw(st.lists(st.sampled_from(self.house.source.jobs))) if self.house.source.jobs else []
        self.house.dispatcher.deliver([(job.stream, words) for job in jobs], self.house.now)

    @rule(data=st.data(), how=st.sampled_from(["leave", "lose", "take", "take-all"]))
    def move(self, data: st.DataObject, how: str) -> None:
        if not self.clients:
            return
        client = data.draw(st.sampled_from(self.clients))
        if how == "leave":
            client.leave()
        elif how == "lose":
            client.peer.lose()
        elif not client.peer.aborted:
            client.peer.take(None if how == "take-all" else 50)

    @rule(fails=st.booleans())
    def change(self, fails: bool) -> None:
        self.house.source.fault = RuntimeError("no") if fails else None

    @rule(seconds=st.sampled_from([1, 3, 9]))
    def wait(self, seconds: int) -> None:
        self.house.advance(seconds * SECOND)

    @rule()
    def shut_down(self) -> None:
        self.house.dispatcher.shut_down(self.house.service.shutting_down(), self.house.now)

    @invariant()
    def the_counts_agree(self) -> None:
        admission = self.house.service.admission
        assert self.house.dispatcher.streams == admission.running + admission.waiting
        assert admission.running <= self.house.service.options.max_running
        assert admission.waiting <= self.house.service.options.max_waiting
        live = [
            job for job in self.house.source.jobs if isinstance(job.stream, Line) and not job.stream.stream.terminal
        ]
        assert len(live) == admission.running

    @invariant()
    def a_job_is_cancelled_when_its_stream_was_cut(self) -> None:
        for job in self.house.source.jobs:
            assert isinstance(job.stream, Line)
            stream = job.stream.stream
            assert job.cancels <= 1
            assert not job.cancels or stream.terminal is not None
            if stream.cut_short:
                assert job.cancels == 1

    def teardown(self) -> None:
        if not hasattr(self, "house"):
            return
        for client in self.clients:
            client.peer.lose()
        assert self.house.dispatcher.streams == 0
        asked = [record for record in self.house.records if record.stream_id is not None or record.status == 429]
        assert len(asked) == len(self.house.records) == len(self.clients)


TestDispatchMachine = DispatchMachine.TestCase
TestDispatchMachine.settings = settings(max_examples=100, stateful_step_count=20)
