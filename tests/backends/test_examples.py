"""The shipped examples of backends do what they say."""

from __future__ import annotations

from tests.backends.fakes import FakeRuntime, RecordingSink, request

from tokenwire.backends.generators import load


def test_the_batch_engine_counts_down_for_everybody_in_one_batch_a_step() -> None:
    engine = load("examples.engine:Countdown")
    runtime, sink = FakeRuntime(), RecordingSink()
    engine.attach(runtime, sink)
    jobs = [engine.start(stream, request()) for stream in ("a", "b", "gone")]
    jobs[-1].cancel()
    runtime.fire_all()
    assert len(sink.batches) == 10
    assert [sink.text(stream) for stream in "ab"] == ["10 9 8 7 6 5 4 3 2 1 "] * 2
    assert not sink.has_ended("gone")
    assert runtime.pending == []
