"""A response's head (RFC 9112, 4 to 6): strict, for what two readers of one answer disagree about can be used."""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

from .errors import RemoteProtocolError
from .http import BodyFraming

__all__ = ["ResponseReceived", "check_beginning", "parse_response_head"]

_BEGINNING: Final = b"HTTP/1."
_STATUS_LINE: Final = re.compile(rb"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")

Headers = tuple[tuple[bytes, bytes], ...]


class ResponseReceived(Struct, frozen=True):
    """A response's head is whole."""

    status: int
    """The status; never 1xx."""
    headers: Headers
    """Names in lower case, values without the spaces around them, in order."""
    version: str
    """1.0 or 1.1."""
    keep_alive: bool
    """Whether the peer lets the connection go on after this response (RFC 9112, 9.3)."""
    body: BodyFraming
    """How the end of its body is told."""
    content_length: int | None = None
    """The body's length where that is how its end is told."""

    def header(self, name: bytes) -> str | None:
        """Return the first value of a header as latin-1 text, or None; `name` in lower case."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return None


def check_beginning(buffer: bytearray, begin: int, end: int) -> None:
    """Refuse what can never become a response head, though its end may not have come.

    Args:
        buffer: the head so far.
        begin: up to where it has been checked before, so that each byte is looked at once, however it is cut.
        end: up to where to check it.

    Raises:
        RemoteProtocolError: it is no HTTP/1 response, or one of its lines ends in a bare LF.
    """
    if begin < len(_BEGINNING) and not buffer.startswith(_BEGINNING[: len(buffer)]):
        raise _malformed("this is not an HTTP/1 response")
    if buffer.count(b"\n", begin, end) != buffer.count(b"\r\n", max(0, begin - 1), end):
        raise _malformed("a line of the head ends in a bare LF")


def parse_response_head(head: bytes, method: str) -> ResponseReceived:
    """Read a head.

    Args:
        head: the status line and the fields, without the empty line at their end.
        method: the request's method, for HEAD has no body.

    Raises:
        RemoteProtocolError: it is malformed, or its body's end cannot be told beyond doubt.
    """
    first, *lines = head.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise _malformed("the status line is malformed")
    headers = tuple(map(_field, lines))
    version, status = match[1].decode(), int(match[2])
    connection = {word.strip().lower() for word in b",".join(_values(headers, b"connection")).split(b",")}
    keep_alive = b"close" not in connection and (version == "1.1" or b"keep-alive" in connection)
    body, length = _body_framing(headers, status, version, method)
    return ResponseReceived(status, headers, version, keep_alive and body is not BodyFraming.UNTIL_CLOSE, body, length)


def _field(line: bytes) -> tuple[bytes, bytes]:
    match = _FIELD.fullmatch(line)
    if match is None:
        if line[:1] in (b" ", b"\t"):
            raise _malformed("a folded header line (obs-fold, RFC 9112, 5.2)")
        raise _malformed("a header line is malformed")
    return match[1].lower(), match[2].rstrip(b" \t")


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]


def _body_framing(headers: Headers, status: int, version: str, method: str) -> tuple[BodyFraming, int | None]:
    """Say how the body's end is told (RFC 9112, 6.3)."""
    codings = _values(headers, b"transfer-encoding")
    lengths = _values(headers, b"content-length")
    if codings and lengths:
        raise _malformed("Content-Length beside Transfer-Encoding")
    if codings and version == "1.0":
        raise _malformed("Transfer-Encoding in HTTP/1.0")
    if codings and [coding.lower() for coding in codings] != [b"chunked"]:
        raise _malformed("the only transfer coding is chunked, once")
    if lengths and (len(lengths) > 1 or _LENGTH.fullmatch(lengths[0]) is None):
        raise _malformed("Content-Length must be one number")
    if method == "HEAD" or status < 200 or status in (204, 304):
        return BodyFraming.NONE, None
    if codings:
        return BodyFraming.CHUNKED, None
    return (BodyFraming.LENGTH, int(lengths[0])) if lengths else (BodyFraming.UNTIL_CLOSE, None)


def _malformed(message: str) -> RemoteProtocolError:
    return RemoteProtocolError(message, status=502)
