"""WebSocket frames written by hand for the tests, with nothing of the code under test."""

from __future__ import annotations

import struct

__all__ = ["BINARY", "CLOSE", "CONTINUATION", "KEY", "PING", "PONG", "TEXT", "frame", "mask", "unframe"]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = b"\x37\xfa\x21\x3d"
"""The masking key of RFC 6455's examples."""


def mask(payload: bytes, key: bytes = KEY) -> bytes:
    """Mask a payload byte by byte, as RFC 6455, 5.3 words it."""
    return bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


def frame(
    payload: bytes = b"",
    opcode: int = TEXT,
    *,
    fin: bool = True,
    rsv: int = 0,
    key: bytes | None = KEY,
    width: int | None = None,
    length: int | None = None,
) -> bytes:
    """Write a frame, right or wrong.

    Args:
        payload: the payload, before masking.
        opcode: any of 16.
        fin: whether it ends its message.
        rsv: the three reserved bits, the first as 4.
        key: the masking key; None for an unmasked frame.
        width: bytes of the length, 0, 2 or 8; None for the least that will do.
        length: what the header says; None for the truth.
    """
    length = len(payload) if length is None else length
    if width is None:
        width = 0 if length < 126 else 2 if length < 65536 else 8
    first = fin << 7 | rsv << 4 | opcode
    bit = 0x80 if key is not None else 0
    said = {0: length, 2: 126, 8: 127}[width]
    head = struct.pack("!BB", first, bit | said) + {0: b"", 2: struct.pack("!H", length & 0xFFFF)}.get(
        width, struct.pack("!Q", length)
    )
    return head + (payload if key is None else key + mask(payload, key))


def unframe(data: bytes) -> list[tuple[int, int, bytes]]:
    """Read whole frames: first byte without the opcode, opcode, payload unmasked."""
    frames: list[tuple[int, int, bytes]] = []
    while data:
        first, second = data[0], data[1]
        width = {126: 2, 127: 8}.get(second & 0x7F, 0)
        length = int.from_bytes(data[2 : 2 + width], "big") if width else second & 0x7F
        at = 2 + width
        key = b"\0\0\0\0"
        if second & 0x80:
            key, at = data[at : at + 4], at + 4
        payload = data[at : at + length]
        assert len(payload) == length
        frames.append((first & 0xF0, first & 0x0F, mask(payload, key)))
        data = data[at + length :]
    return frames
