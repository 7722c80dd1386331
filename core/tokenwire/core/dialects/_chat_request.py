"""Requests of OpenAI Chat Completions: every field of the API, and the messages that other dialects take over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from tokenwire.core.contracts import ParsedRequest
from tokenwire.core.request import Content, GenerationRequest, ImagePart, Message, TextPart, Tool, ToolCall
from tokenwire.core.states import MAX_CALLS

from .base import (
    MAX_CHOICES_REQUESTED,
    MAX_MESSAGES,
    Fields,
    MaxTokens,
    Name,
    Parameter,
    ParameterTable,
    Penalty,
    Policy,
    Seed,
    StopStrings,
    Temperature,
    TopP,
    ignored_names,
    invalid_request,
    missing_parameter,
)

__all__ = ["WireMessages", "messages_from_wire", "parse_chat_request", "stops_from_wire"]

_MAX_LOGIT_BIASES: Final = 1024
_MAX_TOP_LOGPROBS: Final = 20


class _TextPart(Struct, frozen=True, tag="text"):
    text: str


class _RefusalPart(Struct, frozen=True, tag="refusal"):
    refusal: str


class _ImageUrl(Struct, frozen=True):
    url: str
    detail: str | None = None


class _ImagePart(Struct, frozen=True, tag="image_url"):
    image_url: _ImageUrl


_Parts = list[_TextPart | _ImagePart | _RefusalPart]


class _CalledFunction(Struct, frozen=True):
    name: str
    arguments: str = ""


class _FunctionCall(Struct, frozen=True):
    id: str
    function: _CalledFunction
    type: Literal["function"] = "function"


class _Message(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | _Parts | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[_FunctionCall], Meta(max_length=MAX_CALLS)] | None = None
    function_call: _CalledFunction | None = None
    tool_call_id: str | None = None


class _Function(Struct, frozen=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(Struct, frozen=True):
    type: Literal["function"]
    function: _Function


class _NamedFunction(Struct, frozen=True):
    name: Name


class _NamedTool(Struct, frozen=True):
    type: Literal["function"]
    function: _NamedFunction


class _ResponseFormat(Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class _StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


WireMessages = Annotated[list[_Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
"""The type of a `messages` field."""

_IGNORABLE: Final = Policy.IGNORABLE
_MUST: Final = Policy.MUST_HONOUR

_TABLE: Final = ParameterTable(
    {
        "model": Parameter(Name),
        "messages": Parameter(WireMessages),
        "stream": Parameter(bool),
        "stream_options": Parameter(_StreamOptions),
        "max_tokens": Parameter(MaxTokens),
        "max_completion_tokens": Parameter(MaxTokens),
        "stop": Parameter(StopStrings),
        "n": Parameter(Annotated[int, Meta(ge=1, le=MAX_CHOICES_REQUESTED)], "n", _MUST, 1),
        "tools": Parameter(Annotated[list[_Tool], Meta(max_length=MAX_CALLS)], "tools", _MUST, []),
        "tool_choice": Parameter(
            Literal["auto", "none", "required"] | _NamedTool,
            "tool_choice",
            _MUST,
            "auto",
        ),
        "functions": Parameter(list[_Function], None, _MUST, []),
        "function_call": Parameter(Literal["auto", "none"] | _NamedFunction, None, _IGNORABLE, "auto"),
        "response_format": Parameter(_ResponseFormat, "response_format", _MUST, _ResponseFormat("text")),
        "logprobs": Parameter(bool, "logprobs", _MUST, default=False),
        "top_logprobs": Parameter(Annotated[int, Meta(ge=0, le=_MAX_TOP_LOGPROBS)], "top_logprobs", _MUST, 0),
        "modalities": Parameter(list[str], None, _MUST, ["text"]),
        "audio": Parameter(object, None, _MUST),
        "web_search_options": Parameter(object, None, _MUST),
        "temperature": Parameter(Temperature, "temperature", _IGNORABLE, 1),
        "top_p": Parameter(TopP, "top_p", _IGNORABLE, 1),
        "presence_penalty": Parameter(Penalty, "presence_penalty", _IGNORABLE, 0),
        "frequency_penalty": Parameter(Penalty, "frequency_penalty", _IGNORABLE, 0),
        "seed": Parameter(Seed, "seed", _IGNORABLE),
        "logit_bias": Parameter(
            Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=_MAX_LOGIT_BIASES)],
            "logit_bias",
            _IGNORABLE,
            {},
        ),
        "parallel_tool_calls": Parameter(bool, "parallel_tool_calls", _IGNORABLE, default=True),
        "reasoning_effort": Parameter(str, "reasoning_effort", _IGNORABLE),
        "user": Parameter(str, "user", _IGNORABLE),
        "metadata": Parameter(object, None, _IGNORABLE, {}),
        "moderation": Parameter(object, None, _IGNORABLE),
        "prediction": Parameter(object, None, _IGNORABLE),
        "prompt_cache_key": Parameter(object, None, _IGNORABLE),
        "prompt_cache_options": Parameter(object, None, _IGNORABLE),
        "prompt_cache_retention": Parameter(object, None, _IGNORABLE),
        "safety_identifier": Parameter(object, None, _IGNORABLE),
        "service_tier": Parameter(object, None, _IGNORABLE, "auto"),
        "store": Parameter(object, None, _IGNORABLE, default=False),
        "verbosity": Parameter(object, None, _IGNORABLE, "medium"),
    }
)


def parse_chat_request(body: bytes, honoured: frozenset[str]) -> ParsedRequest:
    """Read a request.

    Raises:
        RequestRefused: it cannot be served; the error names the field where there is one.
    """
    fields = _TABLE.read(body)
    for name in ("model", "messages"):
        if name not in fields.values:
            raise missing_parameter(name)
    _check_together(fields.values)
    messages = messages_from_wire(fields.values["messages"])
    dropped = _drop_unwanted_tools(fields.values, honoured)
    ignored = _TABLE.settle(fields, honoured)
    options = fields.values.get("stream_options", _StreamOptions())
    if options.include_obfuscation:
        dropped.append("stream_options.include_obfuscation")
    return ParsedRequest(_request(fields, messages, options), ignored_names((*dropped, *ignored)))


def _request(fields: Fields, messages: tuple[Message, ...], options: _StreamOptions) -> GenerationRequest:
    values = fields.values
    return GenerationRequest(
        model=values["model"],
        messages=messages,
        max_tokens=values.get("max_completion_tokens", values.get("max_tokens")),
        n=values.get("n", 1),
        stop=stops_from_wire(values.get("stop", ())),
        temperature=values.get("temperature"),
        top_p=values.get("top_p"),
        presence_penalty=values.get("presence_penalty"),
        frequency_penalty=values.get("frequency_penalty"),
        seed=values.get("seed"),
        logit_bias=values.get("logit_bias"),
        logprobs=values.get("logprobs", False),
        top_logprobs=values.get("top_logprobs", 0),
        tools=tuple(_tool(tool.function) for tool in values.get("tools", ())),
        tool_choice=_tool_choice(values.get("tool_choice", "auto")),
        parallel_tool_calls=values.get("parallel_tool_calls", True),
        response_format=_response_format(values.get("response_format")),
        reasoning_effort=values.get("reasoning_effort"),
        user=values.get("user"),
        stream=values.get("stream", False),
        include_usage=bool(options.include_usage),
    )


def _check_together(values: Mapping[str, Any]) -> None:
    """Refuse fields that contradict each other."""
    if values.get("top_logprobs") and not values.get("logprobs"):
        raise invalid_request("Invalid value for 'top_logprobs': 'logprobs' must be true with it.", "top_logprobs")
    choice = values.get("tool_choice", "auto")
    if isinstance(choice, _NamedTool):
        names = [tool.function.name for tool in values.get("tools", ())]
        if choice.function.name not in names:
            raise invalid_request(
                "Invalid value for 'tool_choice': 'tools' has no function of that name.", "tool_choice"
            )
    elif choice == "required" and not values.get("tools"):
        raise invalid_request("Invalid value for 'tool_choice': it requires 'tools'.", "tool_choice")
    if isinstance(formatted := values.get("response_format"), _ResponseFormat):
        _check_format(formatted)


def _check_format(response_format: _ResponseFormat) -> None:
    if response_format.type == "json_schema" and response_format.json_schema is None:
        raise missing_parameter("response_format.json_schema")


def _drop_unwanted_tools(values: dict[str, Any], honoured: frozenset[str]) -> list[str]:
    """Take tools that must not be called from a backend that would not know it; what is dropped asks for nothing."""
    if values.get("tool_choice") != "none":
        return []
    if {"tools", "tool_choice"} <= honoured:
        return []
    del values["tool_choice"]
    return ["tools"] if values.pop("tools", None) else []


def stops_from_wire(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Make the stop strings of a `stop` field that may be one string or a list."""
    return (stop,) if isinstance(stop, str) else tuple(dict.fromkeys(stop))


def _tool(function: _Function) -> Tool:
    return Tool(function.name, function.description, function.parameters, bool(function.strict))


def _tool_choice(choice: str | _NamedTool) -> str:
    return f"function:{choice.function.name}" if isinstance(choice, _NamedTool) else choice


def _response_format(response_format: _ResponseFormat | None) -> dict[str, Any] | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is None:
        return {"type": response_format.type}
    return {"type": response_format.type, "json_schema": response_format.json_schema}


def messages_from_wire(messages: Sequence[_Message], param: str = "messages") -> tuple[Message, ...]:
    """Make neutral messages of a `messages` field, which WireMessages has decoded.

    Args:
        messages: the decoded field.
        param: its name, for errors.

    Raises:
        RequestRefused: a message lacks what its role needs.
    """
    return tuple(_message(message, f"{param}[{index}]") for index, message in enumerate(messages))


def _message(message: _Message, param: str) -> Message:
    if message.role == "assistant":
        calls = _tool_calls(message)
        return Message("assistant", _content(message.content, message.refusal), message.name, calls)
    if message.content is None:
        raise missing_parameter(f"{param}.content")
    if message.role == "tool":
        if message.tool_call_id is None:
            raise missing_parameter(f"{param}.tool_call_id")
        return Message("tool", _content(message.content), message.name, (), message.tool_call_id)
    if message.role == "function":
        # The deprecated pair has no ids: the function's name links the call with its result.
        if message.name is None:
            raise missing_parameter(f"{param}.name")
        return Message("tool", _content(message.content), message.name, (), message.name)
    return Message(message.role, _content(message.content), message.name)


def _tool_calls(message: _Message) -> tuple[ToolCall, ...]:
    if message.tool_calls:
        return tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls)
    called = message.function_call
    return () if called is None else (ToolCall(called.name, called.name, called.arguments),)


def _content(content: str | _Parts | None, refusal: str | None = None) -> Content:
    if isinstance(content, str):
        parts: tuple[TextPart | ImagePart, ...] = (TextPart(content),)
    else:
        parts = tuple(_part(part) for part in content or ())
    return (*parts, TextPart(refusal)) if refusal else parts


def _part(part: _TextPart | _ImagePart | _RefusalPart) -> TextPart | ImagePart:
    match part:
        case _TextPart(text=text):
            return TextPart(text)
        case _RefusalPart(refusal=refusal):
            return TextPart(refusal)
        case _ImagePart(image_url=image):
            return ImagePart(image.url, image.detail)
