"""The reading end: opens N streams, then measures the server's CPU per token over a window.

    python benchmarks/load.py --port PORT --pid SERVER_PID [--streams 256] [--seconds 6]

It runs in a process of its own, on raw non-blocking sockets and epoll, does no more than count the ends of events, and
prints one JSON object (`LoadResult`). It stops by itself: each phase has a deadline.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import select
import socket
import sys
import time
from dataclasses import dataclass

from processes import Memory, cpu_ns, memory, process_tree
from workloads import TOKENS_PER_SECOND, chat_completions_request

__all__ = ["LoadError", "LoadResult", "Reader", "measure"]

OPEN_DEADLINE_S = 60.0
MAX_OPENING = 64  # streams that wait for their first token at one time: under every server's accept queue
QUIET_S = 0.005
LATE_BELOW = 0.95  # of the tokens asked for
_RECEIVE_SIZE = 16384
_OK = b"HTTP/1.1 200 "


class LoadError(Exception):
    """A run that measured nothing: a stream was refused or ended early, or a deadline passed."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One window of one server.

    Attributes:
        streams: how many streams were open.
        seconds: length of the window.
        tokens: events received in the window, all streams together.
        received: bytes received in the window.
        reads: reads in the window that gave bytes; equal to `tokens` when each token came alone.
        cpu_ns: CPU time of the server's processes in the window.
        client_cpu_ns: CPU time of this process in the window; near `seconds`, the reader was the bottleneck.
        late: fewer than 95 % of the tokens asked for arrived.
        idle: the server's memory before the first stream.
        busy: the server's memory with all streams open.
    """

    streams: int
    seconds: float
    tokens: int
    received: int
    reads: int
    cpu_ns: int
    client_cpu_ns: int
    late: bool
    idle: Memory
    busy: Memory


class Reader:
    """All streams of one run, drained by one epoll.

    An event ends with an empty line, LF LF, which JSON text on one line cannot hold and a comment line does not have.
    """

    def __init__(self, port: int, request: bytes) -> None:
        self._address = ("127.0.0.1", port)
        self._request = request
        self._poller = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._opening: set[int] = set()
        self._split: set[int] = set()  # streams whose last byte so far may be the first half of an empty line
        self.tokens = 0
        self.received = 0
        self.reads = 0

    def open_streams(self, count: int, deadline: float) -> None:
        """Opens streams until `count` are past their first token.

        Raises:
            LoadError: a stream was refused or ended, or the deadline passed.
        """
        while len(self._sockets) < count or self._opening:
            while len(self._sockets) < count and len(self._opening) < MAX_OPENING:
                self._open_one()
            self._poll(0.05)
            if time.monotonic() > deadline:
                raise LoadError(f"{len(self._opening)} of {len(self._sockets)} streams gave no token in time")

    def _open_one(self) -> None:
        peer = socket.create_connection(self._address, timeout=10)
        peer.sendall(self._request)
        peer.setblocking(False)
        self._sockets[peer.fileno()] = peer
        self._opening.add(peer.fileno())
        self._poller.register(peer, select.EPOLLIN)

    def drain_until(self, end: float, pause: float) -> None:
        """Reads whatever comes until the time given.

        Args:
            end: when to stop, on time.monotonic.
            pause: seconds to sleep between two looks; 0 sleeps in epoll, so that a send wakes this process.
        """
        while (left := end - time.monotonic()) > 0:
            if pause:
                time.sleep(min(left, pause))
            self._poll(0 if pause else left)

    def drain_until_quiet(self) -> None:
        """Reads on until nothing has come for 5 ms, for at most two steps.

        Both edges of a window lie there, so that it holds whole steps of a server that sends in steps, and no token
        whose CPU time was spent outside it.
        """
        deadline = time.monotonic() + 2 / TOKENS_PER_SECOND
        while self._poll(QUIET_S) and time.monotonic() < deadline:
            pass

    def _poll(self, timeout: float) -> bool:
        ready = self._poller.poll(timeout, len(self._sockets) + 1)
        for descriptor, _ in ready:
            data = self._sockets[descriptor].recv(_RECEIVE_SIZE)
            if descriptor in self._opening:
                self._check_start(descriptor, data)
            if not data:
                raise LoadError("the server ended a stream early")
            self._count(descriptor, data)
        return bool(ready)

    def _check_start(self, descriptor: int, data: bytes) -> None:
        if data.startswith(b"HTTP/") and not data.startswith(_OK):
            raise LoadError(f"refused: {data[:500]!r}")
        if b"\n\n" in data:
            self._opening.discard(descriptor)

    def _count(self, descriptor: int, data: bytes) -> None:
        self.received += len(data)
        self.reads += 1
        self.tokens += data.count(b"\n\n")
        if descriptor in self._split:
            self._split.discard(descriptor)
            self.tokens += data.startswith(b"\n")
        if data.endswith(b"\n") and not data.endswith((b"\r\n", b"\n\n")):
            self._split.add(descriptor)

    def close(self) -> None:
        """Closes every socket."""
        for peer in self._sockets.values():
            peer.close()
        self._poller.close()


def _window(reader: Reader, pid: int, idle: Memory, options: argparse.Namespace) -> LoadResult:
    streams, seconds, pause = int(options.streams), float(options.seconds), float(options.pause_ms) / 1000
    reader.drain_until(time.monotonic() + float(options.settle), pause)
    tree = process_tree(pid)
    busy = memory(tree)
    reader.drain_until_quiet()
    tokens, received, reads, own = reader.tokens, reader.received, reader.reads, time.process_time_ns()
    start, cpu = time.monotonic(), cpu_ns(tree)
    reader.drain_until(start + seconds, pause)
    reader.drain_until_quiet()
    cpu = cpu_ns(tree) - cpu
    elapsed = time.monotonic() - start
    if reader.tokens == tokens:
        raise LoadError("no token came in the window")
    return LoadResult(
        streams=streams,
        seconds=elapsed,
        tokens=reader.tokens - tokens,
        received=reader.received - received,
        reads=reader.reads - reads,
        cpu_ns=cpu,
        client_cpu_ns=time.process_time_ns() - own,
        late=reader.tokens - tokens < LATE_BELOW * streams * TOKENS_PER_SECOND * elapsed,
        idle=idle,
        busy=busy,
    )


def measure(options: argparse.Namespace) -> LoadResult:
    """Opens the streams, waits until all are past their first token, and measures one window.

    Raises:
        LoadError: the run measured nothing.
    """
    lifetime = OPEN_DEADLINE_S + float(options.settle) + float(options.seconds)
    max_tokens = math.ceil(lifetime * TOKENS_PER_SECOND)
    reader = Reader(int(options.port), chat_completions_request(int(options.port), str(options.model), max_tokens))
    try:
        idle = memory(process_tree(int(options.pid)))
        reader.open_streams(int(options.streams), time.monotonic() + OPEN_DEADLINE_S)
        return _window(reader, int(options.pid), idle, options)
    except OSError as error:
        raise LoadError(str(error)) from error
    finally:
        reader.close()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Open N streams and measure a server's CPU per token.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="the server's process; its descendants count too")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of the window")
    parser.add_argument("--settle", type=float, default=1.0, help="seconds between the last first token and the window")
    parser.add_argument("--pause-ms", type=float, default=0.0, help="sleep between two looks; 0: woken by each send")
    parser.add_argument("--model", default="mock")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs the command line; the exit code is 1 for a run that measured nothing."""
    options = _parse(arguments)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        result = measure(options)
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
