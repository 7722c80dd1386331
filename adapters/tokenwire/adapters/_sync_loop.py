"""The smallest loop there is: sockets, one timer and wake-ups, turned by whoever waits. The sync client stands on it."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from .selector import SelectorWatch
from .timers import Timers

__all__ = ["SyncLoop"]


class SyncLoop(SelectorWatch):
    """A `tokenwire.adapters.byte_path.Readiness` in the caller's own thread.

    Attributes:
        timers: its deadlines.
    """

    def __init__(self) -> None:
        super().__init__()
        self.timers = Timers(self._arm)
        self._deadline: int | None = None
        self._on_timer: Callable[[], None] = self._run_timers
        self._woken: deque[Callable[[], None]] = deque()
        self._thread = threading.get_ident()
        # A thread that looks a name up wakes the selector; the lock keeps it from a pipe that is being closed.
        self._lock = threading.Lock()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self.add_reader(self._ear, self._hear)

    @staticmethod
    def now() -> int:
        """Read the monotonic clock, in nanoseconds."""
        return time.monotonic_ns()

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        """Set the one timer."""
        self._deadline, self._on_timer = deadline, callback

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the next turn; from any thread."""
        with self._lock:
            if self._ended:
                return
            self._woken.append(callback)
            if threading.get_ident() != self._thread:
                try:
                    self._bell.send(b"\0")
                except BlockingIOError:
                    pass  # it rings already

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """There are no tasks here."""
        raise NotImplementedError(f"a loop without tasks cannot run {main}")

    def turn(self) -> None:
        """Wait for whatever comes first, and call back for it."""
        self.call_ready(self._patience())
        for _ in range(len(self._woken)):
            self._woken.popleft()()
        if self._deadline is not None and self._deadline <= self.now():
            self._deadline = None
            self._on_timer()

    def end(self) -> None:
        """Close the loop; what another thread wakes from now on is not called. Idempotent."""
        with self._lock:
            if self._ended:
                return
            super().end()
        self.close(self._ear)
        self._bell.close()

    def _patience(self) -> float | None:
        if self._woken:
            return 0
        return None if self._deadline is None else max(0, self._deadline - self.now()) / 1e9

    def _arm(self, deadline: int) -> None:
        self.set_timer(deadline, self._run_timers)

    def _run_timers(self) -> None:
        self.timers.run(self.now())

    def _hear(self) -> None:
        self._ear.recv(4096)
