"""The least that an ASGI application can do: pre-built bytes, one task and one wake-up per stream and step.

ASGI has no push: `send` may suspend, so each stream needs its own task, and each token wakes it once. What is left to
choose is how it is woken, and this is the cheapest way found, in fairness to the peers: one future per step, shared
by all streams, resolved by one timer. It costs a stream no timer, no future and no event of its own. An application
that cancels tasks could not share one (cancelling a task cancels the future it waits on), and would pay more: an
asyncio.Event makes a future per waiter, and asyncio.sleep a timer, a future and a heap entry per stream and step,
near twice the CPU in all. The message dict is built once and sent again, which neither server forbids nor changes.

The environment gives TOKENWIRE_BENCH_PAYLOAD, a file with the event's bytes, and TOKENWIRE_BENCH_STEP_NS.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path

__all__ = ["app"]

# The shapes are those of the ASGI specification: every message is a dict of values that depend on its type.
Message = MutableMapping[str, object]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

STEP_S = int(os.environ["TOKENWIRE_BENCH_STEP_NS"]) / 1e9
MAX_STEPS = 100_000  # a stream ends by itself, also when nobody kills the server
PAYLOAD: Message = {
    "type": "http.response.body",
    "body": Path(os.environ["TOKENWIRE_BENCH_PAYLOAD"]).read_bytes(),
    "more_body": True,
}
STREAM_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")],
}
HEALTH_START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
HEALTH_BODY: Message = {"type": "http.response.body", "body": b"ok"}
STREAM_END: Message = {"type": "http.response.body", "body": b""}


class Ticker:
    """Resolves one future per step, on an absolute grid, for everybody who waits on it."""

    __slots__ = ("due", "loop", "step")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.step: asyncio.Future[None] = self.loop.create_future()
        self.due = time.monotonic()
        self._wait()

    def _wait(self) -> None:
        self.due += STEP_S
        self.loop.call_later(self.due - time.monotonic(), self._tick)

    def _tick(self) -> None:
        passed, self.step = self.step, self.loop.create_future()
        passed.set_result(None)
        self._wait()


tickers: list[Ticker] = []


async def stream(send: Send) -> None:
    """Sends one payload per step."""
    if not tickers:
        tickers.append(Ticker())
    ticker = tickers[0]
    await send(STREAM_START)
    for _ in range(MAX_STEPS):
        await ticker.step
        await send(PAYLOAD)
    await send(STREAM_END)


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Answers GET /healthz with 200 and every other request with an endless event stream."""
    if scope["path"] == "/healthz":
        await send(HEALTH_START)
        await send(HEALTH_BODY)
        return
    while (await receive()).get("more_body"):
        pass
    await stream(send)
