"""How the server ends: it drains, it stops, it is cancelled; and nothing of it is left. See also `Serving`."""

from __future__ import annotations

import json
import socket

import pytest
from tests.adapters.serving import CHAT, SECOND, Push, Start, plain_data, plain_text, turns, until
from tests.carriers import Asked, request_bytes

from tokenwire.adapters.server import ServerOptions
from tokenwire.core.events import StreamEnd
from tokenwire.core.service import ServiceOptions

pytestmark = pytest.mark.anyio

WHOLE = Asked("POST", "/chat", (("content-type", "application/json"),), b'{"prompt":"hi","stream":false}')


async def test_the_first_stop_lets_a_stream_end(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "one")
        serving.server.stop()
        await turns()
        assert not serving.ended.is_set()
        push.say(push.jobs[0], "two", StreamEnd())
        assert plain_text((await client.answer()).body) == "onetwo"
        await client.until_end()
        assert not client.broken
        client.close()
        await serving.ended.wait()
        assert serving.access == ["GET /chat 200 finished"]
        assert push.closed == 1


async def test_after_the_first_stop_nobody_is_accepted(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        serving.server.stop()
        with socket.socket() as late, pytest.raises(ConnectionRefusedError):
            late.connect(serving.address)
        assert [sock.fileno() for sock in serving.listeners] == [-1]


async def test_the_first_stop_closes_idle_connections_at_once(start: Start) -> None:
    async with start(Push()) as serving:
        fresh, used = serving.connect(), serving.connect()
        used.ask(Asked("GET", "/healthz"))
        await used.answer()
        await until(lambda: serving.connections == 2)
        serving.server.stop()
        for client in (fresh, used):
            await client.until_end()
            assert not client.broken
            client.close()
        await serving.ended.wait()


@pytest.mark.parametrize("already_sent", [20, 110], ids=["head", "body"])
async def test_after_the_first_stop_a_request_on_its_way_is_refused(start: Start, already_sent: int) -> None:
    push = Push()
    async with start(push) as serving:
        client = serving.connect()
        request = request_bytes(WHOLE)
        client.send(request[:already_sent], "POST")
        await until(lambda: serving.connections)
        await turns()
        serving.server.stop()
        client.send(request[already_sent:])
        answer = await client.answer()
        assert answer.status == 503
        assert json.loads(answer.body)["error"]["code"] == "server_shutdown"
        assert answer.header("retry-after") == "1"
        await client.until_end()
        assert push.jobs == []


async def test_after_the_first_stop_the_queue_still_moves(start: Start) -> None:
    push = Push()
    async with start(push, ServerOptions(service=ServiceOptions(max_running=1))) as serving:
        runs, waits = serving.connect(), serving.connect()
        runs.ask()
        await until(lambda: push.jobs)
        waits.ask()
        await until(lambda: serving.streams == 2)
        serving.server.stop()
        push.say(push.jobs[0], "first", StreamEnd())
        await until(lambda: len(push.jobs) == 2)
        push.say(push.jobs[1], "second", StreamEnd())
        assert plain_text((await runs.answer()).body) == "first"
        assert plain_text((await waits.answer()).body) == "second"


async def test_the_second_stop_ends_streams_with_an_error(start: Start) -> None:
    push = Push()
    async with start(push, ServerOptions(service=ServiceOptions(max_running=3, max_waiting=1))) as serving:
        streams, silent, whole, waits = (serving.connect() for _ in range(4))
        for count, (client, asked) in enumerate(((streams, CHAT), (silent, CHAT), (whole, WHOLE)), 1):
            client.ask(asked)
            while len(push.jobs) < count:
                await turns(1)
        waits.ask()
        await until(lambda: serving.streams == 4)
        push.say(push.jobs[0], "one")
        serving.server.stop()
        serving.server.stop()
        await serving.ended.wait()
        told = plain_data((await streams.answer()).body)
        assert told[0]["token"] == "one"
        assert told[-1]["error"]["code"] == "server_shutdown"
        for client in (silent, whole, waits):
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "server_shutdown")
        assert [job.cancels for job in push.jobs] == [1, 1, 1]
        assert push.closed == 1
        assert sorted(serving.access) == [
            "GET /chat 200 failed",
            "GET /chat 503 failed",
            "GET /chat 503 failed",
            "POST /chat 503 failed",
        ]


async def test_a_drain_that_takes_too_long_ends_streams_with_an_error(start: Start) -> None:
    push = Push()
    async with start(push, ServerOptions(drain_ns=0)) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "one")
        serving.server.stop()
        told = plain_data((await client.answer()).body)
        assert told[-1]["error"]["code"] == "server_shutdown"
        await client.until_end()
        assert not client.broken
        client.close()
        await serving.ended.wait()
        assert push.jobs[0].cancels == 1


async def test_more_streams_than_a_turn_takes_are_ended(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        clients = [serving.connect() for _ in range(600)]
        for client in clients:
            client.ask()
        await until(lambda: len(push.jobs) == 600)
        serving.server.stop()
        serving.server.stop()
        await serving.ended.wait()
        assert serving.access == ["GET /chat 503 failed"] * 600
        assert {job.cancels for job in push.jobs} == {1}
        assert (await clients[-1].answer()).status == 503


async def test_a_server_that_is_cancelled_lets_go_of_everything(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        streams, idle = serving.connect(), serving.connect()
        streams.ask()
        idle.ask(Asked("GET", "/healthz"))
        await idle.answer()
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "one")
        serving.cancel()
    assert push.jobs[0].cancels == 1
    assert push.closed == 1
    assert "GET /chat 200 cancelled" in serving.access


async def test_what_was_put_off_comes_to_nothing_after_the_end(start: Start) -> None:
    push = Push()
    called: list[str] = []
    async with start(push) as serving:
        push.runtime.call_at(serving.clock.now() + SECOND, lambda: called.append("timer"))
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
    push.say(push.jobs[0], "too late", StreamEnd())
    push.runtime.wake_soon(lambda: called.append("woken"))
    await turns()
    assert serving.access == ["GET /chat 503 failed"]
    assert called in ([], ["woken"])
