"""A one-token answer by bare ASGI that does a server's least work: it reads the JSON, and words what it sends."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping

import msgspec

__all__ = ["app"]

# The shapes are those of the ASGI specification: every message is a dict of values that depend on its type.
Message = MutableMapping[str, object]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class _Request(msgspec.Struct):
    prompt: str
    max_tokens: int = 64
    stream: bool = True


_read = msgspec.json.Decoder(_Request).decode


def _event(value: object, number: str) -> bytes:
    return f"data: {json.dumps(value)}\nid: {number}\n\n".encode()


async def _read_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        piece = message.get("body", b"")
        assert isinstance(piece, bytes)
        body += piece
        if not message.get("more_body"):
            return body


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Answers with one token and how it ended, each in a message of its own, as they come from a model."""
    if scope["path"] != "/chat":  # whoever looks whether the server is up
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})
        return
    request = _read(await _read_body(receive))
    stream_id = f"tw{secrets.token_hex(12)}"
    headers = [
        (b"content-type", b"text/event-stream"),
        (b"cache-control", b"no-cache, no-transform"),
        (b"x-accel-buffering", b"no"),
        (b"x-request-id", stream_id.encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    token = _event({"token": "The"}, f"{stream_id}.2")
    await send({"type": "http.response.body", "body": token, "more_body": True})
    usage = {"input_tokens": len(request.prompt.split()), "output_tokens": 1}
    end = _event({"token": "", "finish_reason": "length", "usage": usage}, f"{stream_id}.5")
    await send({"type": "http.response.body", "body": end + b"data: [DONE]\n\n"})
