"""OpenAI Chat Completions: requests, streams both ways, whole answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import any_text, legal_streams, splits

from tokenwire.core.collect import Collector, Result
from tokenwire.core.contracts import Dialect, ModelCard, ParsedRequest
from tokenwire.core.dialects.base import MIN_LOGPROB, escape_valid
from tokenwire.core.dialects.openai_chat import DIALECT, FINISH_REASONS, ChatEncoder
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
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    TopLogprob,
    UsageReport,
)
from tokenwire.core.framing import fold_bare
from tokenwire.core.merge import merge_run
from tokenwire.core.request import GenerationRequest, ImagePart, Message, TextPart, Tool, ToolCall
from tokenwire.core.states import MAX_CALLS, MAX_CHOICES

GOLDEN = Path(__file__).parents[1] / "golden"
START = StreamStart("chatcmpl-7Q", "tiny-1", 1790000000)
USAGE = UsageReport(11, 6, 8, 0, 2)
PLAIN_REQUEST = GenerationRequest(model="m", messages=(Message("user"),))

TRANSCRIPTS: dict[str, tuple[bool, list[Event]]] = {
    "chat_text": (
        True,
        [
            START,
            ReasoningDelta("Easy."),
            TextDelta("Two "),
            TextDelta("owls"),
            ChoiceEnd(),
            USAGE,
            StreamEnd(),
        ],
    ),
    "chat_tool_calls": (
        False,
        [
            START,
            ToolCallStart(0, "call_k1", "lookup"),
            ToolCallDelta(0, '{"q":'),
            ToolCallStart(1, "call_k2", "lookup"),
            ToolCallDelta(1, "{}"),
            ToolCallDelta(0, '"owl"}'),
            ChoiceEnd(0, FinishReason.TOOL_CALLS),
            StreamEnd(),
        ],
    ),
    "chat_two_choices": (
        False,
        [
            StreamStart("chatcmpl-7Q", "tiny-1", 1790000000, choices=2),
            TextDelta("B", 1),
            TextDelta(
                "né",
                0,
                1,
                (TokenLogprob("né", -0.5, None, (TopLogprob("ne", -1.0), TopLogprob("\ufffd", -2.5, b"\xc3"))),),
            ),
            ChoiceEnd(1, FinishReason.LENGTH),
            RefusalDelta("No."),
            ChoiceEnd(0),
            StreamEnd(),
        ],
    ),
    "chat_error": (
        True,
        [
            START,
            TextDelta("Two "),
            StreamError(ErrorKind.OVERLOADED, "The engine is full.", "engine_full"),
        ],
    ),
}


def encode_each(events: Sequence[Event], *, include_usage: bool = True) -> list[bytes]:
    encoder = ChatEncoder(include_usage=include_usage)
    return [encoder.encode(event, number) for number, event in enumerate(events, 1)]


def encode(events: Sequence[Event], *, include_usage: bool = True) -> bytes:
    return b"".join(encode_each(events, include_usage=include_usage))


def decode(*pieces: bytes) -> list[Event]:
    decoder = DIALECT.decoder()
    return [*(event for piece in pieces for event in decoder.receive_data(piece)), *decoder.receive_eof()]


def chunk(delta: object = None, *, index: int | None = 0, finish: str | None = None, **members: object) -> bytes:
    choice: dict[str, object] = {"delta": delta or {}, "finish_reason": finish}
    if index is not None:
        choice["index"] = index
    return sse(
        {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **members}
    )


def sse(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ROLE = chunk({"role": "assistant", "content": ""})
STOP = chunk(finish="stop")
BEGUN: Event = StreamStart("c", "m", 1, choices=0)


def fold(events: Sequence[Event]) -> Result:
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector.result()


def as_decoded(result: Result) -> Result:
    """Bring a result to what this dialect can say: its finish words, no stop sequence, no provider data."""
    back = {FINISH_REASONS[reason]: reason for reason in reversed(FinishReason)}
    choices = tuple(
        msgspec.structs.replace(
            choice,
            reason=choice.reason and back[FINISH_REASONS[choice.reason]],
            stop_sequence=None,
            provider_data=(),
        )
        for choice in result.choices
    )
    start = result.start and msgspec.structs.replace(result.start, choices=0)
    return msgspec.structs.replace(result, choices=choices, start=start)


# ---- encoding


def test_the_dialect_meets_its_contract() -> None:
    dialect: Dialect = DIALECT
    assert (dialect.name, dialect.media_type, dialect.streams_by_default) == ("openai_chat", "text/event-stream", False)
    encoder = dialect.encoder(PLAIN_REQUEST, "s1")
    assert (encoder.numbered, encoder.heartbeat) == (False, b": ka\n")


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts_are_what_they_were(name: str) -> None:
    include_usage, events = TRANSCRIPTS[name]
    golden = (GOLDEN / f"{name}.txt").read_bytes()
    assert encode(events, include_usage=include_usage).decode() == golden.decode()
    start = msgspec.structs.replace(events[0], choices=0)
    decoded = decode(golden)
    assert decoded[:-1] == [start, *events[1:-1]]
    assert type(decoded[-1]) is type(events[-1])


def test_usage_is_null_in_every_chunk_and_told_once_where_asked_for() -> None:
    run: list[Event] = [START, TextDelta("a"), ChoiceEnd(), USAGE, StreamEnd()]
    with_usage, without = encode_each(run), encode_each(run, include_usage=False)
    assert all(b'"usage":null}' in frame for frame in with_usage[:3])
    assert b'"choices":[],"usage":{"prompt_tokens":11,' in with_usage[4]
    assert b"usage" not in b"".join(without)
    assert without[4] == DONE


def test_cache_writes_are_told_where_there_are_any() -> None:
    frames = encode([START, ChoiceEnd(), UsageReport(3, 4, 0, 2), StreamEnd()])
    assert b'"prompt_tokens_details":{"cached_tokens":0,"cache_write_tokens":2}' in frames


def test_role_chunks_come_in_the_order_of_their_indexes() -> None:
    announced = encode([StreamStart("i", "m", 1, choices=3)])
    assert [json.loads(line[6:])["choices"][0]["index"] for line in announced.decode().split("\n\n")[:-1]] == [0, 1, 2]


def test_choices_that_nobody_announced_get_their_role_chunks_when_they_open() -> None:
    frames = encode_each([StreamStart("i", "m", 1, choices=0), TextDelta("x", 1), TextDelta("y", 0)])
    assert frames[0] == b""
    assert [frame.count(b'"role"') for frame in frames] == [0, 2, 0]


def test_the_template_is_one_object_until_its_choice_ends() -> None:
    encoder = ChatEncoder(include_usage=False)
    assert encoder.template(0) is None
    encoder.encode(START, 1)
    template = encoder.template(0)
    assert template is not None
    encoder.encode(TextDelta("a"), 2)
    encoder.encode(ReasoningDelta("a"), 3)
    assert encoder.template(0) is template
    assert encoder.template(1) is None
    encoder.encode(ChoiceEnd(), 4)
    assert encoder.template(0) is None


@given(any_text, st.booleans())
def test_a_folded_template_writes_what_encode_writes(text: str, include_usage: bool) -> None:
    encoder = ChatEncoder(include_usage=include_usage)
    encoder.encode(StreamStart("i", "m", 1, choices=2), 1)
    template = encoder.template(1)
    assert template is not None
    assert fold_bare(template).encode(text, 2) == encoder.encode(TextDelta(text, 1), 2)
    assert template.escape is escape_valid


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_error_ends_the_stream_in_the_shape_that_sdks_raise_on(kind: ErrorKind) -> None:
    frame = encode_each([START, StreamError(kind, "no", "word", "field")])[-1]
    body = json.loads(DIALECT.encode_error(StreamError(kind, "no", "word", "field")))
    assert frame == b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
    assert list(body["error"]) == ["message", "type", "param", "code"]


@pytest.mark.parametrize(
    ("terminal", "code"), [(StreamTruncated("eof"), "stream_truncated"), (StreamCancelled("client"), "cancelled")]
)
def test_what_is_no_success_is_an_error_and_never_done(terminal: Event, code: str) -> None:
    frame = encode_each([START, terminal])[-1]
    assert json.loads(frame[6:])["error"]["code"] == code
    assert b"[DONE]" not in frame


@pytest.mark.parametrize("reason", FinishReason)
def test_every_reason_has_a_word_of_openais(reason: FinishReason) -> None:
    frame = encode_each([START, ChoiceEnd(0, reason)])[-1]
    word = json.loads(frame[6:])["choices"][0]["finish_reason"]
    assert word == FINISH_REASONS[reason]
    assert word in {"stop", "length", "tool_calls", "content_filter"}


def test_provider_data_is_not_told_and_infinite_logprobs_are_clamped() -> None:
    frames = encode_each([START, ProviderData("sig", "x"), TextDelta("a", 0, 1, (TokenLogprob("a", float("-inf")),))])
    assert frames[1] == b""
    token = json.loads(frames[2][6:])["choices"][0]["logprobs"]["content"][0]
    assert (token["logprob"], token["bytes"]) == (MIN_LOGPROB, [97])


# ---- both ways


@given(legal_streams(2, provider_data=True))
def test_what_is_encoded_is_decoded_to_the_same_result(events: list[Event]) -> None:
    assert as_decoded(fold(decode(encode(events)))) == as_decoded(fold(events))


@given(legal_streams(2))
def test_a_merged_run_says_the_same(events: list[Event]) -> None:
    assert fold(decode(encode(merge_run(events)))) == fold(decode(encode(events)))


@given(legal_streams(2, failures=True), st.data())
def test_cutting_the_bytes_differently_changes_nothing(events: list[Event], data: st.DataObject) -> None:
    wire = encode(events)
    whole = decode(wire)
    assert decode(*data.draw(splits(wire))) == whole
    assert fold(whole).terminal == whole[-1]


@given(legal_streams(2), st.data())
def test_a_cut_stream_is_never_a_success(events: list[Event], data: st.DataObject) -> None:
    frames = [frame for frame in encode_each(events, include_usage=False)[:-1] if frame]
    cut = data.draw(st.integers(0, max(len(b"".join(frames)) - 1, 0)))
    assert isinstance(decode(b"".join(frames)[:cut])[-1], StreamTruncated)


@given(st.lists(st.binary(max_size=40) | st.sampled_from([ROLE, STOP, DONE, b"data: {", b"\n\n", b"data: []\n\n"])))
def test_whatever_comes_there_is_exactly_one_terminal_event(pieces: list[bytes]) -> None:
    events = decode(*pieces)
    assert fold(events).terminal == events[-1]


# ---- decoding others


def test_the_published_tool_example_is_decoded() -> None:
    head = (
        'data: {"id":"chatcmpl-7Q","object":"chat.completion.chunk","created":1790000000,"model":"tiny-1",'
        '"choices":[{"index":0,"delta":'
    )
    deltas = [
        ('{"role":"assistant","content":null}', "null"),
        (
            '{"tool_calls":[{"index":0,"id":"call_k1","type":"function","function":{"name":"lookup","arguments":""}}]}',
            "null",
        ),
        ('{"tool_calls":[{"index":0,"function":{"arguments":"{\\"q\\":"}}]}', "null"),
        ('{"tool_calls":[{"index":0,"function":{"arguments":"\\"owl\\"}"}}]}', "null"),
        ("{}", '"tool_calls"'),
    ]
    wire = "".join(f'{head}{delta},"finish_reason":{word}}}],"usage":null}}\n\n' for delta, word in deltas)
    assert decode(wire.encode()) == [
        StreamStart("chatcmpl-7Q", "tiny-1", 1790000000, choices=0),
        ToolCallStart(0, "call_k1", "lookup"),
        ToolCallDelta(0, '{"q":'),
        ToolCallDelta(0, '"owl"}'),
        ChoiceEnd(0, FinishReason.TOOL_CALLS),
        StreamEnd(),
    ]


def call(**members: object) -> bytes:
    return chunk({"tool_calls": [members]})


@pytest.mark.parametrize(
    ("wire", "events"),
    [
        pytest.param(chunk({"content": "a"}), [TextDelta("a")], id="no role chunk"),
        pytest.param(chunk({"content": "a"}, index=None), [TextDelta("a")], id="no index"),
        pytest.param(chunk({"content": None, "refusal": None}), [], id="nulls"),
        pytest.param(chunk({"reasoning": "r"}), [ReasoningDelta("r")], id="reasoning"),
        pytest.param(
            chunk({"reasoning_content": "r", "reasoning": "r"}), [ReasoningDelta("r")], id="reasoning in both spellings"
        ),
        pytest.param(chunk({"content": [{"type": "text", "text": "a"}, "b", 1]}), [TextDelta("ab")], id="parts"),
        pytest.param(chunk({"role": 7, "content": "a"}, created="12"), [TextDelta("a")], id="wrong types"),
        pytest.param(
            call(index=0, id="x", function={"name": "f", "arguments": {"a": 1}}),
            [ToolCallStart(0, "x", "f"), ToolCallDelta(0, '{"a":1}')],
            id="arguments as an object",
        ),
        pytest.param(
            call(index=0, id="x", function={"name": "f"})
            + call(index=0, id="x", function={"name": "f", "arguments": "1"}),
            [ToolCallStart(0, "x", "f"), ToolCallDelta(0, "1")],
            id="id and name repeated",
        ),
        pytest.param(
            call(index=0, id="x", function={"name": "f"}) + call(index=0, id="y", function={"name": "g"}),
            [ToolCallStart(0, "x", "f"), ToolCallStart(1, "y", "g")],
            id="one index for two ids",
        ),
        pytest.param(
            call(id="x", function={"name": "f"})
            + call(id="y", function={"name": "g"})
            + call(id="x", function={"arguments": "1"}),
            [ToolCallStart(0, "x", "f"), ToolCallStart(1, "y", "g"), ToolCallDelta(0, "1")],
            id="no index but ids",
        ),
        pytest.param(
            call(id="x", function={"name": "f"}) + call(function={"arguments": "1"}),
            [ToolCallStart(0, "x", "f"), ToolCallDelta(0, "1")],
            id="neither index nor id",
        ),
        pytest.param(
            chunk(
                {
                    "tool_calls": [
                        {"function": {"name": "f", "arguments": "1"}},
                        {"function": {"name": "f", "arguments": "2"}},
                    ]
                }
            ),
            [ToolCallStart(0, "", "f"), ToolCallDelta(0, "1"), ToolCallStart(1, "", "f"), ToolCallDelta(1, "2")],
            id="order within a chunk",
        ),
        pytest.param(
            call(function={"name": "f", "arguments": "1"}) + call(function={"name": "g", "arguments": "2"}),
            [ToolCallStart(0, "", "f"), ToolCallDelta(0, "1"), ToolCallStart(1, "", "g"), ToolCallDelta(1, "2")],
            id="another name is another call",
        ),
        pytest.param(
            call(index=0, id="x") + call(index=0, function={"name": "f"}) + call(index=0, function={"arguments": "1"}),
            [ToolCallStart(0, "x", "f"), ToolCallDelta(0, "1")],
            id="id before name",
        ),
        pytest.param(call(index=3, id="x"), [ToolCallStart(0, "x", "")], id="a call that never got a name"),
        pytest.param(
            chunk({"function_call": {"name": "f", "arguments": "1"}}),
            [ToolCallStart(0, "", "f"), ToolCallDelta(0, "1")],
            id="the deprecated function_call",
        ),
        pytest.param(chunk({"content": "a"}, logprobs=3), [TextDelta("a")], id="unknown members"),
        pytest.param(
            chunk({}, usage={"prompt_tokens": 1, "completion_tokens": 1.0, "prompt_tokens_details": []}),
            [UsageReport(1, 1)],
            id="usage of wrong types on any chunk",
        ),
    ],
)
def test_messy_chunks_say_what_they_mean(wire: bytes, events: list[Event]) -> None:
    decoded = decode(wire + STOP + DONE)
    assert isinstance(decoded[0], StreamStart)
    assert decoded[1:-2] == events
    assert decoded[-2:] == [ChoiceEnd(), StreamEnd()]


@pytest.mark.parametrize(
    ("wire", "events"),
    [
        pytest.param(ROLE + STOP, [BEGUN, ChoiceEnd(), StreamEnd()], id="no [DONE] after a finish"),
        pytest.param(
            chunk({"content": "a"}) + DONE,
            [BEGUN, TextDelta("a"), ChoiceEnd(0, FinishReason.OTHER), StreamEnd()],
            id="[DONE] without a finish",
        ),
        pytest.param(
            chunk({"content": "a"}, finish="Repetition") + DONE,
            [
                BEGUN,
                TextDelta("a"),
                ProviderData("finish_reason", "Repetition"),
                ChoiceEnd(0, FinishReason.OTHER),
                StreamEnd(),
            ],
            id="an unknown word",
        ),
        pytest.param(
            chunk({"content": "a"}, finish="") + STOP + chunk({"content": "late"}) + STOP,
            [BEGUN, TextDelta("a"), ChoiceEnd(), StreamEnd()],
            id="an empty word, and deltas after the finish",
        ),
        pytest.param(
            sse({"choices": [], "prompt_filter_results": []}) + b": c\n\n" + ROLE + b"id: 7\n\n: c\n" + STOP,
            [BEGUN, ChoiceEnd(), StreamEnd()],
            id="chunks without choices, comments, ids",
        ),
        pytest.param(
            b"event: ping\ndata: {}\n\nevent: ping\ndata: x\n\n" + STOP + DONE + STOP,
            [BEGUN, ChoiceEnd(), StreamEnd()],
            id="events of other names, and bytes after the end",
        ),
        pytest.param(
            ROLE + sse({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}) * 2 + STOP + DONE,
            [BEGUN, UsageReport(2, 3), ChoiceEnd(), StreamEnd()],
            id="usage before the finish, repeated",
        ),
        pytest.param(
            STOP + sse({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}) + DONE,
            [BEGUN, ChoiceEnd(), UsageReport(2, 3), StreamEnd()],
            id="usage after the finish",
        ),
        pytest.param(
            STOP.replace(b"\n\n", b"\r\n\r\n").replace(b"data: ", b"\xef\xbb\xbfdata:"),
            [BEGUN, ChoiceEnd(), StreamEnd()],
            id="CRLF, BOM, no space",
        ),
        pytest.param(
            ROLE + sse({"error": {"message": "m", "code": 503}}) + STOP + DONE,
            [BEGUN, StreamError(ErrorKind.UNAVAILABLE, "m", "503", status=503)],
            id="an error with a number for its code",
        ),
        pytest.param(ROLE + sse({"error": "m"}), [BEGUN, StreamError(ErrorKind.SERVER, "m")], id="an error as text"),
        pytest.param(
            b'event: error\ndata: {"message":"m"}\n\n', [StreamError(ErrorKind.SERVER, "m")], id="an error by its name"
        ),
        pytest.param(b"event: error\ndata: Oops\n\n", [StreamError(ErrorKind.SERVER, "Oops")], id="an error in words"),
        pytest.param(
            b"event: error\ndata: [1]\n\n", [StreamError(ErrorKind.SERVER, "[1]")], id="an error that is no object"
        ),
        pytest.param(
            b'{"error":{"message":"m","type":"rate_limit_error"}}',
            [StreamError(ErrorKind.RATE_LIMIT, "m")],
            id="an error's body instead of a stream",
        ),
    ],
)
def test_messy_streams_end_once(wire: bytes, events: list[Event]) -> None:
    assert decode(wire) == events


@pytest.mark.parametrize(
    ("wire", "began", "reason"),
    [
        (b"", False, "the input is empty"),
        (b"<html>502</html>", False, "no event came"),
        (b": ka\n" * 3, False, "no event came"),
        (DONE, False, "[DONE] came before an answer"),
        (sse({"choices": [], "usage": {}}) + DONE, True, "[DONE] came before an answer"),
        (ROLE + DONE, True, "[DONE] came before an answer"),
        (ROLE, True, "the input ended before every choice had finished"),
        (STOP + chunk({"content": "b"}, index=1), True, "the input ended before every choice had finished"),
    ],
)
def test_truncation_is_named(wire: bytes, began: bool, reason: str) -> None:
    events = decode(wire)
    assert events[-1] == StreamTruncated(reason, 0 if DONE in wire else len(wire))
    assert isinstance(events[0], StreamStart) is began


@pytest.mark.parametrize(
    "wire",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: 3\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
        chunk({"content": "a"}, index=MAX_CHOICES),
        chunk({"content": "a"}, index=-1),
        b"".join(call(index=number, id=str(number)) for number in range(MAX_CALLS + 1)),
    ],
)
def test_what_is_not_a_chunk_ends_the_stream_with_an_error(wire: bytes) -> None:
    events = decode(ROLE + wire + STOP + DONE)
    assert events[0] == BEGUN
    assert isinstance(events[-1], StreamError)
    assert events[-1].code == "malformed_stream"


SAID = chunk({"content": "a"})
USED = sse({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})


@pytest.mark.parametrize("terminated", [True, False])
@given(st.data())
def test_an_end_without_done_is_whole_between_events_only(terminated: bool, data: st.DataObject) -> None:
    """Every cut of what follows the finish is a truncation, but where a whole event lacks its blank line."""
    tail = USED + (DONE if terminated else b"")
    cut = data.draw(st.integers(0, len(tail)))
    ends = {0, *(at for at in range(len(tail) + 1) if tail[:at].rstrip(b"\n") in {USED.rstrip(), tail.rstrip()})}
    last = decode(SAID + STOP + tail[:cut])[-1]
    assert isinstance(last, StreamEnd if cut in ends else StreamTruncated)


def test_a_reason_beside_text_is_told_when_no_more_comes() -> None:
    decoder = DIALECT.decoder()
    assert list(decoder.receive_data(chunk({"content": "a"}, finish="stop"))) == [BEGUN, TextDelta("a")]
    assert list(decoder.receive_data(USED)) == [ChoiceEnd(), UsageReport(5, 2)]
    assert list(decoder.receive_eof()) == [StreamEnd()]


def test_a_reason_beside_text_waits_for_its_own_choice_only() -> None:
    decoder = DIALECT.decoder()
    decoder.receive_data(SAID + chunk({"content": "b"}, index=1))
    assert list(decoder.receive_data(chunk({"content": "c"}, index=1, finish="stop"))) == [TextDelta("c", 1)]
    assert list(decoder.receive_data(SAID)) == [ChoiceEnd(1), TextDelta("a")]
    assert type(decoder.receive_eof()[-1]) is StreamTruncated


def test_a_choice_that_is_open_again_must_finish_again() -> None:
    wire = chunk({"content": "a"}, finish="stop") + chunk({"content": "b"})
    assert decode(wire)[1:] == [
        TextDelta("a"),
        TextDelta("b"),
        StreamTruncated("the input ended before every choice had finished", len(wire)),
    ]


def test_an_error_after_the_finish_is_an_error() -> None:
    wire = STOP + sse({"error": {"message": "m"}})
    for whole in (wire, wire.rstrip()):
        assert decode(whole) == [BEGUN, ChoiceEnd(), StreamError(ErrorKind.SERVER, "m")]


def test_groqs_error_and_usage_are_read_without_choices() -> None:
    usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    assert decode(STOP + sse({"x_groq": usage}))[2:] == [UsageReport(1, 2), StreamEnd()]
    assert decode(sse({"x_groq": {"error": "over capacity"}})) == [StreamError(ErrorKind.SERVER, "over capacity")]


def test_an_answer_that_is_no_stream_is_kept_up_to_a_limit() -> None:
    answer = {
        "id": "c",
        "created": 1,
        "model": "m",
        "choices": [{"message": {"content": "a"}, "finish_reason": "stop"}],
    }
    body = json.dumps(answer).encode()
    assert decode(*(body[at : at + 1] for at in range(len(body)))) == [BEGUN, TextDelta("a"), ChoiceEnd(), StreamEnd()]
    assert decode(b"\xef\xbb\xbf\n" + body)[-1] == StreamEnd()
    long = body.replace(b'"a"', b'"a"' + b" " * 2**20)
    assert decode(long) == [StreamTruncated("no event came", len(long))]


@pytest.mark.parametrize(
    "number", ["-5", "1e30", '"999999999999999999"', "18446744073709551615", "9" * 400, "Infinity"]
)
def test_no_number_of_a_server_is_too_much_for_our_encoders(number: str) -> None:
    usage = f'{{"prompt_tokens":{number},"completion_tokens":{number}}}'
    wire = f'data: {{"created":{number},"choices":[{{"index":0,"delta":{{"content":"a"}}}}],"usage":{usage}}}\n\n'
    decoder = DIALECT.decoder()
    start, text, report, *rest = [*decoder.receive_data(wire.encode() + b"data: [DONE]\n\n"), *decoder.receive_eof()]
    assert isinstance(start, StreamStart)
    assert text == TextDelta("a")
    assert isinstance(report, UsageReport)
    assert 0 <= start.created < 2**53
    assert 0 <= report.input_tokens == report.output_tokens < 2**53
    assert rest == [ChoiceEnd(0, FinishReason.OTHER), StreamEnd()]


def test_what_python_and_javascript_write_for_json_is_read() -> None:
    halves = [b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"},"logprobs":', b"}]}\n\n"]
    logprobs = b'{"content":[{"token":"x","logprob":-Infinity,"top_logprobs":[{"token":"y","logprob":NaN}]}]}'
    other = b'data: {"choices":[{"index":0,"delta":{"content":"\\ude00"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    decoder = DIALECT.decoder()
    collector = Collector()
    for event in decoder.receive_data(logprobs.join(halves) + other):
        collector.receive(event)
    result = collector.result()
    assert result.terminal == StreamEnd()
    choice = json.loads(DIALECT.encode_result(result, PLAIN_REQUEST))["choices"][0]
    assert choice["message"]["content"] == "\U0001f600"
    assert choice["logprobs"]["content"][0]["logprob"] == MIN_LOGPROB
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] == MIN_LOGPROB


def test_usage_never_falls() -> None:
    counts = [(5, 2), (5, 1), (0, 0), (6, 2)]
    wire = SAID + b"".join(chunk({}, usage={"prompt_tokens": a, "completion_tokens": b}) for a, b in counts)
    assert [event for event in decode(wire) if isinstance(event, UsageReport)] == [UsageReport(5, 2), UsageReport(6, 2)]


def test_a_reason_that_is_an_object_says_its_type() -> None:
    wire = SAID + sse({"choices": [{"index": 0, "delta": {}, "finish_reason": {"type": "length", "length": 4}}]})
    assert decode(wire)[-2:] == [ChoiceEnd(0, FinishReason.LENGTH), StreamEnd()]


def test_a_line_without_end_ends_the_stream_with_an_error() -> None:
    decoder = DIALECT.decoder()
    out: list[Event] = []
    for _ in range(17):
        out += decoder.receive_data(b"x" * 2**20)
    assert [type(event) for event in out] == [StreamError]
    assert list(decoder.receive_eof()) == []


def test_the_decoder_is_closed_by_the_end_of_input_and_only_by_it() -> None:
    decoder = DIALECT.decoder()
    assert list(decoder.receive_data(STOP + DONE))[-1] == StreamEnd()
    assert list(decoder.receive_data(b"more")) == []
    assert list(decoder.receive_eof()) == []
    assert list(decoder.receive_eof()) == []
    with pytest.raises(LocalProtocolError):
        decoder.receive_data(b"x")


def test_bytes_of_logprobs_that_are_no_bytes_are_dropped() -> None:
    tokens = [{"token": "a", "logprob": -1, "bytes": [300]}, {"token": "b", "logprob": -1, "bytes": [10**30]}]
    choice = {"index": 0, "delta": {"content": "ab"}, "logprobs": {"content": tokens}, "finish_reason": "stop"}
    text = decode(sse({"choices": [choice]}))[1]
    assert text == TextDelta("ab", 0, 2, (TokenLogprob("a", -1.0), TokenLogprob("b", -1.0)))


# ---- whole answers


@given(legal_streams(2))
def test_a_whole_answer_is_decoded_to_the_same_result(events: list[Event]) -> None:
    result = fold(events)
    decoded = fold(DIALECT.decode_result(DIALECT.encode_result(result, PLAIN_REQUEST)))
    assert as_decoded(decoded) == as_decoded(result)


def test_a_whole_answer_has_openais_shape() -> None:
    events: list[Event] = [START, ToolCallStart(0, "x", "f"), ChoiceEnd(0, FinishReason.TOOL_CALLS), USAGE, StreamEnd()]
    assert json.loads(DIALECT.encode_result(fold(events), PLAIN_REQUEST)) == {
        "id": "chatcmpl-7Q",
        "object": "chat.completion",
        "created": 1790000000,
        "model": "tiny-1",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": ""}}],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 6,
            "total_tokens": 17,
            "prompt_tokens_details": {"cached_tokens": 8},
            "completion_tokens_details": {"reasoning_tokens": 2},
        },
    }


def test_a_broken_result_is_no_whole_answer() -> None:
    with pytest.raises(LocalProtocolError):
        DIALECT.encode_result(fold([START, StreamTruncated("eof")]), PLAIN_REQUEST)


def test_an_error_body_is_decoded_to_a_failed_result() -> None:
    body = DIALECT.encode_error(StreamError(ErrorKind.NOT_FOUND, "m", "model_not_found", "model"))
    assert DIALECT.decode_result(body) == [StreamError(ErrorKind.NOT_FOUND, "m", "model_not_found", "model")]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"[1]", b"{}", b'{"choices":[]}', b"\xff", b'"\xff"', b"{]"])
def test_what_is_no_answer_is_a_malformed_answer(body: bytes) -> None:
    *before, last = DIALECT.decode_result(body)
    assert isinstance(last, StreamError)
    assert (before, last.kind, last.code) == ([], ErrorKind.SERVER, "malformed_answer")


@pytest.mark.parametrize("body", [b"", b" \n", b'{"choices":[{"message":{"content":"Tw', b'[{"error":{"mess'])
def test_a_whole_answer_that_is_not_whole_is_truncated(body: bytes) -> None:
    assert [type(event) for event in DIALECT.decode_result(body)] == [StreamTruncated]


def test_an_answer_may_come_as_a_stream_though_none_was_asked_for() -> None:
    assert DIALECT.decode_result(ROLE + chunk({"content": "a"}) + STOP + DONE) == [
        BEGUN,
        TextDelta("a"),
        ChoiceEnd(),
        StreamEnd(),
    ]
    assert type(DIALECT.decode_result(ROLE)[-1]) is StreamTruncated


def test_models_are_listed_and_shown() -> None:
    card = ModelCard("tiny", 5, "me")
    shown = {"id": "tiny", "object": "model", "created": 5, "owned_by": "me"}
    assert json.loads(DIALECT.encode_models([card])) == {"object": "list", "data": [shown]}
    assert json.loads(DIALECT.encode_model(card)) == shown


# ---- requests

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
EVERYTHING = frozenset(GenerationRequest.__struct_fields__)


def parse(honoured: frozenset[str] = EVERYTHING, **fields: object) -> ParsedRequest:
    body = {"model": "m", "messages": [USER], **fields}
    return DIALECT.parse_request(json.dumps(body).encode(), {}, honoured)


def test_a_small_request_says_nothing_else() -> None:
    expected = GenerationRequest(model="m", messages=(Message("user", (TextPart("hi"),)),))
    assert parse() == ParsedRequest(expected)


def test_every_field_has_its_place() -> None:
    request = parse(
        max_tokens=5,
        max_completion_tokens=6,
        n=2,
        stop=["a", "b", "a"],
        temperature=0.5,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=3,
        logit_bias={"7": 1},
        logprobs=True,
        top_logprobs=2,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "f"}},
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "s"}},
        reasoning_effort="low",
        user="u",
        stream=True,
        stream_options={"include_usage": True},
    )
    assert request == ParsedRequest(
        GenerationRequest(
            model="m",
            messages=(Message("user", (TextPart("hi"),)),),
            max_tokens=6,
            n=2,
            stop=("a", "b"),
            temperature=0.5,
            top_p=0.5,
            presence_penalty=1,
            frequency_penalty=-1,
            seed=3,
            logit_bias={"7": 1},
            logprobs=True,
            top_logprobs=2,
            tools=(Tool("f", "d", {"type": "object"}),),
            tool_choice="function:f",
            parallel_tool_calls=False,
            response_format={"type": "json_schema", "json_schema": {"name": "s"}},
            reasoning_effort="low",
            user="u",
            stream=True,
            include_usage=True,
        )
    )


def test_messages_of_every_role_become_neutral() -> None:
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {
            "role": "user",
            "name": "n",
            "content": [{"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "content": "r", "tool_call_id": "c"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "refusal": "no"},
        {"role": "assistant", "function_call": {"name": "g", "arguments": "{}"}},
        {"role": "function", "name": "g", "content": "r"},
    ]
    assert parse(messages=messages).request.messages == (
        Message("developer", (TextPart("d"),)),
        Message("system", (TextPart("s"),)),
        Message("user", (ImagePart("data:,", "low"),), "n"),
        Message("assistant", (), None, (ToolCall("c", "f", "{}"),)),
        Message("tool", (TextPart("r"),), None, (), "c"),
        Message("assistant", (TextPart("no"),)),
        Message("assistant", (TextPart("no"),)),
        Message("assistant", (), None, (ToolCall("g", "g", "{}"),)),
        Message("tool", (TextPart("r"),), "g", (), "g"),
    )


def test_what_a_backend_does_not_honour_is_named() -> None:
    parsed = parse(
        frozenset(),
        temperature=0.5,
        top_p=1,
        seed=1,
        user="u",
        metadata={"a": "b"},
        top_k=5,
        store=False,
        stream_options={"include_obfuscation": True},
        service_tier="auto",
        tools=[],
        response_format={"type": "text"},
        modalities=["text"],
        logprobs=False,
        n=1,
        audio=None,
        reasoning_effort="low",
        logit_bias={"1": 1},
    )
    assert parsed.ignored == (
        "stream_options.include_obfuscation",
        "temperature",
        "seed",
        "user",
        "metadata",
        "reasoning_effort",
        "logit_bias",
        "top_k",
    )


def test_tools_that_must_not_be_called_are_taken_from_a_backend_that_would_call_them() -> None:
    for honoured in (frozenset[str](), frozenset({"tools"})):
        parsed = parse(honoured, tools=[TOOL], tool_choice="none")
        assert (parsed.request.tools, parsed.ignored) == ((), ("tools",))
    kept = parse(frozenset({"tools", "tool_choice"}), tools=[TOOL], tool_choice="none")
    assert (len(kept.request.tools), kept.request.tool_choice, kept.ignored) == (1, "none", ())
    assert parse(frozenset(), tool_choice="none").ignored == ()


BAD_REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": None}, "model", "Missing required parameter: 'model'"),
    ({"model": ""}, "model", "length >= 1"),
    ({"model": 3}, "model", "expected `str`, got `int`"),
    ({"messages": None}, "messages", "Missing required parameter: 'messages'"),
    ({"messages": []}, "messages", "expected `array` of length >= 1"),
    ({"messages": [USER] * 10_001}, "messages", "expected `array` of length <= 10000"),
    (
        {"messages": [{"role": 1}]},
        r"messages[0].role",
        r"Invalid value for 'messages\[0\].role': expected `str`, got `int`",
    ),
    ({"messages": [{"role": "boss", "content": ""}]}, "messages[0].role", "'boss' is not supported"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "Missing required parameter"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "got `int`"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
        "'input_audio'",
    ),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type", "Missing required"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "Missing required"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name", "Missing required"),
    ({"max_tokens": 0}, "max_tokens", "expected `int` >= 1"),
    ({"max_completion_tokens": 2**31}, "max_completion_tokens", "expected `int` <="),
    ({"n": 0}, "n", "expected `int` >= 1"),
    ({"n": 17}, "n", "expected `int` <= 16"),
    ({"stop": ""}, "stop", "length >= 1"),
    ({"stop": [""]}, "stop[0]", "length >= 1"),
    ({"stop": ["x"] * 17}, "stop", "length <= 16"),
    ({"stop": ["x" * 1025]}, "stop[0]", "length <= 1024"),
    ({"stop": 5}, "stop", r"expected `str \| array`, got `int`"),
    ({"temperature": 2.1}, "temperature", "expected `float` <= 2.0"),
    ({"temperature": "hot"}, "temperature", "expected `float`, got `str`"),
    ({"top_p": -1}, "top_p", "expected `float` >= 0.0"),
    ({"presence_penalty": 3}, "presence_penalty", "<= 2.0"),
    ({"seed": 2**63}, "seed", "expected `int` <="),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]", "<= 100.0"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "<= 20"),
    ({"top_logprobs": 2}, "top_logprobs", "'logprobs' must be true"),
    ({"stream": "yes"}, "stream", "expected `bool`, got `str`"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", r"expected `bool \| null`, got `int`"),
    ({"tools": [{"type": "custom"}]}, "tools[0].type", "'custom' is not supported"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing required"),
    ({"tools": [TOOL] * 129}, "tools", "length <= 128"),
    ({"tool_choice": "required"}, "tool_choice", "requires 'tools'"),
    ({"tool_choice": "some"}, "tool_choice", "'some' is not supported"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice", "no function"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "'allowed_tools' is not supported"),
    ({"response_format": {"type": "grammar"}}, "response_format.type", "'grammar' is not supported"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing required"),
    ({"functions": [{"name": "f"}]}, "functions", "Unsupported parameter: 'functions'"),
    ({"modalities": ["text", "audio"]}, "modalities", "Unsupported parameter"),
    ({"audio": {"voice": "x"}}, "audio", "Unsupported parameter"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_REQUESTS, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_refused_with_its_field(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestRefused, match=message) as refused:
        parse(**fields)
    assert (refused.value.error.kind, refused.value.error.param) == (ErrorKind.INVALID_REQUEST, param)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("tools", [TOOL]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
    ],
)
def test_what_must_be_honoured_is_refused_where_it_is_not(name: str, value: object) -> None:
    with pytest.raises(RequestRefused, match=f"'{name}'") as refused:
        parse(frozenset(), **{name: value})
    assert (refused.value.error.param, refused.value.error.code) == (name, "unsupported_parameter")
    assert parse(EVERYTHING, **{name: value}).ignored == ()
