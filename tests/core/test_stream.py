"""Whatever a backend says becomes a legal run of events, or the one error."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import any_text, legal_streams, splits, texts

from tokenwire.core.collect import Collector, Result
from tokenwire.core.errors import GrammarError
from tokenwire.core.events import (
    TERMINALS,
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
    UsageReport,
)
from tokenwire.core.states import Grammar, StreamState
from tokenwire.core.stream import Item, Stream
from tokenwire.core.text import has_surrogates

START = StreamStart("s", "m", 5)
ERROR = StreamError(ErrorKind.SERVER, "It broke.")


def new(*, choices: int = 1, stops: Sequence[str] = (), max_tokens: int | None = None) -> Stream:
    return Stream(StreamStart("s", "m", 5, choices=choices), stops=stops, max_tokens=max_tokens)


def say(stream: Stream, *items: Item) -> list[Event]:
    """Say item by item."""
    return [event for item in items for event in stream.accept([item])]


def result(events: Sequence[Event]) -> Result:
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector.result()


def text_of(events: Sequence[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.choice == choice)


def ends(events: Sequence[Event]) -> list[ChoiceEnd]:
    return [event for event in events if isinstance(event, ChoiceEnd)]


# ------------------------------------------------------------------------------------------------ every kind of item

KINDS: list[tuple[Item, Event]] = [
    ("a", TextDelta("a")),
    (b"a", TextDelta("a")),
    (TextDelta("a", 0, 2), TextDelta("a", 0, 2)),
    (ReasoningDelta("a"), ReasoningDelta("a")),
    (RefusalDelta("a"), RefusalDelta("a")),
    (ToolCallStart(0, "c", "f"), ToolCallStart(0, "c", "f")),
    (ProviderData("k", "v"), ProviderData("k", "v")),
    (UsageReport(3, 1), UsageReport(3, 1)),
]


@pytest.mark.parametrize(("item", "event"), KINDS, ids=[type(event).__name__ for _, event in KINDS])
def test_the_start_comes_by_itself(item: Item, event: Event) -> None:
    stream = new()
    assert say(stream, item) == [START, event]
    assert stream.state is StreamState.OPEN
    assert stream.terminal is None


def test_a_start_of_the_backend_keeps_our_id_and_number_of_choices() -> None:
    stream = new(choices=2)
    theirs = StreamStart("x", "other", 9, "bot", choices=7)
    ours = StreamStart("s", "other", 9, "bot", choices=2)
    assert say(stream, theirs) == [ours]
    assert stream.start == ours
    with pytest.raises(GrammarError):
        stream.accept([theirs])


def test_the_end_ends_what_is_open() -> None:
    stream = new(choices=3)
    events = say(
        stream, TextDelta("a", 0), ChoiceEnd(1, FinishReason.LENGTH), ToolCallStart(0, "c", "f", 2), StreamEnd()
    )
    assert ends(events) == [
        ChoiceEnd(1, FinishReason.LENGTH),
        ChoiceEnd(0, FinishReason.STOP),
        ChoiceEnd(2, FinishReason.TOOL_CALLS),
    ]
    assert events[-2:] == [UsageReport(0, 1), StreamEnd()]
    assert stream.terminal == StreamEnd()
    assert not stream.cut_short


def test_an_end_alone_is_an_empty_answer() -> None:
    assert say(new(), StreamEnd()) == [START, ChoiceEnd(), UsageReport(0, 0), StreamEnd()]


@pytest.mark.parametrize("failure", [ERROR, StreamCancelled("client"), StreamTruncated("eof")])
def test_a_failure_ends_the_stream_as_it_is(failure: StreamError | StreamCancelled | StreamTruncated) -> None:
    assert say(new(), failure) == [failure]
    stream = new()
    assert say(stream, "a", failure) == [START, TextDelta("a"), UsageReport(0, 1), failure]
    assert stream.terminal == failure


@pytest.mark.parametrize("terminal", [StreamEnd(), ERROR, StreamCancelled("client"), StreamTruncated("eof")])
def test_what_follows_the_end_is_dropped(terminal: Event) -> None:
    stream = new()
    say(stream, "a", terminal)
    assert say(stream, "b", b"c", TextDelta("d"), StreamEnd(), ERROR, ChoiceEnd(9)) == []
    assert stream.accept([terminal, "x"]) == []
    assert stream.output_tokens == 1


def test_what_follows_the_end_in_the_same_step_is_dropped() -> None:
    stream = new()
    assert stream.accept(["a", StreamEnd(), "b"])[-1] == StreamEnd()


@pytest.mark.parametrize("item", [TextDelta("a", 1), ToolCallDelta(0, "{"), ChoiceEnd(3), ReasoningDelta("a", 2)])
def test_a_backend_that_breaks_the_grammar(item: Item) -> None:
    stream = new()
    say(stream, "a")
    with pytest.raises(GrammarError):
        stream.accept([item])
    assert stream.accept([ERROR])[-1] == ERROR
    assert stream.terminal == ERROR


def test_text_after_the_end_of_its_choice() -> None:
    stream = new(choices=2)
    say(stream, ChoiceEnd(0))
    with pytest.raises(GrammarError):
        stream.accept(["a"])


# ------------------------------------------------------------------------------------------------- text and its tokens


@given(texts, st.data())
def test_bytes_become_text_however_they_are_cut(text: str, data: st.DataObject) -> None:
    events = say(new(), *data.draw(splits(text.encode())), StreamEnd())
    assert text_of(events) == text


def test_a_cut_character_is_replaced_at_the_end() -> None:
    stream = new()
    assert text_of(say(stream, b"a\xe2\x82", ChoiceEnd(), StreamEnd())) == "a\ufffd"
    failing = new()
    assert text_of(say(failing, b"\xf0\x9f", ERROR)) == "\ufffd"


@given(st.lists(any_text))
def test_surrogates_are_joined_or_replaced(pieces: list[str]) -> None:
    events = say(new(), *pieces, StreamEnd())
    whole = "".join(pieces).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert text_of(events) == whole
    assert not any(has_surrogates(event.text) for event in events if isinstance(event, TextDelta))


def test_tokens_of_text_that_is_held_back_are_counted_with_it() -> None:
    stream = new()
    events = say(stream, b"\xe2", b"\x82", b"\xac", TextDelta("a"))
    assert events == [START, TextDelta("€", 0, 3), TextDelta("a")]
    assert stream.output_tokens == 4


def test_usage_never_falls() -> None:
    stream = new()
    events = say(stream, UsageReport(5, 1, 3), UsageReport(4, 2, 1, 7), UsageReport(0, 9), StreamEnd())
    reports = [event for event in events if isinstance(event, UsageReport)]
    assert reports == [UsageReport(5, 1, 3), UsageReport(5, 2, 3, 7), UsageReport(5, 9, 3, 7)]
    assert stream.usage == reports[-1]


def test_usage_may_come_after_the_last_choice() -> None:
    events = say(new(), "a", ChoiceEnd(), UsageReport(5, 5), StreamEnd())
    assert events[-2:] == [UsageReport(5, 5), StreamEnd()]


# --------------------------------------------------------------------------------------- stop strings and token limits


@given(st.sampled_from(["ab<end>cd", "<en<end>", "no stop", "<end", "<end>", "é<end>😀"]), st.data())
def test_a_stop_string_ends_its_choice_wherever_it_is_cut(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    said = [text[begin:end] for begin, end in pairwise(cuts)]
    stream = new(stops=("<end>", "never"))
    events = say(stream, *said, StreamEnd())
    before, found, _ = text.partition("<end>")
    assert text_of(events) == before
    expected = ChoiceEnd(0, FinishReason.STOP_SEQUENCE, "<end>") if found else ChoiceEnd()
    assert ends(events) == [expected]
    assert events[-1] == StreamEnd()
    assert stream.cut_short is bool(found)


def test_text_that_is_held_back_comes_before_the_end() -> None:
    for last in (ChoiceEnd(), StreamEnd(), ERROR, StreamCancelled("client")):
        stream = new(stops=("<end>",))
        assert text_of(say(stream, "a<e", "n")) == "a"
        assert text_of(say(stream, last)) == "<en"
        assert stream.output_tokens == 2


def test_a_stop_string_of_one_choice_leaves_the_other() -> None:
    stream = new(choices=2, stops=("x",))
    events = say(stream, TextDelta("ax", 0), TextDelta("b", 1), TextDelta("late", 0), ChoiceEnd(0), TextDelta("c", 1))
    assert (text_of(events, 0), text_of(events, 1)) == ("a", "bc")
    assert not stream.cut_short
    events += say(stream, TextDelta("x", 1))
    assert (stream.terminal, stream.cut_short) == (StreamEnd(), True)
    assert result(events).choices[1].stop_sequence == "x"


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_token_limit_ends_its_choice(limit: int) -> None:
    stream = new(max_tokens=limit)
    events = say(stream, *["a"] * 4, StreamEnd())
    assert text_of(events) == "a" * min(limit, 4)
    assert ends(events) == [ChoiceEnd(0, FinishReason.LENGTH if limit <= 4 else FinishReason.STOP)]
    assert stream.cut_short is (limit <= 4)
    assert stream.output_tokens == min(limit, 4)


def test_every_kind_of_token_counts_against_the_limit() -> None:
    stream = new(max_tokens=3)
    events = say(stream, ReasoningDelta("a"), ToolCallStart(0, "c", "f"), ToolCallDelta(0, "{}"), b"b", "late")
    assert ends(events) == [ChoiceEnd(0, FinishReason.LENGTH)]
    assert text_of(events) == "b"


def test_tokens_that_are_held_back_count_against_the_limit() -> None:
    stream = new(stops=("<end>",), max_tokens=3)
    events = say(stream, "<", "e", "n", "d", ">")
    assert text_of(events) == "<en"
    assert ends(events) == [ChoiceEnd(0, FinishReason.LENGTH)]


def test_logprobs_stay_with_their_text() -> None:
    first, second = TokenLogprob("<", -1.0), TokenLogprob("b", -2.0)
    stream = new(stops=("<end>",))
    events = say(stream, TextDelta("<", 0, 1, (first,)), TextDelta("b", 0, 1, (second,)), StreamEnd())
    assert result(events).choices[0].logprobs == (first, second)
    assert text_of(events) == "<b"


# --------------------------------------------------------------------------------------------------- in general


@given(legal_streams(choices=2, provider_data=True, failures=True, usage=False), st.data())
def test_a_legal_stream_comes_through(events: list[Event], data: st.DataObject) -> None:
    said = events if data.draw(st.booleans()) else events[1:]
    stream = new(choices=2)
    out: list[Event] = []
    while said:
        count = data.draw(st.integers(1, 3))
        out += stream.accept(said[:count])
        said = said[count:]
    assert out[-1] == events[-1]
    whole = result(out).choices
    assert [choice.text for choice in whole] == [text_of(events, number) for number in range(len(whole))]
    assert stream.terminal == events[-1]


ITEMS: st.SearchStrategy[Item] = st.one_of(
    any_text,
    st.binary(max_size=4),
    st.builds(TextDelta, any_text, st.integers(0, 2)),
    st.builds(ReasoningDelta, any_text, st.integers(0, 2)),
    st.builds(ToolCallStart, st.integers(0, 1), st.just("c"), st.just("f"), st.integers(0, 1)),
    st.builds(ToolCallDelta, st.integers(0, 1), any_text, st.integers(0, 1)),
    st.builds(UsageReport, st.integers(0, 9), st.integers(0, 9)),
    st.builds(ChoiceEnd, st.integers(0, 2)),
    st.just(START),
    st.just(StreamEnd()),
    st.just(ERROR),
)


@given(
    st.integers(1, 2),
    st.lists(ITEMS, max_size=15),
    st.lists(st.text(max_size=2).filter(bool), max_size=2),
    st.none() | st.integers(1, 5),
)
def test_whatever_is_said_the_grammar_holds(
    choices: int, items: list[Item], stops: list[str], max_tokens: int | None
) -> None:
    stream = new(choices=choices, stops=stops, max_tokens=max_tokens)
    grammar = Grammar()
    for item in items:
        try:
            events = stream.accept([item])
        except GrammarError:
            events = stream.accept([ERROR])[-1:]
            assert events == [ERROR]
        for event in events:
            grammar.apply(event)
    assert grammar.ended is (stream.terminal is not None)
    assert grammar.state is stream.state


@given(st.lists(any_text), st.booleans())
def test_the_fast_path_lets_out_what_the_slow_path_does(pieces: list[str], logprobs: bool) -> None:
    extra = (TokenLogprob("a", -1.0),) if logprobs else None
    items = [TextDelta(piece, 0, 2, extra) for piece in pieces]
    fast, slow = new(), new(max_tokens=10**9)  # a limit shuts the fast path
    told, expected = say(fast, *items, StreamEnd()), say(slow, *items, StreamEnd())
    assert told == expected
    assert fast.output_tokens == slow.output_tokens == 2 * len(pieces)


def test_the_fast_path_copies_nothing() -> None:
    stream = new()
    say(stream, "a")
    items = [TextDelta("b")]
    assert stream.accept(items) is items
    assert not any(isinstance(event, TERMINALS) for event in items)


@pytest.mark.parametrize("kind", [ReasoningDelta, RefusalDelta])
def test_surrogate_pairs_are_joined_in_every_kind_of_text(kind: type[ReasoningDelta | RefusalDelta]) -> None:
    heard = _run_all([kind("a\ud83d"), kind("\ude00b"), kind("\udc00"), kind("c\ud83d"), StreamEnd()])
    assert "".join(event.text for event in heard if isinstance(event, kind)) == "a\U0001f600b\ufffdc\ufffd"


def test_surrogate_pairs_are_joined_in_the_arguments_of_their_own_call() -> None:
    calls: list[Item] = [ToolCallStart(0, "a", "f"), ToolCallStart(1, "b", "g")]
    halves: list[Item] = [
        ToolCallDelta(0, "\ud83d"),
        ToolCallDelta(1, "\ude00"),
        ToolCallDelta(0, "\ude00"),
        StreamEnd(),
    ]
    heard = [event for event in _run_all(calls + halves) if isinstance(event, ToolCallDelta)]
    assert "".join(event.arguments for event in heard if event.call_index == 0) == "\U0001f600"
    assert "".join(event.arguments for event in heard if event.call_index == 1) == "\ufffd"


def test_what_is_no_item_breaks_the_grammar() -> None:
    stream = Stream(StreamStart("s", "m", 0))
    with pytest.raises(GrammarError, match="NoneType"):
        stream.accept(cast("list[Item]", [None]))  # what an untyped backend may do


def _run_all(items: list[Item]) -> list[Event]:
    stream = Stream(StreamStart("s", "m", 0))
    return [event for item in items for event in stream.accept([item])]
