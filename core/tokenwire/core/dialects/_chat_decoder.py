"""Reading OpenAI Chat Completions: chunks and whole answers to events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from tokenwire.core import sse
from tokenwire.core.collect import Collector, Result
from tokenwire.core.errors import MalformedData
from tokenwire.core.events import (
    ChoiceEnd,
    Event,
    FinishReason,
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
    TopLogprob,
    UsageReport,
)
from tokenwire.core.states import MAX_CALLS, MAX_CHOICES

from ._chat_chunks import (
    WireCall,
    WireChoice,
    WireChunk,
    WireDelta,
    WireFunction,
    WireLogprobs,
    WireOutputDetails,
    WirePromptDetails,
    WireToken,
    WireTop,
    WireUsage,
    read_chunk,
)
from ._sse_decoder import SseDialectDecoder
from .base import error_from_wire

__all__ = ["ChatDecoder", "decode_chat_result"]

_DONE: Final = "[DONE]"

_MAX_HEAD: Final = 64 * 1024
"""How much of an answer that is no event stream is kept: as much as an error's body may have."""

_REASONS: Final = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}


class _OpenCall:
    """A tool call as far as it has come: its start waits until the name and the id are known or can wait no longer."""

    __slots__ = ("call_id", "name", "number", "started")

    def __init__(self, number: int) -> None:
        self.number = number
        self.call_id = ""
        self.name = ""
        self.started = False

    def learn(self, call_id: str, name: str) -> None:
        """Take an id and a name; what is known stays, for some servers repeat them on every fragment."""
        self.call_id = self.call_id or call_id
        self.name = self.name or name


class _CallRouter:
    """Which tool call of one choice a fragment belongs to.

    A known id wins. A new id opens a call, also where its index is taken by a call of another id. Without an id the
    index decides; without both, the place among several fragments of one chunk; else the call that came last, unless a
    different name shows that another has begun.
    """

    __slots__ = ("_by_id", "_by_index", "_calls")

    def __init__(self) -> None:
        self._by_id: dict[str, _OpenCall] = {}
        self._by_index: dict[int, _OpenCall] = {}
        self._calls: list[_OpenCall] = []

    def route(self, call_id: str, index: int | None, name: str) -> _OpenCall:
        """Find a fragment's call, or open one for it.

        Raises:
            MalformedData: there are more than MAX_CALLS calls.
        """
        call = self._find(call_id, index, name)
        if call is None:
            call = self._open()
        if index is not None:
            self._by_index[index] = call
        call.learn(call_id, name)
        if call_id:
            self._by_id.setdefault(call_id, call)
        return call

    def waiting(self) -> list[_OpenCall]:
        """List the calls whose start has not been told."""
        return [call for call in self._calls if not call.started]

    def _find(self, call_id: str, index: int | None, name: str) -> _OpenCall | None:
        if call_id and call_id in self._by_id:
            return self._by_id[call_id]
        if index is not None:
            call = self._by_index.get(index)
        else:
            call = self._calls[-1] if self._calls else None
            if call is not None and not call_id and name and call.name and name != call.name:
                return None
        return None if call is not None and call_id and call.call_id else call

    def _open(self) -> _OpenCall:
        if len(self._calls) >= MAX_CALLS:
            raise MalformedData(f"a choice has more than {MAX_CALLS} tool calls")
        call = _OpenCall(len(self._calls))
        self._calls.append(call)
        return call


class _Chunks:
    """Chunks in, events out, without their framing: one stream's memory."""

    __slots__ = ("_ended", "_open", "_routers", "_usage", "started")

    def __init__(self) -> None:
        self.started = False
        self._open: set[int] = set()
        self._ended: set[int] = set()
        self._routers: dict[int, _CallRouter] = {}
        self._usage: UsageReport | None = None

    @property
    def complete(self) -> bool:
        """Whether a choice has come and none is unfinished."""
        return bool(self._ended) and not self._open

    def receive(self, chunk: WireChunk, out: list[Event]) -> None:
        """Take one chunk and append its events.

        Raises:
            MalformedData: an index or a number of calls is out of range. What was appended stands.
        """
        if not self.started:
            if not chunk.choices and chunk.usage is None:
                return
            self._start(chunk, out)
        for position, choice in enumerate(chunk.choices or ()):
            self._receive_choice(choice, position if choice.index is None else choice.index, out)
        if chunk.usage is not None:
            self._receive_usage(chunk.usage, out)

    def end(self, out: list[Event]) -> None:
        """End the choices that the server ended without a word about the reason."""
        for number in sorted(self._open):
            self._end_choice(number, FinishReason.OTHER, out)

    def _start(self, chunk: WireChunk, out: list[Event]) -> None:
        self.started = True
        first = chunk.choices[0] if chunk.choices else WireChoice()
        role = (first.delta or first.message or WireDelta()).role
        out.append(StreamStart(chunk.id or "", chunk.model or "", chunk.created or 0, role or "assistant", 0))

    def _receive_choice(self, choice: WireChoice, number: int, out: list[Event]) -> None:
        if number in self._ended:
            return
        if not 0 <= number < MAX_CHOICES:
            raise MalformedData(f"a choice has the index {number}")
        self._open.add(number)
        delta = choice.delta or choice.message
        if delta is not None or choice.logprobs is not None:
            self._receive_delta(delta or WireDelta(), choice.logprobs, number, out)
        if choice.finish_reason:
            self._end_choice(number, _REASONS.get(choice.finish_reason, FinishReason.OTHER), out)

    def _receive_delta(self, delta: WireDelta, logprobs: WireLogprobs | None, number: int, out: list[Event]) -> None:
        reasoning = delta.reasoning_content or delta.reasoning
        if reasoning:
            out.append(ReasoningDelta(reasoning, number))
        if logprobs is not None and logprobs.content:
            tokens = tuple(map(_token, logprobs.content))
            out.append(TextDelta(delta.content or "", number, len(tokens), tokens))
        elif delta.content:
            out.append(TextDelta(delta.content, number))
        if delta.refusal:
            out.append(RefusalDelta(delta.refusal, number))
        if delta.tool_calls:
            self._receive_calls(delta.tool_calls, number, out)
        if delta.function_call is not None:
            self._receive_calls([WireCall(0, None, delta.function_call)], number, out)

    def _receive_calls(self, calls: list[WireCall], number: int, out: list[Event]) -> None:
        router = self._routers.get(number)
        if router is None:
            router = self._routers[number] = _CallRouter()
        unplaced = len(calls) > 1 and all(call.index is None and not call.id for call in calls)
        for position, fragment in enumerate(calls):
            function = fragment.function or WireFunction()
            index = position if unplaced else fragment.index
            call = router.route(fragment.id or "", index, function.name or "")
            arguments = function.arguments
            if not call.started and ((call.call_id and call.name) or arguments):
                _tell_start(call, number, out)
            if arguments:
                out.append(ToolCallDelta(call.number, arguments, number))

    def _end_choice(self, number: int, reason: FinishReason, out: list[Event]) -> None:
        router = self._routers.pop(number, None)
        for call in router.waiting() if router is not None else ():
            _tell_start(call, number, out)
        out.append(ChoiceEnd(number, reason))
        self._open.discard(number)
        self._ended.add(number)

    def _receive_usage(self, usage: WireUsage, out: list[Event]) -> None:
        prompt = usage.prompt_tokens_details or WirePromptDetails()
        output = usage.completion_tokens_details or WireOutputDetails()
        report = UsageReport(
            usage.prompt_tokens or 0,
            usage.completion_tokens or 0,
            prompt.cached_tokens or 0,
            prompt.cache_write_tokens or 0,
            output.reasoning_tokens or 0,
        )
        if report != self._usage:
            self._usage = report
            out.append(report)


def _tell_start(call: _OpenCall, number: int, out: list[Event]) -> None:
    call.started = True
    out.append(ToolCallStart(call.number, call.call_id, call.name, number))


def _token(token: WireToken) -> TokenLogprob:
    top = tuple(TopLogprob(other.token, other.logprob, _bytes(other)) for other in token.top_logprobs or ())
    return TokenLogprob(token.token, token.logprob, _bytes(token), top)


def _bytes(token: WireToken | WireTop) -> bytes | None:
    """Take a token's bytes where they say more than its text."""
    if token.bytes is None:
        return None
    try:
        data = bytes(token.bytes)
    except (ValueError, OverflowError):
        return None
    return None if data == token.token.encode() else data


class ChatDecoder(SseDialectDecoder):
    """Decodes one stream of chunks.

    It ends with exactly one terminal event, whatever comes, and raises for nothing but its own misuse: StreamEnd at
    [DONE], or at the end of input where every choice had finished; StreamError at an error object, at a chunk that is
    not JSON and past a limit; else StreamTruncated at the end of input. What follows the terminal event is dropped.
    """

    __slots__ = ("_chunks", "_head")

    def __init__(self) -> None:
        super().__init__()
        self._chunks = _Chunks()
        self._head: bytearray | None = bytearray()

    def receive_data(self, data: bytes) -> Sequence[Event]:
        """Take bytes, return the events they complete; keep the beginning of an answer that may be no stream at all.

        Raises:
            LocalProtocolError: data after the end of input.
        """
        out = super().receive_data(data)
        if self._head is not None and self._terminal is None:
            self._keep_head(data)
        return out

    def _receive_event(self, event: sse.ServerSentEvent, out: list[Event]) -> None:
        self._head = None
        data = event.data
        if data.startswith(_DONE):
            self._receive_done(out)
            return
        if event.event == "error":
            self._finish(_error_of(data), out)
            return
        try:
            chunk = read_chunk(data)
        except MalformedData:
            if event.event == "message":
                raise
            return
        if chunk.error:
            self._finish(error_from_wire(chunk.error), out)
        else:
            self._chunks.receive(chunk, out)

    def _receive_done(self, out: list[Event]) -> None:
        self._chunks.end(out)
        if self._chunks.complete:
            self._finish(StreamEnd(), out)
        else:
            self._finish(StreamTruncated("[DONE] came before any choice", self._bytes_seen), out)

    def _terminal_at_eof(self) -> Terminal:
        if self._chunks.complete:
            return StreamEnd()
        if self._head is not None:
            return self._terminal_of_head(bytes(self._head))
        return StreamTruncated("the input ended before every choice had finished", self._bytes_seen)

    def _terminal_of_head(self, head: bytes) -> Terminal:
        """Say what an answer was that had no event in it: an error's body, or nothing that means anything."""
        try:
            error = read_chunk(head).error
        except MalformedData:
            error = None
        if error:
            return error_from_wire(error)
        reason = "no event came" if head else "the input is empty"
        return StreamTruncated(reason, self._bytes_seen)

    def _keep_head(self, data: bytes) -> None:
        head = self._head
        if head is not None and len(head) < _MAX_HEAD:
            head += data[: _MAX_HEAD - len(head)]


def decode_chat_result(body: bytes) -> Result:
    """Decode a whole answer.

    Returns:
        The result; its terminal event is a StreamError where the body holds an error.

    Raises:
        MalformedData: it is neither an answer nor an error.
    """
    chunk = read_chunk(body)
    events: list[Event] = []
    if chunk.error:
        events.append(error_from_wire(chunk.error))
    else:
        chunks = _Chunks()
        chunks.receive(chunk, events)
        chunks.end(events)
        if not chunks.complete:
            raise MalformedData("the answer has no choices")
        events.append(StreamEnd())
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector.result()


def _error_of(data: str) -> StreamError:
    """Read the data of an event that is named error: an error object, one wrapped in another, or any text."""
    try:
        value: object = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return error_from_wire(data)
    if isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        return error_from_wire(members.get("error") or members)
    return error_from_wire(value)
