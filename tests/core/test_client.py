"""HTTP/1.1 as a client: which responses are read, which are refused, however they are cut; and what a request may say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.strategies import splits

from tokenwire.core.client import (
    MAX_CHUNK_LINE_BYTES,
    MAX_INTERIM_RESPONSES,
    MAX_RESPONSE_HEAD_BYTES,
    MAX_TRAILER_BYTES,
    ResponseEvent,
    ResponseReader,
    ResponseReceived,
    encode_request,
)
from tokenwire.core.errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from tokenwire.core.http import BodyEnded, BodyFraming, BodyReceived

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


class Seen(NamedTuple):
    """What a reader has said of some bytes and the end of input after them, however they were cut."""

    head: ResponseReceived | None
    body: bytes
    ended: bool
    reusable: bool
    error: str | None


def read(pieces: Sequence[bytes], method: str = "GET", *, eof: bool = False, limit: int = 4096) -> Seen:
    """Feed pieces to one reader, stopping at an error; whole chunks take the short way, as with a StreamClient."""
    reader = ResponseReader(method, max_head_bytes=limit)
    events: list[ResponseEvent] = []
    error: str | None = None
    reusable = False
    try:
        for piece in pieces:
            body = reader.receive_whole(piece)
            events += [BodyReceived(body)] if body is not None else reader.receive_data(piece)
        reader.check()
        reusable = reader.reusable
        if eof:
            events += reader.receive_eof()
    except RemoteProtocolError as raised:
        error = f"{raised.status} {raised}"
        assert not reader.reusable
        assert reader.receive_eof() == []
        with pytest.raises(LocalProtocolError):
            reader.receive_data(b"x")
    heads = [event for event in events if isinstance(event, ResponseReceived)]
    assert events[: len(heads)] == heads
    assert len(heads) <= 1
    return Seen(
        heads[0] if heads else None,
        b"".join(event.data for event in events if isinstance(event, BodyReceived)),
        any(isinstance(event, BodyEnded) for event in events),
        reusable,
        error,
    )


def one_by_one(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


# ------------------------------------------------------------------------------------------------------- what is read


class Good(NamedTuple):
    """A response that is whole without an end of input."""

    data: bytes
    body: bytes = b""
    status: int = 200
    reusable: bool = True
    method: str = "GET"


GOOD: dict[str, Good] = {
    "length": Good(OK + b"Content-Length: 5\r\n\r\nhello", b"hello"),
    "length-0": Good(OK + b"content-length: 0\r\n\r\n"),
    "length-with-spaces": Good(OK + b"content-length: \t 5 \t\r\n\r\nhello", b"hello"),
    "no-reason": Good(b"HTTP/1.1 200 \r\ncontent-length: 1\r\n\r\nx", b"x"),
    "no-reason-and-no-space": Good(b"HTTP/1.1 200\r\ncontent-length: 1\r\n\r\nx", b"x"),
    "reason-beyond-ascii": Good(b"HTTP/1.1 200 d\xe9j\xe0\r\ncontent-length: 1\r\n\r\nx", b"x"),
    "unknown-status": Good(b"HTTP/1.1 799 ?\r\ncontent-length: 1\r\n\r\nx", b"x", 799),
    "1.0-closes": Good(b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\nx", b"x", reusable=False),
    "1.0-kept": Good(b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\ncontent-length: 1\r\n\r\nx", b"x"),
    "close": Good(OK + b"connection: foo, Close\r\ncontent-length: 1\r\n\r\nx", b"x", reusable=False),
    "close-in-the-second-line": Good(
        OK + b"connection: keep-alive\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx", b"x", reusable=False
    ),
    "head": Good(OK + b"content-length: 5\r\n\r\n", method="HEAD"),
    "head-chunked": Good(CHUNKED, method="HEAD"),
    "204": Good(b"HTTP/1.1 204 No Content\r\n\r\n", status=204),
    "204-with-a-length": Good(b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", status=204),
    "304-with-a-length": Good(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 99\r\n\r\n", status=304),
    "interim": Good(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + OK + b"content-length: 1\r\n\r\nx",
        b"x",
    ),
    "interim-most": Good(b"HTTP/1.1 102 .\r\n\r\n" * MAX_INTERIM_RESPONSES + b"HTTP/1.1 204 .\r\n\r\n", status=204),
    "chunked": Good(CHUNKED + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world"),
    "chunked-word-in-capitals": Good(OK + b"Transfer-Encoding: Chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", b"x"),
    "chunked-empty": Good(CHUNKED + b"0\r\n\r\n"),
    "chunk-size-in-capitals": Good(CHUNKED + b"0A\r\n0123456789\r\nb\r\nhello world\r\n000\r\n\r\n", b"0123456789hello world"),
    "chunk-extensions": Good(CHUNKED + b'1;a\r\nx\r\n1 ; a="b;c" ; d\r\ny\r\n0;last\r\n\r\n', b"xy"),
    "chunk-data-like-chunks": Good(
        CHUNKED + b"c\r\n1\r\n1\r\n1\r\n\r\n1\r\n2\r\n\r\n\r\n0\r\n\r\n", b"1\r\n1\r\n1\r\n\r\n1\r\n"
    ),
    "trailers": Good(CHUNKED + b"1\r\nx\r\n0\r\nexpires: never\r\nx-sum: 1 2\t3\r\n\r\n", b"x"),
    "trailer-that-would-frame": Good(CHUNKED + b"1\r\nx\r\n0\r\ncontent-length: 7\r\n\r\n", b"x"),
    "large-chunk": Good(CHUNKED + b"11170\r\n" + bytes(70_000) + b"\r\n0\r\n\r\n", bytes(70_000)),
}  # fmt: skip


def check_good(good: Good, pieces: Sequence[bytes]) -> None:
    seen = read(pieces, good.method)
    assert seen.error is None
    assert seen.head is not None
    assert (seen.head.status, seen.body, seen.ended) == (good.status, good.body, True)
    assert seen.reusable is good.reusable
    assert seen == read(pieces, good.method, eof=True)


@pytest.mark.parametrize("name", GOOD)
def test_a_response_is_read(name: str) -> None:
    good = GOOD[name]
    check_good(good, [good.data])
    if len(good.data) < 10_000:
        check_good(good, one_by_one(good.data))


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_cutting_a_response_changes_nothing(name: str, data: st.DataObject) -> None:
    check_good(GOOD[name], data.draw(splits(GOOD[name].data)))


def test_what_the_head_says_is_kept() -> None:
    seen = read([OK + b"X-One:  a b \r\nx-one: c\r\nx-empty:\r\nContent-Length: 3\r\n\r\nabc"])
    assert seen.head == ResponseReceived(
        200,
        ((b"x-one", b"a b"), (b"x-one", b"c"), (b"x-empty", b""), (b"content-length", b"3")),
        "1.1",
        True,
        BodyFraming.LENGTH,
        3,
    )
    assert seen.head is not None
    assert seen.head.header(b"x-one") == "a b"
    assert seen.head.header(b"x-none") is None


@given(st.data())
def test_a_body_lasts_until_the_end_of_input_where_nothing_else_is_told(data: st.DataObject) -> None:
    pieces = data.draw(splits(OK + b"content-type: a/b\r\n\r\nall\r\n of it"))
    assert read(pieces) == read(pieces)._replace(ended=False, reusable=False, error=None)
    seen = read(pieces, eof=True)
    assert (seen.body, seen.ended, seen.reusable, seen.error) == (b"all\r\n of it", True, False, None)


@given(
    st.lists(st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"1\r\n", b"\r\n1\r\n", b"0\r\n\r\n"])),
    st.data(),
)
@settings(max_examples=300)
def test_any_chunks_cut_anyhow_are_what_h11_reads(bodies: list[bytes], data: st.DataObject) -> None:
    wire = CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"
    pieces = data.draw(splits(wire))
    seen = read(pieces)
    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(wire)
    theirs = b""
    while not isinstance(event := peer.next_event(), h11.EndOfMessage):
        theirs += bytes(event.data) if isinstance(event, h11.Data) else b""
    assert (seen.body, seen.ended, seen.error) == (theirs, True, None)
    assert theirs == b"".join(bodies)


def test_a_read_of_whole_chunks_takes_the_short_way() -> None:
    reader = ResponseReader()
    assert reader.receive_whole(b"1\r\nx\r\n") is None
    reader.receive_data(CHUNKED)
    assert reader.receive_whole(b"5\r\nhello\r\n") == b"hello"
    assert reader.receive_whole(b"1\r\na\r\n2\r\nbc\r\n3fff\r\n" + b"d" * 0x3FFF + b"\r\n") == b"abc" + b"d" * 0x3FFF
    for other in (
        b"0\r\n\r\n",
        b"5\r\nhell\r\n",
        b"1\r\na\r\n0\r\n\r\n",
        b"1;x\r\na\r\n",
        b"+1\r\na\r\n",
        b"\r\n",
        b"",
        b"1_0\r\n",
    ):
        assert reader.receive_whole(other) is None
    assert reader.receive_data(b"2\r\na") == [BodyReceived(b"a")]
    assert reader.receive_whole(b"1\r\nx\r\n") is None
    assert reader.receive_data(b"b\r\n1") == [BodyReceived(b"b")]
    assert reader.receive_whole(b"1\r\nx\r\n") is None
    assert reader.receive_data(b"\r\nc\r\n0\r\n\r\n") == [BodyReceived(b"c"), BodyEnded()]
    assert reader.receive_whole(b"1\r\nx\r\n") is None


def calls_of(read: Callable[[bytes], object], data: bytes) -> int:
    """How many calls a read makes, ours and the interpreter's."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        del frame, argument
        count += event == "call"

    sys.setprofile(note)
    try:
        read(data)
    finally:
        sys.setprofile(None)
    return count


def test_many_chunks_in_a_read_cost_no_call_each() -> None:
    one, many = b"5\r\nhello\r\n", b"5\r\nhello\r\n" * 500
    for end in (b"", b"5\r\nhe"):
        counts: list[int] = []
        for data in (one + one, many):
            reader = ResponseReader()
            reader.receive_data(CHUNKED)
            counts.append(calls_of(reader.receive_data if end else reader.receive_whole, data + end))
        assert counts[0] == counts[1]


# ---------------------------------------------------------------------------------------------------- what is refused

MORE = OK + b"content-length: 1\r\n"
BAD: dict[str, tuple[bytes, str]] = {
    "no-http": (b"SSH-2.0-OpenSSH_9.6\r\n", "not an HTTP/1 response"),
    "tls-alert": (b"\x15\x03\x01\x00\x02\x02\x16", "not an HTTP/1 response"),
    "http-2": (b"HTTP/2 200\r\n\r\n", "not an HTTP/1 response"),
    "http-0.9": (b"<html>no</html>", "not an HTTP/1 response"),
    "empty-line-first": (b"\r\n" + MORE + b"\r\nx", "not an HTTP/1 response"),
    "version-1.2": (b"HTTP/1.2 200 OK\r\n\r\n", "status line"),
    "status-of-two-digits": (b"HTTP/1.1 20 OK\r\n\r\n", "status line"),
    "status-of-four-digits": (b"HTTP/1.1 2000 OK\r\n\r\n", "status line"),
    "status-below-100": (b"HTTP/1.1 099 OK\r\n\r\n", "status line"),
    "status-no-number": (b"HTTP/1.1 2x0 OK\r\n\r\n", "status line"),
    "two-spaces": (b"HTTP/1.1  200 OK\r\n\r\n", "status line"),
    "nul-in-reason": (b"HTTP/1.1 200 O\0K\r\n\r\n", "status line"),
    "bare-cr-in-reason": (b"HTTP/1.1 200 O\rK\r\n\r\n", "status line"),
    "bare-lf": (b"HTTP/1.1 200 OK\ncontent-length: 1\n\nx", "bare LF"),
    "bare-lf-in-a-field": (OK + b"a: b\nc: d\r\n\r\n", "bare LF"),
    "bare-lf-at-the-end": (OK + b"a: b\r\n\n", "bare LF"),
    "obs-fold": (OK + b"a: b\r\n c\r\n\r\n", "folded"),
    "obs-fold-by-tab": (OK + b"a: b\r\n\tc\r\n\r\n", "folded"),
    "space-before-colon": (OK + b"a : b\r\n\r\n", "header line"),
    "no-colon": (OK + b"a\r\n\r\n", "header line"),
    "no-name": (OK + b": b\r\n\r\n", "header line"),
    "nul-in-value": (OK + b"a: b\0c\r\n\r\n", "header line"),
    "bare-cr-in-value": (OK + b"a: b\rc\r\n\r\n", "header line"),
    "name-beyond-ascii": (OK + b"\xe9: b\r\n\r\n", "header line"),
    "length-beside-chunked": (MORE + b"transfer-encoding: chunked\r\n\r\n", "beside"),
    "two-lengths": (MORE + b"content-length: 2\r\n\r\n", "one number"),
    "same-length-twice": (MORE + b"content-length: 1\r\n\r\n", "one number"),
    "length-list": (OK + b"content-length: 1, 1\r\n\r\n", "one number"),
    "length-signed": (OK + b"content-length: +1\r\n\r\n", "one number"),
    "length-negative": (OK + b"content-length: -1\r\n\r\n", "one number"),
    "length-hexadecimal": (OK + b"content-length: 0x1\r\n\r\n", "one number"),
    "length-underscore": (OK + b"content-length: 1_0\r\n\r\n", "one number"),
    "length-empty": (OK + b"content-length:\r\n\r\n", "one number"),
    "length-huge": (OK + b"content-length: %b\r\n\r\n" % (b"9" * 5000), "max_head_bytes"),
    "length-too-long": (OK + b"content-length: %b\r\n\r\n" % (b"9" * 16), "one number"),
    "chunked-in-1.0": (b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", "HTTP/1.0"),
    "gzip-chunked": (OK + b"transfer-encoding: gzip, chunked\r\n\r\n", "once"),
    "chunked-twice": (OK + b"transfer-encoding: chunked, chunked\r\n\r\n", "once"),
    "chunked-in-two-lines": (OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n", "once"),
    "identity": (OK + b"transfer-encoding: identity\r\n\r\n", "once"),
    "xchunked": (OK + b"transfer-encoding: xchunked\r\n\r\n", "once"),
    "chunked-in-204": (b"HTTP/1.1 204 .\r\ntransfer-encoding: gzip\r\n\r\n", "once"),
    "head-too-long": (OK + b"a: %b\r\n\r\n" % bytes(5000).replace(b"\0", b"x"), "max_head_bytes"),
    "switching-protocols": (b"HTTP/1.1 101 .\r\nupgrade: websocket\r\n\r\n", "nobody asked"),
    "interim-too-often": (b"HTTP/1.1 100 .\r\n\r\n" * (MAX_INTERIM_RESPONSES + 1), "MAX_INTERIM_RESPONSES"),
    "more-after-length": (MORE + b"\r\nxy", "more than one"),
    "more-after-none": (b"HTTP/1.1 204 .\r\n\r\nx", "more than one"),
    "more-after-head": (MORE + b"\r\nx", "more than one"),
    "more-after-chunked": (CHUNKED + b"0\r\n\r\n\r\n", "more than one"),
    "second-response": (b"HTTP/1.1 204 .\r\n\r\n" + MORE + b"\r\nx", "more than one"),
    "chunk-size-missing": (CHUNKED + b"\r\n", "size"),
    "chunk-size-no-number": (CHUNKED + b"x\r\n", "size"),
    "chunk-size-signed": (CHUNKED + b"+1\r\nx\r\n", "size"),
    "chunk-size-spaced": (CHUNKED + b" 1\r\nx\r\n", "size"),
    "chunk-size-prefixed": (CHUNKED + b"0x1\r\nx\r\n", "size"),
    "chunk-size-underscored": (CHUNKED + b"1_0\r\n" + bytes(16) + b"\r\n", "size"),
    "chunk-size-huge": (CHUNKED + b"1" * 16 + b"\r\n", "size"),
    "chunk-size-bare-lf": (CHUNKED + b"1\nx\r\n", "bare LF"),
    "chunk-size-bare-cr": (CHUNKED + b"1\rx\r\n", "size"),
    "chunk-extension-lf": (CHUNKED + b"1;a\nb\r\nx\r\n", "bare LF"),
    "chunk-extension-nul": (CHUNKED + b"1;a\0\r\nx\r\n", "size"),
    "chunk-extension-long": (CHUNKED + b"1;" + b"a" * MAX_CHUNK_LINE_BYTES + b"\r\n", "MAX_CHUNK_LINE_BYTES"),
    "chunk-longer": (CHUNKED + b"1\r\nxy\r\n", "longer"),
    "chunk-end-lf": (CHUNKED + b"1\r\nx\n", "longer"),
    "chunk-end-cr": (CHUNKED + b"1\r\nx\ry", "longer"),
    "trailer-without-colon": (CHUNKED + b"0\r\nx\r\n\r\n", "trailer"),
    "trailer-folded": (CHUNKED + b"0\r\na: b\r\n c\r\n\r\n", "trailer"),
    "trailer-bare-lf": (CHUNKED + b"0\r\na: b\n\r\n", "bare LF"),
    "trailers-bare-lf-end": (CHUNKED + b"0\r\n\n", "bare LF"),
    "trailer-nul": (CHUNKED + b"0\r\na: \0\r\n\r\n", "trailer"),
    "trailer-long": (CHUNKED + b"0\r\na: " + b"x" * MAX_TRAILER_BYTES + b"\r\n\r\n", "MAX_TRAILER_BYTES"),
    "trailers-many": (CHUNKED + b"0\r\n" + b"a: b\r\n" * (MAX_TRAILER_BYTES // 6 + 1), "MAX_TRAILER_BYTES"),
}  # fmt: skip


def refused(name: str, pieces: Sequence[bytes]) -> Seen:
    seen = read(pieces, "HEAD" if name == "more-after-head" else "GET")
    assert seen.error is not None
    assert BAD[name][1] in seen.error
    assert seen.error.startswith("502 ")
    return seen


@pytest.mark.parametrize("name", BAD)
def test_a_response_is_refused(name: str) -> None:
    data = BAD[name][0]
    assert refused(name, [data]) == refused(name, one_by_one(data))


@given(st.sampled_from(sorted(BAD)), st.data())
def test_cutting_a_refused_response_changes_nothing(name: str, data: st.DataObject) -> None:
    wire = BAD[name][0]
    assert refused(name, data.draw(splits(wire))) == refused(name, [wire])


@pytest.mark.parametrize("name", BAD)
def test_nothing_that_is_refused_hangs_at_the_end_of_input(name: str) -> None:
    """Up to the byte that is wrong it is a beginning: cut there, it is reported too."""
    data = BAD[name][0]
    for end in range(0, len(data), max(1, len(data) // 200)):
        seen = read([data[:end]], "HEAD" if name == "more-after-head" else "GET", eof=True)
        assert seen.error is not None or seen.ended


@pytest.mark.parametrize("name", GOOD)
def test_a_response_that_ends_too_early_is_an_error(name: str) -> None:
    good = GOOD[name]
    for end in range(0, len(good.data), max(1, len(good.data) // 200)):
        seen = read([good.data[:end]], good.method, eof=True)
        assert seen.error is not None
        assert "closed" in seen.error
        assert not seen.ended


def test_the_longest_head_and_the_one_byte_more() -> None:
    head = OK + b"a: %b\r\n\r\n"
    fitting = head % (b"x" * (MAX_RESPONSE_HEAD_BYTES - len(head) + 2))
    assert len(fitting) == MAX_RESPONSE_HEAD_BYTES
    assert ResponseReader().receive_data(fitting)
    with pytest.raises(LimitExceeded) as raised:
        ResponseReader().receive_data(head % (b"x" * (MAX_RESPONSE_HEAD_BYTES - len(head) + 3)))
    assert (raised.value.limit, raised.value.maximum) == ("max_head_bytes", MAX_RESPONSE_HEAD_BYTES)


@given(st.binary(max_size=60) | st.sampled_from([CHUNKED, MORE + b"\r\n"]), st.binary(max_size=60), st.data())
@example(CHUNKED, b"ffffffffffffffff\r\n", None)
@settings(max_examples=300)
def test_garbage_gives_events_or_the_peers_error(start: bytes, rest: bytes, data: st.DataObject | None) -> None:
    wire = start + rest
    pieces = data.draw(splits(wire)) if data is not None and wire else [wire]
    assert read(pieces, eof=True) == read(one_by_one(wire), eof=True)


@given(st.sampled_from(sorted(GOOD)), st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=500)
def test_what_h11_refuses_is_not_read_otherwise(name: str, at: int, byte: int) -> None:
    """Change one byte anywhere: where both read a body to its end, it is the same body."""
    good = GOOD[name]
    wire = bytearray(good.data[:500])
    wire[at % len(wire)] = byte
    seen = read([bytes(wire)], good.method)
    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method=good.method, target="/", headers=[("host", "a")]))
    peer.send(h11.EndOfMessage())
    theirs = b""
    ended = False
    try:
        peer.receive_data(bytes(wire))
        while not isinstance(event := peer.next_event(), h11.NEED_DATA | h11.PAUSED | h11.ConnectionClosed):
            theirs += bytes(event.data) if isinstance(event, h11.Data) else b""
            ended = ended or isinstance(event, h11.EndOfMessage)
    except h11.RemoteProtocolError:
        return
    if seen.ended and seen.error is None:
        assert ended
        assert seen.body == theirs


# ------------------------------------------------------------------------------------------------ one after the other


def state(reader: ResponseReader) -> tuple[bool, bool, bool, bool]:
    return reader.begun, reader.complete, reader.reusable, reader.may_become_reusable


def test_a_connection_carries_one_response_after_the_other() -> None:
    reader = ResponseReader("HEAD")
    reader.receive_data(MORE + b"\r\n")
    assert state(reader) == (True, True, True, False)
    reader.next_response("GET")
    assert state(reader) == (False, False, False, False)
    reader.receive_data(MORE + b"\r\n")
    assert state(reader) == (True, False, False, True)
    with pytest.raises(LocalProtocolError, match="no further request"):
        reader.next_response("GET")
    reader.receive_data(b"x")
    reader.next_response("GET")
    reader.receive_data(OK + b"connection: close\r\ncontent-length: 1\r\n\r\n")
    assert state(reader) == (True, False, False, False)
    reader.receive_data(b"x")
    assert state(reader) == (True, True, False, False)


def test_an_answer_nobody_asked_for_ends_an_idle_connection() -> None:
    reader = ResponseReader("GET")
    reader.receive_data(MORE + b"\r\nx")
    with pytest.raises(RemoteProtocolError, match="more than one answer"):
        reader.receive_data(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert not reader.reusable


def test_empty_bytes_mean_nothing() -> None:
    reader = ResponseReader("GET")
    assert reader.receive_data(b"") == []
    assert state(reader) == (False, False, False, False)
    reader.receive_data(MORE + b"\r\nx")
    assert reader.receive_data(b"") == []
    assert state(reader) == (True, True, True, False)
    assert reader.receive_eof() == []
    assert state(reader) == (True, False, False, False)


# ------------------------------------------------------------------------------------------------------- its requests


def test_a_request_is_what_h11_reads() -> None:
    data = encode_request(
        "POST", "/v1/x?y=%20z", host="a.test:81", headers=(("x-a", "b c"), ("x-b", "d\xe9")), body=b"{}"
    )
    peer = h11.Connection(h11.SERVER)
    peer.receive_data(data)
    request = peer.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target) == (b"POST", b"/v1/x?y=%20z")
    assert list(request.headers) == [
        (b"host", b"a.test:81"),
        (b"x-a", b"b c"),
        (b"x-b", b"d\xe9"),
        (b"content-length", b"2"),
    ]
    body = peer.next_event()
    assert isinstance(body, h11.Data)
    assert bytes(body.data) == b"{}"
    assert isinstance(peer.next_event(), h11.EndOfMessage)


@pytest.mark.parametrize(("method", "told"), [("GET", False), ("HEAD", False), ("POST", True), ("PUT", True)])
def test_the_length_of_no_body_is_told_where_one_is_expected(method: str, told: bool) -> None:
    assert (b"content-length: 0\r\n" in encode_request(method, "/", host="a")) is told


@pytest.mark.parametrize(
    ("method", "target", "host", "headers"),
    [
        ("GE T", "/", "a", ()),
        ("", "/", "a", ()),
        ("GET\r\n", "/", "a", ()),
        ("GET", "", "a", ()),
        ("GET", "x", "a", ()),
        ("GET", "http://a/", "a", ()),
        ("GET", "/a b", "a", ()),
        ("GET", "/\r\nx: y", "a", ()),
        ("GET", "/\0", "a", ()),
        ("GET", "/#x", "a", ()),
        ("GET", "/é", "a", ()),
        ("GET", "/", "", ()),
        ("GET", "/", "a b", ()),
        ("GET", "/", "a\r\nx: y", ()),
        ("GET", "/", "a", (("x", "y\r\nz: 1"),)),
        ("GET", "/", "a", (("x", "y\nz"),)),
        ("GET", "/", "a", (("x", "y\rz"),)),
        ("GET", "/", "a", (("x", "y\0"),)),
        ("GET", "/", "a", (("x", "€"),)),
        ("GET", "/", "a", (("x\r\ny", "z"),)),
        ("GET", "/", "a", (("x ", "z"),)),
        ("GET", "/", "a", (("", "z"),)),
        *[("GET", "/", "a", ((name, "1"),)) for name in ("Host", "content-length", "Transfer-Encoding", "connection", "TE")],
    ],
)  # fmt: skip
def test_a_request_that_would_be_read_otherwise_is_refused(
    method: str, target: str, host: str, headers: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(ValueError, match=r"method|target|host|header"):
        encode_request(method, target, host=host, headers=headers)


def test_a_refused_header_is_not_quoted() -> None:
    with pytest.raises(ValueError, match="authorization") as raised:
        encode_request("GET", "/", host="a", headers=(("authorization", "Bearer sk-1\r\n"),))
    assert "sk-1" not in str(raised.value)


# ----------------------------------------------------------------------------------------------------------- machine


class ReaderMachine(RuleBasedStateMachine):
    """One connection: responses come in pieces, are followed by others, break off, or are followed by nonsense."""

    @initialize()
    def begin(self) -> None:
        self.reader = ResponseReader("GET")
        self.rest: list[bytes] = []
        self.expected: Good | None = None
        self.body = b""
        self.heads = self.ends = 0
        self.kept = self.over = False

    def take(self, events: Sequence[ResponseEvent]) -> None:
        for event in events:
            self.heads += isinstance(event, ResponseReceived)
            self.ends += isinstance(event, BodyEnded)
            if isinstance(event, BodyReceived):
                self.body += event.data

    @precondition(lambda self: not self.over and self.expected is None)
    @rule(name=st.sampled_from([name for name, good in GOOD.items() if len(good.data) < 2000]), data=st.data())
    def ask(self, name: str, data: st.DataObject) -> None:
        good = GOOD[name]
        if self.heads:
            self.reader.next_response(good.method)
        else:
            self.reader = ResponseReader(good.method)
        self.expected, self.body, self.heads, self.ends, self.kept = good, b"", 0, 0, good.reusable
        cuts = sorted(data.draw(st.sets(st.integers(0, len(good.data)), max_size=5)))
        self.rest = [good.data[a:b] for a, b in pairwise([0, *cuts, len(good.data)])][::-1]

    @precondition(lambda self: not self.over and self.rest)
    @rule()
    def receive(self) -> None:
        piece = self.rest.pop()
        whole = self.reader.receive_whole(piece)
        self.take([BodyReceived(whole)] if whole is not None else self.reader.receive_data(piece))
        if not self.rest and self.expected is not None:
            assert (self.body, self.heads, self.ends) == (self.expected.body, 1, 1)
            self.over = not self.expected.reusable
            self.expected = None

    @precondition(lambda self: not self.over)
    @rule()
    def receive_nothing(self) -> None:
        assert self.reader.receive_data(b"") == []

    @precondition(lambda self: not self.over and self.expected is None)
    @rule()
    def receive_too_much(self) -> None:
        with pytest.raises(RemoteProtocolError):
            self.reader.receive_data(b"x")
        self.over = True

    @precondition(lambda self: not self.over)
    @rule()
    def end(self) -> None:
        if self.heads and self.ends:
            assert self.reader.receive_eof() == []
        else:
            with pytest.raises(RemoteProtocolError, match="closed"):
                self.reader.receive_eof()
        self.over = True

    @precondition(lambda self: self.over)
    @rule()
    def misuse(self) -> None:
        with pytest.raises(LocalProtocolError):
            self.reader.next_response("GET")
        assert self.reader.receive_eof() == []
        with pytest.raises(LocalProtocolError):
            self.reader.receive_data(b"x")

    @invariant()
    def it_is_reusable_when_whole(self) -> None:
        if not self.over and hasattr(self, "reader"):
            assert self.reader.reusable is (self.ends == 1 and self.kept)
            assert self.heads >= self.ends


TestReaderMachine = ReaderMachine.TestCase
TestReaderMachine.settings = settings(max_examples=150, stateful_step_count=25)
