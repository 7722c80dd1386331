"""docs/latency.md says what the code says of the stream in its picture."""

from __future__ import annotations

from tests.latency_picture import PICTURE, TEXT, drawn, rows


def test_the_picture_is_what_the_code_draws() -> None:
    assert PICTURE.read_text(encoding="utf-8") == drawn(), "python -m tests.latency_picture"


def test_the_table_is_what_the_definitions_say() -> None:
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    first = lines.index(rows()[0])
    assert lines[first : first + len(rows())] == rows()
