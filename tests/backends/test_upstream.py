"""The gateway against a scripted server: what it asks, what it hands on, what it makes of every fault, what it keeps."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.backends.fakes import RecordingSink, request, text_of
from tests.backends.upstream_fakes import (
    DONE,
    HELLO,
    SECOND,
    STREAM,
    FakeLink,
    FakeRuntime,
    Gateway,
    answer,
    chunk,
    chunked,
    head,
)

from tokenwire.backends._upstream_models import MAX_MODELS_BYTES, read_models
from tokenwire.backends.address import Address
from tokenwire.backends.upstream import UpstreamBackend, parse_url
from tokenwire.core.contracts import ModelCard
from tokenwire.core.dialects.base import failure_of, status_of
from tokenwire.core.dialects.openai_chat import DIALECT
from tokenwire.core.dialects.plain import DIALECT as PLAIN
from tokenwire.core.events import (
    TERMINALS,
    ErrorKind,
    ReasoningDelta,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.request import Tool

WHOLE = STREAM + chunked(HELLO) + chunked(DONE) + b"0\r\n\r\n"
JSON = "content-type: application/json"


def error_of(gateway: Gateway, stream: str = "s") -> StreamError:
    """How a failed stream is worded for a client."""
    last = gateway.events(stream)[-1]
    assert isinstance(last, StreamError | StreamTruncated)
    return failure_of(last)


# -------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a.test/v1", Address("a.test", 80, False, "/v1", "a.test")),
        ("http://a.test:80", Address("a.test", 80, False, "", "a.test")),
        ("https://a.test/x/v1/", Address("a.test", 443, True, "/x/v1", "a.test")),
        ("https://a.test/v1/chat/completions", Address("a.test", 443, True, "/v1", "a.test")),
        ("https://a.test:80/v1", Address("a.test", 80, True, "/v1", "a.test:80")),
        ("http://[::1]:8080/v1", Address("::1", 8080, False, "/v1", "[::1]:8080")),
        ("HTTP://A.test:8080/v1", Address("a.test", 8080, False, "/v1", "a.test:8080")),
    ],
)
def test_a_url_says_where_the_server_is(url: str, address: Address) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "a.test/v1",
        "ftp://a.test/v1",
        "http:///v1",
        "http://",
        "http://user:pw@a.test/v1",
        "http://a.test/v1?key=1",
        "http://a.test/v1#x",
        "http://a.test:x/v1",
        "http://a.test:99999/v1",
        "http://a.test:0/v1",
        "http://a test/v1",
        "http://ä.test/v1",
        "http://a.test/v 1",
        "",
    ],
)
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_url(url)


@pytest.mark.parametrize("scheme", ["http://", "htp://", ""])
def test_a_password_in_a_url_is_not_repeated(scheme: str) -> None:
    with pytest.raises(ValueError, match="user") as raised:
        parse_url(f"{scheme}user:secret@a.test/v1")
    assert "secret" not in str(raised.value)


def test_a_key_that_cannot_be_a_header_is_refused_and_not_quoted() -> None:
    with pytest.raises(ValueError, match="authorization") as raised:
        UpstreamBackend("http://a.test", key="sk-1\nx: y")
    assert "sk-1" not in str(raised.value)


def test_a_gateway_without_a_dialer_says_so() -> None:
    with pytest.raises(RuntimeError, match="use_dialer"):
        UpstreamBackend("http://a.test").attach(FakeRuntime(), RecordingSink())


def test_it_asks_for_a_stream_with_usage_under_its_own_key() -> None:
    gateway = Gateway("https://up.test/v1", key=" sk-own\n")
    gateway.start(request("hi", model="m", max_tokens=3, stop=("x",), n=2, logprobs=True, top_logprobs=2, stream=False))
    lines, body = gateway.link.request
    assert gateway.link.call[:3] == ("up.test", 443, True)
    assert gateway.link.call.deadline == 1_000 + 10 * SECOND
    assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
    assert lines[1] == "host: up.test"
    assert "authorization: Bearer sk-own" in lines
    assert "accept-encoding: identity" in lines
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["model"], body["max_tokens"], body["stop"], body["n"]) == ("m", 3, ["x"], 2)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)


def test_without_a_key_none_is_sent() -> None:
    gateway = Gateway(key="")
    gateway.start(request())
    assert not any(line.lower().startswith("authorization") for line in gateway.link.request[0])


def test_all_that_is_asked_for_is_passed_on() -> None:
    asked: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "top_p": 0.5,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "seed": 7,
        "logit_bias": {"5": 1},
        "response_format": {"type": "json_object"},
        "reasoning_effort": "low",
        "user": "u",
    }
    gateway = Gateway()
    parsed = DIALECT.parse_request(msgspec.json.encode(asked), {}, gateway.backend.honours)
    assert parsed.ignored == ()
    gateway.start(parsed.request)
    _, body = gateway.link.request
    for name, value in asked.items():
        if name != "messages":
            assert body[name] == value
    again = DIALECT.parse_request(msgspec.json.encode(body), {}, gateway.backend.honours).request
    assert again == msgspec.structs.replace(parsed.request, stream=True, include_usage=True)


def test_what_the_servers_dialect_has_no_word_for_is_refused() -> None:
    gateway = Gateway()
    gateway.backend.dialect = PLAIN
    gateway.start(request(n=2, tools=(Tool("f"),)), stands=False)
    assert gateway.dialer.links == []
    assert gateway.sink.said == {}
    gateway.advance(0)
    assert status_of(error_of(gateway)) == 400


# ---------------------------------------------------------------------------------------------------- what is handed on


def test_a_stream_is_handed_on_as_it_comes() -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(STREAM)
    assert gateway.sink.said == {}
    gateway.link.say(chunked(HELLO))
    assert text_of([event for event in gateway.sink.said["s"] if isinstance(event, TextDelta)]) == "hello"
    gateway.link.say(chunked(DONE), b"0\r\n\r\n")
    events = gateway.events()
    assert isinstance(events[0], StreamStart)
    assert events[0].model == "up-m"
    assert events[-1] == StreamEnd()
    assert len(gateway.sink.batches) == 2


def test_tools_reasoning_usage_choices_and_logprobs_pass() -> None:
    logprobs: dict[str, Any] = {"content": [{"token": "x", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 3}}
    body = (
        chunk(delta={"reasoning_content": "hm"})
        + chunk(delta={"content": "x"}, logprobs=logprobs)
        + chunk(index=1, delta={"tool_calls": [call]})
        + chunk(index=1, finish_reason="tool_calls")
        + chunk(finish_reason="length")
        + b'data: {"id":"up","choices":[],"usage":%b}\n\n' % msgspec.json.encode(usage)
        + b"data: [DONE]\n\n"
    )
    gateway = Gateway()
    gateway.start(request(n=2))
    gateway.link.say(answer(200, body, "content-type: text/event-stream"))
    events = gateway.events(choices=2)
    assert ReasoningDelta("hm") in events
    assert ToolCallStart(0, "call_1", "f", 1) in events
    assert ToolCallDelta(0, "{}", 1) in events
    assert UsageReport(5, 7, 0, 0, 3) in events
    (text,) = [event for event in events if isinstance(event, TextDelta)]
    assert text.logprobs is not None
    assert text.logprobs[0].logprob == -0.5


def test_json_where_a_stream_was_asked_for_is_handed_on_whole() -> None:
    body = b'{"id":"x","model":"m","choices":[{"index":0,"message":{"content":"all"},"finish_reason":"stop"}]}'
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(answer(200, body, JSON))
    assert text_of(gateway.events()) == "all"
    assert gateway.events()[-1] == StreamEnd()
    assert gateway.backend.pool.idle == 1


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=8))
@settings(max_examples=60)
def test_the_servers_cuts_change_nothing(cuts: list[int]) -> None:
    gateway = Gateway()
    gateway.start(request())
    edges = sorted({0, *cuts, len(WHOLE)})
    gateway.link.say(*[WHOLE[begin:end] for begin, end in itertools.pairwise(edges)])
    assert text_of(gateway.events()) == "hello"
    assert gateway.events()[-1] == StreamEnd()
    assert gateway.backend.pool.idle == 1


# ------------------------------------------------------------------------------------------------- cancel and back-pressure


@pytest.mark.parametrize("when", ["connecting", "waiting", "answering"])
def test_cancel_drops_the_connection_at_once(when: str) -> None:
    gateway = Gateway()
    job = gateway.start(request(), stands=when != "connecting")
    if when == "answering":
        gateway.link.say(STREAM + chunked(HELLO))
    said = dict(gateway.sink.said)
    job.cancel()
    assert gateway.link.dropped
    gateway.link.stand()
    gateway.advance(1000 * SECOND)
    assert gateway.sink.said == said
    assert len(gateway.dialer.links) == 1
    assert len(gateway.clock) == 0


def test_cancel_between_two_attempts_ends_them() -> None:
    gateway = Gateway()
    job = gateway.start(request(), stands=False)
    gateway.link.fail()
    job.cancel()
    gateway.advance(1000 * SECOND)
    assert len(gateway.dialer.links) == 1
    assert gateway.sink.said == {}


def test_a_blocked_reader_holds_the_server_back_and_is_no_silence() -> None:
    gateway = Gateway(gap_ns=5 * SECOND)
    job = gateway.start(request())
    gateway.link.say(STREAM + chunked(HELLO))
    job.set_blocked(True)
    assert gateway.link.reading is False
    gateway.link.say(chunked(DONE))
    gateway.advance(100 * SECOND)
    assert len(gateway.sink.batches) == 1
    job.set_blocked(False)
    gateway.advance(0)
    assert gateway.events()[-1] == StreamEnd()
    gateway.link.say(b"0\r\n\r\n")
    assert gateway.backend.pool.idle == 1


def test_a_server_that_nobody_listens_to_yet_is_not_late() -> None:
    gateway = Gateway(first_token_ns=5 * SECOND)
    job = gateway.start(request(), stands=False)
    job.set_blocked(True)
    gateway.link.stand()
    gateway.advance(100 * SECOND)
    assert gateway.sink.said == {}
    job.set_blocked(False)
    gateway.advance(6 * SECOND)
    assert status_of(error_of(gateway)) == 504


def test_a_reader_that_is_blocked_before_the_answer_stays_so_on_every_attempt() -> None:
    gateway = Gateway()
    job = gateway.start(request(), stands=False)
    job.set_blocked(True)
    gateway.link.fail()
    gateway.advance(SECOND)
    assert len(gateway.dialer.links) == 2
    gateway.link.stand()
    gateway.link.say(WHOLE)
    assert gateway.sink.said == {}
    job.set_blocked(False)
    gateway.advance(0)
    assert gateway.events()[-1] == StreamEnd()


# --------------------------------------------------------------------------------------------------------------- errors


def test_an_error_keeps_its_status_type_code_and_wait() -> None:
    body = b'{"error":{"message":"Too long.","type":"odd_error","param":"messages","code":"context_length_exceeded"}}'
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(answer(400, body, JSON, "retry-after: 9"))
    error = error_of(gateway)
    assert (status_of(error), error.type, error.code, error.param) == (
        400,
        "odd_error",
        "context_length_exceeded",
        "messages",
    )
    assert error.message == "Too long."
    assert error.retry_after_ns == 9 * SECOND
    assert gateway.backend.pool.idle == 1


@pytest.mark.parametrize("status", [401, 403, 407])
@pytest.mark.parametrize("key", ["sk-own", ""])
def test_an_error_about_our_key_is_no_matter_of_the_clients(status: int, key: str) -> None:
    gateway = Gateway(key=key)
    gateway.start(request())
    gateway.link.say(answer(status, b'{"error":{"message":"Incorrect API key provided: sk-own"}}', JSON))
    error = error_of(gateway)
    assert status_of(error) == 502
    assert "operator" in error.message
    assert "sk-own" not in DIALECT.encode_error(error).decode()


def test_an_error_about_our_key_inside_a_stream_is_none_either() -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(
        STREAM + chunked(HELLO), chunked(b'data: {"error":{"message":"key sk-own","code":"invalid_api_key"}}\n\n')
    )
    assert "sk-own" not in error_of(gateway).message
    assert gateway.link.dropped is False


def test_no_error_quotes_our_key() -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(answer(400, b'{"error":{"message":"sk-own may not use this model"}}', JSON))
    error = error_of(gateway)
    assert status_of(error) == 400
    assert error.message == "[the gateway's key] may not use this model"


@pytest.mark.parametrize("member", ["code", "param", "type"])
def test_no_word_beside_an_errors_message_quotes_our_key(member: str) -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(answer(400, b'{"error":{"message":"No.","%b":"no sk-own here"}}' % member.encode(), JSON))
    error = error_of(gateway)
    assert getattr(error, member) == "no [the gateway's key] here"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(answer(status, b"", "location: http://elsewhere.test/v1"))
    error = error_of(gateway)
    assert (status_of(error), error.code) == (502, "redirect")
    assert "redirect" in error.message
    assert len(gateway.dialer.links) == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"garbage\r\n\r\n", 502),
        (b"\x15\x03\x01\x00\x02\x02\x16", 502),
        (head(200, "content-length: 1", "transfer-encoding: chunked"), 502),
        (head(101), 502),
        (answer(200, b"<html>", "content-type: text/html"), 502),
        (answer(200, b"{}", "content-type: text/event-stream", "content-encoding: gzip"), 502),
        (answer(500, b"<html><h1>oops</h1>", "content-type: text/html"), 500),
        (answer(504, b"", JSON), 504),
        (answer(404, b'{"detail":"Not Found"}', JSON), 404),
        (answer(422, b'{"detail":[{"msg":"no"}]}', JSON), 422),
        (answer(200, b"nonsense", JSON), 502),
        (answer(200, b'{"error":{"message":"no","code":429}}', JSON), 429),
        (answer(200, b'{"error":{"message":"no","code":429}}', "content-type: text/event-stream"), 429),
        (answer(200, b"data: nonsense\n\n", "content-type: text/event-stream"), 502),
        (answer(799, b""), 502),
        (STREAM + b"oops\r\n", 502),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error(data: bytes, status: int) -> None:
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        gateway = Gateway()
        gateway.start(request())
        gateway.link.say(*pieces)
        gateway.link.end()
        assert status_of(error_of(gateway)) == status
        assert len(gateway.dialer.links) == 1


def test_a_reset_at_each_byte_is_an_error_or_a_truncation() -> None:
    for end in range(len(WHOLE)):
        for reset in (False, True):
            gateway = Gateway()
            gateway.start(request(stream=True))
            gateway.link.say(WHOLE[:end])
            gateway.link.fail("Connection reset by peer") if reset else gateway.link.end()
            events = gateway.events()
            if b"[DONE]\n\n" in WHOLE[:end]:
                assert events[-1] == StreamEnd()
            elif text_of(events):
                assert isinstance(events[-1], StreamTruncated)
            else:
                assert status_of(error_of(gateway)) == 502
            assert gateway.backend.pool.idle == 0
            assert len(gateway.dialer.links) == 1


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_that_is_cut_is_a_bad_gateways_where_the_client_has_nothing_of_it_yet(*, streams: bool) -> None:
    gateway = Gateway()
    gateway.start(request(stream=streams))
    gateway.link.say(STREAM + chunked(HELLO))
    gateway.link.end()
    last = gateway.events()[-1]
    assert isinstance(last, StreamTruncated if streams else StreamError)
    if not streams:
        assert (status_of(error_of(gateway)), error_of(gateway).code) == (502, "upstream_broke_off")
    assert len(gateway.dialer.links) == 1


def test_a_stream_that_goes_on_breaking_the_rules_has_ended_once() -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(STREAM + chunked(HELLO), b"oops\r\n", b"more", chunked(DONE))
    assert isinstance(gateway.events()[-1], StreamError)
    assert gateway.link.dropped


# ------------------------------------------------------------------------------------------------------------- silence


def test_a_server_that_does_not_begin_is_given_up() -> None:
    gateway = Gateway(first_token_ns=30 * SECOND)
    gateway.start(request())
    gateway.advance(29 * SECOND)
    assert gateway.sink.said == {}
    gateway.advance(2 * SECOND)
    error = error_of(gateway)
    assert (status_of(error), error.kind) == (504, ErrorKind.TIMEOUT)
    assert "30 s" in error.message
    assert gateway.link.dropped
    assert len(gateway.clock) == 0


def test_a_head_and_an_envelope_are_no_token() -> None:
    gateway = Gateway(first_token_ns=30 * SECOND, gap_ns=5 * SECOND)
    gateway.start(request())
    gateway.link.say(STREAM, chunked(chunk(delta={"role": "assistant", "content": ""})))
    gateway.advance(29 * SECOND)
    assert gateway.sink.said == {}
    gateway.link.say(chunked(HELLO))
    gateway.advance(7 * SECOND)
    assert "5 s" in error_of(gateway).message


def test_a_server_that_falls_silent_is_given_up_and_a_heartbeat_is_a_sign_of_life() -> None:
    gateway = Gateway(first_token_ns=SECOND, gap_ns=10 * SECOND)
    gateway.start(request())
    gateway.link.say(STREAM + chunked(HELLO))
    for _ in range(5):
        gateway.advance(9 * SECOND)
        gateway.link.say(chunked(b": ka\n"))
    assert not gateway.sink.has_ended("s")
    gateway.advance(12 * SECOND)
    assert status_of(error_of(gateway)) == 504
    assert gateway.link.dropped


def test_a_connection_that_does_not_come_about_is_the_dialers_to_give_up() -> None:
    gateway = Gateway(connect_ns=7 * SECOND)
    gateway.start(request(), stands=False)
    assert gateway.link.call.deadline == 1_000 + 7 * SECOND
    gateway.advance(1000 * SECOND)
    assert gateway.sink.said == {}


# -------------------------------------------------------------------------------------------------------- asking again


def test_what_cannot_be_reached_is_tried_again_with_growing_pauses() -> None:
    gateway = Gateway(attempts=3, backoff_ns=SECOND)
    gateway.dialer.on_connect = FakeLink.fail
    gateway.start(request(), stands=False)
    gateway.advance(0)
    assert len(gateway.dialer.links) == 1
    gateway.advance(SECOND)
    assert len(gateway.dialer.links) == 2
    gateway.advance(SECOND)
    assert len(gateway.dialer.links) == 2
    gateway.advance(SECOND)
    assert len(gateway.dialer.links) == 3
    error = error_of(gateway)
    assert (status_of(error), error.code) == (502, "upstream_unreachable")
    assert "Connection refused" in error.message
    assert error.retryable
    gateway.advance(1000 * SECOND)
    assert len(gateway.dialer.links) == 3


@pytest.mark.parametrize(
    ("status", "wait", "attempts"),
    [
        (502, None, 3),
        (503, None, 3),
        (503, 1, 3),
        (503, 60, 1),
        (429, 1, 3),
        (429, None, 1),
        (429, 60, 1),
        (500, None, 1),
        (504, None, 1),
        (400, 1, 1),
    ],
)
def test_which_answers_are_asked_for_again(status: int, wait: int | None, attempts: int) -> None:
    gateway = Gateway()
    gateway.start(request())
    lines = [] if wait is None else [f"retry-after: {wait}"]
    for _ in range(5):
        gateway.link.say(answer(status, b'{"error":{"message":"no"}}', JSON, *lines))
        if gateway.sink.said:
            break
        gateway.advance((wait or 1) * SECOND)
    posts = sum(link.written.count(b"POST ") for link in gateway.dialer.links)
    assert posts == attempts
    error = error_of(gateway)
    assert status_of(error) == status
    assert error.retry_after_ns == (None if wait is None else wait * SECOND)


def test_a_second_attempt_that_is_answered_is_a_success() -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(answer(503, b"", JSON))
    gateway.advance(SECOND)
    assert len(gateway.dialer.links) == 1
    assert gateway.link.written.count(b"POST ") == 2
    gateway.link.say(WHOLE)
    assert text_of(gateway.events()) == "hello"


def test_nothing_is_asked_again_that_a_server_may_be_at_work_on() -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.end()
    assert status_of(error_of(gateway)) == 502
    gateway.advance(1000 * SECOND)
    assert len(gateway.dialer.links) == 1


@pytest.mark.parametrize("reset", [False, True])
def test_a_used_connection_that_dies_unheard_is_replaced_at_once(reset: bool) -> None:
    gateway = Gateway(attempts=1)
    gateway.start(request(), "first")
    gateway.link.say(WHOLE)
    gateway.start(request(), "second")
    old = gateway.link
    assert len(gateway.dialer.links) == 1
    assert old.written.count(b"POST ") == 2
    old.fail("Connection reset by peer") if reset else old.end()
    assert len(gateway.dialer.links) == 2
    gateway.link.stand()
    gateway.link.say(WHOLE)
    assert text_of(gateway.events("second")) == "hello"


def test_a_used_connection_that_dies_after_a_byte_is_not_replaced() -> None:
    gateway = Gateway()
    gateway.start(request(), "first")
    gateway.link.say(WHOLE)
    gateway.start(request(), "second")
    gateway.link.say(b"H")
    gateway.link.end()
    assert status_of(error_of(gateway, "second")) == 502
    assert len(gateway.dialer.links) == 1


def test_nothing_is_asked_again_once_something_was_handed_on() -> None:
    gateway = Gateway()
    gateway.start(request(stream=True))
    gateway.link.say(STREAM + chunked(HELLO))
    gateway.link.fail("Connection reset by peer")
    assert isinstance(gateway.events()[-1], StreamTruncated)
    gateway.advance(1000 * SECOND)
    assert len(gateway.dialer.links) == 1


# ------------------------------------------------------------------------------------------------ connections are kept


def test_a_connection_is_kept_for_a_time_and_carries_one_request_at_once() -> None:
    gateway = Gateway(idle_ns=4 * SECOND)
    gateway.start(request(), "a")
    gateway.start(request(), "b")
    assert len(gateway.dialer.links) == 2
    for link in gateway.dialer.links:
        link.say(WHOLE)
    assert gateway.backend.pool.idle == 2
    gateway.start(request(), "c")
    assert gateway.backend.pool.idle == 1
    assert len(gateway.dialer.links) == 2
    gateway.link.say(WHOLE)
    assert gateway.events("c")[-1] == StreamEnd()
    gateway.advance(10 * SECOND)
    assert gateway.backend.pool.idle == 0
    assert all(link.dropped for link in gateway.dialer.links)
    assert len(gateway.clock) == 0


def test_the_end_of_the_message_may_come_a_little_later() -> None:
    gateway = Gateway(linger_ns=SECOND)
    for stream in ("in time", "late", "closed"):
        gateway.start(request(), stream)
        gateway.link.say(WHOLE[:-5])
        assert gateway.events(stream)[-1] == StreamEnd()
        assert gateway.backend.pool.idle == 0
        if stream == "in time":
            gateway.link.say(b"0\r\n\r\n")
            assert gateway.backend.pool.idle == 1
            gateway.start(request(), "next")
            gateway.link.say(WHOLE[:-5])
        if stream == "closed":
            gateway.link.end()
        gateway.advance(3 * SECOND)
        assert gateway.link.closed
        assert gateway.backend.pool.idle == 0
    assert len(gateway.clock) == 0


def test_a_message_that_goes_on_behind_the_streams_end_is_not_waited_for_longer() -> None:
    gateway = Gateway(linger_ns=2 * SECOND)
    gateway.start(request())
    gateway.link.say(WHOLE[:-5])
    for _ in range(10):
        gateway.link.say(chunked(b": still here\n\n"))
        gateway.advance(SECOND // 2)
    assert gateway.link.dropped


@pytest.mark.parametrize(
    "data",
    [
        answer(200, HELLO + DONE, "content-type: text/event-stream", "connection: close"),
        head(200, "content-type: text/event-stream") + HELLO + DONE,
        WHOLE + b"HTTP/1.1 200 OK\r\n",
        WHOLE[:-5] + b"oops\r\n",
    ],
)
def test_a_connection_that_can_carry_no_other_request_is_dropped(data: bytes) -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(data)
    assert gateway.events()[-1] == StreamEnd()
    assert gateway.link.dropped
    assert gateway.backend.pool.idle == 0


@pytest.mark.parametrize("what", ["data", "end", "reset"])
def test_an_idle_connection_that_says_anything_is_not_lent_out(what: str) -> None:
    gateway = Gateway()
    gateway.start(request())
    gateway.link.say(WHOLE)
    match what:
        case "data":
            gateway.link.say(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        case "end":
            gateway.link.end()
        case _:
            gateway.link.fail("Connection reset by peer")
    assert gateway.link.closed
    assert gateway.backend.pool.idle == 0
    gateway.start(request(), "next")
    assert len(gateway.dialer.links) == 2


def test_no_more_connections_are_kept_than_allowed() -> None:
    gateway = Gateway(max_idle=2)
    for number in range(4):
        gateway.start(request(), f"s{number}")
    for link in gateway.dialer.links:
        link.say(WHOLE)
    assert gateway.backend.pool.idle == 2
    assert [link.dropped for link in gateway.dialer.links] == [False, False, True, True]


def test_nothing_is_asked_again_after_close() -> None:
    gateway = Gateway()
    gateway.start(request(), stands=False)
    gateway.link.fail()
    gateway.backend.close()
    gateway.advance(1000 * SECOND)
    assert len(gateway.dialer.links) == 1


def test_close_lets_go_of_every_connection() -> None:
    gateway = Gateway(models=())
    gateway.start(request(), "idle")
    gateway.link.say(WHOLE)
    gateway.start(request(), "lingering")
    gateway.link.say(WHOLE[:-5])
    gateway.start(request(), "running")
    gateway.backend.close()
    assert all(link.closed for link in gateway.dialer.links)
    gateway.advance(1000 * SECOND)
    assert all(link.closed for link in gateway.dialer.links)


# --------------------------------------------------------------------------------------------------------------- models

LIST = b'{"object":"list","data":[{"id":"a","object":"model","created":5,"owned_by":"x"},{"id":"b"},{"id":"a"}]}'


def test_the_models_are_asked_for_in_the_background() -> None:
    gateway = Gateway(models=())
    models = gateway.backend.models
    assert list(models) == []
    gateway.link.stand()
    lines, _ = gateway.link.request
    assert lines[0] == "GET /v1/models HTTP/1.1"
    assert "authorization: Bearer sk-own" in lines
    gateway.link.say(answer(200, LIST, JSON))
    assert gateway.backend.models is models
    assert list(models) == [ModelCard("a", 5, "x"), ModelCard("b", 0, "upstream")]
    assert gateway.backend.pool.idle == 1


def test_a_server_that_is_down_is_asked_again_until_it_answers() -> None:
    gateway = Gateway(models=(), models_backoff_ns=SECOND, models_ns=8 * SECOND)
    for pause in (1, 2, 4, 8, 8):
        asked = len(gateway.dialer.links)
        gateway.link.fail()
        gateway.advance(pause * SECOND - 1)
        assert len(gateway.dialer.links) == asked
        gateway.advance(1)
        assert len(gateway.dialer.links) == asked + 1
    gateway.link.stand()
    gateway.link.say(answer(200, LIST, JSON))
    assert [card.name for card in gateway.backend.models] == ["a", "b"]


def test_an_old_list_is_asked_for_again_when_a_request_comes() -> None:
    gateway = Gateway(models=(), models_ns=60 * SECOND)
    gateway.link.stand()
    gateway.link.say(answer(200, LIST, JSON, "connection: close"))
    gateway.start(request(), "soon")
    assert len(gateway.dialer.links) == 2
    gateway.advance(60 * SECOND)
    gateway.dialer.on_connect = FakeLink.stand
    gateway.start(request(), "late", stands=False)
    gateway.advance(0)
    inquiry = gateway.dialer.links[2]
    assert inquiry.request[0][0] == "GET /v1/models HTTP/1.1"
    inquiry.say(answer(200, b'{"data":[{"id":"c"}]}', JSON))
    assert [card.name for card in gateway.backend.models] == ["c"]


@pytest.mark.parametrize(
    "data",
    [
        answer(404, b"", JSON),
        answer(401, b"{}", JSON),
        answer(200, b"[]", JSON),
        answer(200, b"no", JSON),
        answer(200, b'{"data":{}}', JSON),
        answer(200, b'{"data":[1,null,{"id":5},{"id":""}]}', JSON),
        b"garbage",
        head(200, JSON) + b" " * (MAX_MODELS_BYTES + 1),
        head(200, "content-length: 5") + b"12",
    ],
)
def test_a_list_that_cannot_be_read_leaves_the_old_one_and_is_asked_for_again(data: bytes) -> None:
    gateway = Gateway(models=(), models_backoff_ns=SECOND)
    gateway.link.stand()
    gateway.link.say(data)
    gateway.link.end()
    assert list(gateway.backend.models) == []
    gateway.dialer.on_connect = FakeLink.stand
    gateway.advance(SECOND)
    gateway.link.say(answer(200, LIST, JSON))
    assert [card.name for card in gateway.backend.models] == ["a", "b"]


def test_a_list_that_ends_with_the_connection_is_one() -> None:
    gateway = Gateway(models=())
    gateway.link.stand()
    gateway.link.say(head(200, JSON) + LIST)
    gateway.link.end()
    assert [card.name for card in gateway.backend.models] == ["a", "b"]


def test_a_server_that_says_nothing_is_asked_again() -> None:
    gateway = Gateway(models=(), connect_ns=5 * SECOND, models_backoff_ns=SECOND)
    gateway.link.stand()
    gateway.advance(5 * SECOND)
    assert gateway.link.dropped
    gateway.advance(SECOND)
    assert len(gateway.dialer.links) == 2


def test_configured_models_are_not_asked_for() -> None:
    gateway = Gateway(models=("x", "y"))
    assert gateway.dialer.links == []
    assert [card.name for card in gateway.backend.models] == ["x", "y"]
    gateway.advance(1000 * SECOND)
    gateway.start(request())
    assert len(gateway.dialer.links) == 1


@given(st.binary(max_size=60))
def test_any_bytes_are_a_list_or_a_reason(body: bytes) -> None:
    assert isinstance(read_models(body), list | str)


# -------------------------------------------------------------------------------------------------------------- machine

SAID = st.sampled_from(
    [
        WHOLE,
        STREAM,
        chunked(HELLO),
        chunked(DONE),
        b"0\r\n\r\n",
        chunked(b": ka\n"),
        answer(503, b"", JSON),
        answer(401, b"", JSON),
        answer(429, b"", JSON, "retry-after: 1"),
        answer(200, HELLO + DONE, "content-type: text/event-stream", "connection: close"),
        b"garbage",
        b"H",
    ]
)


class GatewayMachine(RuleBasedStateMachine):
    """Streams come and go while servers do anything at any time."""

    @initialize()
    def begin(self) -> None:
        self.gateway = Gateway(first_token_ns=20 * SECOND, gap_ns=10 * SECOND, max_idle=2)
        self.jobs: dict[str, Any] = {}
        self.blocked: set[str] = set()
        self.cancelled: dict[str, int] = {}
        self.count = 0

    def running(self) -> list[str]:
        sink = self.gateway.sink
        return [name for name in self.jobs if not sink.has_ended(name) and name not in self.cancelled]

    @precondition(lambda self: self.count < 6)
    @rule(stands=st.booleans())
    def start(self, stands: bool) -> None:
        name = f"s{self.count}"
        self.count += 1
        self.jobs[name] = self.gateway.start(request(), name, stands=stands)

    @precondition(lambda self: self.gateway.dialer.links)
    @rule(data=SAID, which=st.integers(0, 20), cut=st.none() | st.integers(1, 80))
    def say(self, data: bytes, which: int, cut: int | None) -> None:
        link = self.gateway.dialer.links[which % len(self.gateway.dialer.links)]
        link.stand() if not link.written else None
        link.say(data if cut is None else data[:cut])

    @precondition(lambda self: self.gateway.dialer.links)
    @rule(which=st.integers(0, 20), reset=st.booleans())
    def end(self, which: int, reset: bool) -> None:
        link = self.gateway.dialer.links[which % len(self.gateway.dialer.links)]
        link.fail() if reset or not link.written else link.end()

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        running = self.running()
        name = running[which % len(running)]
        self.jobs[name].cancel()
        self.cancelled[name] = len(self.gateway.sink.said.get(name, ()))

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 20), blocked=st.booleans())
    def block(self, which: int, blocked: bool) -> None:
        running = self.running()
        self.jobs[running[which % len(running)]].set_blocked(blocked)
        self.gateway.advance(0)

    @rule(seconds=st.sampled_from([0, 1, 3, 11, 25]))
    def advance(self, seconds: int) -> None:
        self.gateway.advance(seconds * SECOND)

    @invariant()
    def what_was_said_is_legal_and_ends_once(self) -> None:
        if not hasattr(self, "gateway"):
            return
        for name, items in self.gateway.sink.said.items():
            ends = [item for item in items if isinstance(item, TERMINALS)]
            assert len(ends) <= 1
            assert not ends or items[-1] is ends[0]
            if ends:
                assert self.gateway.events(str(name))

    @invariant()
    def the_cancelled_say_nothing(self) -> None:
        for name, count in getattr(self, "cancelled", {}).items():
            assert len(self.gateway.sink.said.get(name, ())) == count

    @invariant()
    def connections_are_bounded(self) -> None:
        if not hasattr(self, "gateway"):
            return
        opened = [link for link in self.gateway.dialer.links if not link.closed]
        assert self.gateway.backend.pool.idle <= 2
        lingering = len(self.gateway.backend._watched)
        assert len(opened) <= len(self.running()) + self.gateway.backend.pool.idle + lingering

    def teardown(self) -> None:
        if not hasattr(self, "gateway"):
            return
        for name in self.running():
            self.jobs[name].cancel()
        self.gateway.advance(100 * SECOND)
        assert all(link.closed for link in self.gateway.dialer.links)
        assert not self.gateway.backend._watched
        assert len(self.gateway.clock) == 0


TestGatewayMachine = GatewayMachine.TestCase
TestGatewayMachine.settings = settings(max_examples=200, stateful_step_count=25)
