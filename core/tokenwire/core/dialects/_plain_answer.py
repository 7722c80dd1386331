"""Reading whole answers of plain.v1."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Struct

from tokenwire.core.events import (
    ChoiceEnd,
    Event,
    FinishReason,
    ReasoningDelta,
    RefusalDelta,
    StreamEnd,
    StreamStart,
    StreamTruncated,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.states import MAX_CALLS

from ._incoming_errors import error_from_wire, is_cut_json, malformed_answer

__all__ = ["REASONS", "WireUsage", "decode_plain_answer"]

REASONS: Final = {reason.value: reason for reason in FinishReason}
"""The neutral reasons by their words, which are plain.v1's own."""


_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
"""Within what JSON's readers in all languages take unchanged."""


class WireUsage(Struct, gc=False):
    """Token counts."""

    input_tokens: _Count = 0
    output_tokens: _Count = 0
    cached_tokens: _Count = 0
    cache_write_tokens: _Count = 0
    reasoning_tokens: _Count = 0


class _Call(Struct, gc=False):
    id: str = ""
    name: str = ""
    arguments: str = ""


class _Answer(Struct):
    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: Annotated[tuple[_Call, ...], msgspec.Meta(max_length=MAX_CALLS)] = ()
    finish_reason: str | None = None
    stop_sequence: str | None = None
    usage: WireUsage | None = None
    model: str = ""
    id: str = ""
    error: Any = None


_decode: Final = msgspec.json.Decoder(_Answer).decode


def decode_plain_answer(body: bytes) -> list[Event]:
    """Decode a whole answer; one without a finish reason is none.

    Returns:
        Its events, the last of them terminal; see `contracts.Dialect.decode_result`.
    """
    if not body.strip():
        return [StreamTruncated("the answer is empty", len(body))]
    try:
        answer = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if is_cut_json(error):
            return [StreamTruncated(f"the answer is not whole: {error}", len(body))]
        return [malformed_answer(str(error))]
    if answer.error:
        return [error_from_wire(answer.error)]
    if answer.finish_reason is None:
        return [malformed_answer("it has no finish_reason")]
    return _events(answer, REASONS.get(answer.finish_reason, FinishReason.OTHER))


def _events(answer: _Answer, reason: FinishReason) -> list[Event]:
    events: list[Event] = [StreamStart(answer.id, answer.model, 0)]
    if answer.reasoning:
        events.append(ReasoningDelta(answer.reasoning))
    if answer.text:
        events.append(TextDelta(answer.text))
    if answer.refusal:
        events.append(RefusalDelta(answer.refusal))
    for number, call in enumerate(answer.tool_calls):
        events.append(ToolCallStart(number, call.id, call.name))
        if call.arguments:
            events.append(ToolCallDelta(number, call.arguments))
    events.append(ChoiceEnd(0, reason, answer.stop_sequence))
    if answer.usage is not None:
        events.append(UsageReport(*msgspec.structs.astuple(answer.usage)))
    return [*events, StreamEnd()]
