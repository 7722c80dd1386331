"""FastAPI: `uvicorn fastapi_app:app`. The openai SDK is a client of it."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from tokenwire.adapters.asgi import app as tokenwire_app
from tokenwire.adapters.response import TokenStreamResponse

app = FastAPI()


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "


@app.post("/v1/chat/completions")
async def chat(body: dict[str, Any]) -> TokenStreamResponse:
    return TokenStreamResponse(generate(body["messages"][-1]["content"]), request=body)


app.mount("/ai", tokenwire_app(generate))
