"""What the engine calls back with, as events: OpenAI's chunks by our own decoder, and llama.cpp's errors by a table."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tokenwire.core.dialects.openai_chat import DIALECT
from tokenwire.core.events import TERMINALS, ErrorKind, Event, StreamError, StreamStart, TextDelta, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenwire.core.request import GenerationRequest

__all__ = ["Answer", "refusal_of"]

_ERROR: Final = b'{"error"'
_FIELD: Final = re.compile(r"Field '(?P<field>\w+)': (?:\[json\.[\w.]+\] )?(?P<what>.*)", re.DOTALL)
_SCHEMA: Final = re.compile(r"JSON schema error.*", re.DOTALL)


class Answer:
    """The answer to one request for one choice, called back chunk by chunk.

    Args:
        request: what was asked for.

    Attributes:
        ended: the one terminal event has come; whatever follows says nothing.
    """

    __slots__ = ("_decoder", "_top", "ended")

    def __init__(self, request: GenerationRequest) -> None:
        self._decoder = DIALECT.decoder()
        self._top = request.top_logprobs if request.logprobs else None
        self.ended = False

    def receive_data(self, data: bytes) -> Sequence[Event]:
        """Take what one call brought: one JSON text. What the stream is called is ours to say, so no StreamStart comes."""
        if self.ended:
            return ()
        if data.startswith(_ERROR) and (error := _error_of(data)) is not None:
            self.ended = True
            return (error,)
        return self._shown(self._decoder.receive_data(b"data: %b\n\n" % data))

    def receive_eof(self) -> Sequence[Event]:
        """Know that the engine has returned: StreamEnd if the answer is whole, else StreamTruncated."""
        return () if self.ended else self._shown(self._decoder.receive_eof())

    def _shown(self, events: Sequence[Event]) -> Sequence[Event]:
        if events and isinstance(events[0], StreamStart):
            events = events[1:]
        self.ended = bool(events) and isinstance(events[-1], TERMINALS)
        if self._top is None:
            return events
        return [self._trimmed(event, self._top) for event in events]

    @staticmethod
    def _trimmed(event: Event, top: int) -> Event:
        """Take away alternatives that were not asked for: for none the engine sends its default number of them."""
        if not isinstance(event, TextDelta) or event.logprobs is None:
            return event
        kept = tuple(TokenLogprob(one.token, one.logprob, one.bytes, one.top[:top]) for one in event.logprobs)
        return msgspec.structs.replace(event, logprobs=kept)


def refusal_of(error: ValueError, request: GenerationRequest) -> StreamError:
    """Word what the engine raised about a request that it cannot serve: a schema that it cannot follow, as a rule."""
    schema = _SCHEMA.search(str(error))
    if schema is None:
        return StreamError(ErrorKind.INVALID_REQUEST, f"The model cannot serve this request: {error}", "invalid_value")
    param = "response_format" if request.response_format else "tools"
    return StreamError(ErrorKind.INVALID_REQUEST, f"{schema[0]}.", "invalid_schema", param)


def _error_of(data: bytes) -> StreamError | None:
    """Read an error of a type that only llama.cpp has, or that it says more of; None leaves it to the decoder."""
    try:
        members = msgspec.json.decode(data, type=dict[str, dict[str, Any]])["error"]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    reader = _READERS.get(str(members.get("type")))
    return None if reader is None else reader(members)


def _read_overflow(members: dict[str, Any]) -> StreamError:
    had, holds = members.get("n_prompt_tokens"), members.get("n_ctx")
    message = f"The prompt has {had} tokens; the model's context holds {holds}, the answer's included."
    return StreamError(ErrorKind.INVALID_REQUEST, message, "context_length_exceeded", "messages")


def _read_invalid(members: dict[str, Any]) -> StreamError:
    message = str(members.get("message"))
    field = _FIELD.fullmatch(message)
    if field is None:
        return StreamError(ErrorKind.INVALID_REQUEST, message, "invalid_value")
    words = f"Invalid value for '{field['field']}': {field['what']}."
    return StreamError(ErrorKind.INVALID_REQUEST, words, "invalid_value", field["field"])


def _read_unsupported(members: dict[str, Any]) -> StreamError:
    return StreamError(ErrorKind.INVALID_REQUEST, str(members.get("message")), "unsupported_parameter")


_READERS: Final[dict[str, Callable[[dict[str, Any]], StreamError]]] = {
    "exceed_context_size_error": _read_overflow,
    "invalid_request_error": _read_invalid,
    "not_supported_error": _read_unsupported,
}
