"""Iterables of all kinds as one answer: its status, its bytes, its end, and what becomes of the iterable."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from tests.adapters.serving import plain_text, turns, until

from tokenwire.adapters.embed import token_stream
from tokenwire.core.errors import RequestRefused
from tokenwire.core.events import ErrorKind, ReasoningDelta, StreamEnd, StreamError, TextDelta
from tokenwire.core.request import GenerationRequest, Message

pytestmark = pytest.mark.anyio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class Made:
    """Iterables, and what became of them."""

    def __init__(self) -> None:
        self.closed = 0

    async def async_words(self, *after: BaseException) -> AsyncIterator[str]:
        try:
            for word in ("one ", "two"):
                await anyio.lowlevel.checkpoint()
                yield word
            for error in after:
                raise error
        finally:
            self.closed += 1

    def words(self) -> Iterator[str]:
        try:
            yield from ("one ", "two")
        finally:
            self.closed += 1

    async def endless(self) -> AsyncIterator[str]:
        try:
            while True:
                yield "more "
                await anyio.lowlevel.checkpoint()
        finally:
            self.closed += 1

    async def silent(self) -> AsyncIterator[str]:
        try:
            await anyio.sleep_forever()
            yield ""
        finally:
            self.closed += 1


async def body_of(stream: AsyncIterator[bytes]) -> bytes:
    return b"".join([data async for data in stream])


@pytest.mark.parametrize("kind", ["words", "async_words"])
async def test_a_generator(kind: str) -> None:
    made = Made()
    status, headers, stream = await token_stream(getattr(made, kind)(), dialect="plain")
    assert status == 200
    assert dict(headers)["content-type"] == "text/event-stream"
    assert "date" not in dict(headers)
    assert plain_text(await body_of(stream)) == "one two"
    assert made.closed == 1


@pytest.mark.parametrize(
    "events",
    [
        "one two",
        b"one two",
        ["one ", b"two"],
        ["one ", TextDelta("two"), StreamEnd()],
        [b"one \xf0\x9f", b"\xa6\x89 two"],
    ],
    ids=["str", "bytes", "mixed", "events", "cut"],
)
async def test_other_iterables(events: Any) -> None:
    _, _, stream = await token_stream(events, dialect="plain")
    assert plain_text(await body_of(stream)).replace("\N{OWL} ", "") == "one two"


async def test_the_openai_dialect_and_its_request() -> None:
    status, headers, stream = await token_stream(Made().async_words(), request=CHAT)
    body = await body_of(stream)
    assert status == 200
    assert dict(headers)["x-request-id"].startswith("chatcmpl-")
    chunks = [json.loads(line[6:]) for line in body.decode().split("\n") if line.startswith("data: {")]
    assert {chunk["model"] for chunk in chunks} == {"tiny"}
    assert body.endswith(b"data: [DONE]\n\n")


async def test_a_whole_answer() -> None:
    asked = json.dumps({**CHAT, "stream": False, "max_tokens": 1}).encode()
    status, headers, stream = await token_stream(Made().async_words(), request=asked)
    answer = json.loads(await body_of(stream))
    assert status == 200
    assert dict(headers)["content-type"] == "application/json"
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_request_that_was_read_elsewhere() -> None:
    request = GenerationRequest(model="", messages=(Message("user"),), stream=True, stop=("wo",))
    _, _, stream = await token_stream(Made().words(), dialect="plain", request=request, model="mine")
    assert plain_text(await body_of(stream)) == "one t"


async def test_a_bad_request_is_refused_and_the_iterable_closed() -> None:
    events = Made().async_words()
    status, _, stream = await token_stream(events, request='{"messages": []}')
    assert status == 400
    assert "error" in json.loads(await body_of(stream))
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_an_unknown_dialect() -> None:
    with pytest.raises(ValueError, match="'latin'; there are openai_chat, plain"):
        await token_stream([], dialect="latin")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("secret"), 500),
        (RequestRefused(StreamError(ErrorKind.OVERLOADED, "Full.", "engine_full")), 529),
    ],
)
async def test_an_error_before_the_first_token_is_the_status(error: Exception, status: int) -> None:
    async def fails() -> AsyncIterator[str]:
        for said in list[str]():
            yield said
        raise error

    found, headers, stream = await token_stream(fails())
    body = await body_of(stream)
    assert found == status
    assert dict(headers)["content-length"] == str(len(body))
    assert b"secret" not in body
    assert "error" in json.loads(body)


async def test_an_error_after_it_is_an_event() -> None:
    status, _, stream = await token_stream(Made().async_words(RuntimeError("secret")))
    body = await body_of(stream)
    assert status == 200
    last = body.decode().strip().split("\n")[-1]
    assert "error" in json.loads(last.removeprefix("data: "))
    assert b"secret" not in body
    assert b"[DONE]" not in body


# Ending early


async def test_aclose_closes_the_iterable_before_it_returns() -> None:
    made = Made()
    _, _, stream = await token_stream(made.endless())
    await anext(stream)
    await stream.aclose()
    assert made.closed == 1
    assert [data async for data in stream] == []
    await stream.aclose()


async def test_leaving_the_context_closes_the_iterable() -> None:
    made = Made()
    async with (await token_stream(made.endless())).body as stream:
        await anext(stream)
    assert made.closed == 1


@pytest.mark.parametrize("how", ["close", "drop"])
async def test_closing_without_waiting(how: str) -> None:
    made = Made()
    stream: Any = (await token_stream(made.endless())).body
    await anext(stream)
    if how == "close":
        await anyio.to_thread.run_sync(stream.close)
    del stream
    gc.collect()
    await until(lambda: made.closed)
    assert made.closed == 1


@pytest.mark.parametrize("when", ["head", "body"])
async def test_a_consumer_that_is_cancelled(when: str) -> None:
    made = Made()

    async def consume() -> None:
        events = made.silent() if when == "head" else made.endless()
        _, _, stream = await token_stream(events)
        async for _ in stream:
            pass

    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        await turns()
        group.cancel_scope.cancel()
    assert made.closed == 1


async def test_a_stream_that_is_not_read_rests_its_source() -> None:
    pulled = 0

    async def counts() -> AsyncIterator[str]:
        nonlocal pulled
        while True:
            pulled += 1
            yield "more "

    _, _, stream = await token_stream(counts())
    await turns()
    before = pulled
    await turns(100)
    assert pulled == before
    data = [await anext(stream), await anext(stream)]
    assert all(data)
    await turns()
    assert pulled > before
    await stream.aclose()


async def test_a_custom_iterator_is_closed() -> None:
    class Numbers:
        closed = 0

        def __aiter__(self) -> Numbers:
            return self

        async def __anext__(self) -> TextDelta | ReasoningDelta:
            await anyio.lowlevel.checkpoint()
            return TextDelta("1")

        async def aclose(self) -> None:
            self.closed += 1

    numbers = Numbers()
    _, _, stream = await token_stream(numbers)
    await anext(stream)
    await stream.aclose()
    assert numbers.closed == 1


async def test_a_thread_sees_the_callers_context() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    variable.set("mine")

    def says() -> Iterator[str]:
        yield variable.get()

    _, _, stream = await token_stream(says(), dialect="plain")
    assert plain_text(await body_of(stream)) == "mine"
