"""One peer on WebSocket, whatever carries its messages: prompts in, answers out, one after the other.

    IDLE --prompt--> ANSWERING --answered--> IDLE, or the next prompt that waits
      |                  |
      +-- close, leave --+--> CLOSED

A prompt that comes while an answer runs waits for its turn, up to a bound. Flow belongs to the peer and not to an answer:
while it takes nothing, no further prompt is begun. Frames, pings and the closing handshake are the carrier's business.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from ._ws_frames import fit_reason
from .actions import Abort, Action, Cancel, Pause, Record, Resume
from .contracts import Framing, RequestHead
from .dialects.base import failure_of, type_of
from .dialects.plain_messages import SUBPROTOCOL, ObjectMessages, PlainMessages, TextMessages
from .errors import LocalProtocolError, RequestRefused
from .events import ErrorKind, Failure, StreamCancelled, StreamError
from .peers import PeerShare
from .websocket import CloseCode

if TYPE_CHECKING:
    from .line import Line
    from .service import Exchange, Service

__all__ = ["SUBPROTOCOLS", "Closing", "Conversation"]

SUBPROTOCOLS: Final = (SUBPROTOCOL,)
"""What a handshake may agree on; without, messages are the tokens' text."""

_OBJECTS: Final = PlainMessages(ObjectMessages)
_TEXT: Final = PlainMessages(TextMessages)
_ID_PREFIX: Final = "tw"
_SWITCHED: Final = 101
_MAX_CANCEL_BYTES: Final = 64
_SHUTTING_DOWN: Final = "the server is shutting down"


class Closing(NamedTuple):
    """How the conversation wants its WebSocket closed (RFC 6455, 7.4)."""

    code: int
    """The close code."""
    reason: str
    """Why, in at most 123 bytes of UTF-8 (5.5)."""


class Conversation:
    """The prompts and answers of one WebSocket.

    Args:
        service: the application.
        head: the handshake's head; its query's parameters hold for each prompt that does not say otherwise.

    Attributes:
        head: as given.
        closing: how the WebSocket is to be closed once `data_to_send` has been sent; None while it stays open. It takes
            no more prompts then.
    """

    __slots__ = (
        "_blocked",
        "_cancelled",
        "_dialect",
        "_exchange",
        "_framing",
        "_out",
        "_service",
        "_share",
        "_waiting",
        "_waiting_bytes",
        "closing",
        "head",
    )

    def __init__(self, service: Service, head: RequestHead) -> None:
        self.closing: Closing | None = None
        self._service = service
        self.head = head
        self._dialect = _TEXT
        self._framing: Framing | None = None
        self._share: PeerShare | None = None
        self._exchange: Exchange | None = None
        self._waiting: deque[bytes] | None = None  # an idle connection is none the bigger for it
        self._waiting_bytes = 0
        self._out: list[bytes] = []
        self._blocked = False
        self._cancelled = False

    def open(self, framing: Framing, subprotocol: str | None, share: PeerShare | None = None) -> None:
        """Learn that the handshake is done.

        Args:
            framing: how messages become bytes for the carrier.
            subprotocol: what was agreed on, of SUBPROTOCOLS; None for none.
            share: what the peer's address has, where that is counted.
        """
        self._framing = framing
        self._share = share
        self._dialect = _TEXT if subprotocol is None else _OBJECTS

    def receive_text(self, text: str, now: int) -> list[Action]:
        """Take a text message: a prompt, or the word to cancel."""
        if self.closing is not None:
            return []
        message = text.encode(errors="replace")
        if len(message) > self._service.options.max_body_bytes:
            return self._end(CloseCode.MESSAGE_TOO_BIG, "the message is longer than this server reads", now)
        if self._dialect is _OBJECTS and _is_cancel(message):
            return self._cancel(now)
        if self._exchange is None and not self._blocked:
            return self._ask(message, now)
        return self._put_off(message, now)

    def receive_binary(self, now: int) -> list[Action]:
        """Take a binary message: there is no meaning for it, and the WebSocket is closed."""
        return self._end(CloseCode.UNSUPPORTED_DATA, "prompts are text messages", now) if self.closing is None else []

    def leave(self, now: int) -> list[Action]:
        """Learn that the peer has gone, or closes: what runs for it is cancelled. Idempotent."""
        self._waiting = None
        self.closing = self.closing or Closing(CloseCode.GOING_AWAY, "")
        return self._drop("cancelled", "client", now)

    def drain(self, now: int) -> list[Action]:
        """The server is going down: close if idle; else the answer that runs is the last."""
        return [] if self._exchange or self.closing else self._end(CloseCode.GOING_AWAY, _SHUTTING_DOWN, now)

    def data_to_send(self) -> list[bytes]:
        """Hand over what is to be written, in order, and forget it."""
        out, self._out = self._out, []
        return out

    def set_blocked(self, blocked: bool, now: int) -> list[Action]:
        """Learn that the transport takes no more, or takes again; said again, that it has taken some."""
        again = blocked and self._blocked
        self._blocked = blocked
        line = self._line
        if line is None:
            return [] if blocked else self._next(now)
        self._say(line.delivery.set_blocked(blocked, now))
        if line.delivery.ended and not blocked:
            return self.settle(now)
        if again:
            return []
        return [Pause(line) if blocked else Resume(line)]

    def settle(self, now: int) -> list[Action]:
        """Look at the answer that runs: go on where it has ended, give the peer up where it overflowed."""
        exchange, line = self._exchange, self._line
        if exchange is None or line is None:
            return []
        delivery = line.delivery
        if delivery.overflowed:
            self._waiting = None
            self.closing = Closing(CloseCode.POLICY_VIOLATION, "the peer takes nothing")
            return [*self._drop("slow_reader", "slow_reader", now), Abort()]
        if not delivery.ended:
            return []
        end = "cancelled" if self._cancelled else "failed" if delivery.failed else "finished"
        record = exchange.record(status=_SWITCHED, end=end, now=now, error=delivery.error)
        self._exchange = None
        self._end_share()
        terminal = line.stream.terminal
        if self._dialect is _TEXT and isinstance(terminal, Failure):
            self._fail(failure_of(terminal))
        return [record, *self._next(now)]

    def next_deadline(self) -> int | None:
        """Say when `handle_deadline` is due: when a peer that takes nothing is given up."""
        line = self._line
        return line.delivery.next_deadline() if line else None

    def handle_deadline(self, now: int) -> list[Action]:
        """Act on a deadline that has passed; nothing where none has."""
        line = self._line
        if line is None:
            return []
        self._say(line.delivery.handle_deadline(now))
        return self.settle(now)

    @property
    def _line(self) -> Line | None:
        return self._exchange.line if self._exchange else None

    def _ask(self, message: bytes, now: int) -> list[Action]:
        """Begin to answer a prompt; a refusal is its whole answer."""
        if self._framing is None:
            raise LocalProtocolError("a message before the handshake's end")
        exchange = self._service.prompt(self._dialect, self.head, now)
        error = self._share.begin_stream() if self._share else None
        if error is not None:
            return [self._refuse(exchange, error, now)]
        try:
            outcome = self._service.begin(exchange, message, _ID_PREFIX, self._framing, now)
        except RequestRefused as refused:
            self._end_share()
            return [self._refuse(exchange, refused.error, now)]
        self._exchange = exchange
        self._cancelled = False
        self._say(outcome.stream.delivery.begin(now))
        return [outcome]

    def _put_off(self, message: bytes, now: int) -> list[Action]:
        """Keep a prompt until its turn comes."""
        options = self._service.options
        if self._waiting is None:
            self._waiting, self._waiting_bytes = deque(), 0
        self._waiting_bytes += len(message)
        if len(self._waiting) >= options.max_prompts or self._waiting_bytes > options.max_body_bytes:
            return self._end(CloseCode.TRY_AGAIN_LATER, "too many prompts wait for their turn", now)
        self._waiting.append(message)
        return []

    def _end_share(self) -> None:
        if self._share is not None:
            self._share.end_stream()

    def _refuse(self, exchange: Exchange, error: StreamError, now: int) -> Record:
        """Answer a prompt that cannot be served with its error alone."""
        if self._dialect is _TEXT:
            self._fail(error)
        elif self._framing is not None:
            self._say(self._framing.frame(ObjectMessages("refused").encode(error, 0)))
        return exchange.record(status=_SWITCHED, end="refused", now=now, error=error.message)

    def _next(self, now: int) -> list[Action]:
        """Begin the prompts that wait, as far as that may be."""
        actions: list[Action] = []
        if self._service.draining and self.closing is None:
            return self._end(CloseCode.GOING_AWAY, _SHUTTING_DOWN, now)
        while self._waiting and self._exchange is None and self.closing is None and not self._blocked:
            message = self._waiting.popleft()
            self._waiting_bytes -= len(message)
            actions += self._ask(message, now)
        return actions

    def _cancel(self, now: int) -> list[Action]:
        """Stop the answer that runs, and say so; the prompts that wait go on."""
        exchange, line = self._exchange, self._line
        if exchange is None or line is None or line.stream.terminal is not None:
            return []  # there is no answer to stop, or only the last of it to be written yet
        self._cancelled = True
        self._say(line.delivery.deliver((StreamCancelled("client"),), now))
        return [Cancel(line, "client"), *self.settle(now)]

    def _drop(self, end: str, by: str, now: int) -> list[Action]:
        """Give up the answer that runs, because nobody can or will read it."""
        exchange, line = self._exchange, self._line
        self._exchange = None
        if exchange is None or line is None:
            return []
        self._end_share()
        return [Cancel(line, by), exchange.record(status=_SWITCHED, end=end, now=now)]

    def _end(self, code: int, reason: str, now: int) -> list[Action]:
        """Have the WebSocket closed; what still runs is cancelled."""
        self._waiting = None
        self.closing = Closing(code, reason)
        return self._drop("cancelled", "client", now)

    def _fail(self, error: StreamError) -> None:
        """Have the WebSocket closed because of an error that its messages have no words for."""
        self._waiting = None
        reason = fit_reason(f"{type_of(error)}: {error.message}").decode()
        goes_down = self._service.draining and error.kind is ErrorKind.UNAVAILABLE
        self.closing = Closing(CloseCode.GOING_AWAY if goes_down else CloseCode.INTERNAL_ERROR, reason)

    def _say(self, data: bytes) -> None:
        if data:
            self._out.append(data)


def _is_cancel(message: bytes) -> bool:
    """Whether a message is the word to stop the running answer."""
    if b"cancel" not in message or len(message) > _MAX_CANCEL_BYTES:
        return False
    try:
        said = msgspec.json.decode(message, type=dict[str, bool])  # the type, because 1 == True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return said == {"cancel": True}
