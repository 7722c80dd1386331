"""HTTP/1.1 responses, read: one connection's, one after the other, each within bounds."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from ._chunked import ChunkedBody
from ._response_head import ResponseReceived, check_beginning, parse_response_head
from .errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from .http import BodyEnded, BodyFraming, BodyReceived

__all__ = ["MAX_INTERIM_RESPONSES", "MAX_RESPONSE_HEAD_BYTES", "ResponseEvent", "ResponseReader"]

MAX_RESPONSE_HEAD_BYTES: Final = 64 * 1024
"""A response's status line and headers. Providers send 2 to 4 KiB, those behind several proxies up to 16."""

MAX_INTERIM_RESPONSES: Final = 16
"""How many 1xx responses may come before the final one: nobody in use sends more than two."""

ResponseEvent = ResponseReceived | BodyReceived | BodyEnded
"""What a response is made of."""


class _Phase(Enum):
    HEAD = "head"
    BODY = "body"
    COMPLETE = "complete"
    CLOSED = "closed"


class ResponseReader:
    """Reads the responses of one connection, one at a time.

    The same bytes give the same events and the same error however they are cut, body pieces joined: where a read
    completes events and then breaks a rule, the events are returned and the next call, whichever it is, raises.

    Args:
        method: the request's method; HEAD has no body.
        max_head_bytes: the longest head, its 1xx forerunners apart.

    Attributes:
        begun: whether a byte of the present response has come: before it the server may not have seen the request.
        receive_whole: takes a read of the present body that is whole chunks of usual sizes, and returns what is in
            them; returns None, with nothing changed, for any other read, which is then `receive_data`'s. Such a read costs
            two calls. Bytes taken here appear in no event.
    """

    __slots__ = (
        "_buffer",
        "_checked",
        "_chunked",
        "_fault",
        "_interim",
        "_keep_alive",
        "_left",
        "_max_head",
        "_method",
        "_phase",
        "begun",
        "receive_whole",
    )

    receive_whole: Callable[[bytes], bytes | None]

    def __init__(self, method: str = "GET", *, max_head_bytes: int = MAX_RESPONSE_HEAD_BYTES) -> None:
        self._max_head = max_head_bytes
        self._fault: RemoteProtocolError | None = None
        self._begin(method)

    def _begin(self, method: str) -> None:
        self._method = method
        self._phase = _Phase.HEAD
        self._buffer = bytearray()
        self._checked = 0
        self._interim = 0
        self._chunked: ChunkedBody | None = None
        self._left: int | None = None  # bytes of the body that have not come; None where only the end of input ends it
        self._keep_alive = False
        self.begun = False
        self.receive_whole = _not_whole

    @property
    def complete(self) -> bool:
        """Whether the present response is whole."""
        return self._phase is _Phase.COMPLETE

    @property
    def may_become_reusable(self) -> bool:
        """Whether the present response is not whole, and its end would make the connection `reusable`."""
        return self._phase is _Phase.BODY and self._keep_alive and self._fault is None

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request: the response is whole, and both sides keep it alive."""
        return self._phase is _Phase.COMPLETE and self._keep_alive and self._fault is None

    def receive_data(self, data: bytes) -> list[ResponseEvent]:
        """Take bytes, return what they complete.

        Raises:
            RemoteProtocolError: the server's bytes are no response, go past a limit (LimitExceeded), or came after the
                response's end, though nothing was asked. The reader is closed.
            LocalProtocolError: the reader is closed.
        """
        self.check()
        if self._phase is _Phase.CLOSED:
            raise LocalProtocolError("the reader is closed")
        events: list[ResponseEvent] = []
        if data:
            self.begun = True
            try:
                self._receive(data, events)
            except RemoteProtocolError as error:
                self._close()
                if not events:
                    raise
                self._fault = error
        return events

    def receive_eof(self) -> list[ResponseEvent]:
        """Take the end of input; it ends a body that is told to last until then. A second call does nothing.

        Raises:
            RemoteProtocolError: the response is not whole, or the error of an earlier read that returned events first.
                The reader is closed.
        """
        self.check()
        phase, until_close = self._phase, self._left is None and self._chunked is None
        where = "before an answer came" if not self.begun else f"in the {phase.value} of the answer"
        self._close()
        if phase is _Phase.BODY and until_close:
            return [BodyEnded()]
        if phase is _Phase.HEAD or phase is _Phase.BODY:
            raise RemoteProtocolError(f"the connection was closed {where}", status=502)
        return []

    def next_response(self, method: str) -> None:
        """Get ready for the response to the next request.

        Raises:
            LocalProtocolError: the connection is not `reusable`.
        """
        if not self.reusable:
            raise LocalProtocolError("this connection takes no further request")
        self._begin(method)

    def check(self) -> None:
        """Report the error of a read that returned events first.

        Raises:
            RemoteProtocolError: as `receive_data`, and once.
        """
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _close(self) -> None:
        self._phase = _Phase.CLOSED
        self._buffer = bytearray()
        self._chunked = None
        self.receive_whole = _not_whole

    def _receive(self, data: bytes, events: list[ResponseEvent]) -> None:
        while self._phase is _Phase.HEAD and data:
            data = self._receive_head(data, events)
        if self._phase is _Phase.BODY and data:
            data = self._receive_body(data, events)
        if self._phase is _Phase.COMPLETE and data:
            raise RemoteProtocolError("the server sent more than one answer", status=502)

    def _receive_head(self, data: bytes, events: list[ResponseEvent]) -> bytes:
        """Take bytes of a head; return those that come after it."""
        buffer = self._buffer
        buffer += data
        end = buffer.find(b"\r\n\r\n", max(0, self._checked - 3), self._max_head)
        check_beginning(buffer, self._checked, min(len(buffer), self._max_head) if end < 0 else end)
        if end < 0:
            if len(buffer) >= self._max_head:
                raise LimitExceeded("max_head_bytes", self._max_head, status=502)
            self._checked = len(buffer)
            return b""
        head, rest = bytes(buffer[:end]), bytes(buffer[end + 4 :])
        self._buffer = bytearray()
        self._checked = 0
        received = parse_response_head(head, self._method)
        if received.status < 200:
            self._pass_over_interim(received.status)
        else:
            self._begin_body(received, events)
        return rest

    def _pass_over_interim(self, status: int) -> None:
        """Pass over a 1xx response (RFC 9110, 15.2): a client must be able to, though it asked for none."""
        if status == 101:
            raise RemoteProtocolError("the server switches to a protocol that nobody asked for", status=502)
        self._interim += 1
        if self._interim > MAX_INTERIM_RESPONSES:
            raise LimitExceeded("MAX_INTERIM_RESPONSES", MAX_INTERIM_RESPONSES, status=502)

    def _begin_body(self, received: ResponseReceived, events: list[ResponseEvent]) -> None:
        events.append(received)
        self._keep_alive = received.keep_alive
        self._phase = _Phase.BODY
        if received.body is BodyFraming.CHUNKED:
            self._chunked = ChunkedBody(of_response=True)
            self.receive_whole = self._chunked.receive_whole
        elif received.body is not BodyFraming.UNTIL_CLOSE:
            self._left = received.content_length or 0
            if not self._left:
                self._end_body(events)

    def _receive_body(self, data: bytes, events: list[ResponseEvent]) -> bytes:
        """Take bytes of a body; return those that come after it."""
        chunked = self._chunked
        if chunked is not None:
            pieces: list[bytes] = []
            try:
                rest = chunked.receive_data(data, pieces)
            finally:
                if pieces:
                    events.append(BodyReceived(b"".join(pieces)))
            if rest is not None:
                self._end_body(events)
            return rest or b""
        if self._left is None:
            events.append(BodyReceived(data))
            return b""
        piece, rest = data[: self._left], data[self._left :]
        self._left -= len(piece)
        events.append(BodyReceived(piece))
        if not self._left:
            self._end_body(events)
        return rest

    def _end_body(self, events: list[ResponseEvent]) -> None:
        self._phase = _Phase.COMPLETE
        self.receive_whole = _not_whole
        events.append(BodyEnded())


def _not_whole(data: bytes) -> bytes | None:
    del data
    return None
