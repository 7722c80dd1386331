"""A runtime whose clock and loop the test moves, one on a real loop, and a sink that remembers."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import trio

from tokenwire.core.events import TERMINALS, ChoiceEnd, Event, StreamStart, TextDelta
from tokenwire.core.request import GenerationRequest, Message, TextPart
from tokenwire.core.stream import Item, Stream

if TYPE_CHECKING:
    from tokenwire.core.contracts import Batch


def request(prompt: str = "hello there", **fields: Any) -> GenerationRequest:
    """Ask for text in one user message."""
    said: dict[str, Any] = {"model": "m", "messages": (Message("user", (TextPart(prompt),)),)}
    return GenerationRequest(**(said | fields))


class FakeRuntime:
    """The test is the loop: nothing runs but by `run_woken`, `run_until` and `fire`.

    Attributes:
        clock: what `now` says, in nanoseconds.
        wakes: how often `wake_soon` was called.
        timers: the deadlines of every `call_at` so far.
    """

    def __init__(self) -> None:
        self.clock = 1_000
        self.wakes = 0
        self.timers: list[int] = []
        self._calls: list[tuple[int, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._woken: list[Callable[[], None]] = []
        self._changed = threading.Condition()

    def now(self) -> int:
        return self.clock

    def wake_soon(self, callback: Callable[[], None]) -> None:
        with self._changed:
            self.wakes += 1
            self._woken.append(callback)
            self._changed.notify()

    def call_at(self, deadline: int, callback: Callable[[], None]) -> None:
        self.timers.append(deadline)
        heapq.heappush(self._calls, (deadline, next(self._count), callback))

    def start_task(self, main: Callable[[], Awaitable[None]]) -> None:
        raise AssertionError(f"{main} needs a real loop")

    def run_woken(self) -> int:
        """Run what was woken, and say how many callbacks that were."""
        with self._changed:
            woken, self._woken = self._woken, []
        for callback in woken:
            callback()
        return len(woken)

    def run_until(self, done: Callable[[], bool]) -> None:
        """Wait for wake-ups and run them until something is so."""
        while not done():
            with self._changed:
                self._changed.wait_for(lambda: self._woken)
            self.run_woken()

    @property
    def pending(self) -> list[int]:
        """Deadlines of the timers that still run."""
        return sorted(deadline for deadline, _, _ in self._calls)

    def fire(self, *, late: int = 0) -> None:
        """Let time pass to the next timer, or past it, and run that one callback."""
        deadline, _, callback = heapq.heappop(self._calls)
        self.clock = max(self.clock, deadline + late)
        callback()

    def fire_all(self) -> None:
        """Let time pass until no timer runs."""
        while self._calls:
            self.fire()


class LoopRuntime:
    """The running asyncio or trio loop; its clock stands still.

    On asyncio everything is done in callbacks and not in tasks, as a server does that is driven by readiness.
    """

    def __init__(
        self,
        wake: Callable[[Callable[[], None]], object],
        start: Callable[[Callable[[], Awaitable[None]]], object],
    ) -> None:
        self._wake = wake
        self._start = start

    def now(self) -> int:
        return 0

    def wake_soon(self, callback: Callable[[], None]) -> None:
        self._wake(callback)

    def call_at(self, deadline: int, callback: Callable[[], None]) -> None:
        raise AssertionError(f"{callback} at {deadline} needs a clock")

    def start_task(self, main: Callable[[], Awaitable[None]]) -> None:
        self._start(main)


@asynccontextmanager
async def open_runtime() -> AsyncGenerator[LoopRuntime, None]:
    """Give the running loop; tasks that still run at the end are cancelled, as at a server's end."""
    opened = _open_asyncio() if asyncio.events._get_running_loop() is not None else _open_trio()
    async with opened as runtime:
        yield runtime


@asynccontextmanager
async def _open_asyncio() -> AsyncGenerator[LoopRuntime, None]:
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Future[None]] = []

    def start(main: Callable[[], Awaitable[None]]) -> None:
        tasks.append(asyncio.ensure_future(main()))

    yield LoopRuntime(loop.call_soon_threadsafe, start)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == []


@asynccontextmanager
async def _open_trio() -> AsyncGenerator[LoopRuntime, None]:
    async with trio.open_nursery() as nursery:
        yield LoopRuntime(trio.lowlevel.current_trio_token().run_sync_soon, nursery.start_soon)
        nursery.cancel_scope.cancel()


class RecordingSink:
    """Remembers what came.

    Attributes:
        batches: when each batch came, and what each stream said in it.
        said: all that each stream said.
        thread: whose thread must deliver.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[tuple[Hashable, Sequence[Item]]]]] = []
        self.said: dict[Hashable, list[Item]] = {}
        self.thread = threading.get_ident()
        self._waits: list[tuple[Callable[[], bool], anyio.Event]] = []

    def deliver(self, batch: Batch, now: int) -> None:
        assert threading.get_ident() == self.thread
        entries: list[tuple[Hashable, Sequence[Item]]] = [(stream, list(items)) for stream, items in batch]
        self.batches.append((now, entries))
        for stream, items in entries:
            self.said.setdefault(stream, []).extend(items)
        for done, event in self._waits:
            if done():
                event.set()

    def has_ended(self, *streams: Hashable) -> bool:
        """Whether each of the streams has said something terminal."""
        return all(any(isinstance(item, TERMINALS) for item in self.said.get(stream, ())) for stream in streams)

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait for deliveries until something is so."""
        event = anyio.Event()
        self._waits.append((done, event))
        if not done():
            await event.wait()

    def events(self, stream: Hashable, choices: int = 1) -> list[Event]:
        """What the core lets out of a stream; it is legal, and ends with its only terminal event."""
        return heard(self.said[stream], choices)

    def text(self, stream: Hashable, choice: int = 0, *, choices: int = 1) -> str:
        """The text of a choice, as a reader has it."""
        return text_of(self.events(stream, choices), choice)


def heard(items: Sequence[Item], choices: int = 1) -> list[Event]:
    """Pass items through the core's own stream: a GrammarError fails the test."""
    stream = Stream(StreamStart("id", "m", 0, choices=choices))
    events = [event for item in items for event in stream.accept([item])]
    assert isinstance(events[-1], TERMINALS)
    assert sum(isinstance(event, TERMINALS) for event in events) == 1
    assert sum(isinstance(item, TERMINALS) for item in items) == 1
    return events


def text_of(events: Sequence[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.choice == choice)


def reasons_of(events: Sequence[Event]) -> list[str]:
    """The finish reasons, by choice."""
    ends = [event for event in events if isinstance(event, ChoiceEnd)]
    return [end.reason.value for end in sorted(ends, key=lambda end: end.choice)]
