"""Both loops keep what `tokenwire.adapters.pump.Readiness` promises, and know nothing of protocols."""

from __future__ import annotations

import ast
import contextlib
import gc
import re
import socket
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from tests.adapters.serving import SECOND, turns, until

from tokenwire.adapters import asyncio_server, selector, trio_server
from tokenwire.adapters.pump import Readiness

Open = Callable[[], Any]
HOUR = 3_600 * SECOND

on_every_loop = pytest.mark.anyio


@pytest.fixture
def opened(make_readiness: Callable[[TaskGroup], Readiness]) -> Open:
    """Gives the loop's readiness for an `async with`."""

    @asynccontextmanager
    async def open_readiness() -> AsyncGenerator[Readiness, None]:
        async with anyio.create_task_group() as tasks:
            yield make_readiness(tasks)
            tasks.cancel_scope.cancel()

    return open_readiness


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    here.setblocking(False)
    yield here, there
    here.close()
    there.close()


Pair = tuple[socket.socket, socket.socket]


def fill(sock: socket.socket) -> None:
    """Write until the socket takes no more."""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"x" * 65_536)


@on_every_loop
async def test_a_reader_is_called_each_time(opened: Open, pair: Pair) -> None:
    here, there = pair
    got: list[bytes] = []
    async with opened() as readiness:
        readiness.add_reader(here, lambda: got.append(here.recv(10)))
        await turns()
        assert got == []
        for count, text in enumerate((b"one", b"two", b"three"), 1):
            there.send(text)
            while len(got) < count:
                await turns(1)
        there.send(b"x" * 25)
        await until(lambda: len(got) == 6)
        assert got == [b"one", b"two", b"three", b"x" * 10, b"x" * 10, b"x" * 5]
        readiness.close(here)


@on_every_loop
async def test_a_writer_is_called_when_there_is_room(opened: Open, pair: Pair) -> None:
    here, there = pair
    calls: list[int] = []

    def write() -> None:
        calls.append(here.send(b"y"))
        readiness.remove_writer(here)

    async with opened() as readiness:
        fill(here)
        readiness.add_writer(here, write)
        await turns()
        assert calls == []
        while not calls:
            there.recv(65_536)
            await turns(1)
        await turns()
        assert calls == [1]
        readiness.close(here)


@on_every_loop
async def test_a_callback_may_remove_itself_and_come_back(opened: Open, pair: Pair) -> None:
    here, there = pair
    got: list[bytes] = []

    def read() -> None:
        got.append(here.recv(1))
        readiness.remove_reader(here)
        if len(got) < 3:
            readiness.add_reader(here, read)

    async with opened() as readiness:
        readiness.add_reader(here, read)
        there.send(b"abcdef")
        await until(lambda: len(got) == 3)
        await turns()
        assert got == [b"a", b"b", b"c"]
        readiness.add_reader(here, read)
        await until(lambda: len(got) == 4)
        await turns()
        assert got[3:] == [b"d"]
        readiness.close(here)


@on_every_loop
async def test_a_reader_may_be_removed_from_outside(opened: Open, pair: Pair) -> None:
    here, there = pair
    got: list[bytes] = []
    async with opened() as readiness:
        readiness.add_reader(here, lambda: got.append(here.recv(1)))
        await turns(1)
        there.send(b"a")
        readiness.remove_reader(here)
        await turns()
        assert got == []
        readiness.add_reader(here, lambda: got.append(here.recv(1)))
        await until(lambda: got)
        assert got == [b"a"]
        readiness.close(here)


@on_every_loop
async def test_reader_and_writer_of_one_socket_are_apart(opened: Open, pair: Pair) -> None:
    here, there = pair
    calls: list[str] = []

    def read() -> None:
        here.recv(10)
        calls.append("read")

    def write() -> None:
        calls.append("write")
        readiness.remove_writer(here)

    async with opened() as readiness:
        readiness.add_reader(here, read)
        readiness.add_writer(here, write)
        await until(lambda: calls)
        await turns()
        assert calls == ["write"]
        there.send(b"x")
        await until(lambda: len(calls) == 2)
        readiness.add_writer(here, write)
        await until(lambda: len(calls) == 3)
        await turns()
        assert calls == ["write", "read", "write"]
        readiness.close(here)


@on_every_loop
@pytest.mark.parametrize("first", ["read", "write"])
async def test_close_wakes_nothing_later(opened: Open, pair: Pair, first: str) -> None:
    """A socket that is ready for both: whichever callback comes first closes it, the other must not come."""
    here, there = pair
    calls: list[str] = []

    def close(name: str) -> None:
        calls.append(name)
        readiness.close(here)

    async with opened() as readiness:
        there.send(b"x")
        names = ("read", "write") if first == "read" else ("write", "read")
        for name in names:
            (readiness.add_reader if name == "read" else readiness.add_writer)(here, partial(close, name))
        await until(lambda: calls)
        await turns()
        assert len(calls) == 1
        assert here.fileno() == -1


@on_every_loop
async def test_who_was_closed_in_this_very_turn_is_not_called(opened: Open) -> None:
    pairs = [socket.socketpair() for _ in range(10)]
    calls: list[int] = []

    def close_all(number: int) -> None:
        calls.append(number)
        for here, _ in pairs:
            readiness.close(here)

    async with opened() as readiness:
        for number, (here, there) in enumerate(pairs):
            there.send(b"x")
            readiness.add_reader(here, partial(close_all, number))
        await until(lambda: calls)
        await turns()
        assert len(calls) == 1
    for _, there in pairs:
        there.close()


@on_every_loop
async def test_a_new_socket_with_an_old_number_has_its_own_callback(opened: Open) -> None:
    calls: list[str] = []
    async with opened() as readiness:
        old, old_peer = socket.socketpair()
        old_peer.send(b"x")
        number = old.fileno()
        readiness.add_reader(old, lambda: calls.append("old"))
        readiness.add_writer(old, lambda: calls.append("old"))
        readiness.close(old)
        new, new_peer = socket.socketpair()
        assert number in {new.fileno(), new_peer.fileno()}
        mine, other = (new, new_peer) if new.fileno() == number else (new_peer, new)

        def read() -> None:
            mine.recv(10)
            calls.append("new")

        readiness.add_reader(mine, read)
        await turns()
        assert calls == []
        other.send(b"x")
        await until(lambda: calls)
        await turns()
        assert calls == ["new"]
        readiness.close(mine)
    for sock in (old_peer, other):
        sock.close()


@on_every_loop
async def test_close_takes_any_socket(opened: Open, pair: Pair) -> None:
    here, there = pair
    async with opened() as readiness:
        readiness.close(there)
        readiness.add_reader(here, lambda: here.recv(10))
        readiness.close(here)
    assert here.fileno() == there.fileno() == -1


@on_every_loop
async def test_close_also_closes_after_the_groups_end(opened: Open, pair: Pair) -> None:
    here, there = pair
    async with opened() as readiness:
        readiness.add_reader(here, lambda: here.recv(10))
        readiness.add_writer(there, lambda: readiness.remove_writer(there))
        await turns()
    readiness.close(here)
    readiness.close(there)
    assert here.fileno() == there.fileno() == -1


@on_every_loop
async def test_nothing_runs_before_the_call_has_returned(opened: Open, pair: Pair) -> None:
    here, there = pair
    there.send(b"x")
    calls: list[str] = []

    async def task() -> None:
        calls.append("task")

    def read() -> None:
        here.recv(10)
        calls.append("read")

    def write() -> None:
        readiness.remove_writer(here)
        calls.append("write")

    async with opened() as readiness:
        readiness.start_task(task)
        readiness.wake_soon(partial(calls.append, "woken"))
        readiness.set_timer(time.monotonic_ns() - SECOND, partial(calls.append, "timer"))
        readiness.add_reader(here, read)
        readiness.add_writer(here, write)
        assert calls == []
        await until(lambda: len(calls) == 5)
        assert sorted(calls) == ["read", "task", "timer", "woken", "write"]
        readiness.close(here)


@on_every_loop
async def test_the_timer_moves(opened: Open) -> None:
    calls: list[str] = []
    async with opened() as readiness:
        readiness.set_timer(time.monotonic_ns() + HOUR, partial(calls.append, "late"))
        await turns()
        readiness.set_timer(time.monotonic_ns(), partial(calls.append, "earlier"))
        await until(lambda: calls)
        await turns()
        assert calls == ["earlier"]
        readiness.set_timer(time.monotonic_ns(), partial(calls.append, "early"))
        readiness.set_timer(time.monotonic_ns() + HOUR, partial(calls.append, "later"))
        await turns()
        assert calls == ["earlier"]
        readiness.set_timer(time.monotonic_ns(), partial(calls.append, "now"))
        await until(lambda: len(calls) == 2)
        await turns()
        assert calls == ["earlier", "now"]


@on_every_loop
async def test_the_timer_can_be_set_from_its_own_callback(opened: Open) -> None:
    calls: list[int] = []

    def again() -> None:
        calls.append(len(calls))
        if len(calls) < 3:
            readiness.set_timer(time.monotonic_ns(), again)

    async with opened() as readiness:
        readiness.set_timer(time.monotonic_ns(), again)
        await until(lambda: len(calls) == 3)
        await turns()
        assert calls == [0, 1, 2]


class Probe:
    """Something whose end can be seen."""

    def call(self) -> None:
        raise AssertionError("called after the end")


@on_every_loop
async def test_the_timer_does_not_outlive_the_group(opened: Open) -> None:
    probe = Probe()
    seen = weakref.ref(probe)
    async with opened() as readiness:
        await turns()
        readiness.set_timer(time.monotonic_ns() + HOUR, probe.call)
    del probe, readiness
    gc.collect()
    assert seen() is None


@on_every_loop
async def test_wake_ups_come_from_any_thread_in_order(opened: Open) -> None:
    calls: list[tuple[int, int]] = []
    loop_thread = threading.get_ident()

    def call(*said: int) -> None:
        assert threading.get_ident() == loop_thread
        calls.append((said[0], said[1]))

    async with opened() as readiness:

        def wake(number: int) -> None:
            for turn in range(200):
                readiness.wake_soon(partial(call, number, turn))

        threads = [threading.Thread(target=wake, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        await until(lambda: len(calls) == 1_600)
        for thread in threads:
            thread.join()
        for number in range(8):
            assert [turn for of, turn in calls if of == number] == list(range(200))


@on_every_loop
async def test_a_wake_up_rouses_a_loop_that_sleeps(opened: Open) -> None:
    woken = anyio.Event()
    async with opened() as readiness:
        thread = threading.Thread(target=readiness.wake_soon, args=(woken.set,))
        thread.start()
        await woken.wait()
        thread.join()
        assert woken.is_set()


def test_a_wake_up_after_the_loops_end_does_nothing(
    anyio_backend: tuple[str, dict[str, Any]], make_readiness: Callable[[TaskGroup], Readiness]
) -> None:
    calls: list[str] = []

    made: list[Readiness] = []

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            made.append(make_readiness(tasks))
            tasks.cancel_scope.cancel()

    anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])
    (readiness,) = made
    readiness.wake_soon(partial(calls.append, "woken"))
    thread = threading.Thread(target=readiness.wake_soon, args=(partial(calls.append, "woken"),))
    thread.start()
    thread.join()
    assert calls == []


@on_every_loop
async def test_tasks_end_with_the_group(opened: Open) -> None:
    said: list[str] = []

    async def wait(name: str) -> None:
        said.append(f"{name} begins")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await turns(3)
            said.append(f"{name} ends")

    async def short() -> None:
        said.append("short")

    async with opened() as readiness:
        readiness.start_task(partial(wait, "one"))
        readiness.wake_soon(lambda: readiness.start_task(partial(wait, "two")))  # from a callback, which has no task
        readiness.start_task(short)
        await until(lambda: len(said) == 3)
    assert sorted(said) == ["one begins", "one ends", "short", "two begins", "two ends"]


# Source

SERVERS = [Path(module.__file__ or "") for module in (asyncio_server, selector, trio_server)]
PROTOCOL = re.compile(
    r"http|sse\b|event.?stream|websocket|ndjson|json|chunk|header|request|response|status|dialect|token(?!wire|\b)|"
    r"openai|heartbeat|keep.?alive|connection",
    re.IGNORECASE,
)
MAY_IMPORT = {
    *("__future__", "asyncio", "collections.abc", "contextlib", "math", "selectors", "socket", "time", "typing"),
    *("anyio", "anyio.abc", "trio", ".selector"),
}


def count_code_lines(text: str) -> int:
    """Count the lines that are neither blank nor comment nor docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documentation |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(number not in documentation and bool(line.strip()) and line.strip()[0] != "#" for number, line in lines)


@pytest.mark.parametrize("path", SERVERS, ids=[path.name for path in SERVERS])
def test_a_server_file_is_short_and_names_no_protocol(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert count_code_lines(text) <= 150
    assert PROTOCOL.findall(text) == []


@pytest.mark.parametrize("path", SERVERS, ids=[path.name for path in SERVERS])
def test_a_server_file_imports_no_protocol(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    assert imported - MAY_IMPORT == set()
