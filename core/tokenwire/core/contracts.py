"""The contracts: what each stage of the line promises to the next.

    wire bytes -> carrier -> service.open -> GenerationRequest -> Source
                                                                | Item
    wire bytes <- Carrier <- Framing <- Encoder <- delivery <- Sink

Data walks one way. Two things walk back: cancel and back-pressure, both on `Job`. Everything here is a value or a
protocol; the modules named beside each hold the implementations.

Who writes to them:

- A **carrier's** author (HTTP bytes, ASGI messages, WebSocket) writes a `Framing` and a `Carrier`, hands heads and bodies
  to `service` and batches' bytes to the wire. Policy is never written again.
- A **backend's** author writes a `Source` and calls `Sink.deliver`. `tokenwire.backends.base` adds what the outside gives
  to a backend (a runtime, a dialer).
- A **dialect's** author writes a `Dialect` with an `Encoder` and a `Decoder`.
- A **replicator's** author reads the runs that `Stream.accept` lets out, before deliveries see them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Generic, Protocol, TypeVar

from msgspec import Struct

from .collect import Result
from .events import Event, StreamError
from .framing import Folded, Template
from .request import GenerationRequest
from .stream import Item

__all__ = [
    "ANY_MODEL",
    "Batch",
    "Carrier",
    "Decoder",
    "Dialect",
    "Encoder",
    "Folded",
    "Framing",
    "Job",
    "ModelCard",
    "ParsedRequest",
    "Principal",
    "Reply",
    "RequestHead",
    "ResponseHead",
    "Sink",
    "Source",
    "StreamHandle",
    "Template",
]

EventT_co = TypeVar("EventT_co", covariant=True)

Headers = tuple[tuple[str, str], ...]

ANY_MODEL: Final = "any_model"
"""What a source has in `honours` that is asked for models which it does not list."""


class Principal(Struct, frozen=True):
    """Who asks. Every look-up of a stream is by (principal, id)."""

    name: str = "anonymous"
    """A stable name; never a key."""


class RequestHead(Struct, frozen=True):
    """How a request begins, whatever carried it."""

    method: str
    """The method, in upper case."""
    path: str
    """The target's path as it came, without query."""
    query: str = ""
    """The target's query as it came, without its question mark."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Names in lower case, in order."""
    has_body: bool = False
    """Whether a body was announced."""
    content_length: int | None = None
    """Its length in bytes where that was announced."""

    def header(self, name: bytes) -> str | None:
        """Return the first value of a header as latin-1 text, or None; `name` in lower case."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return None


class ResponseHead(Struct, frozen=True):
    """How an answer begins, before anybody has chosen its body's framing."""

    status: int
    """The HTTP status."""
    headers: Headers = ()
    """Names in lower case, values without CR, LF and NUL; nothing about framing, and of the connection only its upgrade."""


class Reply(Struct, frozen=True):
    """A whole answer."""

    status: int
    """The HTTP status."""
    headers: Headers = ()
    """As in ResponseHead; the carrier adds content-length."""
    body: bytes = b""
    """The body, complete."""
    close: bool = False
    """Whether the connection must end after it, such as when the request's body was not read."""
    error: str | None = None
    """What the log says was wrong; None where nothing was."""


class ModelCard(Struct, frozen=True):
    """A model that can be asked for."""

    name: str
    """The name that requests give."""
    created: int = 0
    """Unix time in seconds."""
    owner: str = "tokenwire"
    """Who provides it."""


class ParsedRequest(Struct, frozen=True):
    """A request in neutral terms, and what was left out of it."""

    request: GenerationRequest
    """What was asked for. An empty model means: the service's default."""
    ignored: tuple[str, ...] = ()
    """Fields that were read and will have no effect; told to the client in `x-tokenwire-ignored`."""


class Decoder(Protocol, Generic[EventT_co]):
    """A codec's reading half. The same bytes give the same events however they are cut.

    Empty bytes mean nothing; the end of input is its own call.
    """

    def receive_data(self, data: bytes) -> Sequence[EventT_co]:
        """Take bytes, return the events they complete.

        Raises:
            RemoteProtocolError: the peer broke a rule or a limit. The decoder is closed; it takes nothing more.
            LocalProtocolError: data after the end of input or after an error.
        """
        ...

    def receive_eof(self) -> Sequence[EventT_co]:
        """Take the end of input, return what it completes. A second call returns nothing."""
        ...


class Encoder(Protocol):
    """A dialect's writing half for one stream: a function of the events alone, so that a replay gives the same bytes.

    Illegal orders cannot reach it: what it encodes has passed the grammar.
    """

    @property
    def numbered(self) -> bool:
        """Whether frames show the events' numbers, so that merging must keep neighbours in order."""
        ...

    @property
    def heartbeat(self) -> bytes:
        """What may be sent between frames to show that the stream lives; b"" where the dialect has nothing."""
        ...

    def greeting(self) -> bytes:
        """What tells a client that would ask again by itself the stream's id, before the first event; b"" for nothing."""
        ...

    def template(self, choice: int) -> Template | None:
        """The frame of a TextDelta without logprobs, as long as no other event comes; None while there is none."""
        ...

    def encode(self, event: Event, number: int) -> bytes:
        """Encode any event; b"" where the dialect says nothing. `number` counts the stream's events from 1."""
        ...


class Dialect(Protocol):
    """A language that clients speak: requests, streams, whole answers and errors."""

    @property
    def name(self) -> str:
        """The dialect's name in logs and metrics."""
        ...

    @property
    def media_type(self) -> str:
        """The content type of a stream."""
        ...

    @property
    def streams_by_default(self) -> bool:
        """Whether a request that does not say wants a stream."""
        ...

    def parse_request(self, body: bytes, query: Mapping[str, str], honoured: frozenset[str]) -> ParsedRequest:
        """Read a request.

        Args:
            body: the whole body.
            query: the target's query parameters.
            honoured: names of GenerationRequest's fields that the backend or the core will honour.

        Raises:
            RequestRefused: it cannot be served; the error names the field where there is one.
        """
        ...

    def encoder(self, request: GenerationRequest, stream_id: str) -> Encoder:
        """Make the encoder of one stream."""
        ...

    def decoder(self) -> Decoder[Event]:
        """Make a decoder that gives events and ends with exactly one terminal event."""
        ...

    def encode_result(self, result: Result, request: GenerationRequest) -> bytes:
        """Encode a whole, finished answer."""
        ...

    def encode_error(self, error: StreamError) -> bytes:
        """Encode the body of an error answer."""
        ...

    def encode_request(self, request: GenerationRequest) -> bytes:
        """Encode the body that asks another server of this dialect for a request.

        It says `stream` as the request does, and asks for token counts where `include_usage` does and the dialect has
        a word for it. `parse_request` reads it back as the same request, less what the dialect cannot say and what is
        ignorable there.

        Raises:
            RequestRefused: the dialect has no word for a field that must be honoured; the error names the field.
        """
        ...

    def decode_result(self, body: bytes) -> Sequence[Event]:
        """Decode a whole answer of another server, one that was not asked for as a stream.

        It raises nothing: whatever the body is, its events pass the grammar and the last is the one terminal event.
        That is StreamEnd for a whole answer, StreamError for an error in the place of one and for a body that is
        neither, StreamTruncated for one that breaks off.
        """
        ...

    def decode_error(self, status: int, body: bytes) -> StreamError:
        """Decode the body of another server's error answer.

        It raises nothing: a proxy's page, an empty body and bytes that mean nothing give an error that says so. The
        status decides the kind; message, code, param and type are the server's own, bounded and on one line. The
        caller adds what the head says, such as Retry-After.

        Args:
            status: the answer's HTTP status.
            body: its body, or as much of its beginning as the caller keeps.
        """
        ...

    def encode_models(self, models: Sequence[ModelCard]) -> bytes:
        """Encode the list of models."""
        ...


class Framing(Protocol):
    """How one answer's parts become bytes for its carrier: HTTP chunks, bare bytes, WebSocket frames or messages."""

    def begin(self, head: ResponseHead) -> bytes:
        """Begin a streamed answer."""
        ...

    def frame(self, payload: bytes) -> bytes:
        """Wrap one payload; b"" stays b""."""
        ...

    def fold(self, template: Template) -> Folded:
        """Wrap a template once, so that a token costs an escape and a concatenation; called after `begin`."""
        ...

    def end(self) -> bytes:
        """End a streamed answer cleanly."""
        ...

    def reply(self, reply: Reply) -> bytes:
        """Write a whole answer instead of a streamed one."""
        ...


class StreamHandle(Protocol):
    """What a backend knows a stream by: compare it, keep it, hand it back; it says nothing else."""

    def __hash__(self) -> int: ...


class Job(Protocol):
    """A backend's work on one stream, as the core steers it. Every method is called on the loop's thread."""

    def cancel(self) -> None:
        """Stop the work: nobody listens any more. Returns at once; called at most once.

        What the backend still says about the stream is dropped.
        """
        ...

    def set_blocked(self, blocked: bool) -> None:
        """Tell a pull source to stop or to go on pulling, because its reader is slow or has caught up.

        A push source, whose engine step cannot wait, does nothing: its events are merged meanwhile.
        """
        ...


class Source(Protocol):
    """A backend as the core calls it."""

    @property
    def models(self) -> Sequence[ModelCard]:
        """What can be asked for; the first is the default. A backend that learns its models keeps one list up to date."""
        ...

    @property
    def honours(self) -> frozenset[str]:
        """Fields of GenerationRequest that it acts on by itself.

        `max_tokens` and `stop` are seen to by the core where they are missing here. `ANY_MODEL` among them says that a
        name which `models` does not list is the backend's own to accept or to refuse.
        """
        ...

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        """Begin to work on a request; its items go to the sink under the handle.

        Called on the loop's thread; must not wait and must not call the sink before it returns. An exception becomes
        a StreamError of kind server.
        """
        ...


Batch = Iterable[tuple[StreamHandle, Sequence[Item]]]
"""What one engine step produced: for each stream that moved, what it said, in order."""


class Sink(Protocol):
    """Where a backend's items go."""

    def deliver(self, batch: Batch, now: int) -> None:
        """Take one engine step's items, encode them and write them, in this very call.

        Called on the loop's thread only; a thread of the backend's own crosses by `Runtime.wake_soon`, once a batch. It
        never raises for a peer's fault, never waits, and never calls the backend: cancellations follow after the batch.

        Args:
            batch: streams and their items; handles of streams that have ended are passed over.
            now: monotonic nanoseconds, read once for the batch.
        """
        ...


class Carrier(Protocol):
    """The wire's end of one peer, as the core calls it."""

    def write(self, data: bytes) -> None:
        """Send bytes now as far as they go, keep the rest, and say so to the connection. Never raises, never waits."""
        ...

    def settle(self, now: int) -> None:
        """A delivery of this peer has ended or given up: go on with what comes after it. Called after the batch."""
        ...
