"""`TokenStreamResponse`, a response for Starlette, FastAPI and Litestar. Importing this module imports Starlette."""

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUntypedBaseClass=false, reportUnknownArgumentType=false
# mypy: disable-error-code="import-not-found, misc, no-untyped-call"
# Starlette is not among the dependencies: whoever imports this module has it, and the type checkers do not.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from tokenwire.core.contracts import Dialect
from tokenwire.core.delivery import DeliveryOptions

from .asgi_carrier import answer
from .asgi_messages import Receive, Scope, Send, send_reply
from .embed import Asked, Embedded, Items

__all__ = ["TokenStreamResponse"]


class TokenStreamResponse(Response):
    """Tokens as a streamed answer in a dialect that clients speak.

    An error before the first token becomes the answer's status, a later one the dialect's error event. A client that
    leaves closes the iterable, before the response returns.

    Args:
        events: what makes the tokens: any sync or async iterable of str, bytes or events. A sync one runs in a thread.
        dialect: the answer's language, or its name.
        request: what the client asked for; see `tokenwire.adapters.embed.Asked`. With `"stream": false` in it the
            answer is whole.
        model: the model's name where the request says none.
        headers: besides the answer's own.
        background: Starlette's, run after the answer.
        delivery: how patient to be.

    Raises:
        ValueError: there is no dialect of that name.
    """

    def __init__(
        self,
        events: Items,
        *,
        dialect: Dialect | str = "openai_chat",
        request: Asked = None,
        model: str = "",
        headers: Mapping[str, str] | None = None,
        background: Any = None,
        delivery: DeliveryOptions | None = None,
    ) -> None:
        # Not the superclass's own: it would render a body, and count its length.
        self.status_code = 200
        self.media_type = None
        self.background = background
        self.init_headers(headers)
        self._embedded = Embedded(events, dialect, request, model=model, delivery=delivery)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate, and send what comes of it."""
        embedded = self._embedded
        embedded.asked_by(scope["method"], scope["path"])
        try:
            if embedded.refusal is not None:
                await send_reply(embedded.refusal, embedded.framing, send, self.raw_headers)
            else:
                carrier, action = embedded.open()
                await answer(carrier, action, receive, send, self.raw_headers)
        finally:
            await embedded.aclose()
        if self.background is not None:
            await self.background()
