"""Ask any server for a stream of tokens, in any dialect, and take it as events.

    async with connect("http://127.0.0.1:8000", prompt="Hi") as stream:
        async for event in stream:
            ...

`connect` is for asyncio and trio, whichever it finds itself on; `connect_sync` waits in the calling thread. Both stand on
the same machine, the same sockets and the same TLS.

How a stream ends is an event, too: the last one, and there is always one. It is StreamEnd, or StreamError for what the
server refused or reported, or StreamTruncated where the connection ended, broke or fell silent before the stream was
whole. Nothing is raised for it unless it is asked for with `raise_for_error`. Raised are only what came before there was a
stream: `ConnectFailed` from entering the block, and what is wrong with the question from `connect` itself.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from msgspec import convert
from msgspec.structs import replace

from tokenwire.core.collect import Collector, Result
from tokenwire.core.contracts import Dialect, Headers
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.events import Event, StreamEnd, Terminal
from tokenwire.core.request import GenerationRequest, Message, TextPart

from ._client_session import MAX_EVENTS, ConnectFailed, Patience, Question, Session, StreamFailed, parse_url
from ._sync_loop import SyncLoop
from .dialer import SocketDialer, dialer_on
from .runtime import RunningLoop, Waiter, running_loop

__all__ = [
    "ENDPOINTS",
    "MAX_EVENTS",
    "AsyncStream",
    "ConnectFailed",
    "Endpoint",
    "Patience",
    "Prompt",
    "StreamFailed",
    "SyncStream",
    "connect",
    "connect_sync",
]


class Endpoint(NamedTuple):
    """Where servers of a dialect are asked."""

    dialect: Dialect
    path: str
    """Below the base URL."""
    prefix: str
    """The base's path where the URL has none."""


ENDPOINTS: Final[Mapping[str, Endpoint]] = {
    one.dialect.name: one
    for one in (Endpoint(openai_chat.DIALECT, "/chat/completions", "/v1"), Endpoint(plain.DIALECT, "/chat", ""))
}
"""The dialects by their names."""

Prompt = str | Sequence[Message | Mapping[str, str]] | GenerationRequest | bytes
"""What to ask: one user's words; a conversation, its messages as they are or as {"role": ..., "content": text}; a whole
request; or a body that is sent as it is, which should ask for a stream."""


def connect(
    url: str,
    prompt: Prompt,
    *,
    dialect: str = openai_chat.DIALECT.name,
    model: str = "",
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    patience: Patience | None = None,
    tls: ssl.SSLContext | None = None,
    **parameters: Any,
) -> AsyncStream:
    """Ask a server, on asyncio or trio; entering the block connects and puts the question.

    Leaving the block closes the connection at once, which is how a server hears that nobody wants the rest.

    Args:
        url: the server, such as https://api.openai.com/v1: its base URL, or the endpoint itself.
        prompt: what to ask.
        dialect: what the server speaks, a key of `ENDPOINTS`.
        model: the model's name, unless the prompt is a whole request. Servers of a single model may do without.
        api_key: sent as a bearer token.
        headers: further headers; they replace those that are sent by default.
        patience: how long the server may take.
        tls: whom to trust; the system's authorities by default.
        parameters: further fields of `GenerationRequest`, such as max_tokens.

    Raises:
        ValueError: the URL, a header or a message cannot be what it should be, or there is no such dialect.
        TypeError: a parameter is no field of `GenerationRequest`.
        tokenwire.core.errors.RequestRefused: the dialect has no word for something that is asked.
    """
    question = _question(url, prompt, dialect, model, api_key, headers, patience, tls, parameters)
    return AsyncStream(question, running_loop())


def connect_sync(
    url: str,
    prompt: Prompt,
    *,
    dialect: str = openai_chat.DIALECT.name,
    model: str = "",
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    patience: Patience | None = None,
    tls: ssl.SSLContext | None = None,
    **parameters: Any,
) -> SyncStream:
    """Ask a server, and wait for it in this thread; otherwise as `connect`."""
    return SyncStream(_question(url, prompt, dialect, model, api_key, headers, patience, tls, parameters))


def _question(
    url: str,
    prompt: Prompt,
    dialect: str,
    model: str,
    api_key: str | None,
    headers: Mapping[str, str] | None,
    patience: Patience | None,
    tls: ssl.SSLContext | None,
    parameters: Mapping[str, Any],
) -> Question:
    endpoint = ENDPOINTS.get(dialect)
    if endpoint is None:
        raise ValueError(f"there is no dialect {dialect!r}; there are {', '.join(sorted(ENDPOINTS))}")
    key: Headers = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
    return Question(
        parse_url(url, endpoint.path, prefix=endpoint.prefix),
        endpoint.dialect,
        _request(prompt, model, parameters),
        key + tuple((headers or {}).items()),
        patience or Patience(),
        tls,
    )


def _request(prompt: Prompt, model: str, parameters: Mapping[str, Any]) -> GenerationRequest | bytes:
    if isinstance(prompt, bytes):
        if parameters:
            raise TypeError("a body that is sent as it is takes no parameters")
        return prompt
    fields: dict[str, Any] = {"stream": True, "include_usage": True} | dict(parameters)
    if isinstance(prompt, GenerationRequest):
        return replace(prompt, **fields)
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return GenerationRequest(model=model, messages=tuple(_message(one) for one in said), **fields)


def _message(message: Message | Mapping[str, str]) -> Message:
    """Read a message; msgspec's ValidationError, a ValueError, says what is wrong with it."""
    if isinstance(message, Message):
        return message
    others = {name: value for name, value in message.items() if name != "content"}
    read = convert(others, Message)
    return replace(read, content=(TextPart(message["content"]),)) if "content" in message else read


class _Stream:
    """What both streams have in common."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def terminal(self) -> Terminal | None:
        """How the stream ended, once that event was taken; None before."""
        return self._session.terminal

    @property
    def status(self) -> int | None:
        """The answer's HTTP status, once it has come."""
        return self._session.status

    def raise_for_error(self) -> None:
        """Raise unless the stream has been taken to a good end.

        Raises:
            StreamFailed: it failed, or its end has not been taken.
        """
        terminal = self.terminal
        if not isinstance(terminal, StreamEnd):
            raise StreamFailed(terminal)


class AsyncStream(_Stream):
    """One stream, for `async with` and then `async for`; by one task at a time. See `connect`."""

    def __init__(self, question: Question, running: RunningLoop) -> None:
        super().__init__(Session(question, running.now))
        self._running = running
        self._context = question.context
        self._waiter: Waiter | None = None
        self._session.wake = self._wake

    async def __aenter__(self) -> Self:
        """Connect, and put the question.

        Raises:
            ConnectFailed: there is no connection.
        """
        session = self._session
        session.begin(dialer_on(self._running, self._context), self._running.timers)
        try:
            while not (session.stands or session.over):
                await self._wait()
        except BaseException:
            session.close()
            raise
        if session.failure is not None:
            raise session.failure
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while (event := self._session.next_event()) is None:
            if self._session.over:
                raise StopAsyncIteration
            await self._wait()
        return event

    async def collect(self) -> Result:
        """Take what is left of the stream, and fold it into one result."""
        collector = Collector()
        async for event in self:
            collector.receive(event)
        return collector.result()

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("another task takes events from this stream")
        self._waiter = self._running.loop.new_waiter()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class SyncStream(_Stream):
    """One stream, for `with` and then `for`, in the thread that entered it. See `connect_sync`."""

    def __init__(self, question: Question) -> None:
        self._loop: SyncLoop | None = None
        self._context = question.context
        super().__init__(Session(question, SyncLoop.now))

    def __enter__(self) -> Self:
        """Connect, and put the question.

        Raises:
            ConnectFailed: there is no connection.
        """
        session = self._session
        self._loop = loop = SyncLoop()
        session.begin(SocketDialer(loop, loop.timers, loop.now, context=self._context), loop.timers)
        try:
            while not (session.stands or session.over):
                loop.turn()
        except BaseException:
            self._close(loop)
            raise
        if session.failure is not None:
            self._close(loop)
            raise session.failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._loop is not None:
            self._close(self._loop)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while (event := self._session.next_event()) is None:
            if self._session.over or self._loop is None:
                raise StopIteration
            self._loop.turn()
        return event

    def collect(self) -> Result:
        """Take what is left of the stream, and fold it into one result."""
        collector = Collector()
        for event in self:
            collector.receive(event)
        return collector.result()

    def _close(self, loop: SyncLoop) -> None:
        self._session.close()
        loop.end()
