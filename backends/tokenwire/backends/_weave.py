"""Several choices, each made by a generator of its own, as one stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from tokenwire.core.events import TERMINALS, ErrorKind, StreamEnd, StreamError, StreamStart, TextDelta, UsageReport
from tokenwire.core.text import Utf8Assembler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenwire.core.events import Event
    from tokenwire.core.stream import Item

__all__ = ["Weave"]


class Weave:
    """Joins the runs of several choices into one stream: one numbering, one usage report, one terminal event.

    Attributes:
        ended: whether the terminal event has come.
    """

    __slots__ = ("_assemblers", "_open", "_usage", "ended")

    def __init__(self, choices: int) -> None:
        self.ended = False
        self._open = set(range(choices))
        self._assemblers = [Utf8Assembler() for _ in range(choices)]
        self._usage: dict[int, UsageReport] = {}

    def take(self, choice: int, items: Iterable[Item]) -> list[Item]:
        """Take what a choice's run said, give what the stream says."""
        out: list[Item] = []
        for item in items:
            if self.ended or choice not in self._open:
                break
            self._take(choice, item, out)
        return out

    def _take(self, choice: int, item: Item, out: list[Item]) -> None:
        if isinstance(item, str):
            out.append(TextDelta(item, choice))
        elif isinstance(item, bytes):
            out.append(TextDelta(self._assemblers[choice].receive_data(item), choice))
        elif isinstance(item, UsageReport):
            self._usage[choice] = item
        elif isinstance(item, StreamEnd):
            self._end(choice, out)
        elif isinstance(item, TERMINALS):
            self._finish(item, out)
        elif not isinstance(item, StreamStart):  # the stream's own has as many choices as were asked for
            self._relabel(choice, item, out)

    def _relabel(self, choice: int, item: Event, out: list[Item]) -> None:
        if getattr(item, "choice", 0):
            message = "The backend wrote to a choice of its own while it was asked for one."
            self._finish(StreamError(ErrorKind.SERVER, message), out)
        else:
            out.append(msgspec.structs.replace(item, choice=choice))

    def _end(self, choice: int, out: list[Item]) -> None:
        rest = self._assemblers[choice].flush()
        if rest:
            out.append(TextDelta(rest, choice, 0))
        self._open.discard(choice)
        if not self._open:
            self._finish(StreamEnd(), out)

    def _finish(self, terminal: Event, out: list[Item]) -> None:
        if self._usage:
            out.append(_sum(list(self._usage.values())))
        out.append(terminal)
        self.ended = True


def _sum(reports: list[UsageReport]) -> UsageReport:
    """Add the usage of choices up: the prompt is the same one, what was generated is not."""
    return UsageReport(
        max(report.input_tokens for report in reports),
        sum(report.output_tokens for report in reports),
        max(report.cached_tokens for report in reports),
        max(report.cache_write_tokens for report in reports),
        sum(report.reasoning_tokens for report in reports),
    )
