"""plain.v1, tokenwire's own dialect: a prompt in, tokens out, for clients without an SDK. Specified in docs/plain.md.

A stream is SSE. Each event's data is a JSON object in ASCII that has `token`, a string; other facts ride on it; the
last is `[DONE]`. ASCII, because clients split lines at U+2028 and U+0085.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import msgspec
from msgspec import Struct

from tokenwire.core import sse
from tokenwire.core.collect import ChoiceResult, Result
from tokenwire.core.contracts import Decoder, ModelCard, ParsedRequest, Template
from tokenwire.core.errors import LocalProtocolError, MalformedData
from tokenwire.core.events import (
    ChoiceEnd,
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
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.request import GenerationRequest, Message, TextPart
from tokenwire.core.states import MAX_CALLS

from ._chat_request import WireMessages, messages_from_wire, stops_from_wire
from ._sse_decoder import SseDialectDecoder
from .base import (
    Fields,
    MaxTokens,
    Name,
    Parameter,
    ParameterTable,
    Policy,
    Seed,
    StopStrings,
    Temperature,
    TopP,
    encode_json_ascii,
    error_from_wire,
    escape_ascii,
    failure_of,
    finished,
    invalid_request,
    is_retryable,
    merge_fields,
    missing_parameter,
    type_of,
)

__all__ = ["DIALECT", "RETRY_MS", "Plain", "PlainDecoder", "PlainEncoder"]

RETRY_MS: Final = 1000
"""The reconnection time that the first event tells an EventSource, in milliseconds."""

_DONE: Final = b"data: [DONE]\n\n"
_HEARTBEAT: Final = b": ka\n"


# ---------------------------------------------------------------------------------------------------------- requests

_TABLE: Final = ParameterTable(
    {
        "prompt": Parameter(str),
        "messages": Parameter(WireMessages),
        "system": Parameter(str),
        "model": Parameter(Name),
        "max_tokens": Parameter(MaxTokens),
        "stop": Parameter(StopStrings),
        "stream": Parameter(bool),
        "n": Parameter(int, None, Policy.MUST_HONOUR, 1),
        "temperature": Parameter(Temperature, "temperature", Policy.IGNORABLE, 1),
        "top_p": Parameter(TopP, "top_p", Policy.IGNORABLE, 1),
        "seed": Parameter(Seed, "seed", Policy.IGNORABLE),
    }
)


def _read_fields(body: bytes, query: Mapping[str, str]) -> Fields:
    """Read body and query; the body wins, and its conversation replaces the query's."""
    asked = _TABLE.read_query({name: text for name, text in query.items() if name != "messages"})
    if not body:
        return asked
    fields = _TABLE.read(body)
    if "messages" in fields.values:
        asked.values.pop("prompt", None)
    return merge_fields(fields, asked)


def _messages(values: Mapping[str, Any]) -> tuple[Message, ...]:
    if "prompt" in values and "messages" in values:
        raise invalid_request("Invalid value for 'prompt': 'messages' is there too.", "prompt")
    if "messages" in values:
        messages = messages_from_wire(values["messages"])
    elif "prompt" in values:
        messages = (Message("user", (TextPart(values["prompt"]),)),)
    else:
        raise missing_parameter("prompt")
    system = values.get("system")
    return messages if system is None else (Message("system", (TextPart(system),)), *messages)


# ---------------------------------------------------------------------------------------------------------- encoding


class PlainEncoder:
    """Encodes one stream. It has one choice, number 0; what other choices say is left out.

    Args:
        stream_id: what event ids begin with.

    Raises:
        LocalProtocolError: the id has a CR, LF or NUL, or is not ASCII.
    """

    __slots__ = ("_begun", "_end", "_id", "_template", "_usage")

    def __init__(self, stream_id: str) -> None:
        if not stream_id.isascii() or any(character in stream_id for character in "\r\n\0"):
            raise LocalProtocolError(f"{stream_id!r} cannot be part of an event id")
        self._id = b"\nid: %b." % stream_id.encode()
        self._template = Template(b'data: {"token":', b"}" + self._id, escape_ascii, b"\n\n")
        self._begun = False
        self._end: ChoiceEnd | None = None
        self._usage: UsageReport | None = None

    @property
    def numbered(self) -> bool:
        """True: event ids end in the event's number."""
        return True

    @property
    def heartbeat(self) -> bytes:
        """A comment line without a blank line after it."""
        return _HEARTBEAT

    def greeting(self) -> bytes:
        """An empty token with the number 0: an EventSource that drops before the first token has an id to send then."""
        return self._frame(b'{"token":""}', 0)

    def template(self, choice: int) -> Template | None:
        """The frame of a TextDelta; None until the first event, which carries `retry`, has been encoded."""
        return self._template if self._begun and choice == 0 else None

    def encode(self, event: Event, number: int) -> bytes:
        """Encode any event; b"" where the dialect says nothing. The end is told with the usage, at the StreamEnd."""
        if type(event) is TextDelta and not event.choice:
            return self._frame(b'{"token":%b}' % escape_ascii(event.text), number)
        match event:
            case StreamStart() | ProviderData():
                return b""
            case UsageReport():
                self._usage = event
                return b""
            case StreamEnd():
                return self._event(_finish_object(self._end or ChoiceEnd(), self._usage), number) + _DONE
            case StreamError() | StreamCancelled() | StreamTruncated():
                return self._event({"token": "", "error": _error_object(failure_of(event))}, number) + _DONE
            case TextDelta():
                return b""
            case _ if event.choice:
                return b""
            case ChoiceEnd():
                self._end = event
                return b""
            case _:
                return self._event(_delta_object(event), number)

    def _event(self, value: dict[str, object], number: int) -> bytes:
        return self._frame(encode_json_ascii(value), number)

    def _frame(self, data: bytes, number: int) -> bytes:
        retry = b"" if self._begun else b"\nretry: %d" % RETRY_MS
        self._begun = True
        return b"data: %b%b%d%b\n\n" % (data, self._id, number, retry)


def _delta_object(
    event: ReasoningDelta | RefusalDelta | ToolCallStart | ToolCallDelta,
) -> dict[str, object]:
    match event:
        case ReasoningDelta(text=text):
            return {"token": "", "reasoning": text}
        case RefusalDelta(text=text):
            return {"token": "", "refusal": text}
        case ToolCallStart():
            call: dict[str, object] = {"index": event.call_index, "id": event.call_id, "name": event.name}
            return {"token": "", "tool_call": call}
        case ToolCallDelta():
            return {"token": "", "tool_call": {"index": event.call_index, "arguments": event.arguments}}


def _finish_object(end: ChoiceEnd, usage: UsageReport | None) -> dict[str, object]:
    value: dict[str, object] = {"token": "", "finish_reason": end.reason.value}
    if end.stop_sequence is not None:
        value["stop_sequence"] = end.stop_sequence
    if usage is not None:
        value["usage"] = _usage_object(usage)
    return value


def _usage_object(usage: UsageReport) -> dict[str, object]:
    details = {
        "cached_tokens": usage.cached_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
    }
    counts = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
    return {**counts, **{name: count for name, count in details.items() if count}}


def _error_object(error: StreamError) -> dict[str, object]:
    return {
        "message": error.message,
        "type": type_of(error),
        "code": error.code,
        "retryable": is_retryable(error),
    }


def _result_object(choice: ChoiceResult, start: StreamStart, usage: UsageReport) -> dict[str, object]:
    calls = [{"id": call.call_id, "name": call.name, "arguments": call.arguments} for call in choice.tool_calls]
    optional = {
        "stop_sequence": choice.stop_sequence,
        "tool_calls": calls or None,
        "reasoning": choice.reasoning or None,
        "refusal": choice.refusal or None,
    }
    return {
        "text": choice.text,
        "finish_reason": (choice.reason or FinishReason.OTHER).value,
        "usage": _usage_object(usage),
        "model": start.model,
        "id": start.id,
        **{name: value for name, value in optional.items() if value is not None},
    }


# ---------------------------------------------------------------------------------------------------------- decoding


class _Call(Struct, gc=False):
    index: int
    id: str = ""
    name: str | None = None
    arguments: str | None = None


class _Usage(Struct, gc=False):
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


class _Data(Struct):
    token: str = ""
    reasoning: str | None = None
    refusal: str | None = None
    tool_call: _Call | None = None
    finish_reason: str | None = None
    stop_sequence: str | None = None
    usage: _Usage | None = None
    error: Any = None


_decode_data: Final = msgspec.json.Decoder(_Data).decode
_REASONS: Final = {reason.value: reason for reason in FinishReason}


class PlainDecoder(SseDialectDecoder):
    """Decodes one stream.

    It ends with exactly one terminal event, whatever comes, and raises for nothing but its own misuse: StreamEnd at
    [DONE], or at the end of input after a finish reason; StreamError at an error, at data that is not plain.v1 and past
    a limit; else StreamTruncated at the end of input. What follows the terminal event is dropped.
    """

    __slots__ = ("_calls", "_ended", "_started")

    def __init__(self) -> None:
        super().__init__()
        self._calls: set[int] = set()
        self._started = False
        self._ended = False

    def _receive_event(self, event: sse.ServerSentEvent, out: list[Event]) -> None:
        if event.event != "message":
            return
        if event.data == "[DONE]":
            self._receive_done(out)
            return
        try:
            data = _decode_data(event.data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise MalformedData(str(error)) from None
        if data.error:
            self._finish(_error_event(data.error), out)
            return
        if not self._started:
            self._started = True
            out.append(StreamStart(event.id.rpartition(".")[0], "", 0))
        if not self._ended:
            self._receive_deltas(data, out)
        if data.usage is not None:
            out.append(UsageReport(*msgspec.structs.astuple(data.usage)))
        if data.finish_reason and not self._ended:
            self._ended = True
            out.append(ChoiceEnd(0, _REASONS.get(data.finish_reason, FinishReason.OTHER), data.stop_sequence))

    def _receive_deltas(self, data: _Data, out: list[Event]) -> None:
        if data.reasoning:
            out.append(ReasoningDelta(data.reasoning))
        if data.token:
            out.append(TextDelta(data.token))
        if data.refusal:
            out.append(RefusalDelta(data.refusal))
        if data.tool_call is not None:
            self._receive_call(data.tool_call, out)

    def _receive_call(self, call: _Call, out: list[Event]) -> None:
        if not 0 <= call.index < MAX_CALLS:
            raise MalformedData(f"a tool call has the index {call.index}")
        if call.index not in self._calls:
            self._calls.add(call.index)
            out.append(ToolCallStart(call.index, call.id, call.name or ""))
        if call.arguments:
            out.append(ToolCallDelta(call.index, call.arguments))

    def _receive_done(self, out: list[Event]) -> None:
        if not self._started:
            self._finish(StreamTruncated("[DONE] came before any token", self._bytes_seen), out)
            return
        if not self._ended:
            out.append(ChoiceEnd(0, FinishReason.OTHER))
        self._finish(StreamEnd(), out)

    def _terminal_at_eof(self) -> Terminal:
        return StreamEnd() if self._ended else StreamTruncated("the input ended before [DONE]", self._bytes_seen)


def _error_event(value: object) -> StreamError:
    error = error_from_wire(value)
    retryable = isinstance(value, dict) and cast("dict[str, Any]", value).get("retryable") is True
    return msgspec.structs.replace(error, retryable=retryable)


# ----------------------------------------------------------------------------------------------------------- dialect


class Plain:
    """The dialect."""

    name = "plain"
    media_type = "text/event-stream"
    streams_by_default = True

    def parse_request(self, body: bytes, query: Mapping[str, str], honoured: frozenset[str]) -> ParsedRequest:
        """Read a request from a body, from query parameters, or from both; see `contracts.Dialect`."""
        fields = _read_fields(body, query)
        values = fields.values
        messages = _messages(values)
        ignored = _TABLE.settle(fields, honoured)
        request = GenerationRequest(
            model=values.get("model", ""),
            messages=messages,
            max_tokens=values.get("max_tokens"),
            stop=stops_from_wire(values.get("stop", ())),
            temperature=values.get("temperature"),
            top_p=values.get("top_p"),
            seed=values.get("seed"),
            stream=values.get("stream", True),
            include_usage=True,
        )
        return ParsedRequest(request, ignored)

    def encoder(self, request: GenerationRequest, stream_id: str) -> PlainEncoder:  # noqa: ARG002  # one form for all
        """Make the encoder of one stream."""
        return PlainEncoder(stream_id)

    def decoder(self) -> Decoder[Event]:
        """Make a decoder of one stream."""
        return PlainDecoder()

    def encode_result(self, result: Result, request: GenerationRequest) -> bytes:  # noqa: ARG002  # one form for all
        """Encode a whole, finished answer.

        Raises:
            LocalProtocolError: the result is not whole.
        """
        start, usage = finished(result)
        choice = result.choices[0] if result.choices else ChoiceResult(0)
        return encode_json_ascii(_result_object(choice, start, usage))

    def encode_error(self, error: StreamError) -> bytes:
        """Encode the body of an error answer."""
        value = _error_object(error)
        members = {name: value[name] for name in ("message", "type", "code")}
        return encode_json_ascii({"error": {**members, "param": error.param, "retryable": value["retryable"]}})

    def encode_models(self, models: Sequence[ModelCard]) -> bytes:
        """Encode the list of models."""
        cards = [{"name": model.name, "created": model.created, "owner": model.owner} for model in models]
        return encode_json_ascii({"models": cards})


DIALECT: Final = Plain()
"""The one instance: a dialect has no state."""
