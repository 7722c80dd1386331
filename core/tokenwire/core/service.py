"""The application, away from every wire: what may be asked, in which dialect, and what is answered.

A carrier hands in a request's head and gets a Reply, or an Exchange that takes the body and then yields Start (or Wait,
or a Reply). Routes, limits, the queue and draining are decided here, hosts and origins in `guard`, and nowhere else, so
that every policy test holds for every carrier.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from typing import Final, Protocol
from urllib.parse import parse_qsl

from msgspec import Struct
from msgspec.structs import replace

from .actions import Record, Start, Wait
from .admission import Admission, Place
from .collect import Result
from .contracts import (
    ANY_MODEL,
    Dialect,
    Framing,
    Headers,
    ModelCard,
    ParsedRequest,
    Principal,
    Reply,
    RequestHead,
    ResponseHead,
)
from .conversation import Conversation
from .delivery import Delivery, DeliveryOptions, ResultDelivery, StreamDelivery
from .dialects.base import failure_of, status_of
from .errors import RequestRefused
from .events import ErrorKind, Failure, StreamCancelled, StreamError, StreamStart, StreamTruncated
from .guard import Guard, shown
from .latency import Accountant
from .ledger import Targets
from .line import Line
from .request import GenerationRequest
from .routes import PLAIN, Route, dialect_of, routes_at
from .stream import Stream
from .websocket import UpgradeRefused

__all__ = ["Exchange", "Facts", "Service", "ServiceOptions"]

_SECOND: Final = 1_000_000_000
_UNLISTED: Final = "unlisted"
_UPGRADE_REQUIRED: Final = 426
_FAILED_ENDS: Final[Mapping[type, str]] = {StreamTruncated: "truncated", StreamCancelled: "cancelled"}
_STREAM_HEADERS: Final[Headers] = (("cache-control", "no-cache, no-transform"), ("x-accel-buffering", "no"))
_JSON: Final = re.compile(r"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)


class Facts(Protocol):
    """What the core may not know by itself."""

    def new_id(self) -> str:
        """Make an id that nobody can guess; letters, digits, - and _ only."""
        ...

    def wall_s(self) -> int:
        """Read the wall clock, in whole seconds of Unix time."""
        ...


class ServiceOptions(Struct, frozen=True, kw_only=True):
    """What an operator may set."""

    max_body_bytes: int = 8 * 1024 * 1024
    """The longest request body: room for a few images as data URLs."""
    max_running: int = 1024
    """Streams that run at once; more wait in the queue."""
    max_waiting: int = 256
    """Streams that wait; more are refused with 429."""
    max_prompts: int = 8
    """Prompts that wait on one WebSocket while an answer runs."""
    retry_after_ns: int = _SECOND
    """What a refused client is told to wait."""
    guard: Guard = Guard()
    """Who may call from where."""
    delivery: DeliveryOptions = DeliveryOptions()
    """How patient deliveries are."""
    accounting: bool = True
    """Whether latencies are counted, for /metrics and for the log."""
    targets: Targets = Targets()
    """What makes a stream good."""
    page: bytes = b""
    """The HTML page at GET /; none where empty."""


class Exchange:
    """One request that is being answered: takes the body, then makes the stream.

    Attributes:
        head: the request's head.
        dialect: the language of its answer.
        line: the stream, once there is one.
        received_ns: when the head came.
        model: the model that was asked for, once it is known.
        greets: the answer begins before the backend does, and failures are events in it.
    """

    __slots__ = ("_body", "_id_prefix", "_service", "dialect", "greets", "head", "line", "model", "received_ns")

    def __init__(
        self, service: Service, dialect: Dialect, id_prefix: str, head: RequestHead, now: int, *, greets: bool = False
    ) -> None:
        self._service = service
        self.greets = greets
        self._id_prefix = id_prefix
        self._body: bytes | bytearray | None = b""
        self.head = head
        self.dialect = dialect
        self.line: Line | None = None
        self.received_ns = now
        self.model: str | None = None

    @property
    def delivery(self) -> Delivery | None:
        """The stream's way to the client, once there is a stream."""
        return self.line.delivery if self.line else None

    def receive_data(self, data: bytes) -> Reply | None:
        """Take a piece of the body.

        Returns:
            A refusal with 413 once the body is too long; the exchange is over then. Else None.
        """
        body = self._body
        if body is None:
            return None
        if len(body) + len(data) > self._service.options.max_body_bytes:
            self._body = None
            return self._service.refuse(self.dialect, self._service.too_large(), self.head, close=True)
        if not body:
            self._body = data  # the usual body comes in one piece, and is not copied
            return None
        if not isinstance(body, bytearray):
            self._body = body = bytearray(body)
        body += data
        return None

    def receive_eof(self, framing: Framing, now: int) -> Reply | Start | Wait:
        """Take the end of the body.

        Args:
            framing: the carrier's, for this one answer.
            now: monotonic nanoseconds.

        Returns:
            Start or Wait, with the new line in it and here; or a refusal.
        """
        body, self._body = bytes(self._body or b""), None
        try:
            return self._service.begin(self, body, self._id_prefix, framing, now)
        except RequestRefused as refused:
            return self._service.refuse(self.dialect, refused.error, self.head, headers=refused.headers)

    def record(self, *, status: int, end: str, now: int, error: str | None = None) -> Record:
        """Write down how the exchange ended, and close its trace. Called once, at its end."""
        line, delivery = self.line, self.delivery
        first = delivery.first_ns if delivery else None
        if line is not None and end == "failed":
            end = _FAILED_ENDS.get(type(line.stream.terminal), end)
        trace = delivery.trace if delivery else None
        if trace is not None:
            trace.close(end, now)
            first = trace.first_ns  # an empty delta may have opened the answer before
        usage = line.stream.usage if line else None
        return Record(
            method=self.head.method,
            path=self.head.path,
            status=status,
            end=end,
            dialect=self.dialect.name,
            stream_id=line.stream.start.id if line else None,
            model=self.model,
            model_label=self._service.accounted(self.model) if line and self.model is not None else None,
            tokens=max(line.stream.output_tokens, usage.output_tokens if usage else 0) if line else 0,
            sent_bytes=delivery.sent_bytes if delivery else 0,
            first_token_ns=None if first is None else first - self.received_ns,
            duration_ns=now - self.received_ns,
            queue_ns=trace.queue_ns if trace else None,
            tpot_ns=trace.tpot_ns if trace else None,
            gap_p99_ns=trace.gap_percentile(99) if trace else None,
            error=error,
        )


class _Wording:
    """How the answer to one request is worded where it is a whole one: a result, or a failure before any of a stream."""

    __slots__ = ("_dialect", "_head", "_headers", "_request", "_service")

    def __init__(self, service: Service, exchange: Exchange, request: GenerationRequest, headers: Headers) -> None:
        # Not the exchange itself, which has the delivery that has this: nothing here is to wait for a collector of cycles.
        self._service = service
        self._dialect = exchange.dialect
        self._head = exchange.head
        self._request = request
        self._headers = headers

    def result(self, result: Result) -> Reply:
        headers = (("content-type", "application/json"), *self._headers, *self._service.common(self._head))
        return Reply(200, headers, self._dialect.encode_result(result, self._request))

    def refusal(self, terminal: Failure) -> Reply:
        return self._service.refuse(self._dialect, failure_of(terminal), self._head, headers=self._headers)


class Service:
    """The application.

    Args:
        models: what can be asked for; the first is the default. A sequence whose content may change.
        honours: fields of GenerationRequest that the backend acts on.
        facts: ids and wall clock.
        options: what the operator set.

    Attributes:
        draining: no new stream is begun; those that run go on.
        admission: who runs and who waits.
        accountant: what latencies there were.
    """

    def __init__(
        self,
        *,
        models: Sequence[ModelCard],
        honours: frozenset[str],
        facts: Facts,
        options: ServiceOptions | None = None,
    ) -> None:
        self.options = options or ServiceOptions()
        self.draining = False
        self._models = models
        self._engine_honours = honours
        self._engine_stops = "stop" in honours
        self._engine_counts = "max_tokens" in honours
        self._honoured = honours | {"max_tokens", "stop"}
        self._facts = facts
        self._date = (-1, "")
        self.admission = Admission(max_running=self.options.max_running, max_waiting=self.options.max_waiting)
        self.accountant = Accountant(self.options.targets)

    def open(self, head: RequestHead, principal: Principal, now: int) -> Reply | Exchange | Conversation:
        """Decide on a request by its head.

        Args:
            head: as the carrier read it.
            principal: who asks.
            now: monotonic nanoseconds.

        Returns:
            The whole answer; an exchange that wants the body; or a conversation, where the request is to be upgraded.
        """
        del principal  # the only principal so far is the anonymous one, who may use every route
        routes = routes_at(head.path)
        route = routes.get(head.method)
        dialect = route.dialect if route else dialect_of(head.path)
        if route is None or route.guarded:
            refusal = self.options.guard.refusal(head, generates=route is not None and route.generates)
            if refusal is not None:
                return self.refuse(dialect, refusal, head)
        if not routes:
            error = StreamError(ErrorKind.NOT_FOUND, f"There is nothing at {shown(head.path)}.", "not_found")
            return self.refuse(dialect, error, head)
        if route is None:
            return self._without_route(dialect, head, ", ".join(sorted((*routes, "OPTIONS"))))
        return route.answer(self, route, head, now)

    def exchange(self, route: Route, head: RequestHead, now: int) -> Reply | Exchange:
        """Begin to answer a request for text by its head."""
        if head.header(b"last-event-id"):
            # A dropped EventSource reconnects by itself. There is nothing kept to resume from, and without this answer (HTML
            # standard, 9.2.3: 204 stops it) each drop would run the prompt again.
            return Reply(204, self.common(head))
        if self.draining:
            return self.refuse(route.dialect, self.shutting_down(), head, close=True)
        if (head.content_length or 0) > self.options.max_body_bytes:
            return self.refuse(route.dialect, self.too_large(), head, close=True)
        content_type = head.header(b"content-type")
        if head.has_body and content_type != "application/json" and not _JSON.fullmatch(content_type or ""):
            found = shown(content_type) if content_type else "missing"
            message = f"The content type is {found}; send the body as application/json."
            error = StreamError(ErrorKind.UNSUPPORTED_MEDIA_TYPE, message, "unsupported_media_type")
            return self.refuse(route.dialect, error, head)
        return Exchange(self, route.dialect, route.id_prefix, head, now, greets=_asks_again(head))

    def prompt(self, dialect: Dialect, head: RequestHead, now: int) -> Exchange:
        """Begin to answer a prompt on a connection that was upgraded, whose handshake had this head."""
        return Exchange(self, dialect, "", head, now, greets=True)

    def no_upgrade(self, head: RequestHead) -> Reply:
        """Answer a request of plain HTTP to a path that is for WebSocket (RFC 9110, 15.5.22)."""
        message = "This path is for WebSocket; over plain HTTP send the same request to /chat."
        error = StreamError(ErrorKind.INVALID_REQUEST, message, "upgrade_required", status=_UPGRADE_REQUIRED)
        return self.refuse(PLAIN, error, head, headers=(("upgrade", "websocket"), ("connection", "Upgrade")))

    def refuse_upgrade(self, head: RequestHead, refused: UpgradeRefused) -> Reply:
        """Answer a handshake that opens no WebSocket."""
        words = f"{refused}."
        error = StreamError(ErrorKind.INVALID_REQUEST, words, "bad_upgrade", status=refused.status)
        return self.refuse(PLAIN, error, head, headers=refused.headers)

    def refuse(
        self,
        dialect: Dialect,
        error: StreamError,
        head: RequestHead | None,
        *,
        headers: Headers = (),
        close: bool = False,
    ) -> Reply:
        """Word a refusal or a failure as a whole answer.

        Args:
            dialect: whose error shape it gets.
            error: what is wrong.
            head: the request's head where one could be read.
            headers: what the answer carries besides.
            close: whether the connection must end with it.
        """
        if error.retry_after_ns is not None:
            headers = (*headers, ("retry-after", str(-(-error.retry_after_ns // _SECOND))))
        return Reply(
            status_of(error),
            (("content-type", "application/json"), *headers, *self.common(head)),
            dialect.encode_error(error),
            close,
            error.message,
        )

    def refuse_unread(self, message: str, status: int, dialect: Dialect | None = None) -> Reply:
        """Word the answer to bytes that were no request at all, or only a piece of one."""
        words = f"{message[:1].upper()}{message[1:]}."
        error = StreamError(ErrorKind.INVALID_REQUEST, words, "bad_request", status=status)
        return self.refuse(dialect or PLAIN, error, None, close=True)

    def shutting_down(self) -> StreamError:
        """The error that ends a stream, or refuses one, because the server is going down."""
        return StreamError(
            ErrorKind.UNAVAILABLE,
            "The server is shutting down; ask again in a moment.",
            "server_shutdown",
            retry_after_ns=self.options.retry_after_ns,
            retryable=True,
        )

    def too_large(self) -> StreamError:
        """The error for a body over the limit."""
        limit = self.options.max_body_bytes
        return StreamError(ErrorKind.TOO_LARGE, f"The request body is longer than {limit} bytes.", "request_too_large")

    def common(self, head: RequestHead | None) -> Headers:
        """Headers of every answer: the date, and what lets an allowed page of another origin read it."""
        return (("date", self._http_date()), *(self.options.guard.cors(head) if head else ()))

    def _without_route(self, dialect: Dialect, head: RequestHead, methods: str) -> Reply:
        """Answer OPTIONS, and any method that the path does not know."""
        if head.method == "OPTIONS":
            return Reply(204, (*Guard.preflight(methods), *self.common(head)))
        message = f"{shown(head.method)} is not allowed here; use {methods}."
        error = StreamError(ErrorKind.METHOD_NOT_ALLOWED, message, "method_not_allowed")
        return self.refuse(dialect, error, head, headers=(("allow", methods),))

    def _http_date(self) -> str:
        """Format the wall clock (RFC 9110, 6.6.1), once a second."""
        second = self._facts.wall_s()
        if second != self._date[0]:
            self._date = (second, formatdate(second, usegmt=True))
        return self._date[1]

    def models(self) -> list[ModelCard]:
        """List what can be asked for."""
        return list(self._models)

    def model(self, name: str) -> ModelCard:
        """Find a model.

        Raises:
            RequestRefused: there is none of that name.
        """
        for card in self._models:
            if card.name == name:
                return card
        message = f"The model {shown(name)} does not exist; GET /v1/models lists those that do."
        raise RequestRefused(StreamError(ErrorKind.NOT_FOUND, message, "model_not_found", "model"))

    def _requested_model(self, name: str) -> ModelCard:
        if not name:
            return self._models[0] if self._models else ModelCard("")
        return ModelCard(name) if ANY_MODEL in self._engine_honours else self.model(name)

    def accounted(self, name: str) -> str:
        """Say under which name a model is accounted for: a client must not be able to make up as many as it likes."""
        for card in self._models:
            if card.name == name:
                return name
        return _UNLISTED

    def begin(self, exchange: Exchange, body: bytes, id_prefix: str, framing: Framing, now: int) -> Start | Wait:
        """Make the stream of an exchange whose body is whole.

        Raises:
            RequestRefused: the request cannot be served.
        """
        asked = exchange.head.query
        query = dict(parse_qsl(asked, keep_blank_values=True)) if asked else {}
        parsed = exchange.dialect.parse_request(body, query, self._honoured)
        return self.begin_parsed(exchange, parsed, id_prefix, framing, now)

    def begin_parsed(
        self, exchange: Exchange, parsed: ParsedRequest, id_prefix: str, framing: Framing, now: int
    ) -> Start | Wait:
        """Make the stream of an exchange whose request somebody else has read.

        Raises:
            RequestRefused: the request cannot be served.
        """
        card = self._requested_model(parsed.request.model)
        request = parsed.request
        if request.model != card.name:
            request = replace(request, model=card.name)
        exchange.model = card.name
        if self.draining:
            raise RequestRefused(self.shutting_down())
        if self.admission.full:
            raise RequestRefused(self._queue_full())
        start = StreamStart(id_prefix + self._facts.new_id(), card.name, self._facts.wall_s(), choices=request.n)
        stream = Stream(
            start,
            stops=() if self._engine_stops else request.stop,
            max_tokens=None if self._engine_counts else request.max_tokens,
        )
        delivery = self._delivery(exchange, parsed, request, start.id, framing, now)
        if self.options.accounting:
            delivery.trace = self.accountant.open(
                self.accounted(card.name), exchange.dialect.name, exchange.received_ns
            )
            delivery.trace.accept(now)
        exchange.line = line = Line(stream, request, delivery)
        return Start(line, request) if self.admission.enter(line) is Place.RUNNING else Wait(line)

    def _queue_full(self) -> StreamError:
        return StreamError(
            ErrorKind.RATE_LIMIT,
            f"{self.admission.running} streams run and {self.admission.waiting} wait; the queue is full.",
            "queue_full",
            retry_after_ns=self.options.retry_after_ns,
            retryable=True,
        )

    def _delivery(
        self,
        exchange: Exchange,
        parsed: ParsedRequest,
        request: GenerationRequest,
        stream_id: str,
        framing: Framing,
        now: int,
    ) -> Delivery:
        dialect = exchange.dialect
        about: Headers = (("x-request-id", stream_id),)
        if parsed.ignored:
            about = (*about, ("x-tokenwire-ignored", ", ".join(parsed.ignored)))
        wording = _Wording(self, exchange, request, about)
        if not request.stream:
            return ResultDelivery(wording.result, framing, wording.refusal)
        headers = (("content-type", dialect.media_type), *_STREAM_HEADERS, *about, *self.common(exchange.head))
        encoder = dialect.encoder(request, stream_id)
        head = ResponseHead(200, headers)
        options = self.options.delivery
        return StreamDelivery(encoder, framing, head, wording.refusal, options, now, greets=exchange.greets)


def _asks_again(head: RequestHead) -> bool:
    """Whether the client is an EventSource, which connects again by itself: it alone asks for this type by GET."""
    return head.method == "GET" and "text/event-stream" in (head.header(b"accept") or "")
