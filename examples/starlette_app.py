"""Starlette: `uvicorn starlette_app:app`. The whole server is mounted below /ai, and lives with Starlette's lifespan."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, Route

from tokenwire.adapters.asgi import app as tokenwire_app
from tokenwire.adapters.response import TokenStreamResponse


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "


async def chat(request: Request) -> TokenStreamResponse:
    body = await request.json()
    return TokenStreamResponse(generate(body["messages"][-1]["content"]), request=body)


ai = tokenwire_app(generate)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    ai.start()
    yield
    await ai.aclose()


app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Mount("/ai", ai)], lifespan=lifespan)
