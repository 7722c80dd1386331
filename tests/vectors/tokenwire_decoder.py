"""tokenwire's own decoders as a program that run.py can ask; also an example of one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tokenwire.core import ndjson, sse
from tokenwire.core.collect import ChoiceResult, Collector
from tokenwire.core.dialects import openai_chat
from tokenwire.core.errors import RemoteProtocolError
from tokenwire.core.events import StreamEnd, StreamError, StreamTruncated
from tokenwire.core.text import StopScanner, Utf8Assembler

__all__ = ["answer"]


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Answers one question."""
    return ANSWERS[asked["format"]](asked)


def decode_sse(asked: dict[str, Any]) -> dict[str, Any]:
    decoder = sse.Decoder(strict=asked.get("strict", False))
    events, error = drain(decoder, asked["pieces"])
    return {
        "events": [msgspec.structs.asdict(event) for event in events],
        "truncated": decoder.truncated,
        "retry_ms": decoder.retry_ms,
        "last_event_id": decoder.last_event_id,
        "error": error,
    }


def decode_ndjson(asked: dict[str, Any]) -> dict[str, Any]:
    decoder = ndjson.Decoder[Any](object)
    values, error = drain(decoder, asked["pieces"])
    return {"values": values, "truncated": decoder.truncated, "error": error}


def drain(decoder: sse.Decoder | ndjson.Decoder[Any], pieces: list[str]) -> tuple[list[Any], bool]:
    """Decodes everything up to the first error; returns the items and whether there was one."""
    items: list[Any] = []
    try:
        for piece in pieces:
            items += decoder.receive_data(piece.encode("latin-1"))
        items += decoder.receive_eof()
    except RemoteProtocolError:
        return items, True
    return items, False


def assemble(asked: dict[str, Any]) -> dict[str, Any]:
    assembler = Utf8Assembler()
    text = "".join(assembler.receive_data(piece.encode("latin-1")) for piece in asked["pieces"])
    truncated = assembler.holds
    return {"text": text + assembler.flush(), "invalid": assembler.invalid, "truncated": truncated}


def scan(asked: dict[str, Any]) -> dict[str, Any]:
    scanner = StopScanner(asked["stops"])
    text = "".join(map(scanner.scan, asked["pieces"]))
    return {"text": text, "held": scanner.flush(), "stop": scanner.stop}


def decode_chat(asked: dict[str, Any]) -> dict[str, Any]:
    decoder, collector = openai_chat.DIALECT.decoder(), Collector()
    for piece in asked["pieces"]:
        for event in decoder.receive_data(piece.encode("latin-1")):
            collector.receive(event)
    for event in decoder.receive_eof():
        collector.receive(event)
    result = collector.result()
    answered: dict[str, Any] = {
        "choices": [show_choice(choice) for choice in result.choices],
        "usage": None if result.usage is None else show(result.usage, USAGE),
        "end": ENDS[type(result.terminal)],
    }
    if isinstance(result.terminal, StreamError):
        answered |= {f"error_{member}": value for member, value in show(result.terminal, ERROR).items()}
    return answered


def show_choice(choice: ChoiceResult) -> dict[str, Any]:
    calls = [{"id": call.call_id, "name": call.name, "arguments": call.arguments} for call in choice.tool_calls]
    return {**show(choice, CHOICE), "tool_calls": calls, "finish_reason": choice.reason}


def show(value: msgspec.Struct, members: tuple[str, ...]) -> dict[str, Any]:
    return {member: getattr(value, member) for member in members}


CHOICE: Final = ("index", "text", "reasoning", "refusal")
USAGE: Final = ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")
ERROR: Final = ("kind", "message", "code")
ENDS: Final[dict[type[Any], str]] = {StreamEnd: "finished", StreamError: "error", StreamTruncated: "truncated"}

ANSWERS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "sse": decode_sse,
    "ndjson": decode_ndjson,
    "utf8": assemble,
    "stops": scan,
    "openai_chat": decode_chat,
}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
