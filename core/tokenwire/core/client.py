"""The other side of the line: a request out, a response in, and the stream's events.

`ResponseReader` and `encode_request` are HTTP/1.1 as a client speaks it. `StreamClient` puts a dialect on top: one
generation request to one server, whose answer becomes events with exactly one terminal event, whatever comes. Nothing
here knows sockets: the owner sends `data_to_send`, hands in what it reads, and says when the input has ended.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Final

from msgspec.structs import replace

from ._chunked import MAX_CHUNK_LINE_BYTES, MAX_TRAILER_BYTES
from ._response_head import ResponseReceived
from ._response_reader import MAX_INTERIM_RESPONSES, MAX_RESPONSE_HEAD_BYTES, ResponseEvent, ResponseReader
from .contracts import Decoder, Dialect, Headers
from .dialects.base import is_retryable
from .errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from .events import TERMINALS, ErrorKind, Event, StreamEnd, StreamError, StreamTruncated, Terminal
from .http import BodyEnded, BodyReceived
from .request import GenerationRequest

__all__ = [
    "MAX_CHUNK_LINE_BYTES",
    "MAX_ERROR_BYTES",
    "MAX_INTERIM_RESPONSES",
    "MAX_RESPONSE_HEAD_BYTES",
    "MAX_RESULT_BYTES",
    "MAX_TRAILER_BYTES",
    "ResponseEvent",
    "ResponseReader",
    "ResponseReceived",
    "StreamClient",
    "encode_request",
    "retry_after_ns",
]

MAX_ERROR_BYTES: Final = 64 * 1024
"""How much of an error's body is read; an HTML error page is cut off there."""

MAX_RESULT_BYTES: Final = 32 * 1024 * 1024
"""The longest whole answer: as text or tool arguments 30 times what the largest models write."""

_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET: Final = re.compile(r"\*|/[\x21\x22\x24-\x7e]*")
_HOST: Final = re.compile(r"[\x21-\x7e]+")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_OWN_FIELDS: Final = frozenset({"connection", "content-length", "expect", "host", "te", "transfer-encoding", "upgrade"})
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_MEDIA_TYPE: Final = re.compile(r"[^;\s]*")
_SECONDS: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_MAX_WAIT_S: Final = 999_999_999
"""The longest wait that `_SECONDS` matches, for dates too: a time in nanoseconds stays within 64 bits."""
_SECOND: Final = 1_000_000_000
_MILLISECOND: Final = 1_000_000
_TERMINAL_TYPES: Final = frozenset(TERMINALS)


def encode_request(method: str, target: str, *, host: str, headers: Headers = (), body: bytes = b"") -> bytes:
    """Encode one whole request (RFC 9112, 3).

    Args:
        method: such as POST.
        target: the path with its query, percent-encoded.
        host: the Host field's value: a name or an address, with its port where that is not the scheme's.
        headers: what else the head says, in order. What concerns framing and connection is ours and may not be among it.
        body: the body, whole; its length is told.

    Raises:
        ValueError: something cannot be written so that it is read back unchanged: CR, LF or NUL anywhere, a space in a
            name or target, a character beyond latin-1; or a field that is ours.
    """
    if _METHOD.fullmatch(method) is None:
        raise ValueError("the method is no token")
    if _TARGET.fullmatch(target) is None:
        raise ValueError("the target is no percent-encoded path")
    if _HOST.fullmatch(host) is None:
        raise ValueError("the host has a space, or a character that is not ASCII")
    lines = [f"{method} {target} HTTP/1.1", f"host: {host}"]
    for name, value in headers:
        # The value is not shown: it may be a key.
        if _METHOD.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            raise ValueError(f"header {name!r} holds what no header may hold")
        if name.lower() in _OWN_FIELDS:
            raise ValueError(f"header {name!r} is not the caller's to write")
        lines.append(f"{name}: {value}")
    if body or method in _WITH_BODY:
        lines.append(f"content-length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class _Reading(Enum):
    """What an answer's body is read as."""

    NOTHING = "nothing"
    RESULT = "result"
    ERROR = "error"


class StreamClient:
    """One request in a dialect, and its answer as events; for one connection, which may have carried others before.

    Nothing that a server sends raises. An answer ends with exactly one terminal event: the stream's own; StreamTruncated
    where the input ended without one; StreamError where the server answered with an error, or with what is no answer of
    the dialect. What comes after the terminal event is dropped.

    A status that is no success gives a StreamError with that status, the body's words as far as they can be read, and
    `retry_after_ns`. A redirect is such an error too (code `redirect`): it is not followed, for the key would go along.
    Where the server answers with JSON instead of a stream, that is decoded as a whole answer. An encoded body is not read.

    Args:
        dialect: what the server speaks.
        request: what to ask for; bytes are sent as they are.
        target: the path to post to, such as /v1/chat/completions.
        host: the Host field's value.
        headers: further headers, such as authorization; they replace those that are sent by default.
        wall_s: Unix time, for a Retry-After that is a date.

    Raises:
        RequestRefused: as `Dialect.encode_request`.
        ValueError: as `encode_request`.

    Attributes:
        head: the response's head, once it has come.
        terminal: the terminal event, once it has been returned.
    """

    __slots__ = (
        "_broken",
        "_bytes_seen",
        "_collected",
        "_decoder",
        "_dialect",
        "_reader",
        "_reading",
        "_request",
        "_wall_s",
        "head",
        "terminal",
    )

    def __init__(
        self,
        dialect: Dialect,
        request: GenerationRequest | bytes,
        *,
        target: str,
        host: str,
        headers: Headers = (),
        wall_s: int = 0,
    ) -> None:
        body = request if isinstance(request, bytes) else dialect.encode_request(request)
        usual = {
            "accept": f"{dialect.media_type}, application/json",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "tokenwire",
        } | {name.lower(): value for name, value in headers}
        self._request = encode_request("POST", target, host=host, headers=tuple(usual.items()), body=body)
        self._dialect = dialect
        self._wall_s = wall_s
        self._reader = ResponseReader("POST")
        self._reading = _Reading.NOTHING
        self._decoder: Decoder[Event] | None = None
        self._collected = bytearray()
        self._bytes_seen = 0
        self._broken = False
        self.head: ResponseReceived | None = None
        self.terminal: Terminal | None = None

    @property
    def begun(self) -> bool:
        """Whether a byte of the answer has come."""
        return self._reader.begun

    @property
    def may_become_reusable(self) -> bool:
        """Whether only the end of the answer's body has to come, behind `terminal`, for the connection to be `reusable`."""
        return self._reader.may_become_reusable and self.terminal is not None

    @property
    def reusable(self) -> bool:
        """Whether the answer is whole and its connection may carry another request."""
        return self._reader.reusable and self.terminal is not None

    def data_to_send(self) -> bytes:
        """Return the whole request the first time, b"" from then on."""
        request, self._request = self._request, b""
        return request

    def receive_data(self, data: bytes) -> Sequence[Event]:
        """Take bytes, return the events they complete.

        Raises:
            LocalProtocolError: data after the end of input.
        """
        if self._decoder is not None:
            # The usual read in the middle of a stream.
            body = self._reader.receive_whole(data)
            if body is not None:
                self._bytes_seen += len(body)
                events = self._decoder.receive_data(body)
                if events and type(events[-1]) in _TERMINAL_TYPES:
                    self._end(events)
                return events
        out: list[Event] = []
        if self._broken:
            return out
        try:
            for event in self._reader.receive_data(data):
                self._take(event, out)
            self._reader.check()
        except RemoteProtocolError as error:
            self._broken = True
            self._end_error(out)
            self._fail(_malformed(error), out)
        return out

    def receive_eof(self) -> Sequence[Event]:
        """Take the end of input, return what it completes. A second call returns nothing."""
        out: list[Event] = []
        self._broken = False
        try:
            for event in self._reader.receive_eof():
                self._take(event, out)
        except RemoteProtocolError as error:
            self._truncate(str(error), out)
        return out

    def _take(self, event: ResponseEvent, out: list[Event]) -> None:
        match event:
            case ResponseReceived():
                self.head = event
                self._begin(event, out)
            case BodyReceived():
                self._take_body(event.data, out)
            case BodyEnded():
                self._end_body(out)

    def _begin(self, head: ResponseReceived, out: list[Event]) -> None:
        """Decide by the head what the body is."""
        codings = {value.lower() for name, value in head.headers if name == b"content-encoding"} - {b"identity"}
        found = _MEDIA_TYPE.match((head.header(b"content-type") or "").strip().lower())
        media_type = found[0] if found else ""
        if 300 <= head.status < 400:
            message = f"The server answered {head.status}, a redirect, and redirects are not followed."
            self._fail(StreamError(ErrorKind.SERVER, message, "redirect", status=head.status), out)
        elif not 200 <= head.status < 300:
            self._reading = _Reading.ERROR
            if codings:
                self._end_error(out)
        elif codings:
            coding = b", ".join(sorted(codings))[:32].decode("latin-1")
            self._fail(_not_as_asked(f"with content-encoding {coding!r}", "content_encoding"), out)
        elif not media_type or media_type == self._dialect.media_type:
            self._decoder = self._dialect.decoder()
        elif media_type == "application/json" or media_type.endswith("+json"):
            self._reading = _Reading.RESULT
        else:
            self._fail(_not_as_asked(f"with {media_type[:64]!r}", "content_type"), out)

    def _take_body(self, data: bytes, out: list[Event]) -> None:
        self._bytes_seen += len(data)
        if self._decoder is not None:
            self._extend(self._decoder.receive_data(data), out)
        elif self._reading is not _Reading.NOTHING:
            self._collected += data
            if len(self._collected) >= MAX_ERROR_BYTES:
                self._end_error(out)
            if len(self._collected) > MAX_RESULT_BYTES:
                self._fail(_malformed(LimitExceeded("MAX_RESULT_BYTES", MAX_RESULT_BYTES)), out)

    def _end_body(self, out: list[Event]) -> None:
        if self._decoder is not None:
            self._extend(self._decoder.receive_eof(), out)
        elif self._reading is _Reading.RESULT:
            self._extend(self._dialect.decode_result(bytes(self._collected)), out)
        self._end_error(out)

    def _end_error(self, out: list[Event]) -> None:
        """Where an error's body is being read, make an error of as much as has come: it has a status in any case."""
        if self._reading is _Reading.ERROR:
            self._fail(self._error_answer(bytes(self._collected[:MAX_ERROR_BYTES])), out)

    def _error_answer(self, body: bytes) -> StreamError:
        head = self.head
        if head is None:
            raise LocalProtocolError("an error's body before its head")
        error = replace(self._dialect.decode_error(head.status, body), status=head.status)
        wait = retry_after_ns(head, self._wall_s)
        if wait is not None:
            error = replace(error, retry_after_ns=wait)
        return replace(error, retryable=is_retryable(error))

    def _truncate(self, reason: str, out: list[Event]) -> None:
        """End an answer that HTTP says is not whole: what a stream's decoder makes of its end is no success then."""
        for event in self._decoder.receive_eof() if self._decoder is not None else ():
            if not isinstance(event, StreamEnd | StreamTruncated):
                self._extend((event,), out)
        self._end_error(out)
        self._fail(StreamTruncated(reason, self._bytes_seen), out)

    def _extend(self, events: Sequence[Event], out: list[Event]) -> None:
        if events and self.terminal is None:
            out += events
            if type(events[-1]) in _TERMINAL_TYPES:
                self._end(events)

    def _fail(self, terminal: Terminal, out: list[Event]) -> None:
        self._extend((terminal,), out)

    def _end(self, events: Sequence[Event]) -> None:
        last = events[-1]
        if isinstance(last, TERMINALS):
            self.terminal = last
        self._decoder = None
        self._reading = _Reading.NOTHING
        self._collected = bytearray()


def _malformed(error: RemoteProtocolError) -> StreamError:
    return StreamError(
        ErrorKind.SERVER, f"The server sent a malformed answer: {error}.", "malformed_response", status=502
    )


def _not_as_asked(how: str, code: str) -> StreamError:
    message = f"The server answered {how}, which was not asked for."
    return StreamError(ErrorKind.SERVER, message, code, status=502)


def retry_after_ns(head: ResponseReceived, wall_s: int) -> int | None:
    """Read how long a server asks to wait: retry-after-ms, or Retry-After in seconds or as a date (RFC 9110, 10.2.3).

    Args:
        head: the response's head.
        wall_s: Unix time, which a date is compared with.

    Returns:
        Nanoseconds, 0 for a date that has passed; None where it does not say, or not so that it can be read.
    """
    for name, unit in ((b"retry-after-ms", _MILLISECOND), (b"retry-after", _SECOND)):
        value = (head.header(name) or "").strip()
        if _SECONDS.fullmatch(value):
            return round(float(value) * unit)
    try:
        date = parsedate_to_datetime(head.header(b"retry-after") or "")
    except (ValueError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return min(max(0, round(date.timestamp()) - wall_s), _MAX_WAIT_S) * _SECOND
