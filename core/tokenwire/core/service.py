"""The application, away from every wire: what may be asked, in which dialect, and what is answered.

A carrier hands in a request's head and gets a Reply, or an Exchange that takes the body and then yields Start (or Wait,
or a Reply). Routes, limits, the queue and draining are decided here, hosts and origins in `guard`, and nowhere else, so
that every policy test holds for every carrier.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from email.utils import formatdate
from typing import Final, Protocol
from urllib.parse import parse_qsl

from msgspec import Struct
from msgspec.structs import replace

from .actions import Record, Start, Wait
from .admission import Admission, Place
from .collect import Result
from .contracts import Dialect, Framing, Headers, ModelCard, ParsedRequest, Principal, Reply, RequestHead, ResponseHead
from .delivery import Delivery, DeliveryOptions, ResultDelivery, StreamDelivery
from .dialects.base import failure_of, status_of
from .errors import RequestRefused
from .events import ErrorKind, Failure, StreamError, StreamStart
from .guard import Guard, shown
from .line import Line
from .request import GenerationRequest
from .routes import PLAIN, Route, dialect_of, routes_at
from .stream import Stream

__all__ = ["Exchange", "Facts", "Service", "ServiceOptions"]

_SECOND: Final = 1_000_000_000
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
    retry_after_ns: int = _SECOND
    """What a refused client is told to wait."""
    guard: Guard = Guard()
    """Who may call from where."""
    delivery: DeliveryOptions = DeliveryOptions()
    """How patient deliveries are."""
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
    """

    __slots__ = ("_body", "_id_prefix", "_service", "dialect", "head", "line", "model", "received_ns")

    def __init__(self, service: Service, dialect: Dialect, id_prefix: str, head: RequestHead, now: int) -> None:
        self._service = service
        self._id_prefix = id_prefix
        self._body: bytearray | None = bytearray()
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
        if self._body is None:
            return None
        if len(self._body) + len(data) > self._service.options.max_body_bytes:
            self._body = None
            return self._service.refuse(self.dialect, self._service.too_large(), self.head, close=True)
        self._body += data
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
        """Write down how the exchange ended."""
        line, delivery = self.line, self.delivery
        first = delivery.first_ns if delivery else None
        return Record(
            method=self.head.method,
            path=self.head.path,
            status=status,
            end=end,
            dialect=self.dialect.name,
            stream_id=line.stream.start.id if line else None,
            model=self.model,
            tokens=line.stream.output_tokens if line else 0,
            sent_bytes=delivery.sent_bytes if delivery else 0,
            first_token_ns=None if first is None else first - self.received_ns,
            duration_ns=now - self.received_ns,
            error=error,
        )


class Service:
    """The application.

    Args:
        models: what can be asked for; the first is the default.
        honours: fields of GenerationRequest that the backend acts on.
        facts: ids and wall clock.
        options: what the operator set.

    Attributes:
        draining: no new stream is begun; those that run go on.
        admission: who runs and who waits.
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
        self._models = {model.name: model for model in models}
        self._default_model = models[0]
        self._engine_honours = honours
        self._honoured = honours | {"max_tokens", "stop"}
        self._facts = facts
        self._date = (-1, "")
        self.admission = Admission(max_running=self.options.max_running, max_waiting=self.options.max_waiting)

    def open(self, head: RequestHead, principal: Principal, now: int) -> Reply | Exchange:
        """Decide on a request by its head.

        Args:
            head: as the carrier read it.
            principal: who asks.
            now: monotonic nanoseconds.

        Returns:
            The whole answer, or an exchange that wants the body.
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
        if head.has_body and not _JSON.fullmatch(content_type or ""):
            found = shown(content_type) if content_type else "missing"
            message = f"The content type is {found}; send the body as application/json."
            error = StreamError(ErrorKind.UNSUPPORTED_MEDIA_TYPE, message, "unsupported_media_type")
            return self.refuse(route.dialect, error, head)
        return Exchange(self, route.dialect, route.id_prefix, head, now)

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
        return list(self._models.values())

    def model(self, name: str) -> ModelCard:
        """Find a model.

        Raises:
            RequestRefused: there is none of that name.
        """
        card = self._models.get(name)
        if card is None:
            message = f"The model {shown(name)} does not exist; GET /v1/models lists those that do."
            raise RequestRefused(StreamError(ErrorKind.NOT_FOUND, message, "model_not_found", "model"))
        return card

    def begin(self, exchange: Exchange, body: bytes, id_prefix: str, framing: Framing, now: int) -> Start | Wait:
        """Make the stream of an exchange whose body is whole.

        Raises:
            RequestRefused: the request cannot be served.
        """
        query = dict(parse_qsl(exchange.head.query, keep_blank_values=True))
        parsed = exchange.dialect.parse_request(body, query, self._honoured)
        return self.begin_parsed(exchange, parsed, id_prefix, framing, now)

    def begin_parsed(
        self, exchange: Exchange, parsed: ParsedRequest, id_prefix: str, framing: Framing, now: int
    ) -> Start | Wait:
        """Make the stream of an exchange whose request somebody else has read.

        Raises:
            RequestRefused: the request cannot be served.
        """
        card = self.model(parsed.request.model) if parsed.request.model else self._default_model
        request = replace(parsed.request, model=card.name)
        exchange.model = card.name
        if self.draining:
            raise RequestRefused(self.shutting_down())
        if self.admission.full:
            raise RequestRefused(self._queue_full())
        start = StreamStart(id_prefix + self._facts.new_id(), card.name, self._facts.wall_s(), choices=request.n)
        stream = Stream(
            start,
            stops=() if "stop" in self._engine_honours else request.stop,
            max_tokens=None if "max_tokens" in self._engine_honours else request.max_tokens,
        )
        delivery = self._delivery(exchange, parsed, request, start.id, framing, now)
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
        dialect, head = exchange.dialect, exchange.head
        about: Headers = (("x-request-id", stream_id),)
        if parsed.ignored:
            about = (*about, ("x-tokenwire-ignored", ", ".join(parsed.ignored)))

        def refuse(terminal: Failure) -> Reply:
            return self.refuse(dialect, failure_of(terminal), head, headers=about)

        def whole(result: Result) -> Reply:
            headers = (("content-type", "application/json"), *about, *self.common(head))
            return Reply(200, headers, dialect.encode_result(result, request))

        if not request.stream:
            return ResultDelivery(whole, framing, refuse)
        headers = (
            ("content-type", dialect.media_type),
            ("cache-control", "no-cache, no-transform"),
            ("x-accel-buffering", "no"),
            *about,
            *self.common(head),
        )
        encoder = dialect.encoder(request, stream_id)
        about_stream = ResponseHead(200, headers)
        greets = _asks_again(head)
        return StreamDelivery(encoder, framing, about_stream, refuse, self.options.delivery, now, greets=greets)


def _asks_again(head: RequestHead) -> bool:
    """Whether the client is an EventSource, which connects again by itself: it alone asks for this type by GET."""
    return head.method == "GET" and "text/event-stream" in (head.header(b"accept") or "")
