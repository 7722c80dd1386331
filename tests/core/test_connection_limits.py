"""What a connection allows a peer: rates, requests, expectations, and its address's share of streams; on a virtual clock."""

from __future__ import annotations

import pytest
from tests.carriers import SECOND, Answer, Asked, Carriage, House, HttpClient, MemoryPeer, read_answers, request_bytes

from tokenwire.core.actions import Close, Record
from tokenwire.core.connection import ConnectionOptions, Phase
from tokenwire.core.events import StreamEnd
from tokenwire.core.peers import PeerLimits, PeerShare, PeerTable
from tokenwire.core.service import ServiceOptions

JSON = ("content-type", "application/json")
OPTIONS = ConnectionOptions(body_ns=100 * SECOND, body_grace_ns=10 * SECOND, body_bytes_per_s=100, head_ns=10 * SECOND)
GET = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
BODY = b'{"prompt":"hi"}'
PLAIN = request_bytes(Asked("POST", "/chat", (JSON,), BODY))


def head(length: int, path: str = "/chat", more: str = "") -> bytes:
    line = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{line}content-length: {length}\r\n{more}\r\n".encode()


def wired(options: ConnectionOptions = OPTIONS) -> tuple[House, HttpClient]:
    house = Carriage("http").house()
    house.source.script = None
    client = HttpClient(house, options)
    house._clients.append(client)
    return house, client


def answers(client: HttpClient) -> list[Answer]:
    return read_answers(bytes(client.peer.received), ["GET"] * 50, ended=client.peer.ended)


def statuses(client: HttpClient) -> list[int]:
    return [answer.status for answer in answers(client)]


# ----------------------------------------------------------------------------------------------------- rates and deadlines


def test_a_body_that_drips_is_refused_when_its_grace_is_over() -> None:
    house, client = wired()
    client.peer.receive(head(5000))
    for _ in range(9):
        house.advance(SECOND)
        client.peer.receive(b"x")
    assert statuses(client) == []
    house.advance(SECOND)
    assert statuses(client) == [408]
    assert client.peer.ended
    assert house.records[0].error == "the body came at less than 100 bytes a second"


def test_each_byte_of_a_body_buys_time() -> None:
    house, client = wired()
    client.peer.receive(head(5000) + b"x" * 1500)
    house.advance(15 * SECOND - 1)
    assert client.peer.connection.phase is Phase.RECEIVING
    client.peer.receive(b"x" * 500)
    house.advance(5 * SECOND)
    assert client.peer.connection.phase is Phase.RECEIVING
    house.advance(1)
    assert statuses(client) == [408]


def test_no_rate_moves_a_body_past_its_deadline() -> None:
    house, client = wired()
    client.peer.receive(head(100_000))
    for _ in range(99):
        client.peer.receive(b"x" * 1000)
        house.advance(SECOND)
    assert client.peer.connection.phase is Phase.RECEIVING
    client.peer.receive(b"x" * 999)
    house.advance(SECOND)
    assert statuses(client) == [408]
    assert house.records[0].error == "the request took too long"


def test_chunks_around_nothing_buy_no_time() -> None:
    house, client = wired()
    line = b"POST /chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    client.peer.receive(line)
    for _ in range(10):
        client.peer.receive(b"1;" + b"a" * 1000 + b"\r\n \r\n")
        house.advance(SECOND)
    assert statuses(client) == [408]


def test_no_rate_is_asked_for_where_none_is_set() -> None:
    house, client = wired(ConnectionOptions(body_ns=100 * SECOND, body_grace_ns=0, body_bytes_per_s=0))
    client.peer.receive(head(len(BODY)))
    for byte in BODY:
        house.advance(SECOND)
        client.peer.receive(bytes([byte]))
    assert client.peer.connection.phase is Phase.ANSWERING


def test_a_head_that_drips_is_refused_at_its_deadline_whatever_comes() -> None:
    house, client = wired()
    client.peer.receive(b"POST /v1/chat/completions HTTP/1.1\r\n")
    for _ in range(9):
        house.advance(SECOND)
        client.peer.receive(b"x: y\r\n")
    assert statuses(client) == []
    house.advance(SECOND)
    assert statuses(client) == [408]
    assert set(answers(client)[0].json()["error"]) == {"message", "type", "param", "code"}  # the path's own dialect


def test_the_time_of_a_body_begins_anew_with_each_request() -> None:
    house, client = wired()
    for _ in range(3):
        client.peer.receive(head(len(BODY)))
        house.advance(9 * SECOND)
        client.peer.receive(BODY)
        house.say(house.source.jobs[-1], "a", StreamEnd())
    assert statuses(client) == [200, 200, 200]


# ---------------------------------------------------------------------------------------------------- requests, expectations


def test_the_last_request_of_a_connection_says_so() -> None:
    house, client = wired(ConnectionOptions(max_requests=3))
    client.peer.receive(GET + PLAIN)
    house.say(house.source.jobs[0], "a", StreamEnd())
    client.peer.receive(GET * 2)
    assert statuses(client) == [200, 200, 200]
    assert [answer.closed for answer in answers(client)] == [False, False, True]
    assert answers(client)[-1].header("connection") == "close"
    assert [type(action) for action in client.peer.actions][-2:] == [Record, Close]
    assert len(house.records) == 3


def test_a_streams_head_says_that_it_is_the_last() -> None:
    house, client = wired(ConnectionOptions(max_requests=1))
    client.peer.receive(PLAIN)
    house.say(house.source.jobs[0], "a")
    assert b"\r\nconnection: close\r\n" in client.peer.received
    assert b"\r\ntransfer-encoding: chunked\r\n" in client.peer.received
    house.say(house.source.jobs[0], StreamEnd())
    assert client.peer.ended


@pytest.mark.parametrize(("path", "openai"), [("/chat", False), ("/v1/chat/completions", True)])
@pytest.mark.parametrize("value", ["200-ok", "100-continue, x", "100-continue=1"])
def test_an_expectation_that_nobody_meets(path: str, openai: bool, value: str) -> None:
    house, client = wired()
    client.peer.receive(head(len(BODY), path, f"expect: {value}\r\n") + BODY + GET)
    (answer,) = answers(client)
    assert (answer.status, answer.closed) == (417, True)
    error = answer.json()["error"]
    assert error["code"] == "expectation_failed"
    assert ("retryable" in error) is not openai
    assert house.source.jobs == []
    assert [(record.path, record.status, record.end) for record in house.records] == [(path, 417, "refused")]


def test_an_expectation_does_not_hide_a_worse_fault() -> None:
    _, client = wired()
    client.peer.receive(b"GET /nope HTTP/1.1\r\nhost: localhost\r\nexpect: x\r\n\r\n")
    assert statuses(client) == [404]


def test_head_has_no_body_and_goes_on() -> None:
    _, client = wired()
    for path in ("/healthz", "/v1/models", "/v1/models/nope", "/nope"):
        before = len(client.peer.received)
        client.peer.receive(f"HEAD {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert client.peer.received.endswith(b"\r\n\r\n")
        assert b"\r\ncontent-length: " in client.peer.received[before:]
    assert not client.peer.ended


# --------------------------------------------------------------------------------------------------------- streams per peer


def shared(limit: int, count: int, service: ServiceOptions | None = None) -> tuple[House, PeerShare, list[MemoryPeer]]:
    house = Carriage("http").house(options=service)
    house.source.script = None
    share = PeerTable(PeerLimits(max_streams=limit)).enter("192.0.2.1")
    assert isinstance(share, PeerShare)
    return house, share, [MemoryPeer(house, share=share) for _ in range(count)]


@pytest.mark.parametrize(("path", "openai"), [("/chat", False), ("/v1/chat/completions", True)])
def test_one_address_has_so_many_streams(path: str, openai: bool) -> None:
    house, share, (first, second) = shared(1, 2)
    chat = b'{"model":"tiny-1","messages":[{"role":"user","content":"a"}]}' if openai else BODY
    first.receive(PLAIN)
    second.receive(head(len(chat), path) + chat)
    (answer,) = read_answers(bytes(second.received), ["POST"], ended=second.ended)
    assert answer.status == 429
    assert answer.header("retry-after") == "1"
    assert answer.json()["error"]["code"] == "too_many_streams"
    assert ("retryable" in answer.json()["error"]) is not openai
    assert len(house.source.jobs) == 1
    house.say(house.source.jobs[0], "a", StreamEnd())
    assert share.streams == 0
    second.receive(head(len(chat), path) + chat)
    assert len(house.source.jobs) == 2


@pytest.mark.parametrize("how", ["finished", "client ends", "client is lost", "bad body", "no place", "shut down"])
def test_a_place_is_given_back_however_a_stream_ends(how: str) -> None:
    service = ServiceOptions(max_running=1, max_waiting=0) if how == "no place" else None
    house, share, (first, second) = shared(2, 2, service)
    first.receive(PLAIN)
    assert share.streams == 1
    if how == "finished":
        house.say(house.source.jobs[0], "a", StreamEnd())
    elif how == "client ends":
        first.end()
    elif how == "client is lost":
        first.lose()
    elif how == "shut down":
        house.dispatcher.shut_down(house.service.shutting_down(), house.now)
    else:
        second.receive(head(2) + b"{}" if how == "bad body" else PLAIN)
        assert share.streams == 1
        house.say(house.source.jobs[0], "a", StreamEnd())
    assert share.streams == 0
