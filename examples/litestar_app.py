"""Litestar: `uvicorn litestar_app:app`."""

from collections.abc import AsyncIterator
from typing import Any

from litestar import Litestar, asgi, post
from litestar.types import Receive, Scope, Send

from tokenwire.adapters.asgi import app as tokenwire_app
from tokenwire.adapters.response import TokenStreamResponse


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "


ai = tokenwire_app(generate)


@post("/v1/chat/completions", status_code=200)
async def chat(data: dict[str, Any]) -> TokenStreamResponse:
    return TokenStreamResponse(generate(data["messages"][-1]["content"]), request=data)


@asgi("/ai", is_mount=True, copy_scope=True)
async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
    await ai(scope, receive, send)


app = Litestar([chat, mounted], on_startup=[ai.start], on_shutdown=[ai.aclose])
