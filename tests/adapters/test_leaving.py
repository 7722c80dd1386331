"""A client that leaves: whatever it waited for is cancelled, and nobody else notices."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import anyio
import anyio.lowlevel
import pytest
from tests.adapters.serving import CHAT, Client, Push, Serving, Start, plain_text, until
from tests.carriers import Asked, request_bytes

from tokenwire.adapters.server import ServerOptions
from tokenwire.backends.generators import GeneratorBackend
from tokenwire.core.events import StreamEnd
from tokenwire.core.service import ServiceOptions

pytestmark = pytest.mark.anyio

WHOLE = Asked("POST", "/chat", (("content-type", "application/json"),), b'{"prompt":"hi","stream":false}')
CHAT_COMPLETION = Asked(
    "POST",
    "/v1/chat/completions",
    (("content-type", "application/json"),),
    b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],"stream":true}',
)

leaving = pytest.mark.parametrize("leave", [Client.close, Client.reset, Client.half_close])
"""By FIN, by RST, and by ending only the sending side, which counts as leaving too."""

Leave = Callable[[Client], None]


@leaving
@pytest.mark.parametrize("asked", [CHAT, CHAT_COMPLETION, WHOLE], ids=["plain", "openai", "whole"])
async def test_leaving_cancels_the_job(start: Start, leave: Leave, asked: Asked) -> None:
    push = Push()
    async with start(push) as serving:
        client, other = serving.connect(), serving.connect()
        client.ask(asked)
        await until(lambda: push.jobs)
        other.ask(CHAT)
        await until(lambda: len(push.jobs) == 2)
        push.step((push.jobs[0], ["one"]), (push.jobs[1], ["one"]))
        leave(client)
        await until(lambda: push.jobs[0].cancels)
        assert serving.access[0].endswith(" cancelled")
        assert (serving.connections, serving.streams) == (1, 1)
        push.step((push.jobs[0], ["late"]), (push.jobs[1], ["two", StreamEnd()]))
        assert plain_text((await other.answer()).body) == "onetwo"
        assert [job.cancels for job in push.jobs] == [1, 0]


@leaving
async def test_leaving_before_the_first_token_cancels_the_job(start: Start, leave: Leave) -> None:
    push = Push()
    async with start(push) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        leave(client)
        await until(lambda: push.jobs[0].cancels)
        assert serving.access == ["GET /chat 0 cancelled"]


@leaving
async def test_leaving_the_queue_gives_the_place_back(start: Start, leave: Leave) -> None:
    push = Push()
    async with start(push, ServerOptions(service=ServiceOptions(max_running=1, max_waiting=1))) as serving:
        runs, waits, patient = (serving.connect() for _ in range(3))
        runs.ask()
        await until(lambda: push.jobs)
        waits.ask()
        await until(lambda: serving.streams == 2)
        leave(waits)
        await until(lambda: serving.streams == 1)
        patient.ask()
        await until(lambda: serving.streams == 2)
        push.say(push.jobs[0], "first", StreamEnd())
        await until(lambda: len(push.jobs) == 2)
        push.say(push.jobs[1], "second", StreamEnd())
        assert plain_text((await runs.answer()).body) == "first"
        assert plain_text((await patient.answer()).body) == "second"
        assert push.jobs[0].cancels == push.jobs[1].cancels == 0


@leaving
async def test_leaving_in_the_middle_of_a_request(start: Start, leave: Leave) -> None:
    push = Push()
    async with start(push) as serving:
        client = serving.connect()
        client.send(request_bytes(WHOLE)[:-5], "POST")
        await until(lambda: serving.connections)
        leave(client)
        if leave is Client.half_close:
            assert (await client.answer()).status == 400
        await until(lambda: not serving.connections)
        assert push.jobs == []


@leaving
async def test_leaving_between_requests(start: Start, leave: Leave) -> None:
    push = Push()
    async with start(push) as serving:
        client = serving.connect()
        client.ask(Asked("GET", "/healthz"))
        await client.answer()
        leave(client)
        await until(lambda: not serving.connections)
        assert serving.access == ["GET /healthz 200 answered"]


async def test_leaving_after_the_end_is_no_cancel(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "all", StreamEnd())
        await client.until(b"[DONE]")
        client.close()
        await until(lambda: not serving.connections)
        assert serving.access == ["GET /chat 200 finished"]
        assert push.jobs[0].cancels == 0


async def test_leaving_closes_a_generator_where_it_waits(start: Start) -> None:
    said: list[str] = []

    async def waits(prompt: str) -> AsyncIterator[str]:
        try:
            yield prompt
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
                said.append("closed")

    async with start(GeneratorBackend(waits)) as serving:
        client = serving.connect()
        client.ask()
        await client.until(b"hi")
        client.close()
        await until(lambda: said)
        await until(lambda: not serving.readiness.tasks)
        assert serving.access == ["GET /chat 200 cancelled"]


async def test_many_that_leave_at_once(start: Start) -> None:
    push = Push()

    async def leave_all(serving: Serving) -> None:
        for client in clients:
            client.reset()
        push.step(*((job, ["x" * 100]) for job in push.jobs))
        await until(lambda: all(job.cancels for job in push.jobs))
        assert serving.streams == 0

    async with start(push) as serving:
        clients = [serving.connect() for _ in range(50)]
        for client in clients:
            client.ask()
        await until(lambda: len(push.jobs) == 50)
        await leave_all(serving)
        assert [job.cancels for job in push.jobs] == [1] * 50
