"""Events folded into one result."""

from __future__ import annotations

import pytest
from hypothesis import given
from tests.strategies import legal_streams

from tokenwire.core.collect import ChoiceResult, Collector, Result
from tokenwire.core.errors import GrammarError
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    Event,
    FinishReason,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamEnd,
    StreamError,
    StreamStart,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.request import ToolCall

START = StreamStart("s", "m", 5, choices=2)
A, B = TokenLogprob("a", -1.0), TokenLogprob("b", -2.0)

EVENTS: list[Event] = [
    START,
    ReasoningDelta("hm"),
    TextDelta("a", 0, 1, (A,)),
    ToolCallStart(1, "c1", "g"),
    ToolCallStart(0, "c0", "f"),
    ToolCallDelta(1, "["),
    RefusalDelta("no", 1),
    ToolCallDelta(0, "{}"),
    TextDelta("b", 0, 1, (B,)),
    ToolCallDelta(1, "]"),
    ProviderData("sig", "x"),
    UsageReport(1, 1),
    ChoiceEnd(1, FinishReason.REFUSAL),
    ChoiceEnd(0, FinishReason.STOP_SEQUENCE, "\n"),
    UsageReport(3, 9),
    StreamEnd(),
]


def collect(events: list[Event]) -> Collector:
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector


def test_a_whole_stream() -> None:
    calls = (ToolCall("c0", "f", "{}"), ToolCall("c1", "g", "[]"))
    data = (ProviderData("sig", "x"),)
    first = ChoiceResult(0, "ab", "hm", "", calls, (A, B), FinishReason.STOP_SEQUENCE, "\n", data)
    second = ChoiceResult(1, refusal="no", reason=FinishReason.REFUSAL)
    assert collect(EVENTS).result() == Result(START, (first, second), UsageReport(3, 9), StreamEnd())


@pytest.mark.parametrize("count", range(len(EVENTS) + 1))
def test_a_part_of_a_stream(count: int) -> None:
    collector = collect(EVENTS[:count])
    result = collector.result()
    assert collector.ended is (count == len(EVENTS))
    assert (result.start is None) is (count == 0)
    assert len(result.choices) == (2 if count else 0)
    assert (result.terminal is None) is (count < len(EVENTS))


def test_a_failure_before_the_start() -> None:
    error = StreamError(ErrorKind.SERVER, "It broke.")
    assert collect([error]).result() == Result(None, (), None, error)


def test_choices_that_were_not_announced() -> None:
    events: list[Event] = [StreamStart("s", "m", 0, choices=0), TextDelta("b", 3), TextDelta("a", 1)]
    assert [(choice.index, choice.text) for choice in collect(events).result().choices] == [(1, "a"), (3, "b")]


def test_an_illegal_event_leaves_the_collector_as_it_was() -> None:
    collector = collect(EVENTS[:5])
    before = collector.result()
    for event in (START, TextDelta("x", 2), ToolCallDelta(5, "x"), StreamEnd()):
        with pytest.raises(GrammarError):
            collector.receive(event)
        assert collector.result() == before


@given(legal_streams(choices=2, provider_data=True))
def test_all_that_was_said_is_there(events: list[Event]) -> None:
    result = collect(events).result()
    for choice in result.choices:
        of_choice = [event for event in events if getattr(event, "choice", None) == choice.index]
        assert choice.text == "".join(event.text for event in of_choice if isinstance(event, TextDelta))
        assert choice.reasoning == "".join(event.text for event in of_choice if isinstance(event, ReasoningDelta))
        assert choice.refusal == "".join(event.text for event in of_choice if isinstance(event, RefusalDelta))
        arguments = "".join(event.arguments for event in of_choice if isinstance(event, ToolCallDelta))
        assert sorted("".join(call.arguments for call in choice.tool_calls)) == sorted(arguments)
        assert [choice.reason] == [event.reason for event in of_choice if isinstance(event, ChoiceEnd)]
    assert result.terminal == events[-1]
