"""A bounded pool of daemon threads for work that may never end.

`concurrent.futures` joins its threads when the interpreter ends, so one generator that blocks for ever would keep the
server from ending. A daemon thread is left behind instead.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["ThreadPool", "Work"]

Work = Callable[[], None]
"""Something to do in a thread. It must not raise."""


class ThreadPool:
    """Runs work in at most `max_threads` threads, first come first served.

    Threads are started when they are needed and stay until the pool is closed.

    Args:
        name: the beginning of the threads' names.
        max_threads: the most threads at a time.
        max_waiting: the most work that may wait for a thread.
    """

    __slots__ = ("_busy", "_changed", "_closed", "_max_threads", "_max_waiting", "_name", "_waiting", "threads")

    def __init__(self, name: str, *, max_threads: int, max_waiting: int) -> None:
        self._name = name
        self._max_threads = max_threads
        self._max_waiting = max_waiting
        self._changed = threading.Condition(threading.Lock())
        self._waiting: OrderedDict[Work, None] = OrderedDict()
        self._busy = 0
        self._closed = False
        self.threads: list[threading.Thread] = []

    def submit(self, work: Work) -> bool:
        """Have work done by the next free thread.

        Returns:
            Whether it was taken; False where every thread is busy and the waiting room is full, or after `close`.
        """
        with self._changed:
            if self._closed or not self._has_room():
                return False
            self._waiting[work] = None
            if self._idle() < len(self._waiting) and len(self.threads) < self._max_threads:
                self._start_thread()
            self._changed.notify()
        return True

    def withdraw(self, work: Work) -> None:
        """Take work back that still waits; what has begun goes on."""
        with self._changed:
            self._waiting.pop(work, None)

    def close(self) -> None:
        """Drop what waits and let idle threads end. A thread that is at work ends when its work does."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _idle(self) -> int:
        return len(self.threads) - self._busy

    def _has_room(self) -> bool:
        return len(self._waiting) < self._max_waiting + self._max_threads - self._busy

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._serve, name=f"{self._name}-{len(self.threads)}", daemon=True)
        self.threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Wait for work and do it; False once the pool is closed. Returning lets go of what the work held."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return False
            work, _ = self._waiting.popitem(last=False)
            self._busy += 1
        work()
        with self._changed:
            self._busy -= 1
        return True
