"""The shape of OpenAI's chunks and whole answers on the wire, and reading it from servers that keep it more or less.

A chunk is decoded by msgspec into typed structs. Only where that refuses it, for a member of an unexpected type or for
what some languages write though JSON has no such thing, is it decoded again without types and brought into the same
shape, so that tolerance costs the usual chunk nothing.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final, cast

import msgspec
from msgspec import Struct

from tokenwire.core.errors import MalformedData

from .base import encode_json

__all__ = [
    "WireCall",
    "WireChoice",
    "WireChunk",
    "WireDelta",
    "WireFunction",
    "WireGroq",
    "WireLogprobs",
    "WireOutputDetails",
    "WirePromptDetails",
    "WireToken",
    "WireTop",
    "WireUsage",
    "read_chunk",
]


class WireFunction(Struct, gc=False):
    """A called function, or a piece of one."""

    name: str | None = None
    arguments: str | None = None


class WireCall(Struct, gc=False):
    """A tool call, or a piece of one."""

    index: int | None = None
    id: str | None = None
    function: WireFunction | None = None


class WireDelta(Struct):
    """What a choice says more; also a whole message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[WireCall] | None = None
    function_call: WireFunction | None = None


class WireTop(Struct, gc=False):
    """An alternative for a token."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class WireToken(Struct):
    """A token with its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[WireTop] | None = None


class WireLogprobs(Struct):
    """Log probabilities of a chunk."""

    content: list[WireToken] | None = None


class WireChoice(Struct):
    """One choice of a chunk or of a whole answer."""

    index: int | None = None
    delta: WireDelta | None = None
    message: WireDelta | None = None
    finish_reason: str | None = None
    logprobs: WireLogprobs | None = None
    usage: WireUsage | None = None
    error: Any = None


class WirePromptDetails(Struct, gc=False):
    """The prompt's tokens in parts."""

    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class WireOutputDetails(Struct, gc=False):
    """The completion's tokens in parts."""

    reasoning_tokens: int | None = None


class WireUsage(Struct, gc=False):
    """Token counts."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: WirePromptDetails | None = None
    completion_tokens_details: WireOutputDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    prompt_cache_hit_tokens: int | None = None


class WireGroq(Struct):
    """What Groq says beside the chunk."""

    usage: WireUsage | None = None
    error: Any = None


class WireChunk(Struct):
    """A chunk, a whole answer or an error."""

    id: str | None = None
    created: int | None = None
    model: str | None = None
    choices: list[WireChoice] | None = None
    usage: WireUsage | None = None
    error: Any = None
    x_groq: WireGroq | None = None


_decode_chunk: Final = msgspec.json.Decoder(WireChunk).decode
_decode_any: Final = msgspec.json.Decoder().decode


def read_chunk(data: str | bytes) -> WireChunk:
    """Read a chunk, strictly and else leniently.

    Raises:
        MalformedData: it is not a JSON object.
    """
    try:
        return _decode_chunk(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _repair_chunk(_read_leniently(data))


# ---------------------------------------------------------------------------------------------------------- leniency


def _read_leniently(data: str | bytes) -> object:
    """Read JSON, also with NaN and infinities, as Python writes them, and halves of surrogate pairs, as JavaScript does.

    Raises:
        MalformedData: it is not JSON all the same.
    """
    try:
        return _decode_any(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error)
    try:
        return cast("object", json.loads(data if isinstance(data, str) else data.decode()))
    except (ValueError, RecursionError):
        raise MalformedData(f"a chunk is not JSON: {reason}") from None


def _repair_chunk(value: object) -> WireChunk:
    if value is None:
        return WireChunk()
    if not isinstance(value, dict):
        raise MalformedData("a chunk is not a JSON object")
    members = _object(cast("object", value))
    choices = members.get("choices")
    groq = _object(members.get("x_groq"))
    return WireChunk(
        _string(members.get("id")),
        _integer(members.get("created")),
        _string(members.get("model")),
        None if choices is None else [_repair_choice(_object(choice)) for choice in _list(choices) if choice],
        _repair_usage(members.get("usage")),
        members.get("error"),
        WireGroq(_repair_usage(groq.get("usage")), groq.get("error")),
    )


def _repair_choice(members: dict[str, Any]) -> WireChoice:
    finish: object = members.get("finish_reason")
    return WireChoice(
        _integer(members.get("index")),
        _repair_delta(_object(members.get("delta") or members.get("message"))),
        None,
        _string(_object(finish).get("type", finish)),
        _repair_logprobs(members.get("logprobs")),
        _repair_usage(members.get("usage")),
        members.get("error"),
    )


def _repair_delta(members: dict[str, Any]) -> WireDelta:
    called = members.get("function_call")
    content, thinking = _texts_of_parts(members.get("content"))
    return WireDelta(
        _string(members.get("role")),
        content,
        _joined(members.get("reasoning_content")) or thinking,
        _joined(members.get("reasoning")),
        _joined(members.get("refusal")),
        [_repair_call(_object(call)) for call in _list(members.get("tool_calls")) if call],
        _repair_function(_object(called)) if called else None,
    )


def _repair_call(members: dict[str, Any]) -> WireCall:
    function = _repair_function(_object(members.get("function")))
    return WireCall(_integer(members.get("index")), _string(members.get("id")), function)


def _repair_function(members: dict[str, Any]) -> WireFunction:
    arguments = members.get("arguments")
    if isinstance(arguments, dict | list):
        arguments = encode_json(cast("object", arguments)).decode()
    return WireFunction(_string(members.get("name")), _string(arguments))


def _repair_logprobs(value: object) -> WireLogprobs | None:
    try:
        return msgspec.convert(value, WireLogprobs | None)
    except msgspec.ValidationError:
        return None


def _repair_usage(value: object) -> WireUsage | None:
    members = _object(value)
    if not members:
        return None
    prompt, output = _object(members.get("prompt_tokens_details")), _object(members.get("completion_tokens_details"))
    return WireUsage(
        _integer(members.get("prompt_tokens")),
        _integer(members.get("completion_tokens")),
        WirePromptDetails(_integer(prompt.get("cached_tokens")), _integer(prompt.get("cache_write_tokens"))),
        WireOutputDetails(_integer(output.get("reasoning_tokens"))),
        _integer(members.get("input_tokens")),
        _integer(members.get("output_tokens")),
        _integer(members.get("cached_tokens")),
        _integer(members.get("prompt_cache_hit_tokens")),
    )


def _object(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    """Take a list, also one object in its place."""
    if isinstance(value, dict):
        return [cast("object", value)]
    return cast("list[object]", value) if isinstance(value, list) else []


def _string(value: object) -> str | None:
    if isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, str) else None


def _integer(value: object) -> int | None:
    """Take a number, also one with a fraction or in quotes, as servers write times and indexes."""
    if isinstance(value, str) and value.isdecimal():
        return int(value[:18])
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else None
    return value if isinstance(value, int) else None


def _joined(value: object) -> str | None:
    """Take text, also as a list of parts."""
    return _texts_of_parts(value)[0]


def _texts_of_parts(value: object) -> tuple[str | None, str | None]:
    """Take text, also as a list of parts, of which those that are text count; Mistral's thinking parts apart."""
    if not isinstance(value, list):
        return _string(value), None
    said: list[str] = []
    thought: list[str] = []
    for part in cast("list[object]", value):
        members = _object(part)
        thinking = members.get("thinking")
        if thinking is not None:
            thought.append("".join(_part_text(inner) for inner in _list(thinking)) or _string(thinking) or "")
        else:
            said.append(_part_text(part))
    return "".join(said), "".join(thought)


def _part_text(part: object) -> str:
    return part if isinstance(part, str) else _string(_object(part).get("text")) or ""
