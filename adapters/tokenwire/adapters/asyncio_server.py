"""asyncio, and uvloop under it, as the pump needs a loop: readiness, one timer, wake-ups, tasks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

__all__ = ["AsyncioReadiness", "readiness"]

_MILLISECOND: Final = 1_000_000


class AsyncioReadiness:
    """The running asyncio loop as a `tokenwire.adapters.byte_path.Readiness`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.repeats = type(self._loop).__module__.partition(".")[0] != "uvloop"
        # An attribute and not a method: the loop's own is called once a token where a task waits for each.
        self.new_waiter: Callable[[], asyncio.Future[None]] = self._loop.create_future
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def add_reader(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be read."""
        self._loop.add_reader(sock.fileno(), callback)

    def remove_reader(self, sock: socket.socket) -> None:
        """Stop watching for reading."""
        self._loop.remove_reader(sock.fileno())

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be written."""
        self._loop.add_writer(sock.fileno(), callback)

    def remove_writer(self, sock: socket.socket) -> None:
        """Stop watching for writing."""
        self._loop.remove_writer(sock.fileno())

    def close(self, sock: socket.socket) -> None:
        """Stop watching the socket, and close it."""
        self._loop.remove_reader(sock.fileno())
        self._loop.remove_writer(sock.fileno())
        sock.close()

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        """Set the one timer."""
        if self._timer is not None:
            self._timer.cancel()
        # Whole milliseconds, rounded up: libuv counts in them, and a timer that fires early must be set again.
        delay_ms = max(0, -(-(deadline - time.monotonic_ns()) // _MILLISECOND))
        self._timer = self._loop.call_later(delay_ms / 1000, callback)

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the loop's next turn; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to call
            self._loop.call_soon_threadsafe(callback)

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an async function; a task group cannot start one from a callback, which belongs to no task."""
        task = self._loop.create_task(main())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def own_tasks(self) -> None:
        """Cancel the timer, cancel and await what `start_task` has started, once this task itself is cancelled."""
        try:
            await anyio.sleep_forever()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                with anyio.CancelScope(shield=True):
                    await asyncio.wait(self._tasks)


def readiness(tasks: TaskGroup) -> AsyncioReadiness:
    """Make the running loop's readiness, its tasks ending with the server's group.

    The group does not end by itself: cancel it once the server has ended.
    """
    loop = AsyncioReadiness()
    tasks.start_soon(loop.own_tasks)
    return loop
