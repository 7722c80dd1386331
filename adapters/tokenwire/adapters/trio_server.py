"""trio as the pump needs a loop: readiness, one timer, wake-ups.

trio tells readiness to tasks, so each watched socket has one, which lives as long as the watch; a token costs none.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Awaitable, Callable

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
        self._watches: dict[tuple[socket.socket, _Wait], trio.CancelScope] = {}
        self._timer = trio.CancelScope()
        self._due: Callable[[], None] | None = None
        start_soon(self._keep_time)

    def add_reader(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be read."""
        self._add(sock, trio.lowlevel.wait_readable, callback)

    def remove_reader(self, sock: socket.socket) -> None:
        """Stop watching for reading."""
        self._remove(sock, trio.lowlevel.wait_readable)

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be written."""
        self._add(sock, trio.lowlevel.wait_writable, callback)

    def remove_writer(self, sock: socket.socket) -> None:
        """Stop watching for writing."""
        self._remove(sock, trio.lowlevel.wait_writable)

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        """Set the one timer."""
        self._due = callback
        self._timer.deadline = trio.current_time() + (deadline - time.monotonic_ns()) / 1e9

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the loop's next turn; from any thread."""
        with contextlib.suppress(trio.RunFinishedError):  # nobody is left to call
            self._token.run_sync_soon(callback)

    def _add(self, sock: socket.socket, wait: _Wait, callback: Callable[[], None]) -> None:
        scope = self._watches[sock, wait] = trio.CancelScope()
        self._start_soon(self._watch, sock, wait, callback, scope)

    def _remove(self, sock: socket.socket, wait: _Wait) -> None:
        scope = self._watches.pop((sock, wait), None)
        if scope is not None:
            # A task that waits leaves the kernel's watch list within this call, so the descriptor may be closed next.
            scope.cancel()

    async def _watch(
        self, sock: socket.socket, wait: _Wait, callback: Callable[[], None], scope: trio.CancelScope
    ) -> None:
        with scope:
            while not scope.cancel_called:
                await wait(sock)
                callback()

    async def _keep_time(self) -> None:
        while True:
            with self._timer:
                await trio.sleep_forever()
            self._timer = trio.CancelScope(deadline=math.inf)
            if self._due is not None:
                self._due()


def readiness(tasks: TaskGroup) -> TrioReadiness:
    """Make the running loop's readiness, its tasks in the server's group."""
    return TrioReadiness(tasks.start_soon)
