"""A backend for simulations, which says what is drawn, good and bad; and the loop as any simulated backend sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from random import Random
from typing import Final, Protocol

from tokenwire.core.contracts import Job, ModelCard, Sink, Source, StreamHandle
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    FinishReason,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.request import GenerationRequest
from tokenwire.core.stream import Item

from .clock import VirtualClock

__all__ = ["Backend", "ScriptedSource", "SimulatedRuntime"]

_MILLISECOND: Final = 1_000_000


class SimulatedRuntime:
    """The loop as a backend sees it, on virtual time; it satisfies `tokenwire.backends.base.Runtime`.

    Args:
        clock: the time.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def now(self) -> int:
        """Read the virtual clock."""
        return self._clock.now()

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Run a callback at the present moment, after this one."""
        self._clock.call_soon(callback)

    def call_at(self, deadline: int, callback: Callable[[], None]) -> None:
        """Run a callback when the clock shows the deadline."""
        self._clock.call_at(deadline, callback)

    def start_task(self, main: Callable[[], object]) -> None:
        """Refuse: a simulation has no event loop to run a task on.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a simulation runs no tasks: {main!r}")


class Backend(Source, Protocol):
    """A backend that can be simulated: one that needs no tasks and no threads."""

    def attach(self, runtime: SimulatedRuntime, sink: Sink) -> None:
        """Get ready. Called once, before the first `start`."""
        ...


_Step = Sequence[Item]

_WORDS: Final = (
    "the ", "owl", " flies", "\n", "\u2028", "é", "𝄞 ", "[DONE]", "data: ", '"', "\\", "\r\n", "\0", "END", "E", "ND", "",
    " ", "\x85", "<|", "stop", "s", "t", "</s", ">", "日本", "\ufeff", "x" * 40,
)  # fmt: skip
_HALVES: Final = ("\ud83d", "\ude00", "\ud800", "a")
_BINARY: Final = "The owl – 日本語 𝄞 – sat END. ".encode()

_ENDINGS: Final = (
    *("end",) * 8, *("bare end",) * 3, "error first", *("error",) * 2, "truncated", "cut by itself", "broken",
    "silent", "raise", "chatter", "flood",
)  # fmt: skip


class _ScriptedJob:
    """One stream's script and where it is in it."""

    __slots__ = ("_wake", "at", "blocked", "cancelled", "due", "interval", "pulls", "steps", "stream", "talks_on")

    def __init__(self, stream: StreamHandle, steps: list[_Step], random: Random, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.stream = stream
        self.steps = steps
        self.at = 0
        self.pulls = random.random() < 0.4
        self.interval = random.choice((0, 1, 5, 20, 80)) * _MILLISECOND
        self.due = 0
        self.talks_on = random.choice((0, 0, 0, 2))
        self.blocked = False
        self.cancelled = False

    @property
    def over(self) -> bool:
        return self.at >= len(self.steps) or (self.cancelled and not self.talks_on)

    def cancel(self) -> None:
        self.cancelled = True

    def set_blocked(self, blocked: bool) -> None:
        self.blocked = blocked
        if not blocked:
            self._wake()

    @property
    def rests(self) -> bool:
        return self.pulls and self.blocked and not self.cancelled

    def step(self) -> _Step:
        if self.cancelled:
            self.talks_on -= 1
        self.at += 1
        return self.steps[self.at - 1]


class ScriptedSource:
    """An engine whose streams say what is drawn: it steps all that are due and delivers one batch.

    Among what is drawn: text in str, in bytes cut anywhere and with halves of surrogate pairs, reasoning, tool calls,
    usage, log probabilities; ends of every kind, errors before and after the first token, an end that never comes, a
    broken grammar, an exception in `start`, words after the end and after the cancel; and both kinds of source, those
    that push and those that rest while they are blocked.

    Args:
        random: where everything is drawn from.
        honours: what it claims to see to by itself; of these it only counts tokens.
    """

    models: Sequence[ModelCard] = (ModelCard("simulated"), ModelCard("other"))

    def __init__(self, random: Random, honours: frozenset[str] = frozenset({"n", "logprobs", "tools"})) -> None:
        self.honours = honours
        self._random = random
        self._clock: SimulatedRuntime
        self._sink: Sink
        self._jobs: list[_ScriptedJob] = []
        self._old: list[StreamHandle] = []
        self._step_at: int | None = None

    def attach(self, runtime: SimulatedRuntime, sink: Sink) -> None:
        """Get ready."""
        self._clock = runtime
        self._sink = sink

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        """Begin to say what is drawn.

        Raises:
            RuntimeError: that was drawn.
        """
        steps = _draw_script(self._random, request)
        if steps is None:
            raise RuntimeError("drawn: the engine has no room")
        job = _ScriptedJob(stream, steps, self._random, self._wake)
        job.due = self._clock.now() + self._random.randrange(50) * _MILLISECOND
        self._jobs.append(job)
        self._arm(job.due)
        return job

    def _wake(self) -> None:
        self._arm(self._clock.now())

    def _arm(self, at: int) -> None:
        if self._step_at is None or at < self._step_at:
            self._step_at = at
            self._clock.call_at(at, partial(self._step, at))

    def _step(self, at: int) -> None:
        if at != self._step_at:
            return
        self._step_at = None
        now = self._clock.now()
        batch: list[tuple[StreamHandle, _Step]] = []
        for job in self._jobs:
            if job.due <= now and not job.over and not job.rests:
                batch.append((job.stream, job.step()))
                job.due = now + (job.interval or _MILLISECOND)
        self._old += [job.stream for job in self._jobs if job.over]
        self._jobs = [job for job in self._jobs if not job.over]
        if self._old and self._random.random() < 0.02:
            # More than one turn's worth, so that the end of the batch waits for the loop.
            batch = [(self._old[-1], ())] * 600 + batch
        if batch:
            self._sink.deliver(batch, now)
        awake = [job.due for job in self._jobs if not job.rests]
        if awake:
            self._arm(max(now, min(awake)))


def _draw_script(random: Random, request: GenerationRequest) -> list[_Step] | None:
    """Draw all that a stream will say, step by step; None for an exception in `start`."""
    ending = random.choice(_ENDINGS)
    if ending == "raise":
        return None
    if ending == "error first":
        return [(*_draw_prelude(random), _draw_error(random))]
    if ending == "flood":
        return [*((TextDelta(random.choice("abc") * random.randrange(500, 3000)),) for _ in range(60)), (StreamEnd(),)]
    lanes = [_draw_lane(random, request, choice) for choice in range(request.n)]
    items: list[Item] = list(_draw_prelude(random))
    while any(lanes):
        items.append(random.choice([lane for lane in lanes if lane]).pop())
    return [*_draw_steps(random, items), *_draw_ending(random, request, ending)]


def _draw_prelude(random: Random) -> _Step:
    if random.random() < 0.8:
        return ()
    return (StreamStart("theirs", "renamed", 7), *((UsageReport(3, 0),) if random.random() < 0.5 else ()))


def _draw_error(random: Random) -> StreamError:
    kind = random.choice((ErrorKind.SERVER, ErrorKind.OVERLOADED, ErrorKind.INVALID_REQUEST, ErrorKind.UNAVAILABLE))
    return StreamError(kind, "drawn: it failed", "drawn_error", retry_after_ns=random.choice((None, 5 * 10**8)))


def _draw_steps(random: Random, items: Sequence[Item]) -> list[_Step]:
    """Cut what is said into engine steps: usually one item a step, sometimes several, sometimes none."""
    steps: list[_Step] = []
    most = random.choice((1, 1, 1, 4, 30))
    at = 0
    while at < len(items):
        size = random.randint(1, most) if random.random() < 0.95 else 0
        steps.append(items[at : at + size])
        at += size
    return steps


def _draw_ending(random: Random, request: GenerationRequest, ending: str) -> list[_Step]:
    usage = (UsageReport(random.randrange(9), random.randrange(99)),) if random.random() < 0.4 else ()
    ends = tuple(ChoiceEnd(choice, random.choice(tuple(_REASONS))) for choice in range(request.n))
    match ending:
        case "error":
            return [(*usage, _draw_error(random))]
        case "truncated":
            return [(*usage, StreamTruncated("drawn: the upstream fell silent"))]
        case "cut by itself":
            return [(ends[0],), (*usage, StreamTruncated("drawn: a choice is missing"))]
        case "broken":
            before = random.choice(((), ("lost </", TextDelta("st"))))
            return [(*before, random.choice(_OFFENCES)), ("dropped",), (StreamEnd(),)]
        case "silent":
            return []
        case "chatter":
            return [(*ends, *usage, StreamEnd()), ("after the end",), (StreamEnd(),), (b"\xff", ends[0])]
        case "bare end":
            return [(*usage, StreamEnd())]
        case _:
            return [ends, *((usage,) if usage else ()), (StreamEnd(),)] if random.random() < 0.5 else [
                (*ends, *usage, StreamEnd())
            ]  # fmt: skip


_REASONS: Final = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS, FinishReason.CONTENT_FILTER)
_OFFENCES: Final = (
    ToolCallDelta(77, "{}"),
    ReasoningDelta("of nobody", 99),
    StreamStart("twice", "simulated", 0),
    ProviderData("signature", "of no call", 0, 50),
)


def _draw_lane(random: Random, request: GenerationRequest, choice: int) -> list[Item]:
    """Draw what one choice says, last item first."""
    if choice == 0 and random.random() < 0.15:
        return _draw_bytes(random)
    length = random.choice((0, 1, 2, 5, 12, 40))
    words = _HALVES if random.random() < 0.1 else _WORDS
    lane: list[Item] = []
    calls = 0
    for _ in range(length):
        kind = random.random()
        if kind < 0.75:
            lane.append(_draw_text(random, request, choice, random.choice(words)))
        elif kind < 0.83:
            lane.append(ReasoningDelta("think ", choice, random.randrange(3)))
        elif kind < 0.86:
            lane.append(RefusalDelta("no ", choice))
        elif kind < 0.9 or not calls:
            lane.append(ToolCallStart(calls, f"call_{choice}_{calls}", "look_up", choice))
            calls += 1
        else:
            lane.append(ToolCallDelta(random.randrange(calls), '{"a":', choice))
    return lane[::-1]


def _draw_text(random: Random, request: GenerationRequest, choice: int, word: str) -> Item:
    if request.logprobs and word not in _HALVES and random.random() < 0.5:
        return TextDelta(word, choice, 1, (TokenLogprob(word, -0.5),))
    return word if choice == 0 and random.random() < 0.5 else TextDelta(word, choice, random.choice((1, 1, 1, 2, 0)))


def _draw_bytes(random: Random) -> list[Item]:
    data = _BINARY * random.randrange(1, 4) + random.choice((b"", b"\xe2\x82", b"\xff\xfe"))
    edges = sorted({0, len(data), *(random.randrange(len(data)) for _ in range(random.randrange(12)))})
    pieces: list[Item] = [data[begin:end] for begin, end in pairwise(edges)]
    return pieces[::-1]
