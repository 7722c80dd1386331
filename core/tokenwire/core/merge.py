"""The merge law: how a run of events becomes a shorter run that says the same.

The law. Deltas of different (choice, call) commute. Within one key order is kept, and neighbours of one kind merge to
the concatenated text, the summed token count and the joined logprobs. A UsageReport merges to the later one. Nothing
else merges. So merging any run changes nothing that a reader accumulates, and merging is associative: a run may be cut
anywhere, merged piece by piece, and merged again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from .events import (
    Event,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    UsageReport,
)

__all__ = ["MergeBuffer", "may_merge", "merge_run"]

_CONSOLIDATE_AT: Final = 256
"""Pieces of one delta that are joined at once, so that a thousand tiny strings do not each cost a string's overhead."""

_ENTRY_BYTES: Final = 64
_LOGPROB_BYTES: Final = 64
"""Flat sums: the order of magnitude of a short frame, and of one token with its probability."""

_Text = TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta
_TEXTS: Final = (TextDelta, ReasoningDelta, RefusalDelta, ToolCallDelta)
_Key = tuple[int, int | None]

_USAGE: Final[_Key] = (-1, None)
_STREAM: Final[_Key] = (-2, None)


class _Growing:
    """A delta that still grows: the pieces of its text, joined once when it is asked for."""

    __slots__ = ("_alone", "_first", "_logprobs", "_pieces", "_tokens")

    def __init__(self, first: _Text) -> None:
        self._first = first
        self._alone = True
        self._pieces = [_text_of(first)]
        self._tokens = first.token_count
        self._logprobs = list(_logprobs_of(first))

    def takes(self, event: _Text) -> bool:
        """Say whether an event of the same key is of the same kind."""
        return type(event) is type(self._first)

    def add(self, event: _Text) -> None:
        self._alone = False
        self._pieces.append(_text_of(event))
        self._tokens += event.token_count
        self._logprobs += _logprobs_of(event)
        if len(self._pieces) >= _CONSOLIDATE_AT:
            self._pieces = ["".join(self._pieces)]

    def event(self) -> _Text:
        """Build the merged delta."""
        first = self._first
        if self._alone:
            return first
        text = "".join(self._pieces)
        if isinstance(first, TextDelta):
            return TextDelta(text, first.choice, self._tokens, tuple(self._logprobs) or None)
        if isinstance(first, ToolCallDelta):
            return ToolCallDelta(first.call_index, text, first.choice, self._tokens)
        return type(first)(text, first.choice, self._tokens)


class MergeBuffer:
    """Events that wait for a reader, merged under the law as they come, each with the number of the last it holds.

    Args:
        ordered: merge neighbours only, and never move an event before one of another key. For dialects that number
            their events, where an event's number promises that all before it has been seen.

    Attributes:
        pending_bytes: about what waits will take on the wire: the UTF-8 size of all text, and a flat sum for each event
            that could not be merged and for each logprob; what a byte budget is held against.
    """

    __slots__ = ("_entries", "_last", "_numbers", "_ordered", "pending_bytes")

    def __init__(self, *, ordered: bool = False) -> None:
        self._ordered = ordered
        self._entries: list[_Growing | Event] = []
        self._numbers: list[int] = []
        self._last: dict[_Key, int] = {}
        self.pending_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, event: Event, number: int = 0) -> None:
        """Append one event, merging it into an earlier one where the law allows.

        Args:
            event: the next event of the run.
            number: its number in the stream; an entry keeps the latest number that was merged into it.
        """
        key = _key_of(event)
        self.pending_bytes += _weight(event)
        index = self._last.get(key)
        if index is None or (self._ordered and index != len(self._entries) - 1):
            self._append(event, number, key)
        elif self._merged(index, event):
            self._numbers[index] = number
        else:
            self._append(event, number, key)

    def seal(self) -> None:
        """Let nothing that comes later merge into what is here: a first token is never merged with the second."""
        self._last = {}

    def drain(self) -> list[tuple[Event, int]]:
        """Hand out what waits with its numbers, in order, and forget it."""
        events = [entry.event() if isinstance(entry, _Growing) else entry for entry in self._entries]
        run = list(zip(events, self._numbers, strict=True))
        self._entries = []
        self._numbers = []
        self._last = {}
        self.pending_bytes = 0
        return run

    def _merged(self, index: int, event: Event) -> bool:
        entry = self._entries[index]
        if isinstance(event, UsageReport):
            self._entries[index] = event
            return True
        if isinstance(entry, _Growing) and isinstance(event, _TEXTS) and entry.takes(event):
            entry.add(event)
            return True
        return False

    def _append(self, event: Event, number: int, key: _Key) -> None:
        self.pending_bytes += _ENTRY_BYTES
        self._last[key] = len(self._entries)
        self._entries.append(_Growing(event) if isinstance(event, _TEXTS) else event)
        self._numbers.append(number)


def may_merge(events: Sequence[Event]) -> bool:
    """Say whether there may be something to merge in a run: two events of one class."""
    return len(set(map(type, events))) < len(events)


def merge_run(events: Iterable[Event], *, ordered: bool = False) -> list[Event]:
    """Merge a run of events under the law.

    Args:
        events: a run as `Stream.accept` lets it out.
        ordered: merge neighbours only; see `MergeBuffer`.

    Returns:
        The shortest run that accumulates to the same.
    """
    buffer = MergeBuffer(ordered=ordered)
    for event in events:
        buffer.add(event)
    return [event for event, _ in buffer.drain()]


def _key_of(event: Event) -> _Key:
    """Name what an event keeps its order with: its choice, its call, the usage, or nothing but the stream itself."""
    if isinstance(event, UsageReport):
        return _USAGE
    choice: int | None = getattr(event, "choice", None)
    return _STREAM if choice is None else (choice, getattr(event, "call_index", None))


def _weight(event: Event) -> int:
    """Estimate what an event adds to the wire, its own frame apart."""
    if isinstance(event, ProviderData):
        return len(event.value)
    if not isinstance(event, _TEXTS):
        return 0
    alternatives = sum(1 + len(logprob.top) for logprob in _logprobs_of(event))
    return len(_text_of(event).encode("utf-8", "surrogatepass")) + alternatives * _LOGPROB_BYTES


def _text_of(event: _Text) -> str:
    return event.arguments if isinstance(event, ToolCallDelta) else event.text


def _logprobs_of(event: _Text) -> tuple[TokenLogprob, ...]:
    return (event.logprobs or ()) if isinstance(event, TextDelta) else ()
