"""Sanic: `python sanic_app.py PORT`."""

import sys
from collections.abc import AsyncIterator

from sanic import HTTPResponse, Request, Sanic

from tokenwire.adapters.embed import token_stream

app = Sanic("tokenwire_example")


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "


@app.post("/v1/chat/completions")
async def chat(request: Request) -> None:
    body = request.json
    status, headers, stream = await token_stream(generate(body["messages"][-1]["content"]), request=body)
    fields = dict(headers)
    async with stream:
        response = await request.respond(
            HTTPResponse(status=status, headers=fields, content_type=fields["content-type"])
        )
        async for data in stream:
            await response.send(data)
        await response.eof()


if __name__ == "__main__":
    app.run(host="127.0.0.1", port=int(sys.argv[1]), single_process=True, motd=False, access_log=False)
