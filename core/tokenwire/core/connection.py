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

from enum import Enum
from typing import Final

from msgspec import Struct

from .actions import Abort, Action, Cancel, Close, Pause, Record, Resume, Start, Upgrade, Wait
from .contracts import Principal, Reply
from .conversation import SUBPROTOCOLS, Conversation
from .errors import LocalProtocolError, RemoteProtocolError
from .events import ErrorKind, StreamError
from .http import BodyReceived, HeadReceived, HttpEvent, RequestReader, ResponseWriter
from .peers import PeerShare
from .routes import dialect_of
from .service import Exchange, Service
from .upgraded import FRAMING, UpgradedConnection
from .websocket import Accepted, UpgradeRefused, accept_upgrade

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
    body_grace_ns: int = 20 * _SECOND
    """From a head's end: how long a body may take at any rate."""
    body_bytes_per_s: int = 500
    """What a body must have come at, on the average, once its grace is over; 0 for any rate. The slowest mobile links do
    2,000, and whoever sends a byte now and then to hold a place does a few."""
    max_requests: int = 1_000_000
    """Requests of one connection. It keeps nothing of those answered, so that this is no protection; it lets the clients
    of a service that has grown spread over its servers in the end."""
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


_WAITING: Final = Phase.WAITING
_OVER: Final = (Phase.CLOSING, Phase.CLOSED)


class Connection:
    """One peer.

    Args:
        service: the application.
        principal: who the peer is.
        now: when it connected.
        options: how patient to be.
        share: what the peer's address has, where that is counted; its streams are counted here.

    Attributes:
        phase: where it is.
    """

    __slots__ = (
        "_blocked",
        "_body_bytes",
        "_exchange",
        "_options",
        "_out",
        "_principal",
        "_reader",
        "_requests",
        "_service",
        "_share",
        "_since_ns",
        "_unread_reply",
        "_upgrade",
        "_writer",
        "phase",
    )

    def __init__(
        self,
        service: Service,
        principal: Principal,
        now: int,
        options: ConnectionOptions | None = None,
        share: PeerShare | None = None,
    ) -> None:
        self.phase = Phase.WAITING
        self._service = service
        self._principal = principal
        self._options = options or ConnectionOptions()
        self._share = share
        self._requests = 0
        self._body_bytes = 0
        self._reader = RequestReader()
        self._writer = ResponseWriter()
        self._exchange: Exchange | None = None
        self._unread_reply: tuple[Reply, Record] | None = None
        self._upgrade: tuple[Conversation, Accepted] | None = None
        self._out: list[bytes] = []
        self._since_ns = now
        self._blocked = False

    # -- what the carrier calls --------------------------------------------------------------------------------------

    def receive_data(self, data: bytes, now: int) -> list[Action]:
        """Take bytes from the peer.

        Returns:
            What is to be done, in order. `data_to_send` may have something after it.
        """
        if not data or self.phase in _OVER:
            return []
        reader = self._reader
        begins = self.phase is _WAITING and not reader.mid_request
        try:
            events = reader.receive_data(data)
        except RemoteProtocolError as error:
            actions = self._refuse_unread(error, now)
        else:
            actions = self._advance(events, now) if events else []
        if self.phase is _WAITING:
            if begins and reader.mid_request:
                self._since_ns = now
            if reader.overflowed:
                # Between two answers, while the peer takes nothing: what was dropped may end in the middle of a request.
                actions += self._close(now)
        return actions

    def receive_eof(self, now: int) -> list[Action]:
        """Learn that the peer sends no more. A half-close counts as disconnect: its stream is cancelled.

        Idempotent.
        """
        if self.phase in _OVER:
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
        if exchange is None or exchange.line is None:
            return []
        delivery = exchange.line.delivery
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
        if self._share is not None:
            self._share.end_stream()
        return [record, *self._after_answer(now), *self._go_on(now)]

    def next_deadline(self) -> int | None:
        """Say when `handle_deadline` is due; None for never. It may move later without notice."""
        if self.phase is Phase.ANSWERING:
            line = self._exchange.line if self._exchange else None
            return line.delivery.next_deadline() if line else None
        return None if self.phase is Phase.CLOSED else self._since_ns + self._patience()

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
            return self._refuse_unread(RemoteProtocolError(self._why_too_slow(now), status=408), now)
        return self._close(now)

    def drain(self, now: int) -> list[Action]:
        """The server is going down: close if idle; else the answer that runs is the last."""
        if self.phase is Phase.WAITING and not self._reader.mid_request:
            return self._close(now)
        return []

    # -- reading -----------------------------------------------------------------------------------------------------

    def _patience(self) -> int:
        if self.phase is _WAITING:
            return self._options.head_ns if self._reader.mid_request else self._options.idle_ns
        if self.phase is Phase.CLOSING:
            return self._options.stall_ns if self._blocked else self._options.linger_ns
        return min(self._options.body_ns, self._body_allowance())

    def _body_allowance(self) -> int:
        """How long the body may have taken by what has come of it: each byte buys time."""
        options = self._options
        if not options.body_bytes_per_s:
            return options.body_ns
        return max(options.body_grace_ns, self._body_bytes * _SECOND // options.body_bytes_per_s)

    def _why_too_slow(self, now: int) -> str:
        if self.phase is Phase.RECEIVING and now - self._since_ns < self._options.body_ns:
            return f"the body came at less than {self._options.body_bytes_per_s} bytes a second"
        return "the request took too long"

    def _advance(self, events: list[HttpEvent], now: int) -> list[Action]:
        """Read requests and begin to answer them, as long as no answer runs and the peer takes what we send."""
        actions: list[Action] = []
        try:
            while events:
                for event in events:
                    actions += self._handle(event, now)
                    if self.phase in _OVER:
                        return actions
                self._reader.check()
                events = self._next_request(now) if self._may_go_on() else []
        except RemoteProtocolError as error:
            actions += self._refuse_unread(error, now)
        return actions

    def _go_on(self, now: int) -> list[Action]:
        """Read the next request where that may be."""
        if not self._may_go_on():
            return []
        if self._reader.overflowed:
            return self._close(now)
        try:
            events = self._next_request(now)
        except RemoteProtocolError as error:
            return self._refuse_unread(error, now)
        return self._advance(events, now) if events else []

    def _may_go_on(self) -> bool:
        """Whether the next request may be read: the last is answered, and the peer reads its answers."""
        return self.phase is _WAITING and not self._blocked and self._reader.holding

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
        self._body_bytes = 0
        self._requests += 1
        keep_alive = event.keep_alive and self._requests < self._options.max_requests
        self._writer = ResponseWriter(method=head.method, version=event.version, keep_alive=keep_alive)
        outcome = self._service.open(head, self._principal, now)
        if isinstance(outcome, Conversation):
            refusal = self._accept_upgrade(event, outcome)
            if refusal is None:
                return []
            outcome = refusal
        if event.expects_other and (isinstance(outcome, Exchange) or outcome.status < 400):
            outcome = self._expectation_failed(event)
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

    def _expectation_failed(self, event: HeadReceived) -> Reply:
        """Refuse what RFC 9110, 10.1.1 lets a server refuse: the peer may wait for it before it sends the body."""
        message = "The only expectation that is met here is 100-continue."
        error = StreamError(ErrorKind.INVALID_REQUEST, message, "expectation_failed", status=417)
        return self._service.refuse(dialect_of(event.head.path), error, event.head, close=event.head.has_body)

    def _accept_upgrade(self, event: HeadReceived, conversation: Conversation) -> Reply | None:
        """Remember to upgrade once the request is whole, or say why it cannot be."""
        if event.version != "1.1":
            return self._service.no_upgrade(event.head)
        if self._reader.overflowed:  # what came is dropped; a client must wait for the answer (RFC 6455, 4.1)
            early = UpgradeRefused("too much came before the handshake was answered")
            return self._service.refuse_upgrade(event.head, early)
        try:
            self._upgrade = conversation, accept_upgrade(event.head, subprotocols=SUBPROTOCOLS)
        except UpgradeRefused as refused:
            return self._service.refuse_upgrade(event.head, refused)
        return None

    def _begin_upgraded(self, conversation: Conversation, accepted: Accepted, now: int) -> list[Action]:
        """Leave the peer to the machine that speaks WebSocket (RFC 6455, 4.2.2)."""
        self.phase = Phase.CLOSED
        lines = (b"%b: %b\r\n" % (name.encode(), value.encode("latin-1")) for name, value in accepted.headers)
        self._out.append(b"HTTP/1.1 101 Switching Protocols\r\n%b\r\n" % b"".join(lines))
        limit = self._service.options.max_body_bytes
        conversation.open(FRAMING, accepted.subprotocol, self._share)
        stall_ns = self._options.stall_ns
        machine = UpgradedConnection(conversation, now, max_message_bytes=limit, stall_ns=stall_ns)
        record = Record(method="GET", path=conversation.head.path, status=101, end="answered")
        return [record, Upgrade(machine, self._reader.hand_over())]

    def _on_body(self, data: bytes, now: int) -> list[Action]:
        self._body_bytes += len(data)
        exchange = self._exchange
        refusal = exchange.receive_data(data) if exchange else None
        if exchange is None or refusal is None:
            return []
        record = exchange.record(status=refusal.status, end="refused", now=now, error=refusal.error)
        return self._answer(refusal, record, now)

    def _on_body_end(self, now: int) -> list[Action]:
        if self._upgrade is not None:
            return self._begin_upgraded(*self._upgrade, now)
        if self._unread_reply is not None:
            reply, record = self._unread_reply
            self._unread_reply = None
            return self._answer(reply, record, now)
        exchange = self._exchange
        if exchange is None:
            raise LocalProtocolError("a body without an exchange")
        outcome = self._begin_stream(exchange, now)
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

    def _begin_stream(self, exchange: Exchange, now: int) -> Reply | Start | Wait:
        share = self._share
        if share is None:
            return exchange.receive_eof(self._writer, now)
        error = share.begin_stream()
        if error is not None:
            return self._service.refuse(exchange.dialect, error, exchange.head)
        outcome = exchange.receive_eof(self._writer, now)
        if isinstance(outcome, Reply):
            share.end_stream()
        return outcome

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
        self.phase = _WAITING
        self._since_ns = now
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
        if self.phase is _WAITING:
            self._writer = ResponseWriter()
        self._writer.keep_alive = False
        if self._unread_reply is not None:
            # Its head has decided already what it is answered; only the rest of its body is missing or broken.
            return self._answer(*self._unread_reply, now)
        exchange, self._exchange = self._exchange, None
        dialect = exchange.dialect if exchange else dialect_of(self._reader.path)
        reply = self._service.refuse_unread(str(error), error.status, dialect)
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
        if self._share is not None:
            self._share.end_stream()
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
