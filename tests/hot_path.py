"""The bundled server on real sockets, with a loop that the test turns: an engine step is one call, and can be counted.

A step costs something of its own and something for each token. To tell them apart, most counts run the same step with
two numbers of streams and divide what the further streams have added.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import sys
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple
from unittest import mock

from tokenwire.adapters.server import Server, bind
from tokenwire.backends.base import Backend
from tokenwire.backends.mock import MockBackend
from tokenwire.core.dialects.plain_messages import SUBPROTOCOL
from tokenwire.core.events import TextDelta

__all__ = [
    "ROWS",
    "STEP_NS",
    "CountingReadiness",
    "Rig",
    "Row",
    "block_growth",
    "blocks_held",
    "calls_per_token",
    "client",
    "count_writes",
    "idle_bytes",
    "open_rig",
    "request_of",
    "stream_bytes",
]

STEP_NS: Final = 1_000_000
"""From step to step, on a clock that the test moves: a thousand steps come before any deadline of a connection."""

MAX_TOKENS: Final = 100
"""Tokens of a stream: as many steps can be counted."""

_WARM_UP: Final = 60
"""Steps before anything is counted: caches fill, the first tokens are another path, and what a stream counts, such as the
bytes of short messages, passes 256, from where on an int is a block of its own."""

_SECOND_RUN: Final = 6
"""Steps after which the accountant has added up a second run of tokens: the first knows less of what was before it."""

_FEW: Final = 8
_MANY: Final = 16
"""Streams of the two runs that are compared. Lists of so many stay in the small-block allocator."""

_PATIENCE_S: Final = 10.0

Calls = Counter[tuple[str, str]]
"""How often what was called, by (caller, callee); the caller of a Python function is ""."""


class Row(NamedTuple):
    """What a stream speaks."""

    dialect: str
    framing: str

    def __str__(self) -> str:
        return f"{self.dialect}, {self.framing}"

    @property
    def mark(self) -> bytes:
        """What each event has once on the wire: a blank line, or the first byte of a text frame."""
        return b"\x81" if self.framing in _SUBPROTOCOLS else b"\n\n"


_SUBPROTOCOLS: Final = {
    "WebSocket objects": f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n",
    "WebSocket text": "",
}
"""What a client offers for each wording of plain on WebSocket."""

ROWS: Final = (
    *(Row(dialect, framing) for dialect in ("openai_chat", "plain") for framing in ("chunked", "bare")),
    *(Row("plain", framing) for framing in _SUBPROTOCOLS),
)
"""Every dialect that is counted: in HTTP chunks, in a body that ends with the connection, and in frames of WebSocket."""


def request_of(row: Row, max_tokens: int = MAX_TOKENS) -> bytes:
    """Write the request for one stream."""
    if row.framing in _SUBPROTOCOLS:
        return _handshake(row) + _frame(json.dumps({"max_tokens": max_tokens, "prompt": "Say something."}).encode())
    version = "1.1" if row.framing == "chunked" else "1.0"
    fields: dict[str, object] = {"max_tokens": max_tokens, "stream": True}
    if row.dialect == "plain":
        path = "/chat"
        fields |= {"prompt": "Say something."}
    else:
        path = "/v1/chat/completions"
        fields |= {"model": "mock", "messages": [{"role": "user", "content": "Say something."}]}
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


_BROWSER: Final = (
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36\r\n"
    "Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-US,en;q=0.9\r\nPragma: no-cache\r\n"
    "Cache-Control: no-cache\r\nOrigin: http://127.0.0.1\r\n"
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
)
"""Headers that browsers send besides."""


def _handshake(row: Row, more: str = "") -> bytes:
    head = "GET /ws/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    return f"{head}{key}{_SUBPROTOCOLS[row.framing]}{more}\r\n".encode()


def _frame(payload: bytes) -> bytes:
    """Make a short text frame, masked with nothing."""
    assert len(payload) < 126
    return bytes([0x81, 0x80 | len(payload), 0, 0, 0, 0]) + payload


def client(port: int) -> socket.socket:
    """Connect to a server on the loopback."""
    return socket.create_connection(("127.0.0.1", port), _PATIENCE_S)


class CountingReadiness:
    """A loop that the test turns; a `tokenwire.adapters.pump.Readiness`.

    Attributes:
        timers: how often the one timer was set.
        tasks: how many tasks were started.
        wakes: how often the loop was woken.
        deadline: what the timer is set to; None where it has fired.
        woken: callbacks that wait for the next turn.
    """

    def __init__(self) -> None:
        self.repeats = True
        self.timers = 0
        self.tasks = 0
        self.wakes = 0
        self.deadline: int | None = None
        self.woken: list[Callable[[], None]] = []
        self.readers: dict[socket.socket, Callable[[], None]] = {}
        self.writers: dict[socket.socket, Callable[[], None]] = {}
        self._on_timer: Callable[[], None] | None = None

    def add_reader(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        self.readers[sock] = callback

    def remove_reader(self, sock: socket.socket) -> None:
        del self.readers[sock]

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        self.writers[sock] = callback

    def remove_writer(self, sock: socket.socket) -> None:
        del self.writers[sock]

    def close(self, sock: socket.socket) -> None:
        self.readers.pop(sock, None)
        self.writers.pop(sock, None)
        sock.close()

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        self.timers += 1
        self.deadline = deadline
        self._on_timer = callback

    def wake_soon(self, callback: Callable[[], None]) -> None:
        self.wakes += 1
        self.woken.append(callback)

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        raise AssertionError(f"{main} is a task, and on this path there is none")

    def fire(self) -> None:
        """Run the timer."""
        assert self._on_timer is not None
        self.deadline = None
        self._on_timer()

    def run_woken(self) -> None:
        """Run what waits for the next turn."""
        woken, self.woken = self.woken, []
        for callback in woken:
            callback()


class Rig:
    """A server with a number of open streams, each past its first tokens, all of which step together.

    Args:
        row: what they speak.
        streams: how many.
        backend: what makes the tokens; by default the mock.
    """

    def __init__(self, row: Row, streams: int, backend: Backend | None = None) -> None:
        self.row = row
        self.streams = streams
        self.loop = CountingReadiness()
        backend = backend or MockBackend(ttft_ns=STEP_NS, itl_ns=STEP_NS)
        self.clock = 0
        self.server = Server(backend, self.loop, clock=self.now)
        (listener,) = bind("127.0.0.1", 0)
        self.server.pump.listen(listener)
        self.clients = [client(listener.getsockname()[1]) for _ in range(streams)]

    def now(self) -> int:
        return self.clock

    def open(self) -> None:
        """Ask for every stream, and let the server take the requests."""
        for sock in self.clients:
            sock.sendall(request_of(self.row))
        while self.server.pump.dispatcher.streams < self.streams:
            readable, _, _ = select.select(list(self.loop.readers), [], [], _PATIENCE_S)
            assert readable, "a request did not arrive"
            for sock in readable:
                self.loop.readers[sock]()

    def warm_up(self) -> None:
        """Bring every stream past what happens once."""
        self.open()
        for _ in range(_WARM_UP):
            self.step()

    def step(self) -> None:
        """Let time pass to the engine's next step, and run it: one token for every stream."""
        assert self.loop.deadline is not None
        self.clock = self.loop.deadline
        self.loop.fire()

    def say(self, text: str) -> None:
        """Deliver a token of a text of one's own to every stream, a step later and past the engine."""
        self.clock += STEP_NS
        dispatcher = self.server.pump.dispatcher
        dispatcher.deliver([(line, (TextDelta(text),)) for line in dispatcher._lines], self.clock)

    def received(self) -> list[bytes]:
        """Close the server, and read all that it has said, one string of bytes a client."""
        self.server.pump.close()
        return [b"".join(iter(partial(sock.recv, 1 << 16), b"")) for sock in self.clients]

    def close(self) -> None:
        self.server.pump.close()
        for sock in self.clients:
            sock.close()


@contextmanager
def _alone() -> Generator[None, None, None]:
    """Keep off what else allocates or frees: a coverage tracer does for every line that runs, the collector at any time."""
    tracer = sys.gettrace()
    sys.settrace(None)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        sys.settrace(tracer)


@contextmanager
def open_rig(row: Row, streams: int) -> Generator[Rig, None, None]:
    """Open streams past their first tokens, and close everything afterwards."""
    with _alone():
        rig = Rig(row, streams)
        try:
            rig.warm_up()
            yield rig
        finally:
            rig.close()


# ------------------------------------------------------------------------------------------------------------- calls


class _Profiler:
    """Counts calls of Python functions and of C functions; the profiler's own calls are not seen."""

    def __init__(self) -> None:
        self.calls: Calls = Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code: CodeType = frame.f_code
        if event == "call":
            self.calls["", code.co_qualname] += 1
        elif event == "c_call":
            self.calls[code.co_qualname, argument.__qualname__] += 1


def _calls(row: Row, streams: int, text: str | None) -> Calls:
    profiler = _Profiler()
    with open_rig(row, streams) as rig:
        step = rig.step if text is None else partial(rig.say, text)
        sys.setprofile(profiler)
        try:
            step()
        finally:
            sys.setprofile(None)
    return profiler.calls


def calls_per_token(row: Row, text: str | None = None) -> dict[tuple[str, str], int]:
    """Count the calls of one token: how often what was called, by (caller, callee); see `Calls`.

    Args:
        row: what the stream speaks.
        text: the token; by default what the mock says, with the mock's own calls.
    """
    few, many = _calls(row, _FEW, text), _calls(row, _MANY, text)
    added = {call: many[call] - few[call] for call in many}
    return {call: _share(more) for call, more in added.items() if more}


def _share(added: int) -> int:
    """Divide what the further streams have added evenly among their tokens."""
    share, rest = divmod(added, _MANY - _FEW)
    assert not rest, f"{added} more for {_MANY - _FEW} more tokens: not every token costs the same"
    return share


# ------------------------------------------------------------------------------------------------------------ blocks


def block_growth(row: Row, steps: int) -> int:
    """Count the blocks that steps leave allocated when nothing has changed but the streams' positions."""
    marks = array("q", (0, 0))  # an int would be a block itself
    for _ in range(2):  # a text keeps its UTF-8 once it was asked for, and the mock's texts are there to stay
        with open_rig(row, _MANY) as rig:
            for _ in range(_SECOND_RUN):
                rig.step()
            marks[0] = sys.getallocatedblocks()
            for _ in range(steps):
                rig.step()
            marks[1] = sys.getallocatedblocks()
    return marks[1] - marks[0]


def _held_at_first_write(row: Row, streams: int) -> int:
    held: list[int] = []

    def write(descriptor: int, data: bytes) -> int:
        held.append(sys.getallocatedblocks())
        return real_write(descriptor, data)

    real_write = os.write
    with open_rig(row, streams) as rig, mock.patch("os.write", write):
        before = sys.getallocatedblocks()
        rig.step()
    return held[0] - before


def blocks_held(row: Row) -> int:
    """Count the blocks that a token holds when its step is encoded and not yet written: the peak within a step."""
    _held_at_first_write(row, _MANY)  # what is made once is made by now
    return _share(_held_at_first_write(row, _MANY) - _held_at_first_write(row, _FEW))


def stream_bytes(row: Row, few: int = 32, many: int = 96) -> float:
    """Measure what a running stream holds in Python's own memory: connection, grammar, delivery, encoder, engine."""
    _traced(row, few)  # what is made once is made by now
    return (_traced(row, many) - _traced(row, few)) / (many - few)


def idle_bytes(few: int = 32, many: int = 96) -> float:
    """Measure what an open WebSocket on which nothing happens holds in Python's own memory, asked for by a browser."""
    _traced_idle(few)  # as above
    return (_traced_idle(many) - _traced_idle(few)) / (many - few)


def _traced_idle(sockets: int) -> int:
    with _alone():
        rig = Rig(ROWS[-1], sockets)
        try:
            tracemalloc.start()
            for sock in rig.clients:
                sock.sendall(_handshake(rig.row, _BROWSER))
            for sock in rig.clients:
                while not select.select([sock], [], [], 0)[0]:
                    for ready in select.select(list(rig.loop.readers), [], [], _PATIENCE_S)[0]:
                        rig.loop.readers[ready]()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
            rig.close()


def _traced(row: Row, streams: int) -> int:
    with _alone():
        rig = Rig(row, streams)  # the clients' sockets are no part of it
        try:
            tracemalloc.start()
            rig.warm_up()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
            rig.close()


# ------------------------------------------------------------------------------------------------------------ writes


@contextmanager
def count_writes() -> Generator[list[int], None, None]:
    """Note the descriptor of every os.write, the only way by which a peer sends."""
    written: list[int] = []

    def write(descriptor: int, data: bytes) -> int:
        written.append(descriptor)
        return real_write(descriptor, data)

    real_write = os.write
    with mock.patch("os.write", write):
        yield written
