"""The grammar of a token stream: one table, and the machine that walks it.

Rules of this file:

1. `TRANSITIONS` is the whole grammar. A state that is not a key takes nothing; an input that is not in a state's row is
   a GrammarError. Nowhere else in tokenwire is a transition decided.
2. A stream is three kinds of machine side by side: the stream's own, one for each choice, one for each tool call. An
   event moves the machines that `Grammar.apply` names for its class, all of them or none.
3. Two inputs are not events. LAST_CHOICE_END stands for the ChoiceEnd after which no choice is open. CHOICE_OPENS stands
   for the first event of a choice that the StreamStart did not announce (StreamStart.choices == 0: a decoder's stream).
4. Every state but a terminal one takes StreamError, StreamCancelled and StreamTruncated: failure may come at any time,
   also before the StreamStart. No terminal state takes anything: a stream has exactly one terminal event.

`draw()` writes the table as a diagram; docs/states.md holds its output and a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, cast

from .errors import GrammarError
from .events import (
    DELTAS,
    ChoiceEnd,
    Event,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamCancelled,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)

__all__ = [
    "MAX_CALLS",
    "MAX_CHOICES",
    "TRANSITIONS",
    "CallState",
    "ChoiceState",
    "Grammar",
    "Pseudo",
    "StreamState",
    "draw",
]

MAX_CHOICES: Final = 128
"""The most choices a stream may have: OpenAI's own limit for n, and a bound on what a hostile upstream can open."""

MAX_CALLS: Final = 128
"""The most tool calls a choice may have: OpenAI's limit for tools in one request."""


class StreamState(Enum):
    """Where the stream as a whole is."""

    __hash__ = object.__hash__  # by identity, in C: Enum's own calls Python, and the table is asked for each event

    NEW = "new"
    """Nothing has come."""
    OPEN = "open"
    """Begun, and a choice is open or still to come."""
    COMPLETE = "complete"
    """Every choice has ended; the terminal event is due."""
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TRUNCATED = "truncated"


class ChoiceState(Enum):
    """Where one choice is."""

    __hash__ = object.__hash__  # by identity, in C: Enum's own calls Python, and the table is asked for each event

    UNKNOWN = "unknown choice"
    """Not among the choices that the StreamStart announced."""
    OPEN = "open choice"
    ENDED = "ended choice"


class CallState(Enum):
    """Where one tool call is."""

    __hash__ = object.__hash__  # by identity, in C: Enum's own calls Python, and the table is asked for each event

    ABSENT = "absent call"
    STARTED = "started call"


class Pseudo(Enum):
    """Inputs that are not events by themselves (rule 3)."""

    __hash__ = object.__hash__  # by identity, in C: Enum's own calls Python, and the table is asked for each event

    LAST_CHOICE_END = "last ChoiceEnd"
    CHOICE_OPENS = "choice opens"


State = StreamState | ChoiceState | CallState
Input = type[Event] | Pseudo

_FAILURES: Final[dict[Input, State]] = {
    StreamError: StreamState.FAILED,
    StreamCancelled: StreamState.CANCELLED,
    StreamTruncated: StreamState.TRUNCATED,
}

TRANSITIONS: Final[dict[State, dict[Input, State]]] = {
    StreamState.NEW: {StreamStart: StreamState.OPEN, **_FAILURES},
    StreamState.OPEN: {
        TextDelta: StreamState.OPEN,
        ReasoningDelta: StreamState.OPEN,
        RefusalDelta: StreamState.OPEN,
        ToolCallStart: StreamState.OPEN,
        ToolCallDelta: StreamState.OPEN,
        ProviderData: StreamState.OPEN,
        UsageReport: StreamState.OPEN,
        ChoiceEnd: StreamState.OPEN,
        Pseudo.CHOICE_OPENS: StreamState.OPEN,
        Pseudo.LAST_CHOICE_END: StreamState.COMPLETE,
        **_FAILURES,
    },
    StreamState.COMPLETE: {
        UsageReport: StreamState.COMPLETE,
        Pseudo.CHOICE_OPENS: StreamState.OPEN,
        StreamEnd: StreamState.FINISHED,
        **_FAILURES,
    },
    ChoiceState.OPEN: {
        TextDelta: ChoiceState.OPEN,
        ReasoningDelta: ChoiceState.OPEN,
        RefusalDelta: ChoiceState.OPEN,
        ToolCallStart: ChoiceState.OPEN,
        ToolCallDelta: ChoiceState.OPEN,
        ProviderData: ChoiceState.OPEN,
        ChoiceEnd: ChoiceState.ENDED,
    },
    CallState.ABSENT: {ToolCallStart: CallState.STARTED},
    CallState.STARTED: {ToolCallDelta: CallState.STARTED, ProviderData: CallState.STARTED},
}
"""The grammar: state, then input, then next state."""

_TERMINAL: Final = frozenset(
    {StreamState.FINISHED, StreamState.FAILED, StreamState.CANCELLED, StreamState.TRUNCATED},
)

_OF_A_CHOICE = TextDelta | ReasoningDelta | RefusalDelta | ToolCallStart | ToolCallDelta | ProviderData | ChoiceEnd
_OF_A_CALL = ToolCallStart | ToolCallDelta | ProviderData
_KINDS_OF_A_CHOICE: Final[frozenset[type]] = frozenset({*DELTAS, ChoiceEnd})

_OPEN: Final = StreamState.OPEN
_CHOICE_OPEN: Final = ChoiceState.OPEN


_ROWS: Final[Mapping[State, Mapping[Input, Any]]] = TRANSITIONS
"""The same; a row's states are of its own machine, which its type above does not say."""

_NO_ROW: Final[Mapping[Input, Any]] = {}


def _step(state: State, event: Input, key: str = "") -> Any:
    """Look one transition up.

    Returns:
        The next state of the same machine.

    Raises:
        GrammarError: the state's row does not have the input.
    """
    following = _ROWS.get(state, _NO_ROW).get(event)
    if following is None:
        name = event.value if isinstance(event, Pseudo) else event.__name__
        raise GrammarError(name, state.value, key)
    return following


class Grammar:
    """The machines of one stream. `apply` is the only way to move them."""

    __slots__ = ("_announced", "_calls", "_choices", "_open", "state")

    def __init__(self) -> None:
        self.state: StreamState = StreamState.NEW
        self._announced = 0
        self._choices: dict[int, ChoiceState] = {}
        self._calls: set[tuple[int, int]] = set()
        self._open = 0

    @property
    def ended(self) -> bool:
        """Whether the terminal event has come."""
        return self.state in _TERMINAL

    def choice_state(self, choice: int) -> ChoiceState:
        """Say where a choice is; a choice that was never announced is UNKNOWN, or OPEN where none is announced."""
        known = self._choices.get(choice)
        if known is not None:
            return known
        may_open = not self._announced and self.state is not StreamState.NEW and 0 <= choice < MAX_CHOICES
        return ChoiceState.OPEN if may_open else ChoiceState.UNKNOWN

    def open_choices(self) -> list[int]:
        """List the choices that a delta may still come for, in order."""
        return sorted(choice for choice, state in self._choices.items() if state is _CHOICE_OPEN) if self._open else []

    def calls_of(self, choice: int) -> int:
        """Count the tool calls that a choice has started."""
        return sum(1 for key in self._calls if key[0] == choice)

    def apply(self, event: Event) -> None:
        """Move the machines by one event.

        Raises:
            GrammarError: the event is not allowed now. No machine has moved.
        """
        if type(event) is TextDelta and self.state is _OPEN and self._choices.get(event.choice) is _CHOICE_OPEN:
            return  # the usual input, which moves nothing
        if type(event) in _KINDS_OF_A_CHOICE:
            self._apply_to_choice(cast("_OF_A_CHOICE", event))
            return
        following = _step(self.state, type(event))
        if type(event) is StreamStart:
            self._announce(event)
        self.state = following

    def _announce(self, event: StreamStart) -> None:
        if not 0 <= event.choices <= MAX_CHOICES:
            raise GrammarError(f"StreamStart of {event.choices} choices", self.state.value)
        self._announced = event.choices
        self._choices = dict.fromkeys(range(event.choices), ChoiceState.OPEN)
        self._open = event.choices

    def _apply_to_choice(self, event: _OF_A_CHOICE) -> None:
        choice, kind = event.choice, type(event)
        before = self.choice_state(choice)
        opens = before is _CHOICE_OPEN and choice not in self._choices
        stream_state: StreamState = _step(self.state, Pseudo.CHOICE_OPENS) if opens else self.state
        still_open = self._open + opens
        ends_last = kind is ChoiceEnd and still_open == 1
        stream_state = _step(stream_state, Pseudo.LAST_CHOICE_END if ends_last else kind)
        choice_state: ChoiceState = _step(before, kind, f"choice {choice}")
        if kind is not ChoiceEnd and isinstance(event, _OF_A_CALL) and event.call_index is not None:
            self._apply_to_call((choice, event.call_index), type(event))
        self.state = stream_state
        self._choices[choice] = choice_state
        self._open = still_open - (kind is ChoiceEnd)

    def _apply_to_call(self, key: tuple[int, int], kind: type[_OF_A_CALL]) -> None:
        name = f"call {key[1]} of choice {key[0]}"
        _step(CallState.STARTED if key in self._calls else CallState.ABSENT, kind, name)
        if kind is ToolCallStart:
            if not 0 <= key[1] < MAX_CALLS:
                raise GrammarError("ToolCallStart", f"more than {MAX_CALLS} calls", name)
            self._calls.add(key)


def draw() -> str:
    """Draw the table as Mermaid state diagrams, one a machine, inputs that lead the same way on one arrow."""
    parts = [_draw_machine(title, states) for title, states in _MACHINES]
    return "\n\n".join(parts) + "\n"


_MACHINES: Final[tuple[tuple[str, tuple[State, ...]], ...]] = (
    ("The stream", tuple(StreamState)),
    ("Each choice", (ChoiceState.OPEN, ChoiceState.ENDED)),
    ("Each tool call", tuple(CallState)),
)


def _draw_machine(title: str, states: tuple[State, ...]) -> str:
    lines = [f"## {title}", "", "```mermaid", "stateDiagram-v2", f"    [*] --> {states[0].name}"]
    for state in states:
        arrows: dict[State, list[str]] = {}
        for event, following in TRANSITIONS.get(state, {}).items():
            name = event.value if isinstance(event, Pseudo) else event.__name__
            arrows.setdefault(following, []).append(name)
        lines += [f"    {state.name} --> {to.name}: {', '.join(names)}" for to, names in arrows.items()]
        if not arrows:
            lines.append(f"    {state.name} --> [*]")
    return "\n".join([*lines, "```"])
