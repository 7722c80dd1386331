"""A clock that jumps: time passes only when nothing is left to do before it, and never by itself.

Everything that a simulation does is a callback at a moment. Callbacks of one moment run in the order in which they were
asked for, so that a run depends on nothing but what was drawn.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

__all__ = ["VirtualClock"]


class VirtualClock:
    """Virtual nanoseconds, and callbacks that wait for them.

    It has the methods of a backend's runtime that concern time, so a backend that is attached to it cannot tell.

    Args:
        start: what the clock shows first.
    """

    __slots__ = ("_count", "_heap", "_now")

    def __init__(self, start: int = 0) -> None:
        self._now = start
        self._count = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []

    def __len__(self) -> int:
        """How many callbacks wait."""
        return len(self._heap)

    def now(self) -> int:
        """Read the clock, in nanoseconds."""
        return self._now

    def call_at(self, deadline: int, callback: Callable[[], None]) -> None:
        """Run a callback when the clock shows `deadline`; a moment that has passed means as soon as possible."""
        self._count += 1
        heapq.heappush(self._heap, (max(deadline, self._now), self._count, callback))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run a callback at the present moment, after those that wait for it already."""
        self.call_at(self._now, callback)

    def next_deadline(self) -> int | None:
        """Say when the earliest callback is due; None where none waits."""
        return self._heap[0][0] if self._heap else None

    def advance(self, until: int, *, max_calls: int | None = None) -> int:
        """Run every callback that is due up to and at a moment, then show that moment.

        An exception of a callback ends it there: the clock shows the callback's moment, and later ones still wait.

        Args:
            until: where to stop; a moment that has passed runs what is due now.
            max_calls: the most callbacks to run, for what may never come to rest.

        Returns:
            How many callbacks ran. As many as `max_calls` means that the clock may not have got to `until`.
        """
        calls = 0
        while self._heap and self._heap[0][0] <= max(until, self._now):
            if calls == max_calls:
                return calls
            self._step()
            calls += 1
        self._now = max(until, self._now)
        return calls

    def run_until_idle(self, *, max_calls: int | None = None) -> int:
        """Run callbacks until none waits.

        Args:
            max_calls: the most callbacks to run, for what may never come to rest.

        Returns:
            How many callbacks ran; callbacks still wait only where that is `max_calls`.
        """
        calls = 0
        while self._heap and calls != max_calls:
            self._step()
            calls += 1
        return calls

    def _step(self) -> None:
        self._now, _, callback = heapq.heappop(self._heap)
        callback()
