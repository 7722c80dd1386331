"""permessage-deflate (RFC 7692): its negotiation, and messages deflated and inflated within limits.

Off unless asked for: a connection that compresses holds a window and hash chains of its own, tens of KiB, and tokens are
too short to gain from it.
"""

from __future__ import annotations

import re
import zlib
from typing import Final

from msgspec import Struct

from ._ws_frames import CloseCode, Fault
from .errors import RemoteProtocolError

__all__ = [
    "MAX_MEMBERS",
    "WRONG_TEXT_OR_DATA",
    "Deflate",
    "DeflateOptions",
    "Deflater",
    "Inflater",
    "accept_offer",
    "check_answer",
    "offer",
]

MAX_MEMBERS: Final = 16
"""Deflate streams that one message may be made of. Nobody sends more than one; each costs a window, and may be 2 bytes."""

MAX_OFFERS: Final = 16
"""Extensions that one request may name. Browsers send one, and a choice of parameters three or four."""

WRONG_TEXT_OR_DATA: Final = "data that does not inflate, or inflates to text that is not UTF-8"
"""One reason for both: of data that is wrong in both ways zlib gives nothing when it has it at once, and else the text."""

_NAME: Final = "permessage-deflate"
_TAIL: Final = b"\x00\x00\xff\xff"  # 7.2.1: the end of a sync flush is not sent
_MAX_BITS: Final = 15
_MIN_BITS: Final = 9  # zlib deflates no raw data with a window of 256 bytes
_LEVELS: Final = range(-1, 10)
_MEMORY_LEVELS: Final = range(1, 10)
_BITS: Final = re.compile(r"[89]|1[0-5]")  # 7.1.2.1: decimal, without leading zeroes

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER: Final = rf'[ \t]*;[ \t]*({_TOKEN})(?:[ \t]*=[ \t]*(?:({_TOKEN})|"({_TOKEN})"))?'
_ITEM: Final = re.compile(rf"[ \t]*({_TOKEN})((?:{_PARAMETER})*)[ \t]*")
_EACH_PARAMETER: Final = re.compile(_PARAMETER)

_FLAGS: Final = ("server_no_context_takeover", "client_no_context_takeover")
_WINDOWS: Final = ("server_max_window_bits", "client_max_window_bits")

_Parameters = dict[str, str | None]


class DeflateOptions(Struct, frozen=True, kw_only=True):
    """What we are willing to spend on compression."""

    server_max_window_bits: int = 12
    """The server's window, 9 to 15: 4 KiB holds the keys that repeat in streamed JSON; 15 costs 256 KiB a connection."""
    client_max_window_bits: int = 12
    """The client's window, where the client lets us choose it; else it is the client's, at most 15."""
    server_no_context_takeover: bool = False
    """Whether the server forgets its window after each message: no memory between messages, worse compression."""
    client_no_context_takeover: bool = False
    """Whether the client must do so."""
    level: int = 6
    """As in zlib."""
    memory_level: int = 5
    """As in zlib: 5 is 16 KiB of hash chains, enough for a small window."""

    def __post_init__(self) -> None:
        """Refuse what zlib would refuse at the first message.

        Raises:
            ValueError: window bits are not between 9 and 15, or levels are not zlib's.
        """
        if not all(_MIN_BITS <= b <= _MAX_BITS for b in (self.server_max_window_bits, self.client_max_window_bits)):
            raise ValueError(f"window bits are not between {_MIN_BITS} and {_MAX_BITS}")
        if self.level not in _LEVELS or self.memory_level not in _MEMORY_LEVELS:
            raise ValueError(f"levels are {_LEVELS[0]} to {_LEVELS[-1]}, of memory 1 to {_MEMORY_LEVELS[-1]}")


class Deflate(Struct, frozen=True, kw_only=True):
    """What both sides have agreed on."""

    server_max_window_bits: int = _MAX_BITS
    """The most that the server's deflated data reaches back, as a power of 2."""
    client_max_window_bits: int = _MAX_BITS
    """The client's."""
    server_no_context_takeover: bool = False
    """Whether the server begins each message afresh."""
    client_no_context_takeover: bool = False
    """Whether the client does."""
    level: int = 6
    """Of our own side."""
    memory_level: int = 5
    """Of our own side."""


def accept_offer(header: str, options: DeflateOptions) -> tuple[Deflate, str] | None:
    """Choose the first offer that we can serve, as a server (RFC 7692, 5 and 7.1).

    Args:
        header: the request's Sec-WebSocket-Extensions, its lines joined with commas.
        options: ours.

    Returns:
        What was agreed and the answer's header; None to decline, which is no error.

    Raises:
        RemoteProtocolError: the header does not follow its grammar (RFC 6455, 9.1).
    """
    for name, parameters in _parse(header):
        if name == _NAME and (chosen := _serve(parameters, options)) is not None:
            return chosen
    return None


def _serve(parameters: list[tuple[str, str | None]], options: DeflateOptions) -> tuple[Deflate, str] | None:
    asked = _valid(parameters, bare_window=True)
    if asked is None:
        return None
    server_bits = min(int(asked.get("server_max_window_bits") or _MAX_BITS), options.server_max_window_bits)
    if server_bits < _MIN_BITS:
        return None
    answer = [_NAME]
    server_fresh = options.server_no_context_takeover or "server_no_context_takeover" in asked
    client_fresh = options.client_no_context_takeover or "client_no_context_takeover" in asked
    answer += [flag for flag, on in zip(_FLAGS, (server_fresh, client_fresh), strict=True) if on]
    if server_bits < _MAX_BITS:
        answer.append(f"server_max_window_bits={server_bits}")
    client_bits = _MAX_BITS
    if "client_max_window_bits" in asked:  # only then may the answer name it (7.1.2.2)
        client_bits = min(int(asked["client_max_window_bits"] or _MAX_BITS), options.client_max_window_bits)
        answer.append(f"client_max_window_bits={client_bits}")
    return _agreed(server_bits, client_bits, server_fresh, client_fresh, options), "; ".join(answer)


def offer(options: DeflateOptions) -> str:
    """Write a client's offer for Sec-WebSocket-Extensions."""
    parts = [_NAME]
    if options.server_no_context_takeover:
        parts.append("server_no_context_takeover")
    if options.client_no_context_takeover:
        parts.append("client_no_context_takeover")
    if options.server_max_window_bits < _MAX_BITS:
        parts.append(f"server_max_window_bits={options.server_max_window_bits}")
    parts.append(f"client_max_window_bits={options.client_max_window_bits}")
    return "; ".join(parts)


def check_answer(header: str, options: DeflateOptions | None) -> Deflate | None:
    """Read a server's answer to our offer, as a client.

    Returns:
        What was agreed; None where the server declined.

    Raises:
        RemoteProtocolError: the answer names what was not offered or goes beyond it (RFC 7692, 7.1; RFC 6455, 4.1).
    """
    items = _parse(header)
    if not items:
        return None
    if options is None or len(items) > 1 or items[0][0] != _NAME:
        raise RemoteProtocolError("the server chose an extension that was not offered")
    told = _valid(items[0][1], bare_window=False)
    if told is None:
        raise RemoteProtocolError("the server's permessage-deflate parameters are invalid")
    server_bits = int(told.get("server_max_window_bits") or _MAX_BITS)
    client_bits = min(int(told.get("client_max_window_bits") or _MAX_BITS), options.client_max_window_bits)
    if server_bits > options.server_max_window_bits:
        raise RemoteProtocolError("the server's window is larger than was asked for")
    if client_bits < _MIN_BITS:
        raise RemoteProtocolError("a window of 256 bytes cannot be kept to")
    server_fresh = "server_no_context_takeover" in told
    if options.server_no_context_takeover and not server_fresh:
        raise RemoteProtocolError("the server did not agree to begin each message afresh")
    client_fresh = options.client_no_context_takeover or "client_no_context_takeover" in told
    return _agreed(server_bits, client_bits, server_fresh, client_fresh, options)


def _agreed(
    server_bits: int, client_bits: int, server_fresh: bool, client_fresh: bool, options: DeflateOptions
) -> Deflate:
    return Deflate(
        server_max_window_bits=server_bits,
        client_max_window_bits=client_bits,
        server_no_context_takeover=server_fresh,
        client_no_context_takeover=client_fresh,
        level=options.level,
        memory_level=options.memory_level,
    )


def _parse(header: str) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Read a Sec-WebSocket-Extensions value (RFC 6455, 9.1): names with their parameters, in order.

    A quoted value must be a token when unquoted, so no comma and no quote can stand in it, and a split is enough.
    """
    if not header.strip(" \t"):
        return []
    items: list[tuple[str, list[tuple[str, str | None]]]] = []
    parts = header.split(",", MAX_OFFERS)
    if len(parts) > MAX_OFFERS:
        raise RemoteProtocolError("too many WebSocket extensions")
    for part in parts:
        if not part.strip(" \t"):
            continue  # RFC 9110, 5.6.1: a list may have empty members
        match = _ITEM.fullmatch(part)
        if match is None:
            raise RemoteProtocolError("malformed Sec-WebSocket-Extensions")
        found = _EACH_PARAMETER.finditer(match[2])
        items.append((match[1], [(each[1], each[2] or each[3]) for each in found]))
    return items


def _valid(parameters: list[tuple[str, str | None]], *, bare_window: bool) -> _Parameters | None:
    """Check one offer's or answer's parameters (7.1): None for an unknown, repeated or invalid one.

    Args:
        parameters: names and values.
        bare_window: whether client_max_window_bits may stand without a value, as in an offer.
    """
    known: _Parameters = {}
    for name, value in parameters:
        if name in known:
            return None
        if name in _FLAGS:
            fits = value is None
        elif name in _WINDOWS:
            bare = value is None and bare_window and name == "client_max_window_bits"
            fits = bare or _BITS.fullmatch(value or "") is not None
        else:
            fits = False
        if not fits:
            return None
        known[name] = value
    return known


class Deflater:
    """Deflates our messages.

    Args:
        deflate: what was agreed.
        server: whether we are the server.
    """

    __slots__ = ("_arguments", "_fresh", "_zlib")

    def __init__(self, deflate: Deflate, *, server: bool) -> None:
        bits = deflate.server_max_window_bits if server else deflate.client_max_window_bits
        self._fresh = deflate.server_no_context_takeover if server else deflate.client_no_context_takeover
        self._arguments = (deflate.level, zlib.DEFLATED, -bits, deflate.memory_level)
        self._zlib: zlib._Compress | None = None

    def deflate(self, payload: bytes) -> bytes:
        """Deflate one whole message (7.2.1)."""
        compressor = self._zlib or zlib.compressobj(*self._arguments)
        self._zlib = None if self._fresh else compressor
        data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
        return data[: -len(_TAIL)]


class Inflater:
    """Inflates the peer's messages, never beyond what is still allowed.

    Args:
        deflate: what was agreed.
        server: whether we are the server.

    Attributes:
        crowded: the message has more deflate streams than `MAX_MEMBERS`; nothing more is inflated.
    """

    __slots__ = ("_bits", "_fresh", "_members", "_zlib", "crowded")

    def __init__(self, deflate: Deflate, *, server: bool) -> None:
        bits = deflate.client_max_window_bits if server else deflate.server_max_window_bits
        self._fresh = deflate.client_no_context_takeover if server else deflate.server_no_context_takeover
        self.crowded = False
        self._bits = -max(bits, _MIN_BITS)
        self._members = 1
        self._zlib: zlib._Decompress | None = None

    def inflate(self, data: bytes | bytearray, room: int) -> bytes:
        """Inflate a piece of a message.

        Args:
            data: not empty.
            room: the most bytes wanted; one more shows that there were more.

        Raises:
            Fault: 1007 for what does not inflate.
        """
        out = b""
        while True:
            inflater = self._zlib
            if inflater is None:
                inflater = self._zlib = zlib.decompressobj(self._bits)
            try:
                out += inflater.decompress(data, room + 1 - len(out))
            except zlib.error:
                raise Fault(CloseCode.INVALID_DATA, WRONG_TEXT_OR_DATA) from None
            if not inflater.eof:
                return out
            # 7.2.3.4: a block may be the last of its stream, and another stream may follow. Its author has begun
            # afresh, as zlib does after Z_FINISH.
            self._zlib = None
            self._members += 1
            self.crowded = self._members > MAX_MEMBERS
            data = inflater.unused_data
            if self.crowded or not data or len(out) > room:
                return out

    def end(self, room: int) -> bytes:
        """End a message: give what the end of the flush still holds back (7.2.2).

        Raises:
            Fault: as `inflate` does.
        """
        out = self.inflate(_TAIL, room)
        self._members = 1
        if self._fresh:
            self._zlib = None
        return out
