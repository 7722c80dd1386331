"""What a client asked for, in neutral terms: every dialect parses to it, every backend reads it."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

__all__ = ["Content", "GenerationRequest", "ImagePart", "Message", "TextPart", "Tool", "ToolCall"]


class TextPart(Struct, frozen=True, tag="text"):
    """A piece of a message that is text."""

    text: str
    """The text itself."""


class ImagePart(Struct, frozen=True, tag="image"):
    """A piece of a message that is an image."""

    url: str
    """Where it is, or a data: URL that holds it."""
    detail: str | None = None
    """The client's wish for its resolution."""


Content = tuple[TextPart | ImagePart, ...]
"""What a message holds, in order."""


class ToolCall(Struct, frozen=True):
    """A tool call that the assistant made in an earlier turn."""

    call_id: str
    """The id that a tool message answers."""
    name: str
    """The tool's name."""
    arguments: str
    """The arguments' JSON text, as the model wrote it."""


class Message(Struct, frozen=True):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks."""
    content: Content = ()
    """What was said."""
    name: str | None = None
    """The speaker's name, where several share a role."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls that an assistant's turn made."""
    tool_call_id: str | None = None
    """The call that a tool's turn answers."""

    @property
    def text(self) -> str:
        """The message's text parts, joined."""
        return "".join([part.text for part in self.content if isinstance(part, TextPart)])


class Tool(Struct, frozen=True):
    """A function that the model may call."""

    name: str
    """Its name."""
    description: str | None = None
    """What it does."""
    parameters: dict[str, Any] | None = None
    """The JSON Schema of its arguments."""
    strict: bool = False
    """Whether the arguments must follow the schema to the letter."""


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """One request for text.

    `None` means that the client did not say, so that a backend's own default holds.
    """

    model: str
    """The model's name, known to the service."""
    messages: tuple[Message, ...]
    """The conversation, oldest first; never empty."""
    max_tokens: int | None = None
    """The most tokens each choice may have."""
    n: int = 1
    """How many choices."""
    stop: tuple[str, ...] = ()
    """Strings that end a choice; none of them is empty, and none is shown."""
    temperature: float | None = None
    """Sampling temperature."""
    top_p: float | None = None
    """Nucleus sampling mass."""
    presence_penalty: float | None = None
    """Penalty on tokens that have appeared."""
    frequency_penalty: float | None = None
    """Penalty on tokens by how often they appeared."""
    seed: int | None = None
    """Makes sampling repeatable where the backend can."""
    logit_bias: dict[str, float] | None = None
    """Token id to bias."""
    logprobs: bool = False
    """Whether each token's log probability is wanted."""
    top_logprobs: int = 0
    """How many alternatives a token."""
    tools: tuple[Tool, ...] = ()
    """What the model may call."""
    tool_choice: str = "auto"
    """auto, none, required, or `function:NAME`."""
    parallel_tool_calls: bool = True
    """Whether several calls may be made in one turn."""
    response_format: dict[str, Any] | None = None
    """A JSON mode or JSON Schema that the text must follow."""
    reasoning_effort: str | None = None
    """How much the model should think."""
    user: str | None = None
    """The client's name for its own user."""
    stream: bool = False
    """Whether the answer is wanted as a stream."""
    include_usage: bool = False
    """Whether the stream must end with token counts."""

    @property
    def prompt(self) -> str:
        """The text of the last user message, or of the last message where no user spoke.

        It is what a plain generator of text usually wants; the whole conversation is in `messages`.
        """
        said = [message for message in self.messages if message.role == "user"] or list(self.messages)
        return said[-1].text if said else ""
