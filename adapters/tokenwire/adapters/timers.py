"""Many deadlines on one timer of the loop.

There is one heap for a server: peers' deadlines, heartbeats and an engine's steps. A deadline is never taken out; whoever
set it looks for itself whether it still means anything when it comes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

__all__ = ["Timers"]


class Timers:
    """A heap of callbacks.

    Args:
        arm: sets the loop's only timer to a deadline in monotonic nanoseconds, moving it where it is set already; when
            it fires, the loop calls `run`.
    """

    __slots__ = ("_arm", "_armed", "_count", "_heap")

    def __init__(self, arm: Callable[[int], None]) -> None:
        self._arm = arm
        self._armed: int | None = None
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    def call_at(self, deadline: int, callback: Callable[[], None]) -> None:
        """Run a callback once the clock is at or past the deadline."""
        self._count += 1
        heapq.heappush(self._heap, (deadline, self._count, callback))
        self._arm_next()

    def run(self, now: int) -> None:
        """Run what is due, earliest first, and set the timer to what comes next."""
        self._armed = None
        due: list[Callable[[], None]] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        try:
            for callback in due:
                callback()
        finally:
            self._arm_next()

    def _arm_next(self) -> None:
        if self._heap and (self._armed is None or self._heap[0][0] < self._armed):
            self._armed = self._heap[0][0]
            self._arm(self._armed)
