"""The codecs alone in a bare asyncio server: `python asyncio_codec_server.py PORT`. Nothing of tokenwire's server runs."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator

from tokenwire.core import Event, StreamEnd, StreamStart
from tokenwire.core.dialects.openai_chat import DIALECT
from tokenwire.core.errors import RequestRefused
from tokenwire.core.framing import chunk
from tokenwire.core.stream import Item, Stream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
HONOURED = frozenset({"max_tokens", "stop"})  # Stream sees to both


async def generate(prompt: str) -> AsyncIterator[str]:
    for word in f"You said: {prompt}".split():
        yield word + " "
        await asyncio.sleep(0.01)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
    except asyncio.IncompleteReadError:  # a connection without a request
        writer.close()
        return
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    try:
        request = DIALECT.parse_request(await reader.readexactly(length), {}, HONOURED).request
    except RequestRefused as refused:
        body = DIALECT.encode_error(refused.error)
        writer.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        writer.close()
        return
    start = StreamStart("chatcmpl-example", request.model, int(time.time()))
    stream = Stream(start, stops=request.stop, max_tokens=request.max_tokens)
    encoder = DIALECT.encoder(request, start.id)
    number = 0

    def encode(events: list[Event]) -> bytes:
        nonlocal number
        out = b""
        for event in events:
            number += 1
            out += chunk(encoder.encode(event, number))
        return out

    writer.write(HEAD)
    items: AsyncIterator[Item] = generate(request.prompt)
    async for item in items:
        writer.write(encode(list(stream.accept((item,)))))
        await writer.drain()
        if stream.terminal is not None or writer.is_closing():
            break
    writer.write(encode(list(stream.accept((StreamEnd(),)))) + b"0\r\n\r\n")
    writer.close()


async def main() -> None:
    async with await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
