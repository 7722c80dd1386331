"""The least that a gateway in Python can do: bytes from one socket to the other, looked at by nobody.

python tcp_relay.py PORT TARGET_PORT [asyncio|uvloop]
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import cast

__all__: list[str] = []


class Side(asyncio.Protocol):
    """One socket of a pair; what it receives is written to the other."""

    other: asyncio.Transport | None = None
    own: asyncio.Transport | None = None

    def __init__(self) -> None:
        self.early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.own = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on, once there is somebody to pass them to."""
        if self.other is None:
            self.early += data
        else:
            self.other.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other side too."""
        del exc
        if self.other is not None:
            self.other.close()


class Front(Side):
    """The client's side: it connects to the target."""

    def __init__(self, target: int) -> None:
        super().__init__()
        self.target = target
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect to the target."""
        super().connection_made(transport)
        self.task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        transport, back = await asyncio.get_running_loop().create_connection(Side, "127.0.0.1", self.target)
        back.other = self.own
        self.other = transport
        transport.write(self.early)


async def main(port: int, target: int) -> None:
    """Relay until the end."""
    server = await asyncio.get_running_loop().create_server(lambda: Front(target), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[3:] == ["uvloop"]:
        importlib.import_module("uvloop").install()
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
