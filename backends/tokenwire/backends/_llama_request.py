"""A request in the engine's words: OpenAI's, as our dialect writes them, with llama.cpp's own beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from tokenwire.core.dialects.openai_chat import DIALECT
from tokenwire.core.errors import RequestRefused
from tokenwire.core.events import ErrorKind, StreamError
from tokenwire.core.request import ImagePart, Message, TextPart

from ._llama_template import CALL_END, CALL_MARK

if TYPE_CHECKING:
    from tokenwire.core.request import GenerationRequest, Tool

__all__ = ["HONOURED", "HONOURED_WITH_TOOLS", "request_bodies"]

HONOURED: Final = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "n",
        "presence_penalty",
        "response_format",
        "seed",
        "stop",
        "temperature",
        "top_logprobs",
        "top_p",
    }
)
"""Fields of GenerationRequest that the engine acts on."""

HONOURED_WITH_TOOLS: Final = HONOURED | {"parallel_tool_calls", "tool_choice", "tools"}
"""And those that it acts on where the model's template has a place for tools."""

_SEEDS: Final = 2**32 - 1
"""How many seeds the engine has; the one above them asks for a random one."""

_NO_ARGUMENTS: Final[dict[str, Any]] = {"type": "object", "properties": {}}


def request_bodies(request: GenerationRequest, *, default_max_tokens: int, marks_calls: bool) -> list[bytes]:
    """Write a request for each choice: each has a slot of its own.

    The engine could make several choices in one request, but only as many as it has slots, and would count the tokens
    of one of them.

    Args:
        request: what was asked for.
        default_max_tokens: the token limit where the client set none.
        marks_calls: whether an answer that must call a tool can be begun with `CALL_MARK`, and so be forced.

    Raises:
        RequestRefused: the request holds what no model of text can read.
    """
    messages = tuple(_message(message, f"messages[{at}]") for at, message in enumerate(request.messages))
    asked = replace(
        request,
        model="",
        messages=messages,
        max_tokens=default_max_tokens if request.max_tokens is None else request.max_tokens,
        n=1,
        reasoning_effort=None,
        user=None,
        stream=True,  # also for a whole answer: else nothing could be cancelled
        include_usage=True,
    )
    return [_body(_with_tools(asked, choice, marks_calls=marks_calls)) for choice in range(request.n)]


def _body(asked: GenerationRequest) -> bytes:
    body: dict[str, Any] = msgspec.json.decode(DIALECT.encode_request(asked))
    # Calls back at every step of the prompt, so that the answer can be cancelled there.
    return msgspec.json.encode(body | {"return_progress": True})


def _with_tools(asked: GenerationRequest, choice: int, *, marks_calls: bool) -> GenerationRequest:
    """Choose the seed of a choice, seed, seed + 1, ... so that choices differ, and say how tools may be called.

    The engine knows no choice by name: it gets that one tool, which must be called. And it lets a model talk before a
    call that must come, which a small one does until its tokens are used up; so the answer is begun for it with the
    mark of a call, and ends with that one call, for after it a small one would make the same again.
    """
    if asked.seed is not None:
        asked = replace(asked, seed=(asked.seed + choice) % _SEEDS)
    wish, named, name = asked.tool_choice.partition(":")
    if not asked.tools or wish == "none":
        return replace(asked, tools=(), tool_choice="auto")
    asked = replace(asked, tools=tuple(_tool(tool) for tool in asked.tools if not named or tool.name == name))
    if wish == "auto":
        return asked
    if not marks_calls:
        return replace(asked, tool_choice="required")
    begun = Message("assistant", (TextPart(CALL_MARK),))
    return replace(asked, tool_choice="required", messages=(*asked.messages, begun), stop=(*asked.stop, CALL_END))


def _tool(tool: Tool) -> Tool:
    return tool if tool.parameters else replace(tool, parameters=_NO_ARGUMENTS)


def _message(message: Message, param: str) -> Message:
    """Make a message of one text, in a role that templates know."""
    if any(isinstance(part, ImagePart) for part in message.content):
        words = "This model reads text only; the message holds an image."
        error = StreamError(ErrorKind.INVALID_REQUEST, words, "unsupported_content", f"{param}.content")
        raise RequestRefused(error)
    role = "system" if message.role == "developer" else message.role
    return replace(message, role=role, content=(TextPart(message.text),))
