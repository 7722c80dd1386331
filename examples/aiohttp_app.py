"""aiohttp: `python aiohttp_app.py PORT`."""

import sys
from collections.abc import AsyncIterator

from aiohttp import web

from tokenwire.adapters.embed import token_stream


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    status, headers, stream = await token_stream(generate(body["messages"][-1]["content"]), request=body)
    response = web.StreamResponse(status=status, headers=dict(headers))
    async with stream:
        await response.prepare(request)
        async for data in stream:
            await response.write(data)
    return response


app = web.Application()
app.add_routes([web.post("/v1/chat/completions", chat)])

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), handler_cancellation=True)
