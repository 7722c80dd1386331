"""The histogram against exact sums, exact percentiles and plain lists: its errors are stated, and never larger."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.core.errors import MalformedData
from tokenwire.core.histogram import DEFAULT_ERROR, MAX_VALUE, Histogram, bits_of, bucket_of, span_of

MS = 1_000_000
PERCENTS = (0, 0.1, 1, 25, 50, 75, 90, 99, 99.9, 100)

Values = st.SearchStrategy[list[int]]


def _octave(octave: int) -> st.SearchStrategy[int]:
    return st.integers(1 << octave >> 1, 1 << octave)


def _edge(octave: int, off: int) -> int:
    return max(0, (1 << octave) + off)


def _steps(octaves: list[int]) -> list[int]:
    return [3 << octave >> 2 for octave in octaves]


def _same(value: int, times: int) -> list[int]:
    return [value] * times


edges = st.builds(_edge, st.integers(0, 62), st.integers(-2, 2))
any_value: st.SearchStrategy[int] = st.one_of(
    st.integers(0, MAX_VALUE), st.integers(0, 200), st.integers(0, 62).flatmap(_octave), edges
)
steady: Values = st.lists(st.integers(20 * MS - 50_000, 20 * MS + 50_000), min_size=1, max_size=60)
two_humps: Values = st.lists(
    st.one_of(st.integers(5 * MS, 6 * MS), st.integers(900 * MS, 1000 * MS)), min_size=1, max_size=60
)
long_tail: Values = st.builds(_steps, st.lists(st.integers(0, 62), min_size=1, max_size=60))
all_the_same: Values = st.builds(_same, any_value, st.integers(1, 50))
hard: Values = st.one_of(st.lists(any_value, min_size=1, max_size=60), steady, two_humps, long_tail, all_the_same)
errors = st.sampled_from((0.5, 0.1, 0.05, DEFAULT_ERROR, 0.002))


def recorded(values: list[int], error: float = DEFAULT_ERROR) -> Histogram:
    histogram = Histogram(error)
    for value in values:
        histogram.record(value)
    return histogram


def exact_percentile(values: list[int], percent: float) -> float:
    """The percentile with linear interpolation, from the sorted values."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = ordered[int(rank)]
    return low + (rank - int(rank)) * (ordered[min(int(rank) + 1, len(ordered) - 1)] - low)


# ------------------------------------------------------------------------------------------------------------- buckets


@given(value=any_value, error=errors)
def test_a_value_lies_in_the_span_of_its_bucket(value: int, error: float) -> None:
    bits = bits_of(error)
    low, high = span_of(bucket_of(value, bits), bits)
    assert low <= value <= high
    assert abs((low + high) / 2 - value) <= error * value


@pytest.mark.parametrize("error", [0.5, 0.1, DEFAULT_ERROR])
def test_buckets_follow_each_other_without_gap(error: float) -> None:
    bits = bits_of(error)
    spans = [span_of(bucket, bits) for bucket in range(bucket_of(MAX_VALUE, bits) + 1)]
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(spans))
    assert spans[0][0] == 0
    assert spans[-1][1] == MAX_VALUE
    assert [bucket_of(low, bits) for low, _ in spans] == list(range(len(spans)))


@pytest.mark.parametrize(("error", "buckets"), [(0.5, 1), (0.25, 2), (0.1, 8), (0.01, 64), (0.001, 512)])
def test_an_octave_has_as_many_buckets_as_the_error_asks_for(error: float, buckets: int) -> None:
    assert 1 << bits_of(error) == buckets
    assert Histogram(error).error <= error


@pytest.mark.parametrize("error", [0, -0.01, 0.6, 0.0009, float("nan")])
def test_an_error_that_cannot_be_held_is_refused(error: float) -> None:
    with pytest.raises(ValueError, match="relative error"):
        Histogram(error)


# ------------------------------------------------------------------------------------------------------------- reading


@given(values=hard, error=errors)
def test_percentiles_are_within_the_error_of_the_exact_ones(values: list[int], error: float) -> None:
    histogram = recorded(values, error)
    for percent in PERCENTS:
        exact = exact_percentile(values, percent)
        found = histogram.percentile(percent)
        assert found is not None
        assert abs(found - exact) <= histogram.error * exact * (1 + 1e-9)


@given(values=hard)
def test_count_sum_and_mean_are_exact(values: list[int]) -> None:
    histogram = recorded(values)
    assert (histogram.count, histogram.total) == (len(values), sum(values))
    assert histogram.mean == sum(values) / len(values)


def test_without_values_there_is_nothing_to_read() -> None:
    histogram = Histogram()
    assert (histogram.count, histogram.total, histogram.mean, histogram.percentile(50)) == (0, 0, None, None)
    assert histogram.counts_up_to([0, MS]) == [0, 0]


@pytest.mark.parametrize("percent", [-1, 100.1, float("nan")])
def test_a_percentage_outside_of_the_scale_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        recorded([1]).percentile(percent)


@given(values=hard, buckets=st.lists(st.integers(0, bucket_of(MAX_VALUE - 1, 6) - 1), max_size=20))
def test_counts_up_to_the_end_of_a_bucket_are_exact(values: list[int], buckets: list[int]) -> None:
    bounds = sorted(span_of(bucket, 6)[1] for bucket in buckets)
    exact = [sum(value <= bound for value in values) for bound in bounds]
    assert recorded(values).counts_up_to(bounds) == exact


@given(values=hard, bound=st.integers(0, MAX_VALUE - 1))
def test_counts_up_to_any_bound_leave_out_at_most_its_bucket(values: list[int], bound: int) -> None:
    (found,) = recorded(values).counts_up_to([bound])
    low, _ = span_of(bucket_of(bound, 6), 6)
    assert sum(value < low for value in values) <= found <= sum(value <= bound for value in values)


# ----------------------------------------------------------------------------------------------------------- recording


@given(value=any_value, times=st.integers(0, 1000))
def test_a_value_can_be_counted_many_times_at_once(value: int, times: int) -> None:
    histogram = Histogram()
    histogram.record(value, times)
    assert histogram == recorded([value] * times)


@pytest.mark.parametrize(("value", "times"), [(-1, 1), (MAX_VALUE + 1, 1), (1, -1)])
def test_what_cannot_be_counted_is_refused_and_changes_nothing(value: int, times: int) -> None:
    histogram = recorded([5])
    with pytest.raises(ValueError, match=r"between|taken back"):
        histogram.record(value, times)
    assert histogram == recorded([5])


@given(values=hard)
def test_buckets_that_somebody_else_has_found_count_alike(values: list[int]) -> None:
    counts: dict[int, int] = {}
    for value in values:
        bucket = bucket_of(value, 6)
        counts[bucket] = counts.get(bucket, 0) + 1
    histogram = Histogram()
    histogram.record_buckets(counts, sum(values))
    assert histogram == recorded(values)


# ------------------------------------------------------------------------------------------------- merging and windows


@given(parts=st.lists(hard, min_size=1, max_size=5))
def test_workers_add_up_to_one_in_any_order(parts: list[list[int]]) -> None:
    whole = recorded([value for part in parts for value in part])
    forwards, backwards = Histogram(), Histogram()
    for part in parts:
        forwards.merge(recorded(part))
    for part in reversed(parts):
        backwards = recorded(part) + backwards
    assert forwards == backwards == whole
    assert [forwards.percentile(percent) for percent in PERCENTS] == [whole.percentile(percent) for percent in PERCENTS]


@given(one=hard, two=hard, three=hard)
def test_merging_is_associative_and_commutative(one: list[int], two: list[int], three: list[int]) -> None:
    a, b, c = recorded(one), recorded(two), recorded(three)
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + Histogram() == a
    assert a == recorded(one)


@given(before=hard, window=hard)
def test_a_window_is_the_difference_of_two_states(before: list[int], window: list[int]) -> None:
    histogram = recorded(before)
    mark = histogram.copy()
    for value in window:
        histogram.record(value)
    assert histogram - mark == recorded(window)
    assert mark == recorded(before)
    assert histogram - histogram == Histogram()


@given(values=hard, more=any_value)
def test_what_was_never_counted_cannot_be_taken_away(values: list[int], more: int) -> None:
    with pytest.raises(ValueError, match="no earlier state"):
        _ = recorded(values) - recorded([*values, more])


def test_a_larger_sum_cannot_be_taken_away() -> None:
    low, high = span_of(bucket_of(10 * MS, 6), 6)
    with pytest.raises(ValueError, match="no earlier state"):
        _ = recorded([low]) - recorded([high])


def test_a_sum_that_the_rest_cannot_have_is_no_window() -> None:
    low, high = span_of(bucket_of(10 * MS, 6), 6)
    with pytest.raises(ValueError, match="no earlier state"):
        _ = recorded([high]) - recorded([low])


def test_a_count_that_grows_while_it_is_read_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    histogram = recorded([7])
    real = accumulate

    def grows(counts: list[int]) -> list[int]:
        seen = list(real(counts))
        histogram.record(MAX_VALUE)
        return seen

    monkeypatch.setattr("tokenwire.core.histogram.accumulate", grows)
    assert histogram.counts_up_to([6, 7, MS]) == [0, 1, 1]


@given(value=any_value, times=st.integers(0, 10**40))
def test_huge_counts_are_exact_and_written_down(value: int, times: int) -> None:
    histogram = Histogram()
    histogram.record(value, times)
    assert (histogram.count, histogram.total) == (times, value * times)
    assert Histogram.decode(histogram.encode()) == histogram
    assert (histogram - histogram).count == 0


def test_histograms_of_different_errors_do_not_mix() -> None:
    fine, coarse = recorded([7], 0.01), recorded([7], 0.1)
    with pytest.raises(ValueError, match="cannot be counted"):
        fine.merge(coarse)
    with pytest.raises(ValueError, match="cannot be counted"):
        _ = fine - coarse
    assert fine != coarse
    assert fine != "a histogram"
    with pytest.raises(TypeError, match="unhashable"):
        hash(fine)


# --------------------------------------------------------------------------------------------------------- writing down


@given(values=st.lists(any_value, max_size=60), error=errors)
def test_what_was_written_down_reads_the_same(values: list[int], error: float) -> None:
    histogram = recorded(values, error)
    data = histogram.encode()
    assert Histogram.decode(data) == histogram
    assert Histogram.decode(data).encode() == data


def test_the_documented_bytes() -> None:
    histogram = recorded([0, 3, 3, 300])
    assert histogram.encode() == bytes((1, 6, 0xB2, 2, 0, 1, 2, 2, 0xC7, 1, 1))
    assert repr(histogram) == "Histogram(error=0.0078125, count=4, total=306)"


def test_a_day_of_tokens_is_written_in_few_bytes() -> None:
    histogram = Histogram()
    for gap in range(15 * MS, 45 * MS, 1000):
        histogram.record(gap, 1000)
    assert len(histogram.encode()) < 500


@given(data=st.binary(max_size=40))
def test_any_bytes_are_a_histogram_or_refused(data: bytes) -> None:
    try:
        histogram = Histogram.decode(data)
    except MalformedData:
        return
    assert Histogram.decode(histogram.encode()) == histogram


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x06",
        b"\x02\x06\x00",
        b"\x01\x0a\x00",
        b"\x01\x06\x80",
        b"\x01\x06\x00\x00",
        b"\x01\x06\x01\x00\x01",
        b"\x01\x06\x00\x00\x00",
        b"\x01\x06\x00\xff\xff\x7f\x01",
        b"\x01\x06" + b"\xff" * 40 + b"\x00",
        b"\x01\x06" + b"\xff" * 200 + b"\x00",
    ],
)
def test_what_is_no_histogram_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedData):
        Histogram.decode(data)
