"""plain.v1, tokenwire's own dialect: a prompt in, tokens out, for clients without an SDK. Specified in docs/plain.md.

A stream is SSE. Each event's data is a JSON object in ASCII that has `token`, a string; other facts ride on it; the
last is `[DONE]`. ASCII, because clients split lines at U+2028 and U+0085.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Struct

from tokenwire.core import sse
from tokenwire.core.collect import ChoiceResult, Result
from tokenwire.core.contracts import Decoder, ModelCard, ParsedRequest, Template
from tokenwire.core.errors import LocalProtocolError, MalformedData
from tokenwire.core.events import (
    ChoiceEnd,
    Event,
    Failure,
    FinishReason,
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

from ._chat_outgoing import messages_to_wire
from ._chat_request import WireMessages, messages_from_wire, stops_from_wire
from ._incoming_errors import error_from_body, error_from_wire
from ._plain_answer import REASONS, WireUsage, decode_plain_answer
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

_HEARTBEAT: Final = b": ka\n"
_PLAIN_END: Final = ChoiceEnd()
_find_unfit: Final = re.compile(r"[\r\n\0]|[^\0-\x7f]").search


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
    if not query:
        return _TABLE.read(body) if body else Fields({})
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


def _request_object(request: GenerationRequest) -> dict[str, object]:
    unsaid = {
        "n": request.n != 1,
        "tools": bool(request.tools) and request.tool_choice != "none",
        "response_format": request.response_format is not None,
        "logprobs": request.logprobs,
    }
    for name, wanted in unsaid.items():
        if wanted:
            message = f"Unsupported parameter: '{name}' cannot be said in plain.v1."
            raise invalid_request(message, name, "unsupported_parameter")
    optional = {
        "model": request.model or None,
        "max_tokens": request.max_tokens,
        "stop": request.stop or None,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return {"messages": messages_to_wire(request.messages), "stream": request.stream, **given}


# ---------------------------------------------------------------------------------------------------------- encoding


class PlainEncoder:
    """Encodes one stream. It has one choice, number 0; what other choices say is left out.

    Args:
        stream_id: what event ids begin with.

    Raises:
        LocalProtocolError: the id has a CR, LF or NUL, or is not ASCII.
    """

    __slots__ = ("_begun", "_end", "_id", "_template", "_usage")

    _done: ClassVar[bytes] = b"data: [DONE]\n\n"

    def __init__(self, stream_id: str) -> None:
        if _find_unfit(stream_id):
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
        encode = self._ENCODERS.get(type(event))
        if encode is None or getattr(event, "choice", None):
            return b""
        return encode(self, event, number)

    def _keep_usage(self, usage: UsageReport, number: int) -> bytes:
        del number
        self._usage = usage
        return b""

    def _keep_end(self, end: ChoiceEnd, number: int) -> bytes:
        del number
        self._end = end
        return b""

    def _encode_delta(self, delta: ReasoningDelta | RefusalDelta | ToolCallStart | ToolCallDelta, number: int) -> bytes:
        return self._event(_delta_object(delta), number)

    def _encode_finish(self, end: StreamEnd, number: int) -> bytes:
        del end
        return self._event(_finish_object(self._end or _PLAIN_END, self._usage), number) + self._done

    def _encode_failure(self, failure: Failure, number: int) -> bytes:
        return self._event({"token": "", "error": _error_object(failure_of(failure))}, number) + self._done

    _ENCODERS: ClassVar[dict[type, Callable[[PlainEncoder, Any, int], bytes]]] = {
        ReasoningDelta: _encode_delta,
        RefusalDelta: _encode_delta,
        ToolCallStart: _encode_delta,
        ToolCallDelta: _encode_delta,
        UsageReport: _keep_usage,
        ChoiceEnd: _keep_end,
        StreamEnd: _encode_finish,
        StreamError: _encode_failure,
        StreamCancelled: _encode_failure,
        StreamTruncated: _encode_failure,
    }
    """What says an event, by its class; of the others nothing is said."""

    def _event(self, value: object, number: int) -> bytes:
        return self._frame(encode_json_ascii(value), number)

    def _frame(self, data: bytes, number: int) -> bytes:
        if self._begun:
            return b"data: %b%b%d\n\n" % (data, self._id, number)
        self._begun = True
        return b"data: %b%b%d\nretry: %d\n\n" % (data, self._id, number, RETRY_MS)


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


class _Usage(Struct, omit_defaults=True, gc=False):
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


class _Finish(Struct, omit_defaults=True):
    token: str
    finish_reason: FinishReason
    stop_sequence: str | None = None
    usage: _Usage | None = None


def _finish_object(end: ChoiceEnd, usage: UsageReport | None) -> _Finish:
    return _Finish("", end.reason, end.stop_sequence, None if usage is None else _usage_object(usage))


def _usage_object(usage: UsageReport) -> _Usage:
    return _Usage(
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
    )


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


class _Data(Struct):
    token: str = ""
    reasoning: str | None = None
    refusal: str | None = None
    tool_call: _Call | None = None
    finish_reason: str | None = None
    stop_sequence: str | None = None
    usage: WireUsage | None = None
    error: Any = None


_decode_data: Final = msgspec.json.Decoder(_Data).decode


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
            self._finish(error_from_wire(data.error), out)
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
            out.append(ChoiceEnd(0, REASONS.get(data.finish_reason, FinishReason.OTHER), data.stop_sequence))

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
            # No count: how many bytes had come with it depends on how they were cut.
            self._finish(StreamTruncated("[DONE] came before any token"), out)
            return
        if not self._ended:
            out.append(ChoiceEnd(0, FinishReason.OTHER))
        self._finish(StreamEnd(), out)

    def _terminal_at_eof(self) -> Terminal:
        return StreamEnd() if self._ended else StreamTruncated("the input ended before [DONE]", self._bytes_seen)


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

    def encode_request(self, request: GenerationRequest) -> bytes:
        """Encode the body that asks another server; see `contracts.Dialect`.

        Raises:
            RequestRefused: it wants several choices, tools, a format or log probabilities, for which there is no word.
        """
        return encode_json_ascii(_request_object(request))

    def decode_result(self, body: bytes) -> Sequence[Event]:
        """Decode a whole answer of another server; see `contracts.Dialect`."""
        return decode_plain_answer(body)

    def decode_error(self, status: int, body: bytes) -> StreamError:
        """Decode the body of another server's error answer; see `contracts.Dialect`."""
        return error_from_body(status, body)

    def encode_models(self, models: Sequence[ModelCard]) -> bytes:
        """Encode the list of models."""
        cards = [{"name": model.name, "created": model.created, "owner": model.owner} for model in models]
        return encode_json_ascii({"models": cards})


DIALECT: Final = Plain()
"""The one instance: a dialect has no state."""
