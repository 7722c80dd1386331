"""The hand-over from threads: everything arrives, in order, with one wake-up a batch."""

from __future__ import annotations

import threading

from tests.backends.fakes import FakeRuntime, RecordingSink

from tokenwire.backends.mailbox import Mailbox
from tokenwire.core.contracts import Batch


def test_puts_before_the_drain_are_one_batch_and_one_wake_up() -> None:
    runtime, sink = FakeRuntime(), RecordingSink()
    mailbox = Mailbox(runtime, sink)
    mailbox.put("a", ["1"])
    mailbox.put("b", ["x"])
    mailbox.put("a", ["2", "3"])
    assert sink.batches == []
    assert runtime.run_woken() == 1
    assert sink.batches == [(runtime.clock, [("a", ["1", "2", "3"]), ("b", ["x"])])]
    assert runtime.wakes == 1


def test_the_next_batch_wakes_again() -> None:
    runtime, sink = FakeRuntime(), RecordingSink()
    mailbox = Mailbox(runtime, sink)
    mailbox.put("a", ["1"])
    runtime.run_woken()
    assert runtime.run_woken() == 0
    runtime.clock = 5
    mailbox.put("a", ["2"])
    runtime.run_woken()
    assert runtime.wakes == 2
    assert sink.batches[1] == (5, [("a", ["2"])])


def test_nothing_put_wakes_nobody() -> None:
    runtime, sink = FakeRuntime(), RecordingSink()
    Mailbox(runtime, sink).put("a", [])
    assert runtime.wakes == 0


def test_a_put_from_within_the_delivery_makes_a_new_batch() -> None:
    runtime = FakeRuntime()

    class Answering(RecordingSink):
        def deliver(self, batch: Batch, now: int) -> None:
            super().deliver(batch, now)
            if len(self.batches) == 1:
                mailbox.put("a", ["again"])

    sink = Answering()
    mailbox = Mailbox(runtime, sink)
    mailbox.put("a", ["1"])
    runtime.run_woken()
    runtime.run_woken()
    assert sink.said == {"a": ["1", "again"]}
    assert runtime.wakes == 2


def test_threads_cross_with_one_wake_up_and_in_order() -> None:
    runtime, sink = FakeRuntime(), RecordingSink()
    mailbox = Mailbox(runtime, sink)

    def produce(stream: int) -> None:
        for number in range(200):
            mailbox.put(stream, [f"{number}"])

    threads = [threading.Thread(target=produce, args=(stream,)) for stream in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runtime.run_woken()
    assert runtime.wakes == 1
    assert len(sink.batches) == 1
    assert sink.said == {stream: [f"{number}" for number in range(200)] for stream in range(8)}


def test_no_item_is_lost_while_the_loop_drains() -> None:
    runtime, sink = FakeRuntime(), RecordingSink()
    mailbox = Mailbox(runtime, sink)
    expected = [f"{number}" for number in range(5_000)]

    def produce() -> None:
        for item in expected:
            mailbox.put("a", [item])

    thread = threading.Thread(target=produce)
    thread.start()
    runtime.run_until(lambda: len(sink.said.get("a", ())) == len(expected))
    thread.join()
    assert sink.said["a"] == expected
    assert runtime.wakes == len(sink.batches)


def test_a_step_handed_over_as_one_batch_wakes_the_loop_once() -> None:
    runtime, sink = FakeRuntime(), RecordingSink()
    mailbox = Mailbox(runtime, sink)
    mailbox.put_batch([("a", ["1"]), ("b", []), ("c", ["2", "3"])])
    mailbox.put_batch([])
    assert runtime.run_woken() == 1
    assert sink.batches == [(runtime.clock, [("a", ["1"]), ("c", ["2", "3"])])]
    assert runtime.wakes == 1
