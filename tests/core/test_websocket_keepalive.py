"""Pings and deadlines on a clock that jumps: a silent peer is given up, one whose answer we have not read is not (T37)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokenwire.core.websocket import LATE_NS, Keepalive, Step

SECOND = 1_000_000_000


def keepalive(now: int = 0) -> Keepalive:
    return Keepalive(now, interval_ns=15 * SECOND, timeout_ns=20 * SECOND, close_timeout_ns=5 * SECOND)


def run_on_time(machine: Keepalive, until: int, late: int = 0) -> list[tuple[int, Step]]:
    """Call at each deadline; give the steps that ask for something, with their times."""
    steps: list[tuple[int, Step]] = []
    while (due := machine.next_deadline()) + late <= until:
        step = machine.handle_deadline(due + late)
        if step is not Step.WAIT:
            steps.append((due + late, step))
        if step is Step.GIVE_UP:
            break
    return steps


def test_nothing_happens_before_a_deadline() -> None:
    machine = keepalive(7)
    assert machine.next_deadline() == 7 + 15 * SECOND
    assert machine.handle_deadline(7 + 15 * SECOND - 1) is Step.WAIT
    assert machine.next_deadline() == 7 + 15 * SECOND


def test_a_dead_peer_is_pinged_once_and_given_up_a_second_after_its_timeout() -> None:
    steps = run_on_time(keepalive(), 100 * SECOND)
    assert steps == [(15 * SECOND, Step.PING), (36 * SECOND, Step.GIVE_UP)]


def test_a_peer_that_is_heard_is_pinged_an_interval_after_its_last_byte() -> None:
    machine = keepalive()
    machine.received(9 * SECOND)
    assert machine.next_deadline() == 15 * SECOND, "nothing is re-armed when bytes come"
    assert machine.handle_deadline(15 * SECOND) is Step.WAIT
    assert machine.next_deadline() == 24 * SECOND
    assert machine.handle_deadline(24 * SECOND) is Step.PING


def test_a_peer_that_answers_lives_for_ever() -> None:
    machine = keepalive()
    for round_number in range(50):
        assert machine.handle_deadline(machine.next_deadline()) is Step.PING, round_number
        machine.received(machine.next_deadline() - 1)
        assert machine.handle_deadline(machine.next_deadline()) is Step.WAIT


def test_an_answer_read_late_but_sent_in_time_does_not_kill_the_peer() -> None:
    """T37: the loop stands still from the ping until long after the deadline; the pong lies in the socket."""
    machine = keepalive()
    assert machine.handle_deadline(15 * SECOND) is Step.PING
    awake = 95 * SECOND
    assert machine.handle_deadline(awake) is Step.WAIT
    machine.received(awake + 1)
    assert machine.handle_deadline(machine.next_deadline()) is Step.PING, "alive, and silent again since then"


def test_a_loop_that_wakes_just_before_the_deadline_gets_time_to_read() -> None:
    """T37: told in time, but the loop has been awake for a moment only."""
    machine = keepalive()
    machine.handle_deadline(15 * SECOND)
    due = machine.next_deadline()
    assert machine.handle_deadline(due) is Step.WAIT
    assert machine.next_deadline() > due
    machine.received(due + 1)
    assert run_on_time(machine, due + 14 * SECOND) == []


def test_no_verdict_is_given_while_the_loop_lags() -> None:
    machine = keepalive()
    assert run_on_time(machine, 1000 * SECOND, late=LATE_NS + 1) == [(15 * SECOND + LATE_NS + 1, Step.PING)]
    assert run_on_time(machine, 2000 * SECOND)[-1][1] is Step.GIVE_UP


def test_a_loop_that_is_slow_as_usual_still_judges() -> None:
    steps = run_on_time(keepalive(), 100 * SECOND, late=LATE_NS)
    assert [step for _, step in steps] == [Step.PING, Step.GIVE_UP]


def test_the_end_of_a_connection_has_a_deadline_that_bytes_do_not_move() -> None:
    machine = keepalive()
    machine.begin_closing(10 * SECOND)
    machine.begin_closing(12 * SECOND)
    assert machine.next_deadline() == 15 * SECOND
    machine.received(11 * SECOND)
    assert run_on_time(machine, 100 * SECOND) == [(16 * SECOND, Step.GIVE_UP)]


def test_closing_waits_for_the_loop_too() -> None:
    machine = keepalive()
    machine.begin_closing(0)
    assert machine.handle_deadline(60 * SECOND) is Step.WAIT
    assert machine.next_deadline() == 65 * SECOND


@given(st.lists(st.tuples(st.integers(0, 2 * LATE_NS), st.booleans()), max_size=60))
def test_a_verdict_needs_three_calls_in_time_after_the_ping(calls: list[tuple[int, bool]]) -> None:
    machine = keepalive()
    in_time = 0
    for late, heard in calls:
        now = machine.next_deadline() + late
        if heard:
            machine.received(now - 1)
        step = machine.handle_deadline(now)
        if step is Step.GIVE_UP:
            assert in_time >= 2
            assert late <= LATE_NS
            assert not heard
            return
        in_time = in_time + 1 if step is Step.WAIT and late <= LATE_NS and not heard else 0
        assert machine.next_deadline() > now
