"""Event streams as the frameworks' users write them: an async generator for each client, paced by one timer for all.

Every generator awaits the same `bare_asgi.Ticker`, so that what differs is the framework's own work on a token. Each
makes the event's bytes by the framework's own means: StreamingResponse is given them pre-built, FastAPI's native
events and sse-starlette are given the event's data.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from bare_asgi import MAX_STEPS, PAYLOAD, Ticker, tickers
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse as NativeResponse
from sse_starlette import EventSourceResponse

__all__ = ["native", "sse", "streaming"]

BYTES = bytes(PAYLOAD["body"])  # type: ignore[call-overload]  # a message's values are objects
DATA: dict[str, Any] = json.loads(BYTES.removeprefix(b"data: "))


class SharedTicker(Ticker):
    """Goes on when a client has left: the framework then cancels the future that all share. None does while measured."""

    __slots__ = ()

    def _tick(self) -> None:
        if self.step.cancelled():
            self.step = self.loop.create_future()
        super()._tick()


async def steps() -> AsyncIterator[None]:
    """Yields once a step."""
    if not tickers:
        tickers.append(SharedTicker())
    for _ in range(MAX_STEPS):
        await tickers[0].step
        yield


async def health() -> dict[str, str]:
    """Answers GET /healthz."""
    return {"status": "ok"}


streaming = FastAPI()
native = FastAPI()
sse = FastAPI()
for one in (streaming, native, sse):
    one.get("/healthz")(health)


@streaming.post("/v1/chat/completions")
async def stream_bytes() -> StreamingResponse:
    """Streams pre-built bytes."""

    async def body() -> AsyncIterator[bytes]:
        async for _ in steps():
            yield BYTES

    return StreamingResponse(body(), media_type="text/event-stream")


@native.post("/v1/chat/completions", response_class=NativeResponse)
async def stream_native() -> AsyncIterator[dict[str, Any]]:
    """Streams objects, which FastAPI serialises."""
    async for _ in steps():
        yield DATA


@sse.post("/v1/chat/completions")
async def stream_sse() -> EventSourceResponse:
    """Streams events whose data is serialised here, as sse-starlette wants it."""

    async def body() -> AsyncIterator[dict[str, str]]:
        async for _ in steps():
            yield {"data": json.dumps(DATA, separators=(",", ":"))}

    return EventSourceResponse(body(), sep="\n")
