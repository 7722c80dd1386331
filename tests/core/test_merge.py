"""The merge law: merging any run, in any pieces, changes nothing that a reader accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import legal_streams

from tokenwire.core.collect import Collector, Result
from tokenwire.core.events import (
    ChoiceEnd,
    Event,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamEnd,
    StreamStart,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.merge import MergeBuffer, may_merge, merge_run

START = StreamStart("s", "m", 0)
STREAMS = legal_streams(choices=2, calls=3, provider_data=True, failures=True)
NOT_MERGED = (StreamStart, ToolCallStart, ProviderData, ChoiceEnd, StreamEnd)


def result(events: Sequence[Event]) -> Result:
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector.result()


def tokens(events: Sequence[Event]) -> dict[tuple[int, type], int]:
    counts: dict[tuple[int, type], int] = {}
    for event in events:
        if isinstance(event, TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta):
            key = event.choice, type(event)
            counts[key] = counts.get(key, 0) + event.token_count
    return counts


@st.composite
def cut(draw: st.DrawFn, streams: st.SearchStrategy[list[Event]]) -> tuple[list[Event], list[list[Event]]]:
    """Draw a stream, and the runs that it is cut into."""
    events = draw(streams)
    cuts = sorted(draw(st.sets(st.integers(0, len(events)), max_size=6)) | {0, len(events)})
    return events, [events[begin:end] for begin, end in pairwise(cuts)]


@given(cut(STREAMS), st.booleans())
def test_what_may_not_merge_does_not(drawn: tuple[list[Event], list[list[Event]]], ordered: bool) -> None:
    for run in drawn[1]:
        assert may_merge(run) or merge_run(run, ordered=ordered) == run


def test_a_short_answer_may_not_merge_and_two_tokens_may() -> None:
    answer = (START, TextDelta("a"), UsageReport(1, 1), ChoiceEnd(), StreamEnd())
    assert not may_merge(answer)
    assert may_merge((TextDelta("a"), TextDelta("b")))


@given(cut(STREAMS), st.booleans())
def test_a_reader_accumulates_the_same(drawn: tuple[list[Event], list[list[Event]]], ordered: bool) -> None:
    events, runs = drawn
    merged = [event for run in runs for event in merge_run(run, ordered=ordered)]
    assert result(merged) == result(events)
    assert tokens(merged) == tokens(events)
    assert len(merged) <= len(events)
    kept = [event for event in merged if isinstance(event, NOT_MERGED)]
    assert kept == [event for event in events if isinstance(event, NOT_MERGED)]


@given(cut(STREAMS), st.booleans())
def test_merging_is_associative(drawn: tuple[list[Event], list[list[Event]]], ordered: bool) -> None:
    events, runs = drawn
    piecewise = [event for run in runs for event in merge_run(run, ordered=ordered)]
    once = merge_run(events, ordered=ordered)
    assert merge_run(piecewise, ordered=ordered) == once
    assert merge_run(once, ordered=ordered) == once


@given(STREAMS)
def test_ordered_merging_moves_nothing(events: list[Event]) -> None:
    buffer = MergeBuffer(ordered=True)
    for number, event in enumerate(events, 1):
        buffer.add(event, number)
    assert len(buffer) <= len(events)
    numbers = [number for _, number in buffer.drain()]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == len(events)
    assert not buffer
    assert buffer.drain() == []


@given(STREAMS, st.data())
def test_what_is_sealed_stays_as_it_is(events: list[Event], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(events)))
    buffer = MergeBuffer()
    for event in events[:at]:
        buffer.add(event)
    buffer.seal()
    for event in events[at:]:
        buffer.add(event)
    assert [event for event, _ in buffer.drain()] == merge_run(events[:at]) + merge_run(events[at:])


def pending(*events: Event, ordered: bool = False) -> int:
    buffer = MergeBuffer(ordered=ordered)
    for event in events:
        buffer.add(event)
    bytes_before = buffer.pending_bytes
    buffer.drain()
    assert buffer.pending_bytes == 0
    return bytes_before


@given(st.lists(st.text(max_size=4), min_size=1))
def test_text_that_merges_weighs_its_bytes(texts: list[str]) -> None:
    whole = len("".join(texts).encode("utf-8", "surrogatepass"))
    assert pending(*map(TextDelta, texts)) == pending(TextDelta("")) + whole


def test_everything_that_waits_has_a_weight() -> None:
    alone = pending(TextDelta(""))
    assert alone > 0
    assert pending() == 0
    assert pending(TextDelta(""), TextDelta("", 1)) == 2 * alone
    assert pending(*[ProviderData("k", "v" * 1000)] * 3) >= 3000
    assert pending(TextDelta("", 0, 1, (TokenLogprob("a", -1.0),))) > alone
    assert pending(TextDelta(""), TextDelta("", 1), TextDelta(""), ordered=True) == 3 * alone


def logprob(token: str) -> TokenLogprob:
    return TokenLogprob(token, -1.0)


MERGES: list[tuple[list[Event], list[Event]]] = [
    ([TextDelta("a"), TextDelta("b", 0, 2)], [TextDelta("ab", 0, 3)]),
    ([TextDelta("a"), TextDelta("b", 1), TextDelta("c")], [TextDelta("ac", 0, 2), TextDelta("b", 1)]),
    ([TextDelta("a"), ReasoningDelta("b"), TextDelta("c")], [TextDelta("a"), ReasoningDelta("b"), TextDelta("c")]),
    ([ReasoningDelta("a"), ReasoningDelta("b")], [ReasoningDelta("ab", 0, 2)]),
    ([RefusalDelta("a"), RefusalDelta("b")], [RefusalDelta("ab", 0, 2)]),
    (
        [ToolCallDelta(0, "{"), ToolCallDelta(1, "["), ToolCallDelta(0, "}")],
        [ToolCallDelta(0, "{}", 0, 2), ToolCallDelta(1, "[")],
    ),
    ([ToolCallDelta(0, "{", 0), ToolCallDelta(0, "[", 1)], [ToolCallDelta(0, "{", 0), ToolCallDelta(0, "[", 1)]),
    (
        [TextDelta("a", 0, 1, (logprob("a"),)), TextDelta("b"), TextDelta("c", 0, 1, (logprob("c"),))],
        [TextDelta("abc", 0, 3, (logprob("a"), logprob("c")))],
    ),
    ([UsageReport(1, 1), TextDelta("a"), UsageReport(1, 2)], [UsageReport(1, 2), TextDelta("a")]),
    ([ChoiceEnd(0), ChoiceEnd(1)], [ChoiceEnd(0), ChoiceEnd(1)]),
    ([ProviderData("k", "a"), ProviderData("k", "b")], [ProviderData("k", "a"), ProviderData("k", "b")]),
    (
        [TextDelta("a"), ProviderData("k", "b"), TextDelta("c")],
        [TextDelta("a"), ProviderData("k", "b"), TextDelta("c")],
    ),
    ([], []),
]


@pytest.mark.parametrize(("run", "merged"), MERGES)
def test_what_merges(run: list[Event], merged: list[Event]) -> None:
    assert merge_run(run) == merged


def test_an_event_alone_is_itself() -> None:
    event = TextDelta("a")
    assert merge_run([event])[0] is event


def test_ordered_merging_joins_neighbours_only() -> None:
    run: list[Event] = [TextDelta("a"), TextDelta("b"), TextDelta("c", 1), TextDelta("d")]
    assert merge_run(run, ordered=True) == [TextDelta("ab", 0, 2), TextDelta("c", 1), TextDelta("d")]


def test_many_pieces_of_one_delta() -> None:
    assert merge_run([TextDelta("ab")] * 1000) == [TextDelta("ab" * 1000, 0, 1000)]
