"""One stream to one reader: events in, wire bytes out.

What is decided here: when the answer's head leaves (it is held until the first token, the first error or the first due
heartbeat, because until then an error can still be an HTTP status that clients retry), what is merged (only what waits
at the moment of a write; the first token alone), when a heartbeat is due, and when a slow reader is given up. A delivery
also tells the stream's trace, where there is one, what has arrived and when the first byte left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, cast

from msgspec import Struct

from .collect import Collector, Result
from .contracts import Encoder, Folded, Framing, Reply, ResponseHead
from .events import (
    TERMINALS,
    Event,
    Failure,
    ReasoningDelta,
    RefusalDelta,
    StreamEnd,
    StreamStart,
    Terminal,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from .gaps import RUN
from .latency import Trace
from .ledger import counted
from .merge import MergeBuffer, may_merge

__all__ = ["Delivery", "DeliveryOptions", "ResultDelivery", "StreamDelivery"]

_SECOND: Final = 1_000_000_000

_TOKENS: Final[frozenset[type]] = frozenset({TextDelta, ReasoningDelta, RefusalDelta, ToolCallStart, ToolCallDelta})
"""What a reader sees as output; a role chunk, a heartbeat or usage is no token."""

_TERMINALS: Final[frozenset[type]] = frozenset(TERMINALS)

_HELD_WITH_HEAD: Final[frozenset[type]] = frozenset({StreamStart, UsageReport})
"""What may wait for the first token together with the head."""


class DeliveryOptions(Struct, frozen=True, kw_only=True):
    """How patient a delivery is."""

    heartbeat_ns: int = 15 * _SECOND
    """Silence after which a heartbeat leaves: a quarter of the shortest usual proxy timeout (nginx, 60 s)."""
    budget_bytes: int = 256 * 1024
    """UTF-8 bytes of text that may wait for a slow reader: about 50,000 tokens beyond what the kernel holds."""
    stall_ns: int = 60 * _SECOND
    """How long a reader may take nothing at all before it is given up."""
    merge: bool = True
    """Whether events that wait may be merged into fewer."""


class Delivery(ABC):
    """A stream's way to one reader, as dispatcher and connection see it.

    Attributes:
        blocked: the transport takes no more for now.
        ended: the terminal has been written; nothing follows.
        failed: the answer ended with an error.
        overflowed: the reader was too slow; the connection must be dropped without a clean end.
        status: the HTTP status that was sent, 0 before the head has left.
        first_ns: when the first token arrived here, or None.
        sent_bytes: bytes handed out so far.
        error: the message of the failure, or None.
        trace: where latencies are counted; None where they are not.
    """

    __slots__ = ("blocked", "ended", "error", "failed", "first_ns", "overflowed", "sent_bytes", "status", "trace")

    def __init__(self) -> None:
        self.blocked = False
        self.ended = False
        self.failed = False
        self.overflowed = False
        self.status = 0
        self.first_ns: int | None = None
        self.sent_bytes: int = 0
        self.error: str | None = None
        self.trace: Trace | None = None

    def _end(self, terminal: Terminal) -> None:
        self.ended = True
        self.failed = type(terminal) is not StreamEnd
        self.error = _words(terminal) if self.failed else None

    @abstractmethod
    def begin(self, now: int) -> bytes:
        """Return what is to be written before the backend starts: nothing, unless the client was promised a greeting.

        The carrier calls it once, before it performs Start or Wait.
        """

    @abstractmethod
    def deliver(self, events: Sequence[Event], now: int) -> bytes:
        """Take the stream's next events, return what is to be written now; b"" where all of it waits."""

    @abstractmethod
    def set_blocked(self, blocked: bool, now: int) -> bytes:
        """Learn that the transport takes no more, or takes again; return what has waited.

        Told again that it is blocked, it takes that for a sign of life: some of the bytes were taken.
        """

    @abstractmethod
    def next_deadline(self) -> int | None:
        """Say when `handle_deadline` is due. It may move later without notice."""

    @abstractmethod
    def handle_deadline(self, now: int) -> bytes:
        """Act on a deadline that has passed: a heartbeat, or giving the reader up; nothing where none has."""


class StreamDelivery(Delivery):
    """The events as a stream in the reader's dialect.

    Args:
        encoder: the dialect's, fresh.
        framing: the carrier's for this one answer.
        head: the answer's head, held.
        refuse: words a failure that comes while the head is held.
        options: how patient to be.
        now: when it begins, for the first heartbeat.
        greets: do not hold the head but greet the client at once. For one that would ask again by itself if the
            connection dropped before it has an event's id, and so run the prompt twice. Failures are events then.
    """

    __slots__ = (
        "_blocked_ns",
        "_encoder",
        "_framing",
        "_greets",
        "_head",
        "_held",
        "_last_ns",
        "_number",
        "_opened",
        "_options",
        "_pending",
        "_refuse",
        "_template",
        "_text",
        "_waiting_ns",
    )

    def __init__(
        self,
        encoder: Encoder,
        framing: Framing,
        head: ResponseHead,
        refuse: Callable[[Failure], Reply],
        options: DeliveryOptions,
        now: int,
        *,
        greets: bool = False,
    ) -> None:
        super().__init__()
        self._encoder = encoder
        self._framing = framing
        self._greets = greets
        self._head = head
        self._refuse = refuse
        self._options = options
        self._pending: MergeBuffer | None = None
        self._held = b""
        self._opened = False
        self._blocked_ns = 0
        self._template: object = None
        self._text: Folded | None = None
        self._number = 0
        self._last_ns = now
        self._waiting_ns: int | None = None

    def begin(self, now: int) -> bytes:
        """Greet the client where that was promised; then the head is not held."""
        if not self._greets:
            return b""
        out: list[bytes] = []
        self._open(out)
        out.append(self._framing.frame(self._encoder.greeting()))
        return self._sent(out, now)

    def deliver(self, events: Sequence[Event], now: int) -> bytes:
        """Take the stream's next events, return what is to be written now.

        The usual case, one token of text to a reader that keeps up, takes the first branch: an escape and a
        concatenation.
        """
        text = self._text
        if text is not None and len(events) == 1:
            event = events[0]
            if type(event) is TextDelta and event.choice == 0 and event.logprobs is None:
                self._number = number = self._number + 1
                self._last_ns = now
                data = text.encode(event.text, number)
                self.sent_bytes += len(data)
                trace = self.trace
                if trace is not None:
                    times = trace.noted
                    if times is not None and event.token_count == 1 and event.text:
                        times.append(now)
                        if len(times) >= RUN:
                            trace.fold()
                    else:
                        trace.receive(events, now)
                return data
        return self._deliver(events, now)

    def _deliver(self, events: Sequence[Event], now: int) -> bytes:
        if self.ended or self.overflowed:
            return b""
        if self.trace is not None:
            self.trace.receive(events, now)
        if not self.blocked and not may_merge(events):
            return self._write_through(events, now)
        if self.blocked and self._waiting_ns is None:
            self._waiting_ns = now
        pending = self._hold(events, now)
        if not self.blocked:
            return self._write(now)
        if pending.pending_bytes > self._options.budget_bytes:
            self._give_up()
        return b""

    def _write_through(self, events: Sequence[Event], now: int) -> bytes:
        """Encode events while nothing waits before them and there is nothing to merge among them."""
        out: list[bytes] = []
        for event in events:
            self._number += 1
            if self.first_ns is None and type(event) in _TOKENS:
                self.first_ns = now
            self._encode(event, self._number, out)
        self._refresh_text()
        return self._sent(out, now)

    def _hold(self, events: Sequence[Event], now: int) -> MergeBuffer:
        pending = self._pending
        if pending is None:
            pending = self._pending = MergeBuffer(ordered=self._encoder.numbered)
        for event in events:
            self._number += 1
            pending.add(event, self._number)
            if self.first_ns is None and type(event) in _TOKENS:
                self.first_ns = now
                pending.seal()
            elif not self._options.merge:
                pending.seal()
        return pending

    def set_blocked(self, blocked: bool, now: int) -> bytes:
        """Learn that the transport takes no more, or takes again; return what has waited."""
        self.blocked = blocked
        if blocked:
            self._blocked_ns = now
            self._text = None
            return b""
        return b"" if self.overflowed or self.ended else self._write(now)

    def next_deadline(self) -> int | None:
        """Say when a heartbeat or the end of patience is due."""
        if self.ended or self.overflowed:
            return None
        if self.blocked:
            return self._blocked_ns + self._options.stall_ns
        return self._last_ns + self._options.heartbeat_ns if self._encoder.heartbeat else None

    def handle_deadline(self, now: int) -> bytes:
        """Send a heartbeat, or give up a reader that has taken nothing for too long."""
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return b""
        if self.blocked:
            self._give_up()
            return b""
        out: list[bytes] = []
        if not self._opened:
            self._open(out)
        out.append(self._framing.frame(self._encoder.heartbeat))
        self._refresh_text()
        return self._sent(out, now)

    def _give_up(self) -> None:
        self.overflowed = True
        self.failed = True
        self._text = None
        self._pending = None

    def _write(self, now: int) -> bytes:
        out: list[bytes] = []
        if self._pending is not None:
            for event, number in self._pending.drain():
                self._encode(event, number, out)
            self._pending = None
        self._refresh_text()
        if self._waiting_ns is not None and self.trace is not None:
            self.trace.ledger.lag.record(counted(now - self._waiting_ns))
        self._waiting_ns = None
        return self._sent(out, now)

    def _sent(self, out: list[bytes], now: int) -> bytes:
        data = b"".join(out)
        if data:
            self._last_ns = now
            self.sent_bytes += len(data)
            if self.trace is not None:
                self.trace.receive_bytes(now)
        return data

    def _encode(self, event: Event, number: int, out: list[bytes]) -> None:
        if not self._opened:
            if type(event) in _HELD_WITH_HEAD:
                self._held += self._encoder.encode(event, number)
                return
            if type(event) in _TERMINALS and isinstance(event, Failure):
                self._refuse_whole(event, out)
                return
            self._open(out)
        payload = self._encoder.encode(event, number)
        if payload:
            out.append(self._framing.frame(payload))
        if type(event) in _TERMINALS:
            out.append(self._framing.end())
            self._end(cast("Terminal", event))

    def _open(self, out: list[bytes]) -> None:
        self._opened = True
        self.status = self._head.status
        out.append(self._framing.begin(self._head))
        out.append(self._framing.frame(self._held))
        self._held = b""

    def _refuse_whole(self, terminal: Failure, out: list[bytes]) -> None:
        reply = self._refuse(terminal)
        self.status = reply.status
        out.append(self._framing.reply(reply))
        self._end(terminal)

    def _refresh_text(self) -> None:
        """Fold the template anew where the encoder has another one; keep the fast path shut where it has none."""
        if not self._opened or self.ended or self.blocked or self.first_ns is None:
            self._text = None  # a heartbeat may have opened the answer: its first token is still to be stamped
            return
        template = self._encoder.template(0)
        if template is None:
            self._text = None
        elif self._text is None or template is not self._template:
            self._text = self._framing.fold(template)
        self._template = template


class ResultDelivery(Delivery):
    """The events as one whole answer, written at the stream's end.

    Args:
        encode: words a finished result.
        framing: the carrier's for this one answer.
        refuse: words a failure.
    """

    __slots__ = (
        "_collector",
        "_encode",
        "_framing",
        "_refuse",
    )

    def __init__(
        self,
        encode: Callable[[Result], Reply],
        framing: Framing,
        refuse: Callable[[Failure], Reply],
    ) -> None:
        super().__init__()
        self._collector = Collector()
        self._encode = encode
        self._framing = framing
        self._refuse = refuse

    def begin(self, now: int) -> bytes:
        """Nothing: the answer has no beginning before its end."""
        del now
        return b""

    def deliver(self, events: Sequence[Event], now: int) -> bytes:
        """Fold the events in; return the whole answer once the terminal event is among them."""
        data = b""
        if self.trace is not None:
            self.trace.receive(events, now)
        for event in events:
            self._collector.receive(event)
            if self.first_ns is None and type(event) in _TOKENS:
                self.first_ns = now
            if type(event) in _TERMINALS:
                data = self._finish(cast("Terminal", event))
                if self.trace is not None:
                    self.trace.receive_bytes(now)
        return data

    def _finish(self, terminal: Terminal) -> bytes:
        self._end(terminal)
        reply = self._refuse(terminal) if isinstance(terminal, Failure) else self._encode(self._collector.result())
        self.status = reply.status
        data = self._framing.reply(reply)
        self.sent_bytes = len(data)
        return data

    def set_blocked(self, blocked: bool, now: int) -> bytes:
        """Nothing waits here: the one write goes to the carrier's own buffer."""
        del now
        self.blocked = blocked
        return b""

    def next_deadline(self) -> int | None:
        """A whole answer has no heartbeat: any byte of it would decide its status."""
        return None

    def handle_deadline(self, now: int) -> bytes:
        """There is no deadline to handle."""
        del now
        return b""


def _words(terminal: Terminal) -> str | None:
    """Say in words how a stream failed."""
    return getattr(terminal, "message", None) or getattr(terminal, "reason", None) or getattr(terminal, "by", None)
