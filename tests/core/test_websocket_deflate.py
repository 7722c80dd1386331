"""permessage-deflate: the examples of RFC 7692, wsproto and zlib as oracles, negotiation, and every kind of bomb (T36)."""

from __future__ import annotations

import tracemalloc
import zlib
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.strategies import splits, texts
from tests.websocket_frames import BINARY, CONTINUATION, PING, TEXT, frame, unframe
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage
from wsproto.events import TextMessage as WsprotoText
from wsproto.extensions import PerMessageDeflate

from tokenwire.core import _ws_deflate
from tokenwire.core.contracts import RequestHead
from tokenwire.core.errors import RemoteProtocolError
from tokenwire.core.framing import Template
from tokenwire.core.websocket import (
    BinaryMessage,
    CloseCode,
    Closed,
    Deflate,
    DeflateOptions,
    Ping,
    Role,
    TextMessage,
    UpgradeRefused,
    WebSocketConnection,
    WebSocketEvent,
    accept_upgrade,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

AGREED = Deflate()
FRESH = Deflate(client_no_context_takeover=True, server_no_context_takeover=True)
TAIL = b"\x00\x00\xff\xff"


def server(deflate: Deflate = AGREED, *, max_message_bytes: int = 1 << 20) -> WebSocketConnection:
    return WebSocketConnection(Role.SERVER, deflate=deflate, max_message_bytes=max_message_bytes)


def client(deflate: Deflate = AGREED) -> WebSocketConnection:
    return WebSocketConnection(Role.CLIENT, deflate=deflate, mask=lambda: b"\x01\x02\x03\x04")


def compressed(data: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)


def stored(data: bytes, *, last: bool = False) -> bytes:
    """Make a block without compression (RFC 1951, 3.2.4)."""
    size = len(data).to_bytes(2, "little")
    return bytes([last, *size, *(byte ^ 0xFF for byte in size)]) + data


def packed(data: bytes, opcode: int = TEXT, *, fin: bool = True) -> bytes:
    """Frame a payload that is deflated already."""
    return frame(data, opcode, rsv=4, fin=fin)


def fed(connection: WebSocketConnection, pieces: Iterable[bytes]) -> list[WebSocketEvent]:
    return [event for piece in pieces for event in connection.receive_data(piece)]


def refused(wire: bytes, deflate: Deflate = AGREED, *, max_message_bytes: int = 1 << 20) -> Closed:
    """Feed what must be refused, whole and byte by byte; give the last event."""
    outcomes: list[list[WebSocketEvent]] = []
    for size in (len(wire), 1):
        connection = server(deflate, max_message_bytes=max_message_bytes)
        outcomes.append(fed(connection, [wire[at : at + size] for at in range(0, len(wire), size)]))
    assert outcomes[0] == outcomes[1]
    closed = outcomes[0][-1]
    assert isinstance(closed, Closed)
    assert closed.fault
    return closed


# ------------------------------------------------------------------------------------------- the examples of RFC 7692


def test_examples_of_rfc_7692_section_7_2_3() -> None:
    hello = bytes([0xF2, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00])
    assert server().receive_data(packed(hello)) == [TextMessage("Hello")]
    assert unframe(server().send_text("Hello")) == [(0xC0, TEXT, hello)]
    fragments = packed(hello[:3], fin=False) + frame(hello[3:], CONTINUATION)
    assert server().receive_data(fragments) == [TextMessage("Hello")]
    # 7.2.3.2: the second message reaches back into the first.
    again = bytes([0xF2, 0x00, 0x11, 0x00, 0x00])
    assert server().receive_data(packed(hello) + packed(again)) == [TextMessage("Hello")] * 2
    sender = server()
    assert [unframe(sender.send_text("Hello"))[0][2] for _ in range(2)] == [hello, again]
    assert refused(packed(hello) + packed(again), FRESH).code == CloseCode.INVALID_DATA
    # 7.2.3.3: a block without compression. 7.2.3.4: a block that is the last. 7.2.3.5: two blocks.
    stored = bytes([0x00, 0x05, 0x00, 0xFA, 0xFF, 0x48, 0x65, 0x6C, 0x6C, 0x6F, 0x00])
    final = bytes([0xF3, 0x48, 0xCD, 0xC9, 0xC9, 0x07, 0x00, 0x00])
    blocks = bytes([0xF2, 0x48, 0x05, 0x00, 0x00, 0x00, 0xFF, 0xFF, 0xCA, 0xC9, 0xC9, 0x07, 0x00])
    for data in (stored, final, blocks):
        assert server().receive_data(packed(data)) == [TextMessage("Hello")]
        assert server().receive_data(packed(data) + packed(hello)) == [TextMessage("Hello")] * 2


def test_empty_and_uncompressed_messages() -> None:
    assert server().receive_data(packed(b"\x00")) == [TextMessage("")]
    assert server().receive_data(packed(b"")) == [TextMessage("")]
    mixed = frame(b"plain") + packed(compressed(b"packed")) + frame(b"plain", BINARY)
    assert server().receive_data(mixed) == [TextMessage("plain"), TextMessage("packed"), BinaryMessage(b"plain")]
    assert client().receive_data(server().send_text("")) == [TextMessage("")]


def test_control_frames_are_never_compressed() -> None:
    connection = server()
    data = compressed(b"in two")
    wire = packed(data[:2], fin=False) + frame(b"p", PING) + frame(data[2:], CONTINUATION)
    assert connection.receive_data(wire) == [Ping(b"p"), TextMessage("in two")]
    assert unframe(connection.send_ping(b"q"))[-1] == (0x80, PING, b"q")


# ------------------------------------------------------------------------------------------------- wsproto as oracle

agreements = st.builds(
    Deflate,
    server_max_window_bits=st.integers(9, 15),
    client_max_window_bits=st.integers(9, 15),
    server_no_context_takeover=st.booleans(),
    client_no_context_takeover=st.booleans(),
    level=st.integers(1, 9),
    memory_level=st.integers(1, 9),
)
bulk = st.integers(0, 40_000).map(lambda size: "".join(map(str, range(size)))[:size])


def oracle(deflate: Deflate, side: ConnectionType) -> Connection:
    extension = PerMessageDeflate()
    parameters = (
        f"permessage-deflate; server_max_window_bits={deflate.server_max_window_bits}"
        f"; client_max_window_bits={deflate.client_max_window_bits}"
    )
    parameters += "; server_no_context_takeover" if deflate.server_no_context_takeover else ""
    parameters += "; client_no_context_takeover" if deflate.client_no_context_takeover else ""
    extension.finalize(parameters)
    return Connection(side, [extension])


@given(st.data(), agreements, st.lists(texts | bulk, max_size=4), st.booleans())
def test_wsproto_inflates_what_we_deflate(
    data: st.DataObject, deflate: Deflate, sent: list[str], from_client: bool
) -> None:
    ours = client(deflate) if from_client else server(deflate)
    peer = oracle(deflate, ConnectionType.SERVER if from_client else ConnectionType.CLIENT)
    read: list[str] = []
    parts: list[str] = []
    for piece in data.draw(splits(b"".join(map(ours.send_text, sent)))):
        peer.receive_data(piece)
        for event in peer.events():
            assert isinstance(event, WsprotoText)
            parts.append(event.data)
            if event.message_finished:
                read.append("".join(parts))
                parts.clear()
    assert read == sent


@given(st.data(), agreements, st.lists(texts | bulk | st.binary(max_size=40), max_size=4), st.booleans())
def test_we_inflate_what_wsproto_deflates(
    data: st.DataObject, deflate: Deflate, sent: list[str | bytes], from_client: bool
) -> None:
    peer = oracle(deflate, ConnectionType.CLIENT if from_client else ConnectionType.SERVER)
    wire = b""
    for one in sent:
        half = len(one) // 2
        for part, ends in ((one[:half], False), (one[half:], True)):
            if isinstance(part, str):
                wire += peer.send(WsprotoText(part, message_finished=ends))
            else:
                wire += peer.send(BytesMessage(part, message_finished=ends))
    ours = server(deflate) if from_client else client(deflate)
    expected = [TextMessage(one) if isinstance(one, str) else BinaryMessage(one) for one in sent]
    assert fed(ours, data.draw(splits(wire))) == expected


@given(st.lists(texts, max_size=4))
def test_a_folded_template_is_compressed(tokens: list[str]) -> None:
    template = Template(b'{"token":', b"}", str.encode)
    ours, peer = server(), client()
    folded = ours.fold(template)
    events = fed(peer, [folded.encode(token, number) for number, token in enumerate(tokens)])
    assert events == [TextMessage(f'{{"token":{token}}}') for token in tokens]


@given(st.data(), st.binary(max_size=60), st.booleans())
@example(None, compressed(b"\xffok"), False)
@example(None, compressed(b"a" * 50 + b"\xff"), False)
@example(None, stored(b"\xff") + b"\x07", False)
@example(None, stored(b"\xff", last=True) * 17, False)
@example(None, stored(b"a", last=True) * 17 + stored(b"\xff"), True)
@example(None, stored(b"", last=True) * 16 + stored(b"a" * 41, last=True), False)
def test_garbage_gives_events_or_a_fault_however_it_is_cut(
    data: st.DataObject | None, garbage: bytes, continued: bool
) -> None:
    wire = packed(garbage, fin=not continued) + frame(b"\x00", CONTINUATION)
    cuts = [[wire], [wire[at : at + 1] for at in range(len(wire))]]
    if data is not None:
        cuts.append(data.draw(splits(wire)))
    outcomes = [fed(server(max_message_bytes=40), pieces) for pieces in cuts]
    assert all(outcome == outcomes[0] for outcome in outcomes)


# ------------------------------------------------------------------------------------------------------------- bombs


@pytest.mark.parametrize("over", [1, 10_000_000])
def test_a_bomb_is_stopped_at_the_limit(over: int) -> None:
    limit = 1000
    exact = server(max_message_bytes=limit).receive_data(packed(compressed(b"a" * limit)))
    assert exact == [TextMessage("a" * limit)]
    closed = refused(packed(compressed(b"a" * (limit + over))), max_message_bytes=limit)
    assert closed.code == CloseCode.MESSAGE_TOO_BIG
    data = compressed(b"a" * (limit + over))
    parts = packed(data[:5], fin=False) + frame(data[5:], CONTINUATION)
    assert refused(parts, max_message_bytes=limit).code == CloseCode.MESSAGE_TOO_BIG


def test_a_bomb_inflates_no_further_than_the_limit() -> None:
    wire = packed(compressed(bytes(10**8)), BINARY)
    connection = server(max_message_bytes=100_000)
    tracemalloc.start()
    try:
        closed = connection.receive_data(wire)[-1]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(closed, Closed)
    assert most < 1_000_000


def test_an_incompressible_message_of_the_greatest_size_is_taken() -> None:
    data = b"".join(sha256(bytes([number])).digest() for number in range(256)) * 8
    data = bytes(byte ^ at >> 13 for at, byte in enumerate(data))
    wire = packed(compressed(data), BINARY)
    assert len(wire) > len(data)
    assert server(max_message_bytes=len(data)).receive_data(wire) == [BinaryMessage(data)]


@pytest.mark.parametrize("member", [b"\x03\x00", b"\x01\x00\x00\xff\xff"])
def test_a_flood_of_empty_deflate_streams_is_refused(member: bytes) -> None:
    """T36: each needs a new inflater and a copy of the rest, which made aiohttp quadratic."""
    few = packed(member * 10 + compressed(b"said"))
    assert server().receive_data(few) == [TextMessage("said")]
    assert server().receive_data(few * 10) == [TextMessage("said")] * 10, "counted by message"
    closed = refused(packed(member * 10_000))
    assert closed.code == CloseCode.MESSAGE_TOO_BIG
    assert "deflate streams" in closed.reason


def test_a_flood_of_empty_blocks_is_bounded_by_the_wire() -> None:
    """T36: blocks that give nothing count by their own size."""
    block = b"\x00\x00\x00\xff\xff"
    assert server(max_message_bytes=1000).receive_data(packed(block * 100 + compressed(b"said"))) == [
        TextMessage("said")
    ]
    closed = refused(packed(block * 300, fin=False), max_message_bytes=1000)
    assert closed.code == CloseCode.MESSAGE_TOO_BIG
    flood = packed(block * 100, fin=False) + frame(block * 100, CONTINUATION, fin=False) * 5
    assert refused(flood, max_message_bytes=1000).code == CloseCode.MESSAGE_TOO_BIG


def test_data_that_does_not_inflate_closes_with_1007() -> None:
    assert refused(packed(b"\xff\xff\xff")).code == CloseCode.INVALID_DATA
    assert refused(packed(compressed(b"\xff"))).code == CloseCode.INVALID_DATA
    far = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = bytes(range(256)) * 8
    data = (far.compress(body + body) + far.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)
    assert server().receive_data(packed(data, BINARY)) == [BinaryMessage(body + body)]


@pytest.mark.parametrize(
    "wire",
    [
        packed(b"\x00", TEXT, fin=False) + packed(b"\x00", CONTINUATION),
        frame(b"a", rsv=5),
        frame(b"a", rsv=6),
        frame(b"a", PING, rsv=4),
    ],
)
def test_reserved_bits_mean_compression_only_on_a_messages_first_frame(wire: bytes) -> None:
    assert refused(wire).code == CloseCode.PROTOCOL_ERROR


# ------------------------------------------------------------------------------------------------------- negotiation


def head(*extensions: str) -> RequestHead:
    lines = tuple((b"sec-websocket-extensions", line.encode("latin-1")) for line in extensions)
    fixed = (
        (b"host", b"a"),
        (b"upgrade", b"websocket"),
        (b"connection", b"Upgrade"),
        (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
        (b"sec-websocket-version", b"13"),
    )
    return RequestHead("GET", "/", headers=(*fixed, *lines))


WIDE = DeflateOptions(server_max_window_bits=15, client_max_window_bits=15)


def answer(*extensions: str, options: DeflateOptions | None = WIDE) -> tuple[str | None, Deflate | None]:
    accepted = accept_upgrade(head(*extensions), deflate=options)
    return dict(accepted.headers).get("sec-websocket-extensions"), accepted.deflate


@pytest.mark.parametrize(
    ("offered", "answered"),
    [
        ("permessage-deflate", "permessage-deflate"),
        ("permessage-deflate; client_max_window_bits", "permessage-deflate; client_max_window_bits=15"),
        ("permessage-deflate; client_max_window_bits=10", "permessage-deflate; client_max_window_bits=10"),
        ("permessage-deflate; client_max_window_bits=8", "permessage-deflate; client_max_window_bits=8"),
        ('permessage-deflate;server_max_window_bits="9"', "permessage-deflate; server_max_window_bits=9"),
        ("permessage-deflate; server_no_context_takeover", "permessage-deflate; server_no_context_takeover"),
        ("permessage-deflate ; client_no_context_takeover", "permessage-deflate; client_no_context_takeover"),
        ("x-other; a=b, permessage-deflate", "permessage-deflate"),
        (",permessage-deflate,,", "permessage-deflate"),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", "permessage-deflate"),
        ("permessage-deflate; unknown, permessage-deflate", "permessage-deflate"),
        # Declined: what we cannot do, or what is not valid (7.1); both leave the connection without compression.
        ("", None),
        ("x-other", None),
        ("permessage-deflate; server_max_window_bits=8", None),
        ("permessage-deflate; server_max_window_bits=7", None),
        ("permessage-deflate; server_max_window_bits=16", None),
        ("permessage-deflate; server_max_window_bits=010", None),
        ("permessage-deflate; server_max_window_bits=1e1", None),
        ("permessage-deflate; server_max_window_bits=+9", None),
        ("permessage-deflate; server_max_window_bits", None),
        ("permessage-deflate; client_max_window_bits=99999999999999999999", None),
        ("permessage-deflate; server_no_context_takeover=1", None),
        ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", None),
        ("permessage-deflate; server_no_context_takeovers", None),
    ],
)
def test_each_offer_has_its_answer(offered: str, answered: str | None) -> None:
    said, agreed = answer(offered)
    assert said == answered
    assert (agreed is None) == (answered is None)


@pytest.mark.parametrize(
    "malformed", [";", "permessage-deflate; =9", "a b", "permessage-deflate; a=", 'a; b="c', "é", "a;;b"]
)
def test_a_malformed_offer_is_refused(malformed: str) -> None:
    with pytest.raises(UpgradeRefused) as refusal:
        answer(malformed)
    assert refusal.value.status == 400


def test_our_own_terms_stand_in_the_answer() -> None:
    terms = DeflateOptions(
        server_max_window_bits=11,
        client_max_window_bits=10,
        server_no_context_takeover=True,
        client_no_context_takeover=True,
    )
    said, agreed = answer("permessage-deflate; client_max_window_bits; server_max_window_bits=12", options=terms)
    assert said == (
        "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        "; server_max_window_bits=11; client_max_window_bits=10"
    )
    assert agreed is not None
    assert (agreed.server_max_window_bits, agreed.client_max_window_bits) == (11, 10)
    assert (agreed.server_no_context_takeover, agreed.client_no_context_takeover) == (True, True)
    # A client that does not let us choose its window keeps the greatest one.
    silent = answer("permessage-deflate", options=terms)[1]
    assert silent is not None
    assert silent.client_max_window_bits == 15


def test_compression_is_off_unless_asked_for() -> None:
    assert answer("permessage-deflate", options=None) == (None, None)


def test_too_many_offers_are_refused() -> None:
    with pytest.raises(UpgradeRefused):
        answer(",".join(["permessage-deflate; unknown"] * 17))
    assert answer("a, b", *["c"] * 13, "permessage-deflate")[0] == "permessage-deflate"


@pytest.mark.parametrize("bits", [7, 8, 16])
def test_windows_that_zlib_has_not_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="window bits"):
        DeflateOptions(server_max_window_bits=bits)
    with pytest.raises(ValueError, match="window bits"):
        DeflateOptions(client_max_window_bits=bits)


@pytest.mark.parametrize(("level", "memory_level"), [(10, 8), (-2, 8), (6, 0), (6, 10)])
def test_levels_that_zlib_has_not_are_refused(level: int, memory_level: int) -> None:
    with pytest.raises(ValueError, match="levels are -1 to 9, of memory 1 to 9"):
        DeflateOptions(level=level, memory_level=memory_level)


@given(st.builds(DeflateOptions, server_max_window_bits=st.integers(9, 15), client_max_window_bits=st.integers(9, 15),
                 server_no_context_takeover=st.booleans(), client_no_context_takeover=st.booleans()),
       st.builds(DeflateOptions, server_max_window_bits=st.integers(9, 15), client_max_window_bits=st.integers(9, 15),
                 server_no_context_takeover=st.booleans(), client_no_context_takeover=st.booleans()),
       st.lists(texts | bulk, max_size=3))  # fmt: skip
def test_two_of_us_always_agree_and_understand_each_other(
    asking: DeflateOptions, serving: DeflateOptions, sent: list[str]
) -> None:
    said, agreed = answer(_ws_deflate.offer(asking), options=serving)
    assert said is not None
    assert agreed is not None
    understood = _ws_deflate.check_answer(said, asking)
    assert understood is not None
    ours, peer = server(agreed), client(understood)
    assert fed(peer, map(ours.send_text, sent)) == [TextMessage(text) for text in sent]
    assert fed(ours, map(peer.send_text, sent)) == [TextMessage(text) for text in sent]


@pytest.mark.parametrize(
    "said",
    [
        "x-other",
        "permessage-deflate, permessage-deflate",
        "permessage-deflate; unknown",
        "permessage-deflate; client_max_window_bits",
        "permessage-deflate; client_max_window_bits=8",
        "permessage-deflate; server_max_window_bits=13",
        "permessage-deflate; server_max_window_bits=x",
        "permessage-deflate",
        ";",
    ],
)
def test_a_client_refuses_an_answer_that_goes_beyond_its_offer(said: str) -> None:
    with pytest.raises(RemoteProtocolError):
        _ws_deflate.check_answer(said, DeflateOptions(server_max_window_bits=12, server_no_context_takeover=True))


def test_a_client_that_offered_nothing_takes_nothing() -> None:
    assert _ws_deflate.check_answer("", None) is None
    with pytest.raises(RemoteProtocolError):
        _ws_deflate.check_answer("permessage-deflate", None)
