"""trio as the pump needs a loop: readiness, one timer, wake-ups, tasks.

trio tells readiness to tasks, and a task a socket would cost some 4 KiB each. So all sockets are in one selector of our
own, and one task waits for the selector, which is readable itself when one of them is ready (epoll and kqueue nest).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import trio
from anyio.abc import TaskGroup

from .selector import SelectorWatch

__all__ = ["TrioReadiness", "TrioWaiter", "readiness"]


class TrioWaiter:
    """What one task waits on until another wakes it; a `tokenwire.adapters.runtime.Waiter`."""

    __slots__ = ("_done", "_task")

    def __init__(self) -> None:
        self._done = False
        self._task: trio.lowlevel.Task | None = None

    def done(self) -> bool:
        """Whether it was woken or cancelled."""
        return self._done

    def set_result(self, result: None, /) -> None:
        """Wake the task."""
        del result
        self._done = True
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        if not self._done:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._done = True
        return trio.lowlevel.Abort.SUCCEEDED


class TrioReadiness(SelectorWatch):
    """The running trio loop as a `tokenwire.adapters.byte_path.Readiness`.

    Args:
        start_soon: starts a task that is cancelled at the server's end.
    """

    def __init__(self, start_soon: Callable[..., object]) -> None:
        super().__init__()
        self._start_soon = start_soon
        self._token = trio.lowlevel.current_trio_token()
        self._timer = trio.CancelScope()
        self._due: Callable[[], None] | None = None
        start_soon(self._keep_watch)
        start_soon(self._keep_time)

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        """Set the one timer."""
        self._due = callback
        self._timer.deadline = trio.current_time() + (deadline - time.monotonic_ns()) / 1e9

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the loop's next turn; from any thread."""
        with contextlib.suppress(trio.RunFinishedError):  # nobody is left to call
            self._token.run_sync_soon(callback)

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an async function."""
        self._start_soon(main)

    def new_waiter(self) -> TrioWaiter:
        """Make what a task can wait on, once."""
        return TrioWaiter()

    async def _keep_watch(self) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(self.fileno())
                self.call_ready(0)
        finally:
            self.end()

    async def _keep_time(self) -> None:
        while True:
            with self._timer:
                await trio.sleep_forever()
            self._timer = trio.CancelScope(deadline=math.inf)
            if self._due is not None:
                self._due()


def readiness(tasks: TaskGroup) -> TrioReadiness:
    """Make the running loop's readiness, its tasks in the server's group.

    The group does not end by itself: cancel it once the server has ended.
    """
    return TrioReadiness(tasks.start_soon)
