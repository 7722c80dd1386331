"""Who may open a WebSocket, and how: hosts, origins and sites through both carriers, and every way to ask wrongly."""

from __future__ import annotations

from typing import Any, Final

import pytest
from tests.carriers import HOST, SECOND, Answer, Asked, Carriage, House, HttpClient
from tests.conversing import OBJECTS, ByteSocket, Wire

from tokenwire.core.guard import Guard
from tokenwire.core.http import MAX_PIPELINED_BYTES
from tokenwire.core.service import ServiceOptions

KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE: Final = {
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-version": "13",
    "sec-websocket-key": KEY,
}
ANYWHERE: Final = ServiceOptions(guard=Guard(allowed_hosts=None))
FRIENDS: Final = ServiceOptions(
    guard=Guard(allowed_hosts=frozenset({"models.example"}), allowed_origins=frozenset({"https://friend.example"}))
)


def check_error(answer: Answer | None, status: int, code: str) -> dict[str, Any]:
    """Check that a handshake was refused by HTTP, in plain's shape; return the error object."""
    assert answer is not None
    assert answer.status == status
    assert answer.whole
    assert answer.header("content-type") == "application/json"
    assert answer.header("content-length") == str(len(answer.body))
    error: dict[str, Any] = answer.json()["error"]
    assert answer.json() == {"error": error}
    assert set(error) == {"message", "type", "code", "param", "retryable"}
    assert error["code"] == code
    assert error["message"]
    return error


def check_record(house: House, status: int) -> None:
    (record,) = house.records
    assert (record.method, record.path, record.status, record.end) == ("GET", "/ws/chat", status, "refused")
    assert record.error


# ---------------------------------------------------------------------------------------------- hosts, origins, sites

Headers = tuple[tuple[str, str], ...]

REFUSED: Final[dict[str, tuple[ServiceOptions | None, str, Headers, str]]] = {
    "another host": (None, "evil.example", (), "host_not_allowed"),
    "another host that is its own origin": (
        None,
        "evil.example",
        (("origin", "http://evil.example"),),
        "host_not_allowed",
    ),
    "another origin": (None, HOST, (("origin", "http://evil.example"),), "origin_not_allowed"),
    "no origin to speak of": (None, HOST, (("origin", "null"),), "origin_not_allowed"),
    "another site without an origin": (None, HOST, (("sec-fetch-site", "cross-site"),), "cross_site_request"),
    "not even a friend's host": (
        FRIENDS,
        "friend.example",
        (("origin", "https://friend.example"),),
        "host_not_allowed",
    ),
    "almost a friend": (FRIENDS, "models.example", (("origin", "http://friend.example"),), "origin_not_allowed"),
    "another origin where any host goes": (
        ANYWHERE,
        "models.example",
        (("origin", "http://localhost"),),
        "origin_not_allowed",
    ),
}
ALLOWED: Final[dict[str, tuple[ServiceOptions | None, str, Headers]]] = {
    "no browser": (None, HOST, ()),
    "our own page": (None, HOST, (("origin", f"http://{HOST}"), ("sec-fetch-site", "same-origin"))),
    "a local page of another port": (None, "localhost:8000", (("origin", "http://localhost:3000"),)),
    "a friend": (FRIENDS, "models.example", (("origin", "https://friend.example"), ("sec-fetch-site", "cross-site"))),
    "any host": (ANYWHERE, "models.example", ()),
    "any host's own page": (ANYWHERE, "models.example", (("origin", "https://models.example"),)),
}


@pytest.mark.parametrize(("options", "host", "headers", "code"), REFUSED.values(), ids=REFUSED)
def test_a_handshake_from_elsewhere_is_refused(
    wire: Wire, options: ServiceOptions | None, host: str, headers: Headers, code: str
) -> None:
    house = Carriage("http").house(options=options)
    socket = wire.open(house, headers=headers, host=host)
    assert not socket.accepted
    error = check_error(socket.rejected, 403, code)
    assert error["type"] == "permission_error"
    check_record(house, 403)
    socket.say('{"prompt":"hi"}')
    assert house.source.jobs == []
    assert socket.texts == []


@pytest.mark.parametrize(("options", "host", "headers"), ALLOWED.values(), ids=ALLOWED)
def test_a_handshake_from_where_it_may_come(
    wire: Wire, options: ServiceOptions | None, host: str, headers: Headers
) -> None:
    house = Carriage("http").house(options=options)
    socket = wire.open(house, headers=headers, host=host)
    assert socket.rejected is None
    assert socket.accepted
    socket.say('{"prompt":"hi"}')
    socket.within(house.play)
    assert "".join(socket.texts) == "Hello[DONE]"


def test_a_server_that_goes_down_opens_none(wire: Wire) -> None:
    house = Carriage("http").house()
    house.service.draining = True
    socket = wire.open(house)
    error = check_error(socket.rejected, 503, "server_shutdown")
    assert error["retryable"] is True
    assert socket.rejected is not None
    assert socket.rejected.header("retry-after") == "1"
    check_record(house, 503)


def test_another_path(wire: Wire) -> None:
    house = Carriage("http").house()
    socket = wire.open(house, "/ws/nowhere")
    check_error(socket.rejected, 404, "not_found")
    assert house.records[0].status == 404


# ------------------------------------------------------------------------------------------------------- subprotocols


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [((), None), (OBJECTS, OBJECTS[0]), (("graphql-ws", *OBJECTS), OBJECTS[0]), (("graphql-ws",), None)],
)
def test_subprotocols(wire: Wire, offered: tuple[str, ...], chosen: str | None) -> None:
    socket = wire.open(Carriage("http").house(), subprotocols=offered)
    assert socket.accepted
    assert socket.subprotocol == chosen


# --------------------------------------------------------------------------------------------- the handshake in HTTP/1.1


def ask(house: House, *, line: str = "GET /ws/chat HTTP/1.1", body: bytes = b"", **headers: str | None) -> Answer:
    """Send a handshake in which something is other than it should be; None leaves a header out."""
    named = {"host": HOST, **HANDSHAKE, **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [line, *(f"{name}: {value}" for name, value in named.items() if value is not None), "", ""]
    client = HttpClient(house)
    house._clients.append(client)
    return client.ask_bytes("\r\n".join(lines).encode() + body, line.partition(" ")[0])


WRONG: Final[dict[str, tuple[dict[str, Any], int, str]]] = {
    "no upgrade at all": ({"upgrade": None, "connection": None}, 426, "upgrade_required"),
    "another upgrade": ({"upgrade": "h2c"}, 426, "upgrade_required"),
    "not in Connection": ({"connection": "keep-alive"}, 426, "bad_upgrade"),
    "HTTP/1.0": ({"line": "GET /ws/chat HTTP/1.0"}, 426, "upgrade_required"),
    "an old version": ({"sec_websocket_version": "8"}, 426, "bad_upgrade"),
    "no version": ({"sec_websocket_version": None}, 400, "bad_upgrade"),
    "no key": ({"sec_websocket_key": None}, 400, "bad_upgrade"),
    "a short key": ({"sec_websocket_key": "dGhl"}, 400, "bad_upgrade"),
    "a key that is not base64": ({"sec_websocket_key": "!" * 24}, 400, "bad_upgrade"),
    "a subprotocol that is no token": ({"sec_websocket_protocol": "a b"}, 400, "bad_upgrade"),
    "a body": ({"content_length": "2", "body": b"{}"}, 400, "bad_upgrade"),
}


@pytest.mark.parametrize(("how", "status", "code"), WRONG.values(), ids=WRONG)
def test_a_handshake_that_is_none(how: dict[str, Any], status: int, code: str) -> None:
    house = Carriage("http").house()
    answer = ask(house, **how)
    error = check_error(answer, status, code)
    assert error["type"] == "invalid_request_error"
    check_record(house, status)
    assert house.source.jobs == []
    if status == 426:
        assert answer.header("upgrade") == "websocket"
        assert "Upgrade" in [value for name, value in answer.headers if name == "connection"]
    if code == "bad_upgrade" and status == 426 and "sec_websocket_version" in how:
        assert answer.header("sec-websocket-version") == "13"
    assert answer.closed == (how.get("line") is not None)
    if not answer.closed:
        assert house.ask(Asked("GET", "/healthz")).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "HEAD", "DELETE"])
def test_another_method(method: str) -> None:
    house = Carriage("http").house()
    answer = ask(house, line=f"{method} /ws/chat HTTP/1.1")
    assert answer.status == 405
    assert answer.header("allow") == "GET, OPTIONS"


@pytest.mark.parametrize(
    ("upgrade", "connection"),
    [
        ("WebSocket", "upgrade"),
        ("websocket", "keep-alive, Upgrade"),
        ("h2c, websocket", "Upgrade"),
        ("websocket", "UPGRADE"),
    ],
)
def test_a_handshake_in_other_letters(upgrade: str, connection: str) -> None:
    house = Carriage("http").house()
    client = HttpClient(house)
    lines = [
        "GET /ws/chat HTTP/1.1",
        *(
            f"{name}: {value}"
            for name, value in {"host": HOST, **HANDSHAKE, "upgrade": upgrade}.items()
            if name != "connection"
        ),
        f"connection: {connection}",
    ]
    client.peer.receive("\r\n".join([*lines, "", ""]).encode())
    head = bytes(client.peer.received).decode()
    assert head.startswith("HTTP/1.1 101 Switching Protocols\r\n")
    assert "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in head
    assert head.endswith("\r\n\r\n")


def test_an_upgrade_that_is_named_in_a_second_line() -> None:
    """RFC 9110, 5.3: lines of one name are one list."""
    client = HttpClient(Carriage("http").house())
    fields = {"Upgrade": "h2c", "host": HOST, **HANDSHAKE}
    lines = ["GET /ws/chat HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    client.peer.receive("\r\n".join([*lines, "", ""]).encode())
    assert b"HTTP/1.1 101 " in bytes(client.peer.received)


def test_a_client_that_talks_on_before_it_is_answered() -> None:
    """What is too much to hold is not dropped from the middle of the client's frames: the handshake is refused."""
    house = Carriage("http").house()
    socket = ByteSocket(house, first=bytes(MAX_PIPELINED_BYTES + 1))
    check_error(socket.rejected, 400, "bad_upgrade")
    check_record(house, 400)


def test_an_upgrade_to_websocket_elsewhere_is_an_ordinary_request() -> None:
    house = Carriage("http").house()
    answer = ask(house, line="GET /healthz HTTP/1.1")
    assert answer.status == 200
    assert answer.json() == {"status": "ok"}


def test_a_connection_may_ask_before_it_upgrades() -> None:
    house = Carriage("http").house()
    client = HttpClient(house)
    assert house.ask_on(client, Asked("GET", "/healthz")).status == 200
    house.advance(SECOND)
    lines = ["GET /ws/chat HTTP/1.1", *(f"{name}: {value}" for name, value in {"host": HOST, **HANDSHAKE}.items())]
    client.peer.receive("\r\n".join([*lines, "", ""]).encode())
    assert b"HTTP/1.1 101 " in bytes(client.peer.received)
    assert [record.status for record in house.records] == [200, 101]


def test_an_asgi_server_that_hands_the_upgrade_on_as_http() -> None:
    house = Carriage("asgi").house()
    answer = house.ask(Asked("GET", "/ws/chat", tuple(HANDSHAKE.items())))
    check_error(answer, 426, "upgrade_required")
    assert [record.status for record in house.records] == [426]


def test_compression_is_not_agreed_on() -> None:
    house = Carriage("http").house()
    socket = ByteSocket(house, headers=(("sec-websocket-extensions", "permessage-deflate; client_max_window_bits"),))
    assert socket.accepted
    assert b"extensions" not in bytes(socket.peer.received).lower()
