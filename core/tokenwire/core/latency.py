"""The latency accountant: what happened to a stream and when, in memory that does not grow with it.

A `Trace` is one stream: events go in with the time at which they arrived, and every definition of latency comes out, by
name (`tokenwire.core.definitions`). A `tokenwire.core.ledger.Ledger` adds up the traces of one model and dialect in
histograms that merge. An `Accountant` holds a server's ledgers. None of them has a clock: time is `now`, integer
nanoseconds of one monotonic clock, and a clock that steps back is taken to stand still.

What counts, wherever it is counted here:

- A **token event** is a delta of text, reasoning, refusal or tool call that says something, and the start of a tool
  call. A role chunk, a heartbeat, usage, the end of a choice and an empty delta are none.
- A **gap** lies between two neighbouring token events, over all choices of the stream; events of one batch have gaps of
  zero. Shared among tokens, a gap before an event of k tokens is k gaps that add up to it and differ by at most 1 ns; a
  gap before an event of no token is added to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import sqrt
from typing import Any, Final

from .events import (
    TERMINALS,
    Event,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from .gaps import GAP_BITS, LONG, LONG_BITS, LONG_FROM_NS, LONG_TO_NS, SHORT, SHORT_BITS, SHORT_FROM_NS, Run
from .histogram import MAX_VALUE, Histogram, bucket_of, percentile_of
from .ledger import Ledger, Targets, counted

__all__ = ["Accountant", "Trace"]

_LAST_BUCKET: Final = bucket_of(MAX_VALUE, GAP_BITS)

_MAX_NARROW: Final = 32
"""Buckets in which a stream counts by itself. An engine's pace needs fewer; a stream whose gaps vary more counts in its
ledger from then on, and for itself in wider buckets, so that they stay few."""

_WIDE_BITS: Final = 2
"""A wider bucket is 2 ** 2 buckets."""

_MAX_LEDGERS: Final = 1024
_OTHERS: Final = "other"
"""Where streams are counted once there are too many ledgers: labels of metrics must not grow without end."""


class Trace:
    """One stream, as it arrived.

    Args:
        begun_ns: when it was asked for: the request's head came in, or a measuring client sent it.
        ledger: where it is added up; by default one of its own. The trace is open in it until `close`.
        attempt_ns: when this attempt began, where there were others before it.
        attempt: its number, from 1.

    Attributes:
        begun_ns, attempt_ns, attempt: as given.
        accepted_ns: when the request was whole and had its place in the queue, or None.
        started_ns: when the backend got it, or None.
        first_byte_ns: when the answer's first byte was there: written, or read; or None.
        first_chunk_ns: when the first event of any kind came, a role chunk too, or None.
        first_ns: when the first token event came, or None.
        first_answer_ns: when the first token event came that is not reasoning, or None.
        second_ns: when the second token event came, or None.
        end_ns: when the terminal event came, or else when the trace was closed; None before.
        end: how it ended, one of ENDS; "" while it is open.
        first_tokens: tokens of the first token event.
        reasoning_tokens: tokens that were reasoning.
        reported_tokens: output tokens by the last usage report, or None.
        noted: where the time of a token event of text that stands for one token may be appended, instead of a call of
            `receive_token`; once it has RUN of them `fold` is due. None where each has to be told.
        ledger: where it is added up.
    """

    __slots__ = ("_answer_ns", "_carry_ns", "_choice_ns", "_folded_ns", "_gaps", "_last_ns", "_ledger_counts",
                 "_longest_ns", "_odd_events", "_odd_gaps", "_odd_ns", "_odd_squares", "_odd_tokens", "_other_chunks",
                 "_plain_squares", "_reasoning_events", "_reasoning_last", "_shared_squares", "_times", "_usage_ns",
                 "_wide_gaps", "accepted_ns", "attempt", "attempt_ns", "begun_ns", "end", "end_ns", "first_answer_ns",
                 "first_byte_ns", "first_chunk_ns", "first_ns", "first_tokens", "ledger", "noted", "reasoning_tokens",
                 "reported_tokens", "second_ns", "started_ns")  # fmt: skip

    def __init__(
        self, begun_ns: int, ledger: Ledger | None = None, *, attempt_ns: int | None = None, attempt: int = 1
    ) -> None:
        self.ledger = ledger or Ledger()
        self.begun_ns = begun_ns
        self.attempt_ns = begun_ns if attempt_ns is None else attempt_ns
        self.attempt = attempt
        self.accepted_ns: int | None = None
        self.started_ns: int | None = None
        self.first_byte_ns: int | None = None
        self.first_chunk_ns: int | None = None
        self.first_ns: int | None = None
        self.first_answer_ns: int | None = None
        self.second_ns: int | None = None
        self.end_ns: int | None = None
        self.end = ""
        self.first_tokens = 0
        self.reasoning_tokens = 0
        self.reported_tokens: int | None = None
        self._longest_ns = 0
        self._last_ns = self.attempt_ns
        # Gaps before events of one token are plain: they are the same for an event and for a token.
        self._times: list[int] = []
        self.noted: list[int] | None = None
        self._gaps: dict[int, int] = {}
        self._wide_gaps: list[int] = []
        self._ledger_counts: list[int] | None = None
        self._plain_squares = 0
        self._folded_ns = 0
        # All others are odd; the first event, which has no gap, is among them.
        self._odd_events = 0
        self._odd_tokens = 0
        self._odd_ns = 0
        self._odd_squares = 0
        self._shared_squares = 0
        self._carry_ns = 0
        self._odd_gaps: dict[int, int] = {}
        self._other_chunks = 0
        self._choice_ns = self.attempt_ns
        self._usage_ns: int | None = None
        self._reasoning_events = 0
        self._reasoning_last = False
        self._answer_ns: int | None = None
        self.ledger.open.add(self)

    # -- what happens ------------------------------------------------------------------------------------------------

    def accept(self, now: int) -> None:
        """The request is whole; it may have to wait for its turn."""
        self.accepted_ns = now

    def start(self, now: int) -> None:
        """The backend gets it: the time in the queue is over."""
        self.started_ns = now
        if self.accepted_ns is not None:
            self.ledger.queue.record(counted(now - self.accepted_ns))

    def receive_bytes(self, now: int) -> None:
        """Bytes of the answer are there; only the first time counts."""
        if self.first_byte_ns is None:
            self.first_byte_ns = now

    def receive_token(self, now: int) -> None:
        """Take a token event of text that stands for one token: the shortest way for one stream.

        Where many are served in step, `noted` is shorter.
        """
        gap = now - self._last_ns
        if self.noted is None or self._times or gap < 0:
            self.fold()
            self._take(1, self._not_before(now))
            return
        if gap:
            self._last_ns = now
            self._plain_squares += gap * gap
            if gap > self._longest_ns:  # noqa: PLR1730  # a call of max costs as much as the rest together
                self._longest_ns = gap
            if gap >= LONG_FROM_NS:
                bucket = LONG[gap >> LONG_BITS] if gap < LONG_TO_NS else bucket_of(counted(gap), GAP_BITS)
            else:
                bucket = SHORT[gap >> SHORT_BITS] if gap >= SHORT_FROM_NS else bucket_of(gap, GAP_BITS)
        else:  # the step gave several tokens
            bucket = 0
        counts = self._ledger_counts
        if counts is not None:
            counts[bucket] += 1
            try:
                self._wide_gaps[bucket >> _WIDE_BITS] += 1
            except IndexError:
                _count_at(self._wide_gaps, bucket >> _WIDE_BITS)
        elif bucket in self._gaps:
            self._gaps[bucket] += 1
        else:
            self._gaps[bucket] = 1
            if len(self._gaps) > _MAX_NARROW:
                self._widen()

    def fold(self) -> None:
        """Add up the tokens that were noted."""
        times = self._times
        if not times:
            return
        last, run = self._last_ns, self.ledger.run
        if run is None or not run.is_of(last, times):
            run = self.ledger.run = Run(last, times.copy())
        times.clear()
        self._last_ns = run.end_ns
        self._add(run)

    def _add(self, run: Run) -> None:
        self._plain_squares += run.squares
        self._longest_ns = max(self._longest_ns, run.longest_ns)
        counts, gaps = self._ledger_counts, self._gaps
        if counts is None:
            for bucket in run.buckets:
                try:
                    gaps[bucket] += 1
                except KeyError:
                    gaps[bucket] = 1
            if len(gaps) > _MAX_NARROW:
                self._widen()
            return
        wide = self._wide_gaps
        _count_at(wide, max(run.buckets) >> _WIDE_BITS, 0)
        for bucket in run.buckets:
            counts[bucket] += 1
            wide[bucket >> _WIDE_BITS] += 1

    def receive(self, events: Sequence[Event], now: int) -> None:
        """Take events of any kind.

        Args:
            events: in order.
            now: when they arrived.
        """
        self.fold()
        now = self._not_before(now)
        for event in events:
            count = _TOKEN_COUNTS.get(type(event))
            tokens = None if count is None else count(event)
            if tokens is not None:
                self._take(tokens, now, reasoning=type(event) is ReasoningDelta)
            elif type(event) is UsageReport:
                self.reported_tokens = event.output_tokens
                self._usage_ns = now
            elif type(event) in _TERMINALS:
                self.end_ns = now if self.end_ns is None else self.end_ns
            elif not self.end:
                self._other_chunks += 1
                self._choice_ns = now
                self.first_chunk_ns = now if self.first_chunk_ns is None else self.first_chunk_ns

    def close(self, end: str, now: int) -> None:
        """The stream has ended, however it did: add it up. Idempotent; events after it are not counted.

        Args:
            end: one of ENDS.
            now: when; it counts where no terminal event has come.
        """
        if self.end:
            return
        self.fold()
        self.end = end
        self.noted = None
        if self.end_ns is None:
            self.end_ns = self._not_before(now)
        self.ledger.settle(self)

    def retry(self, now: int) -> Trace:
        """Begin another attempt, after `close`: a trace of its own that remembers when the user asked.

        Tools time attempts (`attempt_ns`); the user waits from `begun_ns` on.
        """
        return Trace(self.begun_ns, self.ledger, attempt_ns=self._not_before(now), attempt=self.attempt + 1)

    def _not_before(self, now: int) -> int:
        """Let a clock that has stepped back stand still."""
        return max(now, self._last_ns, self._choice_ns, self._usage_ns or 0)

    def _take(self, tokens: int, now: int, *, reasoning: bool = False) -> None:
        if self.end:
            return
        last, self._last_ns = self._last_ns, now
        if self.first_ns is None:
            self._take_first(tokens, now)
        else:
            self._take_gap(now - last, tokens)
            if self.second_ns is None:
                self.second_ns = now
        if reasoning:
            if not self._reasoning_last and self.first_answer_ns is not None:
                self._answer_ns = last
            self._reasoning_events += 1
            self.reasoning_tokens += tokens
        elif self.first_answer_ns is None:
            self.first_answer_ns = now
        self._reasoning_last = reasoning
        steady = not reasoning and not self._carry_ns and self.second_ns is not None
        self.noted = self._times if steady else None

    def _take_first(self, tokens: int, now: int) -> None:
        self.first_ns = now
        if self.first_chunk_ns is None:
            self.first_chunk_ns = now
        self.first_tokens = tokens
        self._odd_events = 1
        self._odd_tokens = tokens
        self.ledger.ttft.record(counted(now - self.begun_ns))

    def _take_gap(self, gap: int, tokens: int) -> None:
        if tokens == 1 and not self._carry_ns:
            # A plain gap after all: go the shortest way, from before it.
            self._last_ns -= gap
            self.noted = self._times
            self.receive_token(self._last_ns + gap)
            return
        self._longest_ns = max(self._longest_ns, gap)
        bucket = bucket_of(counted(gap), GAP_BITS)
        self._odd_events += 1
        self._odd_tokens += tokens
        self._odd_ns += gap
        self._odd_squares += gap * gap
        _count(self._odd_gaps, bucket >> _WIDE_BITS, 1)
        self.ledger.odd_gaps.record(counted(gap))
        self._carry_ns += gap
        if tokens:
            self._share(tokens)

    def _share(self, tokens: int) -> None:
        share, rest = divmod(self._carry_ns, tokens)
        self._shared_squares += (tokens - rest) * share**2 + rest * (share + 1) ** 2
        self.ledger.shared_gaps.record(counted(share), tokens - rest)
        self.ledger.shared_gaps.record(counted(share + 1), rest)
        self._carry_ns = 0

    def _widen(self) -> None:
        """Go on counting in the ledger, and here in wider buckets."""
        gaps, total = self._gaps, self.span_ns - self._odd_ns - self._folded_ns
        plain = self.ledger.plain_gaps
        plain.record_buckets({**gaps, _LAST_BUCKET: 0}, total)  # from now on every bucket has its place there
        self._folded_ns = total
        self._gaps = {}
        for bucket, count in gaps.items():
            _count_at(self._wide_gaps, bucket >> _WIDE_BITS, count)
        self._ledger_counts = plain.counts

    def pending(self) -> tuple[dict[int, int], int]:
        """Give what the ledger has not of the plain gaps, while the trace is open: how many by bucket, and their sum.

        It changes nothing, and may be called on another thread.
        """
        last, times, gaps = self._last_ns, self._times.copy(), self._gaps.copy()
        total = 0 if self.first_ns is None else last - self.first_ns - self._odd_ns - self._folded_ns
        if times:
            run = Run(last, times)
            total += run.end_ns - last
            for bucket in run.buckets:
                _count(gaps, bucket, 1)
        return gaps, total

    # -- what was seen -----------------------------------------------------------------------------------------------

    @property
    def last_ns(self) -> int | None:
        """When the last token event came, or None."""
        self.fold()
        return None if self.first_ns is None else self._last_ns

    @property
    def last_answer_ns(self) -> int | None:
        """When the last token event came that is not reasoning, or None."""
        return self._answer_ns if self._reasoning_last else self.last_ns

    @property
    def last_chunk_ns(self) -> int | None:
        """When the last event came that belongs to a choice: a token event, a role chunk, an end; or None."""
        if self.first_ns is None:
            return self._choice_ns if self._other_chunks else None
        self.fold()
        return max(self._last_ns, self._choice_ns)

    @property
    def last_event_ns(self) -> int | None:
        """When the last event came that is not the terminal one, usage too; or None."""
        last = self.last_chunk_ns
        return self._usage_ns if last is None or (self._usage_ns or 0) > last else last

    @property
    def longest_ns(self) -> int:
        """The longest gap between token events: the longest stall."""
        self.fold()
        return self._longest_ns

    @property
    def span_ns(self) -> int:
        """From the first to the last token event: the sum of all gaps."""
        self.fold()
        return 0 if self.first_ns is None else self._last_ns - self.first_ns

    @property
    def events(self) -> int:
        """Token events."""
        return self._odd_events + self._plain()

    @property
    def answer_events(self) -> int:
        """Token events that are not reasoning."""
        return self.events - self._reasoning_events

    @property
    def chunks(self) -> int:
        """Events that belong to a choice: token events, role chunks, empty deltas, ends."""
        return self.events + self._other_chunks

    @property
    def counted_tokens(self) -> int:
        """Tokens that the events stand for."""
        return self._odd_tokens + self._plain()

    @property
    def tokens(self) -> int:
        """Output tokens: as reported, where a stream that has finished had usage; else as counted."""
        return (self.end == "finished" and self.reported_tokens) or self.counted_tokens

    def _plain(self) -> int:
        if self.second_ns is None:
            return 0
        return sum(chain(self._gaps.copy().values(), self._wide_gaps)) + len(self._times)

    # -- what follows from it ----------------------------------------------------------------------------------------

    @property
    def queue_ns(self) -> int | None:
        """In the queue: from `accept` to `start`; None where either is missing."""
        return _span_or_none(self.accepted_ns, self.started_ns)

    @property
    def ttfb_ns(self) -> int | None:
        """To the answer's first byte."""
        return _span_or_none(self.begun_ns, self.first_byte_ns)

    @property
    def ttft_ns(self) -> int | None:
        """To the first token event."""
        return _span_or_none(self.begun_ns, self.first_ns)

    @property
    def e2e_ns(self) -> int | None:
        """To the end."""
        return _span_or_none(self.begun_ns, self.end_ns)

    @property
    def tpot_ns(self) -> float | None:
        """Per token after the first event, whose k tokens came at once: the span, divided by n - k; None without such."""
        if self.second_ns is None:
            return None
        later = self.tokens - self.first_tokens
        return self.span_ns / later if later > 0 else None

    @property
    def itl_ns(self) -> float | None:
        """The mean gap between token events; None without one."""
        return self.span_ns / (self.events - 1) if self.events > 1 else None

    @property
    def itl_sd_ns(self) -> float | None:
        """The standard deviation of the gaps between token events, of these and not of a population they stand for."""
        return _deviation(self.events - 1, self.span_ns, self._plain_squares + self._odd_squares)

    @property
    def token_itl_ns(self) -> float | None:
        """The mean gap, shared among tokens; None without one."""
        gaps = self.counted_tokens - self.first_tokens
        return (self.span_ns - self._carry_ns) / gaps if gaps > 0 else None

    @property
    def token_itl_sd_ns(self) -> float | None:
        """The standard deviation of the gaps, shared among tokens."""
        gaps = self.counted_tokens - self.first_tokens
        return _deviation(gaps, self.span_ns - self._carry_ns, self._plain_squares + self._shared_squares)

    @property
    def tokens_per_event(self) -> float | None:
        """Tokens of a token event, on average; None without one."""
        return self.tokens / self.events if self.events else None

    @property
    def p99_over_p50(self) -> float | None:
        """How much longer the longest hundredth of gaps is than the usual one; None without gaps or where that is 0."""
        middle, high = self.gap_percentile(50), self.gap_percentile(99)
        return high / middle if middle and high is not None else None

    def gap_percentile(self, percent: float) -> float | None:
        """Estimate a percentile of the gaps between token events; None without one.

        It is within 1 %, and within 4 % once they lie in more than 32 buckets, or where events had not one token each.
        """
        self.fold()
        counts = self._gaps.copy()
        for wide, count in chain(enumerate(self._wide_gaps), self._odd_gaps.items()):
            _count(counts, (wide << _WIDE_BITS) + (1 << _WIDE_BITS >> 1), count)
        return percentile_of(sorted(counts.items()), percent, GAP_BITS)

    def meets(self, targets: Targets) -> bool:
        """Whether it is a good stream: it finished, had a first token, and met each target that can be said of it.

        A stream of a single token has no time per token, and is not judged by it.
        """
        if self.end != "finished" or self.first_ns is None:
            return False
        for name in targets.__struct_fields__:
            target: int | None = getattr(targets, name)
            value: float | None = None if target is None else getattr(self, name)
            if target is not None and value is not None and value > target:
                return False
        return True


class Accountant:
    """A server's ledgers, one for each model and dialect.

    Args:
        targets: what makes a stream good.

    Attributes:
        ledgers: by model and dialect.
        loop_lag: how late the loop called back when a timer was due.
        on_busy: called when a stream is opened and no other is open.
    """

    def __init__(self, targets: Targets | None = None) -> None:
        self.ledgers: dict[tuple[str, str], Ledger] = {}
        self.loop_lag = Histogram()
        self.on_busy: Callable[[], None] | None = None
        self._targets = targets or Targets()

    @property
    def streams_active(self) -> int:
        """How many streams are open, those that wait in the queue included."""
        return sum(len(ledger.open) for ledger in self.ledgers.values())

    def ledger(self, model: str, dialect: str) -> Ledger:
        """Find or make the ledger of a model and dialect.

        The caller sees to it that the names are from a list and not a client's own; past 1,024 ledgers all go into one.
        """
        key = (model, dialect)
        if key not in self.ledgers and len(self.ledgers) >= _MAX_LEDGERS:
            key = (_OTHERS, _OTHERS)
        if key not in self.ledgers:
            self.ledgers[key] = Ledger(self._targets)
        return self.ledgers[key]

    def open(self, model: str, dialect: str, begun_ns: int) -> Trace:
        """Begin the trace of a stream; see `Trace`."""
        if self.on_busy is not None and not any(ledger.open for ledger in self.ledgers.values()):
            self.on_busy()
        return Trace(begun_ns, self.ledger(model, dialect))

    def record_lag(self, lag_ns: int, writes: int = 0) -> None:
        """Count how long after its arrival a batch's writes were done.

        Args:
            lag_ns: how long.
            writes: writes for each ledger, besides those that it has noted; given where there is but one.
        """
        for ledger in self.ledgers.values():
            if ledger.writes or writes:
                ledger.lag.record(counted(lag_ns), ledger.writes + writes)
                ledger.writes = 0


def _tokens_of_text(delta: TextDelta | ReasoningDelta | RefusalDelta) -> int | None:
    return delta.token_count if delta.text else None


def _tokens_of_call(delta: ToolCallDelta) -> int | None:
    return delta.token_count if delta.arguments else None


def _no_tokens(start: ToolCallStart) -> int:
    del start
    return 0


_TOKEN_COUNTS: Final[Mapping[type, Callable[[Any], int | None]]] = {
    **dict.fromkeys((TextDelta, ReasoningDelta, RefusalDelta), _tokens_of_text),
    ToolCallDelta: _tokens_of_call,
    ToolCallStart: _no_tokens,
}
"""How many tokens an event stands for, by its class; None where it says nothing, and so is no token event."""

_TERMINALS: Final[frozenset[type]] = frozenset(TERMINALS)


def _count(counts: dict[int, int], bucket: int, times: int) -> None:
    counts[bucket] = counts.get(bucket, 0) + times


def _count_at(counts: list[int], bucket: int, times: int = 1) -> None:
    counts += [0] * (bucket + 1 - len(counts))
    counts[bucket] += times


def _span_or_none(begin: int | None, end: int | None) -> int | None:
    return None if begin is None or end is None else max(0, end - begin)


def _deviation(count: int, total: int, squares: int) -> float | None:
    return sqrt(max(0, count * squares - total**2)) / count if count > 0 else None
