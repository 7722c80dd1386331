"""Whole servers compared: CPU per token, as a ratio to a C loop of the same sends, and memory per stream.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/server_cpu.py --runs 7 --streams 256 --seconds 6
    python benchmarks/server_cpu.py --runs 3 --only c_loop,granian,uvicorn

The runs are interleaved (A B C, A B C, ...), so that a noisy minute falls on all alike; each has a fresh server process. The
server is pinned to one core and the reader to another, where there are two. Times are comparable within one invocation only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from load import LoadError, LoadResult
from servers import BASELINE, SERVERS, TARGETS, Site, StartError, missing_modules, prepare, running

__all__ = ["Figures", "failed_targets", "main"]

HERE = Path(__file__).resolve().parent
MAX_RATIO = 1.8
MAX_STREAM_BYTES = 10 * 1024
MAX_RUNS = 100
MAX_STREAMS = 8000
MAX_SECONDS = 120.0
MEMORY_WINDOW_S = 1.0


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

    def stream_bytes(self) -> float | None:
        """Resident bytes that a stream adds to the idle server, the median over its runs; None when not measured."""
        if not self.memory:
            return None
        return statistics.median((run.busy.rss - run.idle.rss) / run.streams for run in self.memory)


def _measure(name: str, site: Site, client_core: int, load_arguments: list[str]) -> LoadResult:
    contain = [sys.executable, str(HERE / "contain.py"), str(client_core)]
    with running(name, site) as (pid, port):
        command = [*contain, sys.executable, str(HERE / "load.py"), "--pid", str(pid), "--port", str(port)]
        load = subprocess.run(command + load_arguments, capture_output=True, timeout=300, check=False)
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
            run = _measure(name, site, client_core, full)
            table[name].runs.append(run)
            late = ", late" if run.late else ""
            print(f"run {number + 1} {name}: {table[name].token_us()[-1]:.2f} us per token{late}", file=sys.stderr)
    for number in range(options.memory_runs):
        for name in names:
            table[name].memory.append(_measure(name, site, client_core, wide))
            print(f"memory run {number + 1} {name}", file=sys.stderr)
    return list(table.values())


def _ratio(figures: Figures, baseline: Figures | None) -> float | None:
    return figures.median_us() / baseline.median_us() if baseline else None


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
        f"{statistics.median(run.tokens / run.seconds for run in runs):.0f}",
        f"{sum(run.late for run in runs)}/{len(runs)}",
        f"{statistics.median(run.received / run.tokens for run in runs):.1f}",
        f"{statistics.median(run.tokens / run.reads for run in runs):.2f}",
        f"{statistics.median(run.client_cpu_ns / run.seconds / 1e9 for run in runs):.0%}",
        _or_dash(held / 1024 if held is not None else None, ".1f"),
    ]


_HEADINGS = [
    "server", "us/token", "min", "max", "ratio", "tokens/s", "late", "B/token", "tokens/read", "reader CPU", "KiB/stream",
]  # fmt: skip


def _print_table(table: list[Figures]) -> None:
    rows = [_HEADINGS, *(_row(figures, _baseline(table)) for figures in table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))


def failed_targets(table: list[Figures]) -> list[str]:
    """What the project promises of its own servers and these figures do not show, one sentence each."""
    baseline = _baseline(table)
    peers = [figures for figures in table if SERVERS[figures.name].peer]
    failures: list[str] = []
    for figures in (figures for figures in table if figures.name in TARGETS):
        ratio, held = _ratio(figures, baseline), figures.stream_bytes()
        if ratio is not None and ratio > MAX_RATIO:
            failures.append(f"{figures.name}: {ratio:.2f} times {BASELINE}, over {MAX_RATIO}")
        if held is not None and held > MAX_STREAM_BYTES:
            failures.append(f"{figures.name}: {held:.0f} bytes a stream, over {MAX_STREAM_BYTES}")
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
                "bytes_per_stream": figures.stream_bytes(),
                "runs": [dataclasses.asdict(run) for run in figures.runs],
                "memory": [dataclasses.asdict(run) for run in figures.memory],
            }
            for figures in table
        ],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def _available(names: list[str], site: Site, skip_missing: bool) -> list[str]:
    missing = {name: modules for name in names if (modules := missing_modules(SERVERS[name], site))}
    if missing and not skip_missing:
        lines = "\n".join(f"{name} needs {', '.join(modules)}" for name, modules in missing.items())
        python = site.peers_python if any(SERVERS[name].peer for name in missing) else site.python
        requirements = HERE / "requirements.txt"
        raise StartError(f"{lines}\ninstall with: {python} -m pip install -e . -r {os.path.relpath(requirements)}")
    for name, modules in missing.items():
        print(f"skipped {name}: {', '.join(modules)} not installed", file=sys.stderr)
    return [name for name in names if name not in missing]


def _bounded(low: float, high: float) -> type[float]:
    class Bounded(float):
        def __new__(cls, text: str) -> Bounded:
            value = super().__new__(cls, text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}")
            return value

    return Bounded
