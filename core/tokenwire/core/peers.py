"""What one client's address may hold at once: connections and streams, counted by the network that it stands for.

An IPv4 address is one client, a /64 of IPv6 is another: whoever has one address of it has them all. Both limits are off by
default, and nothing is exempt by itself. Behind a proxy every client comes from the proxy's address, and no server can
tell that from one greedy client; so the operator says when the addresses mean something, and which of them do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from msgspec import Struct

from .events import ErrorKind, StreamError

__all__ = ["PeerLimits", "PeerShare", "PeerTable", "peer_key", "read_network"]

_CLIENT_PREFIX: Final = 64
"""Bits of an IPv6 address that tell one client from another (RFC 6177 gives a site at least as many)."""

_SECOND: Final = 1_000_000_000

Network = IPv4Network | IPv6Network


class PeerLimits(Struct, frozen=True, kw_only=True):
    """What an operator may set about one client's address."""

    max_connections: int = 0
    """Its connections at once; further ones are answered with 429 and closed. 0 for no limit."""
    max_streams: int = 0
    """Its streams at once, those in the queue included; further ones are refused with 429. 0 for no limit."""
    exempt: tuple[str, ...] = ()
    """Addresses and networks that stand for many clients, such as a proxy's: nothing is counted for them."""


class PeerShare:
    """What one client has, shared by its connections.

    Attributes:
        connections: its connections.
        streams: its streams.
    """

    __slots__ = ("_key", "_table", "connections", "streams")

    def __init__(self, table: PeerTable, key: str) -> None:
        self._table = table
        self._key = key
        self.connections = 0
        self.streams = 0

    def leave(self) -> None:
        """Give a connection back. Called once for each that `PeerTable.enter` let in."""
        self.connections -= 1
        if not self.connections:
            self._table.forget(self._key)

    def begin_stream(self) -> StreamError | None:
        """Take a place for a stream, or say why there is none. With None, `end_stream` gives it back."""
        limit = self._table.limits.max_streams
        if limit and self.streams >= limit:
            message = f"{self.streams} streams of this address are under way, and more are not allowed at once."
            return _too_many(message, "too_many_streams")
        self.streams += 1
        return None

    def end_stream(self) -> None:
        """Give a stream's place back."""
        self.streams -= 1


class PeerTable:
    """All clients that are connected.

    Args:
        limits: what each may have.

    Attributes:
        limits: the same.

    Raises:
        ValueError: `limits.exempt` names something that is neither an address nor a network.
    """

    __slots__ = ("_exempt", "_shares", "limits")

    def __init__(self, limits: PeerLimits) -> None:
        self.limits = limits
        self._exempt: Sequence[Network] = tuple(map(read_network, limits.exempt))
        self._shares: dict[str, PeerShare] = {}

    def __len__(self) -> int:
        return len(self._shares)

    def enter(self, address: str) -> PeerShare | StreamError | None:
        """Let a connection in.

        Args:
            address: where it comes from, as text; empty where there is no such thing, as on a Unix socket.

        Returns:
            The client's share, which the connection gives back by `leave`; an error where it has its connections
            already; None where nothing is counted for this address.
        """
        limits = self.limits
        if not address or not (limits.max_connections or limits.max_streams) or self._is_exempt(address):
            return None
        key = peer_key(address)
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = PeerShare(self, key)
        if limits.max_connections and share.connections >= limits.max_connections:
            message = f"{share.connections} connections of this address are open, and more are not allowed at once."
            return _too_many(message, "too_many_connections")
        share.connections += 1
        return share

    def forget(self, key: str) -> None:
        """A client's last connection has gone."""
        self._shares.pop(key, None)

    def _is_exempt(self, address: str) -> bool:
        if not self._exempt:
            return False
        parsed = _unmapped(address)
        return any(parsed in network for network in self._exempt)


def peer_key(address: str) -> str:
    """Name the client that an address stands for: itself, or its /64 where it is IPv6."""
    parsed = _unmapped(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((parsed.packed[: _CLIENT_PREFIX // 8].ljust(16, b"\0"), _CLIENT_PREFIX)))
    return str(parsed)


def read_network(text: str) -> Network:
    """Read an address or a network such as 10.0.0.0/8.

    Raises:
        ValueError: it is neither.
    """
    return ip_network(text, strict=False)


def _unmapped(address: str) -> object:
    """Parse an address; one of IPv4 that comes through an IPv6 socket is taken for what it is."""
    parsed = ip_address(address)
    return (isinstance(parsed, IPv6Address) and parsed.ipv4_mapped) or parsed


def _too_many(message: str, code: str) -> StreamError:
    return StreamError(ErrorKind.RATE_LIMIT, message, code, retry_after_ns=_SECOND, retryable=True)
