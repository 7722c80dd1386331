"""Where another server is, read from a URL: what a gateway, a client and a recording ask the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from urllib.parse import SplitResult

__all__ = ["USUAL_PORTS", "Address"]

USUAL_PORTS: Final[Mapping[str, int]] = {"http": 80, "https": 443}
"""The schemes that are spoken, and the port that goes without saying (RFC 9110, 4.2)."""


class Address(NamedTuple):
    """Where a server is."""

    host: str
    """A name or an address, without brackets."""
    port: int
    """The TCP port."""
    tls: bool
    """Whether it is https."""
    path: str
    """What its paths begin with, such as /v1, without a slash at its end; or the one target that is asked."""
    authority: str
    """The Host field's value."""

    @classmethod
    def of(cls, parts: SplitResult, path: str) -> Address:
        """Take the address from a URL whose scheme and host were judged.

        Args:
            parts: the URL, of a scheme in USUAL_PORTS and with a host.
            path: in the place of the URL's own.

        Raises:
            ValueError: the port is no number up to 65535.
        """
        name = parts.hostname or ""
        usual = USUAL_PORTS[parts.scheme]
        port = usual if parts.port is None else parts.port
        host = f"[{name}]" if ":" in name else name
        return cls(name, port, parts.scheme == "https", path, host if port == usual else f"{host}:{port}")
