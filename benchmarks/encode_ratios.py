"""What it costs to encode a token, as ratios of medians in one run.

    python benchmarks/encode_ratios.py --rounds 200 --check

The contenders are interleaved (A B C, A B C, ...), so that a noisy moment falls on all alike. Times are comparable within
one invocation only.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time

from encode import CONTENDERS
from workloads import WORKLOADS

__all__ = ["MAX_OVER_BARE", "MIN_UNDER_SSE_STARLETTE", "failed_targets", "main", "measure"]

MAX_OVER_BARE = 3.0
MIN_UNDER_SSE_STARLETTE = 20.0
WORKLOAD = "prose"

_OURS, _BARE, _SSE_STARLETTE = "tokenwire", "bare concatenation", "sse-starlette over json.dumps"


def measure(workload: str, rounds: int) -> dict[str, float]:
    """Nanoseconds per token of every contender, the median over the rounds; a fresh encoder each round."""
    tokens = WORKLOADS[workload]
    prepared = {name: [way.prepare(token) for token in tokens] for name, way in CONTENDERS.items()}
    taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, way in CONTENDERS.items():
                encode, items = way.start(), prepared[name]
                begun = time.perf_counter_ns()
                wire = encode(items)
                taken[name].append((time.perf_counter_ns() - begun) / len(wire))
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in taken.items()}


def failed_targets(medians: dict[str, float]) -> list[str]:
    """What the project promises and these figures do not show, one sentence each."""
    over, under = medians[_OURS] / medians[_BARE], medians[_SSE_STARLETTE] / medians[_OURS]
    failures: list[str] = []
    if over > MAX_OVER_BARE:
        failures.append(f"{over:.2f} times {_BARE}, over {MAX_OVER_BARE}")
    if under < MIN_UNDER_SSE_STARLETTE:
        failures.append(f"{under:.1f} times under {_SSE_STARLETTE}, less than {MIN_UNDER_SSE_STARLETTE}")
    return failures


def _print_table(medians: dict[str, float]) -> None:
    width = max(map(len, medians))
    print("".ljust(width), "ns/token".rjust(9), "to bare".rjust(8), "to tokenwire".rjust(13))
    for name, median in medians.items():
        ratios = f"{median / medians[_BARE]:8.2f} {median / medians[_OURS]:13.2f}"
        print(name.ljust(width), f"{median:9.0f}", ratios)


def main(arguments: list[str]) -> int:
    """Runs the command line; with --check the exit code is 1 when a target was missed."""
    parser = argparse.ArgumentParser(description="Compare ways to encode a token.")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--workload", choices=WORKLOADS, default=WORKLOAD)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    options = parser.parse_args(arguments)
    if missing := sorted({way.module for way in CONTENDERS.values() if not way.is_installed}):
        print(f"not installed: {', '.join(missing)}; see make bench", file=sys.stderr)
        return 1
    medians = measure(options.workload, options.rounds)
    _print_table(medians)
    failures = failed_targets(medians) if options.check else []
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
