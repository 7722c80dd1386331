"""The least that an ASGI application can do for a one-token answer: take the body, send a constant stream of two messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping

__all__ = ["app"]

# The shapes are those of the ASGI specification: every message is a dict of values that depend on its type.
Message = MutableMapping[str, object]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

_EVENTS = (
    b'data: {"token":"The"}\nid: tw0123456789abcdef01234567.2\nretry: 1000\n\n'
    b'data: {"token":"","finish_reason":"length","usage":{"input_tokens":3,"output_tokens":1}}\n'
    b"id: tw0123456789abcdef01234567.5\n\ndata: [DONE]\n\n"
)
_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")],
}
_BODY: Message = {"type": "http.response.body", "body": _EVENTS}


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Answers every request alike. The messages are built once and sent again, which no server forbids or changes."""
    del scope
    while (await receive()).get("more_body"):
        pass
    await send(_START)
    await send(_BODY)
