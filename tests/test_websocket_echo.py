"""The echo server of the examples: its handshake, and what it says back; `make conformance` does the rest."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.websocket_frames import CLOSE, TEXT, frame, unframe

ECHO = Path(__file__).parents[1] / "examples" / "websocket_echo.py"
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def writelines(self, pieces: list[bytes]) -> None:
        self.write(b"".join(pieces))

    def close(self) -> None:
        self.closed = True


def fed(*pieces: bytes) -> Wire:
    """Give a fresh connection pieces of input, until it has closed."""
    spec = importlib.util.spec_from_file_location("websocket_echo", ECHO)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wire, echo = Wire(), module.Echo()
    echo.connection_made(wire)
    for piece in pieces:
        if not wire.closed:
            echo.data_received(piece)
    return wire


@pytest.mark.parametrize("before", [b"", b"\r\n\r\n"], ids=["at once", "after empty lines"])
@pytest.mark.parametrize("size", [1, 50, 4096])
def test_messages_come_back(before: bytes, size: int) -> None:
    data = before + REQUEST + frame(b"a" * 20_000, TEXT) + frame(b"b", TEXT) + frame(b"\x03\xe8", CLOSE)
    wire = fed(*(data[at : at + size] for at in range(0, len(data), size)), b"late")
    head, end, frames = wire.written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert end
    assert unframe(frames) == [(0x80, TEXT, b"a" * 20_000), (0x80, TEXT, b"b"), (0x80, CLOSE, b"\x03\xe8")]
    assert wire.closed


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"426"),
        (REQUEST.replace(b"13", b"8"), b"426"),
        (REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"), b"400"),
        (b"\x16\x03\x01", b"400"),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 40_000, b"431"),
    ],
)
def test_what_is_no_handshake_is_refused(request_bytes: bytes, status: bytes) -> None:
    wire = fed(request_bytes)
    assert wire.written.startswith(b"HTTP/1.1 " + status + b" ")
    assert wire.written.endswith(b"\r\n\r\n")
    assert wire.closed
