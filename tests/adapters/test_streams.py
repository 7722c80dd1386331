"""What a client gets from the server in ordinary life, on every loop."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import anyio
import pytest
from tests.adapters.serving import CHAT, MILLISECOND, SECOND, Push, Start, plain_data, plain_text, turns, until
from tests.carriers import Asked, request_bytes

from tokenwire.adapters.server import ServerOptions
from tokenwire.backends.generators import GeneratorBackend
from tokenwire.backends.mock import MockBackend
from tokenwire.core.connection import ConnectionOptions
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.events import StreamEnd
from tokenwire.core.service import ServiceOptions

pytestmark = pytest.mark.anyio

WHOLE = Asked("POST", "/chat", (("content-type", "application/json"),), b'{"prompt":"hi","stream":false}')
HEALTH = Asked("GET", "/healthz")


async def hello(prompt: str) -> AsyncIterator[str]:
    yield f"{prompt}, "
    yield "world"


async def test_a_stream_arrives_whole(start: Start) -> None:
    async with start(GeneratorBackend(hello)) as serving:
        client = serving.connect()
        client.ask()
        answer = await client.answer()
        assert answer.status == 200
        assert answer.header("content-type") == "text/event-stream"
        assert plain_text(answer.body) == "hi, world"
        assert serving.access == ["GET /chat 200 finished"]


async def test_a_token_leaves_in_the_step_that_made_it(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        for text in ("one", "two", "three"):
            push.say(push.jobs[0], text)
            await client.until(text.encode())
        push.say(push.jobs[0], StreamEnd())
        assert plain_text((await client.answer()).body) == "onetwothree"


async def test_a_whole_answer(start: Start) -> None:
    async with start(GeneratorBackend(hello)) as serving:
        client = serving.connect()
        client.ask(WHOLE)
        answer = await client.answer()
        assert answer.status == 200
        assert json.loads(answer.body)["text"] == "hi, world"


async def test_a_connection_is_kept_for_the_next_request(start: Start) -> None:
    async with start(GeneratorBackend(hello)) as serving:
        client = serving.connect()
        for asked in (CHAT, HEALTH, WHOLE, CHAT):
            client.ask(asked)
            assert (await client.answer()).status == 200
        assert serving.connections == 1
        assert len(client.heard()) == 4


async def test_requests_sent_ahead_are_answered_in_order(start: Start) -> None:
    async with start(GeneratorBackend(hello)) as serving:
        client = serving.connect()
        asked = (HEALTH, CHAT, Asked("HEAD", "/healthz"), CHAT, Asked("GET", "/nowhere"))
        client.send(b"".join(map(request_bytes, asked)), *(one.method for one in asked))
        answers = await client.answers()
        assert [answer.status for answer in answers] == [200, 200, 200, 200, 404]
        assert [plain_text(answers[at].body) for at in (1, 3)] == ["hi, world"] * 2


async def test_clients_at_once_get_their_own_streams(start: Start) -> None:
    async with start(GeneratorBackend(hello)) as serving:
        clients = [serving.connect() for _ in range(20)]
        for number, client in enumerate(clients):
            client.ask(Asked("GET", f"/chat?prompt=client{number}"))
        for number, client in enumerate(clients):
            assert plain_text((await client.answer()).body) == f"client{number}, world"
        assert serving.connections == 20


async def test_the_mock_keeps_its_own_time(start: Start) -> None:
    async with start(MockBackend(ttft_ns=200 * MILLISECOND, itl_ns=20 * MILLISECOND)) as serving:
        client = serving.connect()
        client.ask(Asked("GET", "/chat?prompt=hi&max_tokens=5"))
        await until(lambda: serving.streams)
        serving.clock.advance(199 * MILLISECOND)
        await turns()
        assert serving.access == []
        serving.clock.advance(MILLISECOND)
        await client.until(b'{"token":')
        serving.clock.advance(4 * 20 * MILLISECOND)
        assert sum(bool(one["token"]) for one in plain_data((await client.answer()).body)) == 5
        assert "ttft_ms=200.0 ms=280.0" in serving.access_lines[0]


async def test_ipv6(start: Start) -> None:
    async with start(GeneratorBackend(hello), host="::1") as serving:
        client = serving.connect()
        client.send(b"GET /chat?prompt=hi HTTP/1.1\r\nhost: [::1]\r\n\r\n", "GET")
        assert plain_text((await client.answer()).body) == "hi, world"


# Deadlines


async def test_silence_is_broken_by_a_heartbeat(start: Start) -> None:
    push = Push()
    options = ServerOptions(service=ServiceOptions(delivery=DeliveryOptions(heartbeat_ns=15 * SECOND)))
    async with start(push, options) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "one")
        await client.until(b"one")
        before = len(client.received)
        serving.clock.advance(14 * SECOND)
        push.say(push.jobs[0], "two")
        await client.until(b"two")
        serving.clock.advance(14 * SECOND)
        await turns()
        with anyio.CancelScope() as nothing_to_read:
            nothing_to_read.cancel()
            await client.read()
        assert b"\n:" not in client.received[before:]
        serving.clock.advance(1 * SECOND)
        await client.until(b"\n:")
        push.say(push.jobs[0], StreamEnd())
        assert plain_text((await client.answer()).body) == "onetwo"


async def test_an_idle_connection_is_closed_cleanly(start: Start) -> None:
    async with start(
        GeneratorBackend(hello), ServerOptions(connection=ConnectionOptions(idle_ns=75 * SECOND))
    ) as serving:
        client = serving.connect()
        client.ask(HEALTH)
        await client.answer()
        serving.clock.advance(74 * SECOND)
        client.ask(HEALTH)
        await client.answer()
        serving.clock.advance(74 * SECOND)
        assert serving.connections == 1
        serving.clock.advance(1 * SECOND)
        await client.until_end()
        assert not client.broken
        client.close()
        await until(lambda: not serving.connections)


@pytest.mark.parametrize("sent", [b"G", b"GET / HTTP/1.1\r\nhost: localhost\r\nx: y"], ids=["byte", "header"])
async def test_a_head_that_does_not_end_is_refused(start: Start, sent: bytes) -> None:
    options = ServerOptions(connection=ConnectionOptions(head_ns=10 * SECOND, idle_ns=75 * SECOND))
    async with start(GeneratorBackend(hello), options) as serving:
        client = serving.connect()
        await until(lambda: serving.connections)
        serving.clock.advance(70 * SECOND)
        client.send(sent, "GET")
        await turns()
        serving.clock.advance(6 * SECOND)
        client.send(b"z")  # a deadline is absolute: it cannot be moved byte by byte
        await turns()
        assert client.heard() == []
        serving.clock.advance(4 * SECOND)
        assert (await client.answer()).status == 408
        await client.until_end()
        assert serving.access == ["- - 408 refused"]


async def test_a_body_that_does_not_end_is_refused(start: Start) -> None:
    async with start(
        GeneratorBackend(hello), ServerOptions(connection=ConnectionOptions(body_ns=60 * SECOND))
    ) as serving:
        client = serving.connect()
        client.send(request_bytes(WHOLE)[:-1], "POST")
        await turns()
        serving.clock.advance(60 * SECOND)
        assert (await client.answer()).status == 408


# The end of a connection


async def test_close_waits_for_the_peers_own_end(start: Start) -> None:
    async with start(GeneratorBackend(hello)) as serving:
        client = serving.connect()
        client.ask(Asked("GET", "/healthz", (("connection", "close"),)))
        await client.until_end()
        assert client.heard()[0].status == 200
        client.send(b"more that nobody wants")
        await turns()
        assert serving.connections == 1
        client.close()
        await until(lambda: not serving.connections)


async def test_a_peer_that_does_not_end_is_dropped(start: Start) -> None:
    async with start(
        GeneratorBackend(hello), ServerOptions(connection=ConnectionOptions(linger_ns=2 * SECOND))
    ) as serving:
        client = serving.connect()
        client.ask(Asked("GET", "/healthz", (("connection", "close"),)))
        await client.until_end()
        serving.clock.advance(2 * SECOND - 1)
        assert serving.connections == 1
        serving.clock.advance(1)
        assert serving.connections == 0


async def test_what_was_said_last_reaches_a_reader_that_is_slower_than_the_linger(start: Start) -> None:
    page = b"x" * 12_000
    async with start(GeneratorBackend(hello), ServerOptions(service=ServiceOptions(page=page))) as serving:
        client = serving.connect(receive_buffer=2_048)
        client.ask(Asked("GET", "/", (("connection", "close"),)))
        await until(lambda: serving.access)
        await turns()
        serving.clock.advance(2 * SECOND)
        assert serving.connections == 0
        assert (await client.answer()).body == page
        await client.until_end()
        assert not client.broken
