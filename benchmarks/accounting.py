"""What it costs to count a token's latency, as ratios of medians in one run.

    python benchmarks/accounting.py --rounds 31 --check

Ours counts the token, its gap, their variance and maximum, and the gap in the histogram, from the time of arrival alone.
The peers are given the gap and do nothing but count it in their sketch, at the same relative error. Contenders are
interleaved (A B C, A B C, ...); each has a fresh object a round. Before anything is timed, each is asked for a percentile.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import accumulate, chain, pairwise

from tokenwire.core.latency import Trace

__all__ = ["MAX_OVER_DDSKETCH", "MAX_OVER_HDRH", "PACES", "failed_targets", "main", "measure"]

MAX_OVER_DDSKETCH = 0.7
MAX_OVER_HDRH = 0.4
TOKENS = 20_000
MS = 1_000_000

_OURS, _DDSKETCH, _HDRH = "tokenwire", "ddsketch", "hdrh"
_MODULES = {_OURS: "tokenwire", _DDSKETCH: "ddsketch", _HDRH: "hdrh"}

Ask = Callable[[float], float]
"""Gives a percentile."""


def _arrivals(gap: Callable[[random.Random], float]) -> list[int]:
    """Draw times of arrival, in nanoseconds."""
    source = random.Random(8)
    return list(accumulate((max(0, round(gap(source))) for _ in range(TOKENS)), initial=1000 * MS))


def _steps(source: random.Random) -> float:
    return source.gauss(20 * MS, MS / 50)


PACES = {
    "an engine's steps": _arrivals(_steps),
    "jitter": _arrivals(lambda source: source.uniform(10 * MS, 30 * MS)),
    "long tail": _arrivals(lambda source: source.lognormvariate(17, 0.5)),
    "four in a step": list(chain.from_iterable([now] * 4 for now in _arrivals(_steps)[: TOKENS // 4 + 1]))[
        : TOKENS + 1
    ],
    "bursts": _arrivals(lambda source: source.choice((20_000, 30_000, 40_000, 80 * MS))),
}
"""How tokens may come; by name, when they arrive."""


def _ours(arrivals: Sequence[int]) -> Ask:
    trace = Trace(arrivals[0])
    receive_token = trace.receive_token
    for now in arrivals:
        receive_token(now)
    return lambda percent: trace.ledger.event_gaps().percentile(percent) or 0.0


def _ddsketch(gaps: Sequence[int]) -> Ask:
    sketch = import_module("ddsketch").DDSketch(0.01)
    add = sketch.add
    for gap in gaps:
        add(gap)
    return lambda percent: float(sketch.get_quantile_value(percent / 100))


def _hdrh(gaps: Sequence[int]) -> Ask:
    histogram = import_module("hdrh.histogram").HdrHistogram(1, 3_600_000 * MS, 2)
    record_value = histogram.record_value
    for gap in gaps:
        record_value(gap)
    return lambda percent: float(histogram.get_value_at_percentile(percent))


def _contenders(arrivals: Sequence[int]) -> dict[str, Callable[[], Ask]]:
    gaps = [after - before for before, after in pairwise(arrivals)]
    return {_OURS: lambda: _ours(arrivals), _DDSKETCH: lambda: _ddsketch(gaps), _HDRH: lambda: _hdrh(gaps)}


def check(arrivals: Sequence[int]) -> None:
    """See to it that all say the same of the same gaps, before they are timed."""
    exact = sorted(after - before for before, after in pairwise(arrivals))[TOKENS // 2]
    for name, count in _contenders(arrivals).items():
        found = count()(50)
        assert abs(found - exact) <= 0.02 * exact + 1, f"{name} has a median of {found}, and it is {exact}"


def measure(arrivals: Sequence[int], rounds: int) -> dict[str, float]:
    """Nanoseconds per token of every contender, the median over the rounds."""
    check(arrivals)
    taken: dict[str, list[float]] = {name: [] for name in _MODULES}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, count in _contenders(arrivals).items():
                begun = time.perf_counter_ns()
                count()
                taken[name].append((time.perf_counter_ns() - begun) / TOKENS)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in taken.items()}


def failed_targets(pace: str, medians: dict[str, float]) -> list[str]:
    """What the project promises and these figures do not show, one sentence each."""
    promised = ((_DDSKETCH, MAX_OVER_DDSKETCH), (_HDRH, MAX_OVER_HDRH))
    ratios = [(peer, most, medians[_OURS] / medians[peer]) for peer, most in promised]
    return [f"{pace}: {ratio:.2f} times {peer}, over {most}" for peer, most, ratio in ratios if ratio > most]


def main(arguments: list[str]) -> int:
    """Runs the command line; with --check the exit code is 1 when a target was missed."""
    parser = argparse.ArgumentParser(description="Compare ways to count a token's latency.")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    options = parser.parse_args(arguments)
    if missing := [module for module in _MODULES.values() if importlib.util.find_spec(module) is None]:
        print(f"not installed: {', '.join(missing)}; see make bench", file=sys.stderr)
        return 1
    failures: list[str] = []
    print("ns/token".ljust(18), *(name.rjust(10) for name in (*_MODULES, "to dds", "to hdrh")))
    for pace, arrivals in PACES.items():
        medians = measure(arrivals, max(1, options.rounds))
        ratios = (medians[_OURS] / medians[_DDSKETCH], medians[_OURS] / medians[_HDRH])
        figures = (*(f"{median:10.0f}" for median in medians.values()), *(f"{ratio:10.2f}" for ratio in ratios))
        print(pace.ljust(18), *figures)
        failures += failed_targets(pace, medians) if options.check else []
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
