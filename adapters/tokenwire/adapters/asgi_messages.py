"""ASGI's messages for one request of HTTP: reading its head, and wording the answer's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final
from urllib.parse import quote

from tokenwire.core.contracts import Folded, Headers, Reply, RequestHead, ResponseHead, Template
from tokenwire.core.framing import fold_bare

__all__ = [
    "BareFraming",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "closing",
    "encode_headers",
    "head_of",
    "may_have_unannounced_body",
    "send_reply",
    "start_message",
]

# ASGI's own shapes: every message is a dict of values that depend on its type.
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_SERVERS: Final = frozenset({"date", "connection", "upgrade"})
_PATH_SAFE: Final = "/:@!$&'()*+,;=-._~"


class BareFraming:
    """No framing at all: the body's bytes as they are, the head beside them; a `tokenwire.core.contracts.Framing`.

    Args:
        method: the request's method; HEAD gets no body.

    Attributes:
        head: the answer's head, once it is decided, without what servers write themselves.
    """

    __slots__ = ("_method", "head")

    def __init__(self, method: str = "GET") -> None:
        self._method = method
        self.head: ResponseHead | None = None

    def begin(self, head: ResponseHead) -> bytes:
        """Keep the head of a streamed answer."""
        self.head = ResponseHead(head.status, _without_the_servers(head.headers))
        return b""

    def frame(self, payload: bytes) -> bytes:
        """Leave a payload as it is."""
        return payload

    def fold(self, template: Template) -> Folded:
        """Fold a template into nothing."""
        return fold_bare(template)

    def end(self) -> bytes:
        """Say nothing: the end is not in the body."""
        return b""

    def reply(self, reply: Reply) -> bytes:
        """Keep the head of a whole answer, with its length (RFC 9110, 8.6: none with 204 and 304), and give its body."""
        empty = reply.status in (204, 304)
        length: Headers = () if empty else (("content-length", str(len(reply.body))),)
        self.head = ResponseHead(reply.status, (*_without_the_servers(reply.headers), *length))
        return b"" if empty or self._method == "HEAD" else reply.body


def _without_the_servers(headers: Headers) -> Headers:
    """Leave out what the server before us says: the date, and what belongs to a connection (RFC 9113, 8.2.2)."""
    return tuple(header for header in headers if header[0] not in _SERVERS)


async def send_reply(reply: Reply, framing: BareFraming, send: Send, extra: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Send a whole answer, with headers besides its own."""
    data = framing.reply(reply)
    if framing.head is not None:
        await send(start_message(framing.head, extra))
        await send({"type": "http.response.body", "body": data, "more_body": False})


def closing(reply: Reply, scope: Scope) -> Iterable[tuple[bytes, bytes]]:
    """Headers that end the connection where a whole answer wants that."""
    # Over HTTP/2 and 3 a connection is not one request's to close, and the header is forbidden (RFC 9113, 8.2.2).
    return ((b"connection", b"close"),) if reply.close and _is_http1(scope) else ()


def start_message(head: ResponseHead, extra: Iterable[tuple[bytes, bytes]]) -> Message:
    """Word the answer's head, with headers besides its own."""
    return {"type": "http.response.start", "status": head.status, "headers": [*encode_headers(head.headers), *extra]}


def encode_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Make headers the pairs of bytes that ASGI wants."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def head_of(scope: Scope) -> RequestHead:
    """Read a scope's head: its path is what is left of it below the place where the application is mounted."""
    headers: tuple[tuple[bytes, bytes], ...] = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
    length = _content_length(headers)
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    return RequestHead(
        method=scope["method"],
        path=_path_of(scope),
        query=scope.get("query_string", b"").decode("latin-1"),
        headers=headers,
        has_body=chunked or bool(length),
        content_length=length,
    )


def _content_length(headers: tuple[tuple[bytes, bytes], ...]) -> int | None:
    found = [value for name, value in headers if name == b"content-length" and value.isdigit()]
    return int(found[0]) if found else None


def _path_of(scope: Scope) -> str:
    # Not `raw_path`: frameworks that mount change `path` and `root_path`, and leave it as it was. It only says whether a
    # slash at the end is the client's own: Litestar adds one.
    path: str = scope["path"]
    raw: bytes = scope.get("raw_path") or b"/"
    if path.endswith("/") and not raw.partition(b"?")[0].endswith(b"/"):
        path = path[:-1]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    path = path or "/"
    return path if path.isascii() and path.isprintable() and "%" not in path else quote(path, safe=_PATH_SAFE)


def may_have_unannounced_body(scope: Scope, head: RequestHead) -> bool:
    """Whether nothing in the head tells if a body follows, as in HTTP/2."""
    return head.content_length is None and not _is_http1(scope)


def _is_http1(scope: Scope) -> bool:
    version: str = scope.get("http_version", "1.1")
    return version.startswith("1")
