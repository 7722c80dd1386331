"""tokenwire's own decoders as a program that run.py can ask; also an example of one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tokenwire.core import ndjson, sse
from tokenwire.core.errors import RemoteProtocolError
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


ANSWERS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "sse": decode_sse,
    "ndjson": decode_ndjson,
    "utf8": assemble,
    "stops": scan,
}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
