"""Many deadlines on one timer of the loop.

There is one heap for a server: peers' deadlines, heartbeats and an engine's steps. A deadline does not move; whoever set it
looks for itself whether it still means anything when it comes. It can be taken back, so that a peer who has gone is not
held for the minute that a deadline may be away.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["Alarm", "Deadline", "Timers"]

_SWEEP_FROM: Final = 64
"""Entries from which on a heap is looked through when half of them were taken back."""


class Alarm:
    """One deadline that was set."""

    __slots__ = ("_callback", "_timers")

    def __init__(self, callback: Callable[[], None], timers: Timers) -> None:
        self._callback: Callable[[], None] | None = callback
        self._timers = timers

    @property
    def pending(self) -> bool:
        """Whether the callback is still to be called."""
        return self._callback is not None

    def fire(self) -> None:
        """Call back, unless that was taken back."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def cancel(self) -> None:
        """Take it back, and let go of the callback. Idempotent; nothing once it was called."""
        if self._callback is not None:
            self._callback = None
            self._timers.sweep()


_Entry = tuple[int, int, Alarm]
"""Deadline, number and alarm: those of one deadline are called in the order in which they came."""


class Timers:
    """A heap of callbacks.

    Args:
        arm: sets the loop's only timer to a deadline in monotonic nanoseconds, moving it where it is set already; when
            it fires, the loop calls `run`.
    """

    __slots__ = ("_arm", "_armed", "_cancelled", "_count", "_heap")

    def __init__(self, arm: Callable[[int], None]) -> None:
        self._arm = arm
        self._armed: int | None = None
        self._heap: list[_Entry] = []
        self._count = 0
        self._cancelled = 0

    def __len__(self) -> int:
        """How many deadlines are held, some that were taken back included."""
        return len(self._heap)

    def call_at(self, deadline: int, callback: Callable[[], None]) -> Alarm:
        """Run a callback once the clock is at or past the deadline."""
        self._count += 1
        alarm = Alarm(callback, self)
        heapq.heappush(self._heap, (deadline, self._count, alarm))
        self._arm_next()
        return alarm

    def sweep(self) -> None:
        """Count an alarm that was taken back; drop all of them once they are half of what is held."""
        self._cancelled += 1
        if len(self._heap) >= _SWEEP_FROM and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].pending]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def run(self, now: int) -> None:
        """Run what is due, earliest first, and set the timer to what comes next."""
        self._armed = None
        due: deque[_Entry] = deque()
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        try:
            while due:
                due.popleft()[2].fire()
        finally:
            for entry in due:  # one has raised: the others' turn comes
                heapq.heappush(self._heap, entry)
            self._arm_next()

    def _arm_next(self) -> None:
        if self._heap and (self._armed is None or self._heap[0][0] < self._armed):
            self._armed = self._heap[0][0]
            self._arm(self._armed)


class Deadline:
    """The next deadline of one peer, which may move: its alarm is set again only where it comes earlier.

    Args:
        call_at: sets an alarm.
        callback: called when the deadline that was expected has come; it may have moved later meanwhile, unseen.
    """

    __slots__ = ("_alarm", "_call_at", "_callback", "_due")

    def __init__(self, call_at: Callable[[int, Callable[[], None]], Alarm], callback: Callable[[], None]) -> None:
        self._call_at = call_at
        self._callback: Callable[[], None] | None = callback
        self._alarm: Alarm | None = None
        self._due: int | None = None

    def expect(self, deadline: int | None, now: int) -> None:
        """Have a deadline called, where it is earlier than the one that will be called anyway; None for none."""
        if deadline is None or self._callback is None or (self._due is not None and self._due <= deadline):
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._due = deadline
        self._alarm = self._call_at(max(deadline, now), self._come)

    def cancel(self) -> None:
        """Expect nothing any more, and let go of the callback. Idempotent."""
        self._callback = None
        if self._alarm is not None:
            self._alarm.cancel()

    def _come(self) -> None:
        self._due = None
        if self._callback is not None:
            self._callback()
