"""Who may run now, who waits, who is turned away: a count and a queue, first come first served."""

from __future__ import annotations

from enum import Enum

from .line import Line

__all__ = ["Admission", "Place"]


class Place(Enum):
    """What a stream got."""

    RUNNING = "running"
    WAITING = "waiting"
    FULL = "full"


class Admission:
    """Counts running streams and keeps those that wait.

    Args:
        max_running: streams that run at once.
        max_waiting: streams that wait; 0 for no queue.
    """

    __slots__ = ("_max_running", "_max_waiting", "_waiting", "running")

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._waiting: dict[Line, None] = {}
        self.running = 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the next stream would be turned away."""
        return self.running >= self._max_running and len(self._waiting) >= self._max_waiting

    def enter(self, line: Line) -> Place:
        """Give a stream its place. With FULL it has none and does not `leave`."""
        if self.running < self._max_running:
            self.running += 1
            return Place.RUNNING
        if len(self._waiting) >= self._max_waiting:
            return Place.FULL
        self._waiting[line] = None
        return Place.WAITING

    def leave(self, line: Line) -> Line | None:
        """Take a stream out; return the one that runs in its place, or None.

        Called once for each line that got a place other than FULL.
        """
        if line in self._waiting:
            del self._waiting[line]
            return None
        if not self._waiting:
            self.running -= 1
            return None
        successor = next(iter(self._waiting))
        del self._waiting[successor]
        return successor
