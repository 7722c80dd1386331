"""Reading OpenAI Chat Completions: chunks and whole answers to events, from servers that keep to it more or less.

What is tolerated, each with its source, is in tests/vectors/openai_chat.json. What is not: **an end that is not whole**.

- `[DONE]` is an end once the server has said anything or given a reason. Choices without a reason end with
  FinishReason.OTHER. Before that it is a truncation: a gateway that lost its own server writes it too.
- The end of input without `[DONE]` is an end where every choice that came has its reason and no bytes of a further event
  have come, or bytes that are a whole event and lack its blank line only. Otherwise it is a truncation: what was begun,
  such as the usage, is missing.
- A reason that says that the server gave up (`error`, `abort`) is an error, as is an error object anywhere. Any other
  word that nobody knows is FinishReason.OTHER, with the word as ProviderData of kind finish_reason before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from tokenwire.core import sse
from tokenwire.core.errors import MalformedData, RemoteProtocolError
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    Event,
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
    TopLogprob,
    UsageReport,
)
from tokenwire.core.states import MAX_CHOICES

from ._call_router import CallRouter, OpenCall
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
from ._incoming_errors import (
    MAX_ERROR_WORD,
    error_from_value,
    error_from_wire,
    error_without_chunk,
    is_cut_json,
    malformed_answer,
    one_line,
)
from ._sse_decoder import SseDialectDecoder

__all__ = ["ChatDecoder", "decode_chat_result"]

_BLANK: Final = b"\xef\xbb\xbf \t\r\n"
"""A byte order mark, and what may stand before JSON."""
_DONE: Final = "[DONE]"

_MAX_COUNT: Final = 2**53 - 1
"""The largest count of tokens, and the latest time: what JSON's readers in all languages take unchanged."""

_MAX_HEAD: Final = 1024 * 1024
"""How much is kept of an answer that is JSON and no stream: more than any model writes in one turn."""

_REASONS: Final = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "eos_token": FinishReason.STOP,
    "end_turn": FinishReason.STOP,
    "complete": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP_SEQUENCE,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "model_length": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.CONTEXT_WINDOW,
    "tool_calls": FinishReason.TOOL_CALLS,
    "tool_call": FinishReason.TOOL_CALLS,
    "tool_use": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
    "safety": FinishReason.CONTENT_FILTER,
    "recitation": FinishReason.CONTENT_FILTER,
    "sensitive": FinishReason.CONTENT_FILTER,
    "refusal": FinishReason.REFUSAL,
    "pause_turn": FinishReason.PAUSE,
}
"""OpenAI's words, and those of other APIs that compatible servers let through, in lower case."""

_FAILURES: Final = {
    "error": ErrorKind.SERVER,
    "abort": ErrorKind.SERVER,
    "network_error": ErrorKind.UNAVAILABLE,
    "insufficient_system_resource": ErrorKind.OVERLOADED,
}
"""Reasons that say that the server gave up."""


class _ServerFailed(Exception):
    """A choice says that the server failed."""

    def __init__(self, error: StreamError) -> None:
        super().__init__(error.message)
        self.error = error


class _Chunks:
    """Chunks in, events out, without their framing: one stream's memory."""

    __slots__ = ("_ended", "_held", "_open", "_routers", "_silent", "_usage", "started")

    def __init__(self) -> None:
        self.started = False
        self._silent: set[int] = set()
        self._open: set[int] = set()
        self._held: dict[int, str] = {}
        self._ended: set[int] = set()
        self._routers: dict[int, CallRouter] = {}
        self._usage = UsageReport(-1, -1)

    @property
    def complete(self) -> bool:
        """Whether a choice has come and none is unfinished."""
        return bool(self._ended or self._held) and not self._open and not self._silent

    def receive(self, chunk: WireChunk, out: list[Event]) -> None:
        """Take one chunk and append its events.

        Raises:
            MalformedData: an index or a number of calls is out of range. What was appended stands.
            _ServerFailed: the server says that it failed. What was appended stands.
        """
        choices = chunk.choices
        if choices is not None and len(choices) == 1 and self._receive_text(choices[0], out):
            if chunk.usage is not None:
                self._receive_usage(chunk.usage, out)
            return
        if not self.started:
            if not choices and chunk.usage is None:
                return
            self._start(chunk, out)
        if self._held:
            self._review_held(choices or [], out)
        for position, choice in enumerate(choices or ()):
            self._receive_choice(choice, position if choice.index is None else choice.index, out)
        usage = chunk.usage or (chunk.x_groq.usage if chunk.x_groq is not None else None)
        if usage is not None:
            self._receive_usage(usage, out)

    def end(self, out: list[Event]) -> bool:
        """End the choices that the server ended without a word about the reason.

        Returns:
            Whether there is an answer: False where nothing was said and no reason was given.
        """
        if self._open or self._held or self._ended:
            self.release(out)
            for number in sorted(self._open | self._silent):
                self._end_choice(number, "", out)
        return self.complete

    def release(self, out: list[Event]) -> None:
        """End the choices whose reason came together with a delta, for nothing more can come."""
        for number in sorted(self._held):
            self._end_choice(number, self._held.pop(number), out)

    def _receive_text(self, choice: WireChoice, out: list[Event]) -> bool:
        """Take the usual choice, which is text and nothing else, of a choice that has said something.

        Returns:
            False where it is another, which is untouched.
        """
        delta = choice.delta
        if (
            delta is None
            or not delta.content
            or choice.finish_reason
            or choice.index not in self._open
            or self._held
            or choice.logprobs is not None
            or delta.tool_calls
            or delta.reasoning_content
            or delta.reasoning
            or delta.refusal
            or delta.function_call is not None
            or choice.error
            or choice.usage is not None
        ):
            return False
        out.append(TextDelta(delta.content, choice.index))
        return True

    def _start(self, chunk: WireChunk, out: list[Event]) -> None:
        self.started = True
        first = chunk.choices[0] if chunk.choices else WireChoice()
        role = (first.delta or first.message or WireDelta()).role
        out.append(StreamStart(chunk.id or "", chunk.model or "", _count(chunk.created), role or "assistant", 0))

    def _review_held(self, choices: list[WireChoice], out: list[Event]) -> None:
        """Open the held choices again that say more, and end the others: some servers give a reason in every chunk."""
        for position, choice in enumerate(choices):
            number = position if choice.index is None else choice.index
            if number in self._held and _says_something(choice):
                del self._held[number]
                self._open.add(number)
        self.release(out)

    def _receive_choice(self, choice: WireChoice, number: int, out: list[Event]) -> None:
        known = number in self._open
        if not known:
            if number in self._ended:
                return
            if not 0 <= number < MAX_CHOICES:
                raise MalformedData(f"a choice has the index {number}")
        before = len(out)
        delta = choice.delta or choice.message
        if delta is not None or choice.logprobs is not None:
            self._receive_delta(delta or WireDelta(), choice.logprobs, number, out)
        spoke = len(out) > before
        if not known:
            self._silent.discard(number)
            (self._open if spoke else self._silent).add(number)
        if choice.usage is not None:
            self._receive_usage(choice.usage, out)
        if choice.error or choice.finish_reason:
            self._receive_finish(choice, number, out, hold=spoke)

    def _receive_finish(self, choice: WireChoice, number: int, out: list[Event], *, hold: bool) -> None:
        word = choice.finish_reason or ""
        if choice.error:
            raise _ServerFailed(error_from_wire(choice.error))
        kind = _FAILURES.get(word.lower())
        if kind is not None:
            message = f"The server ended the answer with the reason {word!r}."
            raise _ServerFailed(StreamError(kind, message, word.lower()))
        if hold:
            self._open.discard(number)
            self._held[number] = word
        else:
            self._end_choice(number, word, out)

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
            router = self._routers[number] = CallRouter()
        unplaced = len(calls) > 1 and all(call.index is None and not call.id for call in calls)
        for position, fragment in enumerate(calls):
            function = fragment.function or WireFunction()
            index = position if unplaced else fragment.index
            arguments = function.arguments or ""
            call = router.route(fragment.id or "", index, function.name or "", arguments)
            if not call.started and ((call.call_id and call.name) or arguments):
                _tell_start(call, number, out)
            if arguments:
                out.append(ToolCallDelta(call.number, arguments, number))

    def _end_choice(self, number: int, word: str, out: list[Event]) -> None:
        """End a choice with the server's word, which is kept where it is no known one; "" where there was none."""
        router = self._routers.pop(number, None)
        for call in router.waiting() if router is not None else ():
            _tell_start(call, number, out)
        reason = _REASONS.get(word.lower(), FinishReason.OTHER)
        if word and reason is FinishReason.OTHER:
            out.append(ProviderData("finish_reason", one_line(word, MAX_ERROR_WORD), number))
        out.append(ChoiceEnd(number, reason))
        self._open.discard(number)
        self._silent.discard(number)
        self._ended.add(number)

    def _receive_usage(self, usage: WireUsage, out: list[Event]) -> None:
        """Report usage where it says more than before: some servers send it in every chunk, some zeros after it."""
        prompt = usage.prompt_tokens_details or WirePromptDetails()
        output = usage.completion_tokens_details or WireOutputDetails()
        before = self._usage
        report = UsageReport(
            max(_count(usage.prompt_tokens or usage.input_tokens), before.input_tokens),
            max(_count(usage.completion_tokens or usage.output_tokens), before.output_tokens),
            max(
                _count(prompt.cached_tokens or usage.cached_tokens or usage.prompt_cache_hit_tokens),
                before.cached_tokens,
            ),
            max(_count(prompt.cache_write_tokens), before.cache_write_tokens),
            max(_count(output.reasoning_tokens), before.reasoning_tokens),
        )
        if report != before:
            self._usage = report
            out.append(report)


def _count(number: int | None) -> int:
    """Take a server's number for what it can be: our encoders and our clients have to write it and to add to it."""
    return min(max(number or 0, 0), _MAX_COUNT)


def _says_something(choice: WireChoice) -> bool:
    delta = choice.delta or choice.message or WireDelta()
    return bool(
        delta.content
        or delta.reasoning_content
        or delta.reasoning
        or delta.refusal
        or delta.tool_calls
        or delta.function_call
        or (choice.logprobs is not None and choice.logprobs.content)
    )


def _tell_start(call: OpenCall, number: int, out: list[Event]) -> None:
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
    """Decodes one stream.

    It ends with exactly one terminal event, whatever comes, and raises for nothing but its own misuse: StreamEnd at
    `[DONE]` and at the end of input as the module says; StreamError at an error object, at a chunk that is not JSON and
    past a limit; else StreamTruncated. What follows the terminal event is dropped. A whole answer that comes instead of
    a stream is decoded at the end of input.
    """

    __slots__ = ("_chunks", "_head")

    def __init__(self) -> None:
        super().__init__()
        self._chunks = _Chunks()
        self._head: bytearray | None = bytearray()

    def receive_data(self, data: bytes) -> Sequence[Event]:
        """Take bytes, return the events they complete; keep what may be no stream at all.

        Raises:
            LocalProtocolError: data after the end of input.
        """
        out = super().receive_data(data)
        if self._head is not None and self._terminal is None:
            self._keep_head(data)
        return out

    def receive_eof(self) -> Sequence[Event]:
        """Take the end of input, return what it completes. A second call returns nothing."""
        out: list[Event] = []
        if self._terminal is None and not self._closed:
            self._receive_rest(out)
            if self._terminal is None:
                self._chunks.release(out)
        return [*out, *super().receive_eof()]

    def _receive_event(self, event: sse.ServerSentEvent, out: list[Event]) -> None:
        self._head = None
        data = event.data
        if event.event == "error":
            self._finish(_error_of(data), out)
            return
        try:
            chunk = read_chunk(data)
        except MalformedData as error:
            self._receive_unreadable(event, error, out)
            return
        if chunk.error:
            self._finish(error_from_wire(chunk.error), out)
        elif chunk.choices is None and chunk.usage is None:
            self._receive_bare(chunk, data, out)
        else:
            self._receive_chunk(chunk, out)

    def _receive_chunk(self, chunk: WireChunk, out: list[Event]) -> None:
        try:
            self._chunks.receive(chunk, out)
        except _ServerFailed as failed:
            self._finish(failed.error, out)

    def _receive_bare(self, chunk: WireChunk, data: str, out: list[Event]) -> None:
        """Take an object that has neither choices nor usage: an error in another shape, or nothing of ours."""
        groq = chunk.x_groq
        error = error_from_value(groq.error) if groq is not None else error_without_chunk(data)
        if error is not None:
            self._finish(error, out)
        elif groq is not None:
            self._receive_chunk(chunk, out)

    def _receive_unreadable(self, event: sse.ServerSentEvent, error: MalformedData, out: list[Event]) -> None:
        """Take data that is no JSON object.

        Raises:
            MalformedData: it is nothing that any server means.
        """
        data = event.data.strip()
        if data.startswith(_DONE):
            self._finish_at_done(out)
        elif event.event != "message":
            return
        elif (wrapped := _error_in_place(data)) is not None:
            self._finish(wrapped, out)
        elif "\n" in data:
            self._receive_lines(data, out)
        else:
            raise error

    def _receive_lines(self, data: str, out: list[Event]) -> None:
        """Take lines that a server wrote without blank lines between them, so that they came as one event."""
        for line in data.split("\n"):
            if line and self._terminal is None:
                self._receive_event(sse.ServerSentEvent(data=line), out)

    def _finish_at_done(self, out: list[Event]) -> None:
        if self._chunks.end(out):
            self._finish(StreamEnd(), out)
        else:
            # No count: how many bytes had come with it depends on how they were cut.
            self._finish(StreamTruncated("[DONE] came before an answer"), out)

    def _receive_rest(self, out: list[Event]) -> None:
        """Take what the end of input leaves: an answer that is no stream, an event that lacks its blank line only."""
        if self._head:
            self._finish(_decode_json(bytes(self._head), out), out)
        elif self._chunks.complete and self._sse.holds:
            self._receive_last_event(out)

    def _receive_last_event(self, out: list[Event]) -> None:
        """Take an event without its blank line after an answer that is whole: JSON shows whether it is whole itself."""
        try:
            events = [event for event in self._sse.receive_data(b"\n\n") if event.data]
            for event in events:
                self._receive_event(event, out)
        except RemoteProtocolError:
            events = []
        if not events and self._terminal is None:
            self._finish(StreamTruncated("the input ended inside an event", self._bytes_seen), out)

    def _terminal_at_eof(self) -> Terminal:
        if self._chunks.complete:
            return StreamEnd()
        if self._chunks.started:
            return StreamTruncated("the input ended before every choice had finished", self._bytes_seen)
        return StreamTruncated("no event came" if self._bytes_seen else "the input is empty", self._bytes_seen)

    def _keep_head(self, data: bytes) -> None:
        """Keep what begins as JSON, which no event stream does."""
        head = self._head
        if not head:
            data = data.lstrip(_BLANK)
        if head is None or not data:
            return
        is_json = bool(head) or data[:1] in {b"{", b"["}
        if is_json and len(head) + len(data) <= _MAX_HEAD:
            head += data
        else:
            self._head = None


def decode_chat_result(body: bytes) -> list[Event]:
    """Decode a whole answer, also one that came as a stream though none was asked for.

    Returns:
        Its events, the last of them terminal; see `contracts.Dialect.decode_result`.
    """
    text = body.lstrip(_BLANK)
    if not text:
        return [StreamTruncated("the answer is empty", len(body))]
    if text.startswith((b"{", b"[")):
        events: list[Event] = []
        terminal = _decode_json(text, events)
        return [*events, terminal]
    decoder = ChatDecoder()
    events = [*decoder.receive_data(body), *decoder.receive_eof()]
    if isinstance(events[0], StreamTruncated):
        return [malformed_answer("it is neither JSON nor an event stream")]
    return events


def _decode_json(body: bytes, out: list[Event]) -> Terminal:
    """Decode a JSON answer, a whole one or an error in its place: append its events and return the terminal one."""
    try:
        return _receive_answer(read_chunk(body), body, out)
    except _ServerFailed as failed:
        return failed.error
    except MalformedData as error:
        return _error_in_place(body) or _terminal_of_malformed(error, len(body))


def _receive_answer(chunk: WireChunk, body: bytes, out: list[Event]) -> Terminal:
    """Take a whole answer, append its events and return the terminal one."""
    if chunk.error:
        return error_from_wire(chunk.error)
    if not chunk.choices:
        return error_without_chunk(body) or malformed_answer("it has no choices")
    chunks = _Chunks()
    chunks.receive(chunk, out)
    return StreamEnd() if chunks.end(out) else malformed_answer("it says nothing, and not why it ended")


def _terminal_of_malformed(error: MalformedData, size: int) -> Terminal:
    return StreamTruncated(str(error), size) if is_cut_json(error) else malformed_answer(str(error))


def _error_in_place(data: str | bytes) -> StreamError | None:
    """Read an error that Google's server puts into a list of one."""
    try:
        (wrapped,) = msgspec.json.decode(data, type=list[dict[str, Any]])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return error_from_value(wrapped) if wrapped.get("error") else None


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
