"""The vocabulary of a token stream: what a backend says, what a client hears, the same in both directions.

Every event is a frozen struct that is complete when built and has no mutable member, which is what makes it
safe to keep it away from the cyclic garbage collector (`gc=False`).

A stream is StreamStart, then deltas of its choices, a ChoiceEnd for each choice, and one terminal event:
StreamEnd, StreamError, StreamCancelled or StreamTruncated. `states` holds the grammar as a table. A backend may
leave out StreamStart and may write a plain str for a TextDelta of choice 0; see `stream`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

__all__ = [
    "DELTAS",
    "TERMINALS",
    "ChoiceEnd",
    "Delta",
    "ErrorKind",
    "Event",
    "Failure",
    "FinishReason",
    "ProviderData",
    "ReasoningDelta",
    "RefusalDelta",
    "StreamCancelled",
    "StreamEnd",
    "StreamError",
    "StreamStart",
    "StreamTruncated",
    "Terminal",
    "TextDelta",
    "TokenLogprob",
    "ToolCallDelta",
    "ToolCallStart",
    "TopLogprob",
    "UsageReport",
]


class FinishReason(StrEnum):
    """Why a choice ended, in neutral words; each dialect has a table to its own (some cells lose detail)."""

    STOP = "stop"
    """The model came to its natural end."""
    STOP_SEQUENCE = "stop_sequence"
    """A stop string of the request was reached; ChoiceEnd.stop_sequence names it."""
    LENGTH = "length"
    """The request's token limit was reached."""
    CONTEXT_WINDOW = "context_window"
    """The model's context was full."""
    TOOL_CALLS = "tool_calls"
    """The model waits for the results of its tool calls."""
    CONTENT_FILTER = "content_filter"
    """A filter cut the answer off."""
    REFUSAL = "refusal"
    """The model declined to answer."""
    PAUSE = "pause"
    """The provider paused a long turn that the client may go on with."""
    OTHER = "other"
    """A provider's word that none of the above means."""


class ErrorKind(StrEnum):
    """What sort of failure an error is; `tokenwire.core.dialects.base` maps each to a status and to a dialect's word."""

    INVALID_REQUEST = "invalid_request"
    AUTHENTICATION = "authentication"
    PERMISSION = "permission"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    RATE_LIMIT = "rate_limit"
    SERVER = "server"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"


class TopLogprob(Struct, frozen=True, gc=False):
    """One alternative for a token's place."""

    token: str
    """The alternative's text."""
    logprob: float
    """Its natural-log probability."""
    bytes: bytes | None = None
    """Its bytes where the text alone cannot show them."""


class TokenLogprob(Struct, frozen=True, gc=False):
    """The log probability of one emitted token."""

    token: str
    """The token's text."""
    logprob: float
    """Its natural-log probability."""
    bytes: bytes | None = None
    """Its bytes where the text alone cannot show them."""
    top: tuple[TopLogprob, ...] = ()
    """The likeliest alternatives, best first."""


class StreamStart(Struct, frozen=True, gc=False):
    """The stream begins; nothing but a terminal event may come before it."""

    id: str
    """The stream's id, the same in every chunk of the dialects that repeat it."""
    model: str
    """The model's name as the client will read it."""
    created: int
    """Unix time in whole seconds."""
    role: str = "assistant"
    """Who speaks."""
    choices: int = 1
    """How many choices will each end with a ChoiceEnd; 0 where the producer does not say (a decoder does not know),
    then a choice opens with its first event."""


class TextDelta(Struct, frozen=True, gc=False):
    """More text of one choice."""

    text: str
    """The text to append; may be empty where only logprobs or a token count came."""
    choice: int = 0
    """The choice it belongs to, from 0."""
    token_count: int = 1
    """How many tokens of the model it stands for; 0 for text held back from an earlier token."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry a token, or None where none were asked for."""


class ReasoningDelta(Struct, frozen=True, gc=False):
    """More of the model's reasoning, apart from its answer."""

    text: str
    """The text to append."""
    choice: int = 0
    """The choice it belongs to, from 0."""
    token_count: int = 1
    """How many tokens of the model it stands for."""


class RefusalDelta(Struct, frozen=True, gc=False):
    """More of the text with which the model declines."""

    text: str
    """The text to append."""
    choice: int = 0
    """The choice it belongs to, from 0."""
    token_count: int = 1
    """How many tokens of the model it stands for."""


class ToolCallStart(Struct, frozen=True, gc=False):
    """The model begins to call a tool."""

    call_index: int
    """The call's number within its choice, from 0 and without holes."""
    call_id: str
    """The id that the client sends back with the tool's result."""
    name: str
    """The tool's name."""
    choice: int = 0
    """The choice it belongs to, from 0."""


class ToolCallDelta(Struct, frozen=True, gc=False):
    """More of a tool call's arguments."""

    call_index: int
    """The call it belongs to; its ToolCallStart has come."""
    arguments: str
    """The next piece of the arguments' JSON text."""
    choice: int = 0
    """The choice it belongs to, from 0."""
    token_count: int = 1
    """How many tokens of the model it stands for."""


class ProviderData(Struct, frozen=True, gc=False):
    """What must survive though only one provider knows its meaning, such as a thinking signature."""

    kind: str
    """The provider's name for it."""
    value: str
    """Its value, untouched."""
    choice: int = 0
    """The choice it belongs to, from 0."""
    call_index: int | None = None
    """The tool call it belongs to, or None for the choice itself."""


class UsageReport(Struct, frozen=True, gc=False):
    """Token counts so far, each the whole of its kind and never falling."""

    input_tokens: int
    """All tokens of the prompt, cached ones included."""
    output_tokens: int
    """All generated tokens, reasoning included."""
    cached_tokens: int = 0
    """How many of the prompt's tokens were read from a cache."""
    cache_write_tokens: int = 0
    """How many of the prompt's tokens were written to a cache."""
    reasoning_tokens: int = 0
    """How many of the generated tokens were reasoning."""


class ChoiceEnd(Struct, frozen=True, gc=False):
    """A choice is complete; no delta of it may follow."""

    choice: int = 0
    """The choice, from 0."""
    reason: FinishReason = FinishReason.STOP
    """Why it ended."""
    stop_sequence: str | None = None
    """The stop string that ended it, where one did."""


class StreamEnd(Struct, frozen=True, gc=False):
    """Terminal: every choice has ended and nothing is missing."""


class StreamError(Struct, frozen=True, gc=False):
    """Terminal: the stream failed. The same value words a refusal before a stream begins."""

    kind: ErrorKind
    """What sort of failure."""
    message: str
    """One or two sentences for the reader; never a traceback."""
    code: str | None = None
    """A stable word for programs, such as model_not_found."""
    param: str | None = None
    """The request field it is about."""
    status: int | None = None
    """The HTTP status where it differs from the kind's own."""
    retry_after_ns: int | None = None
    """How long the client should wait before it asks again, in nanoseconds."""
    retryable: bool = False
    """Whether the same request may succeed later."""
    type: str | None = None
    """The provider's own word for its sort where that differs from the kind's."""


class StreamCancelled(Struct, frozen=True, gc=False):
    """Terminal: somebody stopped the stream."""

    by: str
    """Who: client, operator, server."""


class StreamTruncated(Struct, frozen=True, gc=False):
    """Terminal: the input ended without a terminal event. Never a success."""

    reason: str
    """What was seen instead."""
    bytes_seen: int = 0
    """How many bytes had come."""


Delta = TextDelta | ReasoningDelta | RefusalDelta | ToolCallStart | ToolCallDelta | ProviderData
"""What a choice is made of."""

Terminal = StreamEnd | StreamError | StreamCancelled | StreamTruncated
"""How a stream ends, exactly once."""

Failure = StreamError | StreamCancelled | StreamTruncated
"""How a stream ends that did not succeed."""

Event = StreamStart | Delta | UsageReport | ChoiceEnd | Terminal
"""Everything that a stream can say."""

DELTAS: Final = (TextDelta, ReasoningDelta, RefusalDelta, ToolCallStart, ToolCallDelta, ProviderData)
"""The classes of `Delta`."""

TERMINALS: Final = (StreamEnd, StreamError, StreamCancelled, StreamTruncated)
"""The classes of `Terminal`."""
