"""What the codec benchmarks encode and decode: the same tokens on every machine, in the shapes that go over the wire.

Each shape is made here by plain means, without an encoder of ours, so that a test can check decoders and encoders
against it before anybody times them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Final, NamedTuple

__all__ = [
    "CHUNK_ID",
    "CREATED",
    "MODEL",
    "STOPS",
    "WORKLOADS",
    "Token",
    "chat_events",
    "http_chunk",
    "openai_chunk",
    "plain_events",
    "sse_event",
]

CHUNK_ID: Final = "chatcmpl-0123456789abcdef01234567"
CREATED: Final = 1_790_000_000
MODEL: Final = "mock"

STOPS: Final = ("</s>", "<|im_end|>", "\n\nHuman:", "###")
"""Four stop strings as they are used; none of them occurs in a workload."""


class Token(NamedTuple):
    """A token's text, and the same text as a JSON string, written by hand."""

    text: str
    escaped: bytes


_WORDS: Final = (
    Token(" the", b'" the"'),
    Token(" of", b'" of"'),
    Token(" and", b'" and"'),
    Token("ing", b'"ing"'),
    Token(",", b'","'),
    Token(".", b'"."'),
    Token(" lighthouse", b'" lighthouse"'),
    Token(" weather", b'" weather"'),
    Token(" 42", b'" 42"'),
    Token(" not", b'" not"'),
)
_BEYOND_ASCII: Final = (
    Token(" café", b'" caf\xc3\xa9"'),
    Token("京都", b'"\xe4\xba\xac\xe9\x83\xbd"'),
    Token(" —", b'" \xe2\x80\x94"'),
    Token("🙂", b'"\xf0\x9f\x99\x82"'),
    Token(" naïve", b'" na\xc3\xafve"'),
)
_ESCAPES: Final = (
    Token(' "', b'" \\""'),
    Token("\n", b'"\\n"'),
    Token("\n\n", b'"\\n\\n"'),
    Token("\\", b'"\\\\"'),
    Token("\tif", b'"\\tif"'),
)
_LENGTH: Final = 1000


def _draw(seed: int, *kinds: tuple[tuple[Token, ...], int]) -> tuple[Token, ...]:
    """Draw tokens of several kinds, each with its weight: the same for the same seed."""
    chance = random.Random(seed)  # noqa: S311  # repeatable, not secret
    weights = [weight for _, weight in kinds]
    return tuple(chance.choice(chance.choices(kinds, weights)[0][0]) for _ in range(_LENGTH))


WORKLOADS: Final = {
    "prose": _draw(1, (_WORDS, 17), (_BEYOND_ASCII, 1), (_ESCAPES, 2)),
    "beyond ascii": _draw(2, (_WORDS, 1), (_BEYOND_ASCII, 3)),
    "escapes": _draw(3, (_WORDS, 1), (_ESCAPES, 3)),
}
"""Streams of short tokens, by name. Prose is what the promised ratios are about: some tokens need an escape, few are
beyond ASCII."""


def openai_chunk(text: str) -> dict[str, object]:
    """One token in OpenAI's chat dialect, as JSON decodes it."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {
        "id": CHUNK_ID,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": MODEL,
        "choices": [choice],
    }


def http_chunk(payload: bytes) -> bytes:
    """The payload as one chunk of the chunked transfer coding (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def sse_event(value: object, *, ascii_only: bool = False, event_id: str = "") -> bytes:
    """A JSON value as one server-sent event of one data line, with an id line where there is an id."""
    data = json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":"))
    return f"data: {data}\n{f'id: {event_id}{chr(10)}' if event_id else ''}\n".encode()


def chat_events(tokens: Iterable[Token]) -> list[bytes]:
    """Tokens as OpenAI chat chunks, one server-sent event each."""
    return [sse_event(openai_chunk(token.text)) for token in tokens]


def plain_events(tokens: Iterable[Token]) -> list[bytes]:
    """Tokens in plain.v1: one server-sent event each, ASCII, with an id."""
    return [
        sse_event({"token": token.text}, ascii_only=True, event_id=f"bench.{number}")
        for number, token in enumerate(tokens, 1)
    ]
