"""Scripted traces against formulas written down again, one line each, over plain lists of what happened when."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.core.definitions import DEFINITIONS, by_tool
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    Event,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamEnd,
    StreamError,
    StreamStart,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.gaps import RUN
from tokenwire.core.histogram import Histogram
from tokenwire.core.latency import Accountant, Trace
from tokenwire.core.ledger import SEMCONV_BOUNDS, Ledger, Targets

MS = 1_000_000
BEGUN = 1_000 * MS
HOUR = 3_600_000 * MS

Script = Sequence[tuple[int, Sequence[Event]]]
"""What arrived, and how long after the begin."""

START = StreamStart("s", "tiny-1", 1_700_000_000)
END: list[Event] = [ChoiceEnd(), StreamEnd()]
ERROR = StreamError(ErrorKind.SERVER, "It broke.")


def text(tokens: int = 1) -> TextDelta:
    return TextDelta("word", token_count=tokens)


def usage(tokens: int) -> UsageReport:
    return UsageReport(7, tokens)


def run(script: Script, end: str = "finished", ended_at: int | None = None, ledger: Ledger | None = None) -> Trace:
    """Run a script, events of one token by the short way, and close the trace."""
    trace = Trace(BEGUN, ledger)
    at = 0
    for at, events in script:
        if len(events) == 1 and events[0] == text():
            trace.receive_token(BEGUN + at)
        else:
            trace.receive(events, BEGUN + at)
    trace.close(end, BEGUN + (at if ended_at is None else ended_at))
    return trace


# ------------------------------------------------------------------------------------------- the same, from plain lists


class Seen(NamedTuple):
    """A script as lists: times since the begin, in nanoseconds."""

    tokens: list[tuple[int, int]]
    """Token events: when, and how many tokens."""
    answers: list[int]
    """Those that are not reasoning."""
    chunks: list[int]
    """All that belongs to a choice."""
    events: list[int]
    """All but the terminal event."""
    n: int
    """Output tokens."""
    end: int
    """When it ended."""
    ended: str
    """How."""

    @property
    def times(self) -> list[int]:
        return [at for at, _ in self.tokens]

    @property
    def gaps(self) -> list[int]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def shares(self) -> list[float]:
        """Gaps shared among the tokens of their events; what comes with no token waits for the next."""
        shares: list[float] = []
        waiting = 0
        for gap, (_, tokens) in zip(self.gaps, self.tokens[1:], strict=True):
            waiting += gap
            if tokens:
                shares += [waiting / tokens] * tokens
                waiting = 0
        return shares


def seen(script: Script, end: str = "finished", ended_at: int | None = None) -> Seen:
    flat = [(at, event) for at, events in script for event in events]
    says = [
        (at, event, 0 if isinstance(event, ToolCallStart) else getattr(event, "token_count", 0))
        for at, event in flat
        if getattr(event, "text", "") or getattr(event, "arguments", "") or isinstance(event, ToolCallStart)
    ]
    reports = [event.output_tokens for _, event in flat if isinstance(event, UsageReport)]
    counted = sum(tokens for _, _, tokens in says)
    terminals = [at for at, event in flat if isinstance(event, StreamEnd | StreamError)]
    last = script[-1][0] if script else 0
    return Seen(
        tokens=[(at, tokens) for at, _, tokens in says],
        answers=[at for at, event, _ in says if not isinstance(event, ReasoningDelta)],
        chunks=[at for at, event in flat if not isinstance(event, UsageReport | StreamEnd | StreamError)],
        events=[at for at, event in flat if not isinstance(event, StreamEnd | StreamError)],
        n=(reports[-1] if reports and end == "finished" else 0) or counted,
        end=terminals[0] if terminals else last if ended_at is None else ended_at,
        ended=end,
    )


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def over(span: float, parts: int) -> float | None:
    return span / parts if parts > 0 else None


FORMULAS: dict[tuple[str, str], Callable[[Seen], float | None]] = {
    ("tokenwire", "ttft_ns"): lambda s: s.times[0] if s.times else None,
    ("tokenwire", "ttfa_ns"): lambda s: s.answers[0] if s.answers else None,
    ("tokenwire", "second_token_ns"): lambda s: s.times[1] - s.times[0] if s.times[1:] else None,
    ("tokenwire", "itl_event_ns"): lambda s: mean(s.gaps),
    ("tokenwire", "itl_event_sd_ns"): lambda s: statistics.pstdev(s.gaps) if s.gaps else None,
    ("tokenwire", "itl_token_ns"): lambda s: mean(s.shares),
    ("tokenwire", "itl_token_sd_ns"): lambda s: statistics.pstdev(s.shares) if s.shares else None,
    ("tokenwire", "longest_stall_ns"): lambda s: max(s.gaps) if s.gaps else None,
    ("tokenwire", "tpot_ns"): lambda s: over(s.times[-1] - s.times[0], s.n - s.tokens[0][1]) if s.gaps else None,
    ("tokenwire", "tokens_per_event"): lambda s: over(s.n, len(s.times)),
    ("tokenwire", "e2e_ns"): lambda s: s.end,
    ("vllm", "ttft_ns"): lambda s: s.chunks[0] if s.chunks else None,
    ("vllm", "itl_ns"): lambda s: over(s.chunks[-1] - s.chunks[0], len(s.chunks) - 1) if s.chunks else None,
    ("vllm", "tpot_ns"): lambda s: (s.chunks[-1] - s.chunks[0]) / (s.n - 1) if s.chunks and s.n > 1 else 0.0,
    ("vllm", "e2el_ns"): lambda s: s.chunks[-1] if s.chunks else None,
    ("sglang", "ttft_ns"): lambda s: s.answers[0] if s.answers else 0.0,
    ("sglang", "itl_ns"): lambda s: over(s.answers[-1] - s.answers[0], len(s.answers) - 1) if s.answers else None,
    ("sglang", "tpot_ns"): lambda s: over(s.events[-1] - (s.answers or [0])[0], s.n - 1) if s.events else None,
    ("sglang", "e2e_ns"): lambda s: s.events[-1] if s.events else None,
    ("aiperf", "ttft_ns"): lambda s: s.times[0] if s.times else None,
    ("aiperf", "ttst_ns"): lambda s: s.times[1] - s.times[0] if s.times[1:] else None,
    ("aiperf", "ttfo_ns"): lambda s: s.answers[0] if s.answers else None,
    ("aiperf", "itl_ns"): lambda s: over(s.times[-1] - s.times[0], s.n - 1) if s.times else None,
    ("aiperf", "itl_per_chunk_usage_ns"): lambda s: over(sum(s.gaps), s.n - s.tokens[0][1]) if s.times else None,
    ("aiperf", "icl_ns"): lambda s: mean(s.gaps),
    ("aiperf", "tokens_per_second_per_user"): lambda s: (s.n - 1) / sum(s.gaps) * 1e9 if sum(s.gaps) and s.n > 1 else None,
    ("aiperf", "e2e_ns"): lambda s: s.times[-1] if s.times else None,
    ("guidellm", "ttft_ns"): lambda s: s.times[0] if s.times else None,
    ("guidellm", "ttfot_ns"): lambda s: s.answers[0] if s.answers else None,
    ("guidellm", "itl_ns"): lambda s: over(s.times[-1] - s.times[0], s.n - 1) if s.times else None,
    ("guidellm", "tpot_ns"): lambda s: over(s.times[-1], s.n) if s.times else None,
    ("guidellm", "e2e_ns"): lambda s: s.times[-1] if s.times else None,
    ("llmperf", "ttft_ns"): lambda s: s.answers[0] if s.answers else None,
    ("llmperf", "itl_ns"): lambda s: s.answers[-1] / len(s.chunks) if s.answers else None,
    ("llmperf", "e2e_ns"): lambda s: s.end,
    ("inference_benchmarker", "ttft_ns"): lambda s: s.times[0] if s.times else None,
    ("inference_benchmarker", "itl_ns"): (
        lambda s: None if not s.times else sum(s.gaps) / (s.n - 1) if s.gaps and s.n > 1 else 0.0
    ),
    ("inference_benchmarker", "e2e_ns"): lambda s: s.chunks[-1] if s.chunks else None,
    ("mlperf", "ttft_ns"): lambda s: s.times[0] if s.times else None,
    ("mlperf", "tpot_ns"): lambda s: over(sum(s.gaps), s.n - 1) if s.times else None,
    ("mlperf", "e2e_ns"): lambda s: s.times[-1] if s.times else None,
    ("llama_bench", "tokens_per_second"): lambda s: (s.n - 1) / sum(s.gaps) * 1e9 if sum(s.gaps) and s.n > 1 else None,
    ("vllm_server", "time_to_first_token_ns"): lambda s: s.times[0] if s.times else None,
    ("vllm_server", "inter_token_latency_ns"): lambda s: mean(s.gaps),
    ("vllm_server", "request_time_per_output_token_ns"): lambda s: over(sum(s.gaps), s.n - 1) if s.times else None,
    ("vllm_server", "e2e_request_latency_ns"): lambda s: s.times[-1] if s.times else None,
    ("opentelemetry", "server.time_to_first_token_ns"): (
        lambda s: s.times[0] if s.times and s.ended == "finished" else None
    ),
    ("opentelemetry", "server.time_per_output_token_ns"): (
        lambda s: over(sum(s.gaps), s.n - s.tokens[0][1]) if s.gaps and s.ended == "finished" else None
    ),
    ("opentelemetry", "server.request.duration_ns"): lambda s: s.end,
    ("opentelemetry", "client.operation.time_to_first_chunk_ns"): lambda s: s.chunks[0] if s.chunks else None,
    ("opentelemetry", "client.operation.time_per_output_chunk_ns"): (
        lambda s: over(s.chunks[-1] - s.chunks[0], len(s.chunks) - 1) if s.chunks else None
    ),
}  # fmt: skip
ESTIMATED = {"itl_p50_ns", "itl_p99_ns", "itl_p99_over_p50"}
NOT_IN_EVENTS = {"queue_ns", "ttfb_ns", "request_queue_time_ns"}


def check(script: Script, end: str = "finished", ended_at: int | None = None) -> Trace:
    """Compare every definition with its formula."""
    trace, facts = run(script, end, ended_at), seen(script, end, ended_at)
    for tool, metrics in by_tool(trace).items():
        for metric, value in metrics.items():
            if metric in ESTIMATED | NOT_IN_EVENTS:
                continue
            expected = FORMULAS[tool, metric](facts)
            where = f"{tool} {metric}: {value}, not {expected}"
            assert (value is None) is (expected is None), where
            if value is not None and expected is not None:
                # A shared gap is cut into whole nanoseconds; all else is exact as far as a float can say it.
                assert abs(value - expected) <= max(1e-3, 1e-12 * abs(expected), 1.0 * ("token_sd" in metric)), where
    return trace


def test_every_definition_has_a_formula_here() -> None:
    names = {(one.tool, one.metric) for one in DEFINITIONS}
    assert len(names) == len(DEFINITIONS)
    assert names - FORMULAS.keys() == {(tool, name) for tool, name in names if name in ESTIMATED | NOT_IN_EVENTS}
    assert not FORMULAS.keys() - names
    assert all(one.says for one in DEFINITIONS)


# ---------------------------------------------------------------------------------------------------- scripted traces

SCRIPTS: dict[str, Script] = {
    "role chunk first": [(40 * MS, [START]), (200 * MS, [text()]), (220 * MS, [text()]), (245 * MS, [text(), *END])],
    "role chunk with the first token": [(200 * MS, [START, text()]), (221 * MS, [text()]), (222 * MS, END)],
    "k tokens in the first event": [(200 * MS, [text(4)]), (230 * MS, [text()]), (261 * MS, [text(2)]), (270 * MS, END)],
    "speculative": [(100 * MS, [text(3)]), (150 * MS, [text(5)]), (201 * MS, [text(4)]), (250 * MS, [text(3), *END])],
    "one token": [(50 * MS, [START, text()]), (60 * MS, END)],
    "no token": [(50 * MS, [START]), (60 * MS, END)],
    "nothing": [],
    "zero gaps": [(10 * MS, [text()]), (10 * MS, [text()]), (10 * MS, [text(), text()]), (30 * MS, [text(), *END])],
    "only zero gaps": [(10 * MS, [text(), text(), text(), *END])],
    "reasoning only": [(30 * MS, [ReasoningDelta("hm")]), (55 * MS, [ReasoningDelta("oh")]), (60 * MS, END)],
    "reasoning first": [
        (30 * MS, [ReasoningDelta("hm")]), (55 * MS, [ReasoningDelta("oh", token_count=2)]), (90 * MS, [text()]),
        (99 * MS, [text()]), (108 * MS, [text()]), (109 * MS, END),
    ],
    "reasoning between": [
        (30 * MS, [text()]), (31 * MS, [text()]), (42 * MS, [ReasoningDelta("hm")]), (51 * MS, [text()]),
        (60 * MS, [ReasoningDelta("ah")]), (66 * MS, END),
    ],
    "empty deltas": [
        (5 * MS, [START, TextDelta("")]), (9 * MS, [ReasoningDelta("")]), (20 * MS, [text()]), (30 * MS, [TextDelta("")]),
        (41 * MS, [text()]), (44 * MS, [ToolCallDelta(0, "")]), (45 * MS, END),
    ],
    "tool call": [
        (20 * MS, [START, ToolCallStart(0, "c", "f")]), (31 * MS, [ToolCallDelta(0, "{", token_count=2)]),
        (44 * MS, [ToolCallDelta(0, "}")]), (46 * MS, [ProviderData("x", "y")]), (50 * MS, END),
    ],
    "refusal": [(20 * MS, [RefusalDelta("no")]), (33 * MS, [RefusalDelta(".")]), (34 * MS, END)],
    "text without a token": [
        (20 * MS, [text()]), (31 * MS, [text()]), (40 * MS, [text(0)]), (55 * MS, [text()]), (63 * MS, [text()]),
        (70 * MS, [text(0)]), (77 * MS, END),
    ],
    "usage knows better": [(20 * MS, [text()]), (31 * MS, [text()]), (40 * MS, [usage(9), *END])],
    "usage after the end of the choice": [(20 * MS, [text()]), (30 * MS, [text(), ChoiceEnd()]), (45 * MS, [usage(2)]),
                                          (46 * MS, [StreamEnd()])],
    "a stall": [(20 * MS, [text()]), (40 * MS, [text()]), (2 * HOUR, [text()]), (2 * HOUR + 20 * MS, [text(), *END])],
    "two choices": [
        (20 * MS, [TextDelta("a"), TextDelta("b", 1)]), (40 * MS, [TextDelta("a"), TextDelta("b", 1)]),
        (60 * MS, [TextDelta("a"), ChoiceEnd(), TextDelta("b", 1)]), (80 * MS, [ChoiceEnd(1), StreamEnd()]),
    ],
    "faster than a microsecond": [(1, [text()]), (2, [text()]), (100, [text()]), (227, [text()]), (900, [text(), *END])],
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_definition_of_a_scripted_trace(script: Script) -> None:
    check(script)


@pytest.mark.parametrize("end", ["cancelled", "slow_reader", "failed", "truncated"])
def test_every_definition_of_a_stream_that_did_not_finish(end: str) -> None:
    check([(20 * MS, [START, text()]), (41 * MS, [text()]), (60 * MS, [text()])], end, 75 * MS)
    check([], end, 75 * MS)


def test_every_definition_of_a_stream_that_failed_by_itself() -> None:
    script: Script = [(20 * MS, [START, text()]), (41 * MS, [text()]), (60 * MS, [usage(2), ERROR])]
    trace = check(script, "failed", 90 * MS)
    assert trace.e2e_ns == 60 * MS


deltas: st.SearchStrategy[Event] = st.one_of(
    st.just(text()),
    st.builds(text, st.integers(0, 6)),
    st.builds(ReasoningDelta, st.sampled_from(("", "hm")), token_count=st.integers(0, 3)),
    st.builds(TextDelta, st.sampled_from(("", "a")), st.integers(0, 2)),
    st.just(START),
    st.just(ToolCallStart(0, "c", "f")),
    st.builds(usage, st.integers(0, 99)),
    st.just(ChoiceEnd()),
)
gaps = st.one_of(st.just(0), st.just(20 * MS), st.integers(0, 2000), st.integers(0, 400 * MS), st.integers(0, HOUR))


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Events of any kind at any pace, with long runs of single tokens between."""
    at = 0
    script: list[tuple[int, Sequence[Event]]] = []
    for gap in draw(st.lists(gaps, max_size=60)):
        at += gap
        script.append((at, draw(st.one_of(st.just([text()]), st.lists(deltas, min_size=1, max_size=3)))))
    return [*script, (at, END)] if draw(st.booleans()) else script


@given(script=scripts(), end=st.sampled_from(("finished", "cancelled", "failed")))
def test_every_definition_of_any_trace(script: Script, end: str) -> None:
    check(script, end)


@given(script=scripts())
def test_ledgers_have_what_their_traces_have(script: Script) -> None:
    ledger = Ledger()
    trace = Trace(BEGUN, ledger)
    for at, events in script:
        trace.receive(events, BEGUN + at)
    facts = seen(script, "cancelled")
    for closed in (False, True):
        events_gaps, token_gaps = ledger.event_gaps(), ledger.token_gaps()
        assert (events_gaps.count, events_gaps.total) == (len(facts.gaps), sum(facts.gaps)), closed
        assert token_gaps.count == len(facts.shares)
        assert abs(token_gaps.total - sum(facts.shares)) < 1
        assert ledger.tokens == max(facts.n, seen(script).n if closed else 0)
        assert ledger.ttft.total == sum(facts.times[:1])
        trace.close("cancelled", BEGUN + HOUR)


@given(script=scripts())
def test_percentiles_of_gaps_are_within_the_stated_error(script: Script) -> None:
    trace, facts = run(script), seen(script)
    for percent, found in ((50, trace.gap_percentile(50)), (99, trace.gap_percentile(99))):
        if not facts.gaps:
            assert found is None
            continue
        ordered = sorted(facts.gaps)
        rank = (len(ordered) - 1) * percent / 100
        exact = ordered[int(rank)] + (rank % 1) * (ordered[min(int(rank) + 1, len(ordered) - 1)] - ordered[int(rank)])
        assert found is not None
        assert abs(found - exact) <= max(0.04 * exact, 4)


@given(gaps=st.lists(st.integers(0, 300 * MS), min_size=40, max_size=120), more=st.lists(gaps, max_size=40))
def test_a_stream_of_any_pace_counts_every_gap_in_its_bucket(gaps: list[int], more: list[int]) -> None:
    expected, ledger = Histogram(), Ledger()
    traces = [Trace(BEGUN, ledger), Trace(BEGUN, ledger)]
    for trace, own in zip(traces, (gaps, more), strict=True):
        now = BEGUN
        trace.receive_token(now)
        for gap in own:
            now += gap
            trace.receive_token(now)
            expected.record(gap)
        assert (trace.events, trace.counted_tokens) == (len(own) + 1, len(own) + 1)
    assert ledger.event_gaps() == ledger.token_gaps() == expected
    for trace in traces:
        trace.close("finished", BEGUN + HOUR)
    assert ledger.plain_gaps == ledger.event_gaps() == expected


def note(trace: Trace, now: int) -> None:
    """Tell of a token as a delivery does."""
    if trace.noted is None:
        trace.receive((text(),), now)
        return
    trace.noted.append(now)
    if len(trace.noted) >= RUN:
        trace.fold()


@given(
    gaps=st.lists(st.one_of(gaps, st.integers(-5, 0), st.integers(500, 600_000)), max_size=90),
    late=st.integers(0, 40),
    odd=st.sets(st.integers(0, 90), max_size=4),
)
def test_tokens_that_are_noted_count_as_those_that_are_told(gaps: list[int], late: int, odd: set[int]) -> None:
    noting, telling = Ledger(), Ledger()
    noted, told = ([Trace(BEGUN, ledger) for _ in range(3)] for ledger in (noting, telling))
    now = BEGUN
    for number, gap in enumerate(gaps):
        now += gap
        for one, other, first in zip(noted, told, (0, 0, late), strict=True):
            if number in odd:
                one.receive((text(3),), now)
                other.receive((text(3),), now)
            elif number >= first:
                note(one, now)
                other.receive_token(now)
        assert noting.tokens == telling.tokens
        assert noting.event_gaps() == telling.event_gaps()
    assert [trace.longest_ns for trace in noted] == [trace.longest_ns for trace in told]
    for one, other in zip(noted, told, strict=True):
        one.close("finished", now)
        other.close("finished", now)
        assert by_tool(one) == by_tool(other)
        assert one.gap_percentile(99) == other.gap_percentile(99)
    assert noting.event_gaps() == telling.event_gaps() == noting.plain_gaps + noting.odd_gaps
    assert noting.tpot == telling.tpot


def test_streams_in_step_are_added_up_once() -> None:
    ledger = Ledger()
    traces = [Trace(BEGUN, ledger) for _ in range(3)]
    for step in range(RUN + 2):
        for trace in traces:
            note(trace, BEGUN + step * 20 * MS)
    run = ledger.run
    assert run is not None
    assert [trace.noted for trace in traces] == [[], [], []]
    assert run.squares == RUN * (20 * MS) ** 2
    assert ledger.event_gaps().count == 3 * (RUN + 1)


def test_a_scripted_clock_may_begin_at_zero() -> None:
    trace = Trace(0)
    trace.receive((START,), 0)
    trace.receive((text(),), 5)
    assert by_tool(trace)["vllm"]["ttft_ns"] == 0
    ended = Trace(0)
    ended.receive((START, text(), *END), 0)
    ended.receive((StreamEnd(),), 7)
    ended.close("finished", 9)
    assert ended.e2e_ns == 0


def test_p99_over_p50() -> None:
    trace = run([(20 * MS * at, [text()]) for at in range(1, 100)])
    assert trace.p99_over_p50 == 1.0
    assert run([(MS, [text(), text(), text()])]).p99_over_p50 is None
    assert run([(MS, [text()])]).p99_over_p50 is None


# -------------------------------------------------------------------------------------------------- queue, bytes, end


def test_queue_time_is_apart() -> None:
    ledger = Ledger()
    trace = Trace(BEGUN, ledger)
    trace.accept(BEGUN + 3 * MS)
    assert by_tool(trace)["tokenwire"]["queue_ns"] is None
    trace.start(BEGUN + 500 * MS)
    trace.receive([text()], BEGUN + 700 * MS)
    assert (trace.queue_ns, trace.ttft_ns) == (497 * MS, 700 * MS)
    assert (ledger.queue.count, ledger.queue.total) == (1, 497 * MS)
    assert by_tool(trace)["vllm_server"]["request_queue_time_ns"] == 497 * MS


def test_a_stream_cancelled_in_the_queue_has_no_queue_time() -> None:
    trace = Trace(BEGUN)
    trace.accept(BEGUN + MS)
    trace.close("cancelled", BEGUN + 9 * MS)
    assert (trace.queue_ns, trace.e2e_ns, trace.ledger.queue.count) == (None, 9 * MS, 0)


def test_only_the_first_byte_is_the_first() -> None:
    trace = Trace(BEGUN)
    assert by_tool(trace)["tokenwire"]["ttfb_ns"] is None
    trace.receive_bytes(BEGUN + MS)
    trace.receive_bytes(BEGUN + 2 * MS)
    assert trace.ttfb_ns == MS


def test_after_the_close_nothing_counts() -> None:
    ledger = Ledger()
    trace = run([(MS, [text()]), (21 * MS, [text()]), (41 * MS, [text()])], ledger=ledger)
    before = by_tool(trace)
    trace.receive([START, text(), text(3), ReasoningDelta("hm"), *END], BEGUN + HOUR)
    trace.receive_token(BEGUN + HOUR)
    trace.close("failed", BEGUN + HOUR)
    assert by_tool(trace) == before
    assert (ledger.ends["finished"], ledger.ends["failed"], ledger.tokens, ledger.e2e.count) == (1, 0, 3, 1)
    assert not ledger.open


def test_a_clock_that_steps_back_stands_still() -> None:
    trace = Trace(BEGUN)
    for at in (20, 40, 60, 35, 50, 61, 81):
        trace.receive_token(BEGUN + at * MS)
    assert (trace.longest_ns, trace.span_ns, trace.events) == (20 * MS, 61 * MS, 7)
    assert (trace.ledger.event_gaps().count, trace.ledger.event_gaps().total) == (6, 61 * MS)
    early = Trace(BEGUN)
    early.receive([text()], BEGUN - HOUR)
    early.close("finished", BEGUN - 2 * HOUR)
    assert (early.ttft_ns, early.e2e_ns) == (0, 0)


def test_a_retry_is_an_attempt_of_its_own_and_one_wait_of_the_user() -> None:
    ledger = Ledger()
    first = Trace(BEGUN, ledger)
    first.receive([ERROR], BEGUN + 30 * MS)
    first.close("failed", BEGUN + 30 * MS)
    second = first.retry(BEGUN + 100 * MS)
    second.receive([text()], BEGUN + 180 * MS)
    second.close("finished", BEGUN + 180 * MS)
    said = by_tool(second)
    assert (said["tokenwire"]["ttft_ns"], said["aiperf"]["ttft_ns"], said["vllm"]["ttft_ns"]) == (
        180 * MS,
        80 * MS,
        80 * MS,
    )
    assert (first.attempt, second.attempt) == (1, 2)
    assert (ledger.ends["failed"], ledger.ends["finished"]) == (1, 1)


# ------------------------------------------------------------------------------------------------- ledgers and workers


def test_workers_add_up_to_one_ledger() -> None:
    scripted = [*SCRIPTS.values()] * 2
    alone, merged = Ledger(), Ledger()
    workers = [Ledger() for _ in range(3)]
    for number, script in enumerate(scripted):
        run(script, ledger=alone)
        run(script, ledger=workers[number % 3])
    for worker in workers:
        merged.merge(worker)
    for name in (
        "ttft",
        "tpot",
        "e2e",
        "queue",
        "lag",
        "plain_gaps",
        "odd_gaps",
        "shared_gaps",
        "ends",
        "good",
        "tokens",
    ):
        assert getattr(merged, name) == getattr(alone, name), name
    for name, buckets in alone.successful.items():
        assert merged.successful[name].counts_up_to_bounds() == buckets.counts_up_to_bounds()
        assert (merged.successful[name].count, merged.successful[name].total) == (buckets.count, buckets.total)


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        (Targets(), True),
        (Targets(ttft_ns=199 * MS), False),
        (Targets(ttft_ns=200 * MS, tpot_ns=30 * MS, e2e_ns=270 * MS), True),
        (Targets(tpot_ns=30 * MS - 1), False),
        (Targets(e2e_ns=269 * MS), False),
        (Targets(itl_sd_ns=10 * MS), True),
        (Targets(itl_sd_ns=10 * MS - 1), False),
        (Targets(ttft_ns=None, tpot_ns=None), True),
    ],
)
def test_goodput(targets: Targets, good: bool) -> None:
    ledger = Ledger(targets)
    script: Script = [(200 * MS, [text()]), (220 * MS, [text()]), (260 * MS, [text()]), (270 * MS, END)]
    assert run(script, ledger=ledger).meets(targets) is good
    assert ledger.good == good
    assert not run(script, "cancelled").meets(targets)


def test_what_has_no_time_per_token_is_not_judged_by_it_and_without_a_token_nothing_is_good() -> None:
    tight = Targets(tpot_ns=0)
    assert run(SCRIPTS["one token"]).meets(tight)
    assert not run(SCRIPTS["no token"]).meets(tight)


def test_an_accountant_has_a_ledger_for_each_model_and_dialect() -> None:
    accountant = Accountant()
    told: list[int] = []
    accountant.on_busy = lambda: told.append(accountant.streams_active)
    one = accountant.open("a", "plain", BEGUN)
    two = accountant.open("a", "openai_chat", BEGUN)
    assert (accountant.streams_active, told) == (2, [0])
    one.close("finished", BEGUN)
    two.close("finished", BEGUN)
    accountant.open("a", "plain", BEGUN)
    assert (accountant.streams_active, told, len(accountant.ledgers)) == (1, [0, 0], 2)


def test_ledgers_do_not_grow_without_end() -> None:
    accountant = Accountant()
    for number in range(3000):
        accountant.open(f"model {number}", "plain", BEGUN).close("finished", BEGUN)
    assert len(accountant.ledgers) == 1025
    assert sum(ledger.ends["finished"] for ledger in accountant.ledgers.values()) == 3000


def test_lag_counts_for_each_write() -> None:
    accountant = Accountant()
    busy, idle = accountant.ledger("a", "plain"), accountant.ledger("b", "plain")
    busy.writes = 3
    accountant.record_lag(50_000)
    accountant.record_lag(70_000)
    assert (busy.lag.count, busy.lag.total, busy.writes, idle.lag.count) == (3, 150_000, 0, 0)


@pytest.mark.parametrize("bounds", SEMCONV_BOUNDS.values(), ids=SEMCONV_BOUNDS)
def test_bounds_of_the_conventions_rise(bounds: tuple[int, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))
    assert sum(bound < 10 * MS for bound in bounds) == 10


# ------------------------------------------------------------------------------------------------------------- memory


def held(tokens: int, spread: int) -> int:
    """Measure what a trace holds after some tokens, its ledger apart."""
    trace = Trace(BEGUN, Ledger())
    now = BEGUN
    for number in range(tokens):
        now += 20 * MS + (number * 7919 % spread) * MS // 10
        trace.receive_token(now)
    parts = [trace._gaps, trace._odd_gaps]
    lists = [trace._times, trace._wide_gaps]
    return sum(map(sys.getsizeof, [trace, *lists, *(number for numbers in lists for number in numbers)])) + sum(
        sys.getsizeof(part) + sum(sys.getsizeof(key) + sys.getsizeof(value) for key, value in part.items())
        for part in parts
    )


@pytest.mark.parametrize("spread", [1, 400, 5000])
def test_a_trace_does_not_grow_with_its_tokens(spread: int) -> None:
    assert held(40_000, spread) <= held(4_000, spread) * 1.3
    assert held(40_000, spread) <= 16_384
