"""Many deadlines on one timer: order, arming, and what happens while they run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.adapters.timers import Deadline, Timers


class OneTimer:
    """A loop's one timer, which the test fires.

    Attributes:
        armed: every deadline that it was set to.
        timers: what is tested.
        called: names of the callbacks that were called.
    """

    def __init__(self) -> None:
        self.armed: list[int] = []
        self.called: list[str] = []
        self.timers = Timers(self.armed.append)

    def at(self, deadline: int, name: str, then: Callable[[], object] = lambda: None) -> None:
        def call() -> None:
            self.called.append(name)
            then()

        self.timers.call_at(deadline, call)


def test_what_is_due_is_called_in_order() -> None:
    one = OneTimer()
    for deadline, name in ((30, "c"), (10, "a"), (30, "d"), (20, "b"), (40, "e")):
        one.at(deadline, name)
    one.timers.run(30)
    assert one.called == ["a", "b", "c", "d"]
    one.timers.run(40)
    assert one.called == ["a", "b", "c", "d", "e"]


def test_a_deadline_is_due_at_its_time_and_not_before() -> None:
    one = OneTimer()
    one.at(10, "a")
    one.timers.run(9)
    assert one.called == []
    one.timers.run(10)
    assert one.called == ["a"]
    one.timers.run(11)
    assert one.called == ["a"]


def test_it_is_armed_for_the_earliest_only() -> None:
    one = OneTimer()
    for deadline in (50, 60, 50, 20, 30):
        one.at(deadline, "x")
    assert one.armed == [50, 20]
    one.timers.run(20)
    assert one.armed == [50, 20, 30]


def test_nothing_is_armed_where_nothing_waits() -> None:
    one = OneTimer()
    one.timers.run(100)
    one.at(10, "a")
    one.timers.run(10)
    assert one.armed == [10]


def test_a_run_that_comes_early_arms_again() -> None:
    one = OneTimer()
    one.at(10, "a")
    one.timers.run(9)
    assert one.armed == [10, 10]


def test_what_is_set_for_now_comes_in_the_next_run() -> None:
    one = OneTimer()
    one.at(10, "a", lambda: one.at(10, "again"))
    one.at(10, "b")
    one.timers.run(10)
    assert one.called == ["a", "b"]
    assert one.armed[-1] == 10
    one.timers.run(10)
    assert one.called == ["a", "b", "again"]


def test_a_callback_that_raises_keeps_no_other_from_its_turn() -> None:
    def fail() -> None:
        raise ValueError("oh")

    one = OneTimer()
    one.at(10, "a")
    one.at(10, "fails", fail)
    one.at(10, "b")
    one.at(20, "c")
    with pytest.raises(ValueError, match="oh"):
        one.timers.run(10)
    assert one.called == ["a", "fails"]
    assert one.armed[-1] == 10
    one.timers.run(20)
    assert one.called == ["a", "fails", "b", "c"]


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40))
def test_each_is_called_once_at_the_first_run_at_or_after_its_deadline(steps: list[tuple[int, bool]]) -> None:
    """Against a plain list. The timer itself is never later than what is due."""
    one = OneTimer()
    numbers = itertools.count()
    waiting: list[tuple[int, int]] = []
    now = 0
    for value, sets in steps:
        if sets:
            number = next(numbers)
            one.at(now + value, str(number))
            waiting.append((now + value, number))
        else:
            now += value
            one.called.clear()
            one.timers.run(now)
            assert one.called == [str(number) for deadline, number in sorted(waiting) if deadline <= now]
            waiting = [entry for entry in waiting if entry[0] > now]
        if waiting:
            assert one.armed[-1] <= min(waiting)[0]


def test_what_was_taken_back_is_not_called_and_lets_go_of_its_callback() -> None:
    calls: list[str] = []
    timers = Timers(lambda _: None)
    alarms = [timers.call_at(5, partial(calls.append, name)) for name in "ab"]
    alarms[0].cancel()
    alarms[0].cancel()
    assert [alarm.pending for alarm in alarms] == [False, True]
    timers.run(5)
    alarms[1].cancel()
    assert calls == ["b"]
    assert not alarms[1].pending


def test_a_heap_of_which_most_was_taken_back_shrinks() -> None:
    calls: list[int] = []
    timers = Timers(lambda _: None)
    alarms = [timers.call_at(number, partial(calls.append, number)) for number in range(1000)]
    for alarm in alarms[:990]:
        alarm.cancel()
    assert len(timers) < 100
    timers.run(1000)
    assert calls == list(range(990, 1000))
    assert len(timers) == 0


def test_a_deadline_that_moves_is_called_at_the_earliest_that_was_expected() -> None:
    calls: list[str] = []
    timers = Timers(lambda _: None)
    deadline = Deadline(timers.call_at, partial(calls.append, "came"))
    for due in (50, 30, None, 40):
        deadline.expect(due, 0)
    timers.run(29)
    assert calls == []
    timers.run(60)
    assert calls == ["came"]
    deadline.expect(70, 60)
    timers.run(70)
    assert calls == ["came", "came"]


def test_a_deadline_that_was_given_up_is_not_called() -> None:
    calls: list[str] = []
    timers = Timers(lambda _: None)
    deadline = Deadline(timers.call_at, partial(calls.append, "came"))
    deadline.expect(50, 0)
    deadline.cancel()
    deadline.expect(60, 0)
    timers.run(100)
    assert calls == []
