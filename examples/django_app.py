"""Django: `uvicorn django_app:app`. Django mounts nothing, so the whole server is dispatched to by its path."""

import json
from collections.abc import AsyncIterator
from typing import Any

import django
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, StreamingHttpResponse
from django.urls import path

from tokenwire.adapters.asgi import app as tokenwire_app
from tokenwire.adapters.embed import token_stream

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1", "localhost"], SECRET_KEY="of an example")
django.setup()


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "


async def chat(request: HttpRequest) -> StreamingHttpResponse:
    body = json.loads(request.body)
    status, headers, stream = await token_stream(generate(body["messages"][-1]["content"]), request=body)
    return StreamingHttpResponse(stream, status=status, headers=dict(headers))


urlpatterns = [path("v1/chat/completions", chat)]
ai = tokenwire_app(generate)
pages = ASGIHandler()


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":  # Django has none of its own
        await ai(scope, receive, send)
    elif scope["path"].startswith("/ai/"):
        await ai({**scope, "root_path": "/ai"}, receive, send)
    else:
        await pages(scope, receive, send)
