"""One request of ASGI: messages in and out, and the one answer between them.

The bytes of an engine's step come by `Carrier.write`, in the call that made them. ASGI's `send` may suspend, so they
cannot leave there, but for one server that is known (see `sends_at_once`): they are put together, and the request's own
task is woken once for all of them. While that task is away in `send` the delivery is blocked: pull sources rest, push
sources are merged.

Only one task ever calls `receive`: the request's own until the body is whole, then the one that waits for the client to
leave.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeGuard

import anyio

from tokenwire.core.actions import Cancel, Pause, Record, Resume, Start, Wait
from tokenwire.core.contracts import Principal, Reply, RequestHead, ResponseHead
from tokenwire.core.conversation import Conversation
from tokenwire.core.delivery import Delivery
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.errors import LocalProtocolError
from tokenwire.core.line import Line
from tokenwire.core.service import Exchange, Service

from .asgi_messages import (
    BareFraming,
    Message,
    Receive,
    Scope,
    Send,
    closing,
    head_of,
    may_have_unannounced_body,
    send_reply,
    start_message,
)
from .runtime import Waiter
from .timers import Alarm, Deadline

__all__ = [
    "NOBODY",
    "Answer",
    "Hall",
    "answer",
    "sends_at_once",
    "serve",
]

_Direct = Callable[[Message], Coroutine[Any, Any, None]]

_SENDS_AT_ONCE: Final = frozenset(
    (f"uvicorn.protocols.http.{module}", "RequestResponseCycle.send") for module in ("h11_impl", "httptools_impl")
)

_ANYBODY: Final = Principal()
_CLIENT_LEFT: Final = 499
"""nginx's status for a request whose client did not wait for the answer."""


class Hall(NamedTuple):
    """What the answers of one application share."""

    service: Service
    """The application."""
    dispatcher: Dispatcher
    """The sink and the doer of actions."""
    now: Callable[[], int]
    """The monotonic clock, in nanoseconds."""
    call_at: Callable[[int, Callable[[], None]], Alarm]
    """Calls back once the clock is at or past a deadline."""
    new_waiter: Callable[[], Waiter]
    """Makes what a task can wait on, once."""


def sends_at_once(send: Send) -> TypeGuard[_Direct]:
    """Whether a server's `send` may be begun outside of the task that serves the request.

    It is true of uvicorn's own, with nothing wrapped around it: it neither asks for its task nor awaits anything, unless
    the transport is full. Then the bytes can leave in the call that made them, as in the bundled server, and a token costs
    no wake-up at all. Of any other `send` nothing is known, and it is awaited as ASGI says.
    """
    function = getattr(send, "__func__", None)
    return (getattr(function, "__module__", ""), getattr(function, "__qualname__", "")) in _SENDS_AT_ONCE


async def _failed(error: Exception) -> None:
    raise error


class _Rest:
    """What is left of a `send` that was begun outside of the task which has to await it.

    Args:
        sending: the coroutine, suspended.
        first: what it waits for, not yet seen by any task.
    """

    __slots__ = ("_first", "_sending")

    def __init__(self, sending: Coroutine[Any, Any, None], first: object) -> None:
        self._sending = sending
        self._first = first

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._first
        except BaseException:
            self._sending.close()
            raise
        yield from self._sending.__await__()


class Answer:
    """One stream's way to one reader who takes its bytes when he wants them; a `tokenwire.core.contracts.Carrier`.

    Args:
        hall: the application.
        exchange: the request, with its line.
        framing: the one that the line's delivery writes with.

    Attributes:
        done: nothing follows what waits to be taken.
        cut: it was given up: its end is missing, and must be seen to be.
    """

    __slots__ = ("_away", "_blocked", "_deadline", "_delivery", "_direct", "_exchange", "_framing", "_hall", "_line",
                 "_on_cut", "_out", "_rest", "_waiter", "cut", "done")  # fmt: skip

    def __init__(self, hall: Hall, exchange: Exchange, framing: BareFraming) -> None:
        line = exchange.line
        if line is None:
            raise LocalProtocolError("an answer without a line")
        self._hall = hall
        self._exchange = exchange
        self._framing = framing
        self._line: Line = line
        self._delivery: Delivery = line.delivery
        self._out = b""
        self._waiter: Waiter | None = None
        self._away = False
        self._blocked = False
        self._direct: _Direct | None = None
        self._rest: Awaitable[None] | None = None
        self._deadline = Deadline(hall.call_at, self.handle_deadline)
        self._on_cut: Callable[[], object] | None = None
        self.done = False
        self.cut = False

    @property
    def head(self) -> ResponseHead | None:
        """The head, once something was written; None where the answer was cut before."""
        return self._framing.head

    def start(self, action: Start | Wait, on_cut: Callable[[], object] | None = None) -> None:
        """Begin to generate, or to wait for a place.

        Args:
            action: what the exchange said.
            on_cut: called when the answer is given up, so that a reader who is away can be called back.
        """
        now = self._hall.now()
        self._on_cut = on_cut
        self._out = self._delivery.begin(now)
        self._hall.dispatcher.perform((action,), self, now)
        self._deadline.expect(self._delivery.next_deadline(), now)

    def write(self, data: bytes) -> None:
        """Keep bytes until they are taken, and wake the reader; see `Carrier`."""
        waiter = self._waiter
        if waiter is not None:  # the usual case: the reader waits, so that nothing else is there
            direct = self._direct
            if direct is None or self._delivery.ended:
                self._out = data
            elif self._sent_at_once(direct, data):
                return
            self._waiter = None
            if not waiter.done():  # it is done where the reader was cancelled
                waiter.set_result(None)
        elif not self.done:
            self._out += data
            if self._away and not self._blocked:
                self._block()

    def _sent_at_once(self, send: _Direct, data: bytes) -> bool:
        """Send without waking the task, where that is not needed; else leave it what is left to do."""
        sending = send({"type": "http.response.body", "body": data, "more_body": True})
        try:
            first = sending.send(None)
        except StopIteration:
            return True
        except Exception as error:  # noqa: BLE001  # the task raises it: a batch must not break off at one peer
            self._rest = _failed(error)
        else:
            self._rest = _Rest(sending, first)
        self._away = True
        return False

    async def _end_sending(self, rest: Awaitable[None]) -> None:
        self._rest = None
        await rest
        self._away = False
        if self._blocked:
            self._unblock()

    def settle(self, now: int) -> None:
        """The delivery has ended or given up; see `Carrier`."""
        delivery = self._delivery
        if self.done:
            return
        if delivery.overflowed:
            self._cut_off("slow_reader", "slow_reader", now)
        elif delivery.ended:
            end = "failed" if delivery.failed else "finished"
            record = self._exchange.record(status=delivery.status, end=end, now=now, error=delivery.error)
            self._finish((record,), now)

    async def take(self) -> bytes:
        """Wait for the next bytes; b"" once there are no more. Until the next call the reader counts as busy with them."""
        self._away = False
        if self._blocked:
            self._unblock()
        while not self._out and not self.done:
            self._waiter = waiter = self._hall.new_waiter()
            try:
                await waiter
            finally:
                self._waiter = None
        data, self._out = self._out, b""
        self._away = True
        return data

    async def send_all(
        self, send: Send, extra: Iterable[tuple[bytes, bytes]], then: Callable[[], object] | None = None
    ) -> None:
        """Take everything and send it, each message with all that was ready.

        Args:
            send: takes ASGI's messages. Where it raises OSError, which is how ASGI 2.4 says that the client has left, so
                it is.
            extra: headers besides the answer's own.
            then: called at the end.
        """
        new_waiter = self._hall.new_waiter
        try:
            data = await self.take()
            if self.cut or self.head is None:
                return
            await send(start_message(self.head, extra))
            self._direct = send if sends_at_once(send) else None
            while data and not self.done:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                # From here on it is `take`, in place: a coroutine less for each token.
                self._away = False
                if self._blocked:
                    self._unblock()
                while not self._out and not self.done:
                    self._waiter = waiter = new_waiter()
                    await waiter
                    if self._rest is not None:
                        await self._end_sending(self._rest)
                data = self._out
                self._out = b""
                self._away = True
            if not self.cut:
                # The end may have come while the head was being sent; what came with it has not been taken yet.
                await send({"type": "http.response.body", "body": data + self._out, "more_body": False})
        except OSError:
            self.leave()
        finally:
            self._waiter = self._direct = None
            if then is not None:
                then()

    def leave(self, by: str = "client") -> None:
        """The reader has gone: stop the backend. Idempotent; nothing where the answer has ended."""
        if not self.done:
            self._cut_off("cancelled", by, self._hall.now())

    def handle_deadline(self) -> None:
        """Act on a deadline that has passed: a heartbeat, or giving the reader up."""
        now = self._hall.now()
        data = self._delivery.handle_deadline(now)
        if data:
            self.write(data)
        self.settle(now)
        self._deadline.expect(self._delivery.next_deadline(), now)

    def _block(self) -> None:
        """More has come while the reader is away with the last."""
        now = self._hall.now()
        self._blocked = True
        self._delivery.set_blocked(True, now)
        self._hall.dispatcher.perform((Pause(self._line),), self, now)
        self._deadline.expect(self._delivery.next_deadline(), now)

    def _unblock(self) -> None:
        now = self._hall.now()
        self._blocked = False
        self._out += self._delivery.set_blocked(False, now)
        self.settle(now)
        if not self.done:
            self._hall.dispatcher.perform((Resume(self._line),), self, now)
            self._deadline.expect(self._delivery.next_deadline(), now)

    def _cut_off(self, end: str, by: str, now: int) -> None:
        self.cut = True
        self._out = b""
        record = self._exchange.record(status=self._delivery.status, end=end, now=now)
        self._finish((Cancel(self._line, by), record), now)
        if self._on_cut is not None:
            self._on_cut()

    def _finish(self, actions: tuple[Cancel | Record, ...], now: int) -> None:
        self.done = True
        self._deadline.cancel()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        self._hall.dispatcher.perform(actions, self, now)


async def serve(hall: Hall, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request of HTTP.

    Args:
        hall: the application.
        scope: the request's scope, of type http.
        receive: gives the request's messages; called by one task at a time.
        send: takes the answer's messages.
    """
    now = hall.now()
    body = _Body(receive)
    head = head_of(scope)
    if may_have_unannounced_body(scope, head):
        head = RequestHead(head.method, head.path, head.query, head.headers, await body.begins())
    outcome = hall.service.open(head, _ANYBODY, now)
    framing = BareFraming(head.method)
    if isinstance(outcome, Conversation):
        # An upgrade that came as a request of HTTP: no ASGI server that knows WebSocket hands it on as one.
        outcome = hall.service.no_upgrade(head)
    if isinstance(outcome, Reply):
        end = "answered" if outcome.status < 400 else "refused"
        record = Record(method=head.method, path=head.path, status=outcome.status, end=end, error=outcome.error)
        hall.dispatcher.perform((record,), NOBODY, now)
        await send_reply(outcome, framing, send, closing(outcome, scope))
        return
    exchange = outcome
    action = await _take_body(hall, exchange, body, framing)
    if isinstance(action, Reply):
        status, error = action.status, action.error
        record = exchange.record(status=status, end="refused", now=hall.now(), error=error)
        hall.dispatcher.perform((record,), NOBODY, now)
        await send_reply(action, framing, send, closing(action, scope))
    elif action is not None:
        await answer(Answer(hall, exchange, framing), action, receive, send)
    else:
        await _answer_nobody(send)


async def _take_body(hall: Hall, exchange: Exchange, body: _Body, framing: BareFraming) -> Reply | Start | Wait | None:
    """Read the body; None where the client left before its end."""
    while True:
        piece = await body.read()
        if piece is None:
            record = exchange.record(status=0, end="disconnected", now=hall.now())
            hall.dispatcher.perform((record,), NOBODY, hall.now())
            return None
        refusal = exchange.receive_data(piece)
        if refusal is not None:
            return refusal
        if body.whole:
            return exchange.receive_eof(framing, hall.now())


async def answer(
    answer: Answer, action: Start | Wait, receive: Receive, send: Send, extra: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Generate, and send what comes of it; the client's leaving, or a cancellation, stops the backend.

    Args:
        answer: not yet started.
        action: what the exchange said.
        receive: whose body is read; only the client's leaving is awaited from it.
        send: takes the answer's messages.
        extra: headers besides the answer's own.
    """
    try:
        async with anyio.create_task_group() as tasks:
            answer.start(action, tasks.cancel_scope.cancel)
            if answer.done:
                await answer.send_all(send, extra)
                return
            # In a task of its own, so that a token wakes two coroutines and not all that lie around this one.
            tasks.start_soon(answer.send_all, send, extra, tasks.cancel_scope.cancel)
            while (await receive())["type"] != "http.disconnect":
                pass
            answer.leave()
            tasks.cancel_scope.cancel()
    finally:
        answer.leave()
    if answer.head is None:
        await _answer_nobody(send)


async def _answer_nobody(send: Send) -> None:
    """End a request whose client left before there was a head: middlewares and logs want one all the same."""
    with suppress(OSError):
        await send({"type": "http.response.start", "status": _CLIENT_LEFT, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Body:
    """A request's body as it comes.

    Attributes:
        whole: its last piece has been received.
    """

    __slots__ = ("_first", "_receive", "whole")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._first: Message | None = None
        self.whole = False

    async def begins(self) -> bool:
        """Say whether there is a body at all, which in HTTP/2 nothing but its first message may tell."""
        self._first = first = await self._receive()
        return bool(first.get("body") or first.get("more_body"))

    async def read(self) -> bytes | None:
        """Give the next piece; None where the client has left."""
        message, self._first = self._first or await self._receive(), None
        if message["type"] == "http.disconnect":
            return None
        self.whole = not message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body


class _Nobody:
    """The carrier of an answer that has no line."""

    def write(self, data: bytes) -> None:
        """There is nothing to write."""

    def settle(self, now: int) -> None:
        """There is nothing to settle."""


NOBODY: Final = _Nobody()
"""One for all answers."""
