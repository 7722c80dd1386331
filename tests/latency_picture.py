"""One trace as a picture and as a table: what happened, and what each definition makes of it.

python -m tests.latency_picture      writes docs/latency.svg; the table is in docs/latency.md, and test_latency_docs reads it
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Final, NamedTuple

from tokenwire.core.definitions import by_tool
from tokenwire.core.events import ChoiceEnd, Event, ReasoningDelta, StreamEnd, StreamStart, TextDelta, UsageReport
from tokenwire.core.latency import Trace

__all__ = ["PICTURE", "TEXT", "drawn", "rows"]

DOCS: Final = Path(__file__).parents[1] / "docs"
PICTURE: Final = DOCS / "latency.svg"
TEXT: Final = DOCS / "latency.md"

_MS: Final = 1_000_000
_ACCEPTED: Final = 5
_STARTED: Final = 60
_BEATS: Final = 420


class Mark(NamedTuple):
    """Something that happened."""

    at_ms: int
    kind: str
    """Its class in the picture."""
    events: tuple[Event, ...]
    words: str


MARKS: Final = (
    Mark(100, "role", (StreamStart("s", "m", 0),), "role"),
    Mark(180, "reasoning", (ReasoningDelta("Hm, "),), "Hm,"),
    Mark(220, "reasoning", (ReasoningDelta("well."),), "well."),
    Mark(300, "text", (TextDelta("Once upon a", token_count=3),), "Once upon a"),
    Mark(340, "text", (TextDelta(" time"),), "time"),
    Mark(370, "text", (TextDelta(" there"),), "there"),
    Mark(500, "text", (TextDelta(" was"),), "was"),
    Mark(540, "text", (TextDelta(" one.", token_count=2),), "one."),
    Mark(570, "role", (ChoiceEnd(),), "stop"),
    Mark(590, "usage", (UsageReport(7, 10), StreamEnd()), "usage, end"),
)

_SHOWN: Final = (
    ("queue", _ACCEPTED, _STARTED, "ours", "queue: whole request to the backend's start"),
    ("ttft", 0, 100, "other", "TTFT as vLLM's benchmark has it: the role chunk stops the clock"),
    ("ttft", 0, 180, "ours", "TTFT here, AIPerf, GuideLLM, MLPerf: the first token event"),
    ("ttft", 0, 300, "other", "TTFT as SGLang and llmperf have it; TTFO elsewhere: reasoning does not count"),
    ("second", 180, 220, "ours", "second token (TTST)"),
    ("stall", 370, 500, "ours", "longest stall; the heartbeat in it is no token"),
    ("span", 180, 540, "ours", "TPOT here: this span by n - k = 9 tokens, for k = 1 came at its begin"),
    ("span", 100, 570, "other", "TPOT as vLLM has it: this span by n - 1"),
    ("span", 0, 540, "other", "TPOT as GuideLLM has it: this span by n, the first token's wait included"),
    ("e2e", 0, 590, "ours", "E2E here; tools end it at the last token, the stop or the usage"),
)

_WIDTH: Final = 1060
_LEFT: Final = 24
_SCALE: Final = 1.66
_AXIS: Final = 150
_ROW: Final = 34
_STYLE: Final = """
svg { font: 13px system-ui, sans-serif; --ink: #1c2430; --soft: #5b6675; --line: #c9d0d9; --own: #0a7f5a; --other: #8093ad;
  --text: #0a7f5a; --reasoning: #7c4dbe; --role: #c2410c; --usage: #5b6675; --page: #fff; background: var(--page); }
@media (prefers-color-scheme: dark) { svg { --ink: #e6eaf0; --soft: #9aa5b5; --line: #3a4452; --own: #34c38f; --other: #7a8ca6;
  --text: #34c38f; --reasoning: #b794f6; --role: #fb923c; --usage: #9aa5b5; --page: #12161c; } }
text { fill: var(--ink); } .soft { fill: var(--soft); font-size: 11.5px; } .title { font-size: 19px; font-weight: 600; }
.axis { stroke: var(--line); } .ours { fill: var(--own); } .other { fill: var(--other); } .text { fill: var(--text); }
.reasoning { fill: var(--reasoning); } .role { fill: var(--role); } .usage { fill: var(--usage); } .beat { fill: none;
  stroke: var(--soft); } .drop { stroke: var(--line); stroke-dasharray: 2 4; }
""".strip()


def _trace() -> Trace:
    trace = Trace(0)
    trace.accept(_ACCEPTED * _MS)
    trace.start(_STARTED * _MS)
    trace.receive_bytes(MARKS[0].at_ms * _MS)
    for mark in MARKS:
        trace.receive(mark.events, mark.at_ms * _MS)
    trace.close("finished", MARKS[-1].at_ms * _MS)
    return trace


def rows() -> list[str]:
    """Write the table's rows: tool, metric, milliseconds or the bare number."""
    written: list[str] = []
    for tool, metrics in by_tool(_trace()).items():
        for metric, value in metrics.items():
            time = metric.endswith("_ns")
            shown = "-" if value is None else f"{value / _MS:.2f} ms" if time else f"{value:.2f}"
            written.append(f"| {tool} | {metric.removesuffix('_ns')} | {shown} |")
    return written


def _x(at_ms: float) -> float:
    return round(_LEFT + at_ms * _SCALE, 1)


def _marks(bottom: int) -> list[str]:
    body: list[str] = []
    for number, mark in enumerate(MARKS):
        x, y = _x(mark.at_ms), _AXIS - 34 - 22 * (number % 2)
        body += [
            f'<line class="drop" x1="{x}" y1="{y + 5}" x2="{x}" y2="{bottom}"/>',
            f'<circle class="{mark.kind}" cx="{x}" cy="{_AXIS}" r="{7 if mark.kind in ("text", "reasoning") else 5}"/>',
            f'<text class="soft" x="{x}" y="{y}" text-anchor="middle">{escape(mark.words)}</text>',
            f'<text class="soft" x="{x}" y="{_AXIS + 24}" text-anchor="middle">{mark.at_ms}</text>',
        ]
    x = _x(_BEATS)
    body += [
        f'<circle class="beat" cx="{x}" cy="{_AXIS}" r="5"/>',
        f'<text class="soft" x="{x}" y="{_AXIS - 34}" text-anchor="middle">heartbeat</text>',
    ]
    return body


def _bars(top: int) -> list[str]:
    body: list[str] = []
    for number, (_, begin, end, whose, words) in enumerate(_SHOWN):
        y, width = top + number * _ROW, round((end - begin) * _SCALE, 1)
        body += [
            f'<rect class="{whose}" x="{_x(begin)}" y="{y + 16}" width="{width}" height="7" rx="3"/>',
            f'<text x="{_x(begin)}" y="{y + 11}">{escape(words)} <tspan class="soft">{end - begin} ms</tspan></text>',
        ]
    return body


def drawn() -> str:
    """Draw the picture."""
    top = _AXIS + 44
    height = top + _ROW * len(_SHOWN) + 14
    says = "Milliseconds since the request. Filled: what arrived, as it arrived. n = 10 tokens in 7 token events."
    body = [
        '<text class="title" x="24" y="34">One stream, and what it is said to have taken</text>',
        f'<text class="soft" x="24" y="56">{says} Green bars: how tokenwire counts. Grey bars: how others do.</text>',
        f'<line class="axis" x1="{_x(0)}" y1="{_AXIS}" x2="{_x(600)}" y2="{_AXIS}"/>',
        *_marks(height - 8),
        *_bars(top),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">'
    )
    return "\n".join([head, f"<style>{_STYLE}</style>", *body, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
