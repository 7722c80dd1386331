"""Tokens of your own as one streamed answer of your own server: any iterable in, a dialect's bytes out.

    status, headers, body = await token_stream(generate(prompt), dialect="openai_chat", request=body)

It works wherever a handler runs on asyncio or trio and may answer with an async iterator of bytes: Django, Quart,
aiohttp, Sanic, Tornado. For Starlette, FastAPI and Litestar `tokenwire.adapters.response` makes a response of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextvars import copy_context
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, cast

import anyio
import msgspec

from tokenwire.backends.generators import GeneratorBackend
from tokenwire.core.actions import Start, Wait
from tokenwire.core.contracts import Dialect, Headers, ModelCard, ParsedRequest, Reply, RequestHead
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.errors import RequestRefused
from tokenwire.core.guard import Guard
from tokenwire.core.request import GenerationRequest, Message
from tokenwire.core.service import Exchange, Service, ServiceOptions
from tokenwire.core.stream import Item

from .asgi_carrier import Answer, Hall
from .asgi_messages import BareFraming
from .runtime import LoopRuntime, WorldFacts, log_record, report_failure, running_loop

__all__ = ["DIALECTS", "Asked", "Embedded", "Items", "TokenStream", "TokenStreamHead", "token_stream"]

Items = Iterable[Item] | AsyncIterable[Item]
"""What makes the tokens: str, bytes of UTF-8 cut anywhere, or events. A str is one whole answer."""

Asked = GenerationRequest | Mapping[str, Any] | bytes | str | None
"""What the client asked for: read already, or the request's body, as JSON text or read from it."""

DIALECTS: Final[Mapping[str, Dialect]] = {one.name: one for one in (openai_chat.DIALECT, plain.DIALECT)}
"""The dialects by their names."""

_ID_PREFIXES: Final = {"openai_chat": "chatcmpl-", "plain": "tw"}
_FIELDS: Final = frozenset(GenerationRequest.__struct_fields__)
_NAMELESS: Final = "default"
_CLOSE_LIMIT_S: Final = 5.0
"""How long an iterable's `finally` blocks are waited for."""

_OPEN_TO_ALL: Final = Guard(allowed_hosts=None)
"""Who may call is for the server around it to say."""


class Embedded:
    """One answer, made of an iterable: a house for a single stream.

    Args:
        events: what makes the tokens; it is closed with the answer.
        dialect: the answer's language, or its name.
        request: what was asked for. Without one, the answer is a stream.
        model: the model's name where the request says none.
        delivery: how patient to be.

    Raises:
        ValueError: there is no dialect of that name.

    Attributes:
        framing: of the answer; its head is there once it is decided.
        refusal: the whole answer where the request cannot be served; nothing is generated then.
    """

    def __init__(
        self,
        events: Items,
        dialect: Dialect | str,
        request: Asked = None,
        *,
        model: str = "",
        delivery: DeliveryOptions | None = None,
    ) -> None:
        self._source = _Source(events)
        self._dialect = _dialect(dialect)
        self._delivery = delivery or DeliveryOptions()
        self.framing = BareFraming()
        self.refusal: Reply | None = None
        self._head = RequestHead("-", "-")
        self._parsed: ParsedRequest | None = None
        self._backend: GeneratorBackend | None = None
        try:
            self._parsed = _parsed(self._dialect, request, model)
        except RequestRefused as refused:
            service = self._service(_NAMELESS)
            self.refusal = service.refuse(self._dialect, refused.error, None, headers=refused.headers)

    def asked_by(self, method: str, path: str) -> None:
        """Say how the request began, for the log; the answer to HEAD has no body."""
        self.framing = BareFraming(method)
        self._head = RequestHead(method, path)

    def open(self) -> tuple[Answer, Start | Wait]:
        """Make the stream, on the running loop; `Answer.start` begins it. Called once, where there is no refusal."""
        if self._parsed is None:
            raise RuntimeError("there is nothing to open: the request was refused")
        running = running_loop()
        service = self._service(self._parsed.request.model)
        self._backend = backend = GeneratorBackend(self._source.give, max_threads=1)
        # A batch of one stream is never put off, so that nothing ever waits for the loop's next turn.
        dispatcher = Dispatcher(service, backend, log=log_record, report=report_failure, yield_to_loop=_never)
        backend.attach(LoopRuntime(running.loop, running.timers, running.now), dispatcher)
        hall = Hall(service, dispatcher, running.now, running.timers.call_at, running.loop.new_waiter)
        prefix = _ID_PREFIXES.get(self._dialect.name, "")
        exchange = Exchange(service, self._dialect, prefix, self._head, running.now())
        action = service.begin_parsed(exchange, self._parsed, prefix, self.framing, running.now())
        return Answer(hall, exchange, self.framing), action

    async def aclose(self) -> None:
        """Wait until the iterable was closed, which the answer's end has asked for; where it never began, close it."""
        if self._backend is not None:
            self._backend.close()
        with anyio.move_on_after(_CLOSE_LIMIT_S, shield=True):
            await self._source.aclose()

    def _service(self, model: str) -> Service:
        options = ServiceOptions(guard=_OPEN_TO_ALL, delivery=self._delivery)
        return Service(models=(ModelCard(model),), honours=frozenset(_FIELDS - {"stop", "max_tokens"}),
                       facts=WorldFacts(), options=options)  # fmt: skip


class _Source:
    """An iterable, and whether it was begun and closed."""

    def __init__(self, events: Items) -> None:
        self._events = events
        self._begun = False
        self._closed: anyio.Event | None = None

    async def give(self, n: int) -> object:
        """Hand the iterable to the backend; the choices, however many, are in its events."""
        del n
        self._begun = True
        events = self._events
        if isinstance(events, AsyncIterable):
            self._closed = anyio.Event()
            return self._watched(events, self._closed)
        if isinstance(events, str | bytes):
            return events
        return _in_context(events)

    async def aclose(self) -> None:
        """Close the iterable where it never began; else wait for its end, unless it ends in a thread."""
        if self._closed is not None:
            await self._closed.wait()
        elif not self._begun:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()
            else:
                getattr(self._events, "close", _never)()

    async def _watched(self, events: AsyncIterable[Item], closed: anyio.Event) -> AsyncIterator[Item]:
        iterator = aiter(events)
        try:
            async for item in iterator:
                yield item
        finally:
            try:
                close = getattr(iterator, "aclose", None)
                if close is not None:
                    with anyio.CancelScope(shield=True):
                        await close()
            finally:
                closed.set()


def _in_context(events: Iterable[Item]) -> Iterator[Item]:
    """Iterate in the context variables of the caller, in whatever thread."""
    context = copy_context()

    def iterate() -> Iterator[Item]:
        iterator = context.run(iter, events)
        try:
            while (item := context.run(next, iterator, _END)) is not _END:
                yield cast("Item", item)
        finally:
            context.run(getattr(iterator, "close", _never))

    return iterate()


class TokenStreamHead(NamedTuple):
    """An answer whose head is decided."""

    status: int
    """The HTTP status."""
    headers: Headers
    """Names in lower case."""
    body: TokenStream
    """What follows."""


class TokenStream:
    """The body of an answer: an async iterator of bytes, each of them what was ready when it was asked for.

    Ending early needs `aclose`, or `async with`; `close` does it without waiting, from any thread. One that is dropped
    is closed too.
    """

    __slots__ = ("_answer", "_embedded", "_rest", "_wake_soon")

    def __init__(self, embedded: Embedded, answer: Answer | None, rest: bytes) -> None:
        self._embedded = embedded
        self._answer = answer
        self._rest = rest
        self._wake_soon = running_loop().loop.wake_soon

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        data, self._rest = self._rest, b""
        if not data and self._answer is not None:
            data = await _take(self._embedded, self._answer)
        if not data:
            await self.aclose()
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        """Stop the iterable and wait until it was closed. Idempotent."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.leave()
            await self._embedded.aclose()

    def close(self) -> None:
        """Stop the iterable, soon. From any thread; idempotent."""
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done:
            self._wake_soon(answer.leave)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self.close()


async def _take(embedded: Embedded, answer: Answer) -> bytes:
    try:
        data = await answer.take()
    except BaseException:
        answer.leave()
        await embedded.aclose()
        raise
    if answer.cut:
        raise ConnectionAbortedError("the reader was too slow; the answer was given up")
    return data


async def token_stream(
    events: Items,
    *,
    dialect: Dialect | str = "openai_chat",
    request: Asked = None,
    model: str = "",
    delivery: DeliveryOptions | None = None,
) -> TokenStreamHead:
    """Begin an answer, and wait until its head is decided: by the first token, by an error, or by a heartbeat.

    Args:
        events: what makes the tokens: any sync or async iterable of str, bytes or events. A sync one runs in a thread.
        dialect: the answer's language, or its name.
        request: what the client asked for; see `Asked`. Stop strings and limits in it are kept; with `"stream": false`
            the answer is whole. Without a request it is a stream.
        model: the model's name where the request says none.
        delivery: how patient to be.

    Returns:
        Status, headers and body; an error before the first token is in the status, a later one in the body.

    Raises:
        ValueError: there is no dialect of that name.
    """
    embedded = Embedded(events, dialect, request, model=model, delivery=delivery)
    if embedded.refusal is not None:
        rest = embedded.framing.reply(embedded.refusal)
        await embedded.aclose()
        return _decided(embedded, None, rest)
    answer, action = embedded.open()
    answer.start(action)
    rest = await _take(embedded, answer)
    if answer.done:
        await embedded.aclose()
    return _decided(embedded, None if answer.done else answer, rest)


def _decided(embedded: Embedded, answer: Answer | None, rest: bytes) -> TokenStreamHead:
    head = embedded.framing.head
    if head is None:
        raise RuntimeError("an answer without a head")
    return TokenStreamHead(head.status, head.headers, TokenStream(embedded, answer, rest))


def _dialect(dialect: Dialect | str) -> Dialect:
    if not isinstance(dialect, str):
        return dialect
    if dialect not in DIALECTS:
        raise ValueError(f"there is no dialect {dialect!r}; there are {', '.join(sorted(DIALECTS))}")
    return DIALECTS[dialect]


def _parsed(dialect: Dialect, asked: Asked, model: str) -> ParsedRequest:
    if asked is None:
        parsed = ParsedRequest(GenerationRequest(model=model, messages=(Message("user"),), stream=True))
    elif isinstance(asked, GenerationRequest):
        parsed = ParsedRequest(asked)
    else:
        body = asked.encode() if isinstance(asked, str) else asked
        body = body if isinstance(body, bytes) else msgspec.json.encode(body)
        parsed = dialect.parse_request(body, {}, _FIELDS)
    request = parsed.request
    return ParsedRequest(msgspec.structs.replace(request, model=request.model or model or _NAMELESS), parsed.ignored)


def _never() -> None:
    """Do nothing where nothing can be due."""


_END: Final = object()
