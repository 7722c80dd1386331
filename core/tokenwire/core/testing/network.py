"""A simulated connection between two ends, with the faults that real ones have.

Bytes arrive in order, none is invented and none is doubled; they may be late, cut into other pieces than they were
written in, held up because nobody reads, or lost with everything after them. Each end is a non-blocking socket in
miniature and raises what a socket raises: BlockingIOError, ConnectionResetError, BrokenPipeError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from random import Random
from typing import Final

from msgspec import Struct

from .clock import VirtualClock

__all__ = ["Endpoint", "Faults", "Link", "Outbox"]

_WHOLE: Final = 1 << 16


class Faults(Struct, frozen=True, kw_only=True):
    """What is wrong with one direction of a link. The default is a perfect one."""

    latency_ns: int = 0
    """How long a byte travels."""
    jitter_ns: int = 0
    """How much longer it may travel; order is kept, so that one late piece holds up those behind it."""
    cuts: int = 0
    """At how many places a write may be cut into pieces that arrive one by one."""
    byte_ns: int = 0
    """How long each byte keeps the line busy."""
    capacity: int = _WHOLE
    """How many bytes may be under way or unread: beyond them the writer is told that it would block."""
    reset_at: int | None = None
    """The write that goes past so many bytes finds the connection reset, and so does the other end, later."""
    black_hole_at: int | None = None
    """The moment from which on nothing arrives any more, and nobody is told."""


class _Pipe:
    """One direction: what was written and has not been read."""

    __slots__ = ("_busy_until", "_clock", "_faults", "_random", "arrive", "sent", "unread")

    def __init__(self, clock: VirtualClock, random: Random, faults: Faults) -> None:
        self._clock = clock
        self._random = random
        self._faults = faults
        self._busy_until = 0
        self.arrive: Callable[[bytes | _Mark], None]
        self.sent = 0
        self.unread = 0

    @property
    def room(self) -> int:
        return max(0, self._faults.capacity - self.unread)

    @property
    def roomy(self) -> bool:
        return 2 * self.room >= self._faults.capacity

    def breaks_with(self, size: int) -> bool:
        return self._faults.reset_at is not None and self.sent + size > self._faults.reset_at

    def carry(self, data: bytes) -> int:
        """Take as much as there is room for and send it on its way."""
        data = data[: self.room]
        self.sent += len(data)
        self.unread += len(data)
        for piece in self._cut(data):
            self._launch(piece, len(piece))
        return len(data)

    def mark(self, mark: _Mark) -> None:
        """Send an end or a reset after what is under way."""
        self._launch(mark, 0)

    def _cut(self, data: bytes) -> list[bytes]:
        cuts = self._faults.cuts
        if not cuts or len(data) < 2:
            return [data] if data else []
        draw = self._random.randrange
        edges = sorted({0, len(data), *(draw(1, len(data)) for _ in range(draw(cuts + 1)))})
        return [data[begin:end] for begin, end in pairwise(edges)]

    def _launch(self, piece: bytes | _Mark, size: int) -> None:
        faults, now = self._faults, self._clock.now()
        if faults.black_hole_at is not None and now >= faults.black_hole_at:
            return
        jitter = self._random.randrange(faults.jitter_ns + 1) if faults.jitter_ns else 0
        self._busy_until = max(self._busy_until, now + faults.latency_ns + jitter) + size * faults.byte_ns
        self._clock.call_at(self._busy_until, partial(self.arrive, piece))


class _Mark(Struct, frozen=True):
    """What ends a direction, where it is not a byte."""

    reset: bool
    """Whether it is a reset; else it is an orderly end."""


_END: Final = _Mark(reset=False)
_RESET: Final = _Mark(reset=True)


class Endpoint:
    """One end of a link: a non-blocking socket and its readiness, level-triggered.

    Attributes:
        closed: nothing more is sent, received or called back.
    """

    __slots__ = (
        "_arrived",
        "_broken",
        "_clock",
        "_ended",
        "_finished",
        "_inbound",
        "_outbound",
        "_reader",
        "_reader_due",
        "_writer",
        "_writer_due",
        "closed",
        "freed",
    )

    def __init__(self, clock: VirtualClock, inbound: _Pipe, outbound: _Pipe) -> None:
        self._clock = clock
        self._inbound = inbound
        self._outbound = outbound
        self._arrived = bytearray()
        self._ended = False
        self._broken = False
        self._finished = False
        self._reader: Callable[[], None] | None = None
        self._writer: Callable[[], None] | None = None
        self._reader_due = False
        self._writer_due = False
        self.closed = False
        self.freed: Callable[[], None]
        inbound.arrive = self._arrive

    # -- the socket --------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> int:
        """Write as much as fits.

        Returns:
            How many bytes were taken, at least one.

        Raises:
            BlockingIOError: there is no room.
            ConnectionResetError: the connection is gone.
            BrokenPipeError: this end has been shut down or closed.
        """
        if self._broken:
            raise ConnectionResetError
        if self._finished or self.closed:
            raise BrokenPipeError
        if self._outbound.breaks_with(len(data)):
            self._break()
            self._outbound.mark(_RESET)
            raise ConnectionResetError
        taken = self._outbound.carry(data)
        if not taken:
            raise BlockingIOError
        return taken

    def recv(self, limit: int) -> bytes:
        """Read what has arrived; b"" at the end.

        Raises:
            BlockingIOError: nothing has arrived.
            ConnectionResetError: the connection is gone, and with it what had not been read.
        """
        if self._broken:
            raise ConnectionResetError
        data = bytes(self._arrived[:limit])
        if not data and not self._ended:
            raise BlockingIOError
        del self._arrived[:limit]
        if data:
            self._inbound.unread -= len(data)
            self.freed()
        return data

    def shutdown(self) -> None:
        """Send no more: the other end reads an end after what is under way.

        Raises:
            ConnectionResetError: the connection is gone.
        """
        if self._broken:
            raise ConnectionResetError
        if not self._finished:
            self._finished = True
            self._outbound.mark(_END)

    def close(self) -> None:
        """Let go. Where something was not read, or still comes, the other end sees a reset, as with TCP."""
        if self.closed:
            return
        unread = bool(self._arrived)
        if not self._broken and (unread or not self._finished):
            self._outbound.mark(_RESET if unread else _END)
        self._let_go()

    def reset(self) -> None:
        """Let go at once: what is unread at the other end is lost there."""
        if not self.closed and not self._broken:
            self._outbound.mark(_RESET)
        self._let_go()

    # -- its readiness -----------------------------------------------------------------------------------------------

    def set_reader(self, callback: Callable[[], None] | None) -> None:
        """Call back as long as there is something to read; None to stop."""
        self._reader = callback
        self._poke_reader()

    def set_writer(self, callback: Callable[[], None] | None) -> None:
        """Call back as long as there is room to write; None to stop."""
        self._writer = callback
        self.poke_writer()

    def poke_writer(self) -> None:
        """Have the writer called where there is room."""
        if self._writer is not None and not self._writer_due and self._writable:
            self._writer_due = True
            self._clock.call_soon(self._call_writer)

    @property
    def _readable(self) -> bool:
        return self._broken or self._ended or bool(self._arrived)

    @property
    def _writable(self) -> bool:
        # As sockets have it: not for each byte that was read, but once there is room that is worth a call.
        return self._broken or self._outbound.roomy

    def _poke_reader(self) -> None:
        if self._reader is not None and not self._reader_due and self._readable:
            self._reader_due = True
            self._clock.call_soon(self._call_reader)

    def _call_reader(self) -> None:
        self._reader_due = False
        if self._reader is not None and self._readable:
            self._reader()
            self._poke_reader()

    def _call_writer(self) -> None:
        self._writer_due = False
        if self._writer is not None and self._writable:
            self._writer()
            self.poke_writer()

    def _arrive(self, piece: bytes | _Mark) -> None:
        if self._broken:
            return
        if isinstance(piece, _Mark):
            self._ended = True
            if piece.reset:
                self._break()
        elif self.closed:
            # Nobody is here to read it (RFC 9293, 3.10.7.1): the sender learns that by a reset.
            self._broken = True
            self._outbound.mark(_RESET)
            return
        else:
            self._arrived += piece
        self._poke_reader()

    def _break(self) -> None:
        self._broken = True
        self._arrived.clear()
        self._poke_reader()
        self.poke_writer()

    def _let_go(self) -> None:
        self.closed = True
        self._reader = None
        self._writer = None
        self._arrived.clear()


class Outbox:
    """What one end has to say, sent as far as the link takes it and kept as long as it does not.

    Args:
        endpoint: the end.
        sent: called whenever all of it was taken.
        lost: called when nothing can be sent any more.

    Attributes:
        waiting: what was not taken yet.
    """

    __slots__ = ("_endpoint", "_lost", "_sent", "waiting")

    def __init__(self, endpoint: Endpoint, sent: Callable[[], None], lost: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._sent = sent
        self._lost = lost
        self.waiting = b""

    def send(self, data: bytes) -> None:
        """Say something, after what waits."""
        self.waiting += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[self._endpoint.send(self.waiting) :]
        except BlockingIOError:
            self._endpoint.set_writer(self._flush)
            return
        except OSError:
            self._lost()
            return
        self._endpoint.set_writer(None)
        self._sent()


class Link:
    """A connection: two ends and the two directions between them.

    Args:
        clock: when things happen.
        random: where jitter and cuts are drawn from.
        upward: the faults from client to server.
        downward: the faults from server to client.

    Attributes:
        client: the end that opened it.
        server: the end that accepted it.
    """

    __slots__ = ("client", "server")

    def __init__(self, clock: VirtualClock, random: Random, *, upward: Faults, downward: Faults) -> None:
        up, down = _Pipe(clock, random, upward), _Pipe(clock, random, downward)
        self.client = Endpoint(clock, down, up)
        self.server = Endpoint(clock, up, down)
        self.client.freed = self.server.poke_writer
        self.server.freed = self.client.poke_writer
