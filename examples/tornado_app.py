"""Tornado: `python tornado_app.py PORT`."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator

from tornado.iostream import StreamClosedError
from tornado.web import Application, RequestHandler

from tokenwire.adapters.embed import TokenStream, token_stream


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "


class Chat(RequestHandler):
    stream: TokenStream | None = None

    async def post(self) -> None:
        body = json.loads(self.request.body)
        status, headers, self.stream = await token_stream(generate(body["messages"][-1]["content"]), request=body)
        self.set_status(status)
        for name, value in headers:
            self.set_header(name, value)
        async with self.stream as stream:
            async for data in stream:
                self.write(data)
                try:
                    await self.flush()
                except StreamClosedError:
                    return

    def on_connection_close(self) -> None:
        if self.stream is not None:
            self.stream.close()


async def main() -> None:
    Application([("/v1/chat/completions", Chat)]).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
