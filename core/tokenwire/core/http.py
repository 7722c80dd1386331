"""HTTP/1.1 messages on the server's side: request heads and bodies in, answers out.

A usual head is read by one expression (`_head`), a body by its framing (`_body`). h11 reads the heads that are left, and
never alone: it accepts bare LF, obs-fold, several lengths, Content-Length beside Transfer-Encoding and Transfer-Encoding in
HTTP/1.0, so they are checked before and after. It sees nothing else: bodies would cost more in it, it buffers without
bound while a response runs, so pipelined bytes are held here, up to a limit; and it hides the end of input while paused.

The writer keeps its own body framing (chunked, until close, length, none), because tokens are written past any writer.
"""

from __future__ import annotations

import re
from enum import Enum
from http import HTTPStatus
from typing import Final

import h11
from msgspec import Struct

from ._body import BodyReader, LengthBody
from ._chunked import ChunkedBody
from ._head import HeadReceived, check_head, check_request_line, interpret, read_usual
from .contracts import Folded, Reply, ResponseHead, Template
from .errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from .framing import chunk, fold_bare, fold_chunked

__all__ = [
    "MAX_HEAD_BYTES",
    "MAX_PIPELINED_BYTES",
    "BodyEnded",
    "BodyFraming",
    "BodyReceived",
    "HeadReceived",
    "RequestReader",
    "ResponseWriter",
    "encode_head",
]

MAX_HEAD_BYTES: Final = 32 * 1024
"""A request's line and headers. Browsers stay under 8 KiB, cookies and tokens of big sites under 16."""

MAX_PIPELINED_BYTES: Final = 16 * 1024
"""What a peer may send ahead while its answer runs. A peer that sends more has its later requests unanswered."""

_CR: Final = 0x0D
_TOKEN: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_QUOTED: Final = re.compile(r""":? (?:bytearray\()?b['"].*""", re.DOTALL)
_find_unsafe: Final = re.compile(r"[\r\n\x00]").search


def _no_bytes(text: str) -> bytes:
    del text
    return b""


_NOTHING: Final = Template(b"", b"", _no_bytes)
"""What a body that must not be there makes of every token (HEAD, 204, 304)."""


class BodyReceived(Struct, frozen=True):
    """A piece of the request's body."""

    data: bytes
    """The bytes, framing removed."""


class BodyEnded(Struct, frozen=True):
    """The request is whole; nothing more is read until `RequestReader.next_request`."""


HttpEvent = HeadReceived | BodyReceived | BodyEnded

_ENDED: Final = BodyEnded()


class _Phase(Enum):
    HEAD = "head"
    BODY = "body"
    HELD = "held"
    CLOSED = "closed"


_HEAD: Final = _Phase.HEAD
_BODY: Final = _Phase.BODY
_HELD: Final = _Phase.HELD


class RequestReader:
    """Reads one peer's requests, one at a time.

    Args:
        max_head_bytes: the longest head; a longer one is refused with 431, or with 414 where its first line has no end.
        max_pipelined_bytes: the most that is held while an answer runs.

    Attributes:
        overflowed: more than `max_pipelined_bytes` came while an answer ran; they are gone, and the connection must end
            with that answer.
        path: of the request whose head is not whole, once its first line is, or whose head was refused; else empty.
    """

    __slots__ = (
        "_body",
        "_buffer",
        "_fault",
        "_max_head",
        "_max_pipelined",
        "_phase",
        "_searched",
        "overflowed",
        "path",
    )

    def __init__(self, *, max_head_bytes: int = MAX_HEAD_BYTES, max_pipelined_bytes: int = MAX_PIPELINED_BYTES) -> None:
        self._max_head = max_head_bytes
        self._max_pipelined = max_pipelined_bytes
        self._buffer = bytearray()
        self._searched = 0
        self._phase = _HEAD
        self._body: BodyReader | None = None
        self._fault: RemoteProtocolError | None = None
        self.overflowed = False
        self.path = ""

    @property
    def mid_request(self) -> bool:
        """Whether a request has begun and is not whole: an end of input now cuts it in half."""
        return self._phase is _BODY or (self._phase is _HEAD and bool(self._buffer) and not self._half_line)

    @property
    def _half_line(self) -> bool:
        """Whether there is a CR and no more: perhaps half an empty line, which is no beginning of a request."""
        return len(self._buffer) == 1 and self._buffer[0] == _CR

    @property
    def holding(self) -> bool:
        """Whether the last request is whole and `next_request` may be called."""
        return self._phase is _HELD

    def receive_data(self, data: bytes) -> list[HttpEvent]:
        """Take bytes, return what they complete of the present request.

        The same bytes give the same events and the same error however they are cut: where a read completes events and
        then breaks a rule, the events are returned and the next call, whichever it is, raises.

        Raises:
            RemoteProtocolError: the peer's bytes are not a request; its status answers it. The reader is closed.
            LocalProtocolError: the reader is closed.
        """
        if self._fault is not None:
            self.check()
        phase = self._phase
        if phase is _HEAD:
            if not self._buffer and (end := data.find(b"\r\n\r\n") + 4) > 3 and end <= self._max_head:
                received = read_usual(data[:end])
                if received is not None:
                    return self._begin(received, data[end:])
            self._buffer += data
            return self._read(b"")
        if phase is _BODY:
            return self._read(data)
        if phase is not _HELD:
            raise LocalProtocolError("the reader is closed")
        self._hold(data)
        return []

    def next_request(self) -> list[HttpEvent]:
        """Go on to the next request, after the answer to the last: return what is there of it already.

        Raises:
            RemoteProtocolError: as `receive_data`.
            LocalProtocolError: the last request is not whole.
        """
        if self._fault is not None:
            self.check()
        if self._phase is not _HELD:
            raise LocalProtocolError(f"no next request while in phase {self._phase.value}")
        self._phase = _HEAD
        return self._read(b"") if self._buffer else []

    def check(self) -> None:
        """Report the error of a read that returned events first.

        Raises:
            RemoteProtocolError: as `receive_data`, and once.
        """
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def hand_over(self) -> bytes:
        """Give what came behind the request that is whole, for another protocol to read. The reader is closed."""
        rest = bytes(self._buffer)
        self.close()
        return rest

    def close(self) -> None:
        """Take nothing more; what is held is dropped."""
        self._phase = _Phase.CLOSED
        self._fault = None
        self._body = None
        self._buffer = bytearray()

    def _hold(self, data: bytes) -> None:
        if len(self._buffer) + len(data) > self._max_pipelined:
            self.overflowed = True
            self._buffer.clear()
        elif not self.overflowed:
            self._buffer += data

    def _begin(self, received: HeadReceived, data: bytes) -> list[HttpEvent]:
        """Go on behind a usual head, whose body has a length or is not there."""
        length = received.head.content_length or 0
        if len(data) < length:
            self._body = LengthBody(length)
            self._phase = _BODY
            return [received, *self._read(data)]
        self._phase = _HELD
        if len(data) > length:
            self._hold(data[length:])
            data = data[:length]
        return [received, BodyReceived(data), _ENDED] if length else [received, _ENDED]

    def _read(self, data: bytes) -> list[HttpEvent]:
        """Read on: what is buffered of a head, or more of a body."""
        events: list[HttpEvent] = []
        try:
            if self._phase is _HEAD:
                data = self._read_head(events)
            if self._phase is _BODY:
                self._read_body(data, events)
        except (RemoteProtocolError, h11.RemoteProtocolError) as error:
            fault = error if isinstance(error, RemoteProtocolError) else _translated(error)
            self.close()
            if not events:
                raise fault from None
            self._fault = fault
        return events

    def _read_head(self, events: list[HttpEvent]) -> bytes:
        """Take a head out of the buffer, if it is whole; return what came behind it."""
        buffer = self._buffer
        if not self._searched:
            # RFC 9112, 2.2: empty lines before the request line are to be ignored.
            while buffer.startswith(b"\r\n"):
                del buffer[:2]
            if self._half_line:
                return b""
        end = buffer.find(b"\r\n\r\n", max(0, self._searched - 3))
        length = len(buffer) if end < 0 else end + 4
        self._check_early(min(length, self._max_head))
        if length > self._max_head:
            raise LimitExceeded("max_head_bytes", self._max_head, status=431 if self.path else 414)
        if end < 0:
            self._searched = length
            return b""
        head, rest = bytes(buffer[:length]), bytes(buffer[length:])
        buffer.clear()
        received = read_usual(head) or _read_unusual(head, self._max_head)
        events.append(received)
        self._body = (
            LengthBody(received.head.content_length or 0)
            if received.head.content_length is not None or not received.head.has_body
            else ChunkedBody()
        )
        self._phase = _BODY
        self._searched = 0
        self.path = ""
        return rest

    def _check_early(self, length: int) -> None:
        """Refuse what can never become a request before its end has come: garbage must not wait for a deadline.

        Looks at each byte of the head once, however it is cut.

        Raises:
            RemoteProtocolError: 400, or 505 for a version that is not HTTP/1.
        """
        buffer, begin = self._buffer, self._searched
        if not begin and length and buffer[0] not in _TOKEN:
            raise RemoteProtocolError("this is not an HTTP request")
        if not self.path and (line_end := buffer.find(b"\r\n", max(0, begin - 1), length)) >= 0:
            line = bytes(buffer[:line_end])
            if b"\n" not in line:
                self.path = check_request_line(line)
        # RFC 9112, 2.2 lets a server take a bare LF for a line end; what stands before us may not, and then the two
        # disagree where a request ends.
        ends = buffer.count(b"\r\n", max(0, begin - 1), length)
        if buffer.count(b"\n", begin, length) != ends:
            raise RemoteProtocolError("a line of the head ends in a bare LF")

    def _read_body(self, data: bytes, events: list[HttpEvent]) -> None:
        body = self._body
        if body is None:
            raise LocalProtocolError("no request is being read")
        pieces: list[bytes] = []
        try:
            rest = body.receive_data(data, pieces)
        finally:
            if pieces:
                events.append(BodyReceived(b"".join(pieces)))
        if rest is not None:
            self._phase = _HELD
            self._body = None
            if rest:
                self._hold(rest)
            events.append(_ENDED)


def _read_unusual(data: bytes, max_head_bytes: int) -> HeadReceived:
    """Read a head by h11, within our rules.

    Raises:
        RemoteProtocolError: it is refused, by us or by h11.
    """
    check_head(data)
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=max_head_bytes)
    parser.receive_data(data)
    request = parser.next_event()
    if not isinstance(request, h11.Request):
        raise RemoteProtocolError("this is not a request head")
    fields = tuple((bytes(name), bytes(value)) for name, value in request.headers)
    method, target, version = bytes(request.method), bytes(request.target), bytes(request.http_version)
    return interpret(method.decode("ascii"), target.decode("ascii"), version.decode("ascii"), fields)


def _translated(error: h11.RemoteProtocolError) -> RemoteProtocolError:
    """Take an error of h11 over, but for the peer's bytes that it quotes: keys and prompts must not get into a log."""
    return RemoteProtocolError(_QUOTED.sub("", str(error)), status=error.error_status_hint)


class BodyFraming(Enum):
    """How the end of an answer's body is told (RFC 9112, 6.3)."""

    CHUNKED = "chunked"
    UNTIL_CLOSE = "until close"
    LENGTH = "length"
    NONE = "none"


class ResponseWriter:
    """Writes the answer to one request; a `tokenwire.core.contracts.Framing`.

    Args:
        method: the request's method; HEAD gets no body.
        version: the request's version; HTTP/1.0 gets no chunks.
        keep_alive: whether the peer lets the connection go on.

    Attributes:
        keep_alive: whether the connection may go on after this answer, as told in its head.
        body: the framing of the body, once the head has been written.
    """

    __slots__ = ("_method", "_version", "body", "keep_alive")

    def __init__(self, *, method: str = "GET", version: str = "1.1", keep_alive: bool = True) -> None:
        self._method = method
        self._version = version
        self.keep_alive = keep_alive
        self.body: BodyFraming | None = None

    def begin(self, head: ResponseHead) -> bytes:
        """Write the head of a streamed answer and choose its body's framing."""
        if self._method == "HEAD" or head.status in (204, 304):
            self.body = BodyFraming.NONE
        elif self._version == "1.1":
            self.body = BodyFraming.CHUNKED
        else:
            self.body = BodyFraming.UNTIL_CLOSE
            self.keep_alive = False
        framing = (("transfer-encoding", "chunked"),) if self.body is BodyFraming.CHUNKED else ()
        return encode_head(head.status, (*head.headers, *framing, *self._connection()))

    def frame(self, payload: bytes) -> bytes:
        """Wrap one payload in the body's framing."""
        if self.body is BodyFraming.CHUNKED:
            return chunk(payload)
        return payload if self.body is BodyFraming.UNTIL_CLOSE else b""

    def fold(self, template: Template) -> Folded:
        """Fold a template into the body's framing; after `begin`."""
        if self.body is BodyFraming.CHUNKED:
            return fold_chunked(template)
        return fold_bare(template if self.body is BodyFraming.UNTIL_CLOSE else _NOTHING)

    def end(self) -> bytes:
        """End the body: the last chunk (RFC 9112, 7.1) where there are chunks."""
        return b"0\r\n\r\n" if self.body is BodyFraming.CHUNKED else b""

    def reply(self, reply: Reply) -> bytes:
        """Write a whole answer with its length."""
        if reply.close:
            self.keep_alive = False
        no_content = reply.status in (204, 304)
        self.body = BodyFraming.NONE if no_content or self._method == "HEAD" else BodyFraming.LENGTH
        length = () if no_content else (("content-length", str(len(reply.body))),)
        head = encode_head(reply.status, (*reply.headers, *length, *self._connection()))
        return head + reply.body if self.body is BodyFraming.LENGTH else head

    def _connection(self) -> tuple[tuple[str, str], ...]:
        return () if self.keep_alive else (("connection", "close"),)


def encode_head(status: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Encode a status line and headers (RFC 9112, 4 and 5).

    Raises:
        ValueError: a name or value has CR, LF or NUL, or a value is not latin-1: refused, never altered.
    """
    line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n"
    text = "".join([line, *[f"{name}: {value}\r\n" for name, value in headers], "\r\n"])
    # Looked for in the whole, where there may be none but those just written: three scans and not two for each header.
    ends = len(headers) + 2
    if text.count("\n") != ends or text.count("\r") != ends or "\0" in text:
        name = next(name for name, value in headers if _find_unsafe(name) or _find_unsafe(value))
        raise ValueError(f"header {name!r} holds CR, LF or NUL")
    return text.encode("latin-1")


_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
