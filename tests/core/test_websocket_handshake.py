"""The opening handshake: RFC 6455's example, wsproto as the other side both ways, and every way to get it wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import splits
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Request
from wsproto.extensions import PerMessageDeflate

from tokenwire.core.contracts import RequestHead
from tokenwire.core.errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from tokenwire.core.http import HeadReceived, RequestReader, encode_head
from tokenwire.core.websocket import Accepted, ClientHandshake, DeflateOptions, UpgradeRefused, accept_upgrade

NONCE = b"the sample nonce"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
FIELDS = {
    "host": "example.org",
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-key": KEY,
    "sec-websocket-version": "13",
}


def head(method: str = "GET", *more: tuple[str, str], has_body: bool = False, **changed: str | None) -> RequestHead:
    """Make a good head with some headers changed; None leaves one out."""
    fields = {**FIELDS, **{name.replace("_", "-"): value for name, value in changed.items()}}
    pairs = [*((name, value) for name, value in fields.items() if value is not None), *more]
    return RequestHead(
        method,
        "/",
        headers=tuple((name.encode(), value.encode("latin-1")) for name, value in pairs),
        has_body=has_body,
    )


def refusal(asked: RequestHead) -> tuple[int, dict[str, str]]:
    with pytest.raises(UpgradeRefused) as caught:
        accept_upgrade(asked, subprotocols=["chat"], deflate=DeflateOptions())
    return caught.value.status, dict(caught.value.headers)


# ---------------------------------------------------------------------------------------------------------- as server


def test_the_example_of_rfc_6455_section_1_3() -> None:
    accepted = accept_upgrade(head("GET", ("sec-websocket-protocol", "chat, superchat")), subprotocols=["chat"])
    assert accepted == Accepted(
        (
            ("upgrade", "websocket"),
            ("connection", "Upgrade"),
            ("sec-websocket-accept", ACCEPT),
            ("sec-websocket-protocol", "chat"),
        ),
        "chat",
        None,
    )


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [("b, a", "b"), ("x,a", "a"), ("x", None), ("A", None), (",a,,", "a"), ("", None), ("a\t", "a")],
)
def test_the_clients_first_choice_that_we_speak_is_taken(offered: str, chosen: str | None) -> None:
    accepted = accept_upgrade(head("GET", ("sec-websocket-protocol", offered)), subprotocols=("a", "b"))
    assert accepted.subprotocol == chosen
    assert dict(accepted.headers).get("sec-websocket-protocol") == chosen


def test_lists_may_stand_in_several_lines_and_any_case() -> None:
    more = (("connection", "keep-alive, UPGRADE"), ("upgrade", "h2c, WebSocket"), ("sec-websocket-protocol", "b"))
    asked = head("GET", *more, ("sec-websocket-protocol", "a"), connection="close", upgrade=None)
    assert accept_upgrade(asked, subprotocols=["a"]).subprotocol == "a"


@pytest.mark.parametrize("method", ["POST", "HEAD", "OPTIONS", "CONNECT", "get"])
def test_another_method_than_get_is_405(method: str) -> None:
    assert refusal(head(method)) == (405, {"allow": "GET"})


@pytest.mark.parametrize(
    "asked",
    [
        head(upgrade=None),
        head(upgrade="h2c"),
        head(upgrade="websockets"),
        head(connection=None),
        head(connection="keep-alive"),
        head(connection="upgraded"),
    ],
)
def test_a_request_without_upgrade_is_426(asked: RequestHead) -> None:
    assert refusal(asked) == (426, {"upgrade": "websocket", "connection": "Upgrade"})


@pytest.mark.parametrize(
    ("version", "status"), [(None, 400), ("", 400), ("8", 426), ("12", 426), ("13, 8", 426), ("14", 426), ("013", 426)]
)
def test_another_version_is_told_ours(version: str | None, status: int) -> None:
    told, headers = refusal(head(sec_websocket_version=version))
    assert told == status
    assert headers["sec-websocket-version"] == "13"


@pytest.mark.parametrize(
    "key", [None, "", "short", KEY[:-1], KEY + "=", "dGhlIHNhbXBsZSBub25jZR==", "é" * 24, f"{KEY}, {KEY}"]
)
def test_a_bad_key_is_400(key: str | None) -> None:
    assert refusal(head(sec_websocket_key=key)) == (400, {})


def test_repeated_headers_and_a_body_are_400() -> None:
    assert refusal(head("GET", ("sec-websocket-key", KEY)))[0] == 400
    assert refusal(head("GET", ("sec-websocket-version", "13")))[0] == 400
    assert refusal(head(has_body=True))[0] == 400


@pytest.mark.parametrize("name", ["sec-websocket-protocol", "sec-websocket-extensions"])
@pytest.mark.parametrize("value", ["é", "a b", "a\x0bb", "\x85", "a;;", '"'])
def test_lists_that_are_not_tokens_are_400(name: str, value: str) -> None:
    assert refusal(head("GET", (name, value))) == (400, {})


header_values = st.text(st.characters(max_codepoint=255), max_size=30) | st.sampled_from([*FIELDS.values(), "", ","])
names = st.sampled_from([*FIELDS, "sec-websocket-protocol", "sec-websocket-extensions"])


@given(st.lists(st.tuples(names, header_values), max_size=4))
def test_no_head_raises_anything_but_a_refusal(more: list[tuple[str, str]]) -> None:
    try:
        accepted = accept_upgrade(head("GET", *more), subprotocols=["chat"], deflate=DeflateOptions())
    except UpgradeRefused as refused:
        status, headers = refused.status, refused.headers
    else:
        status, headers = 101, accepted.headers
    assert status in (101, 400, 426)
    assert (status == 101) == ("sec-websocket-accept" in dict(headers))
    assert all(value.isascii() and value.isprintable() for _, value in headers)


# ---------------------------------------------------------------------------------------------------------- as client


def client(**options: DeflateOptions | list[str]) -> ClientHandshake:
    subprotocols, deflate = options.get("subprotocols", []), options.get("deflate")
    assert isinstance(subprotocols, list)
    assert not isinstance(deflate, list)
    return ClientHandshake("example.org", "/chat?a=b", nonce=NONCE, subprotocols=subprotocols, deflate=deflate)


def answer(*more: str, status: str = "HTTP/1.1 101 Switching Protocols", **changed: str | None) -> bytes:
    fields = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": ACCEPT, **changed}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([status, *lines, *more, "\r\n"]).encode("latin-1")


def test_a_client_asks_and_understands_the_answer() -> None:
    handshake = client(subprotocols=["superchat", "chat"])
    (request,) = handshake.data_to_send()
    assert handshake.data_to_send() == []
    assert request == (
        b"GET /chat?a=b HTTP/1.1\r\nhost: example.org\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-protocol: superchat, chat\r\n\r\n"
    )
    accepted = handshake.receive_data(answer("Sec-WebSocket-Protocol:\t chat \t") + b"\x81\x01a")
    assert accepted is not None
    assert accepted.headers[-1] == ("sec-websocket-protocol", "chat")
    assert (accepted.subprotocol, accepted.deflate) == ("chat", None)
    assert handshake.trailing_data == b"\x81\x01a"
    with pytest.raises(LocalProtocolError):
        handshake.receive_data(b"\x81\x01b")
    handshake.receive_eof()


@given(st.data())
def test_the_answer_may_come_in_any_pieces(data: st.DataObject) -> None:
    wire = answer() + b"\x81\x01a"
    handshake = client()
    accepted: Accepted | None = None
    rest = b""
    for piece in data.draw(splits(wire)):
        if accepted is None:
            accepted = handshake.receive_data(piece)
        else:
            rest += piece
    assert accepted is not None
    assert handshake.trailing_data + rest == b"\x81\x01a"


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (answer(status="HTTP/1.1 403 Forbidden"), 403),
        (answer(status="HTTP/1.1 200 OK"), 200),
        (answer(status="HTTP/1.0 101 Switching"), 502),
        (answer(status="HTTP/1.1 1010 Odd"), 502),
        (answer(status="gibberish"), 502),
        (answer(Upgrade="h2c"), 502),
        (answer(Upgrade=None), 502),
        (answer(Connection="close"), 502),
        (answer(**{"Sec-WebSocket-Accept": ACCEPT[::-1]}), 502),
        (answer(**{"Sec-WebSocket-Accept": ACCEPT.lower()}), 502),
        (answer().replace(ACCEPT.encode(), b""), 502),
        (answer().replace(b"Sec-WebSocket-Accept", b"Sec-WebSocket-Key"), 502),
        (answer(f"Sec-WebSocket-Accept: {ACCEPT}"), 502),
        (answer("Sec-WebSocket-Protocol: other"), 502),
        (answer("Sec-WebSocket-Protocol: chat", "Sec-WebSocket-Protocol: chat"), 502),
        (answer("Sec-WebSocket-Extensions: permessage-deflate"), 502),
        (answer(" folded"), 502),
        (answer("no colon"), 502),
        (answer("bare: lf\nmore: b"), 502),
        (answer("x:" + " " * 30_000 + "\0"), 502),  # looked at once: an expression that looked thrice took hours
    ],
)
def test_an_answer_that_opens_nothing_is_refused(wire: bytes, status: int) -> None:
    handshake = client(subprotocols=["chat"])
    with pytest.raises(UpgradeRefused) as caught:
        handshake.receive_data(wire)
    assert caught.value.status == status
    with pytest.raises(LocalProtocolError):
        handshake.receive_data(answer())


def test_an_answer_without_end_is_refused_at_its_limit() -> None:
    handshake = client()
    for _ in range(32):
        assert handshake.receive_data(b"a" * 1024) is None
    with pytest.raises(LimitExceeded, match="max_answer_bytes"):
        handshake.receive_data(b"a")
    with pytest.raises(RemoteProtocolError):
        client().receive_data(answer("x: " + "a" * 40_000))


def test_the_end_of_input_in_the_handshake_is_refused_once() -> None:
    handshake = client()
    handshake.receive_data(b"HTTP/1.1 101")
    with pytest.raises(UpgradeRefused, match="ended"):
        handshake.receive_eof()
    handshake.receive_eof()


@pytest.mark.parametrize(
    "arguments",
    [
        {"nonce": b"short"},
        {"host": ""},
        {"host": "a\r\nb: c"},
        {"target": "/a b"},
        {"target": "chat"},
        {"target": "/é"},
        {"subprotocols": ["a b"]},
        {"headers": (("origin", "a\r\nb: c"),)},
        {"headers": (("a b", "c"),)},
    ],
)
def test_what_would_break_the_request_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"nonce|break|token"):
        ClientHandshake(**{"host": "a", "nonce": NONCE, **arguments})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------- wsproto as oracle


@pytest.mark.parametrize("deflate", [None, DeflateOptions(), DeflateOptions(server_no_context_takeover=True)])
def test_wsproto_accepts_our_request_and_we_its_answer(deflate: DeflateOptions | None) -> None:
    handshake = ClientHandshake(
        "example.org", nonce=NONCE, subprotocols=["a", "b"], deflate=deflate, headers=(("origin", "http://x"),)
    )
    peer = WSConnection(ConnectionType.SERVER)
    peer.receive_data(handshake.data_to_send()[0])
    (asked,) = peer.events()
    assert isinstance(asked, Request)
    assert (asked.host, asked.target, asked.subprotocols) == ("example.org", "/", ["a", "b"])
    extensions = [PerMessageDeflate()] if deflate else []
    accepted = handshake.receive_data(peer.send(AcceptConnection(subprotocol="b", extensions=[*extensions])))
    assert accepted is not None
    assert accepted.subprotocol == "b"
    assert (accepted.deflate is not None) == (deflate is not None)


@pytest.mark.parametrize("deflate", [None, DeflateOptions(server_max_window_bits=11, client_max_window_bits=10)])
def test_wsproto_takes_our_answer_to_its_request(deflate: DeflateOptions | None) -> None:
    peer = WSConnection(ConnectionType.CLIENT)
    extension = PerMessageDeflate()
    request = peer.send(Request("example.org", "/", subprotocols=["a", "b"], extensions=[extension]))
    received = RequestReader().receive_data(request)[0]
    assert isinstance(received, HeadReceived)
    accepted = accept_upgrade(received.head, subprotocols=["b"], deflate=deflate)
    peer.receive_data(encode_head(101, accepted.headers))
    (event,) = peer.events()
    assert isinstance(event, AcceptConnection)
    assert event.subprotocol == "b"
    assert extension.enabled() == (deflate is not None)
    if deflate is not None:
        assert (extension.server_max_window_bits, extension.client_max_window_bits) == (11, 10)
        assert accepted.deflate is not None
        assert (accepted.deflate.server_max_window_bits, accepted.deflate.client_max_window_bits) == (11, 10)
