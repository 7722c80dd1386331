"""Readers that do not keep up: pull sources rest, push sources are merged, who takes too little is dropped."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.adapters.serving import (
    SECOND,
    Client,
    Push,
    Serving,
    Start,
    plain_data,
    plain_text,
    plateau,
    turns,
    until,
)
from tests.carriers import Asked, ScriptedJob

from tokenwire.adapters.server import ServerOptions
from tokenwire.backends.generators import GeneratorBackend
from tokenwire.core.connection import ConnectionOptions
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.events import StreamEnd
from tokenwire.core.service import ServiceOptions

pytestmark = pytest.mark.anyio

SMALL = 2_048
"""Bytes that a slow reader's kernel takes for it; the server's holds some 16 KiB besides."""

KIB = "k" * 1_024


def with_delivery(options: DeliveryOptions) -> ServerOptions:
    return ServerOptions(service=ServiceOptions(delivery=options))


async def say_until_blocked(push: Push, job: ScriptedJob) -> int:
    """Say numbered texts until the job's reader has stopped taking them; return how many."""
    said = 0
    while not job.blocked:
        push.say(job, f"<{said}>{KIB}")
        said += 1
        await turns(1)
    assert job.blocked == [True]
    return said


async def read_to_the_end(client: Client) -> str:
    client.hurry()
    return plain_text((await client.answer()).body)


async def begin(serving: Serving, push: Push, *, receive_buffer: int | None = None) -> tuple[Client, ScriptedJob]:
    """Start a stream that the test speaks."""
    count = len(push.jobs)
    client = serving.connect(receive_buffer=receive_buffer)
    client.ask()
    await until(lambda: len(push.jobs) > count)
    return client, push.jobs[-1]


async def test_a_pull_source_rests_and_goes_on(start: Start) -> None:
    pulled = 0

    async def count(prompt: str) -> AsyncIterator[str]:
        del prompt
        nonlocal pulled
        while pulled < 500:
            pulled += 1
            yield f"<{pulled}>{KIB}"

    async with start(GeneratorBackend(count)) as serving:
        client = serving.connect(receive_buffer=SMALL)
        client.ask()
        await client.until(b"<1>")
        resting = await plateau(lambda: pulled)
        assert resting < 200
        while len(client.received) < 20 * 1_024:
            await client.read()
        assert await plateau(lambda: pulled) > resting
        assert await read_to_the_end(client) == "".join(f"<{number}>{KIB}" for number in range(1, 501))
        assert serving.access == ["GET /chat 200 finished"]


async def test_a_push_source_is_merged_and_nothing_is_lost(start: Start) -> None:
    push = Push()
    async with start(push, with_delivery(DeliveryOptions(budget_bytes=10_000_000))) as serving:
        client, job = await begin(serving, push, receive_buffer=SMALL)
        said = await say_until_blocked(push, job)
        for number in range(said, said + 1_000):
            push.say(job, f"<{number}>{KIB}")
        push.say(job, StreamEnd())
        client.hurry()
        answer = await client.answer()
        assert plain_text(answer.body) == "".join(f"<{number}>{KIB}" for number in range(said + 1_000))
        assert len(plain_data(answer.body)) < said + 10
        assert serving.access == ["GET /chat 200 finished"]


async def test_the_job_hears_when_its_reader_catches_up(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        client, job = await begin(serving, push, receive_buffer=SMALL)
        for turn in (1, 2, 3):
            while len(job.blocked) < 2 * turn - 1:
                push.say(job, KIB)
                await turns(1)
            while len(job.blocked) < 2 * turn:
                await client.read()
                await turns(1)
        assert job.blocked == [True, False] * 3
        push.say(job, StreamEnd())
        await client.answer()


async def test_the_budget_ends_a_reader_and_no_other(start: Start) -> None:
    push = Push()
    async with start(push, with_delivery(DeliveryOptions(budget_bytes=64 * 1_024))) as serving:
        slow, slow_job = await begin(serving, push, receive_buffer=SMALL)
        other, other_job = await begin(serving, push)
        said = 0
        while not slow_job.cancels:
            push.step((slow_job, [KIB]), (other_job, [KIB]))
            await other.read()
            said += 1
        assert 64 < said < 400
        assert serving.access == ["GET /chat 200 slow_reader"]
        assert (serving.connections, serving.streams) == (1, 1)
        push.say(other_job, StreamEnd())
        assert await read_to_the_end(other) == KIB * said
        await slow.until_end()
        assert slow.broken
        assert not slow.heard() or not slow.heard()[0].whole
        assert other_job.cancels == 0


async def test_a_reader_that_takes_nothing_is_dropped(start: Start) -> None:
    push = Push()
    async with start(push, with_delivery(DeliveryOptions(stall_ns=60 * SECOND))) as serving:
        client, job = await begin(serving, push, receive_buffer=SMALL)
        await say_until_blocked(push, job)
        serving.clock.advance(60 * SECOND - 1)
        assert job.cancels == 0
        serving.clock.advance(1)
        assert job.cancels == 1
        assert serving.access == ["GET /chat 200 slow_reader"]
        await client.until_end()
        assert client.broken


async def test_a_reader_that_takes_a_little_is_kept(start: Start) -> None:
    push = Push()
    async with start(push, with_delivery(DeliveryOptions(stall_ns=60 * SECOND, budget_bytes=1_000_000))) as serving:
        client, job = await begin(serving, push, receive_buffer=SMALL)
        await say_until_blocked(push, job)
        for _ in range(400):
            push.say(job, KIB)
        # What waits is now one write of 400 KiB, which the kernel takes in pieces.
        for _ in range(5):
            serving.clock.advance(59 * SECOND)
            before = len(client.received)
            while len(client.received) < before + 60_000:
                await client.read()
            await turns()
        assert job.cancels == 0
        serving.clock.advance(60 * SECOND)
        assert job.cancels == 1


async def test_no_heartbeat_is_heaped_up_for_a_blocked_reader(start: Start) -> None:
    push = Push()
    options = DeliveryOptions(heartbeat_ns=SECOND, stall_ns=1_000 * SECOND)
    async with start(push, with_delivery(options)) as serving:
        client, job = await begin(serving, push, receive_buffer=SMALL)
        await say_until_blocked(push, job)
        serving.clock.advance(100 * SECOND)
        push.say(job, StreamEnd())
        assert b"\n:" not in (await client.answer()).body


async def test_a_big_reply_leaves_in_pieces_and_closes_cleanly(start: Start) -> None:
    page = bytes(range(256)) * 8_192
    async with start(Push(), ServerOptions(service=ServiceOptions(page=page))) as serving:
        client = serving.connect(receive_buffer=SMALL)
        client.ask(Asked("GET", "/", (("connection", "close"),)))
        await until(lambda: any(kind == "write" for _, kind in serving.readiness.watched))
        client.hurry()
        await client.until_end()
        assert not client.broken
        assert client.heard()[0].body == page
        assert serving.connections == 1
        client.close()
        await until(lambda: not serving.connections)


async def test_a_reader_that_half_closes_gets_the_rest_of_a_reply(start: Start) -> None:
    page = b"p" * 1_000_000
    async with start(Push(), ServerOptions(service=ServiceOptions(page=page))) as serving:
        client = serving.connect(receive_buffer=SMALL)
        client.ask(Asked("GET", "/"))
        await until(lambda: any(kind == "write" for _, kind in serving.readiness.watched))
        client.half_close()
        await client.until_end()
        assert client.heard()[0].body == page
        await until(lambda: not serving.connections)


async def test_a_reply_that_nobody_reads_is_dropped(start: Start) -> None:
    options = ServerOptions(
        service=ServiceOptions(page=b"p" * 1_000_000), connection=ConnectionOptions(stall_ns=60 * SECOND)
    )
    async with start(Push(), options) as serving:
        client = serving.connect(receive_buffer=SMALL)
        client.ask(Asked("GET", "/", (("connection", "close"),)))
        await until(lambda: any(kind == "write" for _, kind in serving.readiness.watched))
        serving.clock.advance(60 * SECOND)
        assert serving.connections == 0
        await client.until_end()
        assert client.broken


async def test_who_takes_no_answers_is_not_given_ever_more_of_them(start: Start) -> None:
    push = Push()
    async with start(push, ServerOptions(service=ServiceOptions(page=b"p" * 1_000_000))) as serving:
        client = serving.connect(receive_buffer=SMALL)
        for _ in range(2):
            client.ask(Asked("GET", "/"))
            await until(lambda: any(kind == "write" for _, kind in serving.readiness.watched))
        client.ask()
        await turns()
        assert push.jobs == []
        client.hurry()
        while not push.jobs:
            await client.read()
        push.say(push.jobs[0], "at last", StreamEnd())
        assert await read_to_the_end(client) == "at last"


@pytest.mark.parametrize("leave", [Client.close, Client.reset])
async def test_a_slow_reader_that_leaves(start: Start, leave: object) -> None:
    assert callable(leave)
    push = Push()
    async with start(push) as serving:
        readers = [await begin(serving, push, receive_buffer=SMALL) for _ in range(8)]
        for _, job in readers:
            await say_until_blocked(push, job)
        for client, _ in readers:
            leave(client)  # the loop may hear of both at once: the end to read, and room to write
        await until(lambda: all(job.cancels for _, job in readers))
        assert serving.access == ["GET /chat 200 cancelled"] * 8
