"""The bytes that the benchmarks send, in one place, so that a test can decode them before anybody times them."""

from __future__ import annotations

import json

from tokenwire.core.testing.workloads import (
    CHUNK_ID,
    CREATED,
    MODEL,
    WORKLOADS,
    Token,
    http_chunk,
    openai_chunk,
)

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

_OPENAI_CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk",'
    b'"created":1790000000,"model":"mock","choices":[{"index":0,"delta":{"content":" token"},'
    b'"finish_reason":null}]}\n\n'
)


def openai_chunk_payload() -> bytes:
    """One server-sent event that carries one token in OpenAI's chat dialect, without transfer coding."""
    return _OPENAI_CHUNK


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
