"""A token's cost is gated by counts: tasks, timers, wake-ups, system calls, calls and blocks of memory.

What is counted must come out exactly as `tests.cost_sheet` says; that is also where docs/cost-sheet.md comes from. The
system calls of a started server are counted in tests/e2e/test_syscalls.py.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
from tests.cost_sheet import LIMITS, PATH, calls_of, sheet
from tests.hot_path import (
    ROWS,
    Rig,
    Row,
    block_growth,
    blocks_held,
    calls_per_token,
    client,
    count_writes,
    idle_bytes,
    open_rig,
    request_of,
    stream_bytes,
)

from tokenwire.adapters.pump import Readiness
from tokenwire.adapters.server import LOOPS, Server, bind
from tokenwire.backends.base import Runtime
from tokenwire.backends.mailbox import Mailbox
from tokenwire.backends.mock import MockBackend
from tokenwire.core.contracts import Batch, ModelCard, Sink, StreamHandle
from tokenwire.core.gaps import RUN
from tokenwire.core.request import GenerationRequest

if TYPE_CHECKING:
    import socket

STEPS = RUN
"""So many that what the accountant keeps of a run of tokens is in the end as far as it was."""
STREAMS = 8
by_row = pytest.mark.parametrize("row", ROWS, ids=str)


# ------------------------------------------------------------------------------------------------------------- calls


@by_row
def test_a_token_makes_these_calls_and_no_other(row: Row) -> None:
    assert calls_per_token(row) == calls_of(row)


@by_row
def test_a_token_beyond_ascii_makes_these_calls_and_no_other(row: Row) -> None:
    assert calls_per_token(row, " café") == calls_of(row, beyond_ascii=True, engine=False)
    assert calls_per_token(row, " tea") == calls_of(row, engine=False)


def test_the_cost_sheet_is_what_the_table_says() -> None:
    assert PATH.read_text(encoding="utf-8") == sheet(), "make cost-sheet"


# ------------------------------------------------------------------------------------------------------------ memory


@by_row
def test_a_token_leaves_no_block_behind(row: Row) -> None:
    assert block_growth(row, STEPS) == STEPS * LIMITS["blocks kept"].most


@by_row
def test_a_token_holds_one_block_until_it_is_written(row: Row) -> None:
    assert blocks_held(row) == LIMITS["blocks held"].most


@by_row
def test_an_answer_leaves_nothing_to_the_collector_of_cycles(row: Row) -> None:
    with open_rig(row, STREAMS) as rig:  # which has switched it off
        gc.collect()
        while rig.server.pump.dispatcher.streams:
            rig.step()
        assert gc.collect() == 0


@by_row
def test_an_open_stream_takes_a_bounded_amount_of_memory(row: Row) -> None:
    assert stream_bytes(row) <= LIMITS["stream bytes"].most


def test_an_idle_websocket_takes_a_bounded_amount_of_memory() -> None:
    assert idle_bytes() <= LIMITS["idle WebSocket bytes"].most


# --------------------------------------------------------------------------------------------- steps, by a fake loop


@by_row
def test_a_step_sets_one_timer_and_writes_each_token_once(row: Row) -> None:
    with open_rig(row, STREAMS) as rig, count_writes() as written:
        timers, wakes = rig.loop.timers, rig.loop.wakes
        for _ in range(STEPS):
            rig.step()
        assert rig.loop.timers - timers == STEPS * LIMITS["step timers"].most
        assert rig.loop.wakes - wakes == STEPS * LIMITS["wakes"].most
        assert list(Counter(written).values()) == [STEPS * LIMITS["writes"].most] * STREAMS
        assert not rig.loop.writers
        told = [answer.count(row.mark) for answer in rig.received()]
        first, *others = told
        assert first > STEPS
        assert others == [first] * (STREAMS - 1)


class _ThreadJob:
    def cancel(self) -> None:
        pass

    def set_blocked(self, blocked: bool) -> None:
        pass


class _ThreadEngine:
    """An engine that steps all streams on a thread of its own."""

    models = (ModelCard("mock"),)
    honours = frozenset({"max_tokens"})
    _mailbox: Mailbox

    def __init__(self) -> None:
        self._streams: list[StreamHandle] = []

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        self._mailbox = Mailbox(runtime, sink)

    def start(self, stream: StreamHandle, request: GenerationRequest) -> _ThreadJob:
        del request
        self._streams.append(stream)
        return _ThreadJob()

    def close(self) -> None:
        pass

    def step(self) -> None:
        """Run one step, and wait for its end."""
        thread = threading.Thread(target=self._step)
        thread.start()
        thread.join()

    def _step(self) -> None:
        for stream in self._streams:
            self._mailbox.put(stream, ["token"])


def test_a_step_on_another_thread_wakes_the_loop_once() -> None:
    engine = _ThreadEngine()
    rig = Rig(ROWS[0], STREAMS, engine)
    rig.open()
    with count_writes() as written:
        for _ in range(STEPS):
            wakes = rig.loop.wakes
            engine.step()
            assert rig.loop.wakes - wakes == LIMITS["thread wakes"].most
            rig.loop.run_woken()
    rig.close()
    assert list(Counter(written).values()) == [STEPS * LIMITS["writes"].most] * STREAMS


# -------------------------------------------------------------------------------------------- steps, by each real loop


class _TaskCounter(trio.abc.Instrument):
    """Counts what trio does with tasks."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        del task
        self._counts["tasks started"] += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        del task
        self._counts["tasks run"] += 1


def _count_tasks(loop: str, counts: Counter[str]) -> None:
    """Count the running loop's tasks from now on."""
    if loop == "trio":
        trio.lowlevel.add_instrument(_TaskCounter(counts))
        return

    # Whatever resumes a task on asyncio, or sets a timer, goes through one of these; uvloop keeps to it.
    for name in ("call_soon", "call_soon_threadsafe", "call_later", "create_task"):
        _count_calls(asyncio.get_running_loop(), name, counts)


def _count_calls(owner: object, name: str, counts: Counter[str]) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return original(*arguments, **options)

    setattr(owner, name, counted)


class _Window:
    """The sink of a mock: it looks at the counts when all streams have stepped together for a while, and again later."""

    def __init__(self, sink: Sink, counts: Counter[str], written: list[int], added: Counter[str]) -> None:
        self._sink = sink
        self._counts = counts
        self._written = written
        self._together = 0
        self._before: Counter[str] = Counter()
        self._added = added
        self.done = anyio.Event()

    def deliver(self, batch: Batch, now: int) -> None:
        batch = list(batch)
        self._together = self._together + 1 if len(batch) == STREAMS else 0
        if self._together == STREAMS:
            self._before = self._now()
        elif self._together == STREAMS + STEPS:
            self._added.update(self._now() - self._before)
            self.done.set()
        self._sink.deliver(batch, now)

    def _now(self) -> Counter[str]:
        return self._counts + Counter({"writes": len(self._written)})


def _connect(listener: socket.socket) -> list[socket.socket]:
    clients = [client(listener.getsockname()[1]) for _ in range(STREAMS)]
    for sock in clients:
        sock.sendall(request_of(ROWS[0], max_tokens=200))
    return clients


async def _serve_and_count(loop: str) -> Counter[str]:
    """Serve on the running loop; say what steps of all streams have added to the counts."""
    counts: Counter[str] = Counter()
    backend = MockBackend(ttft_ns=0, itl_ns=0)
    (listener,) = bind("127.0.0.1", 0)
    clients = _connect(listener)
    added: Counter[str] = Counter()
    with count_writes() as written:
        async with anyio.create_task_group() as tasks:
            module = importlib.import_module(f"tokenwire.adapters.{LOOPS[loop].module}")
            readiness: Readiness = module.readiness(tasks)
            for name in ("set_timer", "wake_soon", "add_writer", "start_task"):
                _count_calls(readiness, name, counts)
            server = Server(backend, readiness)
            window = _Window(server.pump.dispatcher, counts, written, added)
            backend._sink = window
            _count_tasks(loop, counts)
            tasks.start_soon(_stop_after, server, window.done)
            await server.serve([listener])
            tasks.cancel_scope.cancel()
    for sock in clients:
        sock.close()
    return added


async def _stop_after(server: Server, done: anyio.Event) -> None:
    await done.wait()
    server.stop()
    server.stop()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_costs_each_loop_a_timer_and_each_token_a_write_and_nothing_else(loop: str) -> None:
    choice = LOOPS[loop]
    added = anyio.run(partial(_serve_and_count, loop), backend=choice.backend, backend_options=dict(choice.options))
    timers = STEPS * LIMITS["step timers"].most
    expected = Counter({"set_timer": timers, "writes": STEPS * STREAMS * LIMITS["writes"].most})
    expected |= {"tasks run": STEPS} if loop == "trio" else {"call_later": timers}  # trio's task that keeps the time
    assert added == expected
