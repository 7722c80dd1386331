"""The virtual clock: order, jumps, and what comes up while it runs."""

from __future__ import annotations

from functools import partial

import pytest

from tokenwire.core.testing.clock import VirtualClock


def test_callbacks_run_by_time_and_then_in_the_order_in_which_they_were_asked_for() -> None:
    clock, ran = VirtualClock(), list[tuple[str, int]]()

    def run(name: str) -> None:
        ran.append((name, clock.now()))

    for name, deadline in (("c", 30), ("a", 10), ("b", 10), ("d", 30)):
        clock.call_at(deadline, partial(run, name))
    assert clock.run_until_idle() == 4
    assert ran == [("a", 10), ("b", 10), ("c", 30), ("d", 30)]
    assert len(clock) == 0
    assert clock.next_deadline() is None


def test_a_moment_that_has_passed_means_now() -> None:
    clock, ran = VirtualClock(100), list[int]()
    clock.call_at(5, lambda: ran.append(clock.now()))
    clock.call_soon(lambda: ran.append(-clock.now()))
    assert clock.next_deadline() == 100
    clock.run_until_idle()
    assert ran == [100, -100]


def test_advance_stops_at_the_moment_and_runs_what_comes_up_before_it() -> None:
    clock, ran = VirtualClock(), list[int]()

    def again() -> None:
        ran.append(clock.now())
        clock.call_at(clock.now() + 10, again)

    clock.call_at(10, again)
    assert clock.advance(35) == 3
    assert (ran, clock.now(), clock.next_deadline()) == ([10, 20, 30], 35, 40)
    assert clock.advance(20) == 0
    assert clock.now() == 35


def test_what_never_comes_to_rest_can_be_bounded() -> None:
    clock = VirtualClock()

    def again() -> None:
        clock.call_soon(again)

    clock.call_soon(again)
    assert clock.run_until_idle(max_calls=7) == 7
    assert clock.advance(100, max_calls=3) == 3
    assert (clock.now(), len(clock)) == (0, 1)


def test_an_exception_leaves_the_rest_waiting() -> None:
    clock, ran = VirtualClock(), list[int]()

    def fail() -> None:
        raise ValueError("drawn")

    clock.call_at(1, fail)
    clock.call_at(2, lambda: ran.append(2))
    with pytest.raises(ValueError, match="drawn"):
        clock.run_until_idle()
    assert clock.now() == 1
    clock.run_until_idle()
    assert ran == [2]
