"""How late the event loop calls: looked at once a second, as long as there are streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tokenwire.core.latency import Accountant
from tokenwire.core.ledger import counted

__all__ = ["watch_loop"]

_PERIOD_NS: Final = 1_000_000_000
"""A server without streams is not woken at all."""


def watch_loop(
    accountant: Accountant, call_at: Callable[[int, Callable[[], None]], object], now: Callable[[], int]
) -> None:
    """Count the loop's lag for an accountant, from its first stream on.

    Args:
        accountant: whose `loop_lag` is counted; its `on_busy` is set.
        call_at: calls back once the clock is at or past a deadline.
        now: the monotonic clock, in nanoseconds.
    """
    due: int | None = None

    def set_out() -> None:
        nonlocal due
        if due is None:
            due = now() + _PERIOD_NS
            call_at(due, look)

    def look() -> None:
        nonlocal due
        if due is not None:
            accountant.loop_lag.record(counted(now() - due))
        due = None
        if accountant.streams_active:
            set_out()

    accountant.on_busy = set_out
