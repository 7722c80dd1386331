"""Hypothesis strategies that several test files draw from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import strategies as st

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

__all__ = ["any_text", "legal_streams", "splits", "texts", "token_logprobs"]

AWKWARD = '\u2028\u2029\x85\x0b\x1c\x7f\ufeff\ufffd"\\\r\n\t\0é€𝄞[]{}:'

texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(AWKWARD)), max_size=12)
"""Text without surrogates, with more than its share of what breaks framings."""

any_text = st.text(
    st.one_of(st.characters(), st.sampled_from(AWKWARD), st.sampled_from("\ud83d\ude00\ud800a")), max_size=12
)
"""Text in which surrogates may stand, paired and alone."""

names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)
counts = st.integers(0, 2**40)


def _own_bytes(token: str) -> st.SearchStrategy[bytes | None]:
    return st.none() | st.binary(max_size=4).filter(lambda data: data != token.encode())


@st.composite
def token_logprobs(draw: st.DrawFn) -> TokenLogprob:
    """Draw the log probability of a token with up to two alternatives."""
    token, probability = draw(texts), st.floats(-100, 0)
    top = tuple(
        TopLogprob(other, draw(probability), draw(_own_bytes(other))) for other in draw(st.lists(texts, max_size=2))
    )
    return TokenLogprob(token, draw(probability), draw(_own_bytes(token)), top)


@st.composite
def _text_deltas(draw: st.DrawFn, choice: int, *, logprobs: bool) -> Event:
    if logprobs and draw(st.booleans()):
        tokens = tuple(draw(st.lists(token_logprobs(), min_size=1, max_size=2)))
        return TextDelta(draw(texts), choice, len(tokens), tokens)
    return TextDelta(draw(texts), choice)


@st.composite
def _choice_events(
    draw: st.DrawFn, choice: int, *, calls: int, reasoning: bool, refusals: bool, logprobs: bool, provider_data: bool
) -> list[Event]:
    """Draw what one choice says: deltas in any order, up to `calls` tool calls side by side, and its end."""
    events: list[Event] = []
    started = 0
    kinds = ["text", "text"]
    kinds += ["reasoning"] * reasoning + ["refusal"] * refusals + ["data"] * provider_data + ["call"] * bool(calls) * 3
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=8)):
        if kind == "text":
            events.append(draw(_text_deltas(choice, logprobs=logprobs)))
        elif kind == "reasoning":
            events.append(ReasoningDelta(draw(texts), choice))
        elif kind == "refusal":
            events.append(RefusalDelta(draw(texts), choice))
        elif kind == "data":
            events.append(ProviderData(draw(names), draw(texts), choice))
        elif started < calls and (not started or draw(st.booleans())):
            events.append(ToolCallStart(started, f"call_{choice}_{started}", draw(names), choice))
            started += 1
        else:
            events.append(ToolCallDelta(draw(st.integers(0, started - 1)), draw(texts), choice))
    reason = draw(st.sampled_from(FinishReason))
    stop = draw(texts.filter(bool)) if reason is FinishReason.STOP_SEQUENCE else None
    return [*events, ChoiceEnd(choice, reason, stop)]


_failures: st.SearchStrategy[Event] = st.one_of(
    st.builds(StreamError, st.sampled_from(ErrorKind), texts.filter(bool), st.none() | names, st.none() | names),
    st.builds(StreamCancelled, st.sampled_from(["client", "operator", "server"])),
    st.builds(StreamTruncated, texts),
)


@st.composite
def legal_streams(
    draw: st.DrawFn,
    choices: int = 1,
    *,
    calls: int = 2,
    reasoning: bool = True,
    refusals: bool = True,
    logprobs: bool = True,
    provider_data: bool = False,
    usage: bool = True,
    failures: bool = False,
) -> list[Event]:
    """Draw a stream that passes the Grammar, from its StreamStart to its terminal event.

    Args:
        draw: given by Hypothesis.
        choices: how many choices; their events are interleaved.
        calls: the most tool calls a choice has; their fragments are interleaved too.
        reasoning: whether ReasoningDelta comes.
        refusals: whether RefusalDelta comes.
        logprobs: whether some text has log probabilities.
        provider_data: whether ProviderData comes.
        usage: whether a UsageReport comes before the end, as `Stream` sees to.
        failures: whether the stream may break off and end with another terminal event than StreamEnd.
    """
    lanes = [
        draw(
            _choice_events(
                choice,
                calls=calls,
                reasoning=reasoning,
                refusals=refusals,
                logprobs=logprobs,
                provider_data=provider_data,
            )
        )
        for choice in range(choices)
    ]
    order = draw(st.permutations([number for number, lane in enumerate(lanes) for _ in lane]))
    said = _interleave(lanes, order)
    start = StreamStart(draw(names), draw(texts), draw(counts), choices=choices)
    if failures and draw(st.booleans()):
        kept = draw(st.integers(0, len(said)))
        return [start, *said[:kept], draw(_failures)]
    report = [draw(st.builds(UsageReport, counts, counts, counts, counts, counts))] if usage else []
    return [start, *said, *report, StreamEnd()]


def _interleave(lanes: list[list[Event]], order: list[int]) -> list[Event]:
    rests: list[Iterator[Event]] = [iter(lane) for lane in lanes]
    return [next(rests[number]) for number in order]


@st.composite
def splits(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Cut bytes anywhere into pieces, none of them empty."""
    cuts = sorted(draw(st.sets(st.integers(1, max(len(data) - 1, 1)), max_size=8)))
    edges = [0, *cuts, len(data)]
    return [piece for begin, end in pairwise(edges) if (piece := data[begin:end])]
