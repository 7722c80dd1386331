"""What a token costs on its way through the bundled server, as one table that `test_counts` asserts.

python -m tests.cost_sheet      writes docs/cost-sheet.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from tests.hot_path import ROWS, Row

from tokenwire.core.gaps import RUN

__all__ = ["BEYOND_ASCII", "COSTS", "LIMITS", "PATH", "Cost", "Limit", "calls_of", "python_calls", "sheet"]

PATH: Final = Path(__file__).parents[1] / "docs/cost-sheet.md"


class Cost(NamedTuple):
    """One call on a token's way."""

    stage: str
    """The stage of the line."""
    caller: str
    """The function that calls a C function; "" for a call of a Python function."""
    callee: str
    """What is called, by its qualified name."""
    counts: tuple[int, int, int, int, int, int]
    """How often per token, for each of ROWS: openai_chat chunked, bare; plain chunked, bare, objects, text."""


COSTS: Final = (
    Cost("engine (mock)", "_advance", "list.append", (2, 2, 2, 2, 2, 2)),
    Cost("grammar", "", "Stream.accept", (1, 1, 1, 1, 1, 1)),
    Cost("grammar", "Stream.accept", "len", (1, 1, 1, 1, 1, 1)),
    Cost("grammar", "Stream.accept", "str.isascii", (1, 1, 1, 1, 1, 1)),
    Cost("delivery", "", "StreamDelivery.deliver", (1, 1, 1, 1, 1, 1)),
    Cost("delivery", "StreamDelivery.deliver", "len", (3, 3, 3, 3, 3, 3)),
    Cost("accountant", "StreamDelivery.deliver", "list.append", (1, 1, 1, 1, 1, 1)),
    Cost("dialect and framing", "", "Folded.encode", (1, 1, 1, 1, 1, 0)),
    Cost("dialect and framing", "", "escape_ascii", (0, 0, 1, 1, 1, 0)),
    Cost("dialect and framing", "escape_ascii", "str.isascii", (0, 0, 1, 1, 1, 0)),
    Cost("dialect and framing", "escape_ascii", "Encoder.encode", (0, 0, 1, 1, 1, 0)),
    Cost("dialect and framing", "Folded.encode", "Encoder.encode", (1, 1, 0, 0, 0, 0)),
    Cost("dialect and framing", "Folded.encode", "len", (1, 1, 2, 2, 1, 0)),
    Cost("dialect and framing", "Folded.encode", "bytes.join", (1, 1, 1, 1, 1, 0)),
    Cost("dialect and framing", "", "_BareText.encode", (0, 0, 0, 0, 0, 1)),
    Cost("dialect and framing", "", "_escape", (0, 0, 0, 0, 0, 1)),
    Cost("dialect and framing", "_escape", "str.encode", (0, 0, 0, 0, 0, 1)),
    Cost("dialect and framing", "_BareText.encode", "len", (0, 0, 0, 0, 0, 1)),
    Cost("dispatcher", "Dispatcher._feed", "list.append", (1, 1, 1, 1, 1, 1)),
    Cost("byte path", "", "BytePath.write", (1, 1, 1, 1, 1, 1)),
    Cost("byte path", "BytePath.write", "write", (1, 1, 1, 1, 1, 1)),
    Cost("byte path", "BytePath.write", "len", (1, 1, 1, 1, 1, 1)),
)
"""Every call that a token of ASCII text makes, from the engine's step to the kernel; nothing else is called."""

BEYOND_ASCII: Final = (
    Cost("grammar", "", "has_surrogates", (1, 1, 1, 1, 1, 1)),
    Cost("grammar", "has_surrogates", "str.isascii", (1, 1, 1, 1, 1, 1)),
    Cost("grammar", "has_surrogates", "Pattern.search", (1, 1, 1, 1, 1, 1)),
    Cost("dialect and framing", "escape_ascii", "Encoder.encode", (0, 0, -1, -1, -1, 0)),
    Cost("dialect and framing", "escape_ascii", "encode_basestring_ascii", (0, 0, 1, 1, 1, 0)),
    Cost("dialect and framing", "escape_ascii", "str.encode", (0, 0, 1, 1, 1, 0)),
)
"""What a token with a character beyond ASCII adds."""


class Limit(NamedTuple):
    """A count that is the same for all of ROWS."""

    most: int
    what: str
    buys: str


LIMITS: Final = {
    "tasks": Limit(
        0,
        "tasks started or woken per token",
        "No coroutine is resumed for a token. On asyncio a step runs no task, on trio one, which keeps the time.",
    ),
    "token timers": Limit(
        0,
        "timers of the loop per token",
        "Heartbeats and patience are deadlines that move without telling anybody; a timer looks at them when it fires.",
    ),
    "step timers": Limit(1, "timers of the loop per step of the mock", "The engine's own: its next step."),
    "wakes": Limit(0, "wake-ups per step of an engine on the loop's thread", "A step is a callback like any other."),
    "thread wakes": Limit(
        1,
        "wake-ups per step of an engine on a thread of its own",
        "All streams of the step cross in one batch, through `Mailbox`.",
    ),
    "writes": Limit(
        1,
        "system calls per token",
        "The `write` itself. Chunk size, event and line ends leave together, and nobody asks first whether there is room.",
    ),
    "blocks kept": Limit(
        0,
        "blocks of memory that a token leaves behind",
        "A stream of a million tokens holds what one of ten does; the collector of cycles has nothing to look at.",
    ),
    "blocks held": Limit(
        1,
        "blocks of memory that a token holds until its step is written",
        "Its wire bytes: they are joined once from the stream's constants and go to the kernel as they are.",
    ),
    "stream bytes": Limit(
        8192,
        "bytes of Python's memory per open stream, at most",
        "Connection, request, grammar, delivery, encoder and the mock's own; the sockets' memory is the kernel's.",
    ),
    "idle WebSocket bytes": Limit(
        6144,
        "bytes of Python's memory per open WebSocket on which nothing happens, at most",
        "The handshake's headers above all, for they hold for every prompt; there is no buffer until there is something in it.",
    ),
}
"""What is counted besides calls."""


def calls_of(row: Row, *, beyond_ascii: bool = False, engine: bool = True) -> dict[tuple[str, str], int]:
    """Say what a token calls: how often, by (caller, callee).

    Args:
        row: what the stream speaks.
        beyond_ascii: whether the token's text is.
        engine: whether the mock's own calls are among them.
    """
    calls: dict[tuple[str, str], int] = {}
    at = ROWS.index(row)
    for cost in (*COSTS, *(BEYOND_ASCII if beyond_ascii else ())):
        if engine or cost.caller != "_advance":
            key = (cost.caller, cost.callee)
            calls[key] = calls.get(key, 0) + cost.counts[at]
    return {call: count for call, count in calls.items() if count}


def python_calls(costs: tuple[Cost, ...], at: int) -> int:
    """Count the calls of Python functions, for the row at an index."""
    return sum(cost.counts[at] for cost in costs if not cost.caller)


def _c_calls(costs: tuple[Cost, ...], at: int) -> int:
    return sum(cost.counts[at] for cost in costs if cost.caller)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _call_rows(costs: tuple[Cost, ...]) -> list[str]:
    rows: list[str] = []
    for cost in costs:
        call = f"`{cost.callee}` from `{cost.caller}`" if cost.caller else f"**`{cost.callee}`**"
        rows.append(_row(cost.stage, call, *(count or "" for count in cost.counts)))
    return rows


def _sum_rows(costs: tuple[Cost, ...]) -> list[str]:
    every = range(len(ROWS))
    return [
        _row("all", "**Python functions**", *(python_calls(costs, at) for at in every)),
        _row("all", "C functions", *(_c_calls(costs, at) for at in every)),
    ]


def sheet() -> str:
    """Write the document."""
    more = python_calls(BEYOND_ASCII, 0)
    lines = [
        "# What a token costs",
        "",
        "Written by `make cost-sheet` from the table that `tests/test_counts.py` asserts: change the code, and the test",
        "says which line of this sheet is no longer true. These are counts and not times, so no machine and no noise can",
        "touch them; `make bench` measures the times.",
        "",
        "Counted is one token of text in steady state: from the engine's step, in which every stream has a token, to the",
        "kernel. CPython 3.11, 3.12 and 3.13 count the same.",
        "",
        "## Besides calls",
        "",
        "| count | of what | what it buys |",
        "| ---: | --- | --- |",
        *(_row(limit.most, limit.what, limit.buys) for limit in LIMITS.values()),
        "",
        "## Calls",
        "",
        "Python functions stand in bold: each is a frame, and costs several times what a C function does. Constructs that",
        "call nothing, such as an addition, a comparison or an attribute, are not counted by Python itself.",
        "",
        _row("stage", "call", *ROWS),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *_call_rows(COSTS),
        *_sum_rows(COSTS),
        "",
        f"A token with a character beyond ASCII makes {more} Python call more, because only then may a surrogate stand in",
        "it. The plain dialect then escapes with the standard library's C function instead of msgspec's:",
        "",
        _row("stage", "more calls", *ROWS),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *_call_rows(BEYOND_ASCII),
        "",
        "The framing costs no call of its own: HTTP's chunk size comes from a table, and its line ends are part of the",
        "stream's constants. The plain dialect's further C call counts the digits of an event's number. The accountant",
        f"notes when the token came; after {RUN} tokens it adds up their gaps, the longest one and their variance, and counts",
        "them in a histogram, once for all streams that were served in step. It reads no clock.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(sheet(), encoding="utf-8")
