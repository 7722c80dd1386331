"""Generators of every kind behind the whole server: one that blocks, raises, never ends, is cancelled."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import anyio.lowlevel
import pytest
from tests.adapters.serving import CHAT, Push, Start, plain_data, plain_text, until
from tests.carriers import Asked

from tokenwire.adapters.server import ServerOptions
from tokenwire.backends.generators import READ_AHEAD, GeneratorBackend
from tokenwire.core.events import StreamEnd
from tokenwire.core.service import ServiceOptions

pytestmark = pytest.mark.anyio

HEALTH = Asked("GET", "/healthz")


def join(backend: GeneratorBackend) -> None:
    """Wait for a backend's threads, so that none of them lives on in another test."""
    for thread in backend._pool.threads:
        thread.join()


def sync_generator(prompt: str) -> Iterator[str]:
    yield f"{prompt}, "
    yield "world"


async def async_generator(prompt: str) -> AsyncIterator[str]:
    yield f"{prompt}, "
    await anyio.lowlevel.checkpoint()
    yield "world"


def sync_function(prompt: str) -> str:
    return f"{prompt}, world"


async def async_function(prompt: str) -> str:
    await anyio.lowlevel.checkpoint()
    return f"{prompt}, world"


def sync_that_returns_async(prompt: str) -> AsyncIterator[str]:
    return async_generator(prompt)


async def async_that_returns_sync(prompt: str) -> Iterator[str]:
    await anyio.lowlevel.checkpoint()
    return sync_generator(prompt)


@pytest.mark.parametrize(
    "function",
    [
        sync_generator,
        async_generator,
        sync_function,
        async_function,
        sync_that_returns_async,
        async_that_returns_sync,
    ],
)
async def test_every_kind_reaches_the_wire(start: Start, function: Callable[..., object]) -> None:
    backend = GeneratorBackend(function)
    async with start(backend) as serving:
        client = serving.connect()
        for _ in range(2):
            client.ask()
            assert plain_text((await client.answer()).body) == "hi, world"
    join(backend)


def sync_raises_at_once(prompt: str) -> Iterator[str]:
    if prompt:
        raise ValueError(prompt)
    yield ""


async def async_raises_at_once(prompt: str) -> AsyncIterator[str]:
    if prompt:
        raise ValueError(prompt)
    yield ""


def sync_function_raises(prompt: str) -> str:
    raise ValueError(prompt)


@pytest.mark.parametrize("function", [sync_raises_at_once, async_raises_at_once, sync_function_raises])
async def test_one_that_raises_at_once_is_a_status(
    start: Start, caplog: pytest.LogCaptureFixture, function: Callable[..., object]
) -> None:
    backend = GeneratorBackend(function)
    async with start(backend) as serving:
        client = serving.connect()
        client.ask()
        answer = await client.answer()
        assert answer.status == 500
        assert "ValueError" in json.loads(answer.body)["error"]["message"]
        client.ask(HEALTH)
        assert (await client.answer()).status == 200
        assert serving.access == ["GET /chat 500 failed", "GET /healthz 200 answered"]
        assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True]
    join(backend)


def sync_raises_later(prompt: str) -> Iterator[str]:
    yield prompt
    raise ValueError(prompt)


async def async_raises_later(prompt: str) -> AsyncIterator[str]:
    yield prompt
    raise ValueError(prompt)


@pytest.mark.parametrize("function", [sync_raises_later, async_raises_later])
async def test_one_that_raises_later_ends_its_stream_with_an_error(
    start: Start, function: Callable[..., object]
) -> None:
    backend = GeneratorBackend(function)
    async with start(backend) as serving:
        client = serving.connect()
        client.ask()
        first, *_, last = plain_data((await client.answer()).body)
        assert first["token"] == "hi"
        assert "ValueError" in last["error"]["message"]
        await client.until_end()
        assert not client.broken
        assert serving.access == ["GET /chat 200 failed"]
    join(backend)


async def test_one_that_never_ends_stops_when_its_reader_leaves(start: Start) -> None:
    closed: list[str] = []

    async def counts(prompt: str) -> AsyncIterator[str]:
        try:
            while True:
                yield prompt
        finally:
            closed.append("async")

    def counts_in_a_thread(prompt: str) -> Iterator[str]:
        try:
            while True:
                yield prompt
        finally:
            closed.append("sync")

    for function in (counts, counts_in_a_thread):
        backend = GeneratorBackend(function)
        async with start(backend) as serving:
            client, other = serving.connect(), serving.connect()
            client.ask()
            await client.until(b"hi")
            other.ask(HEALTH)
            assert (await other.answer()).status == 200
            client.reset()
            await until(lambda: not serving.streams)
        join(backend)
    assert closed == ["async", "sync"]


async def test_one_that_never_ends_stops_with_the_server(start: Start) -> None:
    closed: list[str] = []

    async def counts(prompt: str) -> AsyncIterator[str]:
        try:
            while True:
                yield prompt
        finally:
            closed.append("async")

    def counts_in_a_thread(prompt: str) -> Iterator[str]:
        try:
            while True:
                yield prompt
        finally:
            closed.append("sync")

    for function in (counts, counts_in_a_thread):
        backend = GeneratorBackend(function)
        async with start(backend) as serving:
            client = serving.connect()
            client.ask()
            await client.until(b"hi")
        join(backend)
    assert closed == ["async", "sync"]


async def test_one_that_blocks_holds_neither_the_loop_nor_the_end(start: Start) -> None:
    blocks, let_go, pulled = threading.Event(), threading.Event(), threading.Event()

    def block(prompt: str) -> Iterator[str]:
        yield prompt
        blocks.set()
        let_go.wait()
        pulled.set()
        yield "nobody hears this"

    backend = GeneratorBackend(block)
    async with start(backend) as serving:
        client, other = serving.connect(), serving.connect()
        client.ask()
        await client.until(b"hi")
        await until(blocks.is_set)
        other.ask(HEALTH)
        assert (await other.answer()).status == 200
        serving.server.stop()
        serving.server.stop()
        await serving.ended.wait()
        assert plain_data((await client.answer()).body)[-1]["error"]["code"] == "server_shutdown"
        assert not pulled.is_set()
    let_go.set()
    join(backend)
    assert pulled.is_set()


async def test_one_that_blocks_at_once_is_left_behind_by_its_reader(start: Start) -> None:
    blocks, let_go = threading.Event(), threading.Event()

    def block(prompt: str) -> str:
        blocks.set()
        let_go.wait()
        return prompt

    backend = GeneratorBackend(block)
    async with start(backend) as serving:
        client = serving.connect()
        client.ask()
        await until(blocks.is_set)
        client.close()
        await until(lambda: not serving.streams)
        assert serving.access == ["GET /chat 0 cancelled"]
        let_go.set()
    join(backend)


async def test_one_in_a_thread_rests_while_nobody_reads(start: Start) -> None:
    pulled = 0

    def count(prompt: str) -> Iterator[str]:
        del prompt
        nonlocal pulled
        while pulled < 2_000:
            pulled += 1
            yield f"<{pulled}>{'k' * 1_024}"

    backend = GeneratorBackend(count)
    async with start(backend) as serving:
        client = serving.connect(receive_buffer=2_048)
        client.ask()
        await until(lambda: any(kind == "write" for _, kind in serving.readiness.watched))
        assert pulled < 100 + 2 * READ_AHEAD
        client.hurry()
        text = plain_text((await client.answer()).body)
        assert text == "".join(f"<{number}>{'k' * 1_024}" for number in range(1, 2_001))
    join(backend)


async def test_one_that_is_cancelled_in_the_queue_is_never_called(start: Start) -> None:
    called: list[str] = []

    async def waits(prompt: str) -> AsyncIterator[str]:
        called.append(prompt)
        yield prompt
        await anyio.sleep_forever()

    options = ServerOptions(service=ServiceOptions(max_running=1))
    async with start(GeneratorBackend(waits), options) as serving:
        runs, waiting = serving.connect(), serving.connect()
        runs.ask(Asked("GET", "/chat?prompt=runs"))
        await runs.until(b"runs")
        waiting.ask(Asked("GET", "/chat?prompt=waits"))
        await until(lambda: serving.streams == 2)
        waiting.close()
        await until(lambda: serving.streams == 1)
        runs.close()
        await until(lambda: not serving.streams)
        assert called == ["runs"]


# A backend's runtime


async def test_a_tasks_exception_is_logged(start: Start) -> None:
    push = Push()
    async with start(push) as serving:

        async def fail() -> None:
            await anyio.lowlevel.checkpoint()
            raise ValueError("oh")

        push.runtime.start_task(fail)
        await until(lambda: serving.complaints)
        assert serving.complaints == ["a backend's task failed"]
        client = serving.connect()
        client.ask(HEALTH)
        assert (await client.answer()).status == 200


async def test_a_task_is_cancelled_at_the_servers_end(start: Start) -> None:
    push = Push()
    said: list[str] = []

    async def wait() -> None:
        said.append("started")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            said.append("ended")

    async with start(push):
        push.runtime.start_task(wait)
        assert said == []
        await until(lambda: said)
    assert said == ["started", "ended"]


async def test_a_callbacks_exception_is_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    push = Push()

    def fail() -> None:
        raise ValueError("oh")

    async with start(push) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        push.runtime.wake_soon(fail)
        await until(lambda: serving.complaints)
        push.runtime.call_at(serving.clock.now() + 1, fail)
        serving.clock.advance(1)
        assert serving.complaints == ["a backend's callback failed"] * 2
        assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [
            True
        ] * 2
        push.say(push.jobs[0], "on", StreamEnd())
        assert plain_text((await client.answer()).body) == "on"


async def test_a_start_that_raises_is_a_status(start: Start) -> None:
    push = Push()
    push.fault = ValueError("oh")
    async with start(push) as serving:
        client = serving.connect()
        client.ask(CHAT)
        assert (await client.answer()).status == 500
        push.fault = None
        client.ask(CHAT)
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "on", StreamEnd())
        assert plain_text((await client.answer()).body) == "on"
        assert len(serving.complaints) == 1


async def test_calls_at_a_time_come_in_order_and_with_it(start: Start) -> None:
    push = Push()
    called: list[tuple[int, str]] = []
    async with start(push) as serving:
        begin = push.runtime.now()

        def at(delay: int, name: str) -> None:
            push.runtime.call_at(begin + delay, lambda: called.append((push.runtime.now() - begin, name)))

        for delay, name in ((50, "c"), (10, "a"), (50, "d"), (20, "b"), (70, "e"), (-5, "past")):
            at(delay, name)
        assert called == []
        serving.clock.advance(50)
        assert called == [(0, "past"), (10, "a"), (20, "b"), (50, "c"), (50, "d")]
        serving.clock.advance(20)
        assert called[-1] == (70, "e")
