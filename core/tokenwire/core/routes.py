"""What is found under which path: one table, and the answers that need no backend.

The service guards a request before it gets here; whatever generates goes back to `Service.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from msgspec import Struct

from . import exposition
from .contracts import Dialect, Reply, RequestHead
from .conversation import Conversation
from .dialects.openai_chat import OpenAIChat
from .dialects.plain import Plain
from .errors import RequestRefused
from .events import ErrorKind, StreamError

if TYPE_CHECKING:
    from .service import Exchange, Service

__all__ = ["CHAT", "PLAIN", "Route", "dialect_of", "routes_at"]

PLAIN: Final = Plain()
"""Our own dialect; errors of paths that belong to no dialect are worded in it."""
CHAT: Final = OpenAIChat()
"""OpenAI's Chat Completions."""


class Route(Struct, frozen=True):
    """What is found under a path and method."""

    answer: Callable[[Service, Route, RequestHead, int], Reply | Exchange | Conversation]
    """What answers."""
    dialect: Dialect
    """The language of its errors and answers."""
    generates: bool = False
    """Whether it runs a model: then the strictest rules hold."""
    id_prefix: str = ""
    """How its streams' ids begin."""
    guarded: bool = True
    """Whether Host and Origin are looked at."""


def _health(service: Service, route: Route, head: RequestHead, now: int) -> Reply:
    del route, now
    return _json(service, b'{"status":"ok"}', head)


def _ready(service: Service, route: Route, head: RequestHead, now: int) -> Reply:
    del now
    if service.draining:
        return service.refuse(route.dialect, service.shutting_down(), head)
    return _json(service, b'{"status":"ready"}', head)


def _page(service: Service, route: Route, head: RequestHead, now: int) -> Reply:
    del now
    if not service.options.page:
        error = StreamError(ErrorKind.NOT_FOUND, "There is no page here.", "not_found")
        return service.refuse(route.dialect, error, head)
    headers = (
        ("content-type", "text/html; charset=utf-8"),
        ("content-security-policy", "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"),
        ("x-content-type-options", "nosniff"),
    )
    return Reply(200, (*headers, *service.common(head)), service.options.page)


def _models(service: Service, route: Route, head: RequestHead, now: int) -> Reply:
    del now
    return _json(service, route.dialect.encode_models(service.models()), head)


def _model(service: Service, route: Route, head: RequestHead, now: int) -> Reply:
    del now
    try:
        card = service.model(unquote(head.path.removeprefix(_MODEL_PATH)))
    except RequestRefused as refused:
        return service.refuse(route.dialect, refused.error, head)
    return _json(service, CHAT.encode_model(card), head)


def _metrics(service: Service, route: Route, head: RequestHead, now: int) -> Reply:
    del now
    if not service.options.accounting:
        error = StreamError(ErrorKind.NOT_FOUND, "Latencies are not counted here.", "not_found")
        return service.refuse(route.dialect, error, head)
    headers = (("content-type", exposition.CONTENT_TYPE), *service.common(head))
    return Reply(200, headers, exposition.encode(exposition.families(service.accountant)))


def _json(service: Service, body: bytes, head: RequestHead) -> Reply:
    return Reply(200, (("content-type", "application/json"), *service.common(head)), body)


def _generate(service: Service, route: Route, head: RequestHead, now: int) -> Reply | Exchange:
    return service.exchange(route, head, now)


def _converse(service: Service, route: Route, head: RequestHead, now: int) -> Reply | Conversation:
    del now
    # The handshake is looked at more closely later.
    if not any(name == b"upgrade" and b"websocket" in value.lower() for name, value in head.headers):
        return service.no_upgrade(head)
    if service.draining:
        return service.refuse(route.dialect, service.shutting_down(), head, close=True)
    return Conversation(service, head)


def _readable(answer: Callable[[Service, Route, RequestHead, int], Reply], dialect: Dialect) -> Mapping[str, Route]:
    return dict.fromkeys(("GET", "HEAD"), Route(answer, dialect))


_CHAT_ROUTE: Final = Route(_generate, CHAT, generates=True, id_prefix="chatcmpl-")
_PLAIN_ROUTE: Final = Route(_generate, PLAIN, generates=True, id_prefix="tw")

_ROUTES: Final[Mapping[str, Mapping[str, Route]]] = {
    "/chat": {"POST": _PLAIN_ROUTE, "GET": _PLAIN_ROUTE},
    "/ws/chat": {"GET": Route(_converse, PLAIN, generates=True)},
    "/v1/chat/completions": {"POST": _CHAT_ROUTE},
    "/v1/models": _readable(_models, CHAT),
    "/healthz": dict.fromkeys(("GET", "HEAD"), Route(_health, PLAIN, guarded=False)),
    "/readyz": dict.fromkeys(("GET", "HEAD"), Route(_ready, PLAIN, guarded=False)),
    "/metrics": _readable(_metrics, PLAIN),
    "/": _readable(_page, PLAIN),
}
_MODEL_PATH: Final = "/v1/models/"
_MODEL_ROUTES: Final = _readable(_model, CHAT)


def dialect_of(path: str) -> Dialect:
    """Choose the language in which a path that is not routed is refused."""
    return CHAT if path.startswith("/v1/") else PLAIN


def routes_at(path: str) -> Mapping[str, Route]:
    """Find what a path has, by method; nothing where it is not routed."""
    return _MODEL_ROUTES if path.startswith(_MODEL_PATH) else _ROUTES.get(path, {})
