"""Certificates made for the tests: an authority that is trusted, and servers that have what a server may have."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import trustme

__all__ = ["Certificates"]


class Certificates:
    """Contexts for servers, and the one for clients that trust the authority.

    Args:
        folder: where a key may be kept for as long as it is read.
    """

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self._folder = folder

    @cached_property
    def client(self) -> ssl.SSLContext:
        """A client that trusts the authority and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)  # pyright: ignore[reportUnknownMemberType] # it also takes pyOpenSSL's, which is not installed
        return context

    @cached_property
    def server(self) -> ssl.SSLContext:
        """A server that is what it says."""
        return self._server("server.test", "127.0.0.1", "::1")

    @cached_property
    def nameless(self) -> ssl.SSLContext:
        """A server that has a name, but no address."""
        return self._server("server.test")

    @cached_property
    def expired(self) -> ssl.SSLContext:
        """A server whose certificate was good until yesterday."""
        return self._server("server.test", not_after=datetime.now(UTC) - timedelta(days=1))

    @cached_property
    def stranger(self) -> ssl.SSLContext:
        """A server whose authority nobody knows."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("server.test").configure_cert(context)  # pyright: ignore[reportUnknownMemberType] # it also takes pyOpenSSL's, which is not installed
        return context

    @cached_property
    def self_signed(self) -> ssl.SSLContext:
        """A server that is its own authority."""
        own = trustme.CA()
        path = self._folder / "self-signed.pem"
        path.write_bytes(own.private_key_pem.bytes() + own.cert_pem.bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def save_authority(self) -> Path:
        """Write the authority's certificate down, for a program's SSL_CERT_FILE."""
        path = self._folder / "authority.pem"
        self.authority.cert_pem.write_to_path(str(path))
        return path

    def _server(self, *names: str, not_after: datetime | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names, not_after=not_after).configure_cert(context)  # pyright: ignore[reportUnknownMemberType] # it also takes pyOpenSSL's, which is not installed
        return context
