"""What a server and an application under somebody else's server share: the loop as backends see it, ids, the log.

`running_loop` finds out on which loop it is called, asyncio or trio, and keeps one `RunningLoop` for each.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from anyio.lowlevel import RunVar

from tokenwire.core.actions import Record

from .logs import FACTS, facts_of, text_of
from .timers import Timers

__all__ = [
    "Loop",
    "LoopRuntime",
    "RunningLoop",
    "Tasks",
    "Waiter",
    "WorldFacts",
    "log_record",
    "report_failure",
    "run_timers",
    "running_loop",
]

_log = logging.getLogger("tokenwire.server")
_access = logging.getLogger("tokenwire.access")

_ID_BYTES: Final = 12
"""Random bytes of a stream's id: 96 bits cannot be guessed."""

_IDS_AT_ONCE: Final = 64
"""Ids that are made of what the system gives in one call, which costs more than all else about them."""


class Waiter(Protocol):
    """What one task awaits until it is woken: an `asyncio.Future`, or trio's counterpart in `trio_server`."""

    def __await__(self) -> Generator[Any, Any, None]: ...

    def done(self) -> bool:
        """Whether it was woken or cancelled."""
        ...

    def set_result(self, result: None, /) -> None:
        """Wake the task; not once it is done."""
        ...


class Loop(Protocol):
    """What is needed of an event loop without sockets. Every method but `wake_soon` is called on the loop's thread."""

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        """Set the one timer, in monotonic nanoseconds, moving it where it is set already."""
        ...

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the loop's next turn; from any thread. After the loop's end, do nothing."""
        ...

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an async function, in a copy of the caller's context. It must not raise."""
        ...

    def new_waiter(self) -> Waiter:
        """Make what a task can wait on, once."""
        ...


class Tasks(Protocol):
    """The part of a loop that `LoopRuntime` needs."""

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """See `Loop`."""
        ...

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """See `Loop`."""
        ...


class LoopRuntime:
    """The loop as a backend sees it; a `tokenwire.backends.base.Runtime`.

    Args:
        loop: the loop.
        timers: its deadlines.
        now: the monotonic clock that they are on, in nanoseconds.
    """

    def __init__(self, loop: Tasks, timers: Timers, now: Callable[[], int]) -> None:
        self._loop = loop
        self._timers = timers
        self.now = now

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the loop's next turn, from any thread; an exception is logged."""
        self._loop.wake_soon(partial(_call, callback))

    def call_at(self, deadline: int, callback: Callable[[], None]) -> None:
        """Call back at a deadline; an exception is logged."""
        self._timers.call_at(deadline, partial(_call, callback))

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an async function on the loop; an exception is logged."""
        self._loop.start_task(partial(self._run, main))

    async def _run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await main()
        except Exception:  # noqa: BLE001  # logged with its traceback; one task must not end the server
            _log.exception("a backend's task failed")


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:  # noqa: BLE001  # as above; what a callback raises would end trio's loop, and only be logged by asyncio's
        _log.exception("a backend's callback failed")


class WorldFacts:
    """Ids from the system's randomness, the wall clock from the system's clock."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._process = 0

    def new_id(self) -> str:
        """Make an id that nobody can guess."""
        if not self._ids or self._process != os.getpid():  # a forked process must not give its parent's ids
            self._process = os.getpid()
            digits = secrets.token_hex(_ID_BYTES * _IDS_AT_ONCE)
            self._ids = [digits[at : at + 2 * _ID_BYTES] for at in range(0, len(digits), 2 * _ID_BYTES)]
        return self._ids.pop()

    def wall_s(self) -> int:
        """Read the wall clock, in whole seconds of Unix time."""
        return int(time.time())


class RunningLoop(NamedTuple):
    """A loop with what there may be only one of on it."""

    loop: Loop
    """The loop."""
    timers: Timers
    """All deadlines on its one timer."""
    now: Callable[[], int]
    """The monotonic clock of the deadlines, in nanoseconds."""


_running: Final[RunVar[RunningLoop]] = RunVar("tokenwire_loop")


def running_loop() -> RunningLoop:
    """Give the loop that runs here, always the same one, whose tasks live until it ends.

    Raises:
        RuntimeError: no loop runs here.
    """
    found = _running.get(None)
    if found is None:
        found = run_timers(_trio_loop() if _in_trio() else _asyncio_loop(), time.monotonic_ns)
        _running.set(found)
    return found


def run_timers(loop: Loop, now: Callable[[], int]) -> RunningLoop:
    """Put deadlines on a loop's one timer."""

    def arm(deadline: int) -> None:
        loop.set_timer(deadline, run)

    def run() -> None:
        timers.run(now())

    timers = Timers(arm)
    return RunningLoop(loop, timers, now)


def _in_trio() -> bool:
    # Looked at first: under trio's guest mode an asyncio loop runs in the same thread.
    trio = sys.modules.get("trio")
    if trio is None:
        return False
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


def _asyncio_loop() -> Loop:
    asyncio.get_running_loop()
    loop: Loop = importlib.import_module("tokenwire.adapters.asyncio_server").AsyncioReadiness()
    return loop


def _trio_loop() -> Loop:
    spawn = sys.modules["trio"].lowlevel.spawn_system_task

    def start_soon(main: Callable[..., object]) -> None:
        spawn(main, context=contextvars.copy_context())

    loop: Loop = importlib.import_module("tokenwire.adapters.trio_server").TrioReadiness(start_soon)
    return loop


def log_record(record: Record) -> None:
    """Log one answered request in one line."""
    if not _access.isEnabledFor(logging.INFO):
        return
    facts = facts_of(record)
    _access.info("%s", text_of(facts), extra={FACTS: facts})


def report_failure(error: Exception, stream_id: str) -> None:
    """Log a backend's fault with its traceback."""
    _log.error("the backend failed on stream %s", stream_id, exc_info=error)
