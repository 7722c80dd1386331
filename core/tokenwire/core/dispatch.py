"""Batches in, deliveries fed, cancellations out: where a backend's steps meet the readers.

One engine step hands over a batch. Each stream's items pass its grammar, each reader's delivery makes bytes of them, and
the bytes go to the transport, all in that one call: no task, no queue, no wake-up per token. After the batch, and never
in the middle of it, backends are called: to cancel, to pause, to start what waited.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Final, cast

from .actions import Action, Cancel, Pause, Record, Resume, Start, Wait
from .contracts import Batch, Carrier, Source
from .errors import GrammarError
from .events import ErrorKind, Event, StreamCancelled, StreamError
from .line import Line
from .service import Service
from .stream import Item

__all__ = ["STREAMS_PER_TURN", "Dispatcher"]

STREAMS_PER_TURN: Final = 512
"""Streams that are fed before the loop gets a turn: about 5 ms of work, so that a large batch does not hold up others."""


class Dispatcher:
    """Feeds readers; a `tokenwire.core.contracts.Sink`.

    Args:
        service: counts the streams.
        source: the backend.
        log: takes each answered request's Record.
        report: takes what a backend raised or broke, with the stream's id.
        yield_to_loop: asks for `resume` to be called in the loop's next turn.
        clock: the clock of `now`. It is read once a batch, after its writes, for the delivery lag; without it that is
            not counted.
    """

    def __init__(
        self,
        service: Service,
        source: Source,
        *,
        log: Callable[[Record], None],
        report: Callable[[Exception, str], None],
        yield_to_loop: Callable[[], None],
        clock: Callable[[], int] | None = None,
    ) -> None:
        self._service = service
        self._source = source
        self._log = log
        self._report = report
        self._yield_to_loop = yield_to_loop
        self._clock = clock
        self._lines: dict[Line, None] = {}
        self._deferred: deque[tuple[int, deque[tuple[Line, Sequence[Item]]]]] = deque()
        self._starts: deque[Line] = deque()
        self._cancels: deque[Line] = deque()
        self._settles: deque[Carrier] = deque()
        self._turns: deque[Line] = deque()
        self._working = False

    @property
    def streams(self) -> int:
        """How many streams are on their way, those that wait included."""
        return len(self._lines)

    @property
    def deferred(self) -> bool:
        """Whether a part of a batch waits for `resume`."""
        return bool(self._deferred)

    def deliver(self, batch: Batch, now: int) -> None:
        """Take one engine step's items, encode them and write them; see `Sink`."""
        # Backends know a Line as an opaque handle; they hand back the very objects that they were given.
        lines = cast("Sequence[tuple[Line, Sequence[Item]]]", batch)
        if self._deferred:
            self._defer(iter(lines), now)
            return
        iterator = iter(lines)
        self._feed(islice(iterator, STREAMS_PER_TURN), now)
        self._defer(iterator, now)
        if self._deferred:
            self._yield_to_loop()
        self._after_batch(now)

    def _defer(self, lines: Iterator[tuple[Line, Sequence[Item]]], arrived: int) -> None:
        rest = deque(lines)
        if rest:
            self._deferred.append((arrived, rest))

    def resume(self, now: int) -> None:
        """Go on with what did not fit into a turn; it has arrived when its batch did, and not now."""
        room = STREAMS_PER_TURN
        while self._deferred and room:
            arrived, rest = self._deferred[0]
            turn = [rest.popleft() for _ in range(min(room, len(rest)))]
            if not rest:
                self._deferred.popleft()
            room -= len(turn)
            self._feed(iter(turn), arrived)
        if self._deferred:
            self._yield_to_loop()
        self._after_batch(now)

    def perform(self, actions: Sequence[Action], carrier: Carrier, now: int) -> None:
        """Do what a connection asks, as far as it concerns streams; Close and Abort are for its carrier.

        Args:
            actions: in order.
            carrier: the connection's own.
            now: monotonic nanoseconds.
        """
        for action in actions:
            if isinstance(action, Record):
                self._log(action)
            elif isinstance(action, Start):
                self._bind(action.stream, carrier)
                self._starts.append(action.stream)
            elif isinstance(action, Wait):
                self._bind(action.stream, carrier)
            elif isinstance(action, Cancel):
                self._cancel(action)
            elif isinstance(action, Pause | Resume):
                self._turns.append(action.stream)
        self._after_batch(now)

    def shut_down(self, error: StreamError, now: int) -> None:
        """End every stream with an error."""
        for line in self._lines:
            line.stream.cut_short = True
        self.deliver([(line, (error,)) for line in self._lines], now)
        while self._deferred:
            self.resume(now)

    def _feed(self, batch: Iterator[tuple[Line, Sequence[Item]]], now: int) -> None:
        outer, self._working = self._working, True
        accountant = self._service.accountant
        several = len(accountant.ledgers) > 1
        written: list[tuple[Carrier, bytes]] = []
        try:
            for line, items in batch:
                stream = line.stream
                try:
                    events = stream.accept(items)
                except GrammarError as error:
                    events = self._broken(line, error)
                if not events:
                    continue
                carrier = line.carrier
                if carrier is not None:
                    delivery = line.delivery
                    data = delivery.deliver(events, now)
                    if data:
                        written.append((carrier, data))
                        if several and delivery.trace is not None:
                            delivery.trace.ledger.writes += 1
                    elif delivery.overflowed:
                        self._settles.append(carrier)
                if stream.terminal is not None and line in self._lines:
                    self._retire(line)
            for carrier, data in written:
                carrier.write(data)
            if written and self._clock is not None:
                accountant.record_lag(self._clock() - now, 0 if several else len(written))
        finally:
            self._working = outer

    def _broken(self, line: Line, error: GrammarError) -> Sequence[Event]:
        stream = line.stream
        self._report(error, stream.start.id)
        stream.cut_short = True
        message = "The backend broke the rules of a stream; the server's log says how."
        # Only the error: usage and held text that come with it would follow on events that were lost with the offender.
        return stream.accept((StreamError(ErrorKind.SERVER, message, "backend_error"),))[-1:]

    def _retire(self, line: Line) -> None:
        """Let a line go whose stream has ended."""
        self._lines.pop(line, None)
        if line.carrier is not None:
            self._settles.append(line.carrier)
        if line.stream.cut_short:
            self._cancels.append(line)
        else:
            # It knows the line: a ring would wait for the collector of cycles, with all that hangs on it.
            line.job = None
        self._leave(line)

    def _leave(self, line: Line) -> None:
        successor = self._service.admission.leave(line)
        if successor is not None:
            self._starts.append(successor)

    def _bind(self, line: Line, carrier: Carrier) -> None:
        if line.stream.terminal is not None:
            return  # its peer was lost in the write that came before its Start
        line.carrier = carrier
        self._lines[line] = None

    def _cancel(self, action: Cancel) -> None:
        line = action.stream
        line.carrier = None
        if line.stream.terminal is not None:
            return
        line.stream.accept((StreamCancelled(action.by),))
        self._lines.pop(line, None)
        self._cancels.append(line)
        self._leave(line)

    def _after_batch(self, now: int) -> None:
        """Call carriers and backends, until there is nothing left to tell them.

        What they do meanwhile may ask for more of the same; the outermost call sees to it.
        """
        if self._working:
            return
        self._working = True
        try:
            while self._settles or self._cancels or self._turns or self._starts:
                if self._settles:
                    self._settles.popleft().settle(now)
                elif self._cancels:
                    self._cancel_job(self._cancels.popleft())
                elif self._turns:
                    self._turn_job(self._turns.popleft())
                else:
                    self._start(self._starts.popleft(), now)
        finally:
            self._working = False

    def _cancel_job(self, line: Line) -> None:
        job, line.job = line.job, None
        if job is not None:
            self._call(line, job.cancel)

    def _turn_job(self, line: Line) -> None:
        """Tell a job how its reader is now, whatever order Pause and Resume came in."""
        if line.job is not None and line in self._lines:
            self._call(line, partial(line.job.set_blocked, line.delivery.blocked))

    def _call(self, line: Line, call: Callable[[], None]) -> None:
        """Call a backend; its bug must not keep the others from being told."""
        try:
            call()
        except Exception as error:  # noqa: BLE001  # reported with its traceback
            self._report(error, line.stream.start.id)

    def _start(self, line: Line, now: int) -> None:
        if line.stream.terminal is not None:
            return
        if line.delivery.trace is not None:
            line.delivery.trace.start(now)
        try:
            line.job = self._source.start(line, line.request)
        except Exception as error:  # noqa: BLE001  # a backend's bug must end one stream, not the server
            self._report(error, line.stream.start.id)
            message = f"The backend could not start ({type(error).__name__})."
            failure = StreamError(ErrorKind.SERVER, message, "backend_error", retryable=True)
            self._feed(iter([(line, (failure,))]), now)
            return
        if line.delivery.blocked:
            self._turn_job(line)
