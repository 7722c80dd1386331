"""What the traces of one model and dialect add up to: histograms and counts that merge.

`tokenwire.core.latency` says what is counted and when; here it is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec import Struct

from .gaps import Run
from .histogram import MAX_VALUE, Buckets, Histogram

if TYPE_CHECKING:
    from .latency import Trace

__all__ = ["ENDS", "SEMCONV_BOUNDS", "Ledger", "Targets", "counted"]

_MS: Final = 1_000_000

_SECOND: Final = 1_000_000_000


def _bounds(*seconds: float) -> tuple[int, ...]:
    return tuple(sorted(round(second * _SECOND) for second in seconds))


_FINER: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008)
"""Below 10 ms OpenTelemetry has one bucket or few, and everything above 100 tokens a second falls into it."""

SEMCONV_BOUNDS: Final = {
    "time_to_first_token": _bounds(
        *sorted({*_FINER, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10})
    ),
    "time_per_output_token": _bounds(*_FINER, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
    "request_duration": _bounds(*_FINER, *(0.01 * 2**power for power in range(14))),
}
"""Nanoseconds: the bounds of OpenTelemetry's conventions for `gen_ai.server.*`, and finer ones below 10 ms."""


ENDS: Final = ("finished", "cancelled", "failed", "slow_reader", "truncated")
"""How a stream can end, from the reader's side."""


class Targets(Struct, frozen=True, kw_only=True):
    """What a stream has to meet to count as good; None for what does not matter."""

    ttft_ns: int | None = 500 * _MS
    """The longest time to the first token."""
    tpot_ns: int | None = 50 * _MS
    """The longest time per output token after the first event."""
    itl_sd_ns: int | None = None
    """The largest standard deviation of gaps."""
    e2e_ns: int | None = None
    """The longest time to the end."""


class Ledger:
    """The traces of one model and dialect, added up.

    Args:
        targets: what makes a stream good.

    Attributes:
        targets: as given.
        open: traces that are not closed yet.
        ends: how many streams ended, by how they did.
        good: how many of them met the targets.
        run: the gaps that a trace has added up last; see `tokenwire.core.gaps`.
        writes: writes whose delivery lag is not counted yet; see `Accountant.record_lag`.
        ttft: times to the first token event, of all streams.
        tpot: times per output token of the streams that have one, however they ended.
        e2e: times to the end of all streams.
        queue: times in the queue.
        lag: delivery lags, one a write: from the arrival of the oldest event in it until it was handed to the transport.
        plain_gaps: gaps before events of one token. Its sum is complete only while no trace is open: `event_gaps` has all.
        odd_gaps: all others, an event each.
        shared_gaps: the same, shared among their tokens.
        successful: the times of finished streams in the buckets that OpenTelemetry names; see `SEMCONV_BOUNDS`.
    """

    __slots__ = ("_tokens", "e2e", "ends", "good", "lag", "odd_gaps", "open", "plain_gaps", "queue", "run", "shared_gaps",
                 "successful", "targets", "tpot", "ttft", "writes")  # fmt: skip

    def __init__(self, targets: Targets | None = None) -> None:
        self.targets = targets or Targets()
        self.open: set[Trace] = set()
        self.ends: dict[str, int] = dict.fromkeys(ENDS, 0)
        self.good = 0
        self.run: Run | None = None
        self.writes = 0
        self._tokens = 0
        self.ttft = Histogram()
        self.tpot = Histogram()
        self.e2e = Histogram()
        self.queue = Histogram()
        self.lag = Histogram()
        self.plain_gaps = Histogram()
        self.odd_gaps = Histogram()
        self.shared_gaps = Histogram()
        self.successful = {name: Buckets(bounds) for name, bounds in SEMCONV_BOUNDS.items()}

    @property
    def tokens(self) -> int:
        """Tokens counted so far, those of open traces included."""
        return self._tokens + sum(trace.counted_tokens for trace in self.open.copy())

    def event_gaps(self) -> Histogram:
        """Make the histogram of gaps between token events so far."""
        return self._with_open(self.plain_gaps + self.odd_gaps)

    def token_gaps(self) -> Histogram:
        """Make the histogram of gaps so far, shared among tokens."""
        return self._with_open(self.plain_gaps + self.shared_gaps)

    def _with_open(self, gaps: Histogram) -> Histogram:
        for trace in self.open.copy():
            counts, total = trace.pending()
            gaps.record_buckets(counts.copy(), total)
        return gaps

    def settle(self, trace: Trace) -> None:
        """Add up a trace that has ended; `Trace.close` calls it."""
        self.open.discard(trace)
        self.ends[trace.end] = self.ends.get(trace.end, 0) + 1
        self.good += trace.meets(self.targets)
        self._tokens += max(trace.counted_tokens, trace.reported_tokens or 0)  # never less than while it was open
        self.plain_gaps.record_buckets(*trace.pending())
        e2e = counted(trace.e2e_ns or 0)
        tpot = trace.tpot_ns
        self.e2e.record(e2e)
        if tpot is not None:
            self.tpot.record(counted(round(tpot)))
        self.successful["request_duration"].record(e2e)
        if trace.end == "finished" and trace.ttft_ns is not None:
            self.successful["time_to_first_token"].record(trace.ttft_ns)
            if tpot is not None:
                self.successful["time_per_output_token"].record(round(tpot))

    def merge(self, other: Ledger) -> None:
        """Add up what another worker's ledger has added up; the open traces stay where they are."""
        for name in ("ttft", "tpot", "e2e", "queue", "lag", "plain_gaps", "odd_gaps", "shared_gaps"):
            own: Histogram = getattr(self, name)
            own.merge(getattr(other, name))
        for name, buckets in self.successful.items():
            buckets.merge(other.successful[name])
        for end, count in other.ends.items():
            self.ends[end] = self.ends.get(end, 0) + count
        self.good += other.good
        self._tokens += other._tokens


def counted(span: int) -> int:
    """Bring a span of time into what a histogram can count, whatever clocks were mixed up."""
    return min(max(0, span), MAX_VALUE)
