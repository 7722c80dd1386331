"""One peer after its upgrade: frames, pings, patience and the ways to an end; and a machine that does anything in any order."""

from __future__ import annotations

import json
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.carriers import HOST, SECOND, Carriage, HttpClient
from tests.conversing import DONE, OBJECTS, ByteSocket, Frame, read_frames
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

from tokenwire.core._ws_frames import apply_mask
from tokenwire.core.actions import Abort, Action, Close, Record, Upgrade
from tokenwire.core.connection import ConnectionOptions, Phase
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.errors import LocalProtocolError
from tokenwire.core.events import ErrorKind, StreamEnd, StreamError
from tokenwire.core.peers import PeerLimits, PeerShare, PeerTable
from tokenwire.core.service import ServiceOptions
from tokenwire.core.upgraded import FRAMING, UpgradedConnection
from tokenwire.core.websocket import MAX_PONGS

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
OPTIONS: Final = ConnectionOptions(stall_ns=40 * SECOND)
PROMPT: Final = '{"prompt":"hi"}'
HANDSHAKE: Final = (
    ("host", HOST),
    ("upgrade", "websocket"),
    ("connection", "Upgrade"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
)
KEY: Final = b"\x01\x02\x03\x04"


def frame(opcode: int, payload: bytes, *, final: bool = True, masked: bool = True, size: int | None = None) -> bytes:
    """Make a client's frame, or what is wrong with one."""
    size = len(payload) if size is None else size
    bit = 0x80 if masked else 0
    if size < 126:
        length = bytes([bit | size])
    else:
        length = (
            bytes([bit | 126]) + size.to_bytes(2, "big")
            if size < 1 << 16
            else bytes([bit | 127]) + size.to_bytes(8, "big")
        )
    head = bytes([(0x80 if final else 0) | opcode]) + length
    return head + (KEY + bytes(apply_mask(payload, KEY)) if masked else payload)


class Upgraded:
    """A house, one WebSocket of bytes to it, and a backend that says what the test lets it say."""

    def __init__(
        self, service: ServiceOptions | None = None, *, subprotocols: tuple[str, ...] = (), first: bytes = b""
    ) -> None:
        self.house = Carriage("http").house(options=service)
        self.house.source.script = None
        self.socket = ByteSocket(self.house, options=OPTIONS, subprotocols=subprotocols, first=first)
        self.peer = self.socket.peer
        assert self.socket.accepted

    @property
    def machine(self) -> UpgradedConnection:
        assert isinstance(self.peer.machine, UpgradedConnection)
        return self.peer.machine

    @property
    def kinds(self) -> list[type]:
        return [type(action) for action in self.peer.actions]

    def ends_with(self, kind: type[Action]) -> bool:
        """Whether this was asked of the carrier last."""
        return self.kinds[-1] is kind

    @property
    def ends(self) -> list[str]:
        return [record.end for record in self.house.records[1:]]

    @property
    def cancels(self) -> list[int]:
        return [job.cancels for job in self.house.source.jobs]

    def ask(self) -> None:
        self.socket.say(PROMPT)

    def say(self, *items: str | StreamEnd | StreamError, job: int = -1) -> None:
        self.house.say(self.house.source.jobs[job], *items)
        self.socket.read()

    def check_over(self) -> None:
        """Nothing runs, nothing is due, and nothing is said any more."""
        admission = self.house.service.admission
        assert (self.house.dispatcher.streams, admission.running, admission.waiting) == (0, 0, 0)
        assert self.house.reports == []
        before = len(self.peer.writes)
        self.house.advance(1000 * SECOND)
        assert self.peer.ended
        assert self.machine.receive_data(frame(TEXT, b"{}"), self.house.now) == []
        assert self.machine.data_to_send() == []
        assert len(self.peer.writes) == before


@pytest.fixture
def upgraded() -> Upgraded:
    return Upgraded()


# ------------------------------------------------------------------------------------------------------- the handshake


def test_the_connection_leaves_its_place(upgraded: Upgraded) -> None:
    assert upgraded.kinds == [Record, Upgrade]
    assert upgraded.peer.connection.phase is Phase.CLOSED
    assert upgraded.peer.connection.next_deadline() is None
    assert bytes(upgraded.peer.received).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert upgraded.house.records[0].status == 101


def test_messages_in_the_segment_of_the_handshake() -> None:
    upgraded = Upgraded(first=frame(TEXT, PROMPT.encode()) + frame(TEXT, b'{"prompt":"second"}')[:9])
    upgraded.say("a", StreamEnd())
    upgraded.socket.send_raw(frame(TEXT, b'{"prompt":"second"}')[9:])
    upgraded.say("b", StreamEnd())
    assert upgraded.socket.texts == ["a", DONE, "b", DONE]
    assert [job.request.prompt for job in upgraded.house.source.jobs] == ["hi", "second"]


def test_a_whole_life_in_the_segment_of_the_handshake() -> None:
    upgraded = Upgraded(first=frame(TEXT, PROMPT.encode()) + frame(CLOSE, b"\x03\xe8"))
    assert upgraded.socket.closed == (1000, "")
    assert upgraded.house.source.jobs == []
    assert upgraded.ends == ["cancelled"]
    upgraded.check_over()


def test_a_handshake_whose_answer_is_not_taken() -> None:
    house = Carriage("http").house()
    house.source.script = None
    client = HttpClient(house, OPTIONS)
    client.peer.room = 20
    head = [f"{name}: {value}" for name, value in HANDSHAKE]
    client.peer.receive("\r\n".join(["GET /ws/chat HTTP/1.1", *head, "", ""]).encode() + frame(TEXT, PROMPT.encode()))
    assert house.source.jobs == []  # nobody is known to listen
    client.peer.take()
    assert len(house.source.jobs) == 1
    house.say(house.source.jobs[0], "a")
    assert read_frames(bytes(client.peer.received).partition(b"\r\n\r\n")[2]) == [Frame(TEXT, b"a")]


# -------------------------------------------------------------------------------------------------- what peers do wrong

WRONG: Final[dict[str, tuple[bytes, int]]] = {
    "not UTF-8": (frame(TEXT, b'{"prompt":"\xff"}'), 1007),
    "not UTF-8 yet": (frame(TEXT, b"\xf5", final=False), 1007),
    "binary": (frame(BINARY, b"{}"), 1003),
    "too long": (frame(TEXT, b"", size=2001), 1009),
    "too long in pieces": (frame(TEXT, b" " * 1500, final=False) + frame(0, b" " * 600), 1009),
    "not masked": (frame(TEXT, b"{}", masked=False), 1002),
    "unknown opcode": (frame(0x3, b""), 1002),
    "reserved bit": (bytes([0xC1]) + frame(TEXT, b"{}")[1:], 1002),
    "a continuation of nothing": (frame(0, b"{}"), 1002),
    "a bad close code": (frame(CLOSE, b"\x03\xed"), 1002),
}


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(("data", "code"), WRONG.values(), ids=WRONG)
def test_a_fault_ends_it(data: bytes, code: int, running: bool) -> None:
    upgraded = Upgraded(ServiceOptions(max_body_bytes=2000))
    if running:
        upgraded.ask()
        upgraded.say("a")
    upgraded.socket.send_raw(data)
    assert upgraded.socket.closed is not None
    assert upgraded.socket.closed[0] == code
    assert upgraded.cancels == [1] * running
    assert upgraded.ends == ["cancelled"] * running
    upgraded.socket.send_raw(frame(TEXT, PROMPT.encode()))
    assert len(upgraded.house.source.jobs) == running
    upgraded.check_over()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_frames_cut_anywhere(size: int) -> None:
    upgraded = Upgraded()
    half = PROMPT.encode()[:5], PROMPT.encode()[5:]
    data = frame(TEXT, half[0], final=False) + frame(PING, b"there?") + frame(0, half[1])
    for at in range(0, len(data), size):
        upgraded.socket.send_raw(data[at : at + size])
    upgraded.say("a", StreamEnd())
    assert [one for one in upgraded.socket.frames if one.opcode == TEXT] == [Frame(TEXT, b"a"), Frame(TEXT, b"[DONE]")]
    assert upgraded.socket.frames[0] == Frame(PONG, b"there?")


def test_pings_are_answered_between_the_tokens(upgraded: Upgraded) -> None:
    upgraded.ask()
    upgraded.say("a")
    upgraded.socket.send_raw(frame(PING, b"1"))
    upgraded.say("b")
    assert upgraded.socket.frames == [Frame(TEXT, b"a"), Frame(PONG, b"1"), Frame(TEXT, b"b")]


def test_pongs_wait_while_the_peer_takes_nothing(upgraded: Upgraded) -> None:
    upgraded.ask()
    upgraded.socket.stall()
    upgraded.say("a")
    writes = len(upgraded.peer.writes)
    for number in range(1000):
        upgraded.peer.receive(frame(PING, b"%d" % number))
    assert len(upgraded.peer.writes) == writes
    upgraded.socket.read_on()
    assert upgraded.socket.frames == [
        Frame(TEXT, b"a"),
        *(Frame(PONG, b"%d" % n) for n in range(1000 - MAX_PONGS, 1000)),
    ]


# --------------------------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("how", ["close", "end", "lose"])
@pytest.mark.parametrize("stalled", [True, False])
def test_leaving_in_the_middle(upgraded: Upgraded, how: str, stalled: bool) -> None:
    upgraded.ask()
    upgraded.ask()
    upgraded.say("a")
    if stalled:
        upgraded.socket.stall()
        upgraded.say("b")
        upgraded.say("c")
    if how == "close":
        upgraded.socket.close(1001)
    else:
        getattr(upgraded.peer, how)()
    assert upgraded.cancels == [1]
    assert upgraded.ends == ["cancelled"]
    upgraded.say("late", StreamEnd())
    for _ in range(2):
        assert upgraded.machine.receive_eof(upgraded.house.now) == []
    if not stalled and how == "close":
        assert upgraded.socket.frames[-1] == Frame(CLOSE, b"\x03\xe9")
        assert upgraded.socket.texts == ["a"]
        assert upgraded.ends_with(Close)
    upgraded.check_over()


def test_losing_it_twice(upgraded: Upgraded) -> None:
    upgraded.ask()
    upgraded.peer.lose()
    assert upgraded.machine.lost(upgraded.house.now) == []
    assert upgraded.cancels == [1]
    upgraded.check_over()


def test_a_close_is_answered_once_and_the_transport_ends(upgraded: Upgraded) -> None:
    upgraded.socket.close()
    assert upgraded.socket.frames == [Frame(CLOSE, b"\x03\xe8")]
    assert upgraded.ends_with(Close)
    upgraded.check_over()


@pytest.mark.parametrize("stalled", [True, False])
def test_a_peer_that_has_closed_and_does_not_go_is_dropped(upgraded: Upgraded, stalled: bool) -> None:
    if stalled:
        upgraded.ask()
        upgraded.socket.stall()
        upgraded.say("a")
    upgraded.peer.receive(frame(CLOSE, b"\x03\xe8"))
    assert upgraded.ends_with(Close)
    assert upgraded.machine.next_deadline() is not None
    for _ in range(100):
        upgraded.house.advance(SECOND)
    assert upgraded.ends_with(Abort)
    assert upgraded.machine.next_deadline() is None
    upgraded.check_over()


def test_a_peer_that_does_not_answer_our_close_is_dropped(upgraded: Upgraded) -> None:
    upgraded.socket.polite = False
    upgraded.socket.say_bytes(b"x")
    assert upgraded.socket.closed == (1003, "prompts are text messages")
    assert Close not in upgraded.kinds
    for _ in range(4):
        upgraded.house.advance(SECOND)
        upgraded.peer.receive(frame(TEXT, PROMPT.encode()))  # what is said after our close changes nothing
    assert not upgraded.peer.ended
    for _ in range(4):
        upgraded.house.advance(SECOND)
    assert upgraded.ends_with(Abort)
    assert upgraded.house.source.jobs == []
    upgraded.check_over()


def test_nothing_follows_our_close(upgraded: Upgraded) -> None:
    upgraded.socket.polite = False
    upgraded.ask()
    upgraded.say("a")
    upgraded.say(StreamError(ErrorKind.SERVER, "It broke."))
    upgraded.peer.receive(frame(PING, b"x") + frame(TEXT, PROMPT.encode()))
    upgraded.house.advance(2 * SECOND)
    upgraded.socket.drain()
    assert upgraded.socket.frames[-1].opcode == CLOSE
    assert upgraded.socket.closed == (1011, "server_error: It broke.")
    upgraded.peer.receive(frame(CLOSE, b"\x03\xf3"))
    assert upgraded.ends_with(Close)
    upgraded.check_over()


# ------------------------------------------------------------------------------------------------------ pings and death


def test_a_silent_peer_is_pinged_and_lives_on(upgraded: Upgraded) -> None:
    upgraded.house.advance(15 * SECOND)
    for number in range(1, 6):
        assert upgraded.socket.pings == number
        upgraded.house.advance(20 * SECOND)
    assert not upgraded.peer.ended


@pytest.mark.parametrize("running", [True, False])
def test_a_peer_that_has_died_is_given_up(upgraded: Upgraded, running: bool) -> None:
    upgraded.socket.polite = False
    if running:
        upgraded.ask()
        upgraded.say("a")
    for _ in range(35):
        upgraded.house.advance(SECOND)
        if running:
            upgraded.say("b")
    assert upgraded.socket.pings == 1
    assert not upgraded.peer.ended
    for _ in range(3):
        upgraded.house.advance(SECOND // 2)
    assert upgraded.ends_with(Abort)
    assert upgraded.cancels == [1] * running
    assert upgraded.ends == ["cancelled"] * running
    upgraded.check_over()


def test_any_byte_is_a_sign_of_life(upgraded: Upgraded) -> None:
    upgraded.socket.polite = False
    data = frame(TEXT, PROMPT.encode())
    for at in range(len(data) - 1):
        upgraded.house.advance(14 * SECOND)
        upgraded.peer.receive(data[at : at + 1])
    assert upgraded.socket.pings == 0
    assert not upgraded.peer.ended


def test_while_our_own_loop_lags_nobody_is_given_up(upgraded: Upgraded) -> None:
    upgraded.socket.polite = False
    upgraded.house.advance(15 * SECOND)
    assert upgraded.socket.pings == 1
    for _ in range(5):
        upgraded.house.advance(300 * SECOND)
    assert not upgraded.peer.ended
    upgraded.peer.receive(frame(PONG, b""))
    upgraded.house.advance(20 * SECOND)
    assert upgraded.socket.pings == 2
    assert not upgraded.peer.ended


def test_a_peer_that_takes_some_now_and_then_lives(upgraded: Upgraded) -> None:
    upgraded.ask()
    upgraded.socket.stall()
    for _ in range(100):
        upgraded.say("x" * 30)
    for _ in range(10):
        upgraded.house.advance(39 * SECOND)
        upgraded.peer.take(3)
        assert not upgraded.peer.ended
    upgraded.socket.read_on()
    upgraded.say(StreamEnd())
    assert "".join(upgraded.socket.texts) == "x" * 3000 + DONE
    assert upgraded.socket.pings == 0
    assert upgraded.ends == ["finished"]


def test_a_peer_that_takes_nothing_of_the_last_answer_is_dropped(upgraded: Upgraded) -> None:
    upgraded.ask()
    upgraded.ask()
    upgraded.socket.stall()
    upgraded.say("a", StreamEnd())
    assert upgraded.ends == ["finished"]
    assert len(upgraded.house.source.jobs) == 1  # the next one waits until it is known that somebody listens
    upgraded.house.advance(40 * SECOND - 1)
    assert not upgraded.peer.ended
    upgraded.house.advance(1)
    assert upgraded.ends_with(Abort)
    assert len(upgraded.house.source.jobs) == 1
    upgraded.check_over()


def test_the_end_of_a_stall_comes_when_the_delivery_says_so() -> None:
    upgraded = Upgraded(ServiceOptions(delivery=DeliveryOptions(stall_ns=7 * SECOND)))
    upgraded.ask()
    upgraded.socket.stall()
    upgraded.say("a")
    upgraded.house.advance(7 * SECOND)
    assert upgraded.ends_with(Abort)
    assert upgraded.ends == ["slow_reader"]
    assert upgraded.cancels == [1]
    upgraded.check_over()


def test_our_close_waits_for_a_slow_reader(upgraded: Upgraded) -> None:
    upgraded.ask()
    upgraded.socket.stall()
    upgraded.say("a", StreamError(ErrorKind.SERVER, "It broke."))
    upgraded.house.advance(39 * SECOND)  # longer than anybody waits for the answer to a close
    assert not upgraded.peer.ended
    upgraded.socket.read_on()
    assert upgraded.socket.closed == (1011, "server_error: It broke.")
    upgraded.check_over()


# ---------------------------------------------------------------------------------------------------------------- drain


def test_draining_an_idle_one(upgraded: Upgraded) -> None:
    upgraded.house.drain()
    assert upgraded.socket.closed == (1001, "the server is shutting down")
    assert upgraded.ends_with(Close)
    upgraded.check_over()


def test_draining_while_an_answer_runs(upgraded: Upgraded) -> None:
    upgraded.ask()
    upgraded.ask()
    upgraded.say("a")
    upgraded.house.drain()
    assert upgraded.socket.is_open()
    upgraded.say("b", StreamEnd())
    assert upgraded.socket.texts == ["a", "b", DONE]
    assert upgraded.socket.closed == (1001, "the server is shutting down")
    assert len(upgraded.house.source.jobs) == 1
    assert upgraded.ends == ["finished"]
    upgraded.check_over()


def test_draining_twice_and_while_it_closes(upgraded: Upgraded) -> None:
    upgraded.socket.polite = False
    upgraded.socket.say_bytes(b"x")
    for _ in range(2):
        upgraded.house.drain()
    assert upgraded.socket.closed == (1003, "prompts are text messages")
    assert [one.opcode for one in upgraded.socket.frames] == [CLOSE]


@pytest.mark.parametrize("subprotocols", [(), OBJECTS], ids=["text", "objects"])
def test_the_end_of_all_streams(subprotocols: tuple[str, ...]) -> None:
    upgraded = Upgraded(subprotocols=subprotocols)
    upgraded.ask()
    upgraded.say("a")
    upgraded.house.drain()
    house = upgraded.house
    house.dispatcher.shut_down(house.service.shutting_down(), house.now)
    upgraded.socket.read()
    assert upgraded.socket.closed is not None
    assert upgraded.socket.closed[0] == 1001
    if subprotocols:
        assert json.loads(upgraded.socket.texts[1])["error"]["code"] == "server_shutdown"
        assert upgraded.socket.texts[2] == DONE
    else:
        assert upgraded.socket.texts == ["a"]
        assert upgraded.socket.closed[1].startswith("service_unavailable: ")
    assert upgraded.ends == ["failed"]
    upgraded.check_over()


def test_a_prompt_to_a_server_that_goes_down() -> None:
    upgraded = Upgraded()
    upgraded.house.service.draining = True  # before this peer has been told
    upgraded.ask()
    assert upgraded.socket.closed is not None
    assert upgraded.socket.closed[0] == 1001
    assert upgraded.ends == ["refused"]
    upgraded.check_over()


def test_messages_before_the_handshakes_end_are_our_own_fault(upgraded: Upgraded) -> None:
    conversation = type(upgraded.machine.conversation)(upgraded.house.service, upgraded.machine.conversation.head)
    with pytest.raises(LocalProtocolError):
        conversation.receive_text(PROMPT, 0)


def test_the_framing_says_a_whole_reply_as_a_message(upgraded: Upgraded) -> None:
    reply = upgraded.house.service.refuse_unread("no", 400)
    assert read_frames(FRAMING.reply(reply)) == [Frame(TEXT, reply.body)]
    assert FRAMING.end() == b""


# ---------------------------------------------------------------------------------------------------- anything, anyhow

messages = st.sampled_from(
    [
        PROMPT,
        PROMPT,
        PROMPT,
        '{"cancel":true}',
        "{}",
        "no",
        '{"prompt":"x","model":"nope"}',
        '{"prompt":"x","max_tokens":2}',
    ]
)
items = st.lists(
    st.sampled_from(["a", DONE, "é", "x" * 50, "", "\ud83d", StreamEnd(), StreamError(ErrorKind.SERVER, "no \ud83d")])
)
faults = st.sampled_from([data for data, _ in WRONG.values()])


class AnythingGoes(RuleBasedStateMachine):
    """One WebSocket beside another that asks for nothing, whatever peer, backend, clock and operator do.

    The client's frames are wsproto's, and it reads ours; it objects to what is not RFC 6455.
    """

    @initialize(
        subprotocols=st.sampled_from([(), OBJECTS]), running=st.integers(1, 2), budget=st.sampled_from([50, 100_000])
    )
    def begin(self, subprotocols: tuple[str, ...], running: int, budget: int) -> None:
        options = ServiceOptions(
            max_body_bytes=2000,
            max_running=running,
            max_waiting=1,
            max_prompts=2,
            delivery=DeliveryOptions(stall_ns=20 * SECOND, budget_bytes=budget),
        )
        self.house = Carriage("http").house(options=options)
        self.house.source.script = None
        table = PeerTable(PeerLimits(max_streams=2))
        share = table.enter("192.0.2.1")
        assert isinstance(share, PeerShare)
        self.share = share
        self.sockets = [
            ByteSocket(self.house, options=OPTIONS, subprotocols=subprotocols, share=share) for _ in range(2)
        ]
        self.asked = 0

    sockets: list[ByteSocket]

    def _of(self, which: int) -> ByteSocket:
        return self.sockets[which]

    @rule(which=st.integers(0, 1), text=messages)
    def say(self, which: int, text: str) -> None:
        self._of(which).say(text)

    @rule(which=st.integers(0, 1), text=messages, at=st.integers(0, 10))
    def say_in_pieces(self, which: int, text: str, at: int) -> None:
        socket = self._of(which)
        socket.send(TextMessage(text[:at], message_finished=False))
        socket.send(Ping(b"p"))
        socket.send(TextMessage(text[at:]))

    @rule(which=st.integers(0, 1), event=st.sampled_from([Ping(b"x"), Pong(b""), CloseConnection(1000)]))
    def control(self, which: int, event: Ping | Pong | CloseConnection) -> None:
        self._of(which).send(event)

    @rule(which=st.integers(0, 1), data=faults)
    def offend(self, which: int, data: bytes) -> None:
        socket = self._of(which)
        if socket.client.state is ConnectionState.OPEN:
            socket.send_raw(data)

    @rule(which=st.integers(0, 1), how=st.sampled_from(["end", "lose"]))
    def leave(self, which: int, how: str) -> None:
        peer = self._of(which).peer
        if not peer.aborted:
            getattr(peer, how)()

    @rule(which=st.integers(0, 1), room=st.sampled_from([0, 0, 1, 40, None]))
    def read(self, which: int, room: int | None) -> None:
        socket = self._of(which)
        if room == 0:
            socket.stall()
        else:
            socket.peer.take(room)
            socket.read()

    @rule(which=st.integers(0, 1), polite=st.booleans())
    def manners(self, which: int, polite: bool) -> None:
        self._of(which).polite = polite

    @precondition(lambda self: bool(self.house.source.jobs))
    @rule(step=items, back=st.integers(1, 3))
    def generate(self, step: list[str | StreamEnd | StreamError], back: int) -> None:
        jobs = self.house.source.jobs[-back:]
        self.house.dispatcher.deliver([(job.stream, step) for job in jobs], self.house.now)
        for socket in self.sockets:
            socket.read()

    @rule(seconds=st.sampled_from([1, 5, 16, 21, 45]))
    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.house.advance(SECOND)

    @rule(fault=st.sampled_from([None, None, RuntimeError("no")]))
    def break_backend(self, fault: Exception | None) -> None:
        self.house.source.fault = fault

    @rule()
    def drain(self) -> None:
        self.house.drain()

    @rule()
    def end_streams(self) -> None:
        self.house.drain()
        self.house.dispatcher.shut_down(self.house.service.shutting_down(), self.house.now)
        for socket in self.sockets:
            socket.read()

    @invariant()
    def every_place_is_accounted_for(self) -> None:
        admission = self.house.service.admission
        running = sum(machine.conversation._exchange is not None for machine in self._machines())
        assert admission.running + admission.waiting == self.house.dispatcher.streams
        assert self.house.dispatcher.streams <= running == self.share.streams

    def _machines(self) -> list[UpgradedConnection]:
        machines = [socket.peer.machine for socket in self.sockets]
        return [machine for machine in machines if isinstance(machine, UpgradedConnection)]

    @invariant()
    def nobody_runs_for_one_who_is_gone(self) -> None:
        for socket in self.sockets:
            if socket.peer.aborted:
                assert socket.peer.machine.next_deadline() is None
                assert socket.peer.machine.settle(self.house.now) == []

    @invariant()
    def cancels_are_said_once(self) -> None:
        assert all(job.cancels <= 1 for job in self.house.source.jobs)

    def teardown(self) -> None:
        for socket in self.sockets:
            socket.polite = True
            socket.read_on()
        self.house.drain()
        self.house.dispatcher.shut_down(self.house.service.shutting_down(), self.house.now)
        for socket in self.sockets:
            socket.read_on()
        for _ in range(60):
            self.house.advance(SECOND)
        admission = self.house.service.admission
        assert (self.house.dispatcher.streams, admission.running, admission.waiting, self.share.streams) == (0, 0, 0, 0)
        streams = [record.stream_id for record in self.house.records if record.stream_id]
        assert len(streams) == len(set(streams)) >= len({job.stream for job in self.house.source.jobs})
        for socket in self.sockets:
            assert socket.peer.ended
            if not socket.peer.aborted:
                self._look_at(socket)

    def _look_at(self, socket: ByteSocket) -> None:
        """All that a client has read to its end: each answer with one end, and nothing behind the close frame."""
        frames = socket.frames
        texts = [one.payload for one in frames if one.opcode == TEXT]
        assert b"" not in texts
        ends = sum(record.end in {"finished", "failed", "cancelled", "refused"} for record in self.house.records)
        assert texts.count(DONE.encode()) <= ends
        assert all(one.opcode in {TEXT, PING, PONG, CLOSE} for one in frames)


TestAnythingGoes = AnythingGoes.TestCase
TestAnythingGoes.settings = settings(max_examples=200, stateful_step_count=40)
