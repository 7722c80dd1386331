"""Applications of the tests, run under ASGI servers in the environment of requirements-asgi.txt.

The backend is told a folder by the prompt, and writes there, in `notes`, what happens to it.
"""
# pyright: basic, reportMissingImports=false
# mypy: disable-error-code="import-not-found, unused-ignore, no-untyped-call, misc"
# The frameworks are in an environment of their own, where no type checker looks.

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.routing import Mount, Route

from tokenwire.adapters.asgi import app as make_app
from tokenwire.adapters.response import TokenStreamResponse

__all__ = ["bare", "behind_middleware", "mounted", "response"]


async def generate(prompt: str) -> AsyncIterator[str]:
    """Echo; or, told a folder, say what its name says and wait until somebody stops it."""
    if not prompt.startswith("/"):
        for word in prompt.split():
            await anyio.lowlevel.checkpoint()
            yield f"{word} "
        return
    folder = Path(prompt)
    note(folder, "run")
    try:
        if folder.name != "silent":
            yield "one "
            yield "two "
        await anyio.sleep(60)
    finally:
        note(folder, "closed")


def note(folder: Path, what: str) -> None:
    """Write down what happens."""
    with (folder / "notes").open("a") as notes:
        notes.write(f"{what}\n")


class Untouched(BaseHTTPMiddleware):
    """The middleware that wraps `receive`, doing nothing else."""

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        return await call_next(request)


async def chat(request: Request) -> TokenStreamResponse:
    """Answer by a response."""
    body = await request.json()
    return TokenStreamResponse(generate(body["messages"][-1]["content"]), request=body)


bare = make_app(generate, max_running=64)
mounted = Starlette(routes=[Mount("/", make_app(generate))])
behind_middleware = Starlette(routes=[Mount("/", make_app(generate))], middleware=[Middleware(Untouched)])
response = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], middleware=[Middleware(Untouched)])
