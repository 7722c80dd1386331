"""plain.v1: requests, streams both ways, whole answers, and the specification's examples."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import any_text, legal_streams, splits

from tokenwire.core import sse
from tokenwire.core.collect import Collector, Result
from tokenwire.core.contracts import Dialect, ModelCard, ParsedRequest
from tokenwire.core.dialects.base import ERRORS
from tokenwire.core.dialects.plain import DIALECT, PlainEncoder
from tokenwire.core.errors import LocalProtocolError, RequestRefused
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    Event,
    FinishReason,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamCancelled,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.framing import fold_bare
from tokenwire.core.merge import merge_run
from tokenwire.core.request import GenerationRequest, Message, TextPart, ToolCall

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SPECIFICATION = (ROOT / "docs" / "plain.md").read_text(encoding="utf-8")
START = StreamStart("s1", "tiny-1", 1790000000)
REQUEST = GenerationRequest(model="tiny-1", messages=(Message("user"),))

TRANSCRIPTS: dict[str, list[Event]] = {
    "plain_text": [
        START,
        TextDelta("Two "),
        TextDelta("owls\u2028"),
        ChoiceEnd(0, FinishReason.STOP_SEQUENCE, "\n\n"),
        UsageReport(11, 2, 8),
        StreamEnd(),
    ],
    "plain_tool_call": [
        START,
        ReasoningDelta("Easy."),
        ToolCallStart(0, "call_k1", "lookup"),
        ToolCallDelta(0, '{"q":"owl"}'),
        ChoiceEnd(0, FinishReason.TOOL_CALLS),
        UsageReport(11, 9, 0, 0, 2),
        StreamEnd(),
    ],
    "plain_error": [
        START,
        TextDelta("Two "),
        StreamError(ErrorKind.OVERLOADED, "The engine is full.", "engine_full"),
    ],
}


def encode_each(events: Sequence[Event], stream_id: str = "s1") -> list[bytes]:
    encoder = PlainEncoder(stream_id)
    return [encoder.encode(event, number) for number, event in enumerate(events, 1)]


def encode(events: Sequence[Event]) -> bytes:
    return b"".join(encode_each(events))


def decode(*pieces: bytes) -> list[Event]:
    decoder = DIALECT.decoder()
    return [*(event for piece in pieces for event in decoder.receive_data(piece)), *decoder.receive_eof()]


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\nid: s1.2\n\n"


def fold(events: Sequence[Event]) -> Result:
    collector = Collector()
    for item in events:
        collector.receive(item)
    return collector.result()


def as_decoded(result: Result) -> Result:
    """Leave out what this dialect does not say: model, time, log probabilities, provider data."""
    choices = tuple(msgspec.structs.replace(choice, logprobs=None, provider_data=()) for choice in result.choices)
    return msgspec.structs.replace(result, choices=choices, start=StreamStart("s1", "", 0))


DONE = b"data: [DONE]\n\n"
TOKEN = event({"token": "a"})
FINISH = event({"token": "", "finish_reason": "stop"})
BEGUN: Event = StreamStart("s1", "", 0)


# ---- the specification


def fenced(title: str) -> str:
    """The first fenced block after a title of the specification."""
    match = re.search(rf"^#+ {re.escape(title)}$.*?^```\w*\n(.*?)^```$", SPECIFICATION, re.DOTALL | re.MULTILINE)
    assert match is not None, title
    return match[1]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("A stream of text", "plain_text"),
        ("Reasoning and tool calls", "plain_tool_call"),
        ("An error after the beginning", "plain_error"),
    ],
)
def test_the_specifications_streams_are_what_the_encoder_writes(title: str, name: str) -> None:
    assert fenced(title) == (GOLDEN / f"{name}.txt").read_text() == encode(TRANSCRIPTS[name]).decode()


def test_the_specifications_whole_answer_is_what_the_encoder_writes() -> None:
    answer = DIALECT.encode_result(fold(TRANSCRIPTS["plain_text"]), REQUEST)
    assert fenced("A whole answer") == answer.decode() + "\n"


def test_the_specifications_error_answer_is_what_the_encoder_writes() -> None:
    with pytest.raises(RequestRefused) as refused:
        DIALECT.parse_request(b'{"prompt":"Hi","max_tokens":"many"}', {}, frozenset())
    assert fenced("An error before the beginning") == DIALECT.encode_error(refused.value.error).decode() + "\n"


@pytest.mark.parametrize("body", fenced("The request").splitlines())
def test_the_specifications_requests_are_read(body: str) -> None:
    assert DIALECT.parse_request(body.encode(), {}, frozenset()).request.messages


def test_the_specification_names_every_type_of_error_and_every_finish_reason() -> None:
    for row in ERRORS.values():
        assert f"`{row.type}`" in SPECIFICATION
    for reason in FinishReason:
        assert f"`{reason.value}`" in SPECIFICATION


# ---- encoding


def test_the_dialect_meets_its_contract() -> None:
    dialect: Dialect = DIALECT
    assert (dialect.name, dialect.media_type, dialect.streams_by_default) == ("plain", "text/event-stream", True)
    encoder = dialect.encoder(REQUEST, "s1")
    assert (encoder.numbered, encoder.heartbeat) == (True, b": ka\n")


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts_are_read_back(name: str) -> None:
    events = TRANSCRIPTS[name]
    decoded = decode((GOLDEN / f"{name}.txt").read_bytes())
    assert decoded[0] == BEGUN
    assert as_decoded(fold(decoded)).choices == as_decoded(fold(events)).choices
    assert type(decoded[-1]) is type(events[-1])


def test_every_event_is_numbered_and_only_the_first_carries_retry() -> None:
    frames = [frame for frame in encode_each(TRANSCRIPTS["plain_text"]) if frame]
    assert [frame.count(b"retry: 1000\n") for frame in frames] == [1, 0, 0]
    assert [re.findall(rb"id: s1\.(\d+)", frame) for frame in frames] == [[b"2"], [b"3"], [b"6"]]
    only_error = encode([StreamError(ErrorKind.SERVER, "no")])
    assert (only_error.count(b"retry: 1000\n"), only_error.endswith(DONE)) == (1, True)


@given(any_text, any_text, st.integers(2, 10**6))
def test_a_folded_template_writes_what_encode_writes(first: str, text: str, number: int) -> None:
    encoder = PlainEncoder("s1")
    encoder.encode(START, 1)
    assert encoder.template(0) is None
    encoder.encode(TextDelta(first), 2)
    template = encoder.template(0)
    assert template is not None
    assert fold_bare(template).encode(text, number) == encoder.encode(TextDelta(text), number)
    assert encoder.template(0) is template
    assert encoder.template(1) is None


@given(legal_streams(1, failures=True))
def test_events_are_ascii_objects_with_a_token_and_done_comes_once_and_last(events: list[Event]) -> None:
    wire = encode(events)
    assert wire.isascii()
    *told, last = [item.data for item in sse.Decoder().receive_data(wire)]
    assert last == "[DONE]"
    for data in told:
        assert isinstance(json.loads(data)["token"], str)
        assert len(data) <= len(json.dumps(json.loads(data)))


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_error_is_told_and_then_done(kind: ErrorKind) -> None:
    frame = encode_each([START, StreamError(kind, "no", "word", "field")])[-1]
    row = ERRORS[kind]
    data, done = [item.data for item in sse.Decoder().receive_data(frame)]
    error = {"message": "no", "type": row.type, "code": "word", "retryable": row.retryable}
    assert (json.loads(data), done) == ({"token": "", "error": error}, "[DONE]")
    body = DIALECT.encode_error(StreamError(kind, "no", "word", "field"))
    assert json.loads(body) == {"error": {**error, "param": "field"}}


@pytest.mark.parametrize(
    ("terminal", "code"), [(StreamTruncated("eof"), "stream_truncated"), (StreamCancelled("client"), "cancelled")]
)
def test_what_is_no_success_is_an_error(terminal: Event, code: str) -> None:
    events = decode(encode([START, ChoiceEnd(), terminal]))
    assert isinstance(events[-1], StreamError)
    assert (events[-1].code, len(events)) == (code, 1)


def test_other_choices_and_provider_data_are_left_out() -> None:
    events: list[Event] = [START, TextDelta("b", 1), ChoiceEnd(1, FinishReason.LENGTH), ProviderData("a", "b")]
    assert encode(events) == b""


@pytest.mark.parametrize("stream_id", ["a\nb", "a\rb", "a\0b", "é"])
def test_a_stream_id_that_cannot_be_an_event_id_is_refused(stream_id: str) -> None:
    with pytest.raises(LocalProtocolError):
        PlainEncoder(stream_id)


# ---- both ways


@given(legal_streams(1, provider_data=True))
def test_what_is_encoded_is_decoded_to_the_same_result(events: list[Event]) -> None:
    assert as_decoded(fold(decode(encode(events)))) == as_decoded(fold(events))


@given(legal_streams(1))
def test_a_merged_run_says_the_same(events: list[Event]) -> None:
    assert fold(decode(encode(merge_run(events, ordered=True)))).choices == fold(decode(encode(events))).choices


@given(legal_streams(1, failures=True), st.data())
def test_cutting_the_bytes_differently_changes_nothing(events: list[Event], data: st.DataObject) -> None:
    wire = encode(events)
    whole = decode(wire)
    assert decode(*data.draw(splits(wire))) == whole
    assert fold(whole).terminal == whole[-1]


@given(legal_streams(1), st.data())
def test_a_cut_stream_is_never_a_success(events: list[Event], data: st.DataObject) -> None:
    wire = encode(events[:-1])
    cut = data.draw(st.integers(0, len(wire)))
    assert isinstance(decode(wire[:cut])[-1], StreamTruncated)


@given(st.lists(st.binary(max_size=40) | st.sampled_from([TOKEN, FINISH, DONE, b"data: {", b"\n\n", b"data: []\n\n"])))
def test_whatever_comes_there_is_exactly_one_terminal_event(pieces: list[bytes]) -> None:
    events = decode(*pieces)
    assert fold(events).terminal == events[-1]


# ---- decoding others


@pytest.mark.parametrize(
    ("wire", "events"),
    [
        pytest.param(TOKEN + FINISH, [BEGUN, TextDelta("a"), ChoiceEnd(), StreamEnd()], id="no [DONE] after a finish"),
        pytest.param(
            TOKEN + DONE, [BEGUN, TextDelta("a"), ChoiceEnd(0, FinishReason.OTHER), StreamEnd()], id="no finish"
        ),
        pytest.param(
            event({"token": "a", "finish_reason": "tired", "more": 1}) + TOKEN + FINISH + DONE + TOKEN,
            [BEGUN, TextDelta("a"), ChoiceEnd(0, FinishReason.OTHER), StreamEnd()],
            id="an unknown word, unknown members, tokens after the end",
        ),
        pytest.param(
            b": ka\n\nevent: ping\ndata: x\n\nretry: 5\n\n" + TOKEN + FINISH + DONE,
            [BEGUN, TextDelta("a"), ChoiceEnd(), StreamEnd()],
            id="comments and events of other names",
        ),
        pytest.param(
            event({"token": "a", "reasoning": "r", "refusal": "f"}) + FINISH,
            [BEGUN, ReasoningDelta("r"), TextDelta("a"), RefusalDelta("f"), ChoiceEnd(), StreamEnd()],
            id="everything on one event",
        ),
        pytest.param(
            event({"token": "", "tool_call": {"index": 0, "id": "x", "name": "f", "arguments": "1"}}) + FINISH,
            [BEGUN, ToolCallStart(0, "x", "f"), ToolCallDelta(0, "1"), ChoiceEnd(), StreamEnd()],
            id="a whole tool call",
        ),
        pytest.param(
            event({"token": "", "error": {"message": "m", "retryable": True}}) + DONE,
            [StreamError(ErrorKind.SERVER, "m", retryable=True)],
            id="an error that is retryable by its own word",
        ),
        pytest.param(event({"error": "m"}), [StreamError(ErrorKind.SERVER, "m")], id="an error as text"),
        pytest.param(DONE, [StreamTruncated("[DONE] came before any token")], id="[DONE] alone"),
        pytest.param(b"", [StreamTruncated("the input ended before [DONE]")], id="nothing"),
        pytest.param(
            TOKEN, [BEGUN, TextDelta("a"), StreamTruncated("the input ended before [DONE]", len(TOKEN))], id="cut"
        ),
    ],
)
def test_streams_of_other_servers_end_once(wire: bytes, events: list[Event]) -> None:
    assert decode(wire) == events


@pytest.mark.parametrize(
    "wire",
    [event(b"{"), event(b"[]"), event({"token": 1}), event({"tool_call": {"index": 128}}), event(b"[" * 100_000)],
)
def test_what_is_not_plain_ends_the_stream_with_an_error(wire: bytes) -> None:
    last = decode(TOKEN + wire + FINISH)[-1]
    assert isinstance(last, StreamError)
    assert last.code == "malformed_stream"


def test_a_line_without_end_ends_the_stream_with_an_error() -> None:
    decoder = DIALECT.decoder()
    out = [item for _ in range(17) for item in decoder.receive_data(b"x" * 2**20)]
    assert [type(item) for item in out] == [StreamError]


def test_the_decoder_is_closed_by_the_end_of_input() -> None:
    decoder = DIALECT.decoder()
    decoder.receive_data(TOKEN)
    assert len(list(decoder.receive_eof())) == 1
    assert list(decoder.receive_eof()) == []
    with pytest.raises(LocalProtocolError):
        decoder.receive_data(b"x")


# ---- whole answers


def test_a_whole_answer_has_what_there_is() -> None:
    answer = json.loads(DIALECT.encode_result(fold(TRANSCRIPTS["plain_tool_call"]), REQUEST))
    assert answer == {
        "text": "",
        "finish_reason": "tool_calls",
        "usage": {"input_tokens": 11, "output_tokens": 9, "reasoning_tokens": 2},
        "model": "tiny-1",
        "id": "s1",
        "tool_calls": [{"id": "call_k1", "name": "lookup", "arguments": '{"q":"owl"}'}],
        "reasoning": "Easy.",
    }
    with pytest.raises(LocalProtocolError):
        DIALECT.encode_result(fold(TRANSCRIPTS["plain_error"]), REQUEST)


def test_models_are_listed() -> None:
    body = DIALECT.encode_models([ModelCard("tiny", 5, "me")])
    assert json.loads(body) == {"models": [{"name": "tiny", "created": 5, "owner": "me"}]}


# ---- requests


def parse(body: object = None, **query: str) -> ParsedRequest:
    return DIALECT.parse_request(b"" if body is None else json.dumps(body).encode(), query, frozenset())


def test_a_prompt_is_a_request() -> None:
    expected = GenerationRequest(
        model="", messages=(Message("user", (TextPart("hi"),)),), stream=True, include_usage=True
    )
    assert parse({"prompt": "hi"}) == parse(prompt="hi") == ParsedRequest(expected)


def test_every_field_has_its_place_in_body_and_query() -> None:
    in_body = parse(
        {
            "prompt": "p",
            "system": "s",
            "model": "m",
            "max_tokens": 5,
            "stop": "x",
            "temperature": 0.5,
            "top_p": 0.5,
            "seed": 3,
            "n": 1,
            "stream": False,
        }
    )
    in_query = parse(
        None,
        prompt="p",
        system="s",
        model="m",
        max_tokens="5",
        stop="x",
        temperature="0.5",
        top_p="0.5",
        seed="3",
        n="1",
        stream="false",
        ticket="t",
    )
    assert in_body == in_query
    assert in_body.ignored == ("temperature", "top_p", "seed")
    assert in_body.request == GenerationRequest(
        model="m",
        messages=(Message("system", (TextPart("s"),)), Message("user", (TextPart("p"),))),
        max_tokens=5,
        stop=("x",),
        temperature=0.5,
        top_p=0.5,
        seed=3,
        stream=False,
        include_usage=True,
    )


def test_the_body_wins_over_the_query() -> None:
    assert parse({"prompt": "body"}, prompt="query", model="m").request.prompt == "body"
    conversation = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    parsed = parse(conversation, prompt="query")
    assert [message.text for message in parsed.request.messages] == ["a", "b"]
    called = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
    assert parse({"messages": [called]}).request.messages[0].tool_calls == (ToolCall("c", "f", ""),)


def test_unknown_fields_of_the_body_are_named() -> None:
    assert parse({"prompt": "p", "top_k": 5}).ignored == ("top_k",)


BAD_REQUESTS: list[tuple[dict[str, Any] | None, dict[str, str], str | None, str]] = [
    (None, {}, "prompt", "Missing required parameter: 'prompt'"),
    ({}, {}, "prompt", "Missing required parameter: 'prompt'"),
    (None, {"messages": "[]"}, "prompt", "Missing required parameter: 'prompt'"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, {}, "prompt", "'messages' is there too"),
    ({"prompt": 1}, {}, "prompt", "expected `str`, got `int`"),
    ({"prompt": "a", "n": 2}, {}, "n", "Unsupported parameter: 'n'"),
    (None, {"prompt": "a", "n": "2"}, "n", "Unsupported parameter: 'n'"),
    (None, {"prompt": "a", "max_tokens": "many"}, "max_tokens", "expected `int`, got `str`"),
    (None, {"prompt": "a", "temperature": "3"}, "temperature", "expected `float` <= 2.0"),
    (None, {"prompt": "a", "stream": "maybe"}, "stream", "expected `bool`, got `str`"),
    ({"messages": []}, {}, "messages", "length >= 1"),
    ({"prompt": "a", "stop": [""]}, {}, "stop[0]", "length >= 1"),
]


@pytest.mark.parametrize(("body", "query", "param", "message"), BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_field(
    body: dict[str, Any] | None, query: dict[str, str], param: str | None, message: str
) -> None:
    with pytest.raises(RequestRefused, match=message) as refused:
        parse(body, **query)
    assert (refused.value.error.kind, refused.value.error.param) == (ErrorKind.INVALID_REQUEST, param)
