"""Whole servers compared: CPU per token, as a ratio to a C loop of the same sends, and memory per stream.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/server_cpu.py --runs 7 --streams 256 --seconds 6
    python benchmarks/server_cpu.py --runs 3 --only c_loop,granian,uvicorn

The runs are interleaved (A B C, A B C, ...), so that a noisy minute falls on all alike; each has a fresh server
process. The server is pinned to one core and the reader to another, where there are two. Times are comparable within
one invocation only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from command_line import cores, exit_on_sigterm, names_of
from load import LoadError, LoadResult
from servers import BASELINE, SERVERS, TARGETS, Site, StartError, available, prepare, running

__all__ = ["Figures", "failed_targets", "main", "measure"]

HERE = Path(__file__).resolve().parent
MAX_RATIO = 1.8
MAX_STREAM_BYTES = 10 * 1024
MAX_BYTES_APART = 0.02  # else the C loop does not make the same sends: see --payload
MAX_RUNS = 100
MAX_STREAMS = 8000
MAX_SECONDS = 120
MEMORY_WINDOW_S = 1
LOAD_TIMEOUT_S = 300.0  # over the sum of the reader's own deadlines


@dataclass(slots=True)
class Figures:
    """The runs of one server.

    Attributes:
        name: its key in `servers.SERVERS`.
        runs: one result per round at the full rate.
        memory: one result per round of the memory measurement.
    """

    name: str
    runs: list[LoadResult] = field(default_factory=list[LoadResult])
    memory: list[LoadResult] = field(default_factory=list[LoadResult])

    def token_us(self) -> list[float]:
        """CPU microseconds per token, one figure per run."""
        return [run.cpu_ns / run.tokens / 1000 for run in self.runs]

    def median_us(self) -> float:
        """The median of `token_us`."""
        return statistics.median(self.token_us())

    def token_bytes(self) -> float:
        """Bytes on the wire per token, the median over the runs."""
        return statistics.median(run.received / run.tokens for run in self.runs)

    def stream_bytes(self) -> float | None:
        """Resident bytes that a stream adds to the idle server, the median over its runs; None when not measured."""
        if not self.memory:
            return None
        return statistics.median((run.busy.rss - run.idle.rss) / run.streams for run in self.memory)


def measure(name: str, site: Site, client_core: int, load_arguments: list[str]) -> LoadResult:
    """Starts a server, and has its reader run beside it.

    Raises:
        LoadError: nothing was measured.
    """
    contain = [sys.executable, str(HERE / "contain.py"), str(client_core)]
    with running(name, site) as (pid, port):
        command = [*contain, sys.executable, str(HERE / "load.py"), "--pid", str(pid), "--port", str(port)]
        try:
            load = subprocess.run(command + load_arguments, capture_output=True, timeout=LOAD_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"{name}: the reader hung") from error
        log = (site.scratch / f"{name}.log").read_text(errors="replace")
    if load.returncode:
        raise LoadError(f"{name}: {load.stderr.decode(errors='replace').strip()}\n{log[-2000:]}")
    return msgspec.json.decode(load.stdout, type=LoadResult)


def _measure_all(options: argparse.Namespace, names: list[str], site: Site, client_core: int) -> list[Figures]:
    table = {name: Figures(name) for name in names}
    pause = ["--pause-ms", str(options.pause_ms)]
    full = ["--streams", str(options.streams), "--seconds", str(options.seconds), *pause]
    wide = ["--streams", str(options.memory_streams), "--seconds", str(MEMORY_WINDOW_S), *pause]
    for number in range(options.runs):
        for name in names:
            run = measure(name, site, client_core, full)
            table[name].runs.append(run)
            late = ", late" if run.late else ""
            print(f"run {number + 1} {name}: {table[name].token_us()[-1]:.2f} us per token{late}", file=sys.stderr)
    for number in range(options.memory_runs):
        for name in names:
            table[name].memory.append(measure(name, site, client_core, wide))
            print(f"memory run {number + 1} {name}", file=sys.stderr)
    return list(table.values())


def _ratio(figures: Figures, baseline: Figures | None) -> float | None:
    return figures.median_us() / baseline.median_us() if baseline else None


def _paired_ratio(figures: Figures, baseline: Figures | None) -> float | None:
    """The median over the rounds of each round's own ratio: what is left when the machine changes its pace."""
    if baseline is None:
        return None
    rounds = zip(figures.token_us(), baseline.token_us(), strict=True)
    return statistics.median(own / floor for own, floor in rounds)


def _baseline(table: list[Figures]) -> Figures | None:
    return next((figures for figures in table if figures.name == BASELINE), None)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _row(figures: Figures, baseline: Figures | None) -> list[str]:
    runs, token_us, held = figures.runs, figures.token_us(), figures.stream_bytes()
    return [
        figures.name,
        f"{figures.median_us():.2f}",
        f"{min(token_us):.2f}",
        f"{max(token_us):.2f}",
        _or_dash(_ratio(figures, baseline), ".2f"),
        _or_dash(_paired_ratio(figures, baseline), ".2f"),
        f"{statistics.median(run.tokens / run.seconds for run in runs):.0f}",
        f"{sum(run.late for run in runs)}/{len(runs)}",
        f"{figures.token_bytes():.1f}",
        f"{statistics.median(run.tokens / run.reads for run in runs):.2f}",
        f"{statistics.median(run.client_cpu_ns / run.seconds / 1e9 for run in runs):.0%}",
        _or_dash(held / 1024 if held is not None else None, ".1f"),
    ]


_HEADINGS = [
    "server", "us/token", "min", "max", "ratio", "paired", "tokens/s", "late",
    "B/token", "tokens/read", "reader CPU", "KiB/stream",
]  # fmt: skip


def _print_table(table: list[Figures]) -> None:
    rows = [_HEADINGS, *(_row(figures, _baseline(table)) for figures in table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))


def failed_targets(table: list[Figures]) -> list[str]:
    """What the project promises of its own servers and these figures do not show, one sentence each.

    A server or a memory figure that was not measured counts as a failure: nothing was shown.
    """
    baseline = _baseline(table)
    peers = [figures for figures in table if SERVERS[figures.name].peer]
    measured = {figures.name for figures in table}
    failures = [f"{name}: not measured" for name in SERVERS if name not in measured]
    for figures in (figures for figures in table if figures.name in TARGETS):
        ratio, held = _ratio(figures, baseline), figures.stream_bytes()
        if ratio is not None and ratio > MAX_RATIO:
            failures.append(f"{figures.name}: {ratio:.2f} times {BASELINE}, over {MAX_RATIO}")
        if held is None:
            failures.append(f"{figures.name}: memory not measured")
        elif held > MAX_STREAM_BYTES:
            failures.append(f"{figures.name}: {held:.0f} bytes a stream, over {MAX_STREAM_BYTES}")
        if baseline and abs(figures.token_bytes() / baseline.token_bytes() - 1) > MAX_BYTES_APART:
            failures.append(f"{figures.name}: {figures.token_bytes():.1f} bytes a token, {BASELINE} another number")
        if any(run.late for run in figures.runs):
            failures.append(f"{figures.name}: a run was late")
        failures.extend(
            f"{figures.name}: not below {peer.name}" for peer in peers if figures.median_us() >= peer.median_us()
        )
    return failures


def _write_json(path: Path, options: argparse.Namespace, table: list[Figures]) -> None:
    document = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "streams": options.streams,
        "seconds": options.seconds,
        "pinned": options.pin,
        "servers": [
            {
                "name": figures.name,
                "us_per_token": figures.median_us(),
                "ratio": _ratio(figures, _baseline(table)),
                "paired_ratio": _paired_ratio(figures, _baseline(table)),
                "bytes_per_stream": figures.stream_bytes(),
                "runs": [dataclasses.asdict(run) for run in figures.runs],
                "memory": [dataclasses.asdict(run) for run in figures.memory],
            }
            for figures in table
        ],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def _within(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}")
        return int(text)

    return parse


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare whole servers: CPU per token and memory per stream.")
    add = parser.add_argument
    add("--runs", type=_within(1, MAX_RUNS), default=7)
    add("--streams", type=_within(1, MAX_STREAMS), default=256)
    add("--seconds", type=_within(1, MAX_SECONDS), default=6, help="length of each measured window")
    add("--only", type=names_of(SERVERS), default=list(SERVERS), metavar="NAME,...", help=", ".join(SERVERS))
    add("--memory-streams", type=_within(1, MAX_STREAMS), default=1000)
    add("--memory-runs", type=_within(0, MAX_RUNS), default=1, help="0: do not measure memory")
    add("--pause-ms", type=_within(0, 40), default=0, help="the reader sleeps between looks; 0: each send may wake it")
    add("--pin", action=argparse.BooleanOptionalAction, default=len(os.sched_getaffinity(0)) > 1)
    add("--payload", type=Path, help="file with the bytes of one event, for the C loop and the peers")
    add("--peers-python", default=sys.executable, help="interpreter that has the peers installed")
    add("--skip-missing", action="store_true", help="leave out servers that are not installed")
    add("--check", action="store_true", help="exit with 1 where our own servers miss their targets")
    add("--json", type=Path, metavar="FILE", help="also write every run")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> list[Figures]:
    server_core, client_core = cores(options.pin)
    with tempfile.TemporaryDirectory(prefix="server-cpu-") as scratch:
        site = prepare(Path(scratch), options.peers_python, server_core, options.payload)
        names = available(options.only, SERVERS, site, skip_missing=options.skip_missing)
        return _measure_all(options, names, site, client_core)


def main(arguments: list[str]) -> int:
    """Runs the command line; the exit code is 1 when a server failed, or with --check missed a target."""
    options = _parse(arguments)
    exit_on_sigterm()
    try:
        table = _run(options)
    except (StartError, LoadError) as error:
        print(error, file=sys.stderr)
        return 1
    _print_table(table)
    if options.json:
        _write_json(options.json, options, table)
    failures = failed_targets(table) if options.check else []
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
