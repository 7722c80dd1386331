"""The codecs alone in a threaded, synchronous server: `python threaded_server.py PORT`. There is no event loop at all."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tokenwire.core import StreamEnd, StreamStart
from tokenwire.core.dialects.openai_chat import DIALECT
from tokenwire.core.errors import RequestRefused
from tokenwire.core.framing import chunk
from tokenwire.core.stream import Item, Stream

HONOURED = frozenset({"max_tokens", "stop"})  # Stream sees to both


def generate(prompt: str) -> Iterator[Item]:
    for word in f"You said: {prompt}".split():
        yield word + " "
        time.sleep(0.01)
    yield StreamEnd()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that leaves ends its own thread, and nothing else
            super().handle()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            request = DIALECT.parse_request(body, {}, HONOURED).request
        except RequestRefused as refused:
            self.answer(400, "application/json", "content-length", str(len(DIALECT.encode_error(refused.error))))
            self.wfile.write(DIALECT.encode_error(refused.error))
            return
        start = StreamStart("chatcmpl-example", request.model, int(time.time()))
        stream = Stream(start, stops=request.stop, max_tokens=request.max_tokens)
        encoder = DIALECT.encoder(request, start.id)
        self.answer(200, DIALECT.media_type, "transfer-encoding", "chunked")
        number = 0
        for item in generate(request.prompt):
            for event in stream.accept((item,)):
                number += 1
                self.wfile.write(chunk(encoder.encode(event, number)))
            if stream.terminal is not None:
                break
        self.wfile.write(b"0\r\n\r\n")

    def answer(self, status: int, media_type: str, name: str, value: str) -> None:
        self.send_response(status)
        self.send_header("content-type", media_type)
        self.send_header(name, value)
        self.end_headers()


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
