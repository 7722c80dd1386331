"""One chart of grouped bars on a logarithmic axis, as SVG text: no library, no script, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from textwrap import wrap
from typing import Final

__all__ = ["draw_svg", "wrap_html"]

Bar = tuple[str, float, bool]
"""A label, nanoseconds, and whether it is ours. The first of a group is its floor."""
Group = tuple[str, str, Sequence[Bar]]
"""A title, what the floor does, and the bars."""

_WIDTH: Final = 980
_LEFT: Final = 170
_RIGHT: Final = 132
_BAR: Final = 15
_STEP: Final = 21
_HEAD: Final = 26
_GAP: Final = 18

# Colours of both schemes are chosen for contrast; the scheme follows the reader's.
_STYLE: Final = """
svg { font: 13px system-ui, sans-serif; --ink: #1c2430; --soft: #5b6675; --line: #d8dde4; --own: #0a7f5a; --bar: #9fb1c8;
  --floor: #c2410c; --page: #fff; background: var(--page); }
@media (prefers-color-scheme: dark) { svg { --ink: #e6eaf0; --soft: #9aa5b5; --line: #333c49; --own: #34c38f; --bar: #52647d;
  --floor: #fb923c; --page: #12161c; } }
text { fill: var(--ink); } .soft { fill: var(--soft); font-size: 11.5px; } .title { font-size: 20px; font-weight: 600; }
.group { font-weight: 600; } .bar { fill: var(--bar); } .own { fill: var(--own); } .grid { stroke: var(--line); }
.floor { stroke: var(--floor); stroke-width: 2; } .floorname { fill: var(--floor); } .ours { font-weight: 600; }
""".strip()


def draw_svg(title: str, subtitle: str, groups: Sequence[Group]) -> str:
    """Draw groups of bars.

    Args:
        title: what the chart shows.
        subtitle: where it was measured; wrapped.
        groups: from top to bottom; the first bar of each is drawn as a line through its group.

    Returns:
        An SVG document.
    """
    lines = wrap(subtitle, 150)
    top = 74 + 16 * len(lines)
    height = top + sum(_height(bars) for _, _, bars in groups) + 8
    low, high = _span(groups)
    body = [
        f'<text class="title" x="16" y="32">{escape(title)}</text>',
        *(f'<text class="soft" x="16" y="{52 + 16 * at}">{escape(line)}</text>' for at, line in enumerate(lines)),
        *_grid(low, high, top, height),
    ]
    y = top + 14
    for name, floor, bars in groups:
        body += _group(name, floor, bars, y, low, high)
        y += _height(bars)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">'
    return "\n".join((head, f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", *body, "</svg>", ""))


def wrap_html(title: str, svg: str) -> str:
    """Put a chart on a page of its own."""
    style = ":root { color-scheme: light dark; } body { margin: 0 auto; max-width: 1100px; }"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{style}</style></head>\n<body>\n{svg}</body></html>\n'


def _height(bars: Sequence[Bar]) -> int:
    return _HEAD + _STEP * (len(bars) - 1) + _GAP


def _span(groups: Sequence[Group]) -> tuple[float, float]:
    """Find the axis' ends as powers of ten: from a whole one to the longest bar."""
    values = [value for _, _, bars in groups for _, value, _ in bars]
    low = math.floor(math.log10(min(values)))
    return low, max(math.log10(max(values)), low + 1)


def _x(value: float, low: float, high: float) -> float:
    share = (math.log10(value) - low) / (high - low)
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _grid(low: float, high: float, top: int, height: int) -> Iterator[str]:
    for power in range(math.floor(low), math.floor(high) + 1):
        x = _x(10.0**power, low, high)
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{top - 6}" y2="{height - 12}"/>'
        yield f'<text class="soft" x="{x}" y="{top - 12}" text-anchor="middle">{_duration(10.0**power)}</text>'


def _group(name: str, floor: str, bars: Sequence[Bar], y: int, low: float, high: float) -> Iterator[str]:
    floor_x = _x(bars[0][1], low, high)
    begin = y + _HEAD
    end = begin + _STEP * (len(bars) - 1)
    about = f"floor {_duration(bars[0][1])}: {floor}"
    yield f'<text class="group" x="16" y="{y + 12}">{escape(name)}</text>'
    yield f'<text class="soft floorname" x="{_WIDTH - 16}" y="{y + 12}" text-anchor="end">{escape(about)}</text>'
    for at, (label, value, own) in enumerate(bars[1:]):
        yield from _bar(
            label, f"{_duration(value)} · {value / bars[0][1]:.1f}x", own, begin + _STEP * at, _x(value, low, high)
        )
    yield f'<line class="floor" x1="{floor_x}" x2="{floor_x}" y1="{begin - 5}" y2="{end - 1}"/>'


def _bar(label: str, value: str, own: bool, y: int, end: float) -> Iterator[str]:
    kind = "own" if own else "bar"
    text = ' class="ours"' if own else ""
    yield f'<text{text} x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>'
    yield f'<rect class="{kind}" x="{_LEFT}" y="{y}" width="{round(end - _LEFT, 1)}" height="{_BAR}" rx="2"/>'
    yield f'<text{text} x="{end + 6}" y="{y + 12}">{escape(value)}</text>'


def _duration(ns: float) -> str:
    """Say a time with three digits at most."""
    for size, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"
