"""Recordings: lines that are written, read back, and refused where they are broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.core import recording
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.errors import LimitExceeded, LocalProtocolError, MalformedData
from tokenwire.core.events import ChoiceEnd, StreamEnd, StreamStart, StreamTruncated, TextDelta
from tokenwire.core.recording import (
    MAX_READ_BYTES,
    MAX_READS,
    MAX_RECORDING_BYTES,
    MAX_TIME_NS,
    Read,
    Recorder,
    Recording,
    RecordingError,
    Step,
    decode_steps,
    parse_recording,
)

URL = "http://user:secret@localhost:8000/v1/chat/completions?key=secret#part"
HEADER = b'{"tokenwire_recording":1,"dialect":"plain"}\n'


End = Callable[[Recorder], bytes]


def eof_at(now: int) -> End:
    def end(made: Recorder) -> bytes:
        return made.receive_eof(now)

    return end


def failure_at(now: int, reason: str) -> End:
    def end(made: Recorder) -> bytes:
        return made.fail(reason, now)

    return end


def recorder() -> Recorder:
    return Recorder("plain", url=URL, request=b"{}", now=1_000, wall_s=1_790_000_000)


def written(*reads: tuple[int, bytes], end: End | None = None) -> bytes:
    made = recorder()
    lines = [made.begin(), *(made.receive_data(data, 1_000 + t_ns) for t_ns, data in reads)]
    return b"".join([*lines, b"" if end is None else end(made)])


def test_a_recording_reads_as_its_page_says() -> None:
    wrote = written((5, b"data: \xe2\x82"), (7, b"\xac\n\n"), end=eof_at(1_009))
    assert [json.loads(line) for line in wrote.splitlines()] == [
        {
            "tokenwire_recording": 1,
            "dialect": "plain",
            "url": "http://localhost:8000/v1/chat/completions",
            "request_sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
            "started_at": 1_790_000_000,
        },
        {"t_ns": 5, "base64": "ZGF0YTog4oI="},
        {"t_ns": 7, "base64": "rAoK"},
        {"t_ns": 9, "end": "eof"},
    ]
    assert b"secret" not in wrote


def test_the_pages_example_is_a_recording() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recording.md").read_text()
    example = page.split("```json\n")[1].split("```")[0].encode()
    steps = decode_steps(parse_recording(example), plain.DIALECT)
    assert [step.t_ns for step in steps] == [201_000_000, 221_500_000, 242_000_000]
    assert [event.text for step in steps for event in step.events if isinstance(event, TextDelta)] == ["Two ", "owls"]
    assert steps[-1].events[-1] == StreamEnd()


@given(
    st.lists(
        st.tuples(st.integers(0, 10**12), st.binary(min_size=1, max_size=40) | st.text(min_size=1).map(str.encode))
    )
)
def test_what_is_written_is_read_back(drawn: list[tuple[int, bytes]]) -> None:
    reads = sorted(drawn, key=lambda read: read[0])
    last = reads[-1][0] if reads else 0
    back = parse_recording(written(*reads, end=eof_at(1_000 + last)))
    assert back.reads == tuple(Read(*read) for read in reads)
    assert (back.end_ns, back.failure, back.header.dialect) == (last, None, "plain")


def test_a_long_read_is_several_lines_of_one_time_and_no_bytes_are_none() -> None:
    data = bytes(range(256)) * (MAX_READ_BYTES // 256) + b"more"
    back = parse_recording(written((3, data), (4, b"")))
    assert [(read.t_ns, len(read.data)) for read in back.reads] == [(3, MAX_READ_BYTES), (3, 4)]
    assert b"".join(read.data for read in back.reads) == data


def test_a_clock_that_steps_back_stands_still() -> None:
    assert [read.t_ns for read in parse_recording(written((9, b"a"), (4, b"b"))).reads] == [9, 9]


def test_nothing_is_written_past_the_end() -> None:
    made = recorder()
    made.fail("broke", 1_000)
    with pytest.raises(LocalProtocolError):
        made.receive_eof(2_000)
    with pytest.raises(LocalProtocolError):
        made.fail("again", 2_000)
    with pytest.raises(LocalProtocolError):
        made.receive_data(b"x", 2_000)


@pytest.mark.parametrize(
    ("end", "failure"),
    [
        (eof_at(1_010), None),
        (failure_at(1_010, "the peer reset the connection"), "the peer reset the connection"),
        (None, "the recording has no end"),
    ],
)
def test_an_end_that_is_not_whole_is_never_a_success(end: End | None, failure: str | None) -> None:
    said = plain.DIALECT.encoder(recorder_request(), "s")
    wire = said.encode(StreamStart("s", "m", 0), 1) + said.encode(TextDelta("a"), 2)
    done = b'data: {"token":"","finish_reason":"stop"}\n\n'
    back = parse_recording(written((1, wire), (2, done), end=end))
    assert back.failure == failure
    steps = decode_steps(back, plain.DIALECT)
    assert [type(event) for event in steps[1].events][:1] == [ChoiceEnd]
    last = steps[-1].events[-1]
    assert last == (StreamEnd() if failure is None else StreamTruncated(failure, len(wire + done)))


def recorder_request() -> Any:
    return plain.DIALECT.parse_request(b'{"prompt":"x"}', {}, frozenset()).request


def test_a_stream_that_said_its_end_is_whole_though_the_connection_broke_after_it() -> None:
    wire = b'data: {"token":"a"}\n\ndata: [DONE]\n\n'
    steps = decode_steps(parse_recording(written((1, wire), end=failure_at(1_002, "reset"))), plain.DIALECT)
    assert steps[-1].events[-1] == StreamEnd()


def test_a_whole_answer_is_a_recording_too() -> None:
    body = b'{"id":"c","model":"m","choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
    made = parse_recording(written((4, body), end=eof_at(1_004)))
    events = (StreamStart("c", "m", 0, choices=0), TextDelta("a"), ChoiceEnd(), StreamEnd())
    assert decode_steps(made, openai_chat.DIALECT) == [Step(4, events)]


BROKEN: dict[str, tuple[bytes, int, str]] = {
    "an empty file": (b"", 1, "empty"),
    "no line": (b"{}", 1, "does not end"),
    "another file": (b"hello\n", 1, "no header"),
    "no version": (b'{"dialect":"plain"}\n', 1, "tokenwire_recording"),
    "another version": (b'{"tokenwire_recording":2,"dialect":"plain"}\n', 1, "version 2"),
    "a header of another type": (b"[]\n", 1, "no header"),
    "a cut line": (HEADER + b'{"t_ns":1,"da', 2, "does not end"),
    "no JSON": (HEADER + b'{"t_ns":1,"data":"a"}\noops\n', 3, "malformed"),
    "an empty line": (HEADER + b"\n", 2, "truncated"),
    "not UTF-8": (HEADER + b'{"t_ns":1,"data":"\xff"}\n', 2, ""),
    "no time": (HEADER + b'{"data":"a"}\n', 2, "t_ns"),
    "a time as text": (HEADER + b'{"t_ns":"1","data":"a"}\n', 2, "t_ns"),
    "a time that falls": (HEADER + b'{"t_ns":5,"data":"a"}\n{"t_ns":4,"data":"b"}\n', 3, "between 5"),
    "a time before the beginning": (HEADER + b'{"t_ns":-1,"data":"a"}\n', 2, "between 0"),
    "a time without end": (HEADER + b'{"t_ns":%d,"data":"a"}\n' % (MAX_TIME_NS + 1), 2, "MAX_TIME_NS"),
    "nothing in a line": (HEADER + b'{"t_ns":1}\n', 2, "one of"),
    "two things in a line": (HEADER + b'{"t_ns":1,"data":"a","base64":"YQ=="}\n', 2, "one of"),
    "no base64": (HEADER + b'{"t_ns":1,"base64":"?"}\n', 2, "base64"),
    "an unknown end": (HEADER + b'{"t_ns":1,"end":"later"}\n', 2, "eof or failed"),
    "an end with data": (HEADER + b'{"t_ns":1,"end":"eof","data":"a"}\n', 2, "eof or failed"),
    "a line after the end": (HEADER + b'{"t_ns":1,"end":"eof"}\n{"t_ns":1,"data":"a"}\n', 3, "after the end"),
    "a line that nests deep": (HEADER + b"[" * 100_000 + b"\n", 2, ""),
    "a long line": (HEADER + b'{"t_ns":1,"data":"%b"}\n' % (b"a" * 2**20), 2, "MAX_LINE_BYTES"),
    "many lines": (HEADER + b"\n" * (MAX_READS + 2), MAX_READS + 2, "MAX_READS"),
}


@pytest.mark.parametrize(("data", "line", "what"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_with_its_line(data: bytes, line: int, what: str) -> None:
    with pytest.raises(RecordingError, match=f"^line {line}: .*{what}") as refused:
        parse_recording(data)
    assert refused.value.line == line


def test_a_file_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_RECORDING_BYTES", 50)
    with pytest.raises(LimitExceeded):
        parse_recording(HEADER + b" " * 50)
    assert MAX_RECORDING_BYTES > 10**7


@given(
    st.binary(max_size=80)
    | st.lists(st.sampled_from([HEADER, b'{"t_ns":1,', b'"data":"a"', b"}", b"\n"])).map(b"".join)
)
def test_any_file_is_a_recording_or_refused(data: bytes) -> None:
    try:
        back = parse_recording(data)
    except MalformedData:
        return
    assert isinstance(back, Recording)
