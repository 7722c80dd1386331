"""WebSocket frames as bytes (RFC 6455, section 5): headers, masks, close payloads.

A server's text frame is a header that depends on the payload's length alone, and the payload: usual headers stand in a
table, so that a frame costs one look-up and one concatenation.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from .errors import RemoteProtocolError
from .framing import Folded, Template
from .text import repair_surrogates

__all__ = [
    "BINARY",
    "CLOSE",
    "CONTINUATION",
    "FIN",
    "MASKED",
    "MAX_CONTROL_BYTES",
    "PING",
    "PONG",
    "RSV1",
    "TABLED",
    "TEXT",
    "TEXT_LEADS",
    "CloseCode",
    "Fault",
    "apply_mask",
    "close_payload",
    "fit_reason",
    "fold_websocket",
    "frame_header",
    "parse_close",
    "text_header",
]

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

FIN: Final = 0x80
RSV1: Final = 0x40
MASKED: Final = 0x80

MAX_CONTROL_BYTES: Final = 125
"""The longest payload of a control frame, and the longest length that one byte says (5.2, 5.5)."""

_MAX_REASON_BYTES: Final = MAX_CONTROL_BYTES - 2
_MAX_SHORT: Final = 0xFFFF
_LENGTH_16: Final = 126
_LENGTH_64: Final = 127

# Where translating every fourth byte begins to win over exclusive or of two big integers: measured, about 450 bytes.
_MAX_INTEGER_BYTES: Final = 450
_XOR_TABLES: Final = tuple(bytes(byte ^ key for byte in range(256)) for key in range(256))


class CloseCode(IntEnum):
    """Why a connection ends (RFC 6455, 7.4.1, and IANA's registry)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_STATUS = 1005
    """Never on the wire: the peer's close frame named no code."""
    ABNORMAL = 1006
    """Never on the wire: the connection ended without a close frame."""
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    MANDATORY_EXTENSION = 1010
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012
    TRY_AGAIN_LATER = 1013
    BAD_GATEWAY = 1014


_ON_THE_WIRE: Final = frozenset(CloseCode) - {CloseCode.NO_STATUS, CloseCode.ABNORMAL}
_APPLICATION_CODES: Final = range(3000, 5000)  # libraries and frameworks, then private use (7.4.2)


class Fault(RemoteProtocolError):
    """The peer broke a rule of an open WebSocket.

    Attributes:
        code: the close code that answers it.
    """

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def frame_header(opcode: int, length: int, *, flags: int = FIN, masked: int = 0) -> bytes:
    """Write a frame's header without its masking key (5.2).

    Args:
        opcode: the frame's.
        length: the payload's bytes.
        flags: FIN and the reserved bits.
        masked: MASKED where a key follows.
    """
    if length <= MAX_CONTROL_BYTES:
        return bytes((flags | opcode, masked | length))
    if length <= _MAX_SHORT:
        return bytes((flags | opcode, masked | _LENGTH_16)) + length.to_bytes(2, "big")
    return bytes((flags | opcode, masked | _LENGTH_64)) + length.to_bytes(8, "big")


TABLED: Final = 4096
"""Shorter text frames take their header from `TEXT_LEADS`; as many as `tokenwire.core.framing` has for chunks."""

TEXT_LEADS: Final = tuple(frame_header(TEXT, length) for length in range(TABLED))


def text_header(length: int) -> bytes:
    """Write the header of a server's whole text message: unmasked, uncompressed."""
    return TEXT_LEADS[length] if length < TABLED else frame_header(TEXT, length)


def fold_websocket(template: Template) -> Folded:
    """Fold a template into one text frame a token, for a server without permessage-deflate."""
    return Folded(template, TEXT_LEADS, text_header)


def apply_mask(data: bytes | bytearray, key: bytes) -> bytes | bytearray:
    """Mask or unmask a payload from a masking key's first byte on (5.3)."""
    size = len(data)
    if size <= _MAX_INTEGER_BYTES:
        stream = int.from_bytes((key * ((size >> 2) + 1))[:size], "little")
        return (int.from_bytes(data, "little") ^ stream).to_bytes(size, "little")
    # Every fourth byte out of a bytearray and back into it: out of bytes it takes half as long again.
    masked = bytearray(data)
    for offset, byte in enumerate(key):
        masked[offset::4] = masked[offset::4].translate(_XOR_TABLES[byte])
    return masked


def close_payload(code: int, reason: str = "") -> bytes:
    """Write a close frame's payload (5.5.1); CloseCode.NO_STATUS makes an empty one.

    Args:
        code: as it may stand on the wire, or NO_STATUS.
        reason: made to fit by `fit_reason`.

    Raises:
        ValueError: the code may not stand on the wire, or a reason comes without a code.
    """
    if code == CloseCode.NO_STATUS and not reason:
        return b""
    if not _may_stand(code):
        raise ValueError(f"close code {code} may not stand on the wire")
    return code.to_bytes(2, "big") + fit_reason(reason)


def fit_reason(reason: str) -> bytes:
    """Make a reason what a close frame has room for: UTF-8 of at most 123 bytes, cut off between two characters."""
    said = repair_surrogates(reason).encode()
    return said if len(said) <= _MAX_REASON_BYTES else said[:_MAX_REASON_BYTES].decode("utf-8", "ignore").encode()


def parse_close(payload: bytes) -> tuple[int, str]:
    """Read a close frame's payload: the code, NO_STATUS for none, and the reason.

    Raises:
        Fault: 1002 for half a code or one that may not stand on the wire (7.4), 1007 for a reason that is not UTF-8.
    """
    if not payload:
        return CloseCode.NO_STATUS, ""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not _may_stand(code):
        raise Fault(CloseCode.PROTOCOL_ERROR, "invalid close code")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise Fault(CloseCode.INVALID_DATA, "close reason is not UTF-8") from None


def _may_stand(code: int) -> bool:
    return code in _ON_THE_WIRE or code in _APPLICATION_CODES
