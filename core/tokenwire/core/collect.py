"""Events folded into one whole result: what a client gets that did not ask for a stream.

Folding follows the merge law: a run and any merging of it fold to the same Result.
"""

from __future__ import annotations

from msgspec import Struct

from .events import (
    ChoiceEnd,
    Event,
    FinishReason,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamStart,
    Terminal,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from .request import ToolCall
from .states import Grammar

__all__ = ["ChoiceResult", "Collector", "Result"]


class ChoiceResult(Struct, frozen=True):
    """One choice, whole."""

    index: int
    """Its number, from 0."""
    text: str = ""
    """All of its text."""
    reasoning: str = ""
    """All of its reasoning."""
    refusal: str = ""
    """All of its refusal."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Its tool calls, in the order of their indexes."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry a token, or None where none came."""
    reason: FinishReason | None = None
    """Why it ended, or None where the stream broke off first."""
    stop_sequence: str | None = None
    """The stop string that ended it, where one did."""
    provider_data: tuple[ProviderData, ...] = ()
    """What came for one provider only, in order."""


class Result(Struct, frozen=True):
    """A whole stream."""

    start: StreamStart | None
    """The envelope, or None where the stream failed before it."""
    choices: tuple[ChoiceResult, ...]
    """The choices by their numbers."""
    usage: UsageReport | None
    """The last usage, or None."""
    terminal: Terminal | None
    """How it ended, or None where it has not."""


class _Call:
    __slots__ = ("arguments", "call_id", "name")

    def __init__(self, call_id: str, name: str) -> None:
        self.call_id = call_id
        self.name = name
        self.arguments: list[str] = []

    def result(self) -> ToolCall:
        return ToolCall(self.call_id, self.name, "".join(self.arguments))


class _Choice:
    __slots__ = ("calls", "end", "logprobs", "provider_data", "reasoning", "refusal", "text")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.calls: dict[int, _Call] = {}
        self.logprobs: list[TokenLogprob] | None = None
        self.provider_data: list[ProviderData] = []
        self.end: ChoiceEnd | None = None

    def receive(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.text.append(event.text)
                if event.logprobs is not None:
                    self.logprobs = self.logprobs or []
                    self.logprobs += event.logprobs
            case ReasoningDelta():
                self.reasoning.append(event.text)
            case RefusalDelta():
                self.refusal.append(event.text)
            case ToolCallStart():
                self.calls[event.call_index] = _Call(event.call_id, event.name)
            case ToolCallDelta():
                self.calls[event.call_index].arguments.append(event.arguments)
            case ProviderData():
                self.provider_data.append(event)
            case ChoiceEnd():
                self.end = event
            case _:
                raise AssertionError(f"{type(event).__name__} belongs to no choice")

    def result(self, index: int) -> ChoiceResult:
        return ChoiceResult(
            index,
            "".join(self.text),
            "".join(self.reasoning),
            "".join(self.refusal),
            tuple(self.calls[number].result() for number in sorted(self.calls)),
            None if self.logprobs is None else tuple(self.logprobs),
            self.end.reason if self.end else None,
            self.end.stop_sequence if self.end else None,
            tuple(self.provider_data),
        )


class Collector:
    """Folds events as they come.

    It walks the grammar itself, so that it cannot build a result from an illegal run.
    """

    __slots__ = ("_choices", "_grammar", "_start", "_terminal", "_usage")

    def __init__(self) -> None:
        self._grammar = Grammar()
        self._start: StreamStart | None = None
        self._choices: dict[int, _Choice] = {}
        self._usage: UsageReport | None = None
        self._terminal: Terminal | None = None

    @property
    def ended(self) -> bool:
        """Whether the terminal event has come."""
        return self._terminal is not None

    def receive(self, event: Event) -> None:
        """Fold one event in.

        Raises:
            GrammarError: the event is not allowed now; the collector is as it was.
        """
        self._grammar.apply(event)
        if isinstance(event, StreamStart):
            self._start = event
            self._choices = {number: _Choice() for number in range(event.choices)}
        elif isinstance(event, UsageReport):
            self._usage = event
        elif isinstance(event, Terminal):
            self._terminal = event
        else:
            self._choices.setdefault(event.choice, _Choice()).receive(event)

    def result(self) -> Result:
        """Build what has come so far."""
        choices = tuple(self._choices[number].result(number) for number in sorted(self._choices))
        return Result(self._start, choices, self._usage, self._terminal)
