"""A log-linear histogram of whole numbers: integer counts, a stated relative error, merging that loses nothing.

Each octave, from a power of two to the next, is cut into as many equal buckets as the error asks for; below the first
such octave each number is a bucket of its own. With 64 to the octave, which the default error of 1 % gives, a value is
known to within 1/128 of itself, 0.8 %:

    value        0 .. 127     128 .. 255   256 .. 511   512 .. 1023   ...
    bucket wide  1            2            4            8
    bucket       0 .. 127     128 .. 191   192 .. 255   256 .. 319

A bucket's number is a shift and an addition away from the value, and no logarithm is taken. Counts and the sum of the
values are integers, so that histograms of several workers add up in any order to what one would have counted, and what
was counted before a window can be taken away from what was counted at its end.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import add
from typing import Final, Self

from .errors import MalformedData

__all__ = ["DEFAULT_ERROR", "MAX_VALUE", "Buckets", "Histogram", "bits_of", "bucket_of", "percentile_of", "span_of"]

DEFAULT_ERROR: Final = 0.01
"""How far a value that is read may be from the one that was recorded, as a share of it."""

MAX_VALUE: Final = 2**63 - 1
"""The largest value that can be recorded: in nanoseconds, 292 years."""

_MAX_BITS: Final = 9
"""A tenth of a percent. Each bit more doubles the memory."""

_VERSION: Final = 1
_MAX_VARINT_BITS: Final = 1024
"""Far past any count or sum, and few enough that a long number is read in no time."""


def bits_of(error: float) -> int:
    """Say into how many buckets an octave is cut, as a power of two.

    Args:
        error: the largest relative error, from 1/1024 to 1/2.

    Raises:
        ValueError: it is outside of that.
    """
    if not 0.5 ** (_MAX_BITS + 1) <= error <= 0.5:
        raise ValueError(f"a relative error of {error} is not between 1/1024 and 1/2")
    return next(bits for bits in range(_MAX_BITS + 1) if 0.5 ** (bits + 1) <= error)


def bucket_of(value: int, bits: int) -> int:
    """Find a value's bucket; the value is not negative."""
    shift = value.bit_length() - bits - 1
    return (shift << bits) + (value >> shift) if shift > 0 else value


def span_of(bucket: int, bits: int) -> tuple[int, int]:
    """Give the smallest and the largest value of a bucket."""
    shift = max(0, (bucket >> bits) - 1)
    low = (bucket - (shift << bits)) << shift
    return low, low + (1 << shift) - 1


def percentile_of(counts: Sequence[tuple[int, int]], percent: float, bits: int) -> float | None:
    """Estimate a percentile; see `Histogram.percentile`.

    Args:
        counts: buckets in rising order, and how many values each has.
        percent: from 0 to 100.
        bits: an octave has two to this power of buckets.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"{percent} is not between 0 and 100")
    seen = list(accumulate(count for _, count in counts))
    if not seen or not seen[-1]:
        return None
    rank = (seen[-1] - 1) * percent / 100
    below = min(int(rank), seen[-1] - 1)
    low, high = (
        sum(span_of(counts[bisect_right(seen, at)][0], bits)) / 2 for at in (below, min(below + 1, seen[-1] - 1))
    )
    return low + (rank - below) * (high - low)


class Histogram:  # noqa: PLW1641  # it changes, so that it has no hash
    """Counts of values.

    Args:
        error: the largest relative error of what is read from it, save `total` and `mean`, which are exact.

    Attributes:
        bits: an octave has two to this power of buckets.
        counts: how many values each bucket has, from the first bucket on; it grows as far as values reach.
        total: the sum of all values.
    """

    __slots__ = ("bits", "counts", "total")

    def __init__(self, error: float = DEFAULT_ERROR) -> None:
        self.bits = bits_of(error)
        self.counts: list[int] = []
        self.total = 0

    @property
    def error(self) -> float:
        """The largest relative error that it has: half a bucket."""
        return 0.5 ** (self.bits + 1)

    @property
    def count(self) -> int:
        """How many values were recorded."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """The mean, exact; None without values."""
        count = self.count
        return self.total / count if count else None

    def record(self, value: int, times: int = 1) -> None:
        """Count a value.

        Args:
            value: from 0 to `MAX_VALUE`.
            times: how often.

        Raises:
            ValueError: the value or the number is outside of that; nothing was counted.
        """
        if not 0 <= value <= MAX_VALUE:
            raise ValueError(f"{value} is not between 0 and {MAX_VALUE}")
        if times < 0:
            raise ValueError("a value cannot be taken back")
        self._add(bucket_of(value, self.bits), times)
        self.total += value * times

    def record_buckets(self, counts: Mapping[int, int], total: int) -> None:
        """Count values whose buckets somebody else has found, with the same number of bits.

        Args:
            counts: how many values, by bucket.
            total: the sum of these values.
        """
        for bucket, count in counts.items():
            self._add(bucket, count)
        self.total += total

    def _add(self, bucket: int, count: int) -> None:
        try:
            self.counts[bucket] += count
        except IndexError:
            self.counts += [0] * (bucket + 1 - len(self.counts))
            self.counts[bucket] = count

    def merge(self, other: Histogram) -> None:
        """Count all that another has counted.

        Raises:
            ValueError: the other's error is another; nothing was counted.
        """
        self._check(other)
        theirs = other.counts.copy()  # which may grow on another thread meanwhile
        missing = len(theirs) - len(self.counts)
        if missing > 0:
            self.counts += [0] * missing
        for bucket, count in enumerate(theirs):
            self.counts[bucket] += count
        self.total += other.total

    def copy(self) -> Self:
        """Make another with the same counts."""
        twin = type(self)(self.error)
        twin.merge(self)
        return twin

    def __add__(self, other: Histogram) -> Self:
        """Count both, in any order and grouping."""
        both = self.copy()
        both.merge(other)
        return both

    def __sub__(self, earlier: Histogram) -> Self:
        """Count what came since an earlier state of the same histogram: the values of a window.

        Raises:
            ValueError: the other is no earlier state: it has counted what this one has not.
        """
        self._check(earlier)
        window = self.copy()
        for bucket, count in enumerate(earlier.counts):
            if count > (window.counts[bucket] if bucket < len(window.counts) else 0):
                raise ValueError("what is taken away is no earlier state of this histogram")
            if count:
                window.counts[bucket] -= count
        window.total -= earlier.total
        if not window._total_can_be():
            raise ValueError("what is taken away is no earlier state of this histogram")
        return window

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return (self.bits, self.total, _trimmed(self.counts)) == (other.bits, other.total, _trimmed(other.counts))

    def __repr__(self) -> str:
        return f"Histogram(error={self.error}, count={self.count}, total={self.total})"

    def _check(self, other: Histogram) -> None:
        if other.bits != self.bits:
            raise ValueError(f"an error of {other.error} cannot be counted into one of {self.error}")

    def percentile(self, percent: float) -> float | None:
        """Estimate a percentile, with linear interpolation between neighbours, as NumPy does by default.

        Args:
            percent: from 0 to 100.

        Returns:
            Within `error` of the exact percentile; None without values.

        Raises:
            ValueError: the percentage is outside of that.
        """
        return percentile_of(list(enumerate(self.counts)), percent, self.bits)

    def counts_up_to(self, bounds: Sequence[int]) -> list[int]:
        """Count the values up to each of some bounds, the bounds included.

        The counts are exact where a bound is the largest value of its bucket (see `span_of`); a bucket whose end lies
        past the bound is left out of the count.

        Args:
            bounds: rising.
        """
        seen = [0, *accumulate(self.counts)]
        return [seen[min(bucket_of(bound + 1, self.bits), len(seen) - 1)] for bound in bounds]

    def encode(self) -> bytes:
        """Write it down.

        Returns:
            A byte 1 for the version, a byte for `bits`, `total`, then two numbers for each bucket that has values: how
            many empty ones are between it and the last, and its count. All but the first two bytes are LEB128 numbers:
            seven bits a byte, the lowest first, the top bit set on all bytes but the last.
        """
        out = bytearray((_VERSION, self.bits))
        _write_varint(self.total, out)
        empty = 0
        for count in self.counts:
            if not count:
                empty += 1
                continue
            _write_varint(empty, out)
            _write_varint(count, out)
            empty = 0
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` has written.

        Raises:
            MalformedData: it is not that.
        """
        if len(data) < 3 or data[0] != _VERSION or data[1] > _MAX_BITS:
            raise MalformedData("no histogram of this version")
        histogram = cls(0.5 ** (data[1] + 1))
        numbers = _read_varints(data[2:])
        if len(numbers) % 2 == 0:
            raise MalformedData("a histogram ends within a bucket")
        histogram.total = numbers[0]
        last, most = -1, bucket_of(MAX_VALUE, histogram.bits)
        for gap, count in zip(numbers[1::2], numbers[2::2], strict=True):
            last += gap + 1
            if last > most or not count:
                raise MalformedData("a histogram has a bucket that cannot be")
            histogram._add(last, count)
        if not histogram._total_can_be():
            raise MalformedData("a histogram's sum is not one of its values")
        return histogram

    def _total_can_be(self) -> bool:
        """Whether values in these buckets can have this sum."""
        spans = [(count, *span_of(bucket, self.bits)) for bucket, count in enumerate(self.counts) if count]
        least = sum(count * low for count, low, _ in spans)
        return least <= self.total <= sum(count * high for count, _, high in spans)


class Buckets:
    """Counts of values between bounds that somebody else has chosen, exact at each of them.

    Args:
        bounds: rising; a value that equals a bound is counted below it.

    Attributes:
        bounds: as given.
        total: the sum of all values.
    """

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.total = 0
        self._counts = [0] * (len(bounds) + 1)

    @property
    def count(self) -> int:
        """How many values were recorded."""
        return sum(self._counts)

    def record(self, value: int) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: Buckets) -> None:
        """Count all that another has counted.

        Raises:
            ValueError: the other's bounds are others; nothing was counted.
        """
        if list(other.bounds) != list(self.bounds):
            raise ValueError("the bounds are others")
        self._counts = list(map(add, self._counts, other._counts))
        self.total += other.total

    def counts_up_to_bounds(self) -> list[int]:
        """Count the values up to each bound."""
        return list(accumulate(self._counts[:-1]))


def _trimmed(counts: list[int]) -> list[int]:
    end = len(counts)
    while end and not counts[end - 1]:
        end -= 1
    return counts[:end]


def _write_varint(number: int, out: bytearray) -> None:
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def _read_varints(data: bytes) -> list[int]:
    numbers: list[int] = []
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift >= _MAX_VARINT_BITS:
                raise MalformedData("a number of a histogram is too long")
        else:
            numbers.append(number)
            number = shift = 0
    if shift:
        raise MalformedData("a histogram ends within a number")
    return numbers
