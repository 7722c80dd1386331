"""The WebSocket benchmark compares like with like, and says when a target is missed."""

from __future__ import annotations

from frames import MAX_IDLE_BYTES, OWN, TARGETS, check_contenders, failed_targets, idle_bytes


def test_contenders_do_the_same_work() -> None:
    check_contenders()
    assert {work for work, _ in TARGETS} == {"send", "receive"}


def test_a_missed_target_is_told() -> None:
    good = {("send", OWN): 1.0, ("receive", OWN): 1.0, **TARGETS}
    assert failed_targets(good, MAX_IDLE_BYTES) == []
    assert failed_targets(good, MAX_IDLE_BYTES + 1) == ["6145 bytes an idle connection, over 6144"]
    assert len(failed_targets(good | {("send", OWN): 1.1}, 0)) == 2
    assert len(failed_targets(good | {("receive", OWN): 1.1}, 0)) == 1


def test_an_idle_connection_keeps_the_promise() -> None:
    assert 100 < idle_bytes(50) <= MAX_IDLE_BYTES
