"""One request and its answer as events: every sort of answer, however it is cut, with exactly one terminal event."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace
from tests.strategies import legal_streams, splits

from tokenwire.core.client import MAX_ERROR_BYTES, MAX_RESULT_BYTES, StreamClient, retry_after_ns
from tokenwire.core.collect import Collector, Result
from tokenwire.core.contracts import Dialect
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.errors import LocalProtocolError
from tokenwire.core.events import (
    TERMINALS,
    ErrorKind,
    Event,
    StreamEnd,
    StreamError,
    StreamTruncated,
    TextDelta,
)
from tokenwire.core.request import GenerationRequest, Message, TextPart

SECOND: Final = 1_000_000_000
CHAT: Final = openai_chat.DIALECT
PLAIN: Final = plain.DIALECT
SSE = b"content-type: text/event-stream\r\n"
JSON = b"Content-Type: application/json; charset=utf-8\r\n"


def client(dialect: Dialect = CHAT, *, wall_s: int = 0) -> StreamClient:
    return StreamClient(dialect, b"{}", target="/x", host="a", wall_s=wall_s)


def head(status: int, *lines: bytes) -> bytes:
    return b"HTTP/1.1 %d .\r\n%b\r\n" % (status, b"".join(lines))


def chunked(body: bytes, size: int = 50) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def answer(status: int, body: bytes, *lines: bytes) -> bytes:
    return head(status, *lines, b"content-length: %d\r\n" % len(body)) + body


def hear(pieces: Sequence[bytes], dialect: Dialect = CHAT, *, eof: bool = True, wall_s: int = 0) -> list[Event]:
    """Hand pieces to a client; what it says ends with the only terminal event where the input ended."""
    stream = client(dialect, wall_s=wall_s)
    events = [event for piece in pieces for event in stream.receive_data(piece)]
    if eof:
        events += stream.receive_eof()
        assert stream.receive_eof() == []
        with pytest.raises(LocalProtocolError):
            stream.receive_data(b"x")
        assert sum(isinstance(event, TERMINALS) for event in events) == 1
    if stream.terminal is not None:
        assert events[-1] is stream.terminal
    return events


def last_error(pieces: Sequence[bytes], **options: Any) -> StreamError:
    last = hear(pieces, **options)[-1]
    assert isinstance(last, StreamError)
    return last


def uncounted(events: Sequence[Event]) -> list[Event]:
    """Leave out the size of the read that a truncation was found in."""
    return [replace(event, bytes_seen=0) if isinstance(event, StreamTruncated) else event for event in events]


def connection_of(stream: StreamClient) -> str:
    """What may become of the connection."""
    assert not (stream.reusable and stream.may_become_reusable)
    return "reusable" if stream.reusable else "pending" if stream.may_become_reusable else "lost"


def folded(events: Sequence[Event]) -> Result:
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector.result()


def one_by_one(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def chunk(**members: Any) -> bytes:
    choice = dict[str, Any](index=0, delta=dict[str, Any]()) | members
    return b"data: %b\n\n" % msgspec.json.encode({"id": "c", "created": 1, "model": "m", "choices": [choice]})


HELLO = chunk(delta={"role": "assistant", "content": ""}) + chunk(delta={"content": "hello"})
FINISH = chunk(finish_reason="stop")
DONE = b"data: [DONE]\n\n"
STREAM = HELLO + FINISH + DONE
WHOLE = b'{"id":"c","model":"m","choices":[{"index":0,"message":{"content":"hello"},"finish_reason":"stop"}]}'


# -------------------------------------------------------------------------------------------------------- its request


def test_the_request_asks_for_what_can_be_read_and_is_sent_once() -> None:
    request = GenerationRequest(model="m", messages=(Message("user", (TextPart("hi"),)),), stream=True)
    stream = StreamClient(
        CHAT, request, target="/v1/chat/completions", host="a.test", headers=(("authorization", "Bearer k"),)
    )
    data = stream.data_to_send()
    lines, body = data.split(b"\r\n\r\n", 1)
    assert lines.split(b"\r\n")[:3] == [
        b"POST /v1/chat/completions HTTP/1.1",
        b"host: a.test",
        b"accept: text/event-stream, application/json",
    ]
    assert b"\r\naccept-encoding: identity\r\n" in lines
    assert b"\r\ncontent-type: application/json\r\n" in lines
    assert b"\r\nauthorization: Bearer k" in lines
    assert CHAT.parse_request(body, {}, frozenset()).request == request
    assert stream.data_to_send() == b""


def test_a_body_of_bytes_is_sent_as_it_is_and_headers_can_be_replaced() -> None:
    stream = StreamClient(CHAT, b"\x00raw", target="/", host="a", headers=(("User-Agent", "mine"),))
    data = stream.data_to_send()
    assert data.endswith(b"content-length: 4\r\n\r\n\x00raw")
    assert data.lower().count(b"user-agent") == 1
    assert b"user-agent: mine\r\n" in data


def test_a_header_that_would_break_the_request_is_refused() -> None:
    with pytest.raises(ValueError, match="authorization"):
        StreamClient(CHAT, b"", target="/", host="a", headers=(("authorization", "a\r\nb: c"),))


# ---------------------------------------------------------------------------------------------------------- a stream

FRAMINGS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "chunked": lambda body: head(200, SSE, b"transfer-encoding: chunked\r\n") + chunked(body) + b"0\r\n\r\n",
    "length": lambda body: answer(200, body, SSE),
    "until close": lambda body: head(200, SSE) + body,
    "interim": lambda body: head(103) + answer(200, body, SSE),
    "no type": lambda body: answer(200, body),
}  # fmt: skip


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_stream_is_heard_in_every_framing(framing: str) -> None:
    wire = FRAMINGS[framing](STREAM)
    assert folded(hear([wire], eof=False)) == folded(hear(one_by_one(wire))) == folded(hear([wire]))
    result = folded(hear([wire]))
    assert result.choices[0].text == "hello"
    assert result.terminal == StreamEnd()


@given(legal_streams(choices=2, failures=False), st.sampled_from(sorted(FRAMINGS)), st.data())
@settings(max_examples=60)
def test_the_events_do_not_depend_on_cuts_and_framing(events: list[Event], framing: str, data: st.DataObject) -> None:
    request = GenerationRequest(model="m", messages=(Message("user"),), n=2, stream=True, include_usage=True)
    encoder = CHAT.encoder(request, "id")
    body = b"".join(encoder.encode(event, number) for number, event in enumerate(events, 1))
    decoder = CHAT.decoder()
    bare = [*decoder.receive_data(body), *decoder.receive_eof()]
    wire = FRAMINGS[framing](body)
    assert hear(data.draw(splits(wire))) == bare


def test_plain_is_heard_too() -> None:
    body = b'data: {"token":"a"}\n\ndata: {"token":"","finish_reason":"stop"}\n\ndata: [DONE]\n\n'
    result = folded(hear(one_by_one(answer(200, body, SSE)), PLAIN))
    assert result.choices[0].text == "a"
    assert result.terminal == StreamEnd()


def test_what_comes_after_the_end_is_dropped_and_the_connection_given_up() -> None:
    stream = client()
    stream.receive_data(head(200, SSE, b"transfer-encoding: chunked\r\n") + chunked(STREAM))
    assert stream.terminal == StreamEnd()
    assert connection_of(stream) == "pending"
    assert stream.receive_data(chunked(HELLO)) == []
    assert stream.receive_data(b"0\r\n\r\n") == []
    assert connection_of(stream) == "reusable"
    assert stream.receive_data(b"HTTP/1.1 200 OK\r\n") == []
    assert connection_of(stream) == "lost"
    assert stream.receive_data(b"more") == []
    assert stream.receive_eof() == []
    assert stream.terminal == StreamEnd()


def test_a_connection_without_keep_alive_never_becomes_reusable() -> None:
    stream = client()
    stream.receive_data(answer(200, STREAM, SSE, b"connection: close\r\n"))
    assert stream.terminal == StreamEnd()
    assert connection_of(stream) == "lost"


# --------------------------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_body_cut_short_is_truncation_wherever_it_is_cut(framing: str) -> None:
    wire = FRAMINGS[framing](HELLO + FINISH)
    begun = wire.index(b"\r\n\r\n") + 4
    last: Event | None = None
    for end in range(len(wire)):
        for pieces in ([wire[:end]], one_by_one(wire[:end])):
            last = hear(pieces)[-1]
            assert isinstance(last, StreamTruncated)
            assert "closed" in last.reason
            assert last.bytes_seen == 0 or end > begun
    assert isinstance(last, StreamTruncated)
    assert last.bytes_seen == len(HELLO + FINISH) - (framing == "length")


def test_a_stream_without_its_end_is_truncation_though_http_is_whole() -> None:
    last = hear([answer(200, HELLO, SSE)])[-1]
    assert isinstance(last, StreamTruncated)
    assert last.bytes_seen == len(HELLO)


def test_nothing_at_all_is_truncation() -> None:
    assert hear([]) == [StreamTruncated("the connection was closed before an answer came")]
    stream = client()
    assert not stream.begun
    stream.receive_data(b"H")
    assert stream.begun


def test_a_success_that_only_lacks_the_end_of_http_stays_one() -> None:
    wire = head(200, SSE, b"transfer-encoding: chunked\r\n") + chunked(STREAM)
    assert hear([wire])[-1] == StreamEnd()


def test_a_stream_that_has_finished_without_its_last_word_is_whole_only_where_http_is() -> None:
    whole = head(200, SSE, b"transfer-encoding: chunked\r\n") + chunked(HELLO + FINISH)
    assert hear([whole + b"0\r\n\r\n"])[-1] == StreamEnd()
    assert isinstance(hear([whole])[-1], StreamTruncated)


def test_broken_chunks_end_a_stream_with_an_error_after_what_was_whole() -> None:
    events = hear([head(200, SSE, b"transfer-encoding: chunked\r\n") + chunked(HELLO) + b"oops\r\n"])
    assert folded(events[:-1]).choices[0].text == "hello"
    assert isinstance(events[-1], StreamError)
    assert (events[-1].status, events[-1].code) == (502, "malformed_response")


# ------------------------------------------------------------------------------------------------------------- errors


def test_an_error_keeps_its_words_and_its_wait() -> None:
    body = b'{"error":{"message":"Slow down.","type":"tokens","param":null,"code":"rate_limit_exceeded"}}'
    wire = answer(429, body, JSON, b"Retry-After: 7\r\n")
    error = last_error([wire], eof=False)
    assert error.kind is ErrorKind.RATE_LIMIT
    assert (error.message, error.code, error.status, error.retry_after_ns) == (
        "Slow down.",
        "rate_limit_exceeded",
        429,
        7 * SECOND,
    )
    assert error.retryable
    assert last_error(one_by_one(wire)) == error
    assert last_error([wire[:-5]]).status == 429


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 413, 422, 429, 500, 502, 503, 504, 529, 599, 600, 799])
@pytest.mark.parametrize("body", [b"", b"<html>no</html>", b'{"error":"no"}', b"{", b"\xff\xfe", b'{"detail":[1]}'])
def test_any_error_body_gives_an_error_with_its_status(status: int, body: bytes) -> None:
    wire = answer(status, body, b"content-type: text/html\r\n")
    error = last_error([wire])
    assert error.status == status
    assert error.message
    assert error == last_error(one_by_one(wire))


def test_an_endless_error_page_is_cut_off() -> None:
    page = b"x" * (MAX_ERROR_BYTES + 1)
    stream = client()
    events = stream.receive_data(head(500) + page)
    assert [type(event) for event in events] == [StreamError]
    assert stream.receive_data(page) == []
    assert not stream.reusable
    assert hear([head(500), *[page[at : at + 999] for at in range(0, len(page), 999)]], eof=False) == events


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_a_redirect_is_an_error_and_says_so(status: int) -> None:
    error = last_error([answer(status, b"", b"location: https://evil.test/\r\n")] if status != 304 else [head(304)])
    assert (error.code, error.status) == ("redirect", status)
    assert "not followed" in error.message
    assert "evil" not in error.message


def test_an_encoded_body_is_not_read() -> None:
    error = last_error([answer(200, b"\x1f\x8b", SSE, b"content-encoding: gzip\r\n")])
    assert (error.code, error.status) == ("content_encoding", 502)
    assert "gzip" in error.message
    twice = (b"content-encoding: identity\r\n", b"content-encoding: br\r\n")
    assert last_error([answer(200, b"x", SSE, *twice)]).code == "content_encoding"
    assert hear([answer(200, STREAM, SSE, b"content-encoding: Identity\r\n")])[-1] == StreamEnd()


def test_an_encoded_error_keeps_its_status() -> None:
    error = last_error([answer(429, b"\x1f\x8b", JSON, b"content-encoding: gzip\r\n", b"retry-after: 3\r\n")])
    assert (error.status, error.retry_after_ns, error.kind) == (429, 3 * SECOND, ErrorKind.RATE_LIMIT)


@pytest.mark.parametrize("media_type", [b"text/html", b"text/plain; charset=utf-8", b"application/octet-stream"])
def test_a_body_of_another_type_is_not_read(media_type: bytes) -> None:
    error = last_error([answer(200, b"<html>", b"content-type: %b\r\n" % media_type)])
    assert (error.code, error.status) == ("content_type", 502)


@pytest.mark.parametrize("data", [b"garbage", b"HTTP/1.1 2 OK\r\n\r\n", b"HTTP/1.1 200 OK\n", head(101)])
def test_what_is_no_http_is_an_error(data: bytes) -> None:
    error = last_error([data])
    assert (error.code, error.status) == ("malformed_response", 502)
    assert last_error(one_by_one(data)) == error


def test_json_where_a_stream_was_asked_for_is_a_whole_answer() -> None:
    wire = answer(200, WHOLE, JSON)
    result = folded(hear([wire], eof=False))
    assert result.choices[0].text == "hello"
    assert result.terminal == StreamEnd()
    assert hear(one_by_one(wire)) == hear([wire])
    assert isinstance(hear([wire[:-1]])[-1], StreamTruncated)
    assert isinstance(hear([answer(200, b"{}", JSON)])[-1], StreamError | StreamTruncated)


def test_an_endless_whole_answer_is_given_up() -> None:
    stream = client()
    stream.receive_data(head(200, JSON))
    piece = b" " * (1 << 20)
    events: list[Event] = []
    for _ in range(MAX_RESULT_BYTES // len(piece) + 1):
        assert not events
        events += stream.receive_data(piece)
    (error,) = events
    assert isinstance(error, StreamError)
    assert "MAX_RESULT_BYTES" in error.message


# -------------------------------------------------------------------------------------------------------- Retry-After


@pytest.mark.parametrize(
    ("lines", "wait"),
    [
        ([], None),
        ([b"retry-after: 3"], 3 * SECOND),
        ([b"retry-after: 0"], 0),
        ([b"retry-after: 1.5"], 3 * SECOND // 2),
        ([b"retry-after-ms: 250", b"retry-after: 1"], SECOND // 4),
        ([b"retry-after-ms: soon", b"retry-after: 1"], SECOND),
        ([b"retry-after: Wed, 21 Oct 2015 07:28:05 GMT"], 5 * SECOND),
        ([b"retry-after: Wed, 21 Oct 2015 07:27:00 GMT"], 0),
        ([b"retry-after: Wed, 21 Oct 2015 07:28:05 -0000"], 5 * SECOND),
        ([b"retry-after: Wednesday, 21-Oct-15 07:28:05 GMT"], 5 * SECOND),
        ([b"retry-after: -3"], None),
        ([b"retry-after: soon"], None),
        ([b"retry-after: "], None),
        ([b"retry-after: 9999999999999"], None),
        ([b"retry-after: Fri, 31 Dec 9999 23:59:59 GMT"], 999_999_999 * SECOND),
        ([b"retry-after: Wed, 99 Oct 2015 07:28:05 GMT"], None),
    ],
)
def test_how_long_a_server_asks_to_wait(lines: list[bytes], wait: int | None) -> None:
    stream = client()
    stream.receive_data(head(503, *[line + b"\r\n" for line in lines]))
    assert stream.head is not None
    assert retry_after_ns(stream.head, 1_445_412_480) == wait  # Wed, 21 Oct 2015 07:28:00 GMT


def test_a_date_is_compared_with_the_wall_clock() -> None:
    wire = answer(503, b"", b"retry-after: Wed, 21 Oct 2015 07:28:05 GMT\r\n")
    assert last_error([wire], wall_s=1_445_412_480).retry_after_ns == 5 * SECOND


# ------------------------------------------------------------------------------------------------------------ garbage

PIECES: Final = st.sampled_from(
    [
        head(200, SSE),
        head(200, SSE, b"transfer-encoding: chunked\r\n"),
        head(200, JSON, b"content-length: 20\r\n"),
        head(429, b"retry-after: 1\r\n"),
        head(307),
        head(100),
        chunked(HELLO),
        HELLO,
        FINISH,
        DONE,
        chunked(STREAM),
        b"0\r\n\r\n",
        b"\r\n",
        b'{"error":{"message":"x"}}',
        b": comment\n",
        b"\x00\xff",
    ]
) | st.binary(max_size=30)  # fmt: skip


@given(st.lists(PIECES, max_size=8), st.data())
@settings(max_examples=300)
def test_anything_gives_one_terminal_event_however_it_is_cut(pieces: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(pieces)
    cut = data.draw(splits(wire)) if wire else []
    assert uncounted(hear(cut)) == uncounted(hear([wire])) == uncounted(hear(one_by_one(wire)))


class StreamMachine(RuleBasedStateMachine):
    """Anything comes at any time, also the end of input and what comes after it."""

    @initialize(dialect=st.sampled_from([CHAT, PLAIN]))
    def begin(self, dialect: Dialect) -> None:
        self.stream = client(dialect)
        self.events: list[Event] = []
        self.sent = b""
        self.ended = False

    @rule()
    def send(self) -> None:
        data = self.stream.data_to_send()
        assert not (self.sent and data)
        self.sent += data

    @precondition(lambda self: not self.ended)
    @rule(data=PIECES)
    def receive(self, data: bytes) -> None:
        self.events += self.stream.receive_data(data)

    @rule()
    def end(self) -> None:
        events = self.stream.receive_eof()
        assert not (self.ended and events)
        self.events += events
        self.ended = True

    @precondition(lambda self: self.ended)
    @rule(data=PIECES.filter(bool))
    def misuse(self, data: bytes) -> None:
        with pytest.raises(LocalProtocolError):
            self.stream.receive_data(data)

    @invariant()
    def there_is_one_end(self) -> None:
        if not hasattr(self, "stream"):
            return
        terminals = [event for event in self.events if isinstance(event, TERMINALS)]
        assert terminals == ([self.stream.terminal] if self.stream.terminal is not None else [])
        assert not terminals or self.events[-1] is terminals[0]
        assert not self.ended or terminals
        if connection_of(self.stream) == "reusable":
            assert terminals
            assert self.stream.begun

    @invariant()
    def text_is_text(self) -> None:
        assert all(event.text for event in getattr(self, "events", ()) if isinstance(event, TextDelta))


TestStreamMachine = StreamMachine.TestCase
TestStreamMachine.settings = settings(max_examples=200, stateful_step_count=20)
