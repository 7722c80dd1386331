"""Quart: `hypercorn quart_app:app`. Quart mounts nothing, so the whole server is dispatched to by its path."""

from collections.abc import AsyncIterator
from typing import Any

from quart import Quart, Response, request

from tokenwire.adapters.asgi import app as tokenwire_app
from tokenwire.adapters.embed import token_stream

quart = Quart(__name__)


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "


@quart.post("/v1/chat/completions")
async def chat() -> Response:
    body = await request.get_json()
    status, headers, stream = await token_stream(generate(body["messages"][-1]["content"]), request=body)
    response = Response(stream, status, dict(headers))
    response.timeout = None  # else Quart ends every answer after 60 seconds
    return response


ai = tokenwire_app(generate)


@quart.after_serving
async def close() -> None:
    await ai.aclose()


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http" and scope["path"].startswith("/ai/"):
        await ai({**scope, "root_path": "/ai"}, receive, send)
    else:
        await quart(scope, receive, send)
