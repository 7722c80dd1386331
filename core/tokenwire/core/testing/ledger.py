"""The ledger of a simulation: what a backend was asked, what it said, and what a reader must have heard of that.

The ledger stands between the core and a backend on both sides: it hands on what the core asks and what the backend says,
and writes both down. `tell` works out from that alone what a stream says in all. It shares no code with `stream`, so that
the two can disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Final, cast

from msgspec import Struct

from tokenwire.core.contracts import Batch, Job, ModelCard, StreamHandle
from tokenwire.core.dispatch import STREAMS_PER_TURN, Dispatcher
from tokenwire.core.events import (
    TERMINALS,
    ChoiceEnd,
    FinishReason,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamEnd,
    StreamStart,
    Terminal,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.line import Line
from tokenwire.core.request import GenerationRequest
from tokenwire.core.stream import Item

from .backend import Backend

__all__ = ["Account", "Ledger", "Telling", "Told", "tell"]

_HELD_BACK: Final = 1024
"""More than the longest stop string of a simulated request."""


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


# -------------------------------------------------------------------------------------- what a reader must have heard

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
