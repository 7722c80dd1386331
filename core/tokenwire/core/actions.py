"""What a connection asks of the world outside: a closed union of values.

The core decides, the adapter does. `dispatch` performs what concerns streams and backends; the carrier performs what
concerns its own wire (Close, Abort).
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from .line import Line
from .request import GenerationRequest

__all__ = ["Abort", "Action", "Cancel", "Close", "Pause", "PeerMachine", "Record", "Resume", "Start", "Upgrade", "Wait"]


class Start(Struct, frozen=True):
    """Begin to generate."""

    stream: Line
    """The stream; its handle for the backend."""
    request: GenerationRequest
    """What to generate."""


class Wait(Struct, frozen=True):
    """Keep the stream in the queue: it starts when a running one ends."""

    stream: Line
    """The stream."""


class Cancel(Struct, frozen=True):
    """Stop generating: nobody listens."""

    stream: Line
    """The stream."""
    by: str
    """Who stopped it: client, slow_reader, operator."""


class Pause(Struct, frozen=True):
    """The stream's reader does not keep up: a pull source may rest."""

    stream: Line
    """The stream."""


class Resume(Struct, frozen=True):
    """The stream's reader has caught up."""

    stream: Line
    """The stream."""


class Close(Struct, frozen=True):
    """Send what waits, then shut down our sending side; go on handing over what arrives until the peer ends too."""


class PeerMachine(Protocol):
    """One peer as its carrier drives it: bytes in, actions out; bytes out; the next deadline.

    `Connection` is one, for HTTP/1.1, and what an upgrade puts in its place is another.
    """

    def receive_data(self, data: bytes, now: int) -> list[Action]:
        """Take bytes from the peer."""
        ...

    def receive_eof(self, now: int) -> list[Action]:
        """Learn that the peer sends no more. Idempotent."""
        ...

    def lost(self, now: int) -> list[Action]:
        """Learn that the transport is gone: nothing can be sent any more. Idempotent."""
        ...

    def data_to_send(self) -> list[bytes]:
        """Hand over what is to be written, in order, and forget it."""
        ...

    def set_blocked(self, blocked: bool, now: int) -> list[Action]:
        """Learn that the transport takes no more, or takes again; True once more means that it has taken some."""
        ...

    def settle(self, now: int) -> list[Action]:
        """Look at the delivery that runs: it may have ended, or given up."""
        ...

    def next_deadline(self) -> int | None:
        """Say when `handle_deadline` is due; None for never. It may move later without notice."""
        ...

    def handle_deadline(self, now: int) -> list[Action]:
        """Act on a deadline that has passed; nothing where none has."""
        ...

    def drain(self, now: int) -> list[Action]:
        """The server is going down: close if idle; else the answer that runs is the last."""
        ...


class Upgrade(Struct, frozen=True):
    """Drive another machine from now on: the protocol has changed (RFC 9110, 7.8)."""

    machine: PeerMachine
    """What takes the connection's place. It wants to know at once if the transport takes no more."""
    rest: bytes
    """Bytes that came after the request which asked for it; they are the new machine's."""


class Abort(Struct, frozen=True):
    """Drop the connection at once, with what waits."""


class Record(Struct, frozen=True, kw_only=True):
    """Facts of one answered request, for log and metrics. Prompts and query strings are never among them."""

    method: str
    """The request's method; "-" where none could be read."""
    path: str
    """The request's path; "-" where none could be read."""
    status: int
    """The answer's HTTP status; 0 where none was sent."""
    end: str
    """How it ended: answered, refused, finished, failed, cancelled, slow_reader, truncated, disconnected."""
    dialect: str | None = None
    """The dialect, where the route has one."""
    stream_id: str | None = None
    """The stream's id, where there was one."""
    model: str | None = None
    """The model, where one was asked for."""
    model_label: str | None = None
    """The model as metrics name it: one that the server was given, or a word for all others; clients cannot make it up."""
    tokens: int = 0
    """Output tokens that were let out, or more where a usage report says so."""
    sent_bytes: int = 0
    """Bytes handed to the transport for the body and its framing."""
    first_token_ns: int | None = None
    """From the request's head to its first token event."""
    duration_ns: int = 0
    """From the request's head to the end."""
    queue_ns: int | None = None
    """In the queue: from the whole request to the backend's start."""
    tpot_ns: float | None = None
    """Per token after the first event."""
    gap_p99_ns: float | None = None
    """The 99th percentile of the gaps between token events."""
    error: str | None = None
    """The error's message, where there was one."""


Action = Start | Wait | Cancel | Pause | Resume | Upgrade | Close | Abort | Record
"""Everything that a connection can ask."""
