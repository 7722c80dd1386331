"""plain.v1 on WebSocket: messages instead of server-sent events. Specified in docs/plain.md.

Without a subprotocol the messages are the tokens themselves, so that five lines of a browser's script can show them; as
`tokenwire.plain.v1` they are the objects that an event's data has elsewhere. Both end an answer with `[DONE]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from tokenwire.core.contracts import ParsedRequest, Template
from tokenwire.core.events import Event, StreamEnd, TextDelta
from tokenwire.core.framing import BORDER
from tokenwire.core.request import GenerationRequest
from tokenwire.core.text import repair_surrogates

from .base import escape_ascii, invalid_request
from .plain import Plain, PlainEncoder

__all__ = ["SUBPROTOCOL", "ObjectMessages", "PlainMessages", "TextMessages"]

SUBPROTOCOL: Final = "tokenwire.plain.v1"
"""The WebSocket subprotocol whose messages are JSON objects (RFC 6455, 1.9)."""

_DONE: Final = b"[DONE]"
_SPLIT_DONE: Final = b"[DONE" + BORDER + b"]"


class ObjectMessages(PlainEncoder):
    """Encodes one stream as JSON objects, one a message.

    Args:
        stream_id: not told; the answers of a connection come in the order of their prompts.
    """

    __slots__ = ()

    _done: ClassVar[bytes] = BORDER + _DONE

    def __init__(self, stream_id: str) -> None:
        super().__init__(stream_id)
        self._template = Template(b'{"token":', b"}", escape_ascii)

    @property
    def numbered(self) -> bool:
        """False: a connection that has gone cannot be resumed, so that no message shows a number."""
        return False

    @property
    def heartbeat(self) -> bytes:
        """Nothing: the connection itself sends ping frames."""
        return b""

    def greeting(self) -> bytes:
        """Nothing: a WebSocket does not ask again by itself."""
        return b""

    def template(self, choice: int) -> Template | None:
        """The message of a TextDelta."""
        return None if choice else self._template

    def _frame(self, data: bytes, number: int) -> bytes:
        del number
        return data


class TextMessages(ObjectMessages):
    """Encodes one stream as the tokens' text. A failure is not told here: it closes the connection.

    Args:
        stream_id: not told.
    """

    __slots__ = ()

    def __init__(self, stream_id: str) -> None:
        super().__init__(stream_id)
        self._template = Template(b"", b"", _escape)

    def encode(self, event: Event, number: int) -> bytes:
        """Encode any event; b"" where nothing is told."""
        del number
        if type(event) is TextDelta and not event.choice:
            return _escape(repair_surrogates(event.text))
        return _DONE if isinstance(event, StreamEnd) else b""


def _escape(text: str) -> bytes:
    """Encode a token; the text `[DONE]` becomes two messages, for the one that is exactly it ends an answer."""
    data = text.encode()
    return data if data != _DONE else _SPLIT_DONE


class PlainMessages(Plain):
    """The dialect on WebSocket.

    Args:
        encoder_type: how answers are worded.
    """

    def __init__(self, encoder_type: type[ObjectMessages]) -> None:
        self.encoder_type = encoder_type

    def parse_request(self, body: bytes, query: Mapping[str, str], honoured: frozenset[str]) -> ParsedRequest:
        """Read a request from a message; see `contracts.Dialect`.

        Raises:
            RequestRefused: it cannot be served, or asks for an answer that is not streamed.
        """
        parsed = super().parse_request(body, query, honoured)
        if not parsed.request.stream:
            raise invalid_request("Invalid value for 'stream': a WebSocket answers with a stream only.", "stream")
        return parsed

    def encoder(self, request: GenerationRequest, stream_id: str) -> ObjectMessages:  # noqa: ARG002  # one form for all
        """Make the encoder of one stream."""
        return self.encoder_type(stream_id)
