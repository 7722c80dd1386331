"""Which hosts, origins and sites may call: the rules that keep foreign pages from driving a local server.

A server on the loopback is reachable by every page that its user opens. Three headers tell them apart: Host (a foreign
name that resolves to us means DNS rebinding), Origin (sent by a page's script), and Sec-Fetch-Site (sent even where Origin
is not: an image or a link of a foreign page).
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from msgspec import Struct

from .contracts import Headers, RequestHead
from .events import ErrorKind, StreamError

__all__ = ["LOOPBACK_HOSTS", "Guard", "shown"]

LOOPBACK_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names that mean this very machine."""

_MAX_SHOWN: Final = 80
_MAX_AGE_S: Final = "600"
_ALLOWED_HEADERS: Final = "authorization, content-type, last-event-id, x-api-key"
_EXPOSED_HEADERS: Final = "x-request-id, x-tokenwire-ignored, retry-after"


class Guard(Struct, frozen=True, kw_only=True):
    """The rules about who may call from where."""

    allowed_hosts: frozenset[str] | None = LOOPBACK_HOSTS
    """Names that the Host header may have, in lower case and without port; None for any."""
    allowed_origins: frozenset[str] = frozenset()
    """Origins that may call besides our own and, on a loopback server, the loopback's; "*" for any."""

    def refusal(self, head: RequestHead, *, generates: bool) -> StreamError | None:
        """Say why a request may not pass, or None where it may.

        Args:
            head: the request's head.
            generates: whether the route runs a model; then a cross-site request without an Origin is refused too.
        """
        host = head.header(b"host") or ""
        if self.allowed_hosts is not None and _without_port(host) not in self.allowed_hosts:
            message = f"This server does not answer to the name {shown(host)}; start it with --allow-host to let it."
            return StreamError(ErrorKind.PERMISSION, message, "host_not_allowed")
        origin = head.header(b"origin")
        if origin is None:
            if generates and head.header(b"sec-fetch-site") == "cross-site":
                message = "A page of another site may not start a generation by an image, a link or a form."
                return StreamError(ErrorKind.PERMISSION, message, "cross_site_request")
            return None
        if not self.allows_origin(origin, host):
            message = f"Pages of {shown(origin)} may not call this server; start it with --allow-origin to let them."
            return StreamError(ErrorKind.PERMISSION, message, "origin_not_allowed")
        return None

    def allows_origin(self, origin: str, host: str) -> bool:
        """Say whether pages of an origin may call a server that was reached under `host`."""
        if "*" in self.allowed_origins or origin in self.allowed_origins:
            return True
        try:
            authority = urlsplit(origin).netloc
        except ValueError:
            return False
        local = self.allowed_hosts is not None and _without_port(authority) in LOOPBACK_HOSTS
        return bool(authority) and (authority == host or local)

    def cors(self, head: RequestHead) -> Headers:
        """Headers that let an allowed page read the answer (Fetch standard, 3.2.3); none for other requests."""
        origin = head.header(b"origin")
        if origin is None or not self.allows_origin(origin, head.header(b"host") or ""):
            return ()
        return (
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", _EXPOSED_HEADERS),
            ("vary", "origin"),
        )

    @staticmethod
    def preflight(methods: str) -> Headers:
        """Headers of the answer to OPTIONS (Fetch standard, 3.2.2)."""
        return (
            ("allow", methods),
            ("access-control-allow-methods", methods),
            ("access-control-allow-headers", _ALLOWED_HEADERS),
            ("access-control-max-age", _MAX_AGE_S),
        )


def shown(text: str) -> str:
    """Quote a piece of a request for a message: short, and without control characters."""
    return repr(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "...")


def _without_port(host: str) -> str:
    name, separator, port = host.rpartition(":")
    return (name if separator and port.isdigit() else host).lower()
