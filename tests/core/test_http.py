"""HTTP/1.1 bytes: what is read and what is refused, however it is cut; and every framing of an answer's body."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.carriers import read_answers
from tests.strategies import splits

from tokenwire.core.contracts import Reply, RequestHead, ResponseHead, Template
from tokenwire.core.errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from tokenwire.core.http import (
    MAX_HEAD_BYTES,
    MAX_PIPELINED_BYTES,
    BodyEnded,
    BodyFraming,
    BodyReceived,
    HeadReceived,
    HttpEvent,
    RequestReader,
    ResponseWriter,
    encode_head,
)

HOST = b"Host: a.test\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"


class Seen(NamedTuple):
    """What a reader has said of some bytes, however they were cut."""

    heads: tuple[HeadReceived, ...]
    body: bytes
    ended: bool
    error: tuple[str, int] | None


def read(pieces: Sequence[bytes], **limits: int) -> Seen:
    """Feed pieces to one reader, stopping at an error."""
    reader = RequestReader(**limits)
    events: list[HttpEvent] = []
    error: tuple[str, int] | None = None
    try:
        for piece in pieces:
            events += reader.receive_data(piece)
        reader.check()
    except RemoteProtocolError as raised:
        error = (str(raised), raised.status)
        with pytest.raises(LocalProtocolError):
            reader.receive_data(b"x")
    return Seen(
        tuple(event for event in events if isinstance(event, HeadReceived)),
        b"".join(event.data for event in events if isinstance(event, BodyReceived)),
        any(isinstance(event, BodyEnded) for event in events),
        error,
    )


def one_by_one(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def head(seen: Seen) -> RequestHead:
    (received,) = seen.heads
    return received.head


# ------------------------------------------------------------------------------------------------------- what is read

POST = b"POST /p HTTP/1.1\r\n" + HOST
GOOD: dict[str, tuple[bytes, bytes]] = {
    "get": (GET, b""),
    "get-1.0": (b"GET /x HTTP/1.0\r\n\r\n", b""),
    "empty-lines-first": (b"\r\n\r\n\r\n" + GET, b""),
    "no-space-after-colon": (b"GET / HTTP/1.1\r\nhost:a\r\n\r\n", b""),
    "spaces-around-value": (b"GET / HTTP/1.1\r\nhost: \t a \t \r\n\r\n", b""),
    "empty-value": (b"GET / HTTP/1.1\r\nhost: a\r\nx:\r\n\r\n", b""),
    "obs-text": (b"GET / HTTP/1.1\r\nhost: a\r\nx: \xff\xfe\r\n\r\n", b""),
    "length": (POST + b"content-length: 5\r\n\r\nhello", b"hello"),
    "length-0": (POST + b"content-length: 0\r\n\r\n", b""),
    "chunked": (POST + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello"),
    "chunked-case": (POST + b"Transfer-Encoding: Chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    "chunk-extension": (POST + b"transfer-encoding: chunked\r\n\r\n3;a=b\r\nhel\r\n0;c\r\n\r\n", b"hel"),
    "trailers": (POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: y\r\n\r\n", b"a"),
    "two-trailers": (POST + b"transfer-encoding: chunked\r\n\r\n2\r\n\n\n\r\n0\r\nx: y\r\nz: w\r\n\r\n", b"\n\n"),
    "body-like-a-request": (POST + b"content-length: 4\r\n\r\nGET ", b"GET "),
    "body-of-line-ends": (POST + b"content-length: 6\r\n\r\n\n\n\r\r\n\n", b"\n\n\r\r\n\n"),
}


@pytest.mark.parametrize(("data", "body"), GOOD.values(), ids=GOOD)
def test_a_request_is_read_however_it_is_cut(data: bytes, body: bytes) -> None:
    whole = read([data])
    assert whole.error is None
    assert whole.ended
    assert whole.body == body
    assert len(whole.heads) == 1
    assert read(one_by_one(data)) == whole
    for at in range(len(data) + 1):
        assert read([data[:at], b"", data[at:]]) == whole


def test_a_head() -> None:
    data = b"POST /a%20b?c=d&e? HTTP/1.1\r\nHost: a.test:1\r\nX-Y: 1\r\nx-y: 2\r\nContent-Length: 3\r\n\r\nabc"
    assert head(read([data])) == RequestHead(
        "POST",
        "/a%20b",
        "c=d&e?",
        ((b"host", b"a.test:1"), (b"x-y", b"1"), (b"x-y", b"2"), (b"content-length", b"3")),
        has_body=True,
        content_length=3,
    )
    assert head(read([data])).header(b"x-y") == "1"
    assert head(read([data])).header(b"none") is None


@pytest.mark.parametrize(
    ("lines", "has_body", "length"),
    [
        (b"", False, None),
        (b"content-length: 0\r\n", False, 0),
        (b"content-length: 7\r\n", True, 7),
        (b"transfer-encoding: chunked\r\n", True, None),
    ],
)
def test_whether_a_body_is_announced(lines: bytes, has_body: bool, length: int | None) -> None:
    found = head(read([POST + lines + b"\r\n"]))
    assert (found.has_body, found.content_length) == (has_body, length)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/", "/", ""),
        (b"/a?b", "/a", "b"),
        (b"/?", "/", ""),
        (b"//a", "//a", ""),
        (b"http://a.test/x?y", "/x", "y"),
        (b"HTTP://a.test", "/", ""),
        (b"https://A.Test/", "/", ""),
        (b"http://a.test?y", "/", "y"),
        (b"*", "*", ""),
    ],
)
def test_targets(target: bytes, path: str, query: str) -> None:
    found = head(read([b"OPTIONS " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n"]))
    assert (found.path, found.query) == (path, query)


@pytest.mark.parametrize(
    ("version", "lines", "keep_alive"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"connection: keep-alive\r\n", True),
        (b"1.1", b"connection: close\r\n", False),
        (b"1.1", b"connection: upgrade , CLOSE\r\n", False),
        (b"1.1", b"connection: x\r\nconnection: close\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"connection: keep-alive\r\n", False),
    ],
)
def test_whether_the_connection_may_go_on(version: bytes, lines: bytes, keep_alive: bool) -> None:
    (received,) = read([b"GET / HTTP/" + version + b"\r\n" + HOST + lines + b"\r\n"]).heads
    assert received.keep_alive is keep_alive
    assert received.version == version.decode()


@pytest.mark.parametrize(
    ("version", "value", "expects"),
    [(b"1.1", b"100-continue", True), (b"1.1", b"100-Continue", True), (b"1.0", b"100-continue", False)],
)
def test_who_waits_for_100_continue(version: bytes, value: bytes, expects: bool) -> None:
    lines = b"content-length: 1\r\nexpect: " + value + b"\r\n\r\n"
    (received,) = read([b"POST / HTTP/" + version + b"\r\n" + HOST + lines]).heads
    assert received.expects_continue is expects


# ----------------------------------------------------------------------------------------------------- what is refused

BAD: dict[str, tuple[bytes, int]] = {
    "garbage": (b"\x00\x01\x02", 400),
    "tls": (b"\x16\x03\x01\x02\x00\x01", 400),
    "space-first": (b" GET / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "lf-first": (b"\n" + GET, 400),
    "cr-first": (b"\rGET / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "bare-lf": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "bare-lf-in-headers": (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
    "bare-lf-at-the-end": (b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    "bare-cr": (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n", 400),
    "nul": (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\x00c\r\n\r\n", 400),
    "obs-fold-space": (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", 400),
    "obs-fold-tab": (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n\tc\r\n\r\n", 400),
    "obs-fold-first": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "space-before-colon": (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    "no-colon": (b"GET / HTTP/1.1\r\nHost: a\r\nnonsense\r\n\r\n", 400),
    "bad-name": (b"GET / HTTP/1.1\r\nHost: a\r\nx(y): z\r\n\r\n", 400),
    "no-name": (b"GET / HTTP/1.1\r\nHost: a\r\n: z\r\n\r\n", 400),
    "no-host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two-hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "no-version": (b"GET /\r\n\r\n", 400),
    "two-spaces": (b"GET  / HTTP/1.1\r\n\r\n", 400),
    "space-in-target": (b"GET /a b HTTP/1.1\r\n\r\n", 400),
    "lower-http": (b"GET / http/1.1\r\n\r\n", 400),
    "long-method": (b"A" * 33 + b" / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "non-ascii-target": (b"GET /\xe9 HTTP/1.1\r\n\r\n", 400),
    "connect": (b"CONNECT a.test:443 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "ftp": (b"GET ftp://a.test/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "http-0.9": (b"GET / HTTP/0.9\r\n\r\n", 505),
    "http-2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "http-1.2": (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", 505),
    "cl-and-te": (POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400),
    "te-and-cl": (POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n", 400),
    "cl-0-and-te": (POST + b"content-length: 0\r\ntransfer-encoding: chunked\r\n\r\n", 400),
    "length-twice-the-same": (POST + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello", 400),
    "two-lengths": (POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
    "length-list": (POST + b"content-length: 5, 6\r\n\r\n", 400),
    "length-sign": (POST + b"content-length: +5\r\n\r\n", 400),
    "length-negative": (POST + b"content-length: -5\r\n\r\n", 400),
    "length-hex": (POST + b"content-length: 0x5\r\n\r\n", 400),
    "length-underscore": (POST + b"content-length: 1_0\r\n\r\n", 400),
    "length-empty": (POST + b"content-length: \r\n\r\n", 400),
    "length-huge": (POST + b"content-length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    "te-1.0": (b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n", 400),
    "te-gzip": (POST + b"transfer-encoding: gzip\r\n\r\n", 501),
    "te-list": (POST + b"transfer-encoding: gzip, chunked\r\n\r\n", 501),
    "te-twice": (POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n", 501),
    "te-identity": (POST + b"transfer-encoding: identity\r\n\r\n", 501),
    "te-odd": (POST + b"transfer-encoding: \x0bchunked\r\n\r\n", 400),
    "chunk-size": (POST + b"transfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
    "chunk-size-sign": (POST + b"transfer-encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk-size-0x": (POST + b"transfer-encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk-size-long": (POST + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n", 400),
    "chunk-end": (POST + b"transfer-encoding: chunked\r\n\r\n3\r\nhelXX0\r\n\r\n", 400),
    "chunk-extension-lf": (POST + b"transfer-encoding: chunked\r\n\r\n3;a\nb\r\nhel\r\n0\r\n\r\n", 400),
    "chunk-size-lf": (POST + b"transfer-encoding: chunked\r\n\r\n3\nhel\r\n0\r\n\r\n", 400),
    "trailer-lf": (POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: y\nz: w\r\n\r\n", 400),
    "trailer-ends-in-lf": (POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: y\r\n\n", 400),
    "trailer-of-lf": (POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: y\n\n", 400),
    "trailer-fold": (POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: y\r\n z\r\n\r\n", 400),
    "trailer-fold-first": (POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: y\r\n\tz\r\nv: w\r\n\r\n", 400),
    "last-chunk-lf": (POST + b"transfer-encoding: chunked\r\n\r\n0\r\n\n", 400),
}


@pytest.mark.parametrize(("data", "status"), BAD.values(), ids=BAD)
def test_a_request_is_refused_however_it_is_cut(data: bytes, status: int) -> None:
    whole = read([data])
    assert whole.error is not None
    assert whole.error[1] == status
    assert not whole.ended
    assert read(one_by_one(data)) == whole
    for at in range(1, len(data)):
        assert read([data[:at], data[at:]]) == whole


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nAuthorization secret\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization(: Bearer secret\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\nsecret\r\n",
        b"GET /secret secret\r\n\r\n",
    ],
)
def test_an_error_quotes_nothing_of_the_request(data: bytes) -> None:
    error = read([data]).error
    assert error is not None
    assert "secret" not in error[0]
    assert "b'" not in error[0]


@given(st.binary(max_size=80), st.data())
def test_any_bytes_give_the_same_however_they_are_cut(noise: bytes, data: st.DataObject) -> None:
    raw = (
        data.draw(st.sampled_from([b"", b"\r\n", b"GET / HTTP/1.1\r\n", POST, POST + b"content-length: 9\r\n\r\n"]))
        + noise
    )
    whole = read([raw])
    assert read(one_by_one(raw)) == whole
    assert read(data.draw(splits(raw))) == whole


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_a_damaged_request_gives_the_same_however_it_is_cut(name: str, data: st.DataObject) -> None:
    raw = bytearray(GOOD[name][0])
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=3)):
        raw[at] = data.draw(st.sampled_from(b"\r\n\x00 \t:;0a,"))
    whole = read([bytes(raw)])
    assert read(one_by_one(bytes(raw))) == whole
    assert read(data.draw(splits(bytes(raw)))) == whole


# --------------------------------------------------------------------------------------------------------- the limits


def head_of(length: int) -> bytes:
    empty = b"GET / HTTP/1.1\r\nHost: a\r\nx: \r\n\r\n"
    return b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"a" * (length - len(empty)) + b"\r\n\r\n"


def test_the_longest_head() -> None:
    assert len(head_of(MAX_HEAD_BYTES)) == MAX_HEAD_BYTES
    assert read([head_of(MAX_HEAD_BYTES)]).error is None
    error = read([head_of(MAX_HEAD_BYTES + 1)]).error
    assert error is not None
    assert error[1] == 431


def test_a_limit_of_ones_own() -> None:
    reader = RequestReader(max_head_bytes=100)
    with pytest.raises(LimitExceeded) as caught:
        reader.receive_data(head_of(101))
    assert (caught.value.limit, caught.value.maximum, caught.value.status) == ("max_head_bytes", 100, 431)


def test_a_head_without_an_end_is_refused_at_the_limit() -> None:
    reader = RequestReader(max_head_bytes=100)
    assert reader.receive_data(b"GET /" + b"a" * 95) == []
    with pytest.raises(LimitExceeded):
        reader.receive_data(b"a")


def test_a_long_body_is_no_long_head() -> None:
    body = b"x" * 1000
    seen = read([POST + b"content-length: 1000\r\n\r\n" + body], max_head_bytes=100)
    assert seen.error is None
    assert seen.body == body


def test_endless_trailers_are_refused() -> None:
    error = read([POST + b"transfer-encoding: chunked\r\n\r\n0\r\n", *[b"a: b\r\n"] * MAX_HEAD_BYTES]).error
    assert error is not None
    assert error[1] == 431


class _Counting(bytearray):
    """A buffer that counts the bytes that are searched in it."""

    looked = 0

    def find(self, *args: Any) -> int:
        self._look(*args)
        return super().find(*args)

    def count(self, *args: Any) -> int:
        self._look(*args)
        return super().count(*args)

    def _look(self, sub: bytes, start: int = 0, end: int | None = None) -> None:
        del sub
        _Counting.looked += len(range(len(self))[start:end])


def test_a_head_byte_by_byte_is_linear_work() -> None:
    reader = RequestReader()
    reader._buffer = _Counting()
    _Counting.looked = 0
    events = [event for piece in one_by_one(head_of(20_000)) for event in reader.receive_data(piece)]
    assert len(events) == 2
    assert _Counting.looked < 20 * 20_000


# ------------------------------------------------------------------------------------------------- one after the other


def where(reader: RequestReader) -> tuple[bool, bool]:
    return reader.holding, reader.mid_request


def test_requests_that_follow_each_other() -> None:
    reader = RequestReader()
    first = POST + b"content-length: 3\r\n\r\nabc"
    events = reader.receive_data(first + GET + POST + b"content-length: 2\r\n\r\nx")
    assert [type(event) for event in events] == [HeadReceived, BodyReceived, BodyEnded]
    assert where(reader) == (True, False)
    assert [type(event) for event in reader.next_request()] == [HeadReceived, BodyEnded]
    assert [type(event) for event in reader.next_request()] == [HeadReceived, BodyReceived]
    assert where(reader) == (False, True)
    with pytest.raises(LocalProtocolError):
        reader.next_request()
    assert reader.receive_data(b"y") == [BodyReceived(b"y"), BodyEnded()]
    assert reader.next_request() == []
    assert not reader.mid_request


def test_pipelined_bytes_are_held_up_to_the_limit() -> None:
    reader = RequestReader(max_pipelined_bytes=len(GET))
    reader.receive_data(GET)
    assert reader.receive_data(GET[:10]) == []
    assert reader.receive_data(GET[10:]) == []
    assert not reader.overflowed
    assert [type(event) for event in reader.next_request()] == [HeadReceived, BodyEnded]
    assert not reader.overflowed


@pytest.mark.parametrize("sizes", [[MAX_PIPELINED_BYTES + 1], [MAX_PIPELINED_BYTES, 1], [1, MAX_PIPELINED_BYTES, 5]])
def test_too_many_pipelined_bytes_are_dropped(sizes: list[int]) -> None:
    reader = RequestReader()
    reader.receive_data(GET)
    for size in sizes:
        assert reader.receive_data(b"x" * size) == []
    assert reader.overflowed
    assert not reader._buffer
    reader.receive_data(b"y")
    assert not reader._buffer


def test_too_many_pipelined_bytes_in_the_read_that_ends_the_request() -> None:
    reader = RequestReader(max_pipelined_bytes=10)
    events = reader.receive_data(POST + b"content-length: 1\r\n\r\na" + b"x" * 11)
    assert isinstance(events[-1], BodyEnded)
    assert reader.overflowed


def test_where_the_end_of_input_cuts_a_request() -> None:
    reader = RequestReader()
    assert not reader.mid_request
    for empty in (b"\r\n", b"\r", b"\n", b""):
        reader.receive_data(empty)
        assert not reader.mid_request
    for piece in (b"G", GET[1:-1]):
        reader.receive_data(piece)
        assert reader.mid_request
    reader.receive_data(GET[-1:])
    assert not reader.mid_request
    reader.receive_data(b"more")
    assert not reader.mid_request  # nobody waits for what was sent ahead


def test_a_closed_reader_takes_nothing() -> None:
    reader = RequestReader()
    reader.receive_data(GET[:5])
    reader.close()
    assert not reader.mid_request
    with pytest.raises(LocalProtocolError):
        reader.receive_data(b"x")
    with pytest.raises(LocalProtocolError):
        reader.next_request()


# ----------------------------------------------------------------------------------------------- differential with h11

TOKEN = st.text("!#$%&'*+-.^_`|~azAZ09", min_size=1, max_size=8)
VALUE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E) | st.sampled_from(" \t"), max_size=12).map(
    str.strip
)
RESERVED = {"host", "content-length", "transfer-encoding", "connection", "expect"}


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Draw a request that is well formed."""
    method = draw(st.sampled_from(["GET", "POST", "PUT", "OPTIONS"]) | TOKEN)
    visible = st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#")
    target = "/" + draw(st.text(visible, max_size=12))
    drawn = draw(st.lists(st.tuples(TOKEN, VALUE), max_size=4))
    headers = [("Host", "a.test"), *((name, value) for name, value in drawn if name.lower() not in RESERVED)]
    body = draw(st.binary(max_size=40))
    payload = b""
    if draw(st.booleans()):
        headers.append(("Content-Length", str(len(body))))
        payload = body
    elif draw(st.booleans()):
        headers.append(("transfer-encoding", "chunked"))
        size = draw(st.integers(1, 9))
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        payload = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    gap = draw(st.sampled_from(["", " ", " \t"]))
    lines = "".join(f"{name}:{gap}{value}\r\n" for name, value in headers)
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + payload


@given(requests(), st.data())
def test_well_formed_requests_are_read_as_h11_reads_them(raw: bytes, data: st.DataObject) -> None:
    server = h11.Connection(h11.SERVER)
    server.receive_data(raw)
    request = server.next_event()
    assert isinstance(request, h11.Request)
    body = b""
    while isinstance(event := server.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    seen = read(data.draw(splits(raw)))
    found = head(seen)
    assert found.method.encode() == request.method
    assert f"{found.path}?{found.query}".rstrip("?") == bytes(request.target).decode().rstrip("?")
    assert list(found.headers) == [(bytes(name), bytes(value)) for name, value in request.headers]
    assert (seen.body, seen.ended, seen.error) == (body, True, None)


# ---------------------------------------------------------------------------------------------------------- the writer

HEADERS = (("content-type", "text/plain"),)


def stream(writer: ResponseWriter, *payloads: bytes, status: int = 200) -> bytes:
    parts = [writer.begin(ResponseHead(status, HEADERS)), *map(writer.frame, payloads), writer.end()]
    return b"".join(parts)


@pytest.mark.parametrize(
    ("method", "version", "status", "framing"),
    [
        ("GET", "1.1", 200, BodyFraming.CHUNKED),
        ("POST", "1.1", 500, BodyFraming.CHUNKED),
        ("GET", "1.0", 200, BodyFraming.UNTIL_CLOSE),
        ("HEAD", "1.1", 200, BodyFraming.NONE),
        ("HEAD", "1.0", 200, BodyFraming.NONE),
        ("GET", "1.1", 204, BodyFraming.NONE),
        ("GET", "1.1", 304, BodyFraming.NONE),
    ],
)
def test_a_stream_in_every_framing(method: str, version: str, status: int, framing: BodyFraming) -> None:
    writer = ResponseWriter(method=method, version=version)
    data = stream(writer, b"hel", b"", b"lo", status=status)
    assert writer.body is framing
    assert writer.keep_alive is (framing is not BodyFraming.UNTIL_CLOSE)
    ended = framing is BodyFraming.UNTIL_CLOSE
    (answer,) = read_answers(data, [method], ended=ended)
    assert answer.status == status
    assert answer.whole
    assert answer.body == (b"" if framing is BodyFraming.NONE else b"hello")
    assert answer.header("content-length") is None
    assert answer.header("transfer-encoding") == ("chunked" if framing is BodyFraming.CHUNKED else None)
    assert answer.header("connection") == ("close" if ended else None)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("status", [200, 204, 304, 404])
def test_a_whole_answer_has_a_length(method: str, version: str, status: int) -> None:
    writer = ResponseWriter(method=method, version=version)
    data = writer.reply(Reply(status, HEADERS, b"" if status in {204, 304} else b"hello"))
    (answer,) = read_answers(data, [method], ended=False)
    assert (answer.status, answer.whole) == (status, True)
    if status in {204, 304}:
        assert (answer.body, answer.header("content-length")) == (b"", None)
    else:
        assert answer.header("content-length") == "5"
        assert answer.body == (b"" if method == "HEAD" else b"hello")
    assert writer.keep_alive


@pytest.mark.parametrize(("asked", "close"), [(False, False), (True, True)])
def test_an_answer_that_is_the_last_says_so(asked: bool, close: bool) -> None:
    writer = ResponseWriter(keep_alive=asked)
    data = writer.reply(Reply(200, (), b"x", close=close))
    assert b"connection: close\r\n" in data
    assert not writer.keep_alive


def template(tail: bytes | None) -> Template:
    return Template(b"<", b">", str.encode, tail)


@given(
    st.sampled_from([("GET", "1.1"), ("GET", "1.0"), ("HEAD", "1.1")]),
    st.sampled_from([None, b"", b"\n\n"]),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.just("x" * 5000), max_size=5),
)
def test_a_folded_template_is_a_framed_payload(kind: tuple[str, str], tail: bytes | None, texts: list[str]) -> None:
    method, version = kind
    slow = ResponseWriter(method=method, version=version)
    fast = ResponseWriter(method=method, version=version)
    assert slow.begin(ResponseHead(200)) == fast.begin(ResponseHead(200))
    fold = fast.fold(template(tail))
    for number, text in zip(itertools.count(8), texts):
        end = b"" if tail is None else b"%d%b" % (number, tail)
        assert fold.encode(text, number) == slow.frame(b"<" + text.encode() + b">" + end)


@pytest.mark.parametrize("bad", ["a\rb", "a\nb", "a\0b", "\r\n", "x\r\nset-cookie: y"])
def test_a_head_refuses_what_would_split_it(bad: str) -> None:
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        encode_head(200, (("x", bad),))
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        encode_head(200, ((bad, "x"),))


def test_a_head_is_latin_1() -> None:
    assert encode_head(200, (("x", "\xe9"),)) == b"HTTP/1.1 200 OK\r\nx: \xe9\r\n\r\n"
    with pytest.raises(ValueError, match="latin-1"):
        encode_head(200, (("x", "\u20ac"),))


@pytest.mark.parametrize(
    ("status", "line"), [(431, b"431 Request Header Fields Too Large"), (529, b"529 "), (200, b"200 OK")]
)
def test_status_lines(status: int, line: bytes) -> None:
    assert encode_head(status, ()) == b"HTTP/1.1 " + line + b"\r\n\r\n"
