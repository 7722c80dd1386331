"""trio as the pump needs a loop: readiness, one timer, wake-ups, tasks.

trio tells readiness to tasks, so each watched socket has one, which lives as long as the watch; a token costs none.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import trio
from anyio.abc import TaskGroup

__all__ = ["TrioReadiness", "readiness"]

_Wait = Callable[[socket.socket], Awaitable[None]]


class TrioReadiness:
    """The running trio loop as a `tokenwire.adapters.pump.Readiness`.

    Args:
        start_soon: starts a task that is cancelled at the server's end.
    """

    def __init__(self, start_soon: Callable[..., object]) -> None:
        self._start_soon = start_soon
        self._token = trio.lowlevel.current_trio_token()
        # A watch is known by the very callback that it was given, so that a task whose watch was replaced sees it.
        self._readers: dict[socket.socket, Callable[[], None]] = {}
        self._writers: dict[socket.socket, Callable[[], None]] = {}
        self._timer = trio.CancelScope()
        self._due: Callable[[], None] | None = None
        start_soon(self._keep_time)

    def add_reader(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be read."""
        self._readers[sock] = callback
        self._start_soon(_watch, sock, trio.lowlevel.wait_readable, callback, self._readers)

    def remove_reader(self, sock: socket.socket) -> None:
        """Stop watching for reading."""
        del self._readers[sock]

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be written."""
        self._writers[sock] = callback
        self._start_soon(_watch, sock, trio.lowlevel.wait_writable, callback, self._writers)

    def remove_writer(self, sock: socket.socket) -> None:
        """Stop watching for writing."""
        del self._writers[sock]

    def close(self, sock: socket.socket) -> None:
        """Stop watching the socket, and close it."""
        self._readers.pop(sock, None)
        self._writers.pop(sock, None)
        trio.lowlevel.notify_closing(sock)
        sock.close()

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

    async def _keep_time(self) -> None:
        while True:
            with self._timer:
                await trio.sleep_forever()
            self._timer = trio.CancelScope(deadline=math.inf)
            if self._due is not None:
                self._due()


async def _watch(
    sock: socket.socket, wait: _Wait, callback: Callable[[], None], watches: dict[socket.socket, Callable[[], None]]
) -> None:
    with contextlib.suppress(trio.ClosedResourceError):  # the socket was closed while this task waited
        while watches.get(sock) is callback:
            await wait(sock)
            callback()


def readiness(tasks: TaskGroup) -> TrioReadiness:
    """Make the running loop's readiness, its tasks in the server's group."""
    return TrioReadiness(tasks.start_soon)
