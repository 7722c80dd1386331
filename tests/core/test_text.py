"""Text from tokens: UTF-8 and surrogates under every split, stop strings against a model that sees the whole text."""

from __future__ import annotations

import sys
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.core.text import StopScanner, Utf8Assembler

if TYPE_CHECKING:
    from types import FrameType

TRICKY_BYTES = st.lists(
    st.sampled_from("é漢👩‍👩‍👧\ufeff\u2028a".encode()).map(lambda byte: bytes([byte]))
    | st.sampled_from([b"\xed\xa0\x80", b"\xf0\x90", b"\xe0\x80", b"\xc0", b"\xf4\x90", b"\xff", "👍🏽".encode(), b"a"])
    | st.binary(max_size=2),
    max_size=12,
).map(b"".join)
SURROGATES = st.text(st.sampled_from("a\ud83d\udc4d\udbff\udfffé漢😀"), max_size=10)
SAMPLES = ["👩‍👩‍👧‍👦", "日本語テキスト", "naïve café", "ab", "🇩🇪🏳️‍🌈", "\ufeffx\u2028"]


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Draws the pieces, some of them empty, of something that has this length."""
    borders = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    return list(pairwise([0, *borders, length]))


def assemble(pieces: list[bytes]) -> str:
    assembler = Utf8Assembler()
    return "".join(map(assembler.receive_data, pieces)) + assembler.flush()


def repair(pieces: list[str]) -> str:
    assembler = Utf8Assembler()
    return "".join(map(assembler.repair, pieces)) + assembler.flush()


@pytest.mark.parametrize("text", SAMPLES)
def test_every_split_of_good_text(text: str) -> None:
    data = text.encode()
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            assert assemble([data[:first], data[first:second], data[second:]]) == text
    assert assemble([bytes([byte]) for byte in data]) == text


@given(st.data(), TRICKY_BYTES)
def test_bytes_give_what_decoding_the_whole_gives(data: st.DataObject, raw: bytes) -> None:
    expected = raw.decode(errors="replace")
    assert assemble([raw]) == expected
    assert assemble([bytes([byte]) for byte in raw]) == expected
    assert assemble([raw[a:b] for a, b in data.draw(cuts(len(raw)))]) == expected


def test_only_the_incomplete_tail_is_held() -> None:
    assembler = Utf8Assembler()
    assert assembler.receive_data("aé".encode() + b"\xf0\x9f\x98") == "aé"
    assert assembler.receive_data(b"") == ""
    assert assembler.receive_data(b"\x80b") == "😀b"
    assert assembler.receive_data(b"\xe2\x82") == ""
    assert assembler.receive_data(b"A") == "\ufffdA", "replaced as soon as it is known to be broken"
    assert assembler.flush() == ""


def test_flush_replaces_the_tail_once_and_starts_anew() -> None:
    assembler = Utf8Assembler()
    assert assembler.receive_data(b"a\xf0\x9f\x98") == "a"
    assert assembler.flush() == "\ufffd"
    assert assembler.flush() == ""
    assert assembler.receive_data(b"\x80") == "\ufffd"


def well_formed(text: str) -> str:
    """Joins pairs and replaces what is alone, one character at a time."""
    result: list[str] = []
    rest = list(text)
    while rest:
        character = rest.pop(0)
        if "\ud800" <= character <= "\udbff" and rest and "\udc00" <= rest[0] <= "\udfff":
            low = ord(rest.pop(0)) - 0xDC00
            character = chr(0x10000 + ((ord(character) - 0xD800) << 10) + low)
        elif "\ud800" <= character <= "\udfff":
            character = "\ufffd"
        result.append(character)
    return "".join(result)


@given(st.data(), SURROGATES)
def test_surrogates_are_joined_or_replaced(data: st.DataObject, text: str) -> None:
    expected = well_formed(text)
    assert repair([text]) == expected
    assert repair(list(text)) == expected
    assert repair([text[a:b] for a, b in data.draw(cuts(len(text)))]) == expected


def test_only_a_high_surrogate_at_the_end_is_held() -> None:
    assembler = Utf8Assembler()
    assert assembler.repair("a\ud83d") == "a"
    assert assembler.repair("") == ""
    assert assembler.repair("\udc4db") == "👍b"
    assert assembler.repair("\udc4d") == "\ufffd"
    assert assembler.repair("\ud83d") == ""
    assert assembler.flush() == "\ufffd"
    assert assembler.flush() == ""


@pytest.mark.parametrize(
    ("pieces", "invalid", "truncated"),
    [
        (["é😀".encode()], False, False),
        ([b"\xf0\x9f", b"\x98\x80"], False, False),
        ([b"a\xf0\x9f\x98"], False, True),
        ([b"a\xff"], True, False),
        ([b"\xff\xe2\x82"], True, True),
        ([b"\xe2\x82", b"A"], True, False),
        (["\ud83d", "\ude00"], False, False),
        (["a\ufffd"], False, False),
        (["\ud83d\ude00\ufffd"], False, False),
        (["\ud83d"], False, True),
        (["\ud83d", "a"], True, False),
        (["\ude00"], True, False),
        ([b"\xe2\x82", "a"], True, False),
        (["\ud83d", b"a"], True, False),
    ],
)
def test_invalid_is_told_from_truncated(pieces: list[bytes | str], invalid: bool, truncated: bool) -> None:
    assembler = Utf8Assembler()
    for piece in pieces:
        if isinstance(piece, bytes):
            assembler.receive_data(piece)
        else:
            assembler.repair(piece)
    assert (assembler.invalid, assembler.holds) == (invalid, truncated)
    assert assembler.flush() == ("\ufffd" if truncated else "")
    assert assembler.invalid == invalid


@given(st.lists(TRICKY_BYTES | SURROGATES, max_size=6))
def test_bytes_and_text_may_alternate(pieces: list[bytes | str]) -> None:
    """A character does not go across such a border, and everything keeps its order."""
    assembler = Utf8Assembler()
    got = "".join(
        assembler.receive_data(piece) if isinstance(piece, bytes) else assembler.repair(piece) for piece in pieces
    )
    expected = ""
    for is_bytes, run in groupby(filter(None, pieces), key=lambda piece: isinstance(piece, bytes)):
        if is_bytes:
            expected += b"".join(piece for piece in run if isinstance(piece, bytes)).decode(errors="replace")
        else:
            expected += well_formed("".join(piece for piece in run if isinstance(piece, str)))
    assert got + assembler.flush() == expected


ALPHABET = st.sampled_from("ab<")
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


def winner(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the winning stop string begins, and which it is: ends first, then longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return end - len(longest), longest
    return None


def must_hold_from(text: str, stops: list[str]) -> int:
    """Where the earliest winner begins that any further text can still bring about."""
    starts = [len(text)]
    for stop in stops:
        for known in range(1, len(stop)):
            if text.endswith(stop[:known]):
                won = winner(text + stop[known:], stops)
                assert won is not None
                starts.append(won[0])
    return min(starts)


@given(st.data(), st.text(ALPHABET, max_size=24), STOPS)
def test_stop_scanner_against_the_model(data: st.DataObject, text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    seen = released = ""
    for start, end in data.draw(cuts(len(text)) | st.just([(at, at + 1) for at in range(len(text))])):
        seen += text[start:end]
        released += scanner.scan(text[start:end])
        won = winner(seen, stops)
        if won is None:
            assert scanner.stop is None
            assert released == seen[: must_hold_from(seen, stops)], "no more and no less than it must"
        else:
            assert scanner.stop == won[1]
            assert released == seen[: won[0]]
    rest = scanner.flush()
    won = winner(text, stops)
    assert released + rest == (text if won is None else text[: won[0]])
    assert scanner.flush() == ""


@pytest.mark.parametrize(
    ("stops", "text", "released", "stop"),
    [
        ([], "anything", "anything", None),
        (["END"], "the END of it", "the ", "END"),
        (["END"], "the E and the E of it", "the E and the E of it", None),
        (["abc", "b"], "xabc", "xa", "b"),
        (["ab", "abc"], "xabc", "x", "ab"),
        (["bc", "abc"], "xabc", "x", "abc"),
        (["aab"], "aaab", "a", "aab"),
        (["abab!", "ba?"], "ababa?", "aba", "ba?"),
        (["</s>", "\n\nHuman:"], "a\n\n\nHuman: b", "a\n", "\n\nHuman:"),
        (["👍🏽"], "a👍b👍🏽c", "a👍b", "👍🏽"),
        (["]", "^", "-", "\\", "["], "a\\b", "a", "\\"),
        (["stop", "stop"], "non-stop", "non-", "stop"),
    ],
)
def test_stop_strings_at_every_split(stops: list[str], text: str, released: str, stop: str | None) -> None:
    for cut in range(len(text) + 1):
        scanner = StopScanner(stops)
        assert scanner.scan(text[:cut]) + scanner.scan(text[cut:]) + scanner.flush() == released
        assert scanner.stop == stop


def test_nothing_comes_after_a_stop() -> None:
    scanner = StopScanner(["."])
    assert scanner.stop is None
    assert scanner.scan("a.b") == "a"
    assert scanner.scan("c") == ""
    assert scanner.flush() == ""
    assert scanner.scan("d") == ""
    assert scanner.stop == "."


def test_held_text_is_released_by_flush_and_scanning_starts_anew() -> None:
    scanner = StopScanner(["abc"])
    assert scanner.scan("xab") == "x"
    assert scanner.scan("") == ""
    assert scanner.flush() == "ab"
    assert scanner.scan("c") == "c"
    assert scanner.stop is None
    assert scanner.scan("abc") == ""
    assert scanner.stop == "abc"


def test_stop_strings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopScanner(["a", ""])
    with pytest.raises(TypeError, match="sequence"):
        StopScanner("abc")


def test_work_is_linear_in_the_text() -> None:
    """A text that nearly matches all the time: a scanner that starts over would compare 500 characters for each."""
    look_ups = 0

    def profile(_frame: FrameType, event: str, function: object) -> None:
        nonlocal look_ups
        look_ups += event == "c_call" and getattr(function, "__name__", "") == "get"

    scanner = StopScanner(["a" * 500 + "b", "a" * 499 + "c"])
    text = ("a" * 499 + "x" + "a" * 600) * 5
    sys.setprofile(profile)
    try:
        released = [scanner.scan(character) for character in text]
    finally:
        sys.setprofile(None)
    assert len(text) / 2 < look_ups <= 2 * len(text)
    assert "".join(released) + scanner.flush() == text
