"""The opening handshake of WebSocket, both sides (RFC 6455, section 4).

The server's side takes a head that is parsed already and gives headers, so that it fits HTTP/1.1 as much as ASGI. The
client's side makes a request's bytes and reads the answer's head by itself, for that is all of HTTP it needs.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha1
from typing import Final

from msgspec import Struct

from ._ws_deflate import Deflate, DeflateOptions, accept_offer, check_answer, offer
from .contracts import Headers, RequestHead
from .errors import LimitExceeded, LocalProtocolError, RemoteProtocolError

__all__ = ["MAX_ANSWER_BYTES", "Accepted", "ClientHandshake", "UpgradeRefused", "accept_upgrade"]

MAX_ANSWER_BYTES: Final = 32 * 1024
"""The head of the answer that a client takes; as much as a request's."""

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_VERSION: Final = "13"
_KEY_BYTES: Final = 16
_KEY: Final = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")  # 16 bytes in base64 (4.1); the last digit has 4 bits unused
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNSAFE: Final = re.compile(r"[\x00-\x20\x7f-\uffff]")
_UNSAFE_VALUE: Final = re.compile(r"[\r\n\x00]")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([1-9][0-9]{2})(?: [^\r\n]*)?")
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\x00]*)")
_END: Final = b"\r\n\r\n"


class Accepted(Struct, frozen=True):
    """The handshake has succeeded."""

    headers: Headers
    """A server's answer to send with status 101; on the client's side the answer that came."""
    subprotocol: str | None = None
    """What was chosen, of what the client offered; None for none."""
    deflate: Deflate | None = None
    """What was agreed on compression; None for none. For `WebSocketConnection`."""


class UpgradeRefused(RemoteProtocolError):
    """A request does not open a WebSocket; an HTTP error answers it.

    Attributes:
        status: the HTTP status.
        headers: what the answer must carry besides.
    """

    def __init__(self, message: str, *, status: int = 400, headers: Headers = ()) -> None:
        super().__init__(message, status=status)
        self.headers = headers


def accept_upgrade(
    head: RequestHead, *, subprotocols: Sequence[str] = (), deflate: DeflateOptions | None = None
) -> Accepted:
    """Answer a client's opening handshake (4.2).

    Nothing is judged here but the protocol: routes, keys, Host and Origin are the service's.

    Args:
        head: the request's, whose HTTP version was 1.1.
        subprotocols: those we speak; the first of the client's list that is among them is chosen.
        deflate: on what terms we compress; None for not at all.

    Returns:
        The answer's headers and what was agreed.

    Raises:
        UpgradeRefused: 405 for another method than GET; 426 for no upgrade to websocket or another version than 13;
            400 for anything malformed.
    """
    if head.method != "GET":
        raise UpgradeRefused("a WebSocket begins with GET", status=405, headers=(("allow", "GET"),))
    if "websocket" not in _tokens(head, b"upgrade") or "upgrade" not in _tokens(head, b"connection"):
        raise UpgradeRefused("this is a WebSocket", status=426, headers=_UPGRADE)
    if head.has_body:
        raise UpgradeRefused("a WebSocket's request has no body")
    version = _only(head, b"sec-websocket-version")
    if version != _VERSION:
        headers = (*_UPGRADE, ("sec-websocket-version", _VERSION))
        raise UpgradeRefused("the WebSocket version is 13", status=426 if version else 400, headers=headers)
    key = _only(head, b"sec-websocket-key")
    if key is None or _KEY.fullmatch(key) is None:
        raise UpgradeRefused("Sec-WebSocket-Key is not 16 bytes in base64")
    answer = [("upgrade", "websocket"), ("connection", "Upgrade"), ("sec-websocket-accept", _accept(key))]
    subprotocol = _choose(head, subprotocols)
    if subprotocol is not None:
        answer.append(("sec-websocket-protocol", subprotocol))
    agreed = None
    if deflate is not None and (chosen := _agree(head, deflate)) is not None:
        agreed, extension = chosen
        answer.append(("sec-websocket-extensions", extension))
    return Accepted(tuple(answer), subprotocol, agreed)


_UPGRADE: Final = (("upgrade", "websocket"), ("connection", "Upgrade"))


def _values(head: RequestHead, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip(" \t") for key, value in head.headers if key == name]


def _only(head: RequestHead, name: bytes) -> str | None:
    """Give the value of a header that may stand once (11.3)."""
    values = _values(head, name)
    if len(values) > 1:
        raise UpgradeRefused(f"more than one {name.decode()}")
    return values[0] if values else None


def _tokens(head: RequestHead, name: bytes) -> list[str]:
    listed = ",".join(_values(head, name)).split(",")
    return [token.strip(" \t").lower() for token in listed]


def _choose(head: RequestHead, ours: Sequence[str]) -> str | None:
    listed = ",".join(_values(head, b"sec-websocket-protocol")).split(",")
    offered = [name for part in listed if (name := part.strip(" \t"))]  # RFC 9110, 5.6.1: members may be empty
    if any(_TOKEN.fullmatch(name) is None for name in offered):
        raise UpgradeRefused("Sec-WebSocket-Protocol is not a list of tokens")
    return next((name for name in offered if name in ours), None)


def _agree(head: RequestHead, options: DeflateOptions) -> tuple[Deflate, str] | None:
    try:
        return accept_offer(",".join(_values(head, b"sec-websocket-extensions")), options)
    except RemoteProtocolError as error:
        raise UpgradeRefused(str(error)) from None


def _accept(key: str) -> str:
    """Compute Sec-WebSocket-Accept (4.2.2); the hash shows that a WebSocket was meant and keeps no secret."""
    return b64encode(sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()


class ClientHandshake:
    """A client's opening handshake (4.1): a request's bytes out, the answer's head in.

    Args:
        host: the Host header: name, and port where it is not the scheme's.
        target: path and query, in ASCII without spaces.
        nonce: 16 random bytes, fresh for each connection.
        subprotocols: what we offer, the best first.
        deflate: what compression we offer; None for none.
        headers: what the request carries besides, such as origin or authorization.

    Raises:
        ValueError: the nonce has another size, or what would stand in the head would break it.
    """

    __slots__ = ("_accept", "_answer", "_deflate", "_done", "_request", "_subprotocols", "trailing_data")

    def __init__(
        self,
        host: str,
        target: str = "/",
        *,
        nonce: bytes,
        subprotocols: Sequence[str] = (),
        deflate: DeflateOptions | None = None,
        headers: Headers = (),
    ) -> None:
        if len(nonce) != _KEY_BYTES:
            raise ValueError(f"a nonce has {_KEY_BYTES} bytes")
        if not target.startswith("/") or _UNSAFE.search(target) or not host or _UNSAFE.search(host):
            raise ValueError("host or target would break the request line or head")
        if any(_TOKEN.fullmatch(name) is None for name in subprotocols):
            raise ValueError("a subprotocol is a token")
        key = b64encode(nonce).decode()
        fields = [("host", host), *_UPGRADE, ("sec-websocket-key", key), ("sec-websocket-version", _VERSION)]
        if subprotocols:
            fields.append(("sec-websocket-protocol", ", ".join(subprotocols)))
        if deflate is not None:
            fields.append(("sec-websocket-extensions", offer(deflate)))
        fields += headers
        if any(_TOKEN.fullmatch(name) is None or _UNSAFE_VALUE.search(value) for name, value in fields):
            raise ValueError("a header would break the head")
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
        self._request = "\r\n".join((*lines, "\r\n")).encode("latin-1")
        self._accept = _accept(key)
        self._subprotocols = tuple(subprotocols)
        self._deflate = deflate
        self._answer = bytearray()
        self._done = False
        self.trailing_data = b""
        """What came behind the answer's head: the beginning of the peer's frames."""

    def data_to_send(self) -> list[bytes]:
        """Give the request, once."""
        request, self._request = self._request, b""
        return [request] if request else []

    def receive_data(self, data: bytes) -> Accepted | None:
        """Take bytes of the answer.

        Returns:
            None while its head is not whole; what was agreed when it is. Then `trailing_data` is to be given to the
            `WebSocketConnection` first.

        Raises:
            UpgradeRefused: the server answered with another status, which it carries, or not as the protocol asks:
                then the status is 502. The handshake is over; the connection is to be closed.
            LimitExceeded: the head is longer than `MAX_ANSWER_BYTES`. As before.
            LocalProtocolError: the handshake is over.
        """
        if self._done:
            raise LocalProtocolError("the handshake is over")
        searched = max(len(self._answer) - len(_END) + 1, 0)
        self._answer += data
        end = self._answer.find(_END, searched)
        if (end if end >= 0 else len(self._answer)) > MAX_ANSWER_BYTES:
            self._done = True
            raise LimitExceeded("max_answer_bytes", MAX_ANSWER_BYTES, status=502)
        if end < 0:
            return None
        self._done = True
        head, self.trailing_data = bytes(self._answer[:end]), bytes(self._answer[end + len(_END) :])
        self._answer.clear()
        return self._judge(_read_answer(head))

    def receive_eof(self) -> None:
        """Take the end of input.

        Raises:
            UpgradeRefused: the answer has not come. The handshake is over.
        """
        if not self._done:
            self._done = True
            raise UpgradeRefused("the connection ended in the handshake", status=502)

    def _judge(self, answer: RequestHead) -> Accepted:
        """Check an answer with status 101 (4.1)."""
        try:
            fault = self._fault(answer)
            deflate = check_answer(",".join(_values(answer, b"sec-websocket-extensions")), self._deflate)
            subprotocol = _only(answer, b"sec-websocket-protocol")
        except RemoteProtocolError as error:
            raise UpgradeRefused(str(error), status=502) from None
        if subprotocol is not None and subprotocol not in self._subprotocols:
            fault = "the server chose a subprotocol that was not offered"
        if fault is not None:
            raise UpgradeRefused(fault, status=502)
        headers = tuple((name.decode(), value.decode("latin-1")) for name, value in answer.headers)
        return Accepted(headers, subprotocol, deflate)

    def _fault(self, answer: RequestHead) -> str | None:
        if "websocket" not in _tokens(answer, b"upgrade") or "upgrade" not in _tokens(answer, b"connection"):
            return "the answer does not upgrade"
        if _only(answer, b"sec-websocket-accept") != self._accept:
            return "Sec-WebSocket-Accept is wrong"
        return None


def _read_answer(head: bytes) -> RequestHead:
    """Read an answer's head strictly: CRLF only, no folded lines.

    Raises:
        UpgradeRefused: another status than 101, or no HTTP/1.1.
    """
    first, *lines = head.split(b"\r\n")
    status = _STATUS_LINE.fullmatch(first)
    fields = [_FIELD.fullmatch(line) for line in lines]
    if status is None or None in fields:
        raise UpgradeRefused("the answer is not HTTP/1.1", status=502)
    headers = tuple((field[1].lower(), field[2].strip(b" \t")) for field in fields if field is not None)
    if status[1] != b"101":
        text = tuple((name.decode(), value.decode("latin-1")) for name, value in headers)
        raise UpgradeRefused(f"the server answered {status[1].decode()}", status=int(status[1]), headers=text)
    return RequestHead("", "", headers=headers)
