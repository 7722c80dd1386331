"""An OpenAI-compatible server whose every token is the time at which it was sent, so that a reader knows how long it took.

    python stamping_server.py PORT STEP_NS PHASES

Each stream has a token every STEP_NS, at one of PHASES moments of the step: 1 is an engine that steps all its streams
together; 64 spreads them evenly, so that no token waits behind another's. Times are nanoseconds of CLOCK_MONOTONIC, which
all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

__all__: list[str] = []

MAX_STEPS = 100_000  # a stream ends by itself, also when nobody kills the server
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
MODELS = b'{"object":"list","data":[{"id":"mock","object":"model","created":0,"owned_by":"benchmark"}]}'
CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk","created":1790000000,'
    b'"model":"mock","choices":[{"index":0,"delta":{"content":"%d "},"finish_reason":null}]}\n\n'
)


class Stream(asyncio.Protocol):
    """One connection, which carries one stream."""

    begun = 0

    def __init__(self, step_ns: int, phases: int) -> None:
        self.step_s = step_ns / 1e9
        self.phases = phases
        self.received = b""
        self.steps = MAX_STEPS
        self.due = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop."""
        del exc
        self.steps = 0

    def data_received(self, data: bytes) -> None:
        """Answer a request once its head is there; nothing in its body changes the answer."""
        self.received += data
        if b"\r\n\r\n" not in self.received or self.transport is None:
            return
        is_post = self.received.startswith(b"POST ")
        self.received = b""
        if not is_post:
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(MODELS), MODELS))
            return
        self.transport.write(HEAD)
        Stream.begun += 1
        phase = (Stream.begun * 37 % self.phases) / self.phases * self.step_s
        now = time.monotonic()
        self.due = now - now % self.step_s + self.step_s + phase
        asyncio.get_running_loop().call_later(self.due - now, self._step)

    def _step(self) -> None:
        self.steps -= 1
        if self.steps < 0 or self.transport is None:
            return
        payload = CHUNK % time.monotonic_ns()
        self.transport.write(b"%x\r\n%b\r\n" % (len(payload), payload))
        self.due += self.step_s
        asyncio.get_running_loop().call_later(self.due - time.monotonic(), self._step)


async def main(port: int, step_ns: int, phases: int) -> None:
    """Serve until the end."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stream(step_ns, phases), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
