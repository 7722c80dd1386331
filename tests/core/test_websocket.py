"""An open WebSocket: frames against wsproto's both ways, every split, every close code, every limit, no wrong byte taken."""

from __future__ import annotations

import sys
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.strategies import splits, texts
from tests.websocket_frames import BINARY, CLOSE, CONTINUATION, KEY, PING, PONG, TEXT, frame, unframe
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message
from wsproto.events import Ping as WsprotoPing
from wsproto.events import TextMessage as WsprotoText
from wsproto.frame_protocol import XorMaskerSimple

from tokenwire.core import _ws_frames
from tokenwire.core.errors import LocalProtocolError
from tokenwire.core.framing import Template
from tokenwire.core.websocket import (
    MAX_PONGS,
    BinaryMessage,
    CloseCode,
    Closed,
    Deflate,
    Ping,
    Pong,
    Role,
    State,
    TextMessage,
    WebSocketConnection,
    WebSocketEvent,
    fold_websocket,
    text_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BOUNDARIES = [0, 1, 125, 126, 4095, 4096, 65535, 65536]
at_boundaries = pytest.mark.parametrize("size", BOUNDARIES)
ALLOWED_CODES = [*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999]
FORBIDDEN_CODES = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]


def server(max_message_bytes: int = 1 << 20, max_fragments: int = 4096) -> WebSocketConnection:
    return WebSocketConnection(Role.SERVER, max_message_bytes=max_message_bytes, max_fragments=max_fragments)


def client(key: bytes = KEY) -> WebSocketConnection:
    return WebSocketConnection(Role.CLIENT, mask=lambda: key)


def is_in(state: State, connection: WebSocketConnection) -> bool:
    """Compare by a call, for a type checker takes a property for a constant."""
    return connection.state is state


def fixed_key(size: int) -> bytes:
    """Stand in for os.urandom."""
    return KEY[:size]


def close_frame(code: int, reason: bytes) -> bytes:
    return frame(code.to_bytes(2, "big") + reason, CLOSE)


def fed(connection: WebSocketConnection, pieces: Iterable[bytes]) -> list[WebSocketEvent]:
    return [event for piece in pieces for event in connection.receive_data(piece)]


def closed_by(connection: WebSocketConnection) -> tuple[int, int]:
    """Fetch our close frame; give its code, and how many frames stood before it."""
    frames = unframe(b"".join(connection.data_to_send()))
    assert frames[-1][:2] == (0x80, CLOSE)
    return int.from_bytes(frames[-1][2][:2], "big"), len(frames) - 1


def refused(wire: bytes, **limits: int) -> tuple[Closed, list[WebSocketEvent]]:
    """Feed a server what it must refuse, whole and byte by byte; give Closed and what came before it."""
    outcomes: list[tuple[list[WebSocketEvent], int]] = []
    for pieces in ([wire], [wire[at : at + 1] for at in range(len(wire))]):
        connection = server(**limits)
        events = fed(connection, pieces)
        assert isinstance(events[-1], Closed)
        assert is_in(State.OPEN, connection)
        code, _ = closed_by(connection)
        assert code == events[-1].code
        assert is_in(State.CLOSED, connection)
        assert connection.receive_data(frame(b"more")) == []
        assert connection.receive_eof() == []
        outcomes.append((events, code))
    assert outcomes[0] == outcomes[1]
    *before, closed = outcomes[0][0]
    assert isinstance(closed, Closed)
    assert closed.fault
    assert not closed.clean
    return closed, before


# ------------------------------------------------------------------------------------------- the examples of RFC 6455


def test_examples_of_rfc_6455_section_5_7() -> None:
    hello = bytes([0x81, 0x05, 0x48, 0x65, 0x6C, 0x6C, 0x6F])
    masked = bytes([0x81, 0x85, 0x37, 0xFA, 0x21, 0x3D, 0x7F, 0x9F, 0x4D, 0x51, 0x58])
    assert server().send_text("Hello") == hello
    assert client().send_text("Hello") == masked
    assert client().receive_data(hello) == [TextMessage("Hello")]
    assert server().receive_data(masked) == [TextMessage("Hello")]
    fragments = bytes([0x01, 0x03, 0x48, 0x65, 0x6C]), bytes([0x80, 0x02, 0x6C, 0x6F])
    assert fed(client(), fragments) == [TextMessage("Hello")]
    ping = bytes([0x89, 0x05, 0x48, 0x65, 0x6C, 0x6C, 0x6F])
    assert server().send_ping(b"Hello") == ping
    connection = client()
    assert connection.receive_data(ping) == [Ping(b"Hello")]
    pong = bytes([0x8A, 0x85, 0x37, 0xFA, 0x21, 0x3D, 0x7F, 0x9F, 0x4D, 0x51, 0x58])
    assert connection.data_to_send() == [pong]
    assert server().receive_data(pong) == [Pong(b"Hello")]
    for size, head in ((256, b"\x82\x7e\x01\x00"), (65536, b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00")):
        assert server().send_binary(bytes(size)) == head + bytes(size)
        assert client().receive_data(head + bytes(size)) == [BinaryMessage(bytes(size))]


# ------------------------------------------------------------------------------------------------- wsproto as oracle


@at_boundaries
def test_frames_are_wsprotos_byte_for_byte(size: int) -> None:
    text, data = "t" * size, b"b" * size
    peer = Connection(ConnectionType.SERVER)
    own = server()
    assert own.send_text(text) == peer.send(WsprotoText(text))
    assert own.send_utf8(text.encode()) == peer.send(WsprotoText(text))
    assert own.send_binary(data) == peer.send(BytesMessage(data))
    assert text_header(size) + data == own.send_utf8(data)
    template = Template(b"", b"", str.encode)
    assert fold_websocket(template).encode(text, 1) == own.send_text(text)
    assert own.fold(template).encode(text, 1) == own.send_text(text)


@at_boundaries
def test_a_clients_frames_are_wsprotos_but_for_the_key(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", fixed_key)
    peer = Connection(ConnectionType.CLIENT)
    assert client().send_binary(b"b" * size) == peer.send(BytesMessage(b"b" * size))
    assert client().fold(Template(b"<", b">", str.encode)).encode("t" * size, 1) == peer.send(
        WsprotoText(f"<{'t' * size}>")
    )


messages = st.one_of(texts, st.binary(max_size=300), st.sampled_from(BOUNDARIES).map(lambda size: "é" * (size // 2)))


@given(st.data(), st.lists(messages, max_size=5), st.booleans())
def test_wsproto_reads_what_we_write(data: st.DataObject, sent: list[str | bytes], from_client: bool) -> None:
    ours = client(data.draw(st.binary(min_size=4, max_size=4))) if from_client else server()
    peer = Connection(ConnectionType.SERVER if from_client else ConnectionType.CLIENT)
    wire = b"".join(ours.send_text(one) if isinstance(one, str) else ours.send_binary(one) for one in sent)
    read: list[str | bytes] = []
    parts: list[bytes] = []
    for piece in data.draw(splits(wire)):
        peer.receive_data(piece)
        for event in peer.events():
            is_text = isinstance(event, WsprotoText)
            if isinstance(event, WsprotoText):
                parts.append(event.data.encode())
            if isinstance(event, BytesMessage):
                parts.append(bytes(event.data))
            if isinstance(event, Message) and event.message_finished:
                whole = b"".join(parts)
                read.append(whole.decode() if is_text else whole)
                parts.clear()
    assert read == sent


@given(st.data(), st.lists(st.tuples(messages, st.integers(1, 4)), max_size=5), st.booleans())
def test_we_read_what_wsproto_writes(
    data: st.DataObject, sent: list[tuple[str | bytes, int]], from_client: bool
) -> None:
    peer = Connection(ConnectionType.CLIENT if from_client else ConnectionType.SERVER)
    wire = bytearray()
    for message, count in sent:
        edges = [0, *(len(message) * at // count for at in range(1, count)), len(message)]
        for number, (begin, end) in enumerate(pairwise(edges), 1):
            part = message[begin:end]
            event = WsprotoText if isinstance(part, str) else BytesMessage
            wire += peer.send(event(part, message_finished=number == count))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            wire += peer.send(WsprotoPing(b"between"))
    ours = server() if from_client else client()
    events = fed(ours, data.draw(splits(bytes(wire))))
    read = [event for event in events if not isinstance(event, Ping)]
    assert read == [TextMessage(one) if isinstance(one, str) else BinaryMessage(one) for one, _ in sent]
    assert len(events) - len(read) == sum(count for _, count in sent)


@given(st.binary(max_size=1200), st.binary(min_size=4, max_size=4))
@example(bytes(range(256)) * 256, b"\x01\x02\x03\x04")
@example(b"a" * 450, KEY)
@example(b"a" * 451, KEY)
def test_masks_are_wsprotos(data: bytes, key: bytes) -> None:
    masked = _ws_frames.apply_mask(data, key)
    assert masked == XorMaskerSimple(key).process(bytearray(data))
    assert _ws_frames.apply_mask(bytes(masked), key) == data


# --------------------------------------------------------------------------------------------------------- receiving

frames = st.one_of(
    st.builds(frame, texts.map(str.encode), st.sampled_from([TEXT, BINARY, CONTINUATION]), fin=st.booleans()),
    st.builds(
        frame, st.binary(max_size=4), st.integers(0, 15), fin=st.booleans(), rsv=st.sampled_from([0, 0, 0, 1, 4])
    ),
    st.builds(frame, st.binary(max_size=130), st.sampled_from([PING, PONG])),
    st.builds(close_frame, st.integers(995, 1016), st.binary()),
    st.binary(max_size=8),
    st.builds(frame, st.binary(max_size=3), st.just(TEXT), width=st.sampled_from([2, 8]), length=st.just(70000)),
)


@given(st.data(), st.lists(frames, max_size=8).map(b"".join))
def test_no_split_changes_anything(data: st.DataObject, wire: bytes) -> None:
    cuts = [[wire] if wire else [], [wire[at : at + 1] for at in range(len(wire))], data.draw(splits(wire))]
    outcomes: list[object] = []
    for pieces in cuts:
        connection = server(max_message_bytes=40, max_fragments=3)
        events = fed(connection, pieces)
        sent = connection.data_to_send()
        outcomes.append((events, connection.receive_eof(), sent[-MAX_PONGS:], connection.state))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    events = fed(server(max_message_bytes=40, max_fragments=3), cuts[0])
    assert all(not isinstance(event, Closed) for event in events[:-1])


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 1000, 65535, 65536])
def test_every_first_read_of_a_frame_gives_the_same_message(size: int) -> None:
    """The way of the usual read must not take the first bytes of a longer frame for a whole one."""
    wire = frame(b"a" * size)
    for cut in range(min(len(wire), 300)):
        assert fed(server(), [wire[:cut], wire[cut:]]) == [TextMessage("a" * size)]
    assert refused(frame(b"a" * 118, width=2, length=1) + frame())[0].code == CloseCode.PROTOCOL_ERROR
    assert refused(frame(b"a" * 125, width=2))[0].code == CloseCode.PROTOCOL_ERROR


def test_empty_bytes_mean_nothing_and_the_end_of_input_is_told_once() -> None:
    connection = server()
    assert connection.receive_data(b"") == []
    assert connection.receive_eof() == [Closed(CloseCode.ABNORMAL, "", clean=False)]
    assert is_in(State.CLOSED, connection)
    assert connection.receive_eof() == []
    assert connection.receive_data(frame(b"late")) == []
    assert connection.data_to_send() == []


def test_a_message_in_fragments_with_control_frames_between_them() -> None:
    wire = (
        frame(b"\xe2\x82", TEXT, fin=False)
        + frame(b"p", PING)
        + frame(b"", CONTINUATION, fin=False)
        + frame(b"q", PONG)
        + frame(b"\xac!", CONTINUATION)
        + frame(b"\x01", BINARY, fin=False)
        + frame(b"\x02", CONTINUATION)
    )
    connection = server()
    assert connection.receive_data(wire) == [Ping(b"p"), Pong(b"q"), TextMessage("€!"), BinaryMessage(b"\x01\x02")]
    assert unframe(b"".join(connection.data_to_send())) == [(0x80, PONG, b"p")]


def test_pongs_leave_before_the_next_message_and_a_flood_costs_a_bounded_number() -> None:
    connection = server()
    connection.receive_data(frame(b"1", PING) + frame(b"2", PING))
    assert unframe(connection.send_text("answer")) == [(0x80, PONG, b"1"), (0x80, PONG, b"2"), (0x80, TEXT, b"answer")]
    assert connection.data_to_send() == []
    assert connection.send_text("x") == b"\x81\x01x"
    assert len(connection.receive_data(frame(b"", PING) * 10_000 + frame(b"last", PING))) == 10_001
    pongs = unframe(b"".join(connection.data_to_send()))
    assert len(pongs) == MAX_PONGS
    assert pongs[-1] == (0x80, PONG, b"last")


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (frame(b"a", key=None), "not masked"),
        (frame(b"a", rsv=4), "reserved bit"),  # T36: compressed without negotiation
        (frame(b"a", rsv=2), "reserved bit"),
        (frame(b"a", rsv=1), "reserved bit"),
        (frame(b"a", PING, rsv=4), "reserved bit"),
        (frame(b"a", 3), "reserved opcode"),
        (frame(b"a", 15), "reserved opcode"),
        (frame(b"a", PING, fin=False), "fragmented control"),
        (frame(b"a" * 126, PING), "long control"),
        (frame(b"a" * 126, CLOSE), "long control"),
        (frame(b"a", CONTINUATION), "continuation of nothing"),
        (frame(b"a", fin=False) + frame(b"b"), "message inside a message"),
        (frame(b"a", width=2), "shortest form"),
        (frame(b"a" * 125, width=2), "shortest form"),
        (frame(b"a" * 126, width=8), "shortest form"),
        (frame(b"a" * 65535, width=8), "shortest form"),
        (frame(b"", width=8, length=1 << 63), "negative"),  # T36: the 64-bit length
        (frame(b"", width=8, length=(1 << 64) - 1), "negative"),
        (frame(b"\x03", CLOSE), "close code"),
    ],
)
def test_a_broken_rule_closes_with_1002(wire: bytes, reason: str) -> None:
    closed, before = refused(frame(b"before") + wire)
    assert closed.code == CloseCode.PROTOCOL_ERROR
    assert reason in closed.reason
    assert before == [TextMessage("before")]


def test_a_server_must_not_mask() -> None:
    connection = client()
    (closed,) = connection.receive_data(frame(b"a"))
    assert isinstance(closed, Closed)
    assert (closed.code, closed.fault) == (CloseCode.PROTOCOL_ERROR, True)
    assert closed_by(connection)[0] == CloseCode.PROTOCOL_ERROR


BAD_UTF8 = [
    b"\xff",
    b"\x80",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x28\xa1",
    b"\xf8\x88\x80\x80\x80",
]


@pytest.mark.parametrize("bad", BAD_UTF8)
def test_bad_utf8_closes_with_1007_at_its_first_wrong_byte(bad: bytes) -> None:
    assert refused(frame(b"ok" + bad + b"ok"))[0].code == CloseCode.INVALID_DATA
    assert refused(frame(b"\x03\xe8" + bad, CLOSE))[0].code == CloseCode.INVALID_DATA
    # In the middle of a frame that goes on, and over a cut between two fragments.
    assert refused(frame(b"ok" + bad, length=50))[0].code == CloseCode.INVALID_DATA
    split = frame(b"ok" + bad[:1], TEXT, fin=False) + frame(bad[1:] + b"ok", CONTINUATION)
    assert refused(split)[0].code == CloseCode.INVALID_DATA


@pytest.mark.parametrize("cut", [b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98"])
def test_a_character_that_a_message_cuts_is_bad_utf8(cut: bytes) -> None:
    assert refused(frame(b"ok" + cut))[0].code == CloseCode.INVALID_DATA
    fragments = frame(b"ok", TEXT, fin=False) + frame(cut, CONTINUATION, fin=False) + frame(b"", CONTINUATION)
    assert refused(fragments)[0].code == CloseCode.INVALID_DATA


# ------------------------------------------------------------------------------------------------------------ limits


def test_a_message_may_have_just_the_greatest_size_and_no_byte_more() -> None:
    exact = frame(b"a" * 40, fin=False) + frame(b"b" * 60, CONTINUATION)
    assert server(100).receive_data(exact) == [TextMessage("a" * 40 + "b" * 60)]
    assert server(100).receive_data(frame(b"a" * 100)) == [TextMessage("a" * 100)]
    over = frame(b"a" * 40, fin=False) + frame(b"b" * 61, CONTINUATION)
    assert refused(over, max_message_bytes=100)[0].code == CloseCode.MESSAGE_TOO_BIG
    assert refused(frame(b"a" * 101), max_message_bytes=100)[0].code == CloseCode.MESSAGE_TOO_BIG


@pytest.mark.parametrize("length", [(1 << 20) + 1, (1 << 63) - 1])
def test_a_long_frame_is_refused_by_its_header_alone(length: int) -> None:
    closed, _ = refused(frame(b"", BINARY, width=8, length=length))
    assert closed.code == CloseCode.MESSAGE_TOO_BIG
    assert "max_message_bytes=1048576" in closed.reason


@pytest.mark.parametrize("payload", [b"", b"a"])
def test_a_flood_of_fragments_ends_at_the_limit(payload: bytes) -> None:
    """T36: undici counted bytes only, and empty fragments have none."""
    allowed = frame(b"", fin=False) + frame(payload, CONTINUATION, fin=False) * 8 + frame(b"", CONTINUATION)
    assert server(max_fragments=10).receive_data(allowed) == [TextMessage(payload.decode() * 8)]
    flood = frame(b"", fin=False) + frame(payload, CONTINUATION, fin=False) * 10
    closed, _ = refused(flood, max_fragments=10)
    assert closed.code == CloseCode.MESSAGE_TOO_BIG
    assert "max_fragments=10" in closed.reason


def test_what_a_peer_makes_us_hold_is_bounded_by_the_limits() -> None:
    """T36, in memory: a message that comes byte by byte costs its text and no object a byte."""
    connection = server()
    wire = frame(b"a" * 200_000, length=1_000_000)
    tracemalloc.start()
    try:
        for at in range(0, len(wire), 7):
            connection.receive_data(wire[at : at + 7])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 260_000


# ----------------------------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize("code", ALLOWED_CODES)
def test_each_close_code_is_sent_read_and_answered(code: int) -> None:
    ours, peer = server(), client()
    assert peer.receive_data(ours.send_close(code, "why ✓")) == [Closed(code, "why ✓", clean=True)]
    assert is_in(State.CLOSING, ours)
    assert is_in(State.OPEN, peer)
    (answer,) = peer.data_to_send()
    assert unframe(answer) == [(0x80, CLOSE, code.to_bytes(2, "big"))]
    assert is_in(State.CLOSED, peer)
    assert ours.receive_data(answer) == [Closed(code, "", clean=True)]
    assert is_in(State.CLOSED, ours)
    assert ours.data_to_send() == []
    if code == CloseCode.BAD_GATEWAY:
        return  # registered after wsproto's list was made
    oracle = Connection(ConnectionType.CLIENT)
    oracle.receive_data(server().send_close(code, "why"))
    assert list(oracle.events()) == [CloseConnection(code=code, reason="why")]


@pytest.mark.parametrize("code", FORBIDDEN_CODES)
def test_no_other_close_code_is_sent_or_taken(code: int) -> None:
    connection = server()
    with pytest.raises(ValueError, match="close code"):
        connection.send_close(code, "reason")
    assert is_in(State.OPEN, connection)
    assert refused(frame(code.to_bytes(2, "big"), CLOSE))[0].code == CloseCode.PROTOCOL_ERROR


def test_a_close_frame_without_code_is_answered_without_code() -> None:
    connection = server()
    assert connection.receive_data(frame(b"", CLOSE)) == [Closed(CloseCode.NO_STATUS, "", clean=True)]
    assert connection.data_to_send() == [b"\x88\x00"]
    assert server().send_close(CloseCode.NO_STATUS) == b"\x88\x00"


def test_a_long_reason_is_cut_between_two_characters() -> None:
    ((_, _, payload),) = unframe(server().send_close(1011, "€" * 100))
    assert payload == b"\x03\xf3" + "€".encode() * 41
    assert unframe(server().send_close(1011, "a\ud83d\ude00\ud800"))[0][2][2:].decode() == "a😀\ufffd"


def test_what_came_before_the_close_may_still_be_answered() -> None:
    connection = server()
    events = connection.receive_data(
        frame(b"p", PING) + frame(b"question") + frame(b"\x03\xe8", CLOSE) + frame(b"late")
    )
    assert events == [Ping(b"p"), TextMessage("question"), Closed(1000, "", clean=True)]
    assert unframe(connection.send_text("answer")) == [(0x80, PONG, b"p"), (0x80, TEXT, b"answer")]
    assert connection.data_to_send() == [b"\x88\x02\x03\xe8"]
    with pytest.raises(LocalProtocolError):
        connection.send_text("more")
    assert connection.data_to_send() == []


def test_a_close_may_be_answered_with_another_code() -> None:
    connection = server()
    connection.receive_data(frame(b"p", PING) + frame(b"\x03\xe8", CLOSE))
    assert unframe(connection.send_close(4000)) == [(0x80, PONG, b"p"), (0x80, CLOSE, b"\x0f\xa0")]
    assert is_in(State.CLOSED, connection)
    assert connection.data_to_send() == []


def test_while_closing_messages_still_come_and_pings_are_not_answered() -> None:
    connection = server()
    connection.send_close()
    assert connection.receive_data(frame(b"p", PING) + frame(b"late")) == [Ping(b"p"), TextMessage("late")]
    assert connection.data_to_send() == []
    assert connection.receive_data(frame(b"\xff"))[0] == Closed(1007, "text that is not UTF-8", clean=False, fault=True)
    assert connection.data_to_send() == []
    assert is_in(State.CLOSED, connection)


SENDS: list[Callable[[WebSocketConnection], bytes]] = [
    lambda connection: connection.send_text("a"),
    lambda connection: connection.send_utf8(b"a"),
    lambda connection: connection.send_binary(b"a"),
    lambda connection: connection.send_ping(),
    lambda connection: connection.send_pong(),
    lambda connection: connection.send_close(),
    lambda connection: connection.fold(Template(b"", b"", str.encode)).encode("a", 1),
]


@pytest.mark.parametrize("send", SENDS[:6])
@pytest.mark.parametrize("deflate", [None, Deflate()])
def test_nothing_is_sent_when_the_state_is_not_open(
    send: Callable[[WebSocketConnection], bytes], deflate: Deflate | None
) -> None:
    connection = WebSocketConnection(Role.SERVER, deflate=deflate)
    assert send(connection)
    if is_in(State.OPEN, connection):
        connection.send_close()
    with pytest.raises(LocalProtocolError, match="CLOSING"):
        send(connection)
    connection.receive_data(frame(b"", CLOSE))
    with pytest.raises(LocalProtocolError, match="CLOSED"):
        send(connection)


def test_arguments_that_cannot_be_sent_are_refused_and_change_nothing() -> None:
    connection = server()
    with pytest.raises(ValueError, match="125"):
        connection.send_ping(b"a" * 126)
    with pytest.raises(UnicodeEncodeError):
        connection.send_text("\ud800")
    with pytest.raises(ValueError, match="code"):
        connection.send_close(CloseCode.NO_STATUS, "a reason")
    assert connection.send_ping(b"a" * 125)[:2] == b"\x89\x7d"
    assert is_in(State.OPEN, connection)
    assert connection.role is Role.SERVER
    with pytest.raises(ValueError, match="mask"):
        WebSocketConnection(Role.CLIENT)


def test_each_client_frame_has_its_own_key() -> None:
    keys = iter([b"\x01\x02\x03\x04", b"\x05\x06\x07\x08", b"\x09\x0a\x0b\x0c"])
    connection = WebSocketConnection(Role.CLIENT, mask=lambda: next(keys))
    wire = connection.send_text("a") + connection.send_ping() + connection.send_close()
    assert [wire[2:6], wire[9:13], wire[15:19]] == [b"\x01\x02\x03\x04", b"\x05\x06\x07\x08", b"\x09\x0a\x0b\x0c"]
    assert connection.role is Role.CLIENT


def test_an_idle_connection_is_small() -> None:
    """Counted, for a server without compression that has received and sent; the promise is 6 KiB."""
    count = 200
    warm = server()
    connections: list[WebSocketConnection] = []
    wires = [frame(b"hello"), frame(b"", PING), frame(b"a", fin=False) + frame(b"b", CONTINUATION)]
    fed(warm, wires)
    tracemalloc.start()
    try:
        for _ in range(count):
            connection = server()
            fed(connection, wires)
            connection.data_to_send()
            connection.send_text("hello")
            connections.append(connection)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / count < 1024
    assert sys.getsizeof(connections[0]) < 256
