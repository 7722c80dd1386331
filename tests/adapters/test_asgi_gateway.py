"""The gateway inside an ASGI application, on sockets: under ASGI the dialer stands on a loop that is somebody else's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing

import anyio
import pytest
from tests.adapters.dialing import FarEnd, Listener
from tests.adapters.serving import until
from tests.adapters.test_asgi import Client
from tests.backends.upstream_fakes import DONE, HELLO, STREAM, answer, chunked

from tokenwire.adapters.asgi import App, app
from tokenwire.adapters.client import connect
from tokenwire.adapters.embed import token_stream
from tokenwire.backends.upstream import UpstreamBackend, UpstreamOptions

pytestmark = pytest.mark.anyio

ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
PATH = "/v1/chat/completions"


@pytest.fixture
def upstream() -> Iterator[Listener]:
    with closing(Listener()) as one:
        yield one


def gateway(upstream: Listener) -> App:
    url = f"http://127.0.0.1:{upstream.port}/v1"
    return app(UpstreamBackend(url, key="sk-own", models=("m",), options=UpstreamOptions(attempts=1)))


async def put(
    tasks: anyio.abc.TaskGroup, upstream: Listener, application: App, fields: Mapping[str, object] = ASKED
) -> tuple[Client, FarEnd]:
    """Have a client ask, up to where the server behind has the question."""
    client = Client(application, dict(fields), PATH)
    tasks.start_soon(client.run)
    far = await upstream.accept()
    await far.until(lambda: far.received.endswith(b"}") and b"\r\n\r\n" in far.received)
    return client, far


def said(client: Client) -> bytes:
    return b"".join(client.bodies)


async def test_a_stream_comes_through_as_it_is_made(upstream: Listener) -> None:
    application = gateway(upstream)
    async with anyio.create_task_group() as tasks:
        client, far = await put(tasks, upstream, application)
        assert far.received.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert b"\r\nauthorization: Bearer sk-own\r\n" in far.received
        far.say(STREAM + chunked(HELLO))
        await until(lambda: b'"hello"' in said(client))
        assert not client.whole
        far.say(chunked(DONE) + b"0\r\n\r\n")
        await until(lambda: client.whole)
        assert said(client).endswith(b"data: [DONE]\n\n")
        client.gone.set()
        await application.aclose()
        await far.until_ended()


async def test_a_refusal_keeps_its_status_and_its_words(upstream: Listener) -> None:
    application = gateway(upstream)
    error = {"message": "No.", "type": "invalid_request_error", "param": "temperature", "code": "bad"}
    async with anyio.create_task_group() as tasks:
        client, far = await put(tasks, upstream, application)
        far.say(answer(422, json.dumps({"error": error}).encode(), "content-type: application/json"))
        await until(lambda: client.whole)
        assert client.sent[0]["status"] == 422
        assert json.loads(said(client)) == {"error": error}
        client.gone.set()
        await application.aclose()


@pytest.mark.parametrize("before", [b"", STREAM, STREAM + chunked(HELLO)], ids=["silent", "head", "token"])
async def test_a_client_that_leaves_is_heard_by_the_server(upstream: Listener, before: bytes) -> None:
    application = gateway(upstream)
    async with anyio.create_task_group() as tasks:
        client, far = await put(tasks, upstream, application)
        if before:
            far.say(before)
        if HELLO in before:
            await until(lambda: b'"hello"' in said(client))
        client.gone.set()
        await far.until_ended()
        await client.ended.wait()
        await application.aclose()


async def test_a_server_that_breaks_off_in_the_middle(upstream: Listener) -> None:
    application = gateway(upstream)
    async with anyio.create_task_group() as tasks:
        client, far = await put(tasks, upstream, application)
        far.say(STREAM + chunked(HELLO))
        far.half_close()
        await until(lambda: client.whole)
        assert b'"hello"' in said(client)
        assert b'"code":"stream_truncated"' in said(client)
        assert b"[DONE]" not in said(client)
        client.gone.set()
        await application.aclose()


async def test_a_server_that_cannot_be_reached(upstream: Listener) -> None:
    application = gateway(upstream)
    upstream.close()
    async with anyio.create_task_group() as tasks:
        client = Client(application, dict(ASKED), PATH)
        tasks.start_soon(client.run)
        await until(lambda: client.whole)
        assert client.sent[0]["status"] == 502
        assert json.loads(said(client))["error"]["code"] == "upstream_unreachable"
        client.gone.set()
        await application.aclose()


async def test_what_our_client_takes_can_be_answered_in_another_dialect(upstream: Listener) -> None:
    told = bytearray()

    async def ask() -> None:
        async with connect(f"http://127.0.0.1:{upstream.port}", "hi", model="m") as stream:
            _, _, body = await token_stream(stream, dialect="plain", request={"prompt": "hi"})
            async for data in body:
                told.extend(data)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        far = await upstream.accept()
        await far.until(lambda: far.received.endswith(b"}"))
        far.say(STREAM + chunked(HELLO) + chunked(DONE) + b"0\r\n\r\n")
    assert b'data: {"token":"hello"' in told
    assert told.endswith(b"data: [DONE]\n\n")
