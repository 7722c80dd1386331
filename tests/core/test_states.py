"""The grammar: every state with every event gives a listed state or the one error, and the drawing is the table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.strategies import legal_streams

from tokenwire.core.errors import GrammarError
from tokenwire.core.events import (
    TERMINALS,
    ChoiceEnd,
    ErrorKind,
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
from tokenwire.core.states import (
    MAX_CALLS,
    MAX_CHOICES,
    TRANSITIONS,
    CallState,
    ChoiceState,
    Grammar,
    Pseudo,
    StreamState,
    draw,
)

DRAWING = Path(__file__).parents[2] / "docs" / "states.md"
EVENT_CLASSES: tuple[type[Event], ...] = get_args(Event)
STATES: list[StreamState | ChoiceState | CallState] = [*StreamState, *ChoiceState, *CallState]
FAILURES = [StreamError, StreamCancelled, StreamTruncated]


def start(choices: int = 1) -> StreamStart:
    return StreamStart("s", "m", 0, choices=choices)


EXAMPLES: dict[type[Any], Event] = {
    StreamStart: start(),
    TextDelta: TextDelta("a"),
    ReasoningDelta: ReasoningDelta("a"),
    RefusalDelta: RefusalDelta("a"),
    ToolCallStart: ToolCallStart(0, "c", "f"),
    ToolCallDelta: ToolCallDelta(0, "{"),
    ProviderData: ProviderData("k", "v"),
    UsageReport: UsageReport(1, 1),
    ChoiceEnd: ChoiceEnd(),
    StreamEnd: StreamEnd(),
    StreamError: StreamError(ErrorKind.SERVER, "It broke."),
    StreamCancelled: StreamCancelled("client"),
    StreamTruncated: StreamTruncated("eof"),
}

PATHS: dict[StreamState, list[Event]] = {
    StreamState.NEW: [],
    StreamState.OPEN: [start()],
    StreamState.COMPLETE: [start(), ChoiceEnd()],
    StreamState.FINISHED: [start(), ChoiceEnd(), StreamEnd()],
    StreamState.FAILED: [start(), EXAMPLES[StreamError]],
    StreamState.CANCELLED: [start(), EXAMPLES[StreamCancelled]],
    StreamState.TRUNCATED: [EXAMPLES[StreamTruncated]],
}


def walked(events: Sequence[Event]) -> Grammar:
    grammar = Grammar()
    for event in events:
        grammar.apply(event)
    return grammar


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_table_is_closed() -> None:
    for state, row in TRANSITIONS.items():
        assert state in STATES
        for event, following in row.items():
            assert event in EVENT_CLASSES or isinstance(event, Pseudo)
            assert type(following) is type(state)


def test_every_event_is_in_the_table_and_has_an_example() -> None:
    assert set(EXAMPLES) == set(EVENT_CLASSES)
    taken = {event for row in TRANSITIONS.values() for event in row}
    assert taken == {*EVENT_CLASSES, *Pseudo}


def test_exactly_the_terminal_states_take_nothing() -> None:
    ended = {StreamState.FINISHED, StreamState.FAILED, StreamState.CANCELLED, StreamState.TRUNCATED}
    assert {state for state in StreamState if not TRANSITIONS.get(state)} == ended
    reached = {TRANSITIONS[state][kind] for state in TRANSITIONS for kind in TERMINALS if kind in TRANSITIONS[state]}
    assert reached == ended


def test_failure_may_come_at_any_time() -> None:
    for state in StreamState:
        if TRANSITIONS.get(state):
            assert set(FAILURES) <= set(TRANSITIONS[state])


def test_every_state_can_be_reached() -> None:
    reached = {following for row in TRANSITIONS.values() for following in row.values()}
    begins = {StreamState.NEW, ChoiceState.UNKNOWN, ChoiceState.OPEN, CallState.ABSENT}
    assert reached | begins == set(STATES)


def test_the_drawing_is_the_table() -> None:
    head, separator, drawn = DRAWING.read_text(encoding="utf-8").partition("## The stream")
    assert separator + drawn == draw()
    assert "draw()" in head


def test_every_arrow_is_drawn() -> None:
    drawing = draw()
    for state, row in TRANSITIONS.items():
        for event, following in row.items():
            name = event.value if isinstance(event, Pseudo) else event.__name__
            arrows = [
                line for line in drawing.splitlines() if line.startswith(f"    {state.name} --> {following.name}:")
            ]
            assert any(name in line.partition(": ")[2].split(", ") for line in arrows)


# ------------------------------------------------------------------------------------- every state with every event


@pytest.mark.parametrize(("state", "kind"), list(itertools.product(StreamState, EVENT_CLASSES)))
def test_every_state_with_every_event(state: StreamState, kind: type[Event]) -> None:
    grammar = walked(PATHS[state])
    assert grammar.state is state
    event = EXAMPLES[kind]
    expected = TRANSITIONS.get(state, {}).get(kind)
    if kind is ChoiceEnd and state is StreamState.OPEN:
        expected = StreamState.COMPLETE  # of the only choice
    if kind is ToolCallDelta:
        expected = None  # no call has started
    if expected is None:
        with pytest.raises(GrammarError) as caught:
            grammar.apply(event)
        assert caught.value.event in {kind.__name__, *(pseudo.value for pseudo in Pseudo)}
        assert grammar.state is state
    else:
        grammar.apply(event)
        assert grammar.state is expected
    assert grammar.ended is (grammar.state not in TRANSITIONS)


@pytest.mark.parametrize("kind", [TextDelta, ReasoningDelta, RefusalDelta, ToolCallStart, ProviderData, ChoiceEnd])
def test_nothing_comes_for_a_choice_that_has_ended(kind: type[Event]) -> None:
    grammar = walked([start(2), ChoiceEnd(0)])
    with pytest.raises(GrammarError) as caught:
        grammar.apply(EXAMPLES[kind])
    assert (caught.value.state, caught.value.key) == (ChoiceState.ENDED.value, "choice 0")
    assert grammar.open_choices() == [1]


@pytest.mark.parametrize("choice", [-1, 1, MAX_CHOICES, 10**9])
def test_nothing_comes_for_a_choice_that_was_not_announced(choice: int) -> None:
    grammar = walked([start(1)])
    assert grammar.choice_state(choice) is ChoiceState.UNKNOWN
    with pytest.raises(GrammarError):
        grammar.apply(TextDelta("a", choice))


def test_calls_belong_to_their_choice() -> None:
    grammar = walked([start(2), ToolCallStart(0, "c", "f", 0), ToolCallDelta(0, "{", 0)])
    with pytest.raises(GrammarError, match="absent call of call 0 of choice 1"):
        grammar.apply(ToolCallDelta(0, "{", 1))
    with pytest.raises(GrammarError, match="started call of call 0 of choice 0"):
        grammar.apply(ToolCallStart(0, "d", "g", 0))
    assert (grammar.calls_of(0), grammar.calls_of(1)) == (1, 0)
    grammar.apply(ProviderData("k", "v", 0, 0))
    with pytest.raises(GrammarError):
        grammar.apply(ProviderData("k", "v", 0, 1))


@pytest.mark.parametrize("choices", [-1, MAX_CHOICES + 1])
def test_the_number_of_choices_is_bounded(choices: int) -> None:
    grammar = Grammar()
    with pytest.raises(GrammarError):
        grammar.apply(start(choices))
    assert grammar.state is StreamState.NEW
    grammar.apply(start(MAX_CHOICES))
    assert len(grammar.open_choices()) == MAX_CHOICES


@pytest.mark.parametrize("index", [-1, MAX_CALLS])
def test_the_number_of_calls_is_bounded(index: int) -> None:
    grammar = walked([start(), ToolCallStart(MAX_CALLS - 1, "c", "f")])
    with pytest.raises(GrammarError):
        grammar.apply(ToolCallStart(index, "c", "f"))
    assert grammar.calls_of(0) == 1


def test_choices_that_were_not_announced_open_with_their_first_event() -> None:
    grammar = walked([start(0)])
    assert grammar.open_choices() == []
    with pytest.raises(GrammarError):
        grammar.apply(StreamEnd())
    grammar.apply(TextDelta("a", 3))
    assert grammar.open_choices() == [3]
    states: list[StreamState] = []
    for event in (ChoiceEnd(3), TextDelta("a", 1)):
        grammar.apply(event)
        states.append(grammar.state)
    assert states == [StreamState.COMPLETE, StreamState.OPEN]
    grammar.apply(ChoiceEnd(1))
    with pytest.raises(GrammarError):
        grammar.apply(TextDelta("a", MAX_CHOICES))
    grammar.apply(StreamEnd())
    assert grammar.ended


@given(legal_streams(choices=2, provider_data=True, failures=True))
def test_legal_streams_pass(events: list[Event]) -> None:
    assert walked(events).ended


# ---------------------------------------------------------------------------------------------------------- the machine

CHOICES = st.integers(-1, 3)
CALLS = st.integers(-1, 2)


class GrammarMachine(RuleBasedStateMachine):
    """Any event at any time, against a model that is written in other words."""

    def __init__(self) -> None:
        super().__init__()
        self.grammar = Grammar()
        self.announced: int | None = None
        self.open: set[int] = set()
        self.closed: set[int] = set()
        self.calls: set[tuple[int, int]] = set()
        self.terminal: type[Event] | None = None

    def apply(self, event: Event, *, legal: bool) -> bool:
        before = self.grammar.state
        try:
            self.grammar.apply(event)
        except GrammarError:
            assert not legal, f"{event} was refused in {before}"
            assert self.grammar.state is before
            return False
        assert legal, f"{event} was taken in {before}"
        return True

    def takes(self, choice: int) -> bool:
        if self.announced is None or self.terminal is not None:
            return False
        new = self.announced == 0 and choice not in self.closed and 0 <= choice < MAX_CHOICES
        return choice in self.open or new

    @rule(choices=st.integers(0, 3))
    def begin(self, choices: int) -> None:
        if self.apply(start(choices), legal=self.announced is None and self.terminal is None):
            self.announced = choices
            self.open = set(range(choices))

    @rule(kind=st.sampled_from([TextDelta, ReasoningDelta, RefusalDelta]), choice=CHOICES)
    def text(self, kind: type[TextDelta | ReasoningDelta | RefusalDelta], choice: int) -> None:
        if self.apply(kind("a", choice), legal=self.takes(choice)):
            self.open.add(choice)

    @rule(choice=CHOICES, call=CALLS)
    def call_start(self, choice: int, call: int) -> None:
        legal = self.takes(choice) and call >= 0 and (choice, call) not in self.calls
        if self.apply(ToolCallStart(call, "c", "f", choice), legal=legal):
            self.open.add(choice)
            self.calls.add((choice, call))

    @rule(choice=CHOICES, call=CALLS)
    def call_delta(self, choice: int, call: int) -> None:
        legal = self.takes(choice) and (choice, call) in self.calls
        self.apply(ToolCallDelta(call, "{", choice), legal=legal)

    @rule(choice=CHOICES, call=CALLS | st.none())
    def data(self, choice: int, call: int | None) -> None:
        legal = self.takes(choice) and (call is None or (choice, call) in self.calls)
        if self.apply(ProviderData("k", "v", choice, call), legal=legal):
            self.open.add(choice)

    @rule()
    def usage(self) -> None:
        self.apply(UsageReport(1, 1), legal=self.announced is not None and self.terminal is None)

    @rule(choice=CHOICES)
    def choice_end(self, choice: int) -> None:
        if self.apply(ChoiceEnd(choice), legal=self.takes(choice)):
            self.open.discard(choice)
            self.closed.add(choice)

    @rule()
    def stream_end(self) -> None:
        legal = self.announced is not None and self.terminal is None and bool(self.closed) and not self.open
        if self.apply(StreamEnd(), legal=legal):
            self.terminal = StreamEnd

    @rule(kind=st.sampled_from(FAILURES))
    def failure(self, kind: type[Event]) -> None:
        if self.apply(EXAMPLES[kind], legal=self.terminal is None):
            self.terminal = kind

    @invariant()
    def the_machines_agree_with_the_model(self) -> None:
        assert self.grammar.ended is (self.terminal is not None)
        assert self.grammar.open_choices() == sorted(self.open)
        for choice in range(4):
            assert self.grammar.calls_of(choice) == sum(1 for key in self.calls if key[0] == choice)
            if choice in self.closed:
                assert self.grammar.choice_state(choice) is ChoiceState.ENDED


TestGrammarMachine = GrammarMachine.TestCase
TestGrammarMachine.settings = settings(max_examples=200, stateful_step_count=25)
