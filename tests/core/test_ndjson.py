"""The newline-delimited JSON framing: round trips under every split, malformed lines, the last line, limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.core import ndjson
from tokenwire.core.errors import LimitExceeded, LocalProtocolError, MalformedData, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable


class Line(msgspec.Struct, frozen=True):
    text: str
    done: bool = False


TEXT = st.text(
    st.sampled_from('\r\n\0\u2028\u2029\u0085\v\f\x1c\ufeff😀"\\{}é') | st.characters(exclude_categories=["Cs"])
)
LINES = st.lists(st.builds(Line, TEXT, st.booleans()), max_size=5)
BROKEN_BYTES = st.lists(
    st.sampled_from([b'{"text":"a"}', b"\n", b"\n\n", b"\r\n", b" ", b"{", b'"', b"\xff", b"7", b"null", b"[" * 3000])
    | st.binary(max_size=3),
    max_size=12,
).map(b"".join)


def decode(pieces: Iterable[bytes], decoder: ndjson.Decoder[Line]) -> tuple[list[Line], str | None, bool]:
    values: list[Line] = []
    error: str | None = None
    try:
        for piece in pieces:
            values += decoder.receive_data(piece)
        values += decoder.receive_eof()
    except RemoteProtocolError as raised:
        error = f"{type(raised).__name__}: {raised}"
    assert decoder.receive_eof() == []
    return values, error, decoder.truncated


def whole(data: bytes) -> list[bytes]:
    return [data]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@st.composite
def split(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Cuts data anywhere, also into empty pieces."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(st.data(), LINES)
def test_encoded_is_read_back_under_every_split(data: st.DataObject, values: list[Line]) -> None:
    wire = b"".join(map(ndjson.encode, values))
    assert wire.count(b"\n") == len(values)
    expected = (values, None, False)
    assert decode([wire], ndjson.Decoder(Line)) == expected
    assert decode(single_bytes(wire), ndjson.Decoder(Line)) == expected
    assert decode(data.draw(split(wire)), ndjson.Decoder(Line)) == expected


@given(st.data(), BROKEN_BYTES, st.sampled_from([5, 14, 100_000]))
def test_splits_change_nothing(data: st.DataObject, stream: bytes, max_line_bytes: int) -> None:
    """Garbage gives values or the peer's error, the same ones however it is cut."""
    expected = decode([stream], ndjson.Decoder(Line, max_line_bytes=max_line_bytes))
    assert decode(single_bytes(stream), ndjson.Decoder(Line, max_line_bytes=max_line_bytes)) == expected
    assert decode(data.draw(split(stream)), ndjson.Decoder(Line, max_line_bytes=max_line_bytes)) == expected


def test_only_lf_ends_a_line() -> None:
    """CR is white space in JSON, and what else Python's str takes for a line end may stand in a string."""
    wire = '{"text":\r"a\u2028\u0085b"}\r\n'.encode()
    assert decode([wire], ndjson.Decoder(Line)) == ([Line("a\u2028\u0085b")], None, False)


def test_white_space_lines_are_skipped_and_counted() -> None:
    decoder = ndjson.Decoder(Line)
    assert decoder.receive_data(b'\n \t\r\n{"text":"a"}\n\r\n') == [Line("a")]
    with pytest.raises(MalformedData, match=r"^line 5: "):
        decoder.receive_data(b"{\n")


@pytest.mark.parametrize(
    "bad",
    [b"{", b"{}", b'{"text":1}', b"nothing", b"\x0b", b'{"text":"\xff"}', b"[" * 100_000, b'{"text":"a"}{"text":"b"}'],
    ids=["cut", "no text", "wrong type", "no JSON", "odd space", "no UTF-8", "deep", "two values"],
)
def test_malformed_line_closes_and_names_its_number(bad: bytes) -> None:
    decoder = ndjson.Decoder(Line)
    assert decoder.receive_data(b'{"text":"a"}\n' + bad + b'\n{"text":"b"}\n') == [Line("a")]
    with pytest.raises(MalformedData, match=r"^line 2: "):
        decoder.receive_eof()
    assert decoder.truncated
    with pytest.raises(LocalProtocolError):
        decoder.receive_data(b"\n")


def test_deep_json_of_no_given_type_is_malformed() -> None:
    with pytest.raises(MalformedData, match=r"^line 1: nested too deep$"):
        ndjson.Decoder(object).receive_data(b"[" * 100_000 + b"\n")


def test_last_line_without_newline() -> None:
    assert decode([b'{"text":"a"}\n{"text":"b"}'], ndjson.Decoder(Line)) == ([Line("a"), Line("b")], None, False)
    assert decode([b'{"text":"a"}\n{"text":"b"'], ndjson.Decoder(Line)) == ([Line("a")], None, True)
    assert decode([b'{"text":"a"}\n \r'], ndjson.Decoder(Line)) == ([Line("a")], None, False)


@pytest.mark.parametrize(("rest", "whole"), [(b"12", False), (b"12 ", True), (b"null", True), (b'"12"', True)])
def test_last_number_without_newline_may_have_been_cut(rest: bytes, whole: bool) -> None:
    decoder = ndjson.Decoder(object)
    assert decoder.receive_data(b"1\n" + rest) == [1]
    assert len(decoder.receive_eof()) == whole
    assert decoder.truncated is not whole


def test_line_limit() -> None:
    fits, too_long = b'{"text":"a"}\n', b'{"text":"ab"}\n'
    for cut in (whole, single_bytes):
        values, error, truncated = decode(cut(fits + fits + too_long + fits), ndjson.Decoder(Line, max_line_bytes=12))
        assert values == [Line("a")] * 2
        assert error == "LimitExceeded: more than max_line_bytes=12"
        assert truncated


def test_unterminated_line_is_given_up_at_the_limit() -> None:
    decoder = ndjson.Decoder(Line, max_line_bytes=1000)
    for _ in range(10):
        assert decoder.receive_data(b" " * 100) == []
    with pytest.raises(LimitExceeded):
        decoder.receive_data(b" ")
    assert decoder._lines.held == 0


def test_values_of_one_call_are_bounded() -> None:
    decoder = ndjson.Decoder(object, max_items_per_call=3)
    assert decoder.receive_data(b"1\n2\n3\n") == [1, 2, 3]
    assert decoder.receive_data(b"1\n2\n3\n4\n") == [1, 2, 3]
    with pytest.raises(LimitExceeded) as raised:
        decoder.receive_data(b"5\n")
    assert (raised.value.limit, raised.value.maximum) == ("max_items_per_call", 3)


def test_eof_is_idempotent_and_closes() -> None:
    decoder = ndjson.Decoder(Line)
    decoder.receive_data(b'{"text":"a"}')
    assert decoder.receive_eof() == [Line("a")]
    assert decoder.receive_eof() == []
    assert not decoder.truncated
    with pytest.raises(LocalProtocolError):
        decoder.receive_data(b"\n")


def test_what_is_not_one_line_of_utf8_is_refused() -> None:
    assert ndjson.encode(msgspec.Raw(b'{"a": 1}')) == b'{"a": 1}\n'
    with pytest.raises(ValueError, match="LF"):
        ndjson.encode({"a": msgspec.Raw(b'{\n"b": 1}')})
    with pytest.raises(UnicodeEncodeError):
        ndjson.encode({"a": "\ud83d"})
