"""A WebSocket echo server: the codec alone on plain asyncio. `python websocket_echo.py --port 9001`.

Nothing of tokenwire's server runs. Compression is offered, and the limits are wide, for `make conformance` sends messages
of 16 MiB and messages of 65,536 fragments.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

from tokenwire.core.errors import RemoteProtocolError
from tokenwire.core.http import HeadReceived, HttpEvent, RequestReader, encode_head
from tokenwire.core.websocket import (
    Accepted,
    BinaryMessage,
    Closed,
    DeflateOptions,
    Role,
    TextMessage,
    UpgradeRefused,
    WebSocketConnection,
    accept_upgrade,
)

MAX_MESSAGE_BYTES = 1 << 25
MAX_FRAGMENTS = 1 << 17
COMPRESSION = DeflateOptions(server_max_window_bits=15, client_max_window_bits=15)


class Echo(asyncio.Protocol):
    """One client."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.reader = RequestReader(max_pipelined_bytes=MAX_MESSAGE_BYTES)
        self.connection: WebSocketConnection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self.connection is None:
            data = self.take_head(data)
        if self.connection is not None and data:
            self.answer(self.connection, data)

    def take_head(self, data: bytes) -> bytes:
        """Answer the request once its head is whole; give what came behind it."""
        try:
            events = self.reader.receive_data(data)
            if not events:
                return b""
            accepted = accept(events[0])
        except RemoteProtocolError as error:
            more = error.headers if isinstance(error, UpgradeRefused) else ()
            refusal = dict((*more, ("content-length", "0"), ("connection", "close")))
            self.transport.write(encode_head(error.status, tuple(refusal.items())))
            self.transport.close()
            return b""
        self.transport.write(encode_head(101, accepted.headers))
        self.connection = WebSocketConnection(
            Role.SERVER, deflate=accepted.deflate, max_message_bytes=MAX_MESSAGE_BYTES, max_fragments=MAX_FRAGMENTS
        )
        return self.reader.hand_over()

    def answer(self, connection: WebSocketConnection, data: bytes) -> None:
        """Send back every message that the bytes complete."""
        out: list[bytes] = []
        ended = False
        for event in connection.receive_data(data):
            match event:
                case TextMessage(text):
                    out.append(connection.send_text(text))
                case BinaryMessage(message):
                    out.append(connection.send_binary(message))
                case Closed():
                    ended = True
                case _:  # a ping, whose pong leaves by itself, or a pong
                    pass
        out += connection.data_to_send()
        if out:
            self.transport.writelines(out)
        if ended:
            self.transport.close()


def accept(received: HttpEvent) -> Accepted:
    """Judge a request by its head."""
    if not isinstance(received, HeadReceived) or received.version != "1.1":
        raise UpgradeRefused("a WebSocket begins with an HTTP/1.1 request")
    return accept_upgrade(received.head, deflate=COMPRESSION)


async def main() -> None:
    parser = argparse.ArgumentParser(description="Echo WebSocket messages.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9001, help="0 for one of the system's choice")
    options = parser.parse_args()
    server = await asyncio.get_running_loop().create_server(Echo, options.host, options.port)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"ws://{host}:{port}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
