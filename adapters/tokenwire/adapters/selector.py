"""Sockets watched by a selector, for loops that have no callbacks of their own: trio's, and the sync client's."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable

__all__ = ["SelectorWatch"]


class _Watch:
    """What is called for one socket."""

    __slots__ = ("reader", "writer")

    def __init__(self) -> None:
        self.reader: Callable[[], None] | None = None
        self.writer: Callable[[], None] | None = None

    @property
    def events(self) -> int:
        """What to ask the selector for."""
        return (selectors.EVENT_READ if self.reader else 0) | (selectors.EVENT_WRITE if self.writer else 0)


class SelectorWatch:
    """The part of a `tokenwire.adapters.byte_path.Readiness` that is about sockets."""

    repeats = True

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._ended = False
        self._watches: dict[socket.socket, _Watch] = {}

    def add_reader(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be read."""
        watch = self._watches.setdefault(sock, _Watch())
        asked, watch.reader = watch.events, callback
        self._ask(sock, watch, asked)

    def remove_reader(self, sock: socket.socket) -> None:
        """Stop watching for reading."""
        watch = self._watches[sock]
        asked, watch.reader = watch.events, None
        self._ask(sock, watch, asked)

    def add_writer(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back each time the socket can be written."""
        watch = self._watches.setdefault(sock, _Watch())
        asked, watch.writer = watch.events, callback
        self._ask(sock, watch, asked)

    def remove_writer(self, sock: socket.socket) -> None:
        """Stop watching for writing."""
        watch = self._watches[sock]
        asked, watch.writer = watch.events, None
        self._ask(sock, watch, asked)

    def close(self, sock: socket.socket) -> None:
        """Stop watching the socket, and close it."""
        watch = self._watches.pop(sock, None)
        if watch is not None:
            asked, watch.reader, watch.writer = watch.events, None, None
            self._ask(sock, watch, asked)
        sock.close()

    def fileno(self) -> int:
        """The selector's descriptor, which can be read when one of the sockets is ready (epoll and kqueue nest)."""
        return self._selector.fileno()

    def call_ready(self, timeout: float | None) -> None:
        """Wait until a socket is ready, up to a timeout in seconds, and call back for all that are."""
        for key, events in self._selector.select(timeout):
            watch: _Watch = key.data
            # Any of these calls may end another's watch, or its own.
            if events & selectors.EVENT_READ and watch.reader is not None:
                watch.reader()
            if events & selectors.EVENT_WRITE and watch.writer is not None:
                watch.writer()

    def end(self) -> None:
        """Watch nothing more; sockets may be closed after it."""
        self._ended = True
        self._selector.close()

    def _ask(self, sock: socket.socket, watch: _Watch, asked: int) -> None:
        """Tell the selector what a socket is watched for now, having been watched for `asked`."""
        events = watch.events
        if self._ended:
            return  # the selector is closed at the server's end, before the last of the sockets
        if events and asked:
            self._selector.modify(sock, events, watch)
        elif events:
            self._selector.register(sock, events, watch)
        elif asked:
            self._selector.unregister(sock)
