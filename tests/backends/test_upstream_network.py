"""The gateway over the simulated network: late, cut, held up, reset at any byte, swallowed; on virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.backends.fakes import RecordingSink, request, text_of
from tests.backends.upstream_fakes import DONE, SECOND, STREAM, FakeRuntime, chunk, chunked

from tokenwire.backends.base import Peer
from tokenwire.backends.upstream import UpstreamBackend, UpstreamOptions
from tokenwire.core.events import StreamEnd, StreamError, StreamTruncated
from tokenwire.core.testing.network import Endpoint, Faults, Link

WORDS: Final = tuple(f"w{number} " for number in range(12))
TEXT: Final = "".join(WORDS)
STEP_NS: Final = SECOND // 50


class Wire:
    """The gateway's end of a connection; a `tokenwire.backends.base.Link` over an endpoint."""

    def __init__(self, clock: FakeRuntime, endpoint: Endpoint, peer: Peer) -> None:
        self._clock = clock
        self._endpoint = endpoint
        self._peer = peer
        self._unsent = b""
        self._stands = False
        self.closed = False
        self._reading = True

    def stand(self) -> None:
        if not self.closed:
            self._stands = True
            self._peer.connected(self._clock.now())
            self.set_reading(self._reading)

    def write(self, data: bytes) -> None:
        if self._stands and not self.closed:
            self._unsent += data
            self._flush()

    def set_reading(self, reading: bool) -> None:
        self._reading = reading
        if self._stands and not self.closed:
            self._endpoint.set_reader(self._receive if reading else None)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._endpoint.reset()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._endpoint.send(self._unsent) :]
            self._endpoint.set_writer(None)
        except BlockingIOError:
            self._endpoint.set_writer(self._flush)
        except (ConnectionResetError, BrokenPipeError):
            self._clock.call_soon(self._fail)

    def _receive(self) -> None:
        try:
            data = self._endpoint.recv(1 << 16)
        except ConnectionResetError:
            self._fail()
            return
        if data:
            self._peer.receive_data(data, self._clock.now())
        elif not self.closed:
            self.close()
            self._peer.receive_eof(self._clock.now())

    def _fail(self) -> None:
        if not self.closed:
            self.close()
            self._peer.failed("Connection reset by peer", self._clock.now())


class Upstream:
    """A server's end of a connection: answers each whole request with the same words, one a step."""

    def __init__(self, clock: FakeRuntime, endpoint: Endpoint, asked: list[bytes]) -> None:
        self._clock = clock
        self._endpoint = endpoint
        self._asked = asked
        self._received = b""
        self._unsent = b""
        endpoint.set_reader(self._receive)

    def _receive(self) -> None:
        try:
            data = self._endpoint.recv(1 << 16)
        except ConnectionResetError:
            self._endpoint.close()
            return
        if not data:
            self._endpoint.close()
            return
        self._received += data
        head, mark, body = self._received.partition(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if mark and len(body) >= length:
            self._asked.append(head)
            self._received = body[length:]
            self._say(STREAM)
            pieces = [chunked(chunk(delta={"content": word})) for word in WORDS]
            for number, piece in enumerate([*pieces, chunked(DONE) + b"0\r\n\r\n"], 1):
                self._clock.call_at(self._clock.now() + number * STEP_NS, partial(self._say, piece))

    def _say(self, data: bytes) -> None:
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent and not self._endpoint.closed:
                self._unsent = self._unsent[self._endpoint.send(self._unsent) :]
            self._endpoint.set_writer(None)
        except BlockingIOError:
            self._endpoint.set_writer(self._flush)
        except (ConnectionResetError, BrokenPipeError):
            self._endpoint.close()


class NetworkDialer:
    """Connects over simulated links.

    Args:
        clock: when things happen.
        seed: where what the faults leave open is drawn from.
        faults: the upward and the downward faults of each connection; those after the last are perfect. None is refused.

    Attributes:
        wires: every connection, as the gateway has it.
        asked: the heads of the requests that arrived.
    """

    def __init__(self, clock: FakeRuntime, seed: int, faults: Sequence[tuple[Faults, Faults] | None]) -> None:
        self._clock = clock
        self._random = Random(seed)
        self._faults = list(faults)
        self.wires: list[Wire] = []
        self.asked: list[bytes] = []

    def connect(self, host: str, port: int, peer: Peer, *, tls: bool, deadline: int) -> Wire:
        del host, port, tls, deadline
        faults = self._faults.pop(0) if self._faults else (Faults(), Faults())
        upward, downward = faults or (Faults(), Faults())
        link = Link(self._clock, self._random, upward=upward, downward=downward)
        wire = Wire(self._clock, link.client, peer)
        self.wires.append(wire)
        if faults is None:
            self._clock.call_soon(wire._fail)
        else:
            Upstream(self._clock, link.server, self.asked)
            self._clock.call_at(self._clock.now() + upward.latency_ns, wire.stand)
        return wire


class Run:
    """A gateway over a network, with some streams."""

    def __init__(self, seed: int, faults: Sequence[tuple[Faults, Faults] | None], streams: int) -> None:
        self.clock = FakeRuntime(1_000)
        self.dialer = NetworkDialer(self.clock, seed, faults)
        self.sink = RecordingSink()
        options = UpstreamOptions(first_token_ns=20 * SECOND, gap_ns=10 * SECOND)
        self.backend = UpstreamBackend("http://up.test/v1", models=("m",), options=options)
        self.backend.use_dialer(self.dialer)
        self.backend.attach(self.clock, self.sink)
        self.names = [f"s{number}" for number in range(streams)]

    def play(self) -> None:
        for name in self.names:
            self.backend.start(name, request())
            self.clock.advance(self.clock.now() + 3 * STEP_NS)
        self.clock.run_until_idle(max_calls=100_000)


def _faults(*, deadly: bool) -> st.SearchStrategy[Faults]:
    return st.builds(
        Faults,
        latency_ns=st.integers(0, SECOND // 10),
        jitter_ns=st.integers(0, SECOND // 10),
        cuts=st.integers(0, 4),
        byte_ns=st.sampled_from([0, 0, 1000, 100_000]),
        capacity=st.sampled_from([1 << 16, 300, 40]),
        reset_at=st.none() | st.integers(0, 3000) if deadly else st.none(),
        black_hole_at=st.none() | st.integers(0, SECOND) if deadly else st.none(),
    )


@given(
    st.lists(st.tuples(_faults(deadly=False), _faults(deadly=False)), max_size=3), st.integers(1, 3), st.integers(0, 99)
)
@settings(max_examples=60)
def test_what_is_only_slow_and_cut_changes_nothing(
    faults: list[tuple[Faults, Faults]], streams: int, seed: int
) -> None:
    run = Run(seed, faults, streams)
    run.play()
    for name in run.names:
        assert text_of(run.sink.events(name)) == TEXT
        assert run.sink.events(name)[-1] == StreamEnd()
    assert len(run.dialer.asked) == streams
    assert all(wire.closed for wire in run.dialer.wires)


@given(
    st.lists(st.none() | st.tuples(_faults(deadly=True), _faults(deadly=True)), max_size=6),
    st.integers(1, 3),
    st.integers(0, 99),
)
@settings(max_examples=150)
def test_whatever_the_network_does_a_stream_ends_once_and_success_is_whole(
    faults: list[tuple[Faults, Faults] | None], streams: int, seed: int
) -> None:
    run = Run(seed, faults, streams)
    run.play()
    for name in run.names:
        events = run.sink.events(name)
        text = text_of(events)
        assert TEXT.startswith(text)
        match events[-1]:
            case StreamEnd():
                assert text == TEXT
            case StreamTruncated():
                assert text
            case StreamError():
                assert text or events[-1].status in (502, 504)
            case other:
                raise AssertionError(other)
    assert len(run.dialer.asked) <= streams * run.backend.options.attempts
    assert all(wire.closed for wire in run.dialer.wires)
    assert not run.backend._watched
    assert run.backend.pool.idle == 0


def test_a_reader_that_is_blocked_holds_the_server_back() -> None:
    run = Run(0, [(Faults(), Faults(capacity=100))], 0)
    job = run.backend.start("s", request())
    run.clock.advance(run.clock.now() + 2 * STEP_NS)
    job.set_blocked(True)
    run.clock.advance(run.clock.now() + 100 * SECOND)
    assert not run.sink.has_ended("s")
    assert StreamEnd() not in run.sink.said["s"]
    job.set_blocked(False)
    run.clock.run_until_idle(max_calls=100_000)
    assert text_of(run.sink.events("s")) == TEXT
