"""Runs of gaps between tokens, added up at once: the accountant's work for a token, save for noting when it came.

Streams that an engine serves in step have the same gaps. One that has the run of the stream before it is not added up
again.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul, sub
from typing import Final

from .histogram import MAX_VALUE, bits_of, bucket_of, span_of

__all__ = [
    "GAP_BITS",
    "LONG",
    "LONG_BITS",
    "LONG_FROM_NS",
    "LONG_TO_NS",
    "RUN",
    "SHORT",
    "SHORT_BITS",
    "SHORT_FROM_NS",
    "Run",
]

GAP_BITS: Final = bits_of(0.01)
"""An octave of gaps has two to this power of buckets."""

RUN: Final = 32
"""Tokens that a stream notes before they are added up."""

_TABLED: Final = 1 << 15
SHORT_BITS: Final = 4
LONG_BITS: Final = 13
SHORT_FROM_NS: Final = 1 << GAP_BITS + SHORT_BITS
LONG_FROM_NS: Final = 1 << GAP_BITS + LONG_BITS
LONG_TO_NS: Final = _TABLED << LONG_BITS


def _table(unit_bits: int) -> tuple[int, ...]:
    """Find buckets beforehand, in units in which these buckets begin and end; what comes before them is not asked for."""
    buckets: list[int] = []
    while len(buckets) < _TABLED:
        bucket = bucket_of(len(buckets) << unit_bits, GAP_BITS)
        buckets += [bucket] * max(1, (span_of(bucket, GAP_BITS)[1] + 1 >> unit_bits) - len(buckets))
    return tuple(buckets)


SHORT: Final = _table(SHORT_BITS)
"""Of gaps from 1 us to 0.5 ms."""
LONG: Final = _table(LONG_BITS)
"""Of gaps from there to 268 ms. A look-up costs half of what `bucket_of` does, and its integers are there already."""


class Run:
    """Some tokens that came one by one, and what their gaps add up to.

    Args:
        last_ns: when the token before them came.
        times: when they came, at least one; a clock that steps back is taken to stand still.

    Attributes:
        buckets: each gap's bucket.
        end_ns: when the last came.
        longest_ns: the longest gap.
        squares: the sum of the gaps' squares.
    """

    __slots__ = ("_last_ns", "_times", "buckets", "end_ns", "longest_ns", "squares")

    def __init__(self, last_ns: int, times: list[int]) -> None:
        self._last_ns = last_ns
        self._times = times
        gaps = [*map(sub, times, [last_ns, *times[:-1]])]
        if min(gaps) < 0:
            times = [*accumulate(times, max, initial=last_ns)][1:]
            gaps = [*map(sub, times, [last_ns, *times[:-1]])]
        self.end_ns = times[-1]
        self.longest_ns = max(gaps)
        self.squares = sum(map(mul, gaps, gaps))
        self.buckets = _buckets_of(gaps, self.longest_ns)

    def is_of(self, last_ns: int, times: list[int]) -> bool:
        """Whether it is the run of these."""
        return last_ns == self._last_ns and times == self._times


def _buckets_of(gaps: list[int], longest: int) -> list[int]:
    if longest < LONG_TO_NS and min(gaps) >= LONG_FROM_NS:
        return [LONG[gap >> LONG_BITS] for gap in gaps]
    return [
        (LONG[gap >> LONG_BITS] if gap < LONG_TO_NS else bucket_of(min(gap, MAX_VALUE), GAP_BITS))
        if gap >= LONG_FROM_NS
        else SHORT[gap >> SHORT_BITS]
        if gap >= SHORT_FROM_NS
        else gap and bucket_of(gap, GAP_BITS)  # 0 where a step gave several tokens
        for gap in gaps
    ]
