"""TLS on the client's side as a machine: what came in, what must go out, what it said. It touches no socket.

It stands on `ssl.MemoryBIO`, so that every loop has the same TLS, and the bytes take the same path as without it.
"""

from __future__ import annotations

import functools
import ssl
from typing import Final

__all__ = ["ClientTls", "TlsNameError", "default_context"]

_READ_BYTES: Final = 64 * 1024
"""What one call may decrypt; a record holds 16 KiB at most, so one is never cut."""


@functools.cache
def default_context() -> ssl.SSLContext:
    """Make the context that trusts the system's authorities, or those of SSL_CERT_FILE and SSL_CERT_DIR; once."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


class TlsNameError(ValueError):
    """A host's name that no certificate can be for."""


class ClientTls:
    """One connection's TLS. It raises nothing for the other side's faults: what went wrong is in `failure`.

    What came is decrypted at once, so that nothing but the beginning of a record waits in it.

    Args:
        context: whom to trust.
        host: the name or address that the certificate must be for.

    Raises:
        TlsNameError: there can be no certificate for the host.

    Attributes:
        established: the handshake is done, and the host's name verified where the context says so.
        ended: the other side said that it sends no more (close_notify, RFC 8446 section 6.1). An end of the bytes without
            it may be somebody else's doing, who cuts the answer short.
        failure: why nothing more can be said or heard, in words for an operator.
    """

    __slots__ = ("_incoming", "_outgoing", "_tls", "ended", "established", "failure")

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        # Neither an address' zone nor the root's dot is part of the name that a certificate has.
        name = host.partition("%")[0].removesuffix(".")
        try:
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        except (ValueError, TypeError, ssl.SSLError) as error:
            raise TlsNameError(f"there is no certificate for the name {host!r}") from error
        self.established = False
        self.ended = False
        self.failure: str | None = None
        self._shake_hands()

    def receive_data(self, data: bytes) -> bytes:
        """Take what came; give what it says, which came before any end or failure."""
        if self.ended or self.failure is not None:
            return b""
        self._incoming.write(data)
        if not self.established:
            self._shake_hands()
        return self._read() if self.established else b""

    def write(self, data: bytes | memoryview) -> None:
        """Encrypt what is to be said; before the handshake is done and after a failure do nothing."""
        view = memoryview(data)
        while view and self.established and self.failure is None:
            try:
                view = view[self._tls.write(view) :]
            except ssl.SSLError as error:
                self.failure = _in_words(error)

    def close(self) -> None:
        """Say that nothing more will be said; the other side's own word is not awaited."""
        if self.established and self.failure is None:
            try:
                self._tls.unwrap()
            except ssl.SSLError:
                pass  # the other side has not said it yet, as usual; or what it said cannot be read, and nobody will

    def data_to_send(self) -> bytes:
        """Give what must go out, also after a failure: the other side is told."""
        return self._outgoing.read()

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            self.failure = _in_words(error)
        else:
            self.established = True

    def _read(self) -> bytes:
        said: list[bytes] = []
        while not self.ended:
            try:
                piece = self._tls.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                piece = b""
            except ssl.SSLError as error:
                self.failure = _in_words(error)
                break
            said.append(piece)
            self.ended = not piece
        return b"".join(said)


def _in_words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is refused: {error.verify_message.rstrip('.')}"
    reason: str = error.reason or "unknown error"
    return f"TLS failed: {reason.replace('_', ' ').lower()}"
