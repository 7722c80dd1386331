"""What counting latencies costs a whole server: CPU per token with it, as a ratio to CPU per token without.

    python benchmarks/accounting_cpu.py --runs 7 --streams 256 --seconds 4 --check

The runs are interleaved, with and without in turn, each in a fresh server process; see server_cpu.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from command_line import cores
from server_cpu import measure
from servers import SERVERS, Server, Site, prepare

__all__ = ["MAX_RATIO", "main"]

MAX_RATIO = 1.05


def _with(flag: str, loop: str) -> Callable[[Site, int], list[str]]:
    start = SERVERS[f"tokenwire-{loop}"].command
    return lambda site, port: [*start(site, port), flag]


def main(arguments: list[str]) -> int:
    """Runs the command line; with --check the exit code is 1 when the target was missed."""
    parser = argparse.ArgumentParser(description="Compare a server that counts latencies with one that does not.")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), default="asyncio")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the target is missed")
    options = parser.parse_args(arguments)
    for flag in ("--accounting", "--no-accounting"):
        SERVERS[flag] = Server(_with(flag, options.loop))
    server_core, client_core = cores(pin=True)
    load = ["--streams", str(options.streams), "--seconds", str(options.seconds), "--pause-ms", "0"]
    taken: dict[str, list[float]] = {"--accounting": [], "--no-accounting": []}
    with tempfile.TemporaryDirectory(prefix="accounting-cpu-") as scratch:
        site = prepare(Path(scratch), sys.executable, server_core, None)
        for number in range(options.runs):
            for flag, figures in taken.items():
                run = measure(flag, site, client_core, load)
                figures.append(run.cpu_ns / run.tokens / 1000)
                print(f"run {number + 1} {flag}: {figures[-1]:.2f} us per token", file=sys.stderr)
    with_it, without = (statistics.median(figures) for figures in taken.values())
    paired = statistics.median(a / b for a, b in zip(*taken.values(), strict=True))
    print(f"with {with_it:.2f} us, without {without:.2f} us: {with_it / without:.3f}, by rounds {paired:.3f}")
    return 1 if options.check and min(with_it / without, paired) > MAX_RATIO else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
