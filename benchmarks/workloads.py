"""The bytes that the benchmarks send, in one place, so that a test can decode them before anybody times them."""

from __future__ import annotations

import json
import random
from typing import Final, NamedTuple

__all__ = [
    "CHUNK_ID",
    "CREATED",
    "MODEL",
    "STEP_NS",
    "TOKENS_PER_SECOND",
    "WORKLOADS",
    "Token",
    "chat_completions_request",
    "http_chunk",
    "openai_chunk",
    "openai_chunk_payload",
]

TOKENS_PER_SECOND = 20
STEP_NS = 1_000_000_000 // TOKENS_PER_SECOND

CHUNK_ID: Final = "chatcmpl-0123456789abcdef01234567"
CREATED: Final = 1_790_000_000
MODEL: Final = "mock"

_OPENAI_CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk",'
    b'"created":1790000000,"model":"mock","choices":[{"index":0,"delta":{"content":" token"},'
    b'"finish_reason":null}]}\n\n'
)


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
    chance = random.Random(seed)
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


def openai_chunk_payload() -> bytes:
    """One server-sent event that carries one token in OpenAI's chat dialect, without transfer coding."""
    return _OPENAI_CHUNK


def http_chunk(payload: bytes) -> bytes:
    """The payload as one chunk of the chunked transfer coding (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def chat_completions_request(port: int, model: str, max_tokens: int) -> bytes:
    """A whole HTTP/1.1 request for a streamed chat completion: head and JSON body.

    Args:
        port: the loopback port, for the Host field.
        model: the model's name.
        max_tokens: how many tokens the stream may last.
    """
    body = json.dumps(
        {
            "model": model,
            "stream": True,
            "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": "Count slowly, and do not stop."}],
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "\r\n"
    )
    return head.encode() + body
