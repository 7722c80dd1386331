"""Many deadlines on one timer of the loop.

There is one heap for a server: peers' deadlines, heartbeats and an engine's steps. A deadline is never taken out; whoever
set it looks for itself whether it still means anything when it comes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

__all__ = ["Timers"]

_Entry = tuple[int, int, Callable[[], None]]
"""Deadline, number and callback: those of one deadline are called in the order in which they came."""


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
        self._heap: list[_Entry] = []
        self._count = 0

    def call_at(self, deadline: int, callback: Callable[[], None]) -> None:
        """Run a callback once the clock is at or past the deadline."""
        self._count += 1
        heapq.heappush(self._heap, (deadline, self._count, callback))
        self._arm_next()

    def run(self, now: int) -> None:
        """Run what is due, earliest first, and set the timer to what comes next."""
        self._armed = None
        due: deque[_Entry] = deque()
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        try:
            while due:
                due.popleft()[2]()
        finally:
            for entry in due:  # one has raised: the others' turn comes
                heapq.heappush(self._heap, entry)
            self._arm_next()

    def _arm_next(self) -> None:
        if self._heap and (self._armed is None or self._heap[0][0] < self._armed):
            self._armed = self._heap[0][0]
            self._arm(self._armed)
