"""The engine without a model: its timing by a virtual clock, its text, tools and usage, and its cost in timers."""

from __future__ import annotations

import json
from collections.abc import Hashable
from itertools import pairwise
from typing import Any

import pytest
from tests.backends.fakes import FakeRuntime, RecordingSink, reasons_of, request, text_of

from tokenwire.backends._prose import STARTS, TOKENS, TURN
from tokenwire.backends._sample import MAX_DEPTH, sample
from tokenwire.backends.mock import DEFAULT_MAX_TOKENS, MockBackend
from tokenwire.core.events import Event, StreamError, TextDelta, ToolCallDelta, ToolCallStart, UsageReport
from tokenwire.core.request import Tool

MS = 1_000_000
WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "note": {"type": "string"}},
        "required": ["city", "unit"],
    },
)


def engine(
    *, ttft_ns: int = 200 * MS, itl_ns: int = 20 * MS, jitter: float = 0.0, seed: int = 0
) -> tuple[MockBackend, FakeRuntime, RecordingSink]:
    backend = MockBackend(ttft_ns=ttft_ns, itl_ns=itl_ns, jitter=jitter, seed=seed)
    runtime, sink = FakeRuntime(), RecordingSink()
    backend.attach(runtime, sink)
    return backend, runtime, sink


def answer(seed: int = 0, prompt: str = "hello there", **fields: Any) -> list[Event]:
    """All that the core lets out of one answer."""
    backend, runtime, sink = engine(seed=seed)
    asked = request(prompt, **fields)
    backend.start("s", asked)
    runtime.fire_all()
    return sink.events("s", asked.n)


def times_of(sink: RecordingSink, stream: Hashable) -> list[int]:
    return [now for now, entries in sink.batches if stream in dict(entries)]


def usage_of(events: list[Event]) -> UsageReport:
    (usage,) = [event for event in events if isinstance(event, UsageReport)]
    return usage


# Time


def test_a_stream_alone_has_its_first_token_at_ttft_and_then_one_an_interval() -> None:
    backend, runtime, sink = engine()
    start = runtime.clock
    backend.start("s", request(max_tokens=4))
    runtime.fire_all()
    assert [at - start for at in times_of(sink, "s")] == [200 * MS, 220 * MS, 240 * MS, 260 * MS]


def test_start_says_nothing_before_it_returns() -> None:
    backend, _, sink = engine(ttft_ns=0, itl_ns=0)
    backend.start("s", request())
    assert sink.batches == []


def test_without_jitter_all_streams_step_together_in_one_batch_and_one_timer() -> None:
    backend, runtime, sink = engine()
    for stream in range(50):
        backend.start(stream, request(f"prompt {stream}", max_tokens=30))
        runtime.clock += 1 * MS
    runtime.fire_all()
    anchor = sink.batches[0][0]
    assert {(now - anchor) % (20 * MS) for now, _ in sink.batches} == {0}
    assert max(len(entries) for _, entries in sink.batches) == 50
    assert len({now for now, _ in sink.batches}) == len(sink.batches)
    assert len(runtime.timers) == len(sink.batches)  # none per stream, none per token
    assert sum(len(entries) for _, entries in sink.batches) == 50 * 30


def test_an_idle_engine_has_no_timer_and_begins_a_new_grid() -> None:
    backend, runtime, sink = engine()
    backend.start("a", request(max_tokens=2))
    runtime.fire_all()
    assert runtime.pending == []
    runtime.clock += 7 * MS
    start = runtime.clock
    backend.start("b", request(max_tokens=1))
    runtime.fire_all()
    assert times_of(sink, "b") == [start + 200 * MS]


def test_a_late_step_is_not_made_up_for() -> None:
    backend, runtime, sink = engine(ttft_ns=0)
    start = runtime.clock
    backend.start("s", request(max_tokens=4))
    runtime.fire()
    runtime.fire(late=95 * MS)
    runtime.fire_all()
    assert [at - start for at in times_of(sink, "s")] == [0, 115 * MS, 140 * MS, 160 * MS]


def test_a_timer_that_is_a_little_late_costs_no_step() -> None:
    backend, runtime, sink = engine(ttft_ns=0)
    start = runtime.clock
    backend.start("s", request(max_tokens=5))
    while runtime.pending:
        runtime.fire(late=1 * MS)
    assert [at - start for at in times_of(sink, "s")] == [n * 20 * MS + 1 * MS for n in range(5)]


def test_an_earlier_stream_gets_its_own_timer_and_the_later_timer_is_used_again() -> None:
    backend, runtime, sink = engine(ttft_ns=10 * MS, itl_ns=100 * MS)
    backend.start("a", request(max_tokens=3))
    runtime.fire()
    backend.start("b", request(max_tokens=2))
    runtime.fire_all()
    assert len(runtime.timers) == len(set(runtime.timers)) == 3
    assert times_of(sink, "b") == times_of(sink, "a")[1:]


def test_with_jitter_each_stream_keeps_within_its_bounds_and_no_timer_doubles() -> None:
    backend, runtime, sink = engine(jitter=0.2)
    for stream in range(20):
        backend.start(stream, request(f"{stream}", max_tokens=40))
    runtime.fire_all()
    gaps = [b - a for s in range(20) for a, b in pairwise(times_of(sink, s))]
    assert 16 * MS <= min(gaps) < 17 * MS
    assert 23 * MS < max(gaps) <= 24 * MS
    assert len(runtime.timers) == len(set(runtime.timers)) == len(sink.batches)


def test_with_jitter_a_late_step_is_not_made_up_for() -> None:
    backend, runtime, sink = engine(ttft_ns=0, jitter=0.2)
    backend.start("s", request(max_tokens=6))
    runtime.fire(late=500 * MS)
    runtime.fire_all()
    times = times_of(sink, "s")
    assert min(b - a for a, b in pairwise(times)) >= 16 * MS


def test_jitter_is_the_seeds() -> None:
    def times(seed: int) -> list[int]:
        backend, runtime, sink = engine(jitter=0.5, seed=seed)
        backend.start("s", request(max_tokens=20))
        runtime.fire_all()
        return times_of(sink, "s")

    assert times(1) == times(1)
    assert times(1) != times(2)


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_without_intervals_each_turn_of_the_loop_gives_one_token(jitter: float) -> None:
    backend, runtime, sink = engine(ttft_ns=0, itl_ns=0, jitter=jitter)
    backend.start("s", request(max_tokens=5))
    for turn in range(1, 6):
        runtime.fire()
        assert len(sink.batches) == turn
    assert runtime.pending == []
    assert len(runtime.timers) == 5


@pytest.mark.parametrize("wrong", [{"ttft_ns": -1}, {"itl_ns": -1}, {"jitter": 1.5}, {"jitter": -0.1}])
def test_impossible_times_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"negative|between"):
        engine(**wrong)


# Cancel


def test_a_cancelled_stream_says_nothing_more_and_leaves_no_timer() -> None:
    backend, runtime, sink = engine(ttft_ns=0)
    gone = backend.start("gone", request())
    stays = backend.start("stays", request(max_tokens=3))
    runtime.fire()
    gone.cancel()
    stays.set_blocked(True)  # a push source goes on
    runtime.fire_all()
    assert len(sink.said["gone"]) == 1
    assert sink.events("stays")
    assert len(runtime.timers) == 3


def test_a_cancelled_stream_is_let_go_at_its_next_step() -> None:
    backend, runtime, sink = engine()
    for stream in range(10):
        backend.start(stream, request()).cancel()
    runtime.fire_all()
    assert sink.batches == []
    assert len(runtime.timers) == 1


def test_a_closed_engine_stops() -> None:
    backend, runtime, sink = engine()
    backend.start("s", request())
    backend.close()
    runtime.fire_all()
    assert sink.batches == []


# Text


def test_the_limit_is_kept_and_counted() -> None:
    events = answer(max_tokens=10, prompt="one two three")
    assert reasons_of(events) == ["length"]
    assert usage_of(events) == UsageReport(3, 10)
    assert sum(isinstance(event, TextDelta) for event in events) == 10


def test_without_a_limit_it_is_the_default() -> None:
    events = answer()
    assert usage_of(events).output_tokens == DEFAULT_MAX_TOKENS
    assert reasons_of(events) == ["length"]


def test_no_tokens_is_a_limit_too() -> None:
    for n in (1, 2):
        events = answer(max_tokens=0, n=n)
        assert reasons_of(events) == ["length"] * n
        assert usage_of(events).output_tokens == 0


def test_a_text_comes_to_its_end_with_a_sentence() -> None:
    for number in range(30):
        events = answer(prompt=f"question {number}", max_tokens=10_000)
        assert reasons_of(events) == ["stop"]
        assert 200 <= usage_of(events).output_tokens <= 450
        text = text_of(events)
        assert text.rstrip("”").endswith(".")
        assert not text[0].isspace()


def test_the_text_is_the_seeds_and_the_prompts() -> None:
    def text(**fields: Any) -> str:
        return text_of(answer(max_tokens=2_000, **fields))

    assert text(seed=3) == text(seed=3)
    assert len({text(seed=seed) for seed in range(8)}) > 4
    assert len({text(prompt=f"{number}") for number in range(8)}) > 4
    backend, runtime, sink = engine()
    for seed in range(8):
        backend.start(seed, request(seed=seed, max_tokens=2_000))
    runtime.fire_all()
    assert len({sink.text(seed) for seed in range(8)}) > 4


def test_a_prompt_of_any_characters_is_answered() -> None:
    assert text_of(answer(prompt="\ud800 \x00 \N{GRINNING FACE}")) != ""


def test_the_prose_has_more_than_ascii_and_room_for_the_longest_text() -> None:
    text = "".join(token.text for (token,) in TOKENS)
    for sample_text in ("—", "é", "日本", "\N{SEEDLING}", "\u200d"):
        assert sample_text in text
    assert STARTS[-1] + 450 < len(TOKENS)
    assert len(TOKENS) == 2 * TURN
    assert all(token.text.encode() for (token,) in TOKENS)


def test_a_token_is_the_same_event_in_every_stream() -> None:
    backend, runtime, sink = engine()
    for stream in range(40):
        backend.start(stream, request(f"{stream}", max_tokens=3))
    runtime.fire()
    shared = {id(token) for (token,) in TOKENS}
    assert {id(items[0]) for _, items in sink.batches[0][1]} <= shared


def test_choices_differ_and_each_has_the_limit() -> None:
    events = answer(n=4, max_tokens=300)
    texts = {text_of(events, choice) for choice in range(4)}
    assert len(texts) == 4
    counts = [sum(isinstance(e, TextDelta) and e.choice == choice for e in events) for choice in range(4)]
    assert all(200 <= count <= 300 for count in counts)
    assert usage_of(events).output_tokens == sum(counts)
    assert len(set(counts)) > 1


def test_log_probabilities_are_given_where_they_are_wanted() -> None:
    events = answer(logprobs=True, top_logprobs=3, max_tokens=5)
    deltas = [event for event in events if isinstance(event, TextDelta)]
    for delta in deltas:
        assert delta.logprobs is not None
        (scored,) = delta.logprobs
        assert scored.token == delta.text
        assert len(scored.top) == 3
        assert scored.top[0].token == scored.token
        assert [one.logprob for one in scored.top] == sorted((one.logprob for one in scored.top), reverse=True)
        assert scored.logprob < 0
    assert answer(logprobs=True, max_tokens=5) == answer(logprobs=True, max_tokens=5)
    (bare, *_) = [event for event in answer(logprobs=True, max_tokens=5) if isinstance(event, TextDelta)]
    assert bare.logprobs is not None
    assert bare.logprobs[0].top == ()


# Tools


def arguments_of(events: list[Event], choice: int = 0) -> str:
    return "".join(e.arguments for e in events if isinstance(e, ToolCallDelta) and e.choice == choice)


@pytest.mark.parametrize("wish", ["required", "function:get_weather"])
def test_a_tool_is_called_when_it_must_be(wish: str) -> None:
    events = answer(tools=(WEATHER,), tool_choice=wish)
    (start,) = [event for event in events if isinstance(event, ToolCallStart)]
    assert start.name == "get_weather"
    assert json.loads(arguments_of(events)) == {"city": "sample text", "unit": "C"}
    assert sum(isinstance(event, ToolCallDelta) for event in events) > 1
    assert reasons_of(events) == ["tool_calls"]
    assert usage_of(events).output_tokens == sum(isinstance(event, ToolCallDelta) for event in events)


def test_the_named_tool_is_the_one_called() -> None:
    events = answer(tools=(WEATHER, Tool("other")), tool_choice="function:other")
    (start,) = [event for event in events if isinstance(event, ToolCallStart)]
    assert (start.name, arguments_of(events)) == ("other", "{}")


@pytest.mark.parametrize("wish", ["auto", "none"])
def test_a_tool_that_need_not_be_called_is_not(wish: str) -> None:
    events = answer(tools=(WEATHER,), tool_choice=wish)
    assert text_of(events) != ""
    assert arguments_of(events) == ""


def test_every_choice_calls_and_ids_differ_between_choices_and_turns() -> None:
    events = answer(tools=(WEATHER,), tool_choice="required", n=2)
    starts = [event for event in events if isinstance(event, ToolCallStart)]
    assert [start.choice for start in starts] == [0, 1]
    assert arguments_of(events, 0) == arguments_of(events, 1)
    first = request()
    backend, runtime, sink = engine()
    for turns in (1, 3):
        backend.start(turns, request(tools=(WEATHER,), tool_choice="required", messages=first.messages * turns))
    runtime.fire_all()
    ids = {e.call_id for turns in (1, 3) for e in sink.events(turns) if isinstance(e, ToolCallStart)}
    assert len(ids | {start.call_id for start in starts}) >= 3


def test_a_tool_call_keeps_the_limit() -> None:
    events = answer(tools=(WEATHER,), tool_choice="required", max_tokens=2)
    assert reasons_of(events) == ["length"]
    assert usage_of(events).output_tokens == 2


@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"tools": (WEATHER,), "tool_choice": "function:no"}])
def test_a_tool_that_is_not_there_is_an_error(fields: dict[str, Any]) -> None:
    (error,) = [event for event in answer(**fields) if isinstance(event, StreamError)]
    assert (error.kind, error.param) == ("invalid_request", "tool_choice")


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (None, None),
        ({}, None),
        ({"type": "string"}, "sample text"),
        ({"type": "integer", "minimum": 5}, 5),
        ({"type": "number"}, 1),
        ({"type": "boolean"}, True),
        ({"type": ["null", "string"]}, None),
        ({"const": 3}, 3),
        ({"type": "string", "default": "d"}, "d"),
        ({"enum": ["a", "b"]}, "a"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, 1),
        ({"type": "array"}, []),
        ({"type": "array", "items": {"type": "boolean"}}, [True]),
        ({"properties": {"a": {"type": "integer"}}, "required": ["a", "b", 7]}, {"a": 1, "b": None}),
        ({"type": "object", "properties": [], "required": "a", "enum": 3}, {}),
        ({"type": {"a": 1}}, None),
    ],
)
def test_sample_values_follow_the_schema(schema: object, value: object) -> None:
    assert sample(schema) == value


def test_a_deep_schema_is_followed_only_so_far() -> None:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(5_000):
        schema = {"type": "array", "items": schema}
    assert json.dumps(sample(schema)).count("[") == MAX_DEPTH
