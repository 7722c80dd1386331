"""Recorded streams played back: the same events with the same gaps, to slow readers, on virtual time and on real loops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.backends.fakes import FakeRuntime, RecordingSink, heard, request

from tokenwire.adapters.runtime import LoopRuntime, running_loop
from tokenwire.backends.mock import MockBackend
from tokenwire.backends.replay import DIALECTS, ReplayBackend, read_steps
from tokenwire.core import recording, sse
from tokenwire.core.collect import Collector, Result
from tokenwire.core.contracts import Dialect
from tokenwire.core.errors import LimitExceeded
from tokenwire.core.events import Event, StreamEnd, StreamError, StreamStart, StreamTruncated, TextDelta
from tokenwire.core.recording import Recorder, RecordingError
from tokenwire.core.stream import Item, Stream
from tokenwire.core.testing.backend import SimulatedRuntime
from tokenwire.core.testing.clock import VirtualClock

MS = 1_000_000
CHAT = DIALECTS["openai_chat"]
each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def record(path: Path, dialect: Dialect, reads: Sequence[tuple[int, bytes]], *, failure: str | None = None) -> Path:
    """Write a recording whose request was sent at 5 s of some clock."""
    made = Recorder(dialect.name, url="http://localhost/", request=b"{}", now=5_000 * MS, wall_s=0)
    lines = [made.begin(), *(made.receive_data(data, 5_000 * MS + t_ns) for t_ns, data in reads)]
    last = 5_000 * MS + reads[-1][0] if reads else 5_000 * MS
    lines.append(made.receive_eof(last) if failure is None else made.fail(failure, last))
    path.write_bytes(b"".join(lines))
    return path


def mock_reads(dialect: Dialect, **asked: Any) -> list[tuple[int, bytes]]:
    """What a client of the mock would read, and when, from the moment of its request."""
    backend = MockBackend(ttft_ns=200 * MS, itl_ns=20 * MS, jitter=0.5, seed=3)
    runtime, sink = FakeRuntime(), RecordingSink()
    backend.attach(runtime, sink)
    begin = runtime.clock
    wanted: dict[str, Any] = {"include_usage": True, "max_tokens": 12}
    what = request(**(wanted | asked))
    backend.start("s", what)
    runtime.fire_all()
    stream, encoder = Stream(StreamStart("s", "mock", 7, choices=what.n)), dialect.encoder(what, "s")
    reads: list[tuple[int, bytes]] = []
    number = 0
    for now, entries in sink.batches:
        said = stream.accept(dict(entries)["s"])
        reads.append((now - begin, b"".join(encoder.encode(event, number + at) for at, event in enumerate(said, 1))))
        number += len(said)
    return reads


class Played:
    """A replay on virtual time."""

    def __init__(self, path: Path, *, speed: float = 1.0) -> None:
        self.backend = ReplayBackend(path, speed=speed)
        self.runtime, self.sink = FakeRuntime(), RecordingSink()
        self.backend.attach(self.runtime, self.sink)
        self.begin = self.runtime.clock

    def times(self, stream: str = "s") -> list[int]:
        return [now - self.begin for now, entries in self.sink.batches if stream in dict(entries)]


def fold(events: Sequence[Event]) -> Result:
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector.result()


def decoded(dialect: Dialect, wire: bytes) -> list[Event]:
    decoder = dialect.decoder()
    return [*decoder.receive_data(wire), *decoder.receive_eof()]


# ---- round trip


@each_dialect
def test_a_recorded_mock_stream_is_replayed_with_its_events_and_gaps(dialect: Dialect, tmp_path: Path) -> None:
    reads = mock_reads(dialect)
    played = Played(record(tmp_path / "r", dialect, reads))
    played.backend.start("s", request())
    assert played.sink.batches == []  # nothing is said before start returns
    played.runtime.fire_all()
    assert played.sink.said["s"] == decoded(dialect, b"".join(data for _, data in reads))
    assert played.times() == [t_ns for t_ns, _ in reads]
    assert len(set(map(lambda a, b: b - a, played.times(), played.times()[1:]))) > 5  # the gaps differ


@each_dialect
def test_what_is_replayed_can_be_said_in_any_dialect(dialect: Dialect, tmp_path: Path) -> None:
    """Recorded in one dialect, replayed, encoded in another, decoded: the same text, reason and usage."""
    reads = mock_reads(CHAT)
    played = Played(record(tmp_path / "r", CHAT, reads))
    asked = request(include_usage=True)
    played.backend.start("s", asked)
    played.runtime.fire_all()
    encoder = dialect.encoder(asked, "s")
    wire = b"".join(encoder.encode(event, number) for number, event in enumerate(played.sink.events("s"), 1))
    was, now = fold(decoded(CHAT, b"".join(data for _, data in reads))), fold(decoded(dialect, wire))
    assert now.choices == was.choices
    assert (now.usage, now.terminal) == (was.usage, StreamEnd())


@pytest.mark.parametrize("speed", [0.5, 2.0, 1000.0])
def test_the_gaps_are_divided_by_the_speed(speed: float, tmp_path: Path) -> None:
    reads = mock_reads(CHAT)
    played = Played(record(tmp_path / "r", CHAT, reads), speed=speed)
    played.backend.start("s", request())
    played.runtime.fire_all()
    assert played.times() == [round(t_ns / speed) for t_ns, _ in reads]


def test_at_speed_0_a_stream_takes_no_time_but_turns_of_the_loop(tmp_path: Path) -> None:
    reads = mock_reads(CHAT, max_tokens=100)
    played = Played(record(tmp_path / "r", CHAT, reads), speed=0)
    played.backend.start("s", request())
    played.runtime.fire_all()
    assert played.sink.has_ended("s")
    assert (set(played.times()), len(played.sink.batches)) == ({0}, 4)  # 100 steps, 32 at a time


def test_every_stream_is_played_from_its_own_beginning(tmp_path: Path) -> None:
    reads = mock_reads(CHAT)
    played = Played(record(tmp_path / "r", CHAT, reads))
    played.backend.start("s", request())
    played.runtime.clock += 33 * MS
    played.backend.start("t", request("something else"))
    played.runtime.fire_all()
    assert played.sink.said["t"] == played.sink.said["s"]
    assert [now - 33 * MS for now in played.times("t")] == played.times("s")


# ---- readers


def test_a_blocked_stream_rests_and_catches_up(tmp_path: Path) -> None:
    reads = mock_reads(CHAT)
    played = Played(record(tmp_path / "r", CHAT, reads))
    job = played.backend.start("s", request())
    for _ in range(3):
        played.runtime.fire()
    job.set_blocked(True)
    played.runtime.fire_all()
    assert len(played.sink.batches) == 3
    played.runtime.clock = played.begin + reads[6][0]
    job.set_blocked(False)
    job.set_blocked(False)
    assert len(played.runtime.pending) == 1
    played.runtime.fire_all()
    assert played.times() == [t_ns for t_ns, _ in (*reads[:3], *reads[6:])]
    assert played.sink.said["s"] == decoded(CHAT, b"".join(data for _, data in reads))


def test_a_stream_that_was_blocked_for_a_moment_only_has_one_timer(tmp_path: Path) -> None:
    played = Played(record(tmp_path / "r", CHAT, mock_reads(CHAT)))
    job = played.backend.start("s", request())
    job.set_blocked(True)
    job.set_blocked(False)
    assert len(played.runtime.pending) == 1


def test_a_cancelled_stream_says_nothing_more(tmp_path: Path) -> None:
    played = Played(record(tmp_path / "r", CHAT, mock_reads(CHAT)))
    job = played.backend.start("s", request())
    played.runtime.fire()
    job.cancel()
    job.set_blocked(False)
    played.runtime.fire_all()
    assert (len(played.sink.batches), played.runtime.pending) == (1, [])


def test_a_late_timer_says_all_that_is_due_in_one_batch(tmp_path: Path) -> None:
    reads = mock_reads(CHAT)
    played = Played(record(tmp_path / "r", CHAT, reads))
    played.backend.start("s", request())
    played.runtime.fire(late=reads[4][0] - reads[0][0])
    assert len(played.sink.batches) == 1
    assert len(played.sink.said["s"]) == len(decoded(CHAT, b"".join(data for _, data in reads[:5]))) - 1


# ---- what was recorded, and what is asked for


def test_choices_that_were_not_asked_for_are_left_out(tmp_path: Path) -> None:
    played = Played(record(tmp_path / "r", CHAT, mock_reads(CHAT, n=3)))
    for n in (1, 2, 3, 4):
        played.backend.start(str(n), request(n=n))
    played.runtime.fire_all()
    for n in (1, 2, 3, 4):
        result = fold(heard(played.sink.said[str(n)], n))
        assert [bool(choice.text) for choice in result.choices] == [True, True, True, False][:n]
        assert result.terminal == StreamEnd()


def test_a_recorded_failure_is_replayed_as_the_failure_it_was(tmp_path: Path) -> None:
    reads = mock_reads(CHAT)[:4]
    error = b'data: {"error":{"message":"full","code":503}}\n\n'
    for extra, failure, last in (
        ([], "reset", StreamTruncated("reset", sum(len(data) for _, data in reads))),
        ([(10**9, error)], None, "full"),
    ):
        played = Played(record(tmp_path / "r", CHAT, [*reads, *extra], failure=failure))
        played.backend.start("s", request())
        played.runtime.fire_all()
        terminal = played.sink.events("s")[-1]
        assert (terminal.message if isinstance(terminal, StreamError) else terminal) == last


def test_comments_take_no_step_and_the_model_is_the_recorded_one(tmp_path: Path) -> None:
    reads = [(1, sse.comment("ka")), *((t_ns + 2, data) for t_ns, data in mock_reads(CHAT))]
    path = record(tmp_path / "r", CHAT, reads)
    assert len(read_steps(path)) == len(reads) - 1
    assert [card.name for card in ReplayBackend(path).models] == ["mock"]
    assert [card.name for card in ReplayBackend(path, model="other").models] == ["other"]
    assert [card.name for card in ReplayBackend(record(tmp_path / "e", CHAT, [])).models] == ["replay"]


@pytest.mark.parametrize("speed", [-1.0, 1e-9, float("nan"), float("inf")])
def test_a_speed_that_is_none_is_refused(speed: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speed"):
        ReplayBackend(record(tmp_path / "r", CHAT, mock_reads(CHAT)), speed=speed)


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    with pytest.raises(FileNotFoundError):
        ReplayBackend(path)
    path.write_bytes(b'{"tokenwire_recording":1,"dialect":"klingon"}\n')
    with pytest.raises(RecordingError, match="line 1: the dialect 'klingon' is none of openai_chat, plain"):
        ReplayBackend(path)
    monkeypatch.setattr("tokenwire.backends.replay.MAX_RECORDING_BYTES", 10)
    with pytest.raises(LimitExceeded):
        ReplayBackend(path)
    assert recording.MAX_RECORDING_BYTES > 10


def test_it_runs_on_the_simulations_clock_too(tmp_path: Path) -> None:
    reads = mock_reads(CHAT)
    clock, sink = VirtualClock(), RecordingSink()
    backend = ReplayBackend(record(tmp_path / "r", CHAT, reads))
    backend.attach(SimulatedRuntime(clock), sink)
    backend.start("s", request())
    clock.run_until_idle(max_calls=1000)
    assert [now for now, _ in sink.batches] == [t_ns for t_ns, _ in reads]


# ---- real loops


@pytest.mark.anyio
async def test_it_plays_on_every_loop(tmp_path: Path) -> None:
    reads = mock_reads(CHAT)
    loop, sink = running_loop(), RecordingSink()
    backend = ReplayBackend(record(tmp_path / "r", CHAT, reads), speed=20.0)
    backend.attach(LoopRuntime(loop.loop, loop.timers, loop.now), sink)
    for stream in ("s", "t"):
        backend.start(stream, request())
    await sink.until(lambda: sink.has_ended("s", "t"))
    expected: list[Item] = list(decoded(CHAT, b"".join(data for _, data in reads)))
    assert sink.said == {"s": expected, "t": expected}
    assert any(isinstance(item, TextDelta) for item in expected)
