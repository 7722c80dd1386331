"""Fuzzing of every decoder: garbage gives items or the peer's error, the same however it is cut, and nothing else.

    make fuzz                        a minute for all targets
    python -m tests.fuzz --seconds 600 sse plain

Inputs that ever failed are kept in tests/corpus, a file a target, as Latin-1 text in JSON: tests/core/test_fuzz.py runs
them on every `make test`, and draws a few new ones. A failure found here is added there, as small as Hypothesis gets it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tokenwire.core import ndjson, sse
from tokenwire.core.contracts import Dialect
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.errors import LimitExceeded, MalformedData, RemoteProtocolError, RequestRefused
from tokenwire.core.events import Event, StreamTruncated, Terminal
from tokenwire.core.http import BodyEnded, BodyReceived, HttpEvent, RequestReader
from tokenwire.core.merge import merge_run
from tokenwire.core.text import StopScanner, Utf8Assembler

__all__ = ["ACCEPTED", "TARGETS", "Target", "check", "inputs", "kept", "main"]

CORPUS: Final = Path(__file__).parent / "corpus"

ACCEPTED: Final[dict[type[Exception], str]] = {
    LimitExceeded: "the input is larger than a named limit: that is what limits are for",
    MalformedData: "the input is not what the framing promises: NDJSON that is not JSON, strict SSE that is not UTF-8",
    RemoteProtocolError: "the input is no HTTP request: its status answers the peer",
    RequestRefused: "the body is no request of the dialect: the error is the answer",
}
"""Exceptions that are an answer to bad input, with the reason. Any other is a bug."""


class Target(NamedTuple):
    """A decoder, and the pieces that its inputs are drawn from."""

    decode: Callable[[Iterable[bytes]], object]
    """Gives all that a caller can see of a fresh decoder, but for its accepted error, which it lets through."""
    pieces: tuple[bytes, ...]
    one_shot: bool = False
    """It takes its input whole."""


def _drain(decoder: Any, pieces: Iterable[bytes]) -> list[Any]:
    """Decodes all pieces and the end; the error, if any, comes last."""
    items: list[Any] = []
    try:
        for piece in pieces:
            items += decoder.receive_data(piece)
        items += decoder.receive_eof()
    except tuple(ACCEPTED) as error:
        items.append((type(error), str(error)))
    return items


def _sse(*, strict: bool = False, limit: int = 1 << 20) -> Callable[[Iterable[bytes]], object]:
    def decode(pieces: Iterable[bytes]) -> object:
        decoder = sse.Decoder(strict=strict, max_line_bytes=limit, max_event_bytes=limit)
        return _drain(decoder, pieces), decoder.truncated, decoder.last_event_id, decoder.retry_ms

    return decode


def _ndjson(pieces: Iterable[bytes]) -> object:
    decoder: ndjson.Decoder[object] = ndjson.Decoder(object)
    return repr(_drain(decoder, pieces)), decoder.truncated


def _utf8(pieces: Iterable[bytes]) -> object:
    assembler = Utf8Assembler()
    text = "".join(map(assembler.receive_data, pieces))
    return text, assembler.invalid, assembler.holds, assembler.flush()


def _surrogates(pieces: Iterable[bytes]) -> object:
    """Bytes as text: each is a character, and some of them are surrogates."""
    assembler = Utf8Assembler()
    table = {0xD0 + at: 0xD83D + at for at in range(8)} | {0xD8 + at: 0xDE00 + at for at in range(8)}
    text = "".join(assembler.repair(piece.decode("latin-1").translate(table)) for piece in pieces)
    text.encode()
    return text, assembler.invalid, assembler.holds, assembler.flush()


def _stops(pieces: Iterable[bytes]) -> object:
    scanner = StopScanner(["</s>", "<|end|>", "\n\nHuman:", "sss", "s</"])
    text = "".join(scanner.scan(piece.decode("latin-1")) for piece in pieces)
    return text, scanner.stop, scanner.flush()


def _http(pieces: Iterable[bytes]) -> object:
    reader = RequestReader(max_head_bytes=512)
    events: list[HttpEvent] = []
    try:
        for piece in pieces:
            events += reader.receive_data(piece)
            while reader.holding:
                events += reader.next_request()
        reader.check()
    except tuple(ACCEPTED) as error:
        return _joined(events), str(error)
    return _joined(events), reader.mid_request


def _joined(events: Sequence[HttpEvent]) -> list[object]:
    """Joins what a body's bytes came in, which may depend on how they were cut."""
    joined: list[object] = []
    for event in events:
        if not isinstance(event, BodyReceived):
            joined.append("end" if isinstance(event, BodyEnded) else event)
        elif joined and isinstance(joined[-1], bytes):
            joined[-1] += event.data
        else:
            joined.append(event.data)
    return joined


def _dialect(dialect: Dialect) -> Callable[[Iterable[bytes]], object]:
    def decode(pieces: Iterable[bytes]) -> object:
        events: list[Event] = _drain(dialect.decoder(), pieces)
        assert sum(isinstance(event, Terminal) for event in events) == 1, "exactly one terminal event"
        assert isinstance(events[-1], Terminal), "and it is the last"
        return [_without_count(event) for event in merge_run(events)]

    return decode


def _without_count(event: Event) -> Event:
    """Forgets how many bytes had come, which after a [DONE] in the middle of a read depends on the read."""
    return StreamTruncated(event.reason) if isinstance(event, StreamTruncated) else event


def _request(dialect: Dialect) -> Callable[[Iterable[bytes]], object]:
    def decode(pieces: Iterable[bytes]) -> object:
        body = b"".join(pieces)
        try:
            parsed = dialect.parse_request(body, {}, frozenset())
        except tuple(ACCEPTED) as error:
            return str(error)
        dialect.encoder(parsed.request, "s-1")
        return repr(parsed)

    return decode


_SSE: Final = (
    b"data: ",
    b"data:",
    b"data",
    b"event: ",
    b"id: ",
    b"id:",
    b"retry: ",
    b": ",
    b"\n",
    b"\n\n",
    b"\r",
    b"\r\n",
    b"\r\n\r\n",
    b"\xef\xbb\xbf",
    b"\xef",
    b"\xf0\x9f\x98\x80",
    b"\xf0\x9f",
    b"\xff",
    b"\0",
    b"12",
)
_JSON: Final = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"null",
    b"true",
    b"1",
    b"-1",
    b"1e999",
    b'"a"',
    b"\\ud83d",
    b"\\",
    b"[" * 2000,
    b"9" * 400,
)
_PLAIN: Final = (
    b'data: {"token":"a"}\n\n',
    b'data: {"token":"',
    b'"}\n\n',
    b"data: [DONE]\n\n",
    b'"tool_call":{"index":0}',
    b'data: {"token":"","finish_reason":"stop"}\n\n',
    b'data: {"token":"","error":{"message":"x"}}\n\n',
    b'data: {"tool_call":{"index":',
    b"\nid: s.1",
)
_CHAT: Final = (
    b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n',
    b'data: {"choices":[{"delta":{',
    b"data: [DONE]\n\n",
    b'"tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":"{}"}}]',
    b'"finish_reason":"stop"',
    b'"usage":{"prompt_tokens":1}',
    b'data: {"error":{"message":"x"}}\n\n',
    b"}}]}\n\n",
    b"event: error\n",
    b'"index":-1',
    b'"logprobs":{"content":[{"token":"a","logprob":0}]}',
)
_HTTP: Final = (
    b"GET / HTTP/1.1\r\n",
    b"POST /x HTTP/1.1\r\n",
    b"Host: a\r\n",
    b"Content-Length: 3\r\n",
    b"\r\n",
    b"abc",
    b"\n",
    b"Transfer-Encoding: chunked\r\n",
    b"3\r\nabc\r\n",
    b"0\r\n\r\n",
    b"0\r\nX: y\r\n\r\n",
    b"3;x=y\r\n",
    b" ",
    b"\t",
    b":",
    b"HTTP/1.0\r\n",
    b"Connection: close\r\n",
    b"X" * 300,
    b"\r",
    b"\0",
)
_REQUEST: Final = (
    b'{"model":"m","messages":[{"role":"user","content":"x"}]',
    b'"prompt":"x"',
    b'"stream":true',
    b'"stop":["a"]',
    b'"max_tokens":',
    b'"n":',
    b'"temperature":',
    b'"content":[{"type":"text","text":"a"}]',
)

TARGETS: Final[dict[str, Target]] = {
    "sse": Target(_sse(), _SSE),
    "sse_strict": Target(_sse(strict=True), _SSE),
    "sse_limited": Target(_sse(limit=9), _SSE),
    "ndjson": Target(_ndjson, (*_JSON, b"\n", b"\r\n", b" ", b"\xff", b'{"a":1}\n')),
    "utf8": Target(
        _utf8, (*("é漢😀".encode()[at : at + 1] for at in range(9)), b"a", b"\xed\xa0", b"\xf4\x90", b"\xc0")
    ),
    "surrogates": Target(_surrogates, (b"\xd0", b"\xd8", b"\xd0\xd8", b"a", b"\xd8\xd0", b"\xff")),
    "stops": Target(_stops, (b"</s", b">", b"s", b"<", b"|", b"end", b"\n", b"\nHuman", b":", b"x")),
    "http": Target(_http, _HTTP),
    "plain": Target(_dialect(plain.DIALECT), (*_PLAIN, *_SSE, *_JSON)),
    "openai_chat": Target(_dialect(openai_chat.DIALECT), (*_CHAT, *_SSE, *_JSON)),
    "plain_request": Target(_request(plain.DIALECT), (*_REQUEST, *_JSON), one_shot=True),
    "openai_chat_request": Target(_request(openai_chat.DIALECT), (*_REQUEST, *_JSON), one_shot=True),
}


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Draws inputs: the target's own pieces and any bytes."""
    piece = st.sampled_from(target.pieces) | st.sampled_from(target.pieces) | st.binary(max_size=3)
    return st.lists(piece, max_size=24).map(b"".join)


def check(target: Target, data: bytes, cuts: Sequence[int] = ()) -> None:
    """Decodes an input whole, byte by byte and cut as given.

    Raises:
        AssertionError: the outcomes differ, or a rule of the target is broken.
        Exception: one that is not in ACCEPTED.
    """
    whole = target.decode([data])
    if target.one_shot:
        return
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    single = [data[at : at + 1] for at in range(len(data))]
    drawn = [data[begin:end] for begin, end in pairwise(edges)]
    for pieces in (single, drawn):
        assert target.decode(pieces) == whole, f"{data!r} cut into {pieces!r}"


def kept(name: str) -> list[bytes]:
    """Reads a target's corpus."""
    path = CORPUS / f"{name}.json"
    texts: list[str] = json.loads(path.read_text(encoding="ascii")) if path.exists() else []
    return [text.encode("latin-1") for text in texts]


def keep(name: str, data: bytes) -> None:
    """Adds an input to a target's corpus."""
    CORPUS.mkdir(exist_ok=True)
    texts = sorted({*(other.decode("latin-1") for other in kept(name)), data.decode("latin-1")})
    (CORPUS / f"{name}.json").write_text(json.dumps(texts, indent=1) + "\n", encoding="ascii")


def _fuzz(name: str, seconds: float) -> int:
    """Fuzzes one target for so long; returns how many inputs it took, or raises what it found."""
    target = TARGETS[name]
    count = 0
    failing = b""

    @settings(
        max_examples=2_000,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(inputs(target), st.lists(st.integers(0, 1 << 16), max_size=6))
    def attempt(data: bytes, cuts: list[int]) -> None:
        nonlocal count, failing
        count += 1
        try:
            check(target, data, cuts)
        except BaseException:
            failing = data
            raise

    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            attempt()
    except BaseException:
        if failing:
            keep(name, failing)
        raise
    return count


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description="Fuzz the decoders, each for its share of the time.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for all of them together")
    options = parser.parse_args()
    names: list[str] = options.targets or list(TARGETS)
    for name in names:
        count = _fuzz(name, options.seconds / len(names))
        print(f"{name}: {count} inputs", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
