"""Writing requests of OpenAI Chat Completions, so that the servers which speak it more or less take them.

Said is what the request says and no more: many servers refuse a field that they do not know, and OpenAI refuses some
fields where another is missing (`stream_options` without `stream`, `tool_choice` without `tools`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from tokenwire.core.request import Content, GenerationRequest, ImagePart, Message, TextPart, Tool, ToolCall

from .base import encode_json

__all__ = ["call_object", "encode_chat_request", "messages_to_wire"]

_PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "response_format",
    "reasoning_effort",
    "user",
)
"""Fields that have the same name and the same value on the wire, and are left out where they are None."""


_names_reasoning_model: Final = re.compile(r"(?:^|[/:.])(?:o[1-9]|gpt-(?:[5-9]|[1-9][0-9]))(?![0-9A-Za-z])").search
"""Finds the names of OpenAI's own reasoning models, also behind a provider's: they refuse `max_tokens`, which is all that
many other servers know."""


def encode_chat_request(request: GenerationRequest, token_limit: str | None) -> bytes:
    """Write a request's body.

    Args:
        request: what is asked for; an empty model is left out, for servers that have one only.
        token_limit: the field that holds `max_tokens`; None for the one that suits the model's name.
    """
    body: dict[str, Any] = {"model": request.model} if request.model else {}
    body["messages"] = messages_to_wire(request.messages)
    body["stream"] = request.stream
    if request.stream and request.include_usage:
        body["stream_options"] = {"include_usage": True}
    if request.max_tokens is not None:
        usual = "max_completion_tokens" if _names_reasoning_model(request.model) else "max_tokens"
        body[token_limit or usual] = request.max_tokens
    if request.n != 1:
        body["n"] = request.n
    if request.stop:
        body["stop"] = request.stop
    if request.logprobs:
        body["logprobs"] = True
        if request.top_logprobs:
            body["top_logprobs"] = request.top_logprobs
    if request.logit_bias is not None:
        body["logit_bias"] = {token: _number(bias) for token, bias in request.logit_bias.items()}
    if request.tools:
        body |= _tool_fields(request)
    for name in _PLAIN_FIELDS:
        value: object = getattr(request, name)
        if value is not None:
            body[name] = value
    return encode_json(body)


def messages_to_wire(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Build the `messages` field, which `messages_from_wire` reads back."""
    return [_message_object(message) for message in messages]


def _message_object(message: Message) -> dict[str, object]:
    value: dict[str, object] = {"role": message.role, "content": _content(message.content)}
    if message.name is not None:
        value["name"] = message.name
    if message.tool_calls:
        value["tool_calls"] = [call_object(call) for call in message.tool_calls]
        if not message.content:
            value["content"] = None
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    return value


def _content(content: Content) -> str | list[dict[str, object]]:
    """Build a message's content: one text as text, which every server takes, and nothing as empty text."""
    match content:
        case ():
            return ""
        case (TextPart(text=text),):
            return text
        case _:
            return [_part_object(part) for part in content]


def _part_object(part: TextPart | ImagePart) -> dict[str, object]:
    match part:
        case TextPart(text=text):
            return {"type": "text", "text": text}
        case ImagePart(url=url, detail=detail):
            return {
                "type": "image_url",
                "image_url": {"url": url} if detail is None else {"url": url, "detail": detail},
            }


def call_object(call: ToolCall) -> dict[str, object]:
    """Build a whole tool call, as messages and whole answers have it."""
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool_fields(request: GenerationRequest) -> dict[str, object]:
    fields: dict[str, object] = {"tools": [_tool_object(tool) for tool in request.tools]}
    kind, _, name = request.tool_choice.partition(":")
    if kind == "function":
        fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif kind != "auto":
        fields["tool_choice"] = kind
    if not request.parallel_tool_calls:
        fields["parallel_tool_calls"] = False
    return fields


def _tool_object(tool: Tool) -> dict[str, object]:
    function: dict[str, object] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _number(value: float) -> float | int:
    """Write a whole number without a fraction: OpenAI's own type of a bias is an integer."""
    return int(value) if float(value).is_integer() else value
