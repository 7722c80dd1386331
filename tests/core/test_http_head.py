"""Request heads against h11: what our own expression takes, h11 takes too and reads the same, however a head is damaged."""

from __future__ import annotations

from typing import NamedTuple

import h11
import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

from tokenwire.core._head import MAX_FIELDS, HeadReceived, read_usual
from tokenwire.core.contracts import RequestHead
from tokenwire.core.errors import RemoteProtocolError
from tokenwire.core.http import MAX_HEAD_BYTES, RequestReader, _read_unusual


class Read(NamedTuple):
    """All that is said of a head, in terms that both readers have."""

    method: bytes
    path: bytes
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    framing: tuple[bool, int]
    keep_alive: bool
    expects_continue: bool


def by_h11(data: bytes) -> Read | None:
    """Read a head by h11 alone; None where it objects."""
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    server.receive_data(data)
    try:
        request = server.next_event()
    except h11.RemoteProtocolError:
        return None
    assert isinstance(request, h11.Request)
    headers = tuple((bytes(name), bytes(value)) for name, value in request.headers)
    values = dict(headers)
    chunked = b"transfer-encoding" in values
    length = 0 if chunked else int(values.get(b"content-length", b"0"))
    path, _, query = bytes(request.target).partition(b"?")
    waits = server.they_are_waiting_for_100_continue
    assume(length < 1_000_000)  # it has to be sent, to see what h11 does after it
    keep_alive = _keeps_alive(server, b"0\r\n\r\n" if chunked else b"x" * length)
    return Read(bytes(request.method), path, query, headers, (chunked, length), keep_alive, waits)


def _keeps_alive(server: h11.Connection, body: bytes) -> bool:
    """Answer h11's request and see whether it would take another."""
    server.receive_data(body)
    while not isinstance(server.next_event(), h11.EndOfMessage):
        pass
    server.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
    server.send(h11.EndOfMessage())
    return server.our_state is h11.DONE


def in_common(received: HeadReceived) -> Read:
    head = received.head
    chunked = head.has_body and head.content_length is None
    return Read(
        head.method.encode(),
        head.path.encode(),
        head.query.encode(),
        head.headers,
        (chunked, head.content_length or 0),
        received.keep_alive,
        received.expects_continue,
    )


# ------------------------------------------------------------------------------------------------------ what is drawn

NAMES = st.sampled_from(
    ["Accept", "user-agent", "COOKIE", "X-A", "x-b", "Origin", "Sec-Fetch-Site", "!#$%&'*+-.^_`|~1", "Authorization"]
)
VALUES = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x7E) | st.sampled_from("\t\x80\xe9\xff"), max_size=12
).map(lambda text: text.strip(" \t"))
GAPS = st.sampled_from(["", " ", "\t", "  \t "])
FRAMING = st.sampled_from(
    [
        [],
        [("Content-Length", "0")],
        [("content-length", "5")],
        [("Content-Length", "00012")],
        [("Connection", "keep-alive")],
        [("connection", "x, CLOSE ,")],
        [("Connection", "close"), ("Content-Length", "3")],
        [("Expect", "100-Continue"), ("Content-Length", "3")],
        [("expect", "100-continue, other")],
    ]
)


@st.composite
def usual_heads(draw: st.DrawFn) -> bytes:
    """Draw what the expression must take by itself."""
    method = draw(st.sampled_from(["GET", "POST", "OPTIONS", "get", "M-SEARCH", "A" * 32]))
    visible = st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#")
    target = "/" + draw(st.text(visible, max_size=12))
    version = draw(st.sampled_from(["1.1", "1.1", "1.0"]))
    drawn = draw(st.dictionaries(NAMES, VALUES, max_size=5))
    fields = [("Host", draw(st.sampled_from(["a", "a.test:80", "[::1]:1", "127.0.0.1"]))), *drawn.items()]
    fields += draw(FRAMING)
    fields = draw(st.permutations(fields))
    lines = "".join(f"{name}:{draw(GAPS)}{value}{draw(GAPS)}\r\n" for name, value in fields)
    return f"{method} {target} HTTP/{version}\r\n{lines}\r\n".encode("latin-1")


PIECES = st.sampled_from(
    [
        b"\r\n", b"\n", b"\r", b" ", b"\t", b"\x00", b":", b"\x0b", b"\x0c", b"\x1c", b"\x7f", b"\x85", b"\xa0", b"#", b"?",
        b"/", b",", b"0", b"+", b"-", b"_", b"HTTP/1.1", b"HTTP/1.0", b"\r\n ", b"\r\n\t", b" HTTP/1.1", b"http://a/",
        b"host: b\r\n", b"Host: a\r\n", b"content-length: 5\r\n", b"Content-Length: 6\r\n", b"content-length: 5, 5\r\n",
        b"transfer-encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"connection: close\r\n", b"expect: x\r\n",
    ]
)  # fmt: skip


@st.composite
def damaged_heads(draw: st.DrawFn) -> bytes:
    """Draw a usual head and put in, take out, double and swap until it may be anything; it ends as a head does."""
    data = bytearray(draw(usual_heads()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["insert", "insert at a line", "delete", "replace", "swap"]))
        if kind == "insert":
            data[at:at] = draw(PIECES)
        elif kind == "insert at a line":
            line = data.find(b"\r\n", at) + 2
            data[line:line] = draw(PIECES)
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 6))]
        elif kind == "replace":
            data[at : at + 1] = draw(PIECES)
        else:
            data[at:] = data[at:].swapcase()
    head, _, _ = bytes(data).partition(b"\r\n\r\n")
    return head + b"\r\n\r\n"


# ------------------------------------------------------------------------------------------------------------ the tests


@given(usual_heads())
def test_usual_heads_take_the_fast_way_and_are_read_as_h11_reads_them(data: bytes) -> None:
    received = read_usual(data)
    assert received is not None
    assert in_common(received) == by_h11(data)
    assert received == _read_unusual(data, MAX_HEAD_BYTES)


@given(damaged_heads())
@example(b"GET / HTTP/1.1\r\nhost: a\r\nx: \x0b\r\n\r\n")
@example(b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\n")
@example(b"\r\n\r\n")
def test_nothing_is_accepted_that_h11_refuses(data: bytes) -> None:
    fast = read_usual(data)
    expected = by_h11(data)
    event(f"fast: {fast is not None}, h11: {expected is not None}")
    if fast is not None:
        assert in_common(fast) == expected
        assert fast == _read_unusual(data, MAX_HEAD_BYTES)
    try:
        events = RequestReader().receive_data(data)
    except RemoteProtocolError:
        assert fast is None
        return
    received = events[0] if events else None
    if isinstance(received, HeadReceived) and not data.startswith(b"\r\n") and received.head.path.startswith("/"):
        target = data.split(b" ")[1]
        assert target.startswith(b"/") is (in_common(received) == expected)


@given(st.binary(max_size=60))
def test_the_expression_takes_no_noise(noise: bytes) -> None:
    data = b"GET / HTTP/1.1\r\nhost: a\r\n" + noise + b"\r\n\r\n"
    received = read_usual(data)
    assert received is None or in_common(received) == by_h11(data)


UNUSUAL: dict[str, bytes] = {
    "two-equal-fields": b"GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\nx: 2\r\n\r\n",
    "control-character": b"GET / HTTP/1.1\r\nhost: a\r\ncookie: a\x01b\r\n\r\n",
    "absolute-form": b"GET http://a/b HTTP/1.1\r\nhost: a\r\n\r\n",
    "chunked": b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
}


@pytest.mark.parametrize("data", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_heads_go_the_slow_way(data: bytes) -> None:
    assert read_usual(data) is None
    (received, *_) = RequestReader().receive_data(data)
    assert isinstance(received, HeadReceived)
    assert received.head.headers[0] == (b"host", b"a")


@pytest.mark.parametrize("count", [MAX_FIELDS, MAX_FIELDS + 1])
@pytest.mark.parametrize("name", ["x-%d", "x"], ids=["fast", "slow"])
def test_the_number_of_fields_is_bounded(count: int, name: str) -> None:
    names = [name % number if "%" in name else name for number in range(count - 1)]
    data = b"GET / HTTP/1.1\r\nhost: a\r\n" + b"".join(f"{name}: y\r\n".encode() for name in names) + b"\r\n"
    if count <= MAX_FIELDS:
        (received, _) = RequestReader().receive_data(data)
        assert isinstance(received, HeadReceived)
        assert len(received.head.headers) == count
        return
    with pytest.raises(RemoteProtocolError) as caught:
        RequestReader().receive_data(data)
    assert caught.value.status == 431


def test_a_head_of_the_fast_way() -> None:
    data = b"POST /a?b HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nX: \t y \r\n\r\n"
    fields = ((b"host", b"a"), (b"content-length", b"3"), (b"x", b"y"))
    head = RequestHead("POST", "/a", "b", fields, has_body=True, content_length=3)
    assert read_usual(data) == HeadReceived(head, "1.1", keep_alive=True, expects_continue=False)
