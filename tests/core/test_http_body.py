"""Request bodies: the chunked coding against h11, its bounds, and whatever way it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.strategies import splits

from tokenwire.core._body import BodyReader, LengthBody
from tokenwire.core._chunked import (
    FORBIDDEN_TRAILERS,
    MAX_CHUNK_LINE_BYTES,
    MAX_EXTENSION_BYTES,
    MAX_TRAILER_BYTES,
    ChunkedBody,
)
from tokenwire.core.errors import LimitExceeded, RemoteProtocolError

HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


def read(reader: BodyReader, pieces: Sequence[bytes]) -> tuple[bytes, bytes | None, str | None]:
    """Feed pieces; return the body, what came behind it or None while it goes on, and the error."""
    out: list[bytes] = []
    rest: bytes | None = None
    for piece in pieces:
        if rest is not None:
            rest += piece
            continue
        try:
            rest = reader.receive_data(piece, out)
        except RemoteProtocolError as error:
            return b"".join(out), None, f"{error.status} {error}"
    return b"".join(out), rest, None


def one_by_one(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def by_h11(data: bytes) -> tuple[bytes, bytes | None] | None:
    """Read a body by h11: the body, and what came behind it or None while it goes on; None where it objects."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(HEAD + data)
    server.next_event()
    body = b""
    try:
        while isinstance(found := server.next_event(), h11.Data):
            body += found.data
    except h11.RemoteProtocolError:
        return None
    return body, server.trailing_data[0] if isinstance(found, h11.EndOfMessage) else None


SIZES = st.sampled_from([b"%x", b"%X", b"0%x", b"000%X"])
EXTENSIONS = st.sampled_from([b"", b"", b"", b";a", b";a=b", b';a="b c"', b"; a=\xe9"])
TRAILERS = st.sampled_from([b"", b"", b"x: y\r\n", b"Digest: sha-256=x\r\nz:\r\n"])


@st.composite
def chunked_bodies(draw: st.DrawFn) -> bytes:
    """Draw a body in chunks, with what may follow it."""
    chunks = draw(st.lists(st.binary(min_size=1, max_size=20), max_size=5))
    lines = [draw(SIZES) % len(chunk) + draw(EXTENSIONS) + b"\r\n" + chunk + b"\r\n" for chunk in chunks]
    last = draw(st.sampled_from([b"0", b"000"])) + draw(EXTENSIONS) + b"\r\n"
    return b"".join(lines) + last + draw(TRAILERS) + b"\r\n" + draw(st.sampled_from([b"", b"GET /"]))


@given(chunked_bodies(), st.data())
def test_chunks_are_read_as_h11_reads_them_however_they_are_cut(raw: bytes, data: st.DataObject) -> None:
    body, rest, error = whole = read(ChunkedBody(), [raw])
    assert error is None
    assert (body, rest) == by_h11(raw)
    assert read(ChunkedBody(), one_by_one(raw)) == whole
    assert read(ChunkedBody(), data.draw(splits(raw))) == whole


@given(chunked_bodies(), st.data())
@example(b"1 \r\na\r\n0\r\n\r\n", None)
def test_damaged_chunks_are_never_read_where_h11_refuses(raw: bytes, data: st.DataObject | None) -> None:
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3)) if data else 0):
        assert data is not None
        at = data.draw(st.integers(0, len(damaged)))
        piece = data.draw(
            st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"0", b"f", b";", b" ", b"\x00", b":", b"g", b"-"])
        )
        damaged[at : at + data.draw(st.integers(0, 2))] = piece
    body, rest, error = whole = read(ChunkedBody(), [bytes(damaged)])
    assert read(ChunkedBody(), one_by_one(bytes(damaged))) == whole
    expected = by_h11(bytes(damaged))
    if error is None and rest is not None:
        assert (body, rest) == expected
    assert error is None or error.startswith("400 ")


def test_a_body_of_many_tiny_chunks() -> None:
    count = 50_000
    raw = b"1\r\na\r\n" * count + b"0\r\n\r\n"
    assert read(ChunkedBody(), [raw]) == (b"a" * count, b"", None)


BOUNDS: dict[str, tuple[bytes, int | None]] = {
    "size-of-15-digits": (b"0" * 14 + b"1\r\na\r\n0\r\n\r\n", None),
    "size-of-16-digits": (b"0" * 15 + b"1\r\na\r\n0\r\n\r\n", 400),
    "size-that-wraps-64-bits": (b"10000000000000001\r\na\r\n0\r\n\r\n", 400),
    "longest-line": (b"1;" + b"a" * (MAX_CHUNK_LINE_BYTES - 4) + b"\r\na\r\n0\r\n\r\n", None),
    "line-too-long": (b"1;" + b"a" * (MAX_CHUNK_LINE_BYTES - 3) + b"\r\na\r\n0\r\n\r\n", 400),
    "line-without-end": (b"1;" + b"a" * MAX_CHUNK_LINE_BYTES, 400),
    "extensions-together": ((b"1;" + b"a" * 1000 + b"\r\na\r\n") * (MAX_EXTENSION_BYTES // 1000 + 1), 413),
    "longest-trailers": (b"0\r\n" + b"x: y\r\n" * (MAX_TRAILER_BYTES // 6) + b"\r\n", None),
    "trailers-too-long": (b"0\r\n" + b"x: y\r\n" * (MAX_TRAILER_BYTES // 6 + 1) + b"\r\n", 431),
    "trailer-without-end": (b"0\r\nx: " + b"y" * MAX_TRAILER_BYTES, 431),
}


@pytest.mark.parametrize(("raw", "status"), BOUNDS.values(), ids=BOUNDS)
def test_bounds_of_the_chunked_coding(raw: bytes, status: int | None) -> None:
    _, rest, error = whole = read(ChunkedBody(), [raw])
    assert (error is None, rest is None) == (status is None, status is not None)
    assert error is None or error.startswith(f"{status} ")
    assert read(ChunkedBody(), one_by_one(raw)) == whole


def test_a_bound_is_told_by_its_name() -> None:
    with pytest.raises(LimitExceeded) as caught:
        ChunkedBody().receive_data(b"1" + b"a" * MAX_CHUNK_LINE_BYTES, [])
    assert (caught.value.limit, caught.value.maximum) == ("MAX_CHUNK_LINE_BYTES", MAX_CHUNK_LINE_BYTES)


@pytest.mark.parametrize("name", sorted(FORBIDDEN_TRAILERS))
def test_fields_that_may_not_come_late(name: bytes) -> None:
    _, rest, error = read(ChunkedBody(), [b"0\r\nok: 1\r\n" + name.title() + b": x\r\n\r\n"])
    assert rest is None
    assert error is not None
    assert error.startswith("400 ")


@given(st.binary(max_size=30), st.binary(max_size=10), st.data())
def test_a_length(body: bytes, behind: bytes, data: st.DataObject) -> None:
    expected = (body, behind, None)
    assert read(LengthBody(len(body)), [body + behind]) == expected
    pieces = data.draw(splits(body + behind)) or [b""]
    assert read(LengthBody(len(body)), pieces) == expected
    if body:
        assert read(LengthBody(len(body)), [body[:-1]]) == (body[:-1], None, None)
