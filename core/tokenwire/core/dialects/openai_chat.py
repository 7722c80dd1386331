"""OpenAI Chat Completions: POST /v1/chat/completions and GET /v1/models.

A stream is `data: {chat.completion.chunk}` events and `data: [DONE]`, without event names and ids: openai-python keeps
an id, and turns any later blank line into an event that it cannot parse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal

from tokenwire.core.collect import ChoiceResult, Result
from tokenwire.core.contracts import Decoder, ModelCard, ParsedRequest, Template
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
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    TopLogprob,
    UsageReport,
)
from tokenwire.core.request import GenerationRequest

from ._chat_decoder import ChatDecoder, decode_chat_result
from ._chat_outgoing import call_object, encode_chat_request
from ._chat_request import parse_chat_request
from ._incoming_errors import error_from_body
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
        encode = self._ENCODERS.get(type(event))
        return b"" if encode is None else encode(self, event)

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

    def _delta(self, choice: int, delta: bytes, logprobs: bytes = b"") -> bytes:
        """Write a chunk of a choice, after the role chunks that are due before it."""
        return self._open_up_to(choice) + self._chunk(choice, delta, logprobs)

    def _chunk(self, choice: int, delta: bytes, logprobs: bytes = b"") -> bytes:
        return b'%b{"index":%d,"delta":%b%b%b' % (self._head, choice, delta, logprobs, self._end)

    def _encode_text(self, delta: TextDelta) -> bytes:
        logprobs = b"" if delta.logprobs is None else b',"logprobs":' + encode_json(_logprobs(delta.logprobs))
        return self._delta(delta.choice, b'{"content":%b}' % escape_utf8(delta.text), logprobs)

    def _encode_reasoning(self, delta: ReasoningDelta) -> bytes:
        return self._delta(delta.choice, b'{"reasoning_content":%b}' % escape_utf8(delta.text))

    def _encode_refusal(self, delta: RefusalDelta) -> bytes:
        return self._delta(delta.choice, b'{"refusal":%b}' % escape_utf8(delta.text))

    def _encode_call(self, start: ToolCallStart) -> bytes:
        return self._delta(start.choice, encode_json({"tool_calls": [_call_start(start)]}))

    def _encode_arguments(self, delta: ToolCallDelta) -> bytes:
        call = b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}'
        return self._delta(delta.choice, call % (delta.call_index, escape_utf8(delta.arguments)))

    def _encode_end(self, end: ChoiceEnd) -> bytes:
        choice = end.choice
        roles = self._open_up_to(choice)
        self._templates.pop(choice, None)
        word = FINISH_REASONS[end.reason].encode()
        chunk = b'%b{"index":%d,"delta":{},"finish_reason":"%b"%b' % (self._head, choice, word, self._finish_end)
        return roles + chunk

    def _keep_usage(self, usage: UsageReport) -> bytes:
        self._usage = usage
        return b""

    def _encode_done(self, end: StreamEnd) -> bytes:
        del end
        return self._encode_usage() + _DONE

    def _encode_failure(self, failure: Failure) -> bytes:
        return _data({"error": openai_error(failure_of(failure))})

    def _encode_usage(self) -> bytes:
        """Write the chunk that must be the last, for openai-python's helper takes the usage of whatever chunk is."""
        if not self._include_usage or self._usage is None:
            return b""
        return b'%b],"usage":%b}\n\n' % (self._head, encode_json(usage_object(self._usage)))

    _ENCODERS: ClassVar[dict[type, Callable[[ChatEncoder, Any], bytes]]] = {
        StreamStart: _encode_start,
        TextDelta: _encode_text,
        ReasoningDelta: _encode_reasoning,
        RefusalDelta: _encode_refusal,
        ToolCallStart: _encode_call,
        ToolCallDelta: _encode_arguments,
        ChoiceEnd: _encode_end,
        UsageReport: _keep_usage,
        StreamEnd: _encode_done,
        StreamError: _encode_failure,
        StreamCancelled: _encode_failure,
        StreamTruncated: _encode_failure,
    }
    """What says an event, by its class; of the others nothing is said."""


class OpenAIChat:
    """The dialect.

    Args:
        token_limit: the field that asks another server for at most so many tokens; by default the one that suits the
            model's name.
    """

    name = "openai_chat"
    media_type = "text/event-stream"
    streams_by_default = False

    __slots__ = ("_token_limit",)

    def __init__(self, *, token_limit: Literal["max_tokens", "max_completion_tokens"] | None = None) -> None:
        self._token_limit = token_limit

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

    def encode_request(self, request: GenerationRequest) -> bytes:
        """Encode the body that asks another server; see `contracts.Dialect`. There is no field without a word."""
        return encode_chat_request(request, self._token_limit)

    def decode_result(self, body: bytes) -> Sequence[Event]:
        """Decode a whole answer of another server; see `contracts.Dialect`."""
        return decode_chat_result(body)

    def decode_error(self, status: int, body: bytes) -> StreamError:
        """Decode the body of another server's error answer; see `contracts.Dialect`."""
        return error_from_body(status, body)

    def encode_models(self, models: Sequence[ModelCard]) -> bytes:
        """Encode the answer to GET /v1/models."""
        return encode_json({"object": "list", "data": [model_object(model) for model in models]})

    def encode_model(self, model: ModelCard) -> bytes:
        """Encode the answer to GET /v1/models/{model}."""
        return encode_json(model_object(model))


DIALECT: Final = OpenAIChat()
"""The usual instance: a dialect has no state."""


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


def _choice_object(choice: ChoiceResult, role: str) -> dict[str, object]:
    message: dict[str, object] = {
        "role": role,
        "content": choice.text if choice.text or not (choice.tool_calls or choice.refusal) else None,
        "refusal": choice.refusal or None,
    }
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [call_object(call) for call in choice.tool_calls]
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
