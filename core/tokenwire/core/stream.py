"""One stream on the producing side: whatever a backend says becomes a legal run of events.

A backend's author writes deltas and nothing else. `Stream` adds the StreamStart, assembles bytes to text, repairs
surrogates, stops at stop strings and token limits that the backend does not know, counts tokens, ends choices that a
StreamEnd leaves open, and reports usage before every terminal event. What it lets out follows the grammar of `states`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

from .errors import GrammarError
from .events import (
    TERMINALS,
    ChoiceEnd,
    Delta,
    Event,
    FinishReason,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamCancelled,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    Terminal,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from .states import Grammar, StreamState
from .text import StopScanner, Utf8Assembler, has_surrogates

__all__ = ["Item", "Stream"]

Item = Event | str | bytes
"""What a backend may hand over: an event, a str for a TextDelta of choice 0, or bytes of its UTF-8."""


_NEW: Final = StreamState.NEW
_BEGINNINGS: Final[frozenset[type]] = frozenset({StreamStart, *TERMINALS})
"""What may come first without a StreamStart of ours before it."""

_Cut = ReasoningDelta | RefusalDelta | ToolCallDelta
"""Deltas besides text that may cut a surrogate pair apart."""


class _Choice:
    """What one choice still holds back, and how much of it has been said."""

    __slots__ = ("assembler", "logprobs", "scanner", "tokens", "unsaid_tokens")

    def __init__(self, stops: Sequence[str]) -> None:
        self.assembler = Utf8Assembler()
        self.scanner = StopScanner(stops) if stops else None
        self.tokens = 0
        self.unsaid_tokens = 0
        self.logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def holds(self) -> bool:
        """Whether anything is held back that its end would let out."""
        return bool(self.unsaid_tokens or self.logprobs or self.assembler.holds)

    def passes(self, text: str) -> bool:
        """Whether text may leave as it came: there is some, it is whole, and nothing is held back or looked for."""
        return bool(text) and self.scanner is None and not self.holds and not has_surrogates(text)


class Stream:
    """A stream under the grammar.

    Args:
        start: the envelope; a StreamStart from the backend replaces its model, created and role. The id stays ours: by it
            the client was told of the stream (x-request-id) and will ask for it.
        stops: stop strings that the backend does not watch for itself.
        max_tokens: the most tokens a choice may have, where the backend does not count them itself.

    Attributes:
        start: the envelope as it was, or will be, let out.
        output_tokens: tokens let out so far, over all choices.
        usage: the latest usage let out, each count the largest seen, or None.
        terminal: the terminal event, once there is one.
        cut_short: whether the stream ended by a rule of ours while the backend may still be at work.
    """

    __slots__ = (
        "_choices",
        "_cut",
        "_fast",
        "_grammar",
        "_joiners",
        "_max_tokens",
        "_stops",
        "cut_short",
        "output_tokens",
        "start",
        "terminal",
        "usage",
    )

    def __init__(self, start: StreamStart, *, stops: Sequence[str] = (), max_tokens: int | None = None) -> None:
        self.start = start
        self.output_tokens = 0
        self.usage: UsageReport | None = None
        self.terminal: Terminal | None = None
        self.cut_short = False
        self._stops = stops
        self._max_tokens = max_tokens
        self._grammar = Grammar()
        self._choices: dict[int, _Choice] = {}
        self._cut: set[int] = set()
        self._joiners: dict[tuple[type[_Cut], int, int], tuple[_Cut, Utf8Assembler]] = {}
        self._fast = False

    @property
    def state(self) -> StreamState:
        """The stream's state in the grammar."""
        return self._grammar.state

    def accept(self, items: Sequence[Item]) -> Sequence[Event]:
        """Take what the backend said; let out what readers may hear.

        After the terminal event everything is dropped: an engine whose step was under way when its stream was
        cancelled has done nothing wrong.

        Args:
            items: in the order in which the backend said them.

        Returns:
            Events in legal order; may be empty, where text is held back.

        Raises:
            GrammarError: the backend broke the grammar. What came before the offender is lost with it; the caller ends
                the stream with a StreamError.
        """
        if self._fast and len(items) == 1:
            item = items[0]
            if type(item) is TextDelta and item.choice == 0:
                text = item.text
                if text and (text.isascii() or not has_surrogates(text)):
                    self.output_tokens += item.token_count
                    same: Any = items  # the one item is an Event, as just tested; a cast would cost a call a token
                    return same  # type: ignore[no-any-return]  # see above
        return self._accept(items)

    def _accept(self, items: Sequence[Item]) -> list[Event]:
        out: list[Event] = []
        for item in items:
            if self.terminal is not None:
                break
            take = self._TAKERS.get(type(item))
            if take is None:
                raise GrammarError(f"{type(item).__name__}, which is no event,", self._grammar.state.value)
            if self._grammar.state is _NEW and type(item) not in _BEGINNINGS:
                self._emit(self.start, out)
            take(self, item, out)
        if self.terminal is None:
            self._fast = (
                self.start.choices == 1
                and self._grammar.state is StreamState.OPEN
                and not self._stops
                and self._max_tokens is None
                and not any(choice.holds for choice in self._choices.values())
            )
        return out

    def _emit(self, event: Event, out: list[Event]) -> None:
        self._grammar.apply(event)
        out.append(event)

    def _take_start(self, start: StreamStart, out: list[Event]) -> None:
        if self._grammar.state is _NEW:
            own = self.start
            self.start = start = StreamStart(own.id, start.model, start.created, start.role, own.choices)
        self._emit(start, out)

    def _take_str(self, text: str, out: list[Event]) -> None:
        self._take_text(TextDelta(text), out)

    def _take_end(self, end: ChoiceEnd, out: list[Event]) -> None:
        if end.choice not in self._cut:
            self._flush(end.choice, out)
            self._emit(end, out)

    def _take_other(self, delta: Delta, out: list[Event]) -> None:
        if delta.choice in self._cut:
            return
        self._emit(self._repaired(delta), out)
        tokens: int = getattr(delta, "token_count", 0)
        if tokens:
            self._count(delta.choice, tokens, out)

    def _repaired(self, event: Delta) -> Delta:
        """Join surrogates that a delta besides text cuts apart, and replace those that stay alone.

        A half at the end of a delta is held for the next of its kind, and replaced where there is none.
        """
        if isinstance(event, TextDelta | ToolCallStart | ProviderData):
            return event
        text = event.arguments if isinstance(event, ToolCallDelta) else event.text
        key = (type(event), event.choice, getattr(event, "call_index", 0))
        if key not in self._joiners:
            if not has_surrogates(text):
                return event
            self._joiners[key] = (event, Utf8Assembler())
        return _with_text(event, self._joiners[key][1].repair(text), event.token_count)

    def _flush_joiners(self, number: int, out: list[Event]) -> None:
        for key in [key for key in self._joiners if key[1] == number]:
            first, joiner = self._joiners.pop(key)
            rest = joiner.flush()
            if rest:
                self._emit(_with_text(first, rest, 0), out)

    def _choice(self, number: int) -> _Choice:
        choice = self._choices.get(number)
        if choice is None:
            choice = self._choices[number] = _Choice(self._stops)
        return choice

    def _take_bytes(self, data: bytes, out: list[Event]) -> None:
        if 0 in self._cut:
            return
        choice = self._choice(0)
        self._say(0, choice, choice.assembler.receive_data(data), 1, None, out)

    def _take_text(self, delta: TextDelta, out: list[Event]) -> None:
        number = delta.choice
        if number in self._cut:
            return
        choice = self._choice(number)
        if choice.passes(delta.text):
            self._emit(delta, out)
            self._count(number, delta.token_count, out)
        else:
            text = choice.assembler.repair(delta.text)
            self._say(number, choice, text, delta.token_count, delta.logprobs, out)

    def _say(
        self,
        number: int,
        choice: _Choice,
        text: str,
        tokens: int,
        logprobs: tuple[TokenLogprob, ...] | None,
        out: list[Event],
    ) -> None:
        """Let text out as far as the stop strings allow, with the tokens and logprobs that it stands for."""
        stop = None
        if choice.scanner is not None:
            text = choice.scanner.scan(text)
            stop = choice.scanner.stop
        choice.unsaid_tokens += tokens
        if logprobs:
            choice.logprobs = (choice.logprobs or ()) + logprobs
        if text or choice.logprobs or stop is not None:
            self._let_out(number, choice, text, out)
        if stop is not None:
            self._cut_choice(ChoiceEnd(number, FinishReason.STOP_SEQUENCE, stop), out)
        else:
            self._count(number, 0, out)

    def _let_out(self, number: int, choice: _Choice, text: str, out: list[Event]) -> None:
        tokens, choice.unsaid_tokens = choice.unsaid_tokens, 0
        logprobs, choice.logprobs = choice.logprobs, None
        if text or logprobs:
            self._emit(TextDelta(text, number, tokens, logprobs), out)
        self.output_tokens += tokens
        choice.tokens += tokens

    def _count(self, number: int, tokens: int, out: list[Event]) -> None:
        """Count tokens of a choice, and cut it where a limit of ours is reached."""
        self.output_tokens += tokens
        choice = self._choice(number)
        choice.tokens += tokens
        limit = self._max_tokens
        if limit is not None and choice.tokens + choice.unsaid_tokens >= limit:
            self._flush(number, out)
            self._cut_choice(ChoiceEnd(number, FinishReason.LENGTH), out)

    def _cut_choice(self, end: ChoiceEnd, out: list[Event]) -> None:
        self._emit(end, out)
        self._cut.add(end.choice)
        if self._grammar.state is StreamState.COMPLETE:
            self.cut_short = True
            self._take_terminal(StreamEnd(), out)

    def _flush(self, number: int, out: list[Event]) -> None:
        """Let out what a choice holds back, because it ends."""
        if self._joiners:
            self._flush_joiners(number, out)
        choice = self._choices.get(number)
        if choice is None or (choice.scanner is None and not choice.holds):
            return
        text = choice.assembler.flush()
        if choice.scanner is not None:
            text = choice.scanner.scan(text) + choice.scanner.flush()
        self._let_out(number, choice, text, out)

    def _take_usage(self, usage: UsageReport, out: list[Event]) -> None:
        before = self.usage
        if before is not None:
            usage = UsageReport(*map(max, _counts(before), _counts(usage)))
        self.usage = usage
        self._emit(usage, out)

    def _take_terminal(self, terminal: Terminal, out: list[Event]) -> None:
        if self._grammar.state is _NEW and isinstance(terminal, StreamEnd):
            self._emit(self.start, out)
        for number in self._grammar.open_choices():
            self._flush(number, out)
            if isinstance(terminal, StreamEnd):
                called = self._grammar.calls_of(number)
                self._emit(ChoiceEnd(number, FinishReason.TOOL_CALLS if called else FinishReason.STOP), out)
        if self._grammar.state is not _NEW and self.usage is None:
            self._take_usage(UsageReport(0, self.output_tokens), out)
        self._emit(terminal, out)
        self.terminal = terminal
        self._fast = False

    _TAKERS: ClassVar[dict[type, Callable[[Stream, Any, list[Event]], None]]] = {
        str: _take_str,
        bytes: _take_bytes,
        StreamStart: _take_start,
        TextDelta: _take_text,
        ReasoningDelta: _take_other,
        RefusalDelta: _take_other,
        ToolCallStart: _take_other,
        ToolCallDelta: _take_other,
        ProviderData: _take_other,
        UsageReport: _take_usage,
        ChoiceEnd: _take_end,
        StreamEnd: _take_terminal,
        StreamError: _take_terminal,
        StreamCancelled: _take_terminal,
        StreamTruncated: _take_terminal,
    }
    """What takes an item, by its class."""


def _counts(usage: UsageReport) -> tuple[int, int, int, int, int]:
    return (
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
    )


def _with_text(event: _Cut, text: str, tokens: int) -> _Cut:
    if isinstance(event, ToolCallDelta):
        return ToolCallDelta(event.call_index, text, event.choice, tokens)
    return type(event)(text, event.choice, tokens)
