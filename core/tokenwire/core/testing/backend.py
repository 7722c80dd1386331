"""Backends in a simulation: one that says what is drawn, good and bad, and a ledger that watches any of them.

The ledger stands between the core and a backend on both sides: it hands on what the core asks and what the backend says,
writes both down, and knows from that alone what a client must have heard. It shares no code with `stream`, so that the
two can disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from random import Random
from typing import Final, Protocol, cast

from msgspec import Struct

from tokenwire.core.contracts import Batch, Job, ModelCard, Sink, Source, StreamHandle
from tokenwire.core.dispatch import STREAMS_PER_TURN, Dispatcher
from tokenwire.core.events import (
    TERMINALS,
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
    Terminal,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.line import Line
from tokenwire.core.request import GenerationRequest
from tokenwire.core.stream import Item

from .clock import VirtualClock

__all__ = ["Account", "Backend", "Ledger", "ScriptedSource", "SimulatedRuntime", "Telling", "Told", "tell"]

_MILLISECOND: Final = 1_000_000

_HELD_BACK: Final = 1024
"""More than the longest stop string of a simulated request."""


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


# ------------------------------------------------------------------------------------------------------- the ledger


class Account:
    """One stream in the ledger.

    Attributes:
        stream_id: its id, as clients know it.
        request: what the backend was asked.
        runs: what it said until its stream ended, a list of items for each batch.
        deferred: whether a part of it came at the end of a batch too large for one turn.
        failed_to_start: whether `start` raised.
        cancelled: how often the core cancelled it.
        blocked: what `set_blocked` said last.
    """

    __slots__ = ("blocked", "cancelled", "deferred", "failed_to_start", "request", "runs", "stream_id")

    def __init__(self, stream_id: str, request: GenerationRequest) -> None:
        self.stream_id = stream_id
        self.request = request
        self.runs: list[Sequence[Item]] = []
        self.deferred = False
        self.failed_to_start = False
        self.cancelled = 0
        self.blocked = False


class Ledger:
    """Stands between the core and a backend; a `Source` to the one and a `Sink` to the other.

    Args:
        backend: the real source.
        complain: takes a sentence about each broken rule of the contract.

    Attributes:
        sink: where the backend's batches go on to; set before the first of them.
        accounts: a stream's id and its account.
        delivered: called after each batch.
        feeding: says whether the core is writing a batch's bytes.
    """

    def __init__(self, backend: Backend, complain: Callable[[str], None]) -> None:
        self.sink: Dispatcher
        self.accounts: dict[str, Account] = {}
        self.delivered: Callable[[], None] = lambda: None
        self.feeding: Callable[[], bool] = lambda: False
        self._by_handle: dict[StreamHandle, Account] = {}
        self._backend = backend
        self._complain = complain
        self._in_batch = False
        self._delivering = False

    @property
    def models(self) -> Sequence[ModelCard]:
        """The backend's models."""
        return self._backend.models

    @property
    def honours(self) -> frozenset[str]:
        """What the backend sees to by itself."""
        return self._backend.honours

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        """Hand a start on, and open the stream's account."""
        stream_id = cast("Line", stream).stream.start.id
        self.outside_batch(f"start of {stream_id}")
        if stream_id in self.accounts:
            self._complain(f"stream {stream_id} was started twice")
        account = self.accounts[stream_id] = self._by_handle[stream] = Account(stream_id, request)
        try:
            job = self._backend.start(stream, request)
        except Exception:
            account.failed_to_start = True
            raise
        return _WatchedJob(job, account, self)

    def deliver(self, batch: Batch, now: int) -> None:
        """Hand a batch on, and write it down."""
        self._in_batch = self._delivering = True
        try:
            self.sink.deliver(self._write_down(batch), now)
        finally:
            self._in_batch = self._delivering = False
        self.delivered()

    def _write_down(self, batch: Batch) -> Iterator[tuple[StreamHandle, Sequence[Item]]]:
        # The core takes one entry at a time. That it asks for the next one shows that it is done with the last.
        for place, (stream, items) in enumerate(batch):
            if cast("Line", stream).stream.terminal is None:
                account = self._by_handle[stream]
                account.runs.append(items)
                account.deferred |= self.sink.deferred or place >= STREAMS_PER_TURN
            yield stream, items
        self._in_batch = False

    def largest_run(self, stream: StreamHandle) -> int:
        """Say how many bytes of text a stream said at most in one batch, and what a stop string may have held back."""
        account = self._by_handle.get(stream)
        return max((_size(run) for run in account.runs), default=0) + _HELD_BACK if account else 0

    def outside_batch(self, what: str) -> None:
        """Complain where a backend is called while its batch is being fed."""
        if self._in_batch or (self._delivering and self.feeding()):
            self._complain(f"{what}: a backend was called in the middle of its batch")

    def complain(self, sentence: str) -> None:
        """Write a broken rule down."""
        self._complain(sentence)


def _size(run: Sequence[Item]) -> int:
    return sum(len(str(getattr(item, "text", None) or getattr(item, "arguments", item))) * 4 for item in run)


class _WatchedJob:
    __slots__ = ("_account", "_job", "_ledger")

    def __init__(self, job: Job, account: Account, ledger: Ledger) -> None:
        self._job = job
        self._account = account
        self._ledger = ledger

    def cancel(self) -> None:
        account = self._account
        self._ledger.outside_batch(f"cancel of {account.stream_id}")
        account.cancelled += 1
        if account.cancelled > 1:
            self._ledger.complain(f"stream {account.stream_id} was cancelled {account.cancelled} times")
        self._job.cancel()

    def set_blocked(self, blocked: bool) -> None:
        self._ledger.outside_batch(f"set_blocked of {self._account.stream_id}")
        if self._account.cancelled:
            self._ledger.complain(f"stream {self._account.stream_id} was told set_blocked after its cancel")
        self._account.blocked = blocked
        self._job.set_blocked(blocked)


# ------------------------------------------------------------------------------------ what a reader must have heard

Told = dict[tuple[str, int, int], str]
"""What a reader accumulates: (kind, choice, call) and all of its text. Kinds: text, reasoning, refusal, call, logprobs."""


class Telling(Struct):
    """What a stream says in all, worked out from what its backend said."""

    told: Told
    """What a reader that misses nothing has."""
    ends: dict[int, ChoiceEnd]
    """How each choice ended."""
    tokens: int
    """Output tokens that count."""
    usage: UsageReport | None
    """The backend's own count, each number the largest that it said."""
    terminal: Terminal | None
    """How the backend, or a limit of the request, ended it; None where the backend has not."""
    broken: bool
    """Whether the backend broke the grammar, so that the core ended it."""
    done_saying: bool
    """Whether the backend's own terminal was taken: then it must not be cancelled."""


def tell(account: Account, honours: frozenset[str]) -> Telling:
    """Work out what a stream says in all.

    Args:
        account: what was asked and what was said.
        honours: what the backend sees to by itself.
    """
    teller = _Teller(account.request, honours)
    for run in account.runs:
        for item in run:
            if teller.over:
                break
            teller.hear(item)
    return teller.telling()


class _Voice:
    """One choice, as it has been said so far."""

    __slots__ = ("end", "pieces", "text", "tokens")

    def __init__(self) -> None:
        self.pieces: list[str | bytes] = []
        self.text = ""
        self.tokens = 0
        self.end: ChoiceEnd | None = None

    def whole(self) -> str:
        """All of the text, with what is no character replaced; no character goes across a change of str and bytes."""
        return "".join(_decoded(list(pieces)) for _, pieces in groupby(self.pieces, type))


def _decoded(pieces: Sequence[str | bytes]) -> str:
    data = b"".join(piece for piece in pieces if isinstance(piece, bytes))
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return data.decode(errors="replace") + text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class _Teller:
    def __init__(self, request: GenerationRequest, honours: frozenset[str]) -> None:
        self._stops = () if "stop" in honours else request.stop
        self._limit = None if "max_tokens" in honours else request.max_tokens
        self._voices = [_Voice() for _ in range(request.n)]
        self._told: Told = {}
        self._calls: set[tuple[int, int]] = set()
        self._usage: UsageReport | None = None
        self._begun = False
        self._own_end = False
        self._cut: set[int] = set()
        self._terminal: Terminal | None = None
        self._broken = False

    @property
    def over(self) -> bool:
        return self._terminal is not None or self._broken

    def hear(self, item: Item) -> None:
        if isinstance(item, TERMINALS):
            self._terminal = item
            self._own_end = True
        elif isinstance(item, UsageReport):
            self._count_usage(item)
        elif isinstance(item, StreamStart):
            self._broken = self._begun
        elif isinstance(item, str | bytes):
            self._hear_text(item, 0, 1)
        else:
            self._hear_in_choice(item)
        self._begun = True

    def telling(self) -> Telling:
        ends: dict[int, ChoiceEnd] = {}
        for number, voice in enumerate(self._voices):
            text = voice.text if voice.end and voice.end.stop_sequence and number in self._cut else voice.whole()
            if text:
                self._told["text", number, 0] = text
            if voice.end is not None:
                ends[number] = voice.end
            elif isinstance(self._terminal, StreamEnd):
                called = any(choice == number for choice, _ in self._calls)
                ends[number] = ChoiceEnd(number, FinishReason.TOOL_CALLS if called else FinishReason.STOP)
        tokens = sum(voice.tokens for voice in self._voices)
        return Telling(self._told, ends, tokens, self._usage, self._terminal, self._broken, self._own_end)

    def _count_usage(self, usage: UsageReport) -> None:
        last = self._usage or UsageReport(0, 0)
        self._usage = UsageReport(
            max(last.input_tokens, usage.input_tokens),
            max(last.output_tokens, usage.output_tokens),
            max(last.cached_tokens, usage.cached_tokens),
            max(last.cache_write_tokens, usage.cache_write_tokens),
            max(last.reasoning_tokens, usage.reasoning_tokens),
        )

    def _hear_in_choice(
        self, item: TextDelta | ReasoningDelta | RefusalDelta | ToolCallStart | ToolCallDelta | ProviderData | ChoiceEnd
    ) -> None:
        choice = item.choice
        if choice in self._cut:
            return
        if not 0 <= choice < len(self._voices) or self._voices[choice].end is not None:
            self._broken = True
            return
        match item:
            case TextDelta():
                self._add("logprobs", choice, "".join(f"{token.token}\0" for token in item.logprobs or ()))
                self._hear_text(item.text, choice, item.token_count)
            case ReasoningDelta():
                self._add("reasoning", choice, item.text)
                self._count(choice, item.token_count)
            case RefusalDelta():
                self._add("refusal", choice, item.text)
                self._count(choice, item.token_count)
            case ToolCallStart():
                self._broken = (choice, item.call_index) in self._calls
                self._calls.add((choice, item.call_index))
                self._add("call", choice, f"{item.call_id}\0{item.name}\0", item.call_index)
            case ToolCallDelta():
                self._broken = (choice, item.call_index) not in self._calls
                self._add("call", choice, item.arguments, item.call_index)
                self._count(choice, item.token_count)
            case ChoiceEnd():
                self._voices[choice].end = item
            case ProviderData():
                self._broken = item.call_index is not None and (choice, item.call_index) not in self._calls

    def _add(self, kind: str, choice: int, text: str, call: int = 0) -> None:
        if text and not self._broken:
            self._told[kind, choice, call] = self._told.get((kind, choice, call), "") + text

    def _hear_text(self, text: str | bytes, choice: int, tokens: int) -> None:
        voice = self._voices[choice]
        if choice in self._cut:
            return
        if voice.end is not None:
            self._broken = True
            return
        if text:
            voice.pieces.append(text)
        stop = self._first_stop(voice.whole()) if self._stops else None
        if stop is not None:
            voice.text = voice.whole()[: stop[0] - len(stop[1])]
            voice.tokens += tokens
            self._cut_off(choice, ChoiceEnd(choice, FinishReason.STOP_SEQUENCE, stop[1]))
        else:
            self._count(choice, tokens)

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Find the stop string that ends first, the longest of those that end there: where it ends, and it."""
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if not found:
            return None
        end, _, stop = min(found)
        return end, stop

    def _count(self, choice: int, tokens: int) -> None:
        voice = self._voices[choice]
        voice.tokens += tokens
        if self._limit is not None and voice.tokens >= self._limit and not self._broken:
            self._cut_off(choice, ChoiceEnd(choice, FinishReason.LENGTH))

    def _cut_off(self, choice: int, end: ChoiceEnd) -> None:
        self._voices[choice].end = end
        self._cut.add(choice)
        if all(voice.end is not None for voice in self._voices):
            self._terminal = StreamEnd()


# ---------------------------------------------------------------------------------------------- the scripted source

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
        return [[TextDelta(random.choice("abc") * random.randrange(500, 3000))] for _ in range(60)] + [(StreamEnd(),)]
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
    return [data[begin:end] for begin, end in zip(edges, edges[1:], strict=False)][::-1]
