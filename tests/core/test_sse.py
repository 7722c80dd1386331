"""The event stream framing: WHATWG vectors under every split, round trips of nasty text, limits, counted work."""

from __future__ import annotations

import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenwire.core import lines, sse
from tokenwire.core.errors import LimitExceeded, LocalProtocolError, MalformedData, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType
    from typing import Self

    from typing_extensions import Buffer


class Vector(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stream and what it means. `stream` is Latin-1: one character a byte."""

    name: str
    rule: str
    stream: str
    events: list[sse.ServerSentEvent]
    truncated: bool = False
    retry_ms: int | None = None
    last_event_id: str = ""
    invalid_utf8: bool = False

    @property
    def data(self) -> bytes:
        return self.stream.encode("latin-1")


VECTORS = msgspec.json.decode(
    (Path(__file__).parent.parent / "vectors" / "sse.json").read_bytes(), type=list[Vector], strict=True
)
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=[vector.name for vector in VECTORS])

# Pieces that matter to the grammar, and text that merely looks as if it did.
LINE_ENDS = ["\r", "\n", "\r\n", "\n\n", "\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c"]
ODD_TEXT = ["\0", "\ufeff", "😀", "\ud83d", "\udc4d", "data:", "event:", "id:", ":", " ", "1", "[DONE]", "é", "message"]
NASTY = st.lists(st.sampled_from([*LINE_ENDS, *ODD_TEXT]) | st.characters(), max_size=8).map("".join)

FIELDS = [b"data: ", b"data:", b"data", b"event: ", b"event:", b"id: ", b"id:", b"retry: ", b": "]
ODD_BYTES = [
    b"\xef\xbb\xbf",
    b"\xef",
    b"\xbb",
    b"\xf0\x9f\x98\x80",
    b"\xf0\x9f",
    b"\xff",
    b"\0",
    b" ",
    b"a",
    b"12",
    b"x:y",
]
STREAM_BYTES = st.lists(
    st.sampled_from([*FIELDS, *ODD_BYTES, b"\n", b"\n", b"\n\n", b"\n\n", b"\r", b"\r\n"]) | st.binary(max_size=3),
    max_size=30,
).map(b"".join)


class Outcome(msgspec.Struct, frozen=True):
    """All that a caller can see of a decoder once its input has ended."""

    events: list[sse.ServerSentEvent]
    error: str | None
    truncated: bool
    retry_ms: int | None
    last_event_id: str


def decode(pieces: Iterable[bytes], decoder: sse.Decoder | None = None) -> Outcome:
    decoder = decoder or sse.Decoder()
    events: list[sse.ServerSentEvent] = []
    error: str | None = None
    try:
        for piece in pieces:
            events += decoder.receive_data(piece)
        assert decoder.receive_eof() == []
    except RemoteProtocolError as raised:
        error = f"{type(raised).__name__}: {raised}"
    assert decoder.receive_eof() == []
    return Outcome(events, error, decoder.truncated, decoder.retry_ms, decoder.last_event_id)


def whole(data: bytes) -> list[bytes]:
    return [data]


def whole_when_idle(data: bytes) -> list[bytes]:
    """The first read decides about the byte order mark; only reads after it can take the fast ways."""
    return [b"\n", data]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@st.composite
def split(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Cuts data anywhere, also into empty pieces."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@each_vector
def test_vector_whole_and_byte_by_byte(vector: Vector) -> None:
    expected = Outcome(vector.events, None, vector.truncated, vector.retry_ms, vector.last_event_id)
    assert decode([vector.data]) == expected
    assert decode(single_bytes(vector.data)) == expected
    assert decode([b"", *(piece for byte in single_bytes(vector.data) for piece in (byte, b""))]) == expected


@each_vector
def test_vector_cut_in_two_anywhere(vector: Vector) -> None:
    expected = decode([vector.data])
    for cut in range(len(vector.data) + 1):
        assert decode([vector.data[:cut], vector.data[cut:]]) == expected


@each_vector
def test_vector_after_an_event_means_the_same(vector: Vector) -> None:
    """A decoder that is in the middle of a stream takes its fast ways; only the byte order mark is of the start."""
    if vector.data.startswith(b"\xef"):
        return
    expected = decode([vector.data]).events
    assert decode(whole_when_idle(vector.data)).events == expected


@each_vector
def test_vector_in_strict_mode(vector: Vector) -> None:
    outcome = decode([vector.data], sse.Decoder(strict=True))
    if not vector.data.startswith(b"\xef"):
        assert decode(whole_when_idle(vector.data), sse.Decoder(strict=True)) == outcome
    if vector.invalid_utf8:
        assert outcome.error is not None
        assert outcome.error.startswith("MalformedData")
        assert outcome.truncated
    else:
        assert outcome == decode([vector.data])


@given(st.data(), STREAM_BYTES, st.booleans(), st.sampled_from([3, 8, 20, 10_000]), st.sampled_from([2, 9, 10_000]))
def test_splits_change_nothing(
    data: st.DataObject, stream: bytes, strict: bool, max_line_bytes: int, max_event_bytes: int
) -> None:
    """Neither the events nor the error nor their order depend on how the input is cut."""

    def outcome(pieces: Iterable[bytes]) -> Outcome:
        return decode(
            pieces, sse.Decoder(max_line_bytes=max_line_bytes, max_event_bytes=max_event_bytes, strict=strict)
        )

    expected = outcome([stream])
    assert outcome(single_bytes(stream)) == expected
    assert outcome(data.draw(split(stream))) == expected
    if not stream.startswith(b"\xef"):
        assert outcome(whole_when_idle(stream)) == expected


def interpret(stream: bytes) -> list[tuple[str, str, str]]:
    """Reads a whole stream as the standard words it: decode, cut into lines, interpret; nothing else."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    events: list[tuple[str, str, str]] = []
    data = event = identity = ""
    for line in text.split("\n")[:-1]:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data:
                events.append((event or "message", data.removesuffix("\n"), identity))
            data = event = ""
        elif name == "data":
            data += value + "\n"
        elif name == "event":
            event = value
        elif name == "id" and "\0" not in value:
            identity = value
    return events


@given(STREAM_BYTES)
@example(b"data: \xe2\x82\r\n\r\n")
def test_decoder_does_what_the_standard_words(stream: bytes) -> None:
    expected = [sse.ServerSentEvent(*event) for event in interpret(stream)]
    assert decode([stream]).events == expected
    assert decode(whole_when_idle(stream.removeprefix(b"\xef\xbb\xbf"))).events == expected


@given(NASTY, st.none() | NASTY, st.none() | NASTY, st.none() | st.integers(-1, 10**16))
def test_encoded_is_read_back_or_refused(
    data: str, event: str | None, identity: str | None, retry_ms: int | None
) -> None:
    try:
        wire = sse.encode(data, event=event, id=identity, retry_ms=retry_ms)
    except ValueError:
        return
    decoder = sse.Decoder(strict=True)
    expected = sse.ServerSentEvent("message" if event is None else event, data, identity or "")
    assert decoder.receive_data(wire) == [expected]
    assert decoder.retry_ms == retry_ms
    # Not one byte of it leaks into the event that follows.
    assert decoder.receive_data(b"data: next\n\n") == [sse.ServerSentEvent("message", "next", identity or "")]


@given(NASTY)
def test_comment_is_one_line_that_changes_nothing(text: str) -> None:
    try:
        wire = sse.comment(text)
    except ValueError:
        return
    assert wire.count(b"\n") == 1
    assert wire.endswith(b"\n")
    assert b"\r" not in wire
    assert decode([b"data: a\n", wire, b"data: b\n\n", wire]) == Outcome(
        [sse.ServerSentEvent(data="a\nb")], None, truncated=False, retry_ms=None, last_event_id=""
    )


@given(NASTY.filter(lambda text: text != "" and "\r" not in text and text.isprintable()))
def test_what_can_be_read_back_is_not_refused(data: str) -> None:
    assert sse.Decoder().receive_data(sse.encode(data)) == [sse.ServerSentEvent(data=data)]


def test_wire_form() -> None:
    assert sse.encode("x") == b"data: x\n\n"
    assert sse.encode(" x") == b"data:  x\n\n"
    assert sse.encode("a\n\nb\n") == b"data: a\ndata: \ndata: b\ndata: \n\n"
    assert sse.encode("é", event="e", id="i", retry_ms=0) == "event: e\nid: i\nretry: 0\ndata: é\n\n".encode()
    assert sse.encode("x", id="") == b"id: \ndata: x\n\n"
    assert sse.encode("x", retry_ms=sse.MAX_RETRY_MS) == b"retry: 999999999999999\ndata: x\n\n"
    assert sse.comment("ping") == b": ping\n"


def event_of_type(event: str) -> bytes:
    return sse.encode("x", event=event)


def event_with_id(identity: str) -> bytes:
    return sse.encode("x", id=identity)


@pytest.mark.parametrize("bad", ["\r", "\n", "\r\n", "\0", "a\rb", "a\nb", "a\0b", "\ud83d"])
@pytest.mark.parametrize(
    "encode",
    [event_of_type, event_with_id, sse.comment],
)
def test_line_ends_and_nul_are_refused(encode: Callable[[str], bytes], bad: str) -> None:
    with pytest.raises(ValueError, match=r"has a CR, LF or NUL|surrogates not allowed"):
        encode(bad)


@pytest.mark.parametrize("bad", ["", "\r", "a\r\nb", "a\rb", "\udc00"])
def test_data_that_cannot_be_read_back_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"data is empty|data has a CR|surrogates not allowed"):
        sse.encode(bad)


@pytest.mark.parametrize("bad", ["\r", "\n", "\0", "a\r\nb"])
def test_bytes_are_held_to_the_same_rules(bad: str) -> None:
    raw = bad.encode()
    assert sse.encode("é\nb".encode(), event=b"e", id=b"i") == sse.encode("é\nb", event="e", id="i")
    assert sse.comment(b"ping") == sse.comment("ping")
    for refused in (partial(sse.encode, "x", event=raw), partial(sse.encode, "x", id=raw), partial(sse.comment, raw)):
        with pytest.raises(ValueError, match="has a CR, LF or NUL"):
            refused()
    with pytest.raises(ValueError, match=r"data is empty|data has a CR"):
        sse.encode(b"" if "\r" not in bad else raw)
    with pytest.raises(UnicodeDecodeError):
        sse.encode(b"\xff")


def test_empty_event_type_and_impossible_retry_are_refused() -> None:
    with pytest.raises(ValueError, match="event is empty"):
        sse.encode("x", event="")
    for retry_ms in (-1, sse.MAX_RETRY_MS + 1):
        with pytest.raises(ValueError, match="retry_ms"):
            sse.encode("x", retry_ms=retry_ms)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("cut", [whole, whole_when_idle, single_bytes])
def test_line_limit(cut: Callable[[bytes], list[bytes]], end: bytes) -> None:
    fits = b"data: 1234" + end + end
    too_long = b"data: 12345" + end + end
    assert len(decode(cut(fits + fits), sse.Decoder(max_line_bytes=10)).events) == 2
    outcome = decode(cut(fits + too_long + fits), sse.Decoder(max_line_bytes=10))
    assert outcome.events == [sse.ServerSentEvent(data="1234")]
    assert outcome.error == "LimitExceeded: more than max_line_bytes=10"


@pytest.mark.parametrize("cut", [whole, whole_when_idle, single_bytes])
def test_event_limit_counts_data_and_the_line_ends_between(cut: Callable[[bytes], list[bytes]]) -> None:
    fits = b"event: longer than it\ndata: 12\ndata\n: comment\ndata: 4\n\ndata: 12345\n\n"
    assert len(decode(cut(fits), sse.Decoder(max_event_bytes=5)).events) == 2
    for too_long in (b"data: 12\ndata:\ndata: 45\n\n", b"data: 123456\n\n", b"data\n" * 7):
        outcome = decode(cut(fits + too_long + fits), sse.Decoder(max_event_bytes=5))
        assert len(outcome.events) == 2
        assert outcome.error == "LimitExceeded: more than max_event_bytes=5"


def test_unterminated_line_is_given_up_at_the_limit() -> None:
    decoder = sse.Decoder(max_line_bytes=1000)
    for _ in range(10):
        assert decoder.receive_data(b"x" * 100) == []
    assert decoder._lines.held == 1000
    with pytest.raises(LimitExceeded) as raised:
        decoder.receive_data(b"x")
    assert (raised.value.limit, raised.value.maximum) == ("max_line_bytes", 1000)
    assert decoder._lines.held == 0


def test_retry_beyond_all_reason_is_ignored() -> None:
    digits = b"retry: 9\nretry: 1000000000000000\nretry: " + b"9" * 100_000 + b"\n"
    assert decode([digits]).retry_ms == 9


def test_events_of_one_call_are_bounded() -> None:
    """One read may give so many and no more; what it gives comes first, as before every fault."""
    for shape in (b"data\n\n", b"data: a\n\n", b"data\r\r"):
        for before in (b"", b"\n"):
            decoder = sse.Decoder(max_items_per_call=3)
            decoder.receive_data(before)
            assert len(decoder.receive_data(shape * 3)) == 3
            assert len(decoder.receive_data(shape * 4)) == 3
            with pytest.raises(LimitExceeded) as raised:
                decoder.receive_data(shape)
            assert (raised.value.limit, raised.value.maximum) == ("max_items_per_call", 3)


def test_256_mib_without_a_line_end_cost_no_more_than_the_limit() -> None:
    decoder = sse.Decoder(max_line_bytes=1 << 20)
    piece = b"x" * (1 << 16)
    refused = 0
    tracemalloc.start()
    try:
        for _ in range((256 << 20) // len(piece)):
            try:
                decoder.receive_data(piece)
            except (LimitExceeded, LocalProtocolError):
                refused += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused == 4096 - 16
    assert peak < 4 << 20


@pytest.mark.parametrize("splitter", [lines.LfSplitter, lines.AnyEndSplitter])
def test_splitter_gives_no_line_after_one_that_is_too_long(splitter: type[lines.LfSplitter]) -> None:
    buffer = splitter(max_line_bytes=3)
    buffer.check()
    assert buffer.receive_data(b"ab") == []
    assert buffer.receive_data(b"c\nabcd\nab\n") == [b"abc"]
    assert buffer.receive_data(b"ab\n") == []
    with pytest.raises(LimitExceeded):
        buffer.check()


def test_events_before_a_fault_come_first_and_the_fault_with_the_next_call() -> None:
    decoder = sse.Decoder(strict=True)
    assert decoder.receive_data(b"data: a\n\ndata: \xff\n\ndata: b\n\n") == [sse.ServerSentEvent(data="a")]
    with pytest.raises(MalformedData, match="not UTF-8"):
        decoder.receive_data(b"data: c\n\n")
    with pytest.raises(LocalProtocolError):
        decoder.receive_data(b"data: c\n\n")
    assert decoder.receive_eof() == []
    assert decoder.truncated


def test_fault_of_the_last_read_is_raised_by_eof() -> None:
    decoder = sse.Decoder(max_line_bytes=8)
    assert decoder.receive_data(b"data: a\n\ndata: too long") == [sse.ServerSentEvent(data="a")]
    with pytest.raises(LimitExceeded):
        decoder.receive_eof()
    assert decoder.receive_eof() == []


def test_eof_is_idempotent_and_closes() -> None:
    decoder = sse.Decoder()
    decoder.receive_data(b"data: a\n")
    assert not decoder.truncated
    for _ in range(2):
        assert decoder.receive_eof() == []
        assert decoder.truncated
    with pytest.raises(LocalProtocolError):
        decoder.receive_data(b"\n")


class Work:
    """Counts the bytes that a held buffer is given or is asked to look at."""

    done = 0


class CountedBuffer(bytearray):
    """A bytearray that counts whatever touches more of it than its length."""

    def __iadd__(self, other: Buffer) -> Self:  # type: ignore[override]  # as in typeshed's own bytearray
        Work.done += len(memoryview(other))
        return super().__iadd__(other)

    def __getattribute__(self, name: str) -> object:
        Work.done += len(self)
        return super().__getattribute__(name)

    def __bytes__(self) -> bytes:
        Work.done += len(self)
        return bytes(memoryview(self))


@pytest.mark.parametrize("splitter", [lines.LfSplitter, lines.AnyEndSplitter])
def test_long_line_byte_by_byte_is_linear(monkeypatch: pytest.MonkeyPatch, splitter: type[lines.LfSplitter]) -> None:
    monkeypatch.setattr(lines, "bytearray", CountedBuffer, raising=False)
    monkeypatch.setattr(Work, "done", 0)
    size = 20_000
    buffer = splitter()
    for _ in range(size):
        assert buffer.receive_data(b"x") == []
    assert Work.done <= size, "a held byte is looked at once, when it comes"
    assert buffer.receive_data(b"\n") == [b"x" * size]
    assert Work.done <= 2 * size + 1, "and copied once, when its line ends"


def count_calls(function: Callable[[bytes], object], argument: bytes) -> int:
    """Counts the calls of Python functions that one call makes, itself included."""
    calls = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(profile)
    try:
        function(argument)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    ("read", "calls"),
    [(b"data: {}\n\n", 1), (b"event: x\ndata: {}\n\n", 2), (b"data: {}\n\n" * 50, 2)],
    ids=["one data line", "event type and data line", "fifty events"],
)
def test_usual_reads_make_few_calls(read: bytes, calls: int) -> None:
    decoder = sse.Decoder()
    decoder.receive_data(read)
    assert count_calls(decoder.receive_data, read) == calls
