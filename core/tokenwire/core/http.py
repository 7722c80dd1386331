"""HTTP/1.1 messages on the server's side: request heads and bodies in, answers out.

h11 parses the heads and bodies, one h11 connection a request. It is kept away from three things that it would get wrong
for us: it accepts bare LF, obs-fold, Content-Length beside Transfer-Encoding, and Transfer-Encoding in HTTP/1.0, so every
head is checked before h11 sees it; it buffers without bound while a response runs, so pipelined bytes are held here, up to
a limit; and it hides the end of input while paused, so the end of input never goes through it.

The writer keeps its own body framing (chunked, until close, length, none), because tokens are written past h11.
"""

from __future__ import annotations

import re
from enum import Enum
from http import HTTPStatus
from typing import Final

import h11
from msgspec import Struct

from .contracts import Folded, Reply, RequestHead, ResponseHead, Template
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

_REQUEST_LINE: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32} [\x21-\x7e]+ HTTP/1\.[01]")
_CR: Final = 0x0D
_OTHER_VERSION: Final = re.compile(rb"[^ ]+ [^ ]+ HTTP/(?!1\.[01])[0-9](?:\.[0-9])?")
_TOKEN: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_QUOTED: Final = re.compile(r""":? (?:bytearray\()?b['"].*""", re.DOTALL)
_UNSAFE_IN_HEAD: Final = re.compile(r"[\r\n\x00]")


def _no_bytes(text: str) -> bytes:
    del text
    return b""


_NOTHING: Final = Template(b"", b"", _no_bytes)
"""What a body that must not be there makes of every token (HEAD, 204, 304)."""


class HeadReceived(Struct, frozen=True):
    """A request's head is whole."""

    head: RequestHead
    """The head."""
    version: str
    """1.0 or 1.1."""
    keep_alive: bool
    """Whether the peer lets the connection go on after this answer."""
    expects_continue: bool
    """Whether the peer waits for 100 Continue before it sends the body (RFC 9110, 10.1.1)."""


class BodyReceived(Struct, frozen=True):
    """A piece of the request's body."""

    data: bytes
    """The bytes, framing removed."""


class BodyEnded(Struct, frozen=True):
    """The request is whole; nothing more is read until `RequestReader.next_request`."""


HttpEvent = HeadReceived | BodyReceived | BodyEnded


class _Phase(Enum):
    HEAD = "head"
    BODY = "body"
    HELD = "held"
    CLOSED = "closed"


class RequestReader:
    """Reads one peer's requests, one at a time.

    Args:
        max_head_bytes: the longest head; a longer one is refused with 431.
        max_pipelined_bytes: the most that is held while an answer runs.

    Attributes:
        overflowed: more than `max_pipelined_bytes` came while an answer ran; they are gone, and the connection must end
            with that answer.
    """

    __slots__ = (
        "_buffer",
        "_fault",
        "_h11",
        "_line_seen",
        "_max_head",
        "_max_pipelined",
        "_phase",
        "_recent",
        "_searched",
        "overflowed",
    )

    def __init__(self, *, max_head_bytes: int = MAX_HEAD_BYTES, max_pipelined_bytes: int = MAX_PIPELINED_BYTES) -> None:
        self._max_head = max_head_bytes
        self._max_pipelined = max_pipelined_bytes
        self._buffer = bytearray()
        self._searched = 0
        self._line_seen = False
        self._phase = _Phase.HEAD
        self._h11: h11.Connection | None = None
        self._recent: bytearray | None = None
        self._fault: RemoteProtocolError | None = None
        self.overflowed = False

    @property
    def mid_request(self) -> bool:
        """Whether a request has begun and is not whole: an end of input now cuts it in half."""
        return self._phase is _Phase.BODY or (self._phase is _Phase.HEAD and bool(self._buffer) and not self._half_line)

    @property
    def _half_line(self) -> bool:
        """Whether there is a CR and no more: perhaps half an empty line, which is no beginning of a request."""
        return len(self._buffer) == 1 and self._buffer[0] == _CR

    @property
    def holding(self) -> bool:
        """Whether the last request is whole and `next_request` may be called."""
        return self._phase is _Phase.HELD

    def receive_data(self, data: bytes) -> list[HttpEvent]:
        """Take bytes, return what they complete of the present request.

        The same bytes give the same events and the same error however they are cut: where a read completes events and
        then breaks a rule, the events are returned and the next call, whichever it is, raises.

        Raises:
            RemoteProtocolError: the peer's bytes are not a request; its status answers it. The reader is closed.
            LocalProtocolError: the reader is closed.
        """
        self.check()
        if self._phase is _Phase.CLOSED:
            raise LocalProtocolError("the reader is closed")
        if self._phase is _Phase.HELD:
            self._hold(data)
            return []
        self._buffer += data
        return self._read()

    def next_request(self) -> list[HttpEvent]:
        """Go on to the next request, after the answer to the last: return what is there of it already.

        Raises:
            RemoteProtocolError: as `receive_data`.
            LocalProtocolError: the last request is not whole.
        """
        self.check()
        if self._phase is not _Phase.HELD:
            raise LocalProtocolError(f"no next request while in phase {self._phase.value}")
        self._phase = _Phase.HEAD
        self._searched = 0
        self._line_seen = False
        return self._read()

    def check(self) -> None:
        """Report the error of a read that returned events first.

        Raises:
            RemoteProtocolError: as `receive_data`, and once.
        """
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def close(self) -> None:
        """Take nothing more; what is held is dropped."""
        self._phase = _Phase.CLOSED
        self._fault = None
        self._h11 = None
        self._buffer = bytearray()

    def _hold(self, data: bytes) -> None:
        if len(self._buffer) + len(data) > self._max_pipelined:
            self.overflowed = True
            self._buffer.clear()
        elif not self.overflowed:
            self._buffer += data

    def _read(self) -> list[HttpEvent]:
        events: list[HttpEvent] = []
        try:
            if self._phase is _Phase.HEAD:
                self._read_head(events)
            if self._phase is _Phase.BODY:
                self._read_body(events)
        except (RemoteProtocolError, h11.RemoteProtocolError) as error:
            fault = error if isinstance(error, RemoteProtocolError) else _translated(error)
            self.close()
            if not events:
                raise fault from None
            self._fault = fault
        return events

    def _read_head(self, events: list[HttpEvent]) -> None:
        buffer = self._buffer
        if not self._searched:
            # RFC 9112, 2.2: empty lines before the request line are to be ignored.
            while buffer.startswith(b"\r\n"):
                del buffer[:2]
            if self._half_line:
                return
        end = buffer.find(b"\r\n\r\n", max(0, self._searched - 3))
        length = len(buffer) if end < 0 else end + 4
        self._check_early(min(length, self._max_head))
        if length > self._max_head:
            raise LimitExceeded("max_head_bytes", self._max_head, status=431)
        if end < 0:
            self._searched = length
            return
        head = bytes(buffer[:length])
        del buffer[:length]
        _check_head(head)
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=self._max_head)
        self._h11.receive_data(head)
        request = self._h11.next_event()
        if not isinstance(request, h11.Request):
            raise RemoteProtocolError("this is not a request head")
        received = _head_received(request)
        events.append(received)
        chunked = received.head.has_body and received.head.content_length is None
        self._recent = bytearray() if chunked else None
        self._phase = _Phase.BODY

    def _check_early(self, length: int) -> None:
        """Refuse what can never become a request before its end has come: garbage must not wait for a deadline.

        Looks at each byte of the head once, however it is cut.

        Raises:
            RemoteProtocolError: 400, or 505 for a version that is not HTTP/1.
        """
        buffer, begin = self._buffer, self._searched
        if not begin and length and buffer[0] not in _TOKEN:
            raise RemoteProtocolError("this is not an HTTP request")
        if not self._line_seen and (line_end := buffer.find(b"\r\n", max(0, begin - 1), length)) >= 0:
            self._line_seen = True
            line = bytes(buffer[:line_end])
            if b"\n" not in line:
                _check_request_line(line)
        # RFC 9112, 2.2 lets a server take a bare LF for a line end; what stands before us may not, and then the two
        # disagree where a request ends.
        ends = buffer.count(b"\r\n", max(0, begin - 1), length)
        if buffer.count(b"\n", begin, length) != ends:
            raise RemoteProtocolError("a line of the head ends in a bare LF")

    def _read_body(self, events: list[HttpEvent]) -> None:
        parser = self._h11
        if parser is None:
            raise LocalProtocolError("no request is being read")
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            if self._recent is not None:
                self._recent += data
                del self._recent[: -(self._max_head + len(data))]
            parser.receive_data(data)
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Data):
                events.append(BodyReceived(bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                rest = parser.trailing_data[0]
                if self._recent is not None:
                    _check_trailers(bytes(self._recent[: len(self._recent) - len(rest)]), len(event.headers))
                self._phase = _Phase.HELD
                self._h11 = self._recent = None
                self._hold(rest)
                events.append(BodyEnded())
                return
            else:
                return


def _translated(error: h11.RemoteProtocolError) -> RemoteProtocolError:
    """Take an error of h11 over, but for the peer's bytes that it quotes: keys and prompts must not get into a log."""
    return RemoteProtocolError(_QUOTED.sub("", str(error)), status=error.error_status_hint)


def _check_request_line(line: bytes) -> None:
    if _REQUEST_LINE.fullmatch(line):
        return
    if _OTHER_VERSION.fullmatch(line):
        raise RemoteProtocolError("only HTTP/1.0 and HTTP/1.1 are spoken here", status=505)
    raise RemoteProtocolError("the request line is malformed")


def _check_head(head: bytes) -> None:
    """Refuse what h11 would accept though intermediaries disagree about it, which is how requests are smuggled.

    Raises:
        RemoteProtocolError: 400.
    """
    if head.count(b"\r") != head.count(b"\r\n") or b"\x00" in head:
        raise RemoteProtocolError("a bare CR or NUL in the head")
    if b"\r\n " in head or b"\r\n\t" in head:
        raise RemoteProtocolError("a folded header line (obs-fold, RFC 9112, 5.2)")


def _check_trailers(data: bytes, fields: int) -> None:
    """Refuse what h11 would accept behind the last chunk; see `_check_head`.

    Args:
        data: a chunked body's last bytes, up to its end.
        fields: how many trailer fields h11 has found in them.

    Raises:
        RemoteProtocolError: 400.
    """
    # Each field has a line, and the empty line ends them. Where one is folded, a folded line is among the last of them.
    lines = data.split(b"\n")[-fields - 2 : -1]
    if any(line[-1:] != b"\r" or line[:1] in (b" ", b"\t") for line in lines):
        raise RemoteProtocolError("a line of the trailers is folded or ends in a bare LF")


def _head_received(request: h11.Request) -> HeadReceived:
    headers = tuple((bytes(name), bytes(value)) for name, value in request.headers)
    version = bytes(request.http_version).decode("ascii")
    length = _content_length(headers)
    chunked = _is_chunked(headers, version)
    if chunked and length is not None:
        # RFC 9112, 6.3: may be an attempt at smuggling.
        raise RemoteProtocolError("Content-Length beside Transfer-Encoding")
    path, _, query = _origin_form(bytes(request.target).decode("ascii")).partition("?")
    head = RequestHead(
        bytes(request.method).decode("ascii"),
        path,
        query,
        headers,
        chunked or bool(length),
        length,
    )
    tokens = _connection_tokens(headers)
    expects = any(name == b"expect" and value.lower() == b"100-continue" for name, value in headers)
    return HeadReceived(head, version, version == "1.1" and b"close" not in tokens, expects and version == "1.1")


def _content_length(headers: tuple[tuple[bytes, bytes], ...]) -> int | None:
    values = [value for name, value in headers if name == b"content-length"]
    if len(values) > 1 or (values and not values[0].isdigit()):
        raise RemoteProtocolError("Content-Length must be one number")
    return int(values[0]) if values else None


def _is_chunked(headers: tuple[tuple[bytes, bytes], ...], version: str) -> bool:
    values = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if values and version == "1.0":
        raise RemoteProtocolError("Transfer-Encoding in HTTP/1.0")
    if values and values != [b"chunked"]:
        raise RemoteProtocolError("the only transfer coding is chunked, once", status=501)
    return bool(values)


def _origin_form(target: str) -> str:
    """Reduce a target to path and query (RFC 9112, 3.2): absolute form to its path, the asterisk to itself."""
    if target.startswith("/") or target == "*":
        return target
    scheme, separator, rest = target.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        authority, slash, path = rest.partition("/")
        if authority and "?" not in authority:
            return slash + path if slash else "/"
    raise RemoteProtocolError("the request target is neither a path nor an http URL")


def _connection_tokens(headers: tuple[tuple[bytes, bytes], ...]) -> set[bytes]:
    values = b",".join(value for name, value in headers if name == b"connection")
    return {token.strip().lower() for token in values.split(b",")}


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
    lines = [f"HTTP/1.1 {status} {_phrase(status)}"]
    for name, value in headers:
        if _UNSAFE_IN_HEAD.search(name) or _UNSAFE_IN_HEAD.search(value):
            raise ValueError(f"header {name!r} holds CR, LF or NUL")
        lines.append(f"{name}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
