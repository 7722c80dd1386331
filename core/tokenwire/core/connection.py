"""One peer on HTTP/1.1: bytes in, actions out; bytes out; the next deadline.

    WAITING --head--> RECEIVING --body whole--> ANSWERING --answered--> WAITING
       |                  |                         |
       +------------------+----- refused, EOF ------+--> CLOSING --> CLOSED

WAITING is between requests, a partial head included. CLOSING means that our side has said its last word and the peer's
bytes are dropped until it ends too, or a deadline passes (RFC 9112, 9.6: closing at once could reset the connection
before the peer has read the answer).

The connection never blocks and never raises for the peer's fault. Tokens do not pass through it: a delivery's bytes go
straight to the carrier, and `settle` tells the connection when that delivery has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Final

from msgspec import Struct

from .actions import Abort, Action, Cancel, Close, Pause, Record, Resume
from .contracts import Principal, Reply
from .errors import LocalProtocolError, RemoteProtocolError
from .http import BodyReceived, HeadReceived, HttpEvent, RequestReader, ResponseWriter
from .service import Exchange, Service

__all__ = ["Connection", "ConnectionOptions", "Phase"]

_SECOND: Final = 1_000_000_000

_DRAINED_BODY: Final = 64 * 1024
"""A refused request's body that is read and dropped, so that the connection can go on; a longer one ends it."""


class ConnectionOptions(Struct, frozen=True, kw_only=True):
    """How patient a connection is. All deadlines are absolute: a peer cannot move them byte by byte."""

    head_ns: int = 10 * _SECOND
    """From a head's first byte to its end."""
    body_ns: int = 60 * _SECOND
    """From a head's end to its body's end."""
    idle_ns: int = 75 * _SECOND
    """Between requests; longer than the usual client pool keeps a connection, so that the client closes first."""
    linger_ns: int = 2 * _SECOND
    """How long the peer may take to end after we have."""
    stall_ns: int = 60 * _SECOND
    """How long the peer may take nothing of what we have said last."""


class Phase(Enum):
    """Where the connection is; see the module's drawing."""

    WAITING = "waiting"
    RECEIVING = "receiving"
    ANSWERING = "answering"
    CLOSING = "closing"
    CLOSED = "closed"


class Connection:
    """One peer.

    Args:
        service: the application.
        principal: who the peer is.
        now: when it connected.
        options: how patient to be.

    Attributes:
        phase: where it is.
    """

    __slots__ = (
        "_blocked",
        "_exchange",
        "_options",
        "_out",
        "_principal",
        "_reader",
        "_service",
        "_since_ns",
        "_unread_reply",
        "_writer",
        "phase",
    )

    def __init__(
        self, service: Service, principal: Principal, now: int, options: ConnectionOptions | None = None
    ) -> None:
        self.phase = Phase.WAITING
        self._service = service
        self._principal = principal
        self._options = options or ConnectionOptions()
        self._reader = RequestReader()
        self._writer = ResponseWriter()
        self._exchange: Exchange | None = None
        self._unread_reply: tuple[Reply, Record] | None = None
        self._out: list[bytes] = []
        self._since_ns = now
        self._blocked = False

    # -- what the carrier calls --------------------------------------------------------------------------------------

    def receive_data(self, data: bytes, now: int) -> list[Action]:
        """Take bytes from the peer.

        Returns:
            What is to be done, in order. `data_to_send` may have something after it.
        """
        if self.phase in (Phase.CLOSING, Phase.CLOSED) or not data:
            return []
        begins = self.phase is Phase.WAITING and not self._reader.mid_request
        actions = self._advance(partial(self._reader.receive_data, data), now)
        if begins and self.phase is Phase.WAITING and self._reader.mid_request:
            self._since_ns = now
        if self._reader.overflowed and self.phase is Phase.WAITING:
            # Between two answers, while the peer takes nothing: what was dropped may end in the middle of a request.
            actions += self._close(now)
        return actions

    def receive_eof(self, now: int) -> list[Action]:
        """Learn that the peer sends no more. A half-close counts as disconnect: its stream is cancelled.

        Idempotent.
        """
        if self.phase in (Phase.CLOSING, Phase.CLOSED):
            return []
        if self.phase is Phase.ANSWERING:
            return self._drop("cancelled", "client", now)
        if self._reader.mid_request:
            return self._refuse_unread(RemoteProtocolError("the request was cut off before its end"), now)
        return self._close(now)

    def lost(self, now: int) -> list[Action]:
        """Learn that the transport is gone: nothing can be sent any more. Idempotent."""
        if self.phase is Phase.ANSWERING:
            return self._drop("cancelled", "client", now)
        self.phase = Phase.CLOSED
        self._out.clear()
        return []

    def data_to_send(self) -> list[bytes]:
        """Hand over what is to be written, in order, and forget it."""
        out, self._out = self._out, []
        return out

    def set_blocked(self, blocked: bool, now: int) -> list[Action]:
        """Learn that the transport takes no more bytes, or takes them again.

        The carrier says True once more whenever some of what waits was taken, so that a slow peer is told from a dead one.
        """
        again = blocked and self._blocked
        self._blocked = blocked
        if self.phase in (Phase.WAITING, Phase.CLOSING):
            self._since_ns = now
        line = self._exchange.line if self._exchange else None
        if line is None:
            return self._go_on(now)
        data = line.delivery.set_blocked(blocked, now)
        if data:
            self._out.append(data)
        if line.delivery.ended and not blocked:
            return self.settle(now)
        if again:
            return []
        return [Pause(line) if blocked else Resume(line)]

    def settle(self, now: int) -> list[Action]:
        """Look at the delivery that runs: go on where it has ended, give the peer up where it overflowed.

        The carrier calls it when the dispatcher says so.
        """
        exchange = self._exchange
        if exchange is None or exchange.delivery is None:
            return []
        delivery = exchange.delivery
        if delivery.overflowed:
            return self._drop("slow_reader", "slow_reader", now)
        if not delivery.ended:
            return []
        end = "failed" if delivery.failed else "finished"
        record = exchange.record(status=delivery.status, end=end, now=now, error=delivery.error)
        if delivery.failed and delivery.status == 200:
            # The error event stands in a body that began as a success: let no later answer follow it.
            self._writer.keep_alive = False
        self._exchange = None
        return [record, *self._after_answer(now), *self._go_on(now)]

    def next_deadline(self) -> int | None:
        """Say when `handle_deadline` is due; None for never. It may move later without notice."""
        if self.phase is Phase.CLOSED:
            return None
        if self.phase is Phase.ANSWERING:
            delivery = self._exchange.delivery if self._exchange else None
            return delivery.next_deadline() if delivery else None
        return self._since_ns + self._patience()

    def handle_deadline(self, now: int) -> list[Action]:
        """Act on a deadline that has passed; nothing where none has."""
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        if self.phase is Phase.ANSWERING:
            return self._handle_delivery_deadline(now)
        if self.phase is Phase.CLOSING:
            self.phase = Phase.CLOSED
            return [Abort()]
        if self._reader.mid_request or self.phase is Phase.RECEIVING:
            return self._refuse_unread(RemoteProtocolError("the request took too long", status=408), now)
        return self._close(now)

    def drain(self, now: int) -> list[Action]:
        """The server is going down: close if idle; else the answer that runs is the last."""
        if self.phase is Phase.WAITING and not self._reader.mid_request:
            return self._close(now)
        return []

    # -- reading -----------------------------------------------------------------------------------------------------

    def _patience(self) -> int:
        if self.phase is Phase.CLOSING:
            return self._options.stall_ns if self._blocked else self._options.linger_ns
        if self.phase is Phase.RECEIVING:
            return self._options.body_ns
        return self._options.head_ns if self._reader.mid_request else self._options.idle_ns

    def _advance(self, feed: Callable[[], list[HttpEvent]], now: int) -> list[Action]:
        """Read requests and begin to answer them, as long as no answer runs and the peer takes what we send."""
        actions: list[Action] = []
        try:
            events = deque(feed())
            while events and self.phase not in (Phase.CLOSING, Phase.CLOSED):
                actions += self._handle(events.popleft(), now)
                if not events:
                    self._reader.check()
                    if self._may_go_on():
                        events.extend(self._next_request(now))
        except RemoteProtocolError as error:
            actions += self._refuse_unread(error, now)
        return actions

    def _go_on(self, now: int) -> list[Action]:
        """Read the next request where that may be."""
        if self._reader.overflowed and self._may_go_on():
            return self._close(now)
        return self._advance(partial(self._next_request, now), now) if self._may_go_on() else []

    def _may_go_on(self) -> bool:
        """Whether the next request may be read: the last is answered, and the peer reads its answers."""
        return self.phase is Phase.WAITING and not self._blocked and self._reader.holding

    def _next_request(self, now: int) -> list[HttpEvent]:
        self._since_ns = now
        return self._reader.next_request()

    def _handle(self, event: HttpEvent, now: int) -> list[Action]:
        if isinstance(event, HeadReceived):
            return self._on_head(event, now)
        if isinstance(event, BodyReceived):
            return self._on_body(event.data, now)
        return self._on_body_end(now)

    def _on_head(self, event: HeadReceived, now: int) -> list[Action]:
        head = event.head
        self.phase = Phase.RECEIVING
        self._since_ns = now
        self._writer = ResponseWriter(method=head.method, version=event.version, keep_alive=event.keep_alive)
        outcome = self._service.open(head, self._principal, now)
        if isinstance(outcome, Exchange):
            self._exchange = outcome
            if event.expects_continue:
                self._out.append(b"HTTP/1.1 100 Continue\r\n\r\n")
            return []
        record = _record(event, outcome)
        unread = head.has_body and (
            event.expects_continue or (head.content_length or _DRAINED_BODY + 1) > _DRAINED_BODY
        )
        if outcome.close or unread:
            self._writer.keep_alive = False
            return self._answer(outcome, record, now)
        self._unread_reply = (outcome, record)
        return []

    def _on_body(self, data: bytes, now: int) -> list[Action]:
        exchange = self._exchange
        refusal = exchange.receive_data(data) if exchange else None
        if exchange is None or refusal is None:
            return []
        record = exchange.record(status=refusal.status, end="refused", now=now, error=refusal.error)
        return self._answer(refusal, record, now)

    def _on_body_end(self, now: int) -> list[Action]:
        if self._unread_reply is not None:
            reply, record = self._unread_reply
            self._unread_reply = None
            return self._answer(reply, record, now)
        exchange = self._exchange
        if exchange is None:
            raise LocalProtocolError("a body without an exchange")
        outcome = exchange.receive_eof(self._writer, now)
        if isinstance(outcome, Reply):
            record = exchange.record(status=outcome.status, end="refused", now=now, error=outcome.error)
            return self._answer(outcome, record, now)
        self.phase = Phase.ANSWERING
        line = outcome.stream
        greeting = line.delivery.begin(now)
        if greeting:
            self._out.append(greeting)
        if not self._blocked:
            return [outcome]
        line.delivery.set_blocked(True, now)
        return [outcome, Pause(line)]

    # -- answering ---------------------------------------------------------------------------------------------------

    def _answer(self, reply: Reply, record: Record, now: int) -> list[Action]:
        if self._service.draining:
            self._writer.keep_alive = False
        self._out.append(self._writer.reply(reply))
        self._exchange = None
        return [record, *self._after_answer(now)]

    def _after_answer(self, now: int) -> list[Action]:
        if not self._writer.keep_alive or self._reader.overflowed or self._service.draining:
            return self._close(now)
        self.phase = Phase.WAITING
        self._since_ns = now
        self._writer = ResponseWriter()
        return []

    def _handle_delivery_deadline(self, now: int) -> list[Action]:
        delivery = self._exchange.delivery if self._exchange else None
        if delivery is None:
            return []
        data = delivery.handle_deadline(now)
        if data:
            self._out.append(data)
        return self.settle(now)

    # -- ending ------------------------------------------------------------------------------------------------------

    def _refuse_unread(self, error: RemoteProtocolError, now: int) -> list[Action]:
        """Answer what could not be read as a request, and end."""
        self._writer.keep_alive = False
        if self._unread_reply is not None:
            # Its head has decided already what it is answered; only the rest of its body is missing or broken.
            return self._answer(*self._unread_reply, now)
        exchange, self._exchange = self._exchange, None
        reply = self._service.refuse_unread(str(error), error.status, exchange.dialect if exchange else None)
        self._out.append(self._writer.reply(reply))
        if exchange is not None:
            record = exchange.record(status=error.status, end="refused", now=now, error=str(error))
        else:
            record = Record(method="-", path="-", status=error.status, end="refused", error=str(error))
        return [record, *self._close(now)]

    def _drop(self, end: str, by: str, now: int) -> list[Action]:
        """Give the running answer up, with the connection."""
        exchange, self._exchange = self._exchange, None
        self.phase = Phase.CLOSED
        self._out.clear()
        self._reader.close()
        if exchange is None or exchange.line is None:
            return [Abort()]
        line = exchange.line
        record = exchange.record(status=line.delivery.status, end=end, now=now)
        return [Cancel(line, by), record, Abort()]

    def _close(self, now: int) -> list[Action]:
        self.phase = Phase.CLOSING
        self._since_ns = now
        self._reader.close()
        return [Close()]


def _record(event: HeadReceived, reply: Reply) -> Record:
    end = "answered" if reply.status < 400 else "refused"
    return Record(method=event.head.method, path=event.head.path, status=reply.status, end=end, error=reply.error)
