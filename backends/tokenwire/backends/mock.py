"""A model server without a model: one engine that steps all streams, with the timing of a real one.

It says real text, the same for the same seed and conversation, calls tools when it must, and reports usage. So it
stands in for a model in tests, in examples, and in benchmarks where the model must not be what is measured.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from tokenwire.core.contracts import ModelCard
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    Event,
    FinishReason,
    StreamEnd,
    StreamError,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    TopLogprob,
    UsageReport,
)

from ._prose import STARTS, TOKENS, TURN, sentence_end
from ._sample import sample

if TYPE_CHECKING:
    from tokenwire.core.contracts import Job, Sink, StreamHandle
    from tokenwire.core.request import GenerationRequest, Tool

    from .base import Runtime

__all__ = ["DEFAULT_MAX_TOKENS", "MockBackend"]

DEFAULT_MAX_TOKENS: Final = 64
"""Tokens of a choice where the request does not say: enough to see a stream, short enough for a test."""

_NATURAL_TOKENS: Final = (200, 400)
"""Between these a text comes to its own end, with the sentence."""

_ARGUMENT_PIECE: Final = 8
"""Characters of a tool call's arguments in one token."""

_INTERVALS: Final = 1021
"""Jittered intervals that are drawn at once: a prime, so that no usual number of streams meets the same ones again."""

_Run = Sequence[Event]
"""What one stream says in one step."""

_END: Final = StreamEnd()
_CUT_OFF: Final[_Run] = (ChoiceEnd(0, FinishReason.LENGTH),)


class _Runs(Protocol):
    """The runs of an answer, by place."""

    def __getitem__(self, at: int, /) -> _Run: ...


class MockBackend:
    """An engine on the runtime's timer, whose step serves every stream that is due and delivers one batch.

    With jitter 0 all streams step together, on one grid of `itl_ns` that the first token of an idle engine's first
    stream begins. A stream that comes while others run has its first token with the first step at or after `ttft_ns`.
    A late step is not made up for: no stream gets two tokens less than half an interval apart.

    Args:
        ttft_ns: from a stream's start to its first token.
        itl_ns: from token to token; 0 means as fast as the loop turns.
        jitter: how much a stream's interval may differ from `itl_ns`, as a part of it, from 0 to 1. With any, each
            stream steps on its own.
        seed: changes the texts and the jitter.
        model: the model's name.

    Raises:
        ValueError: a time is negative, or the jitter is not between 0 and 1.
    """

    __slots__ = (
        "_anchor",
        "_due",
        "_heap",
        "_intervals",
        "_itl_ns",
        "_runtime",
        "_seed",
        "_sink",
        "_timers",
        "_ttft_ns",
        "models",
    )

    models: Sequence[ModelCard]
    """The one model."""
    honours = frozenset(
        {"logprobs", "max_tokens", "n", "parallel_tool_calls", "seed", "tool_choice", "tools", "top_logprobs"},
    )
    """Fields of GenerationRequest that it acts on."""
    _runtime: Runtime
    _sink: Sink

    def __init__(self, *, ttft_ns: int, itl_ns: int, jitter: float = 0.0, seed: int = 0, model: str = "mock") -> None:
        if ttft_ns < 0 or itl_ns < 0:
            raise ValueError("a time is negative")
        if not 0 <= jitter <= 1:
            raise ValueError("jitter is not between 0 and 1")
        self.models = (ModelCard(model),)
        self._ttft_ns = ttft_ns
        self._itl_ns = itl_ns
        self._seed = seed
        self._intervals = cycle(_draw_intervals(itl_ns, jitter, seed)) if jitter and itl_ns else None
        self._anchor = 0
        self._due: dict[int, list[_MockJob]] = {}
        self._heap: list[int] = []
        self._timers: list[int] = []

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        """Get ready. Called once, on the loop's thread, before the first `start`."""
        self._runtime = runtime
        self._sink = sink

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        """Begin to answer a request."""
        job = _MockJob(stream, _answer(request, self._seed))
        due = self._runtime.now() + self._ttft_ns
        if not self._heap:
            self._anchor = due
        self._place(self._on_grid(due) if self._intervals is None else due, [job])
        self._arm()
        return job

    def close(self) -> None:
        """Forget every stream."""
        self._due.clear()
        self._heap.clear()

    def _place(self, due: int, jobs: list[_MockJob]) -> None:
        slot = self._due.get(due)
        if slot is None:
            self._due[due] = jobs
            heapq.heappush(self._heap, due)
        else:
            slot += jobs

    def _arm(self) -> None:
        """Have a timer for the earliest due time. Those that still run are later ones, the earliest of them last."""
        if self._heap and (not self._timers or self._heap[0] < self._timers[-1]):
            self._timers.append(self._heap[0])
            self._runtime.call_at(self._heap[0], self._step)

    def _step(self) -> None:
        now = self._runtime.now()
        while self._timers and self._timers[-1] <= now:
            self._timers.pop()
        batch: list[tuple[StreamHandle, _Run]] = []
        for due, jobs in self._take_due(now):
            going_on = _advance(jobs, batch)
            if going_on:
                self._place_next(due, now, going_on)
        self._arm()
        if batch:
            self._sink.deliver(batch, now)

    def _take_due(self, now: int) -> list[tuple[int, list[_MockJob]]]:
        slots: list[tuple[int, list[_MockJob]]] = []
        while self._heap and self._heap[0] <= now:
            due = heapq.heappop(self._heap)
            slots.append((due, self._due.pop(due)))
        return slots

    def _place_next(self, due: int, now: int, jobs: list[_MockJob]) -> None:
        if self._intervals is None:
            # Nearest to one interval from now: a timer that is a little late must not cost a step of the grid.
            self._place(self._on_grid(now + self._itl_ns - self._itl_ns // 2), jobs)
            return
        for job in jobs:
            interval = next(self._intervals)
            following = due + interval
            self._place(following if following > now else now + interval, [job])

    def _on_grid(self, at: int) -> int:
        """Find the first step of the grid at or after a time."""
        return at + (self._anchor - at) % self._itl_ns if self._itl_ns else at


class _Answer(NamedTuple):
    """All that a stream will say: the runs from `begin` to `end`, and what follows the last of them at once."""

    runs: _Runs
    begin: int
    end: int
    ending: _Run


class _MockJob:
    """One stream of the engine: where it is in its answer."""

    __slots__ = ("at", "ending", "last", "runs", "stream")

    def __init__(self, stream: StreamHandle, answer: _Answer) -> None:
        self.stream = stream
        self.runs = answer.runs
        self.at = answer.begin
        self.last = answer.end - 1
        self.ending = answer.ending

    def cancel(self) -> None:
        """Be past the end, so that the next step drops it."""
        self.at = self.last + 1

    def set_blocked(self, blocked: bool) -> None:
        """Do nothing: an engine's step cannot wait for one reader."""


def _advance(jobs: list[_MockJob], batch: list[tuple[StreamHandle, _Run]]) -> list[_MockJob]:
    """Add the next token of each job to the batch; return the jobs that go on."""
    going_on: list[_MockJob] = []
    for job in jobs:
        at = job.at
        if at < job.last:
            job.at = at + 1
            batch.append((job.stream, job.runs[at]))
            going_on.append(job)
        elif at == job.last:
            job.at = at + 1
            batch.append((job.stream, (*job.runs[at], *job.ending)))
    return going_on


def _draw_intervals(itl_ns: int, jitter: float, seed: int) -> Iterator[int]:
    """Draw intervals evenly from itl_ns - jitter to itl_ns + jitter."""
    drawn = hashlib.shake_256(f"jitter {seed}".encode()).digest(4 * _INTERVALS)
    for at in range(0, len(drawn), 4):
        part = int.from_bytes(drawn[at : at + 4], "big") / 0xFFFFFFFF
        yield max(1, round(itl_ns * (1 + jitter * (2 * part - 1))))


def _answer(request: GenerationRequest, seed: int) -> _Answer:
    """Decide on all that a stream will say."""
    tool = _tool_to_call(request)
    if isinstance(tool, StreamError):
        return _Answer(((),), 0, 1, (tool,))
    choices = [_answer_choice(request, tool, _Lots(request, seed, choice)) for choice in range(request.n)]
    lengths = [choice.end - choice.begin for choice in choices]
    usage = UsageReport(sum([len(message.text.split()) for message in request.messages]), sum(lengths))
    if len(choices) == 1:
        (only,) = choices
        if lengths[0]:
            return _Answer(only.runs, only.begin, only.end, (usage, *only.ending, _END))
        return _Answer(((),), 0, 1, (usage, *only.ending, _END))
    return _Answer(_Woven(choices), 0, max(1, *lengths), (usage, _END))


def _tool_to_call(request: GenerationRequest) -> Tool | StreamError | None:
    """Find the tool that the request wants called; None where it wants none or leaves it open."""
    wish, colon, name = request.tool_choice.partition(":")
    if wish in {"auto", "none"}:
        return None
    for tool in request.tools:
        if not colon or tool.name == name:
            return tool
    message = f"tool_choice asks for {name or 'a tool'}, which is not among the tools."
    return StreamError(ErrorKind.INVALID_REQUEST, message, param="tool_choice")


class _Lots:
    """Numbers drawn from seeds, conversation and choice: the same for the same request."""

    __slots__ = ("_digest",)

    def __init__(self, request: GenerationRequest, seed: int, choice: int) -> None:
        # The number of turns tells a tool call from the one before it in the same conversation.
        facts = f"{seed} {request.seed} {choice} {len(request.messages)} {request.prompt}"
        self._digest = hashlib.blake2b(facts.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def draw(self, lot: int, below: int) -> int:
        """Draw a number from 0; `lot` tells draws apart, from 0 to 3."""
        return int.from_bytes(self._digest[4 * lot : 4 * lot + 4], "big") % below

    def name(self) -> str:
        """Make an id."""
        return self._digest[:12].hex()


def _answer_choice(request: GenerationRequest, tool: Tool | None, lots: _Lots) -> _Answer:
    """Decide on what one choice says, as if it were choice 0; its ending is the ChoiceEnd."""
    natural = _speak(request, lots) if tool is None else _call(tool, lots)
    limit = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if natural.end - natural.begin <= limit:
        return natural
    return _Answer(natural.runs, natural.begin, natural.begin + limit, _CUT_OFF)


def _speak(request: GenerationRequest, lots: _Lots) -> _Answer:
    begin = STARTS[lots.draw(0, len(STARTS))]
    shortest, longest = _NATURAL_TOKENS
    end = sentence_end(begin + shortest + lots.draw(1, longest - shortest))
    runs = _Scored(request.top_logprobs) if request.logprobs else TOKENS
    return _Answer(runs, begin, end, (ChoiceEnd(0, FinishReason.STOP),))


def _call(tool: Tool, lots: _Lots) -> _Answer:
    arguments = sample(tool.parameters)
    text = msgspec.json.encode(arguments if isinstance(arguments, dict) else {}).decode()
    pieces = [text[at : at + _ARGUMENT_PIECE] for at in range(0, len(text), _ARGUMENT_PIECE)]
    runs: list[_Run] = [(ToolCallDelta(0, piece),) for piece in pieces]
    runs[0] = (ToolCallStart(0, f"call_{lots.name()}", tool.name), *runs[0])
    return _Answer(runs, 0, len(runs), (ChoiceEnd(0, FinishReason.TOOL_CALLS),))


class _Scored:
    """The shared tokens with log probabilities, made when they are said. The numbers mean nothing and never change."""

    __slots__ = ("_top",)

    def __init__(self, top: int) -> None:
        self._top = top

    def __getitem__(self, at: int, /) -> _Run:
        text = TOKENS[at][0].text
        logprob = -0.125 * (1 + at % 7)
        others = [TopLogprob(TOKENS[(at + step) % TURN][0].text, logprob - step) for step in range(1, self._top)]
        top = (TopLogprob(text, logprob), *others) if self._top else ()
        return (TextDelta(text, logprobs=(TokenLogprob(text, logprob, top=top),)),)


class _Woven:
    """Several choices, a token of each at every step, numbered when they are said."""

    __slots__ = ("_choices",)

    def __init__(self, choices: Sequence[_Answer]) -> None:
        self._choices = choices

    def __getitem__(self, step: int, /) -> _Run:
        run: list[Event] = []
        for number, choice in enumerate(self._choices):
            at, last = choice.begin + step, max(choice.begin, choice.end - 1)
            said = (*choice.runs[at],) if at < choice.end else ()
            if at == last:
                said += (*choice.ending,)
            run += [msgspec.structs.replace(event, choice=number) for event in said]
        return run
