"""Streamed chat completions as users of the frameworks write them: an engine's step feeds a queue for each client.

That is the work which our own application does: a step's tokens go to their streams, each becomes a chunk of OpenAI's
dialect, and that is sent. `prebuilt` leaves all of it out and is given finished bytes and the cheapest wake-up there
is, which no server of real tokens could use: it shows what the framework alone costs.
"""
# pyright: basic, reportMissingImports=false
# mypy: disable-error-code="import-not-found, untyped-decorator, unused-ignore, misc, has-type"
# The frameworks are in the peers' environment, where no type checker looks.

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from bare_asgi import MAX_STEPS, PAYLOAD, STEP_S, Ticker
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse as NativeResponse
from sse_starlette import EventSourceResponse

__all__ = ["native", "prebuilt", "sse", "streaming"]

BYTES: Any = PAYLOAD["body"]
CHUNK: dict[str, Any] = json.loads(BYTES.removeprefix(b"data: "))
TEXT: str = CHUNK["choices"][0]["delta"]["content"]


class Engine:
    """Puts a token into every stream's queue, on an absolute grid."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queues: dict[asyncio.Queue[str], None] = {}
        self.due = time.monotonic()
        self.wait()

    def wait(self) -> None:
        """Waits for the next step."""
        self.due += STEP_S
        self.loop.call_later(self.due - time.monotonic(), self.step)

    def step(self) -> None:
        """Makes a token for everybody."""
        for queue in self.queues:
            queue.put_nowait(TEXT)
        self.wait()


class SharedTicker(Ticker):
    """Goes on when a client has left: the framework then cancels the future that all share. None does while measured."""

    def _tick(self) -> None:
        if self.step.cancelled():
            self.step = self.loop.create_future()
        super()._tick()


engines: list[Engine] = []
tickers: list[SharedTicker] = []


async def chunks() -> AsyncIterator[dict[str, Any]]:
    """Makes a chunk of each token."""
    if not engines:
        engines.append(Engine())
    queue: asyncio.Queue[str] = asyncio.Queue()
    engines[0].queues[queue] = None
    try:
        while True:
            token = await queue.get()
            yield CHUNK | {"choices": [{"index": 0, "delta": {"content": token}, "finish_reason": None}]}
    finally:
        del engines[0].queues[queue]


def dump(chunk: dict[str, Any]) -> str:
    """Writes a chunk as compactly as our own server does."""
    return json.dumps(chunk, separators=(",", ":"))


async def health() -> dict[str, str]:
    """Answers GET /healthz."""
    return {"status": "ok"}


streaming = FastAPI()
prebuilt = FastAPI()
native = FastAPI()
sse = FastAPI()
for one in (streaming, prebuilt, native, sse):
    one.get("/healthz")(health)


@streaming.post("/v1/chat/completions")
async def stream_text() -> StreamingResponse:
    """FastAPI's StreamingResponse."""

    async def body() -> AsyncIterator[str]:
        async for chunk in chunks():
            yield f"data: {dump(chunk)}\n\n"

    return StreamingResponse(body(), media_type="text/event-stream")


@prebuilt.post("/v1/chat/completions")
async def stream_bytes() -> StreamingResponse:
    """FastAPI's StreamingResponse without any work of the application's."""

    async def body() -> AsyncIterator[bytes]:
        if not tickers:
            tickers.append(SharedTicker())
        for _ in range(MAX_STEPS):
            await tickers[0].step
            yield BYTES

    return StreamingResponse(body(), media_type="text/event-stream")


@native.post("/v1/chat/completions", response_class=NativeResponse)
async def stream_native() -> AsyncIterator[dict[str, Any]]:
    """FastAPI's own events."""
    async for chunk in chunks():
        yield chunk


@sse.post("/v1/chat/completions")
async def stream_sse() -> EventSourceResponse:
    """sse-starlette's response."""

    async def body() -> AsyncIterator[dict[str, str]]:
        async for chunk in chunks():
            yield {"data": dump(chunk)}

    return EventSourceResponse(body(), sep="\n")
