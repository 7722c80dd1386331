"""Ways from a token to wire bytes: OpenAI's chunk as a server-sent event in an HTTP chunk, by tokenwire and by others.

Each contender's `start` makes a fresh encoder, as for a new stream. What it returns encodes a whole workload, token by
token, and keeps every result, so that what is timed is what `tests/test_benchmarks.py` has decoded.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

from tokenwire.core.contracts import Reply, ResponseHead
from tokenwire.core.delivery import DeliveryOptions, StreamDelivery
from tokenwire.core.dialects.openai_chat import ChatEncoder
from tokenwire.core.events import Failure, StreamStart, TextDelta
from tokenwire.core.framing import fold_chunked
from tokenwire.core.http import ResponseWriter
from tokenwire.core.stream import Stream
from workloads import CHUNK_ID, CREATED, MODEL, Token, http_chunk, openai_chunk

__all__ = ["CONTENDERS", "Contender", "Encode"]

Encode = Callable[[Sequence[Any]], list[bytes]]
"""Encodes a workload's tokens, in the form that the contender's `prepare` gave them."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way.

    Attributes:
        prepare: makes of a token what the contender begins with; not timed.
        start: makes a fresh encoder; not timed.
        module: what must be installed for it.
    """

    prepare: Callable[[Token], Any]
    start: Callable[[], Encode]
    module: str = "tokenwire"

    @property
    def is_installed(self) -> bool:
        """Whether it can start here."""
        return importlib.util.find_spec(self.module) is not None


_START = StreamStart(CHUNK_ID, MODEL, CREATED)


def _each(encode: Callable[[Any], bytes]) -> Encode:
    return lambda tokens: [encode(token) for token in tokens]


def _event(token: Token) -> TextDelta:
    return TextDelta(token.text)


def _run(token: Token) -> tuple[TextDelta, ...]:
    return (TextDelta(token.text),)


def _text(token: Token) -> str:
    return token.text


def _bare() -> Encode:
    """The least that can be done: nothing is escaped, and the chunk's size is always the same."""
    before, after = http_chunk(
        b"data: " + json.dumps(openai_chunk("|"), separators=(",", ":")).encode() + b"\n\n"
    ).split(b'"|"')

    def encode(escaped: bytes) -> bytes:
        return before + escaped + after

    return _each(encode)


def _tokenwire() -> Encode:
    """From event to wire bytes, as a delivery does it."""
    encoder = ChatEncoder(include_usage=False)
    encoder.encode(_START, 1)
    template = encoder.template(0)
    assert template is not None
    folded = fold_chunked(template)
    return lambda events: [folded.encode(event.text, number) for number, event in enumerate(events, 2)]


def _no_refusal(failure: Failure) -> Reply:
    raise AssertionError(failure)


def _tokenwire_line() -> Encode:
    """The whole of the core's line: grammar, counting, flow and encoding."""
    stream = Stream(_START)
    options = DeliveryOptions()
    head = ResponseHead(200)
    delivery = StreamDelivery(ChatEncoder(include_usage=False), ResponseWriter(), head, _no_refusal, options, 0)
    delivery.deliver(stream.accept((_START, TextDelta("first"))), 0)
    return lambda runs: [delivery.deliver(stream.accept(run), 0) for run in runs]


def _json() -> Encode:
    def encode(text: str) -> bytes:
        return http_chunk(f"data: {json.dumps(openai_chunk(text))}\n\n".encode())

    return _each(encode)


def _orjson() -> Encode:
    dumps: Callable[[object], bytes] = importlib.import_module("orjson").dumps

    def encode(text: str) -> bytes:
        return http_chunk(b"data: " + dumps(openai_chunk(text)) + b"\n\n")

    return _each(encode)


def _pydantic() -> Encode:
    """Three models, one in another, as the usual servers have them."""
    create_model: Callable[..., Any] = importlib.import_module("pydantic").create_model
    delta = create_model("Delta", content=(str, ...))
    choice = create_model("Choice", index=(int, ...), delta=(delta, ...), finish_reason=(str | None, None))
    chunk = create_model(
        "Chunk",
        id=(str, ...),
        object=(str, ...),
        created=(int, ...),
        model=(str, ...),
        choices=(GenericAlias(list, (choice,)), ...),
    )

    def encode(text: str) -> bytes:
        choices = [choice(index=0, delta=delta(content=text))]
        made = chunk(id=CHUNK_ID, object="chat.completion.chunk", created=CREATED, model=MODEL, choices=choices)
        return http_chunk(f"data: {made.model_dump_json()}\n\n".encode())

    return _each(encode)


def _sse_starlette() -> Encode:
    event: Callable[..., Any] = importlib.import_module("sse_starlette.event").ServerSentEvent

    def encode(text: str) -> bytes:
        payload: bytes = event(data=json.dumps(openai_chunk(text))).encode()
        return http_chunk(payload)

    return _each(encode)


CONTENDERS: dict[str, Contender] = {
    "bare concatenation": Contender(lambda token: token.escaped, _bare),
    "tokenwire": Contender(_event, _tokenwire),
    "tokenwire, the whole line": Contender(_run, _tokenwire_line),
    "orjson of a dict": Contender(_text, _orjson, "orjson"),
    "json.dumps and f-string": Contender(_text, _json),
    "three pydantic models": Contender(_text, _pydantic, "pydantic"),
    "sse-starlette over json.dumps": Contender(_text, _sse_starlette, "sse_starlette"),
}
