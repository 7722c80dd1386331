"""What a backend is, and what the outside gives to it.

A backend is a `tokenwire.core.contracts.Source` that is attached once to a runtime and a sink. It imports no event
loop: the adapters hand in a `Runtime`, and a `Dialer` where it needs the network.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, runtime_checkable

from tokenwire.core.contracts import Sink, Source

__all__ = ["Backend", "Dialer", "Link", "Peer", "Runtime", "UsesNetwork"]


class Runtime(Protocol):
    """The event loop, as a backend may use it.

    No callback or task runs before the method that was given it has returned.
    """

    def now(self) -> int:
        """Read the monotonic clock, in nanoseconds. Thread-safe."""
        ...

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Run a callback on the loop's thread in its next turn.

        The only method that any thread may call besides `now`; it never waits. After the loop's end it does nothing.
        """
        ...

    def call_at(self, deadline: int, callback: Callable[[], None]) -> None:
        """Run a callback on the loop's thread once `now()` is at or past the deadline. It cannot be taken back."""
        ...

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an async function on the loop; it is cancelled at the server's end. An exception is logged, not lost."""
        ...


class Backend(Source, Protocol):
    """Where events come from."""

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        """Get ready. Called once, on the loop's thread, before the first `start`."""
        ...

    def close(self) -> None:
        """Let go of threads, engines and files. Called once, after every job has ended or was cancelled."""
        ...


class Peer(Protocol):
    """What a dialled connection calls, on the loop's thread."""

    def connected(self, now: int) -> None:
        """The connection stands (after the TLS handshake where there is one): its link takes bytes."""
        ...

    def receive_data(self, data: bytes, now: int) -> None:
        """Bytes came."""
        ...

    def set_blocked(self, blocked: bool, now: int) -> None:
        """The other side takes no more of what was written, or takes it again."""
        ...

    def receive_eof(self, now: int) -> None:
        """The other side will send no more. The last call, like `failed`; the link is closed."""
        ...

    def failed(self, reason: str, now: int) -> None:
        """The connection could not be made, or broke. The last call, like `receive_eof`; the link is closed.

        Args:
            reason: what went wrong in words that may be shown to an operator, without the system's paths.
            now: monotonic nanoseconds.
        """
        ...


class Link(Protocol):
    """One dialled connection, as its owner steers it; on the loop's thread only, and nothing here waits or raises."""

    def write(self, data: bytes) -> None:
        """Send bytes as far as they go and keep the rest. Before `connected` and after the end it does nothing."""
        ...

    def set_reading(self, reading: bool) -> None:
        """Stop taking bytes from the socket, or go on: how a slow reader holds the other server back."""
        ...

    def close(self) -> None:
        """Drop the connection at once, also one that is still being made; its peer is not called any more. Idempotent."""
        ...


class Dialer(Protocol):
    """How a backend reaches another server."""

    def connect(self, host: str, port: int, peer: Peer, *, tls: bool, deadline: int) -> Link:
        """Begin to connect; the peer is told how it went, never before this call returns.

        Args:
            host: a name or an address.
            port: the TCP port.
            peer: whom to tell.
            tls: whether to speak TLS, with the host's name verified.
            deadline: when to give up connecting (the TLS handshake included), in the runtime's nanoseconds.
        """
        ...


@runtime_checkable
class UsesNetwork(Protocol):
    """A backend that reaches other servers."""

    def use_dialer(self, dialer: Dialer) -> None:
        """Take what connections are made with. Called once, on the loop's thread, before `Backend.attach`."""
        ...
