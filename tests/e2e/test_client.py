"""Our client against started servers of ours, on each of their loops and each of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

import anyio
import pytest
from tests.e2e.conftest import Serve
from tests.e2e.harness import HERE, Relay, Server, curl, run_program, text_of, until

from tokenwire.adapters.client import connect, connect_sync
from tokenwire.core.events import (
    ErrorKind,
    FinishReason,
    StreamEnd,
    StreamError,
    StreamTruncated,
    TextDelta,
    UsageReport,
)

_PROMPT: Final = "Tell me about owls."
_LOOPS: Final[Mapping[str, tuple[str, Mapping[str, bool]]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """The client's loop."""
    backend, options = _LOOPS[request.param]
    return backend, dict(options)


@pytest.fixture(params=["openai_chat", "plain"])
def dialect(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def said(mock: Server) -> str:
    """What the mock says to the prompt."""
    return text_of(curl(f"{mock.url}/chat", "-G", "--data-urlencode", f"prompt={_PROMPT}", "-d", "max_tokens=40"))


@pytest.mark.anyio
async def test_a_stream(mock: Server, said: str, dialect: str) -> None:
    async with connect(mock.url, _PROMPT, dialect=dialect, model="mock", max_tokens=40) as stream:
        events = [event async for event in stream]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == said
    assert [type(event) for event in events if isinstance(event, UsageReport | StreamEnd)][-1] is StreamEnd
    stream.raise_for_error()


@pytest.mark.anyio
async def test_many_streams_at_once(mock: Server, said: str, dialect: str) -> None:
    texts: list[str] = []

    async def ask() -> None:
        async with connect(mock.url, _PROMPT, dialect=dialect, model="mock", max_tokens=40) as stream:
            texts.append((await stream.collect()).choices[0].text)

    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(ask)
    assert texts == [said] * 50


def test_sync(mock: Server, said: str, dialect: str) -> None:
    with connect_sync(mock.url, _PROMPT, dialect=dialect, model="mock", max_tokens=40) as stream:
        result = stream.collect()
    assert result.choices[0].text == said
    assert result.usage is not None
    assert result.usage.output_tokens == 40


def test_a_name(mock: Server, said: str) -> None:
    with connect_sync(f"http://localhost:{mock.port}/v1", _PROMPT, model="mock", max_tokens=40) as stream:
        assert stream.collect().choices[0].text == said


def test_a_refusal(mock: Server) -> None:
    with connect_sync(mock.url, _PROMPT, model="nobody") as stream:
        (error,) = stream
    assert isinstance(error, StreamError)
    assert (error.kind, error.status, error.code) == (ErrorKind.NOT_FOUND, 404, "model_not_found")


def test_an_error_in_the_middle(shared: Serve, loop: str, dialect: str) -> None:
    server = shared("fails_midway", loop=loop)
    with connect_sync(server.url, _PROMPT, dialect=dialect, model="fails_midway") as stream:
        *before, last = stream
    assert isinstance(last, StreamError)
    assert any(isinstance(event, TextDelta) for event in before)


@pytest.mark.anyio
async def test_leaving_stops_the_server(serve: Serve) -> None:
    server = serve("mock", "--mock-itl", "20ms")
    async with connect(server.url, _PROMPT, model="mock", max_tokens=100_000) as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                break
    await anyio.to_thread.run_sync(until, lambda: server.logged("cancelled"), "the server's note that its client left")
    assert len(server.logged("POST /v1/chat/completions")) == 1


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_connection_that_is_cut_is_no_end(serve: Serve, dialect: str, *, reset: bool) -> None:
    with Relay(serve("mock", "--mock-itl", "20ms")) as relay:
        stream = connect_sync(relay.url, _PROMPT, dialect=dialect, model="mock", max_tokens=100_000)
        with stream:
            events = [next(stream) for _ in range(5)]
            relay.cut(reset=reset)
            events += stream
    assert isinstance(events[-1], StreamTruncated)


def test_the_example(mock: Server, said: str) -> None:
    example = HERE.parents[1] / "examples" / "client.py"
    shown = run_program([sys.executable, str(example), mock.url, _PROMPT])
    assert shown.startswith(said)


# ------------------------------------------------------------------------------------------------ somebody else's server


@pytest.mark.anyio
async def test_a_real_server(llamacpp: str) -> None:
    async with connect(llamacpp, "What is the capital of France?", model="any", max_tokens=6) as stream:
        result = await stream.collect()
    stream.raise_for_error()
    assert result.choices[0].text
    assert result.choices[0].reason in {FinishReason.STOP, FinishReason.LENGTH}
    assert result.usage is not None
    assert 0 < result.usage.output_tokens <= 6


def test_a_real_server_in_sync(llamacpp: str) -> None:
    with connect_sync(f"{llamacpp}/v1", "What is the capital of France?", temperature=0.0, max_tokens=6) as stream:
        assert stream.collect().choices[0].text
    stream.raise_for_error()


def test_a_real_servers_refusal(llamacpp: str) -> None:
    with connect_sync(llamacpp, b'{"stream":true}') as stream:
        (error,) = stream
    assert isinstance(error, StreamError), error
    assert error.status in {400, 500}, error
    assert "messages" in error.message
