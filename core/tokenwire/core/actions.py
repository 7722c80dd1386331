"""What a connection asks of the world outside: a closed union of values.

The core decides, the adapter does. `dispatch` performs what concerns streams and backends; the carrier performs what
concerns its own wire (Close, Abort).
"""

from __future__ import annotations

from msgspec import Struct

from .line import Line
from .request import GenerationRequest

__all__ = ["Abort", "Action", "Cancel", "Close", "Pause", "Record", "Resume", "Start", "Wait"]


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
    tokens: int = 0
    """Output tokens that were let out."""
    sent_bytes: int = 0
    """Bytes handed to the transport for the body and its framing."""
    first_token_ns: int | None = None
    """From the request's head to its first token."""
    duration_ns: int = 0
    """From the request's head to the end."""
    error: str | None = None
    """The error's message, where there was one."""


Action = Start | Wait | Cancel | Pause | Resume | Close | Abort | Record
"""Everything that a connection can ask."""
