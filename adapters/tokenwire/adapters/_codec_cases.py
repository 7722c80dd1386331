"""What `tokenwire bench codec` times: for each piece of work the floor, tokenwire, and whichever peers are installed.

A contender's `start` makes a fresh encoder or decoder and is not timed. What it returns does the whole workload and
keeps every result, which `check` then compares with the workload before anything is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any, Final

import msgspec

from tokenwire.core import sse
from tokenwire.core.contracts import Dialect, Encoder, Template
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.events import StreamStart, TextDelta
from tokenwire.core.framing import Folded, fold_bare, fold_chunked
from tokenwire.core.request import GenerationRequest
from tokenwire.core.testing.workloads import (
    CHUNK_ID,
    CREATED,
    MODEL,
    STOPS,
    WORKLOADS,
    chat_events,
    http_chunk,
    openai_chunk,
    plain_events,
)
from tokenwire.core.text import StopScanner, Utf8Assembler
from tokenwire.core.websocket import Role, WebSocketConnection

__all__ = ["CASES", "FLOOR", "OWN", "Case", "CheckError", "Contender", "Work", "check"]

OWN: Final = "tokenwire"
FLOOR: Final = "floor"

TOKENS: Final = WORKLOADS["prose"]
TEXTS: Final = [token.text for token in TOKENS]
Work = Callable[[], Sequence[Any]]
"""Does the whole workload once and returns a result for each token."""


class CheckError(Exception):
    """A contender's results are not what the workload means: timing it would compare different things."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do a piece of work.

    Attributes:
        start: makes everything fresh.
        module: what must be installed for it.
    """

    start: Callable[[], Work]
    module: str = "tokenwire"

    @property
    def is_installed(self) -> bool:
        """Whether it can start here."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # not even the package that the module is in
            return False


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of work, done by several contenders.

    Attributes:
        title: what is done.
        floor: what the floor does, in words.
        contenders: by name, the floor first and tokenwire second.
        text_of: reads the token's text out of a contender's result, by means of nobody in the race; the floor's results
            are not looked into, for the floor need not be right.
    """

    title: str
    floor: str
    contenders: Mapping[str, Contender]
    text_of: Callable[[Any], str]


def check(case: Case, name: str) -> None:
    """Make sure that a contender's results carry the workload's texts.

    Raises:
        CheckError: they do not.
    """
    results = case.contenders[name].start()()
    if len(results) != len(TOKENS):
        raise CheckError(f"{case.title}: {name} gave {len(results)} results for {len(TOKENS)} tokens")
    # Joined, for a scanner may give a token's text with the next one.
    if name != FLOOR and "".join(map(case.text_of, results)) != "".join(TEXTS):
        raise CheckError(f"{case.title}: {name} gave other texts than the workload's")


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> Work:
    return lambda: [function(item) for item in items]


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------------------------- encoding


def _bare(payload: bytes) -> bytes:
    return payload


def _encoder_of(dialect: Dialect) -> Encoder:
    encoder = dialect.encoder(GenerationRequest(model=MODEL, messages=()), CHUNK_ID)
    encoder.encode(StreamStart(CHUNK_ID, MODEL, CREATED), 1)
    encoder.encode(TextDelta("first"), 2)
    return encoder


def _template_of(dialect: Dialect) -> Template:
    template = _encoder_of(dialect).template(0)
    if template is None:
        raise CheckError(f"{dialect.name} has no template for text")
    return template


def _own_encoder(dialect: Dialect, fold: Callable[[Template], Folded]) -> Callable[[], Work]:
    """From event to wire bytes, as a delivery does it."""

    def start() -> Work:
        encode = fold(_template_of(dialect)).encode
        events = [TextDelta(text) for text in TEXTS]
        return lambda: [encode(event.text, number) for number, event in enumerate(events, 3)]

    return start


def _concatenation(dialect: Dialect, frame: Callable[[bytes], bytes]) -> Callable[[], Work]:
    def start() -> Work:
        template = _template_of(dialect)
        payload = b"%b|%b%b" % (
            template.prefix,
            template.suffix,
            b"" if template.tail is None else b"7" + template.tail,
        )
        before, _, after = frame(payload).partition(b"|")
        return _each(lambda escaped: before + escaped + after, [token.escaped for token in TOKENS])

    return start


def _peer(make: Callable[[], Callable[[str], bytes]], frame: Callable[[bytes], bytes]) -> Callable[[], Work]:
    """A peer that makes an event of a token's text; whoever frames it does it as we would."""

    def start() -> Work:
        encode = make()
        return _each(encode, TEXTS) if frame is _bare else _each(lambda text: frame(encode(text)), TEXTS)

    return start


def _chunk_models() -> Callable[[str], str]:
    """Three models, one in another, as the usual servers have them."""
    create_model = _load("pydantic", "create_model")
    delta = create_model("Delta", content=(str, ...))
    choice = create_model("Choice", index=(int, ...), delta=(delta, ...), finish_reason=(str | None, None))
    names = {"id": str, "object": str, "created": int, "model": str, "choices": GenericAlias(list, (choice,))}
    chunk = create_model("Chunk", **{name: (kind, ...) for name, kind in names.items()})

    def dump(text: str) -> str:
        choices = [choice(index=0, delta=delta(content=text))]
        made = chunk(id=CHUNK_ID, object="chat.completion.chunk", created=CREATED, model=MODEL, choices=choices)
        dumped: str = made.model_dump_json()
        return dumped

    return dump


def _pydantic() -> Callable[[str], bytes]:
    dump = _chunk_models()
    return lambda text: f"data: {dump(text)}\n\n".encode()


def _fastapi() -> Callable[[str], bytes]:
    """What FastAPI's own event streams do to a model."""
    dump, form = _chunk_models(), _load("fastapi.sse", "format_sse_event")
    return lambda text: form(data_str=dump(text))


def _json() -> Callable[[str], bytes]:
    return lambda text: f"data: {json.dumps(openai_chunk(text))}\n\n".encode()


def _orjson() -> Callable[[str], bytes]:
    dumps: Callable[[object], bytes] = _load("orjson", "dumps")
    return lambda text: b"data: " + dumps(openai_chunk(text)) + b"\n\n"


def _sse_starlette() -> Callable[[str], bytes]:
    event = _load("sse_starlette.event", "ServerSentEvent")

    def encode(text: str) -> bytes:
        wire: bytes = event(data=json.dumps(openai_chunk(text))).encode()
        return wire

    return encode


def _plain_json() -> Callable[[str], bytes]:
    number = itertools.count(1)
    return lambda text: f"data: {json.dumps({'token': text})}\nid: {CHUNK_ID}.{next(number)}\n\n".encode()


def _plain_sse_starlette() -> Callable[[str], bytes]:
    event, number = _load("sse_starlette.event", "ServerSentEvent"), itertools.count(1)

    def encode(text: str) -> bytes:
        wire: bytes = event(data=json.dumps({"token": text}), id=f"{CHUNK_ID}.{next(number)}").encode()
        return wire

    return encode


def _plain_fastapi() -> Callable[[str], bytes]:
    form, number = _load("fastapi.sse", "format_sse_event"), itertools.count(1)
    return lambda text: form(data_str=json.dumps({"token": text}), id=f"{CHUNK_ID}.{next(number)}")


def _chat_text(wire: bytes) -> str:
    text: str = _data_of(wire)["choices"][0]["delta"]["content"]
    return text


def _plain_text(wire: bytes) -> str:
    """Read what plain.v1 wants of an event: ASCII, with an id."""
    if not wire.isascii() or b"id: %b." % CHUNK_ID.encode() not in wire:
        raise CheckError(f"{wire!r} is not plain.v1")
    text: str = _data_of(wire)["token"]
    return text


def _data_of(wire: bytes) -> Any:
    """Read the JSON between the first brace and the last, whatever stands around it."""
    return json.loads(wire[wire.index(b"{") : wire.rindex(b"}") + 1])


_Peer = tuple[Callable[[], Callable[[str], bytes]], str]
"""What makes a peer's encoder, and the module that it needs."""

_CHAT_PEERS: Final[Mapping[str, _Peer]] = {
    "orjson": (_orjson, "orjson"),
    "json": (_json, "json"),
    "pydantic": (_pydantic, "pydantic"),
    "sse-starlette": (_sse_starlette, "sse_starlette"),
    "FastAPI's SSE": (_fastapi, "fastapi.sse"),
}
_PLAIN_PEERS: Final[Mapping[str, _Peer]] = {  # not orjson: it cannot write ASCII
    "json": (_plain_json, "json"),
    "sse-starlette": (_plain_sse_starlette, "sse_starlette"),
    "FastAPI's SSE": (_plain_fastapi, "fastapi.sse"),
}
_FRAMINGS: Final = (("SSE", fold_bare, _bare), ("SSE in HTTP chunks", fold_chunked, http_chunk))
_DIALECTS: Final[tuple[tuple[Dialect, Mapping[str, _Peer], Callable[[bytes], str]], ...]] = (
    (openai_chat.DIALECT, _CHAT_PEERS, _chat_text),
    (plain.DIALECT, _PLAIN_PEERS, _plain_text),
)


def _encode_cases() -> Iterator[Case]:
    for (dialect, peers, text_of), (framing, fold, frame) in itertools.product(_DIALECTS, _FRAMINGS):
        contenders = {
            FLOOR: Contender(_concatenation(dialect, frame)),
            OWN: Contender(_own_encoder(dialect, fold)),
            **{name: Contender(_peer(make, frame), module) for name, (make, module) in peers.items()},
        }
        floor = "three byte strings joined, nothing escaped"
        yield Case(f"encode {dialect.name} as {framing}", floor, contenders, text_of)


# ---------------------------------------------------------------------------------------------------------- decoding


def _fed(receive: Callable[[bytes], Sequence[Any]], events: Sequence[bytes]) -> Work:
    return lambda: [item for event in events for item in receive(event)]


def _started(make: Callable[[], Any], events: Sequence[bytes]) -> Callable[[], Work]:
    """A decoder of ours in the middle of a stream: what its first event brings is behind it."""

    def start() -> Work:
        decoder = make()
        decoder.receive_data(events[0])
        return _fed(decoder.receive_data, events)

    return start


def _slice(events: Sequence[bytes]) -> Callable[[], Work]:
    return lambda: _each(lambda event: event[6:-2].decode(), events)


def _json_of_slice(events: Sequence[bytes]) -> Callable[[], Work]:
    decode = msgspec.json.Decoder().decode
    return lambda: _each(lambda event: decode(event[6 : event.index(b"\n")]), events)


class _Body:
    """A response as a decoder sees it, without a client around it."""

    def __init__(self, events: Sequence[bytes]) -> None:
        self.headers = {"content-type": "text/event-stream"}
        self._events = events

    def iter_text(self) -> Iterator[str]:
        return (event.decode() for event in self._events)

    def iter_bytes(self) -> Iterator[bytes]:
        return iter(self._events)

    def close(self) -> None:
        """Nothing to close."""


def _httpx_sse(events: Sequence[bytes]) -> Callable[[], Work]:
    def start() -> Work:
        source = _load("httpx_sse", "EventSource")
        return lambda: list(source(_Body(events)).iter_sse())

    return start


def _openai_sse(events: Sequence[bytes]) -> Callable[[], Work]:
    def start() -> Work:
        decoder = _load("openai._streaming", "SSEDecoder")
        return lambda: list(decoder().iter_bytes(iter(events)))

    return start


def _openai_chunks(events: Sequence[bytes]) -> Callable[[], Work]:
    """The loop that a user of openai-python writes, from the body's bytes on."""

    def start() -> Work:
        client = _load("openai", "OpenAI")(api_key="none", base_url="http://127.0.0.1:9")
        stream, chunk = _load("openai", "Stream"), _load("openai.types.chat", "ChatCompletionChunk")
        return lambda: list(stream(cast_to=chunk, response=_Body(events), client=client))

    return start


def _text_of_sse(event: Any) -> str:
    members = json.loads(event.data)
    text: str = members["token"] if "token" in members else members["choices"][0]["delta"]["content"]
    return text


def _text_of_chunk(chunk: Any) -> str:
    if isinstance(chunk, dict):
        chunk = _Chunk(chunk)  # pyright: ignore[reportUnknownArgumentType]  # JSON
    text: str = chunk.text if hasattr(chunk, "text") else chunk.choices[0].delta.content
    return text


class _Chunk:
    """An event of either dialect as JSON decodes it, with the text where an event of ours has it."""

    def __init__(self, members: dict[str, Any]) -> None:
        self.text: str = members["token"] if "token" in members else members["choices"][0]["delta"]["content"]


def _decode_cases() -> Iterator[Case]:
    chat, own = chat_events(TOKENS), plain_events(TOKENS)
    for title, events in (("SSE", chat), ("SSE with ids", own)):
        contenders = {
            FLOOR: Contender(_slice(events)),
            OWN: Contender(_started(sse.Decoder, events)),
            "httpx-sse": Contender(_httpx_sse(events), "httpx_sse"),
            "openai's decoder": Contender(_openai_sse(events), "openai"),
        }
        yield Case(f"decode {title}, an event a read", "a slice, decoded", contenders, _text_of_sse)
    yield Case(
        "decode openai_chat to typed events",
        "a slice, decoded from JSON to dicts",
        {
            FLOOR: Contender(_json_of_slice(chat)),
            OWN: Contender(_started(openai_chat.DIALECT.decoder, chat)),
            "openai-python": Contender(_openai_chunks(chat), "openai"),
        },
        _text_of_chunk,
    )
    yield Case(
        "decode plain to typed events",
        "a slice, decoded from JSON to dicts",
        {FLOOR: Contender(_json_of_slice(own)), OWN: Contender(_started(plain.DIALECT.decoder, own))},
        _text_of_chunk,
    )


# --------------------------------------------------------------------------------------------- WebSocket and text


def _ws_header(text: str) -> bytes:
    payload = text.encode()
    return b"\x81%c%b" % (len(payload), payload)


def _own_websocket(texts: Sequence[str]) -> Work:
    return _each(WebSocketConnection(Role.SERVER).send_text, texts)


def _websockets(texts: Sequence[str]) -> Work:
    frame, opcode = _load("websockets.frames", "Frame"), _load("websockets.frames", "Opcode").TEXT
    return _each(lambda text: frame(opcode, text.encode()).serialize(mask=False), texts)


def _wsproto(texts: Sequence[str]) -> Work:
    protocol = _load("wsproto.frame_protocol", "FrameProtocol")(False, [])
    return _each(protocol.send_data, texts)


def _websocket_case() -> Case:
    contenders = {
        FLOOR: Contender(lambda: _each(_ws_header, TEXTS)),
        OWN: Contender(lambda: _own_websocket(TEXTS)),
        "websockets": Contender(lambda: _websockets(TEXTS), "websockets"),
        "wsproto": Contender(lambda: _wsproto(TEXTS), "wsproto"),
    }
    return Case("encode WebSocket text frames", "two bytes of header and the text", contenders, _ws_text)


def _ws_text(frame: bytes) -> str:
    return bytes(frame[2:]).decode()


class _Buffer:
    """What a server does per token that neither assembles characters nor looks for stop strings."""

    __slots__ = ("_held", "_known")

    def __init__(self, stops: Iterable[str]) -> None:
        self._held = ""
        self._known = dict.fromkeys(stops, "")

    def take(self, piece: str) -> str:
        text = self._held + piece
        return self._known.get(text, text)


def _assemble_and_scan() -> Work:
    assemble, scan = Utf8Assembler().receive_data, StopScanner(STOPS).scan
    pieces = [text.encode() for text in TEXTS]
    return lambda: [scan(assemble(piece)) for piece in pieces]


def _text_case() -> Case:
    contenders = {
        FLOOR: Contender(lambda: _each(_Buffer(STOPS).take, TEXTS)),
        OWN: Contender(_assemble_and_scan),
    }
    title = "assemble UTF-8 and scan for 4 stops"
    return Case(title, "one method: a concatenation and a dict look-up", contenders, str)


CASES: Final = (*_encode_cases(), _websocket_case(), *_decode_cases(), _text_case())
"""Everything, in the order in which it is shown."""
