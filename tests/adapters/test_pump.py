"""The byte path without a loop: every system call of a peer is the test's, in the order in which it wants them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tests.adapters.serving import CHAT, SECOND
from tests.carriers import Asked, ScriptedJob, ScriptedSource, request_bytes

from tokenwire.adapters import byte_path
from tokenwire.adapters.byte_path import RECEIVE_BYTES, RECEIVES_PER_TURN
from tokenwire.adapters.pump import Peer, Pump
from tokenwire.core.actions import Record
from tokenwire.core.connection import ConnectionOptions
from tokenwire.core.contracts import ModelCard
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.events import StreamEnd
from tokenwire.core.service import Service, ServiceOptions
from tokenwire.core.stream import Item

HEALTH = request_bytes(Asked("GET", "/healthz"))
CHAT_BYTES = request_bytes(CHAT)
PAGE = request_bytes(Asked("GET", "/"))


class FakeReadiness:
    """A loop that calls nobody by itself.

    Attributes:
        readers, writers: what is watched, and for whom.
        timers: every deadline that the one timer was set to.
        closed: what was closed, in order.
    """

    repeats = True

    def __init__(self) -> None:
        self.readers: dict[socket.socket, Callable[[], None]] = {}
        self.writers: dict[socket.socket, Callable[[], None]] = {}
        self.timers: list[int] = []
        self.on_timer: Callable[[], None] = lambda: None
        self.woken: list[Callable[[], None]] = []
        self.closed: list[socket.socket] = []

    def add_reader(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        assert sock not in self.readers
        self.readers[sock] = callback

    def remove_reader(self, sock: socket.socket) -> None:
        del self.readers[sock]

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        assert sock not in self.writers
        self.writers[sock] = callback

    def remove_writer(self, sock: socket.socket) -> None:
        del self.writers[sock]

    def close(self, sock: socket.socket) -> None:
        assert sock.fileno() >= 0, "closed twice"
        self.readers.pop(sock, None)
        self.writers.pop(sock, None)
        self.closed.append(sock)
        sock.close()

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        self.timers.append(deadline)
        self.on_timer = callback

    def wake_soon(self, callback: Callable[[], None]) -> None:
        self.woken.append(callback)

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        raise AssertionError(f"the pump starts no task: {main}")


class Wire:
    """The system calls of `pump`, as the test wants them to go.

    Attributes:
        plan: what the next writes do: take so many bytes, or raise; everything is taken where it is empty.
        written: what each descriptor took, call by call.
    """

    def __init__(self) -> None:
        self.plan: list[int | OSError] = []
        self.written: list[tuple[int, bytes]] = []

    def write(self, descriptor: int, data: bytes) -> int:
        step = self.plan.pop(0) if self.plan else len(data)
        if isinstance(step, OSError):
            raise step
        self.written.append((descriptor, data[:step]))
        return min(step, len(data))


class Facts:
    def new_id(self) -> str:
        return "1"

    def wall_s(self) -> int:
        return 0


class Bench:
    """A pump with peers whose other ends the test holds."""

    def __init__(self, wire: Wire, **options: Any) -> None:
        self.wire = wire
        self.now = 100 * SECOND
        self.records: list[Record] = []
        self.readiness = FakeReadiness()
        self.source = ScriptedSource((ModelCard("tiny"),), frozenset())
        service_options = ServiceOptions(page=b"p" * 10_000, **options)
        self.service = Service(models=self.source.models, honours=frozenset(), facts=Facts(), options=service_options)
        self.pump = Pump(self.service, self.readiness, lambda: self.now, options=ConnectionOptions())
        self.pump.dispatcher = Dispatcher(
            self.service,
            self.source,
            log=self.records.append,
            report=lambda error, stream_id: pytest.fail(f"{stream_id}: {error!r}"),
            yield_to_loop=lambda: None,
        )
        self.far_ends: list[socket.socket] = []

    def connect(self) -> tuple[Peer, socket.socket, socket.socket]:
        """Give a new peer, its socket and the far end."""
        near, far = socket.socketpair()
        self.far_ends.append(far)
        self.pump._begin(near)
        (peer,) = (peer for peer in self.pump._peers if peer._sock is near)
        return peer, near, far

    def ask(self, data: bytes = CHAT_BYTES) -> tuple[Peer, socket.socket, socket.socket]:
        peer, near, far = self.connect()
        far.send(data)
        self.readiness.readers[near]()
        return peer, near, far

    def stream(self) -> tuple[Peer, socket.socket, ScriptedJob]:
        """Give a peer whose stream has begun, so that the next write is a token's."""
        peer, near, _ = self.ask()
        self.say(self.source.jobs[-1], "begin")
        self.wire.written.clear()
        return peer, near, self.source.jobs[-1]

    def say(self, job: ScriptedJob, *items: Item) -> None:
        self.pump.dispatcher.deliver([(job.stream, items)], self.now)

    def bytes_written(self) -> bytes:
        return b"".join(data for _, data in self.wire.written)

    def advance(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.readiness.on_timer()

    @property
    def ends(self) -> list[str]:
        return [record.end for record in self.records]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire()
    monkeypatch.setattr(byte_path, "os", SimpleNamespace(write=wire.write))
    return wire


@pytest.fixture
def bench(wire: Wire) -> Iterator[Bench]:
    bench = Bench(wire, delivery=DeliveryOptions(budget_bytes=1_000))
    yield bench
    wire.plan.clear()
    bench.pump.close()
    for far in bench.far_ends:
        far.close()
    assert bench.pump.connections == bench.pump.dispatcher.streams == 0
    assert bench.readiness.readers == bench.readiness.writers == {}


def tokens(data: bytes) -> list[bytes]:
    return [line for line in data.split(b"\n") if line.startswith(b"data:")]


# Writing


def test_a_token_is_one_write(bench: Bench) -> None:
    _, near, job = bench.stream()
    bench.say(job, "one")
    bench.say(job, "two")
    assert [descriptor for descriptor, _ in bench.wire.written] == [near.fileno()] * 2
    assert bench.readiness.writers == {}
    assert job.blocked == []


def test_what_a_partial_write_leaves_is_written_first(bench: Bench) -> None:
    _, near, job = bench.stream()
    bench.say(job, "one")
    whole = bench.bytes_written()
    bench.wire.written.clear()
    bench.wire.plan = [7]
    bench.say(job, "two")
    assert job.blocked == [True]
    bench.say(job, "three")
    bench.say(job, "four")
    assert len(bench.bytes_written()) == 7
    bench.readiness.writers[near]()
    assert job.blocked == [True, False]
    assert bench.readiness.writers == {}
    bench.say(job, "five")
    text = whole + bench.bytes_written()
    assert [line.split(b'"')[3] for line in tokens(text)] == [b"one", b"two", b"threefour", b"five"]


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "full"), InterruptedError(errno.EINTR, "signal")])
def test_a_write_that_takes_nothing_keeps_all(bench: Bench, error: OSError) -> None:
    _, near, job = bench.stream()
    bench.wire.plan = [error]
    bench.say(job, "one")
    assert bench.bytes_written() == b""
    assert job.blocked == [True]
    bench.readiness.writers[near]()
    assert b"one" in bench.bytes_written()
    assert job.blocked == [True, False]


def test_buffered_bytes_leave_in_order_however_they_are_cut(bench: Bench) -> None:
    peer, near, _ = bench.ask(HEALTH)
    bench.wire.written.clear()
    bench.wire.plan = [3]
    pieces = [bytes([65 + number]) * 10 for number in range(5)]
    for piece in pieces:
        peer.write(piece)
    for plan in ([1, 1], [BlockingIOError()], [10], [4, BlockingIOError()], [10, 10, 2], []):
        bench.wire.plan = [*plan]
        if near in bench.readiness.writers:
            bench.readiness.writers[near]()
    assert bench.bytes_written() == b"".join(pieces)
    assert bench.readiness.writers == {}


def test_a_flush_may_block_again_with_what_was_merged(bench: Bench) -> None:
    _, near, job = bench.stream()
    bench.wire.plan = [5]
    bench.say(job, "one")
    bench.say(job, "two")
    bench.wire.plan = [100_000, 5]
    bench.readiness.writers[near]()
    assert job.blocked[-1] is True
    assert list(bench.readiness.writers) == [near]
    bench.say(job, "three", StreamEnd())
    bench.readiness.writers[near]()
    assert [line.split(b'"')[3] for line in tokens(bench.bytes_written())[:3]] == [b"one", b"two", b"three"]
    assert bench.bytes_written().endswith(b"0\r\n\r\n")
    assert bench.ends == ["finished"]


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "gone"), ConnectionResetError(errno.ECONNRESET, "rst")])
def test_a_peer_that_is_lost_during_a_batch_costs_no_other(bench: Bench, error: OSError) -> None:
    streams = [bench.stream() for _ in range(3)]
    jobs = [job for _, _, job in streams]
    bench.wire.plan = [100_000, error]
    bench.pump.dispatcher.deliver([(job.stream, ["x"]) for job in jobs], bench.now)
    assert [descriptor for descriptor, _ in bench.wire.written] == [streams[0][1].fileno(), streams[2][1].fileno()]
    assert [job.cancels for job in jobs] == [0, 1, 0]
    assert bench.ends == ["cancelled"]
    assert bench.readiness.closed == [streams[1][1]]
    bench.pump.dispatcher.deliver([(job.stream, ["y", StreamEnd()]) for job in jobs], bench.now)
    assert bench.ends == ["cancelled", "finished", "finished"]


def test_a_peer_that_is_lost_while_it_flushes(bench: Bench) -> None:
    _, near, job = bench.stream()
    bench.wire.plan = [5]
    bench.say(job, "one")
    bench.wire.plan = [2, BrokenPipeError()]
    flush = bench.readiness.writers[near]
    flush()
    flush()
    assert job.cancels == 1
    assert bench.pump.connections == 0


def test_who_is_lost_before_a_stream_starts_has_none(bench: Bench) -> None:
    """Two requests in one read: the first's answer finds the peer gone, the second must not run for nobody."""
    bench.wire.plan = [BrokenPipeError()]
    bench.ask(HEALTH + CHAT_BYTES)
    assert bench.pump.connections == bench.pump.dispatcher.streams == 0
    assert bench.service.admission.running == 0
    assert [job for job in bench.source.jobs if not job.cancels] == []


def test_a_budget_overflow_drops_the_connection(bench: Bench) -> None:
    _, near, job = bench.stream()
    bench.wire.plan = [5]
    bench.say(job, "one")
    bench.say(job, "x" * 500)
    assert bench.ends == []
    bench.say(job, "x" * 600)
    assert bench.ends == ["slow_reader"]
    assert bench.readiness.closed == [near]
    assert job.cancels == 1


# Losing


def test_lose_is_idempotent(bench: Bench) -> None:
    peer, near, job = bench.stream()
    for _ in range(3):
        peer.lose()
    assert bench.ends == ["cancelled"]
    assert job.cancels == 1
    assert bench.readiness.closed == [near]


def test_no_system_call_after_the_end(bench: Bench) -> None:
    """A descriptor's number is used again at once: what is written to it then reaches somebody else."""
    peer, near, job = bench.stream()
    read, number = bench.readiness.readers[near], near.fileno()
    bench.wire.plan = [5]
    bench.say(job, "waits")
    flush = bench.readiness.writers[near]
    peer.lose()
    strangers = socket.socketpair()
    assert number in {sock.fileno() for sock in strangers}
    bench.wire.written.clear()
    try:
        peer.write(b"stray")
        peer.settle(bench.now)
        peer.drain(bench.now)
        read()
        bench.say(job, "late")
        bench.advance(1_000 * SECOND)
        assert bench.wire.written == []
        assert [sock.fileno() >= 0 for sock in strangers] == [True, True]
        assert flush not in bench.readiness.writers.values()
    finally:
        for sock in strangers:
            sock.close()


def test_a_deadline_that_comes_after_the_end_does_nothing(bench: Bench) -> None:
    bench.connect()
    peer, _, _ = bench.connect()
    peer.lose()
    bench.advance(75 * SECOND)
    assert bench.pump.connections == 1
    assert bench.wire.written == []


def test_a_failing_receive_loses_the_peer(bench: Bench) -> None:
    _, near, job = bench.stream()
    near.send(b"never read")
    bench.far_ends[-1].close()  # with bytes unread, which resets the connection
    bench.readiness.readers[near]()
    assert job.cancels == 1
    assert bench.ends == ["cancelled"]
    assert bench.pump.connections == 0


# Receiving


def test_a_spurious_call_does_nothing(bench: Bench) -> None:
    _, near, _ = bench.connect()
    bench.readiness.readers[near]()
    assert bench.pump.connections == 1
    assert bench.wire.written == []


def test_all_that_has_come_is_taken_up_to_a_bound(bench: Bench) -> None:
    """Behind the data may stand a reset, of which libuv tells once only; but no peer may hold the loop."""
    _, near, far = bench.connect()
    far.setblocking(False)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2_000_000)
    sent = far.send(request_bytes(Asked("POST", "/chat", (("content-length", "5000000"),))) + b"x" * 1_000_000)
    taken = RECEIVE_BYTES * RECEIVES_PER_TURN
    bench.readiness.readers[near]()
    left = len(near.recv(2_000_000, socket.MSG_PEEK))
    assert left <= sent - min(taken, sent)
    far.close()
    for _ in range(sent // taken + 2):
        if near in bench.readiness.readers:
            bench.readiness.readers[near]()
    assert bench.pump.connections == 0


@pytest.mark.parametrize("repeats", [True, False])
def test_an_end_behind_the_data_is_found_in_as_many_turns_as_the_loop_gives(bench: Bench, *, repeats: bool) -> None:
    bench.readiness.repeats = repeats
    peer, near, far = bench.connect()
    far.send(CHAT_BYTES)
    far.shutdown(socket.SHUT_WR)
    for _ in range(2 if repeats else 1):
        bench.readiness.readers[near]()
    assert bench.ends == ["cancelled"]
    assert [job.cancels for job in bench.source.jobs] == [1]
    assert peer not in bench.pump._peers


def test_after_the_peers_end_its_socket_is_watched_no_more(bench: Bench) -> None:
    bench.wire.plan = [100]
    _, near, far = bench.ask(PAGE)
    far.shutdown(socket.SHUT_WR)
    bench.readiness.readers[near]()
    assert near not in bench.readiness.readers
    assert bench.pump.connections == 1
    bench.readiness.writers[near]()
    assert bench.bytes_written().endswith(b"p" * 10_000)
    assert bench.pump.connections == 0


def test_a_close_waits_for_the_rest_and_then_for_the_peer(bench: Bench) -> None:
    bench.wire.plan = [100]
    _, near, far = bench.ask(request_bytes(Asked("GET", "/", (("connection", "close"),))))
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)  # no end before all was said
    bench.readiness.writers[near]()
    assert far.recv(1) == b""
    assert bench.pump.connections == 1
    far.send(b"dropped")
    bench.readiness.readers[near]()
    assert bench.pump.connections == 1
    far.close()
    bench.readiness.readers[near]()
    assert bench.pump.connections == 0


def test_a_shutdown_of_a_connection_that_is_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, near, _ = bench.connect()

    def fail(sock: socket.socket, how: int) -> None:
        assert (sock, how) == (near, socket.SHUT_WR)
        raise OSError(errno.ENOTCONN, "gone")

    monkeypatch.setattr(socket.socket, "shutdown", fail)
    peer.drain(bench.now)
    assert bench.pump.connections == 0


# Deadlines


def test_a_deadline_is_scheduled_once(bench: Bench) -> None:
    _, near, far = bench.connect()
    assert bench.readiness.timers == [bench.now + 75 * SECOND]
    for _ in range(5):
        far.send(HEALTH)
        bench.now += SECOND
        bench.readiness.readers[near]()
    assert len(bench.readiness.timers) == 1
    assert len(bench.pump.timers._heap) == 1


def test_an_earlier_deadline_is_scheduled_besides(bench: Bench) -> None:
    _, near, far = bench.connect()
    far.send(b"GET")
    bench.readiness.readers[near]()
    assert bench.readiness.timers == [bench.now + 75 * SECOND, bench.now + 10 * SECOND]
    bench.advance(10 * SECOND)
    assert b" 408 " in bench.bytes_written()


def test_a_token_arms_nothing(bench: Bench) -> None:
    _, _, job = bench.stream()
    before = len(bench.readiness.timers), len(bench.pump.timers._heap)
    for _ in range(100):
        bench.now += SECOND // 10
        bench.say(job, "x")
    assert (len(bench.readiness.timers), len(bench.pump.timers._heap)) == before


def test_a_deadline_that_has_moved_is_looked_up_when_it_comes(bench: Bench) -> None:
    _, _, job = bench.stream()
    for _ in range(20):
        bench.advance(SECOND)
        bench.say(job, "x")
    assert b":" not in {line[:1] for line in bench.bytes_written().split(b"\n")}
    bench.advance(15 * SECOND)
    assert b":" in {line[:1] for line in bench.bytes_written().split(b"\n")}
    assert len(bench.pump.timers._heap) <= 2


# Draining


def test_draining_calls_back_once_and_when_all_have_gone(bench: Bench) -> None:
    told: list[int] = []
    _, _, job = bench.stream()
    _, near, far = bench.connect()
    bench.pump.drain(lambda: told.append(bench.pump.connections))
    assert (told, bench.pump.connections) == ([], 2)
    far.close()
    bench.readiness.readers[near]()
    bench.say(job, StreamEnd())
    assert told == []
    bench.far_ends[0].close()
    next(iter(bench.readiness.readers.values()))()
    assert told == [0]


def test_draining_an_idle_pump_calls_back_at_once(bench: Bench) -> None:
    told: list[bool] = []
    bench.pump.drain(lambda: told.append(True))
    assert told == [True]
