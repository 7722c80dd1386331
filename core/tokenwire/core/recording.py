"""Recordings: one answer of a server with its times, as lines of JSON; docs/recording.md is the format's page.

A recording holds the body's bytes as they were read, and when. Bytes and not events: they keep what a decoder drops
(heartbeats, cuts between reads, members that nobody knows yet, faults), a better decoder reads more from an old file, and
events of any dialect come from them at any time. Nothing of the request is kept but its hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from .contracts import Dialect
from .errors import LimitExceeded, LocalProtocolError, MalformedData
from .events import TERMINALS, Event, StreamTruncated

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_READS",
    "MAX_READ_BYTES",
    "MAX_RECORDING_BYTES",
    "MAX_TIME_NS",
    "VERSION",
    "Header",
    "Read",
    "Recorder",
    "Recording",
    "RecordingError",
    "Step",
    "decode_steps",
    "parse_recording",
]

VERSION: Final = 1
"""The format's version; a reader refuses others."""

MAX_RECORDING_BYTES: Final = 64 * 1024 * 1024
"""The longest recording: an hour of a stream of 60 tokens/s in OpenAI's chunks. It is held in memory."""

MAX_READS: Final = 1_000_000
"""The most reads of a recording: each costs an object."""

MAX_TIME_NS: Final = 10**15
"""The latest time, eleven days: a longer wait is a mistake, and a timer's number has an end."""

MAX_READ_BYTES: Final = 64 * 1024
"""The most bytes of one line's read; a longer one is written as several of the same time."""

MAX_LINE_BYTES: Final = 1024 * 1024
"""The longest line: JSON escapes a control character with six."""

_URL_SECRETS: Final = re.compile(r"(?<=://)[^/@?#]*@|[?#].*", re.DOTALL)


class RecordingError(MalformedData):
    """A file is no recording, or is broken.

    Attributes:
        line: the line's number, from 1.
    """

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"line {line}: {what}")
        self.line = line


class Header(Struct, frozen=True):
    """A recording's first line."""

    tokenwire_recording: int
    """The format's version."""
    dialect: str
    """What the server spoke: openai_chat or plain."""
    url: str = ""
    """Where the answer came from, without user, query and fragment: these may hold secrets."""
    request_sha256: str | None = None
    """The hash of the request's body, in hexadecimal digits: it tells requests apart and says nothing else."""
    started_at: int = 0
    """Unix time in seconds of the beginning, which is when the request was sent; times count from there."""


class Read(Struct, frozen=True):
    """Some bytes of the body, as they came."""

    t_ns: int
    """When they came."""
    data: bytes
    """The bytes."""


class Recording(Struct, frozen=True):
    """A whole recording."""

    header: Header
    """The first line."""
    reads: tuple[Read, ...]
    """The body."""
    end_ns: int
    """When the input ended."""
    failure: str | None = None
    """Why it ended, where it is not whole."""


class Step(Struct, frozen=True):
    """What the server said at one time."""

    t_ns: int
    """When it was said."""
    events: tuple[Event, ...]
    """What was said, at least one event."""


class _TextLine(Struct):
    t_ns: int
    data: str


class _BytesLine(Struct):
    t_ns: int
    base64: bytes


class _EndLine(Struct, omit_defaults=True):
    t_ns: int
    end: str
    reason: str | None = None


class _Line(Struct):
    t_ns: int
    data: str | None = None
    base64: bytes | None = None
    end: str | None = None
    reason: str | None = None


_encode: Final = msgspec.json.Encoder().encode
_decode_header: Final = msgspec.json.Decoder(Header).decode
_decode_line: Final = msgspec.json.Decoder(_Line).decode


class Recorder:
    """Writes a recording: each method returns the lines to append to the file.

    Args:
        dialect: the dialect's name.
        url: where the request goes.
        request: the request's body.
        now: monotonic nanoseconds when the request is sent.
        wall_s: Unix time in seconds then.
    """

    __slots__ = ("_begin", "_ended", "_header", "_last")

    def __init__(self, dialect: str, *, url: str, request: bytes, now: int, wall_s: int) -> None:
        digest = hashlib.sha256(request).hexdigest()
        self._header = Header(VERSION, dialect, _URL_SECRETS.sub("", url), digest, wall_s)
        self._begin = now
        self._last = 0
        self._ended = False

    def begin(self) -> bytes:
        """Write the header."""
        return _encode(self._header) + b"\n"

    def receive_data(self, data: bytes, now: int) -> bytes:
        """Write one read; empty bytes mean nothing.

        Raises:
            LocalProtocolError: the recording has ended.
        """
        t_ns = self._time(now)
        pieces = (data[at : at + MAX_READ_BYTES] for at in range(0, len(data), MAX_READ_BYTES))
        return b"".join(_encode(_read_line(t_ns, piece)) + b"\n" for piece in pieces)

    def receive_eof(self, now: int) -> bytes:
        """Write the end of a body that is whole as HTTP says.

        Raises:
            LocalProtocolError: the recording has ended.
        """
        return self._end(_EndLine(self._time(now), "eof"))

    def fail(self, reason: str, now: int) -> bytes:
        """Write the end of a body that is not whole.

        Args:
            reason: what went wrong.
            now: monotonic nanoseconds.

        Raises:
            LocalProtocolError: the recording has ended.
        """
        return self._end(_EndLine(self._time(now), "failed", reason))

    def _end(self, line: _EndLine) -> bytes:
        self._ended = True
        return _encode(line) + b"\n"

    def _time(self, now: int) -> int:
        if self._ended:
            raise LocalProtocolError("the recording has ended")
        self._last = max(self._last, now - self._begin)
        return self._last


def _read_line(t_ns: int, data: bytes) -> _TextLine | _BytesLine:
    """Write text as text, so that people can read it, and what is not UTF-8, such as half a character, in base64."""
    try:
        return _TextLine(t_ns, data.decode())
    except UnicodeDecodeError:
        return _BytesLine(t_ns, data)


def parse_recording(data: bytes) -> Recording:
    """Read a whole file.

    A file without its last line, such as of a recorder that was killed, is a recording that failed there.

    Raises:
        RecordingError: it is no recording, or a line is broken.
        LimitExceeded: it is longer than MAX_RECORDING_BYTES.
    """
    if len(data) > MAX_RECORDING_BYTES:
        raise LimitExceeded("MAX_RECORDING_BYTES", MAX_RECORDING_BYTES)
    count = data.count(b"\n")
    if count > MAX_READS + 2:  # the header and the end are no reads
        raise RecordingError(MAX_READS + 2, f"more than MAX_READS={MAX_READS} reads")
    if not data.endswith(b"\n"):
        raise RecordingError(count + 1, "the line does not end" if data else "the file is empty")
    lines = data.split(b"\n")[:-1]
    header = _parse_header(lines[0])
    reads: list[Read] = []
    last = 0
    for number, text in enumerate(lines[1:], 2):
        line = _parse_line(number, text)
        if not last <= line.t_ns <= MAX_TIME_NS:
            raise RecordingError(number, f"t_ns is {line.t_ns}, which is not between {last} and MAX_TIME_NS")
        last = line.t_ns
        if line.end is not None:
            return _ended(header, reads, line, number, len(lines))
        reads.append(_read(number, line))
    return Recording(header, tuple(reads), last, "the recording has no end")


def _parse_header(text: bytes) -> Header:
    try:
        header = _decode_header(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordingError(1, f"no header of a recording: {error}") from None
    if header.tokenwire_recording != VERSION:
        raise RecordingError(1, f"version {header.tokenwire_recording} is not {VERSION}, which is all that is read")
    return header


def _parse_line(number: int, text: bytes) -> _Line:
    if len(text) > MAX_LINE_BYTES:
        raise RecordingError(number, f"more than MAX_LINE_BYTES={MAX_LINE_BYTES}")
    try:
        return _decode_line(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordingError(number, str(error)) from None


def _read(number: int, line: _Line) -> Read:
    if (line.data is None) == (line.base64 is None):
        raise RecordingError(number, "a line has one of data, base64 and end")
    data = line.base64 if line.data is None else line.data.encode()
    return Read(line.t_ns, data or b"")


def _ended(header: Header, reads: Sequence[Read], line: _Line, number: int, lines: int) -> Recording:
    if line.end not in {"eof", "failed"} or line.data is not None or line.base64 is not None:
        raise RecordingError(number, "an end is eof or failed, and nothing else is beside it")
    if number < lines:
        raise RecordingError(number + 1, "a line after the end")
    failure = (line.reason or "the connection broke") if line.end == "failed" else None
    return Recording(header, tuple(reads), line.t_ns, failure)


def decode_steps(recording: Recording, dialect: Dialect) -> list[Step]:
    """Decode a recording: what was said, and when, in a run that passes the grammar and ends with one terminal event.

    Args:
        recording: the recording.
        dialect: the dialect that its header names.
    """
    decoder = dialect.decoder()
    steps: list[Step] = []
    for read in recording.reads:
        _add(steps, read.t_ns, decoder.receive_data(read.data))
    ending = decoder.receive_eof()
    if recording.failure is not None and ending:
        # What HTTP says is not whole is no success, whatever the decoder makes of its end.
        truncated = StreamTruncated(recording.failure, sum(len(read.data) for read in recording.reads))
        ending = [*(event for event in ending if not isinstance(event, TERMINALS)), truncated]
    _add(steps, recording.end_ns, ending)
    return steps


def _add(steps: list[Step], t_ns: int, events: Sequence[Event]) -> None:
    if not events:
        return
    if steps and steps[-1].t_ns == t_ns:
        steps[-1] = Step(t_ns, (*steps[-1].events, *events))
    else:
        steps.append(Step(t_ns, tuple(events)))
