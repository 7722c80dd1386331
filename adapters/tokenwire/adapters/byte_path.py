"""One non-blocking socket: receive, write, keep the rest, tell who is blocked. The pump and the dialer share it.

It calls the system itself: what is written goes out in the very call that made it. What a loop has to offer is in
`Readiness`.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

__all__ = ["RECEIVES_PER_TURN", "RECEIVE_BYTES", "BytePath", "Readiness"]

RECEIVE_BYTES: Final = 64 * 1024
"""The most that one read takes."""

RECEIVES_PER_TURN: Final = 4
"""Reads of one socket before the loop goes on. One would do, but libuv calls once for a socket that was reset and then
never again: the reset stands behind the data and must be found."""


class Readiness(Protocol):
    """What sockets need of an event loop. Every method but `wake_soon` is called on the loop's thread.

    No callback or task runs before the method that was given it has returned.
    """

    repeats: bool
    """Whether a socket that stays ready is told again and again, also one that was reset. libuv tells a reset once."""

    def add_reader(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be read, until `remove_reader` or `close`."""
        ...

    def remove_reader(self, sock: socket.socket) -> None:
        """Stop."""
        ...

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be written, until `remove_writer` or `close`."""
        ...

    def remove_writer(self, sock: socket.socket) -> None:
        """Stop; called from within the callback only."""
        ...

    def close(self, sock: socket.socket) -> None:
        """Stop watching the socket, and close it."""
        ...

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        """Set the one timer, in monotonic nanoseconds, moving it where it is set already."""
        ...

    def wake_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the loop's next turn; from any thread. After the loop's end, do nothing."""
        ...

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an async function; it is cancelled at the server's end. It must not raise."""
        ...


class BytePath(ABC):
    """One connected socket. A subclass says what bytes, an end and a failure mean.

    Args:
        sock: connected and non-blocking.
        readiness: the loop.
        now: the monotonic clock, in nanoseconds.
    """

    __slots__ = ("_fd", "_gone", "_now", "_out", "_paused", "_readiness", "_sock", "_thorough", "_watched")

    def __init__(self, sock: socket.socket, readiness: Readiness, now: Callable[[], int]) -> None:
        self._sock = sock
        # Writing to the descriptor saves the socket object's own bookkeeping on every token; the socket stays non-blocking.
        self._fd = sock.fileno()
        self._readiness = readiness
        self._now = now
        # Where an end that stands behind the data would not be told again, it is looked for, by one more system call.
        self._thorough = not readiness.repeats
        self._out: deque[bytes] | None = None
        self._watched = False
        self._paused = False
        self._gone = False

    def write(self, data: bytes) -> None:
        """Send bytes as far as they go and keep the rest; after the end do nothing."""
        if self._out is not None or self._gone:
            if self._out is not None:
                self._out.append(data)
            return
        try:
            sent = os.write(self._fd, data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._broken(error)
            return
        if sent != len(data):
            self._out = deque((data[sent:],))
            self._readiness.add_writer(self._sock, self._flush)
            self._set_blocked(True, self._now())

    def set_reading(self, reading: bool) -> None:
        """Take no more bytes from the socket, or go on."""
        # A pause that ends before anything came costs no system call: the loop is told when it calls in vain.
        self._paused = not reading
        if reading and not self._watched and not self._gone:
            self._watch()

    def receive(self) -> None:
        """Take what has arrived."""
        wanted = self._watched and not self._paused
        if not wanted:
            self._rest()
            return
        now = self._now()
        for _ in range(RECEIVES_PER_TURN):
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._broken(error)
                return
            if not data:
                # The socket stays readable after its end; a loop that kept watching it would spin.
                self._rest()
                self._receive_eof(now)
                return
            self._receive_data(data, now)
            if self._gone or self._paused or not (self._thorough or len(data) == RECEIVE_BYTES):
                return
        if not self._readiness.repeats:
            self._readiness.wake_soon(self._receive_more)

    def _receive_more(self) -> None:
        if self._watched:
            self.receive()

    def _watch(self) -> None:
        self._watched = True
        self._readiness.add_reader(self._sock, self.receive)

    def _rest(self) -> None:
        if self._watched:
            self._watched = False
            self._readiness.remove_reader(self._sock)

    def _flush(self) -> None:
        """The socket takes bytes again: send what waits."""
        out = self._out or deque()
        try:
            while out:
                sent = os.write(self._fd, out[0])
                if sent == len(out[0]):
                    out.popleft()
                else:
                    out[0] = out[0][sent:]
                    break
        except (BlockingIOError, InterruptedError):
            pass  # the usual end of a flush that has more to say; the writer stays added
        except OSError as error:
            self._broken(error)
            return
        if not out:
            self._out = None
            self._readiness.remove_writer(self._sock)
        self._set_blocked(bool(out), self._now())

    @abstractmethod
    def _receive_data(self, data: bytes, now: int) -> None:
        """Bytes came."""

    @abstractmethod
    def _receive_eof(self, now: int) -> None:
        """The other side will send no more."""

    @abstractmethod
    def _set_blocked(self, blocked: bool, now: int) -> None:
        """The socket takes no more, or has taken some of what waits, or has taken all of it."""

    @abstractmethod
    def _broken(self, error: OSError) -> None:
        """The transport is gone: nothing more can be sent or received."""

    def _close_socket(self) -> None:
        """Drop the socket and what waits to be sent. Not twice."""
        self._gone = True
        self._watched = False
        self._out = None
        self._readiness.close(self._sock)
