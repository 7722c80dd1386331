"""`tokenwire bench codec`: what framing a token costs on this machine, beside the floor and the peers installed here.

Every contender is checked, then timed in interleaved rounds, each from a fresh start: a machine that is busy for a while
is busy for all of them. Reported is the median of the rounds, in nanoseconds a token.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from ._codec_cases import CASES, FLOOR, OWN, Case, check
from ._codec_chart import draw_svg, wrap_html

__all__ = [
    "DEFAULT_ROUNDS",
    "CaseReport",
    "Measured",
    "Report",
    "measure",
    "print_table",
    "to_html",
    "to_json",
    "to_svg",
]

DEFAULT_ROUNDS: Final = 31
"""Rounds of a case: an odd number, so that the median is one of them."""

_PEERS: Final = ("sse-starlette", "fastapi", "pydantic", "orjson", "wsproto", "websockets", "httpx-sse", "openai")


class Measured(Struct, frozen=True):
    """One contender of one case."""

    contender: str
    """Its name."""
    ns_per_token: float
    """The median of the rounds."""
    fastest_ns_per_token: float
    """The fastest round."""
    times_floor: float
    """The median over the floor's."""
    times_tokenwire: float | None
    """The median over tokenwire's, where it takes part."""


class CaseReport(Struct, frozen=True):
    """One case."""

    title: str
    """What was done."""
    floor: str
    """What the floor does."""
    measured: tuple[Measured, ...]
    """The floor first, then by time."""


class Report(Struct, frozen=True):
    """Everything that was measured, and where."""

    python: str
    """The interpreter and its version."""
    machine: str
    """The operating system and the processor."""
    versions: dict[str, str]
    """tokenwire and the peers that are installed."""
    missing: tuple[str, ...]
    """The peers that are not."""
    rounds: int
    """Rounds of each case."""
    cases: tuple[CaseReport, ...]
    """In the order in which they are shown."""


def measure(rounds: int = DEFAULT_ROUNDS, *, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Check and time every contender that is installed.

    Args:
        rounds: how often each does its workload.
        progress: is told each case's title before it is timed.

    Raises:
        CheckError: a contender's results are wrong.
    """
    cases: list[CaseReport] = []
    for case in CASES:
        progress(case.title)
        cases.append(_measure_case(case, rounds))
    versions = {name: version for name in (OWN, *_PEERS) if (version := _version(name))}
    missing = tuple(name for name in _PEERS if name not in versions)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    machine = f"{platform.system()} on {platform.machine()}"
    return Report(python, machine, versions, missing, rounds, tuple(cases))


def to_json(report: Report) -> bytes:
    """Write a report as JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def to_svg(report: Report) -> str:
    """Draw a report as one SVG document that needs nothing beside it."""
    groups = [(case.title, case.floor, _bars(case)) for case in report.cases]
    legend = "Time a token, median, on a logarithmic axis; the line is the floor, and 2.0x is twice the floor."
    return draw_svg("What framing a token costs", f"{legend} {_subtitle(report)}", groups)


def to_html(report: Report) -> str:
    """Draw a report as one HTML document that needs nothing beside it."""
    return wrap_html("tokenwire bench codec", to_svg(report))


def print_table(report: Report) -> None:
    """Print a report.

    Raises:
        ImportError: rich is not installed.
    """
    # rich has types; what is missing is rich itself, where the extra `cli` was not asked for.
    console: Any = importlib.import_module("rich.console").Console()
    table: Any = importlib.import_module("rich.table").Table(title="ns a token, median", title_style="bold")
    for heading in ("", "ns", "x floor", "x tokenwire"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for case in report.cases:
        table.add_section()
        table.add_row(f"[bold]{case.title}[/]")
        for measured in case.measured:
            table.add_row(*_row(measured), style=_STYLES.get(measured.contender))
    console.print(table)
    console.print(_subtitle(report), style="dim", highlight=False)


_STYLES: Final = {OWN: "green", FLOOR: "dim"}


def _row(measured: Measured) -> tuple[str, str, str, str]:
    own = "" if measured.times_tokenwire is None else f"{measured.times_tokenwire:.1f}"
    return f"  {measured.contender}", f"{measured.ns_per_token:,.0f}", f"{measured.times_floor:.1f}", own


def _subtitle(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    missing = f"; not installed: {', '.join(report.missing)}" if report.missing else ""
    return f"{report.python}, {report.machine}, {report.rounds} rounds; {versions}{missing}"


def _bars(case: CaseReport) -> list[tuple[str, float, bool]]:
    return [(measured.contender, measured.ns_per_token, measured.contender == OWN) for measured in case.measured]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _measure_case(case: Case, rounds: int) -> CaseReport:
    names = [name for name, contender in case.contenders.items() if contender.is_installed]
    for name in names:
        check(case, name)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        gc.collect()
        for name in _rotated(names, number):
            samples[name].append(_time(case, name))
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    measured = [_measured(name, samples[name], medians) for name in names]
    measured.sort(key=lambda one: (one.contender != FLOOR, one.ns_per_token))
    return CaseReport(case.title, case.floor, tuple(measured))


def _rotated(names: Sequence[str], by: int) -> list[str]:
    """Let each contender come after every other, for what ran before leaves the caches in its own state."""
    at = by % len(names)
    return [*names[at:], *names[:at]]


def _measured(name: str, taken: Sequence[float], medians: dict[str, float]) -> Measured:
    median = medians[name]
    own = medians.get(OWN)
    return Measured(name, median, min(taken), median / medians[FLOOR], None if own is None else median / own)


def _time(case: Case, name: str) -> float:
    """Time one round, in nanoseconds a token, without the collector."""
    work = case.contenders[name].start()
    gc.disable()
    try:
        begin = time.perf_counter_ns()
        results = work()
        end = time.perf_counter_ns()
    finally:
        gc.enable()
    return (end - begin) / len(results)
