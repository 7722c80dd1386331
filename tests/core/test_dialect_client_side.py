"""The client's side of the dialects: requests out, whole answers and errors in."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import legal_streams, texts

from tokenwire.core.collect import ChoiceResult, Collector, Result
from tokenwire.core.contracts import Dialect
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.dialects._incoming_errors import MAX_ERROR_BODY, MAX_ERROR_MESSAGE, MAX_ERROR_WORD, one_line
from tokenwire.core.dialects.base import ERRORS, status_of
from tokenwire.core.dialects.openai_chat import OpenAIChat
from tokenwire.core.errors import RequestRefused
from tokenwire.core.events import (
    TERMINALS,
    ErrorKind,
    Event,
    FinishReason,
    StreamError,
    StreamTruncated,
)
from tokenwire.core.request import GenerationRequest, ImagePart, Message, TextPart, Tool, ToolCall

CHAT, PLAIN = openai_chat.DIALECT, plain.DIALECT
DIALECTS: list[Dialect] = [CHAT, PLAIN]
EVERYTHING = frozenset(GenerationRequest.__struct_fields__)

# ---- drawn requests

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
text_parts = st.builds(TextPart, texts)
image_parts = st.builds(ImagePart, texts, st.none() | st.sampled_from(["auto", "low", "high"]))
contents = st.lists(text_parts | image_parts, min_size=1, max_size=3).map(tuple)
calls = st.lists(st.builds(ToolCall, names, names, texts), min_size=1, max_size=2).map(tuple)
maybe_name = st.none() | names
messages = st.one_of(
    st.builds(Message, st.sampled_from(["system", "developer", "user"]), contents, maybe_name),
    st.builds(Message, st.just("assistant"), contents, maybe_name, st.just(()) | calls),
    st.builds(Message, st.just("assistant"), st.just(()), maybe_name, calls),
    st.builds(Message, st.just("tool"), contents, maybe_name, st.just(()), names),
)
json_objects = st.dictionaries(texts, st.integers(-9, 9) | texts | st.none() | st.lists(texts, max_size=2), max_size=2)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high)


@st.composite
def chat_requests(draw: st.DrawFn) -> GenerationRequest:
    """Draw a request of which Chat Completions can say every word."""
    tools = draw(st.lists(st.builds(Tool, names, maybe_name, st.none() | json_objects, st.booleans()), max_size=2))
    choices = ["auto", "none", "required", *(f"function:{tool.name}" for tool in tools)] if tools else ["auto"]
    logprobs, stream = draw(st.booleans()), draw(st.booleans())
    formats = st.sampled_from([None, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "n"}}])
    return GenerationRequest(
        model=draw(names),
        messages=tuple(draw(st.lists(messages, min_size=1, max_size=3))),
        max_tokens=draw(st.none() | st.integers(1, 2**31 - 1)),
        n=draw(st.integers(1, 16)),
        stop=tuple(draw(st.lists(texts.filter(bool), max_size=3, unique=True))),
        temperature=draw(st.none() | numbers(0, 2)),
        top_p=draw(st.none() | numbers(0, 1)),
        presence_penalty=draw(st.none() | numbers(-2, 2)),
        frequency_penalty=draw(st.none() | numbers(-2, 2)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        logit_bias=draw(st.none() | st.dictionaries(texts, numbers(-100, 100), max_size=2)),
        logprobs=logprobs,
        top_logprobs=draw(st.integers(0, 20)) if logprobs else 0,
        tools=tuple(tools),
        tool_choice=draw(st.sampled_from(choices)),
        parallel_tool_calls=draw(st.booleans()) if tools else True,
        response_format=draw(formats),
        reasoning_effort=draw(st.none() | names),
        user=draw(st.none() | texts),
        stream=stream,
        include_usage=stream and draw(st.booleans()),
    )


@st.composite
def plain_requests(draw: st.DrawFn) -> GenerationRequest:
    """Draw a request of which plain.v1 can say every word."""
    return GenerationRequest(
        model=draw(st.just("") | names),
        messages=tuple(draw(st.lists(messages, min_size=1, max_size=3))),
        max_tokens=draw(st.none() | st.integers(1, 2**31 - 1)),
        stop=tuple(draw(st.lists(texts.filter(bool), max_size=3, unique=True))),
        temperature=draw(st.none() | numbers(0, 2)),
        top_p=draw(st.none() | numbers(0, 1)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        stream=draw(st.booleans()),
        include_usage=True,
    )


ASKED = GenerationRequest(model="m", messages=(Message("user", (TextPart("hi"),)),))


def body_of(request: GenerationRequest, dialect: Dialect = CHAT) -> dict[str, Any]:
    return msgspec.json.decode(dialect.encode_request(request), type=dict[str, Any])


# ---- requests


@given(chat_requests())
def test_a_chat_request_is_read_back_as_it_was(request: GenerationRequest) -> None:
    parsed = CHAT.parse_request(CHAT.encode_request(request), {}, EVERYTHING)
    assert (parsed.request, parsed.ignored) == (request, ())


@given(plain_requests())
def test_a_plain_request_is_read_back_as_it_was(request: GenerationRequest) -> None:
    parsed = PLAIN.parse_request(PLAIN.encode_request(request), {}, EVERYTHING)
    assert (parsed.request, parsed.ignored) == (request, ())


def test_a_small_chat_request_has_no_field_that_a_server_could_refuse() -> None:
    assert body_of(ASKED) == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": False}


def test_chat_options_are_left_out_where_what_they_are_about_is_missing() -> None:
    request = msgspec.structs.replace(
        ASKED, include_usage=True, tool_choice="required", parallel_tool_calls=False, top_logprobs=3
    )
    assert body_of(request) == body_of(ASKED)
    assert body_of(msgspec.structs.replace(request, stream=True))["stream_options"] == {"include_usage": True}


def test_a_message_without_content_has_empty_text_or_null_beside_calls() -> None:
    called = Message("assistant", (), None, (ToolCall("c", "f", "{}"),))
    request = msgspec.structs.replace(ASKED, messages=(Message("user"), Message("assistant"), called))
    assert [message["content"] for message in body_of(request)["messages"]] == ["", "", None]


def test_a_whole_bias_is_an_integer_and_an_empty_model_is_left_out() -> None:
    body = CHAT.encode_request(msgspec.structs.replace(ASKED, model="", logit_bias={"5": -100.0, "6": 0.5}))
    assert b'"logit_bias":{"5":-100,"6":0.5}' in body
    assert b"model" not in body


def test_the_field_of_the_token_limit_can_be_chosen() -> None:
    request = msgspec.structs.replace(ASKED, max_tokens=5)
    assert body_of(request)["max_tokens"] == 5
    chosen = body_of(request, OpenAIChat(token_limit="max_completion_tokens"))
    assert (chosen["max_completion_tokens"], "max_tokens" in chosen) == (5, False)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("", "max_tokens"),
        ("gpt-4o", "max_tokens"),
        ("gpt-4.1-mini", "max_tokens"),
        ("gpt-oss-20b", "max_tokens"),
        ("olmo-2", "max_tokens"),
        ("qwen-o1x", "max_tokens"),
        ("o1", "max_completion_tokens"),
        ("o3-mini-2025-01-31", "max_completion_tokens"),
        ("gpt-5", "max_completion_tokens"),
        ("gpt-5.1", "max_completion_tokens"),
        ("openai/gpt-5-mini", "max_completion_tokens"),
    ],
)
def test_the_field_of_the_token_limit_suits_the_model(model: str, field: str) -> None:
    asked = body_of(msgspec.structs.replace(ASKED, model=model, max_tokens=5))
    assert {name: asked[name] for name in ("max_tokens", "max_completion_tokens") if name in asked} == {field: 5}


def test_a_surrogate_in_a_request_is_repaired() -> None:
    request = msgspec.structs.replace(ASKED, messages=(Message("user", (TextPart("a\ud800"),)),))
    assert body_of(request)["messages"][0]["content"] == "a\ufffd"


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 2), ("tools", (Tool("f"),)), ("response_format", {"type": "json_object"}), ("logprobs", True)],
)
def test_plain_refuses_to_ask_for_what_it_cannot_say(name: str, value: object) -> None:
    with pytest.raises(RequestRefused) as refused:
        PLAIN.encode_request(msgspec.structs.replace(ASKED, **{name: value}))
    assert (refused.value.error.param, refused.value.error.code) == (name, "unsupported_parameter")


def test_plain_leaves_out_tools_that_must_not_be_called_and_what_may_be_ignored() -> None:
    request = msgspec.structs.replace(ASKED, tools=(Tool("f"),), tool_choice="none", user="u", logit_bias={"1": 2.0})
    assert set(body_of(request, PLAIN)) == {"model", "messages", "stream"}


# ---- whole answers


def fold(events: Any) -> Result:
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector.result()


@given(legal_streams(calls=2, logprobs=False))
def test_a_whole_plain_answer_is_decoded_to_the_same_result(events: list[Event]) -> None:
    result = fold(events)
    decoded = fold(PLAIN.decode_result(PLAIN.encode_result(result, ASKED)))
    assert result.start
    start = msgspec.structs.replace(result.start, created=0)
    assert decoded == msgspec.structs.replace(result, start=start)


PLAIN_TERMINALS: dict[bytes, Event] = {
    b"": StreamTruncated("the answer is empty", 0),
    b'{"text":"Tw': StreamTruncated("the answer is not whole: Input data was truncated", 11),
    b'{"error":{"message":"m","code":"c","retryable":true}}': StreamError(ErrorKind.SERVER, "m", "c", retryable=True),
    b"[]": StreamError(
        ErrorKind.SERVER,
        "The server sent a malformed answer: Expected `object`, got `array`",
        "malformed_answer",
    ),
    b'{"text":"a"}': StreamError(
        ErrorKind.SERVER, "The server sent a malformed answer: it has no finish_reason", "malformed_answer"
    ),
}


@pytest.mark.parametrize("body", PLAIN_TERMINALS)
def test_what_is_no_plain_answer_has_a_terminal_event_only(body: bytes) -> None:
    assert PLAIN.decode_result(body) == [PLAIN_TERMINALS[body]]


def test_an_unknown_finish_of_a_plain_answer_is_other() -> None:
    (choice,) = fold(PLAIN.decode_result(b'{"text":"a","finish_reason":"later"}')).choices
    assert choice == ChoiceResult(0, "a", reason=FinishReason.OTHER)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@given(body=st.binary(max_size=40) | st.recursive(st.none() | texts, lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["choices", "message", "error", "text", "finish_reason", "tool_calls", "usage", "index"]), inner,
)).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_body_folds_and_ends_once(dialect: Dialect, body: bytes) -> None:
    events = dialect.decode_result(body)
    assert [event for event in events if isinstance(event, TERMINALS)] == [events[-1]]
    assert fold(events).terminal == events[-1]


# ---- errors

own_words = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["Cc", "Z", "Cf"]), max_size=9
)
words = own_words.filter(lambda word: not word.isdecimal() and not {word} & {row.type for row in ERRORS.values()})
sentences = own_words.filter(bool)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@given(
    kind=st.sampled_from(ErrorKind),
    message=sentences,
    code=st.none() | sentences,
    param=st.none() | sentences,
    word=st.none() | words.filter(bool),
)
def test_an_error_comes_back_with_its_kind_by_the_status(
    dialect: Dialect, kind: ErrorKind, message: str, code: str | None, param: str | None, word: str | None
) -> None:
    retryable = dialect is PLAIN and ERRORS[kind].retryable
    error = StreamError(kind, message, code, param, retryable=retryable, type=word)
    assert dialect.decode_error(status_of(error), dialect.encode_error(error)) == error


def shown(status: int, text: str) -> str:
    return f"The server answered with status {status}: {text}"


ERROR_BODIES: dict[str, tuple[int, bytes, StreamError]] = {
    "OpenAI": (
        429,
        b'{"error":{"message":"Slow.","type":"insufficient_quota","param":null,"code":"insufficient_quota"}}',
        StreamError(ErrorKind.RATE_LIMIT, "Slow.", "insufficient_quota", type="insufficient_quota"),
    ),
    "vLLM, flat": (
        400,
        b'{"object":"error","message":"Too long.","type":"BadRequestError","param":null,"code":400}',
        StreamError(ErrorKind.INVALID_REQUEST, "Too long.", "400", type="BadRequestError"),
    ),
    "Anthropic": (
        529,
        b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}',
        StreamError(ErrorKind.OVERLOADED, "Overloaded"),
    ),
    "Gemini, in a list": (
        404,
        b'[{"error":{"code":404,"message":"No model.","status":"NOT_FOUND"}}]',
        StreamError(ErrorKind.NOT_FOUND, "No model.", "404", type="NOT_FOUND"),
    ),
    "Ollama": (404, b'{"error":"model \'x\' not found"}', StreamError(ErrorKind.NOT_FOUND, "model 'x' not found")),
    "TGI": (
        422,
        b'{"error":"Input validation error","error_type":"validation"}',
        StreamError(ErrorKind.INVALID_REQUEST, "Input validation error", status=422, type="validation"),
    ),
    "FastAPI": (
        405,
        b'{"detail":"Method Not Allowed"}',
        StreamError(ErrorKind.METHOD_NOT_ALLOWED, "Method Not Allowed"),
    ),
    "Azure's gateway": (
        401,
        b'{ "statusCode": 401, "message": "Access denied." }',
        StreamError(ErrorKind.AUTHENTICATION, "Access denied."),
    ),
    "a flag and a message": (
        502,
        b'{"error":true,"message":"upstream"}',
        StreamError(ErrorKind.UNAVAILABLE, "upstream", status=502),
    ),
    "a list of errors": (
        403,
        b'{"success":false,"errors":[{"code":10000,"message":"No."}]}',
        StreamError(ErrorKind.PERMISSION, "No.", "10000"),
    ),
    "nginx": (
        502,
        b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body><center>nginx</center></body></html>",
        StreamError(ErrorKind.UNAVAILABLE, shown(502, "502 Bad Gateway"), status=502),
    ),
    "a page without title": (
        503,
        b"\xef\xbb\xbf<p>Be &lt;back&gt;</p>\n soon",
        StreamError(ErrorKind.UNAVAILABLE, shown(503, "Be <back> soon")),
    ),
    "Cloudflare": (524, b"error code: 524", StreamError(ErrorKind.SERVER, shown(524, "error code: 524"), status=524)),
    "nothing": (
        500,
        b"",
        StreamError(ErrorKind.SERVER, "The server answered with status 500 and said nothing about it."),
    ),
    "an empty object": (
        500,
        b"{}",
        StreamError(ErrorKind.SERVER, shown(500, "{}")),
    ),
    "a redirect": (302, b"moved", StreamError(ErrorKind.SERVER, shown(302, "moved"))),
    "an error with status 200": (
        200,
        b'{"error":{"message":"Slow.","code":429}}',
        StreamError(ErrorKind.RATE_LIMIT, "Slow.", "429", status=429),
    ),
    "a teapot": (418, b"short", StreamError(ErrorKind.INVALID_REQUEST, shown(418, "short"), status=418)),
    "not UTF-8": (500, b"\xff\x00a", StreamError(ErrorKind.SERVER, shown(500, "\ufffd a"))),
    "lines and controls": (
        400,
        b'{"error":{"message":"a\\r\\nlevel=error\\u001b[31m\\u202eb","code":"c\\nd"}}',
        StreamError(ErrorKind.INVALID_REQUEST, "a level=error [31m b", "c d"),
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize(("status", "body", "expected"), ERROR_BODIES.values(), ids=ERROR_BODIES)
def test_an_error_answer_of_any_shape_is_read(
    dialect: Dialect, status: int, body: bytes, expected: StreamError
) -> None:
    assert dialect.decode_error(status, body) == expected


@given(st.integers(0, 999), st.binary(max_size=60))
def test_any_error_answer_is_read_and_is_on_one_line(status: int, body: bytes) -> None:
    error = CHAT.decode_error(status, body)
    assert error.message.splitlines() == [error.message]
    assert not 400 <= status <= 599 or status_of(error) == status


@pytest.mark.parametrize(
    "body",
    [
        b'{"error":{"message":"' + b"a" * 9000 + b'","code":"' + b"c" * 900 + b'"}}',
        b"<" * 10**6,
        b"<title" * 10**5,
        b"[" * 10**5,
        b"a" * (MAX_ERROR_BODY + 1),
    ],
    ids=["long", "tags", "titles", "deep", "much"],
)
def test_what_an_error_answer_says_is_bounded(body: bytes) -> None:
    error = CHAT.decode_error(500, body)
    assert 1 <= len(error.message) <= MAX_ERROR_MESSAGE + 64
    assert len(error.code or "") <= MAX_ERROR_WORD


def test_errors_that_nest_as_deep_as_they_can_be_read_are_read() -> None:
    for depth in range(1, 1200, 7):
        nested = b'{"message":' * depth + b"1" + b"}" * depth
        assert CHAT.decode_error(500, b'{"error":' + nested + b"}").kind is ErrorKind.SERVER


def test_one_line_is_cut_with_a_mark() -> None:
    assert (one_line(" a\n\tb ", 9), one_line("abcdef", 4)) == ("a b", "abc…")
