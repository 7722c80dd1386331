"""The life of a decoder of a dialect on SSE: bytes in, events out, exactly one terminal event, whatever comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tokenwire.core import sse
from tokenwire.core.errors import LocalProtocolError, RemoteProtocolError
from tokenwire.core.events import ErrorKind, Event, StreamError, Terminal

__all__ = ["SseDialectDecoder"]


class SseDialectDecoder(ABC):
    """Decodes one stream; a dialect says what its events mean.

    It raises for nothing but its own misuse: what breaks SSE, the dialect or a limit is a StreamError, and what follows
    the terminal event is dropped.
    """

    __slots__ = ("_bytes_seen", "_closed", "_sse", "_terminal")

    def __init__(self) -> None:
        self._sse = sse.Decoder()
        self._terminal: Terminal | None = None
        self._closed = False
        self._bytes_seen = 0

    def receive_data(self, data: bytes) -> Sequence[Event]:
        """Take bytes, return the events they complete; see `contracts.Decoder`.

        Raises:
            LocalProtocolError: data after the end of input.
        """
        if self._closed:
            raise LocalProtocolError("data after the end of input")
        out: list[Event] = []
        if self._terminal is not None:
            return out
        self._bytes_seen += len(data)
        try:
            for event in self._sse.receive_data(data):
                if event.data and self._terminal is None:
                    self._receive_event(event, out)
        except RemoteProtocolError as error:
            self._finish(_malformed(error), out)
        return out

    def receive_eof(self) -> Sequence[Event]:
        """Take the end of input, return what it completes. A second call returns nothing."""
        out: list[Event] = []
        if not self._closed and self._terminal is None:
            try:
                self._sse.receive_eof()
                self._finish(self._terminal_at_eof(), out)
            except RemoteProtocolError as error:
                self._finish(_malformed(error), out)
        self._closed = True
        return out

    @abstractmethod
    def _receive_event(self, event: sse.ServerSentEvent, out: list[Event]) -> None:
        """Read one event that has data; append what it says, a terminal event by `_finish`.

        Raises:
            RemoteProtocolError: it is not of the dialect.
        """

    @abstractmethod
    def _terminal_at_eof(self) -> Terminal:
        """Say how the stream ended, whose input ended without a terminal event."""

    def _finish(self, terminal: Terminal, out: list[Event]) -> None:
        self._terminal = terminal
        out.append(terminal)


def _malformed(error: RemoteProtocolError) -> StreamError:
    return StreamError(ErrorKind.SERVER, f"The server sent a malformed stream: {error}", "malformed_stream")
