"""OpenAI Chat Completions: POST /v1/chat/completions and GET /v1/models.

A stream is `data: {chat.completion.chunk}` events and `data: [DONE]`, without event names and ids: openai-python keeps
an id, and turns any later blank line into an event that it cannot parse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tokenwire.core.collect import ChoiceResult, Result
from tokenwire.core.contracts import Decoder, ModelCard, ParsedRequest, Template
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
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    TopLogprob,
    UsageReport,
)
from tokenwire.core.request import GenerationRequest, ToolCall

from ._chat_decoder import ChatDecoder, decode_chat_result
from ._chat_request import parse_chat_request
from .base import (
    clamp_logprob,
    encode_json,
    escape_utf8,
    escape_valid,
    failure_of,
    finished,
    openai_error,
)

__all__ = ["DIALECT", "FINISH_REASONS", "ChatEncoder", "OpenAIChat", "model_object", "usage_object"]

FINISH_REASONS: Final[Mapping[FinishReason, str]] = {
    FinishReason.STOP: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT_WINDOW: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.CONTENT_FILTER: "content_filter",
    FinishReason.REFUSAL: "stop",
    FinishReason.PAUSE: "length",
    FinishReason.OTHER: "stop",
}
"""The neutral reasons in OpenAI's words; a refusal shows in its own text."""

_DONE: Final = b"data: [DONE]\n\n"
_HEARTBEAT: Final = b": ka\n"


class ChatEncoder:
    """Encodes one stream.

    Args:
        include_usage: whether the client asked for token counts: then every chunk has a `usage`, null but in the last.
    """

    __slots__ = ("_end", "_finish_end", "_head", "_include_usage", "_opened", "_role", "_templates", "_usage")

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._end = b',"finish_reason":null}]' + (b',"usage":null}\n\n' if include_usage else b"}\n\n")
        self._finish_end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._head = b""
        self._role = b""
        self._opened = 0
        self._templates: dict[int, Template] = {}
        self._usage: UsageReport | None = None

    @property
    def numbered(self) -> bool:
        """False: chunks have no numbers."""
        return False

    @property
    def heartbeat(self) -> bytes:
        """A comment line without a blank line after it, which every client but Gemini's takes."""
        return _HEARTBEAT

    def greeting(self) -> bytes:
        """Nothing: its clients do not connect again once a stream has begun."""
        return b""

    def template(self, choice: int) -> Template | None:
        """The frame of a TextDelta without logprobs, from the choice's role chunk to its finish chunk."""
        return self._templates.get(choice)

    def encode(self, event: Event, number: int) -> bytes:  # noqa: ARG002  # chunks have no numbers
        """Encode any event; b"" where the dialect says nothing."""
        if type(event) is TextDelta and event.logprobs is None:
            template = self._templates.get(event.choice)
            if template is not None:
                return template.prefix + escape_utf8(event.text) + template.suffix
        match event:
            case TextDelta() | ReasoningDelta() | RefusalDelta() | ToolCallStart() | ToolCallDelta() | ChoiceEnd():
                return self._open_up_to(event.choice) + self._encode_in_choice(event)
            case StreamStart():
                return self._encode_start(event)
            case UsageReport():
                self._usage = event
                return b""
            case StreamEnd():
                return self._encode_usage() + _DONE
            case StreamError() | StreamCancelled() | StreamTruncated():
                return _data({"error": openai_error(failure_of(event))})
            case ProviderData():
                return b""

    def _encode_start(self, start: StreamStart) -> bytes:
        self._head = b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"choices":[' % (
            escape_utf8(start.id),
            start.created,
            escape_utf8(start.model),
        )
        self._role = b'{"role":%b,"content":""}' % escape_utf8(start.role)
        return self._open_up_to(start.choices - 1)

    def _open_up_to(self, choice: int) -> bytes:
        """Write the role chunks that are due: openai-python's helper wants them in the order of their indexes."""
        if choice < self._opened:
            return b""
        chunks: list[bytes] = []
        for index in range(self._opened, choice + 1):
            chunks.append(self._chunk(index, self._role))
            prefix = b'%b{"index":%d,"delta":{"content":' % (self._head, index)
            self._templates[index] = Template(prefix, b"}" + self._end, escape_valid)
        self._opened = choice + 1
        return b"".join(chunks)

    def _chunk(self, choice: int, delta: bytes, logprobs: bytes = b"") -> bytes:
        return b'%b{"index":%d,"delta":%b%b%b' % (self._head, choice, delta, logprobs, self._end)

    def _encode_in_choice(
        self, event: TextDelta | ReasoningDelta | RefusalDelta | ToolCallStart | ToolCallDelta | ChoiceEnd
    ) -> bytes:
        choice = event.choice
        match event:
            case TextDelta():
                logprobs = b"" if event.logprobs is None else b',"logprobs":' + encode_json(_logprobs(event.logprobs))
                return self._chunk(choice, b'{"content":%b}' % escape_utf8(event.text), logprobs)
            case ReasoningDelta():
                return self._chunk(choice, b'{"reasoning_content":%b}' % escape_utf8(event.text))
            case RefusalDelta():
                return self._chunk(choice, b'{"refusal":%b}' % escape_utf8(event.text))
            case ToolCallStart():
                return self._chunk(choice, encode_json({"tool_calls": [_call_start(event)]}))
            case ToolCallDelta():
                return self._chunk(
                    choice,
                    b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}'
                    % (event.call_index, escape_utf8(event.arguments)),
                )
            case ChoiceEnd():
                self._templates.pop(choice, None)
                word = FINISH_REASONS[event.reason].encode()
                return b'%b{"index":%d,"delta":{},"finish_reason":"%b"%b' % (
                    self._head,
                    choice,
                    word,
                    self._finish_end,
                )

    def _encode_usage(self) -> bytes:
        """Write the chunk that must be the last, for openai-python's helper takes the usage of whatever chunk is."""
        if not self._include_usage or self._usage is None:
            return b""
        return b'%b],"usage":%b}\n\n' % (self._head, encode_json(usage_object(self._usage)))


class OpenAIChat:
    """The dialect."""

    name = "openai_chat"
    media_type = "text/event-stream"
    streams_by_default = False

    def parse_request(
        self,
        body: bytes,
        query: Mapping[str, str],  # noqa: ARG002  # the dialect has no query parameters
        honoured: frozenset[str],
    ) -> ParsedRequest:
        """Read a request; see `contracts.Dialect`."""
        return parse_chat_request(body, honoured)

    def encoder(self, request: GenerationRequest, stream_id: str) -> ChatEncoder:  # noqa: ARG002  # not shown
        """Make the encoder of one stream; its chunks repeat the StreamStart's id."""
        return ChatEncoder(include_usage=request.include_usage)

    def decoder(self) -> Decoder[Event]:
        """Make a decoder of one stream."""
        return ChatDecoder()

    def decode_result(self, body: bytes) -> Result:
        """Decode a whole answer, or the body of an error answer.

        Raises:
            MalformedData: it is neither.
        """
        return decode_chat_result(body)

    def encode_result(self, result: Result, request: GenerationRequest) -> bytes:  # noqa: ARG002  # one form for all
        """Encode a whole, finished answer.

        Raises:
            LocalProtocolError: the result is not whole.
        """
        start, usage = finished(result)
        return encode_json(
            {
                "id": start.id,
                "object": "chat.completion",
                "created": start.created,
                "model": start.model,
                "choices": [_choice_object(choice, start.role) for choice in result.choices],
                "usage": usage_object(usage),
            }
        )

    def encode_error(self, error: StreamError) -> bytes:
        """Encode the body of an error answer."""
        return encode_json({"error": openai_error(error)})

    def encode_models(self, models: Sequence[ModelCard]) -> bytes:
        """Encode the answer to GET /v1/models."""
        return encode_json({"object": "list", "data": [model_object(model) for model in models]})

    def encode_model(self, model: ModelCard) -> bytes:
        """Encode the answer to GET /v1/models/{model}."""
        return encode_json(model_object(model))


DIALECT: Final = OpenAIChat()
"""The one instance: a dialect has no state."""


def usage_object(usage: UsageReport) -> dict[str, object]:
    """Build OpenAI's usage object; what is cached lies inside the prompt, what is reasoning inside the completion."""
    prompt = {"cached_tokens": usage.cached_tokens}
    if usage.cache_write_tokens:
        prompt["cache_write_tokens"] = usage.cache_write_tokens
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": prompt,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def model_object(model: ModelCard) -> dict[str, object]:
    """Build OpenAI's model object."""
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": model.owner}


def _data(value: object) -> bytes:
    return b"data: %b\n\n" % encode_json(value)


def _call_start(start: ToolCallStart) -> dict[str, object]:
    function = {"name": start.name, "arguments": ""}
    return {"index": start.call_index, "id": start.call_id, "type": "function", "function": function}


def _call_object(call: ToolCall) -> dict[str, object]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _choice_object(choice: ChoiceResult, role: str) -> dict[str, object]:
    message: dict[str, object] = {
        "role": role,
        "content": choice.text if choice.text or not (choice.tool_calls or choice.refusal) else None,
        "refusal": choice.refusal or None,
    }
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [_call_object(call) for call in choice.tool_calls]
    return {
        "index": choice.index,
        "message": message,
        "logprobs": None if choice.logprobs is None else _logprobs(choice.logprobs),
        "finish_reason": FINISH_REASONS[choice.reason or FinishReason.OTHER],
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, object]:
    return {"content": [_token_object(token) for token in tokens], "refusal": None}


def _token_object(token: TokenLogprob) -> dict[str, object]:
    return {**_top_object(token), "top_logprobs": [_top_object(other) for other in token.top]}


def _top_object(token: TokenLogprob | TopLogprob) -> dict[str, object]:
    data = token.token.encode("utf-8", "replace") if token.bytes is None else token.bytes
    return {"token": token.token, "logprob": clamp_logprob(token.logprob), "bytes": list(data)}
