"""A recorded stream as a backend: what a server said once, at its own pace or another, to any client in any dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tokenwire.core.contracts import Dialect, ModelCard
from tokenwire.core.dialects import openai_chat, plain
from tokenwire.core.errors import LimitExceeded
from tokenwire.core.events import DELTAS, ChoiceEnd, Event, StreamStart
from tokenwire.core.recording import MAX_RECORDING_BYTES, RecordingError, Step, decode_steps, parse_recording
from tokenwire.core.request import GenerationRequest

if TYPE_CHECKING:
    from tokenwire.core.contracts import Job, Sink, StreamHandle

    from .base import Runtime

__all__ = ["DIALECTS", "MIN_SPEED", "ReplayBackend", "check_speed", "read_steps"]

DIALECTS: Final[Mapping[str, Dialect]] = {dialect.name: dialect for dialect in (openai_chat.DIALECT, plain.DIALECT)}
"""The dialects that a recording may be in, by their names."""

MIN_SPEED: Final = 0.001
"""The slowest replay."""

_STEPS_AT_ONCE: Final = 32
"""Steps of one stream in one batch, where many are due: between batches its reader can hold it back."""

_DEFAULT_MODEL: Final = "replay"

_OF_A_CHOICE: Final = (*DELTAS, ChoiceEnd)


def read_steps(path: Path | str) -> list[Step]:
    """Read a recording's events with their times.

    Raises:
        OSError: it cannot be read.
        RecordingError: it is no recording, a line is broken, or its dialect is unknown.
        LimitExceeded: it is longer than MAX_RECORDING_BYTES.
    """
    with Path(path).open("rb") as file:
        data = file.read(MAX_RECORDING_BYTES + 1)
    if len(data) > MAX_RECORDING_BYTES:
        raise LimitExceeded("MAX_RECORDING_BYTES", MAX_RECORDING_BYTES)
    recording = parse_recording(data)
    dialect = DIALECTS.get(recording.header.dialect)
    if dialect is None:
        raise RecordingError(1, f"the dialect {recording.header.dialect!r} is none of {', '.join(DIALECTS)}")
    return decode_steps(recording, dialect)


def check_speed(speed: float) -> float:
    """Give a speed back.

    Raises:
        ValueError: it is neither 0 nor a number from MIN_SPEED.
    """
    if speed and not MIN_SPEED <= speed < float("inf"):
        raise ValueError(f"the speed is neither 0 nor a number from {MIN_SPEED}")
    return speed


class ReplayBackend:
    """Answers every request with the recorded stream, whatever is asked, from its beginning.

    It holds a stream back while its reader is slow; what is due then comes as soon as the reader has caught up, so that a
    stream is late and never longer. `max_tokens` and stop strings cut it, as they cut any backend's that does not know
    them; choices that the request did not ask for are left out.

    Args:
        path: the recording.
        speed: how many times as fast as it was recorded, at least MIN_SPEED; 0 for as fast as the loop turns.
        model: the model's name; None for the recorded one.

    Raises:
        ValueError: the speed is out of range.
        OSError, RecordingError, LimitExceeded: as `read_steps`.
    """

    __slots__ = ("_tape", "models")

    models: Sequence[ModelCard]
    """The one model."""
    honours = frozenset(GenerationRequest.__struct_fields__) - {"max_tokens", "stop"}
    """All but what the core sees to: nothing is refused, for what was recorded is what there is."""

    def __init__(self, path: Path | str, *, speed: float = 1.0, model: str | None = None) -> None:
        self._tape = _Tape(read_steps(path), check_speed(speed))
        self.models = (ModelCard(model or self._tape.model or _DEFAULT_MODEL),)

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        """Get ready. Called once, on the loop's thread, before the first `start`."""
        self._tape.runtime = runtime
        self._tape.sink = sink

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        """Begin to answer a request."""
        return _ReplayJob(self._tape, stream, request.n)

    def close(self) -> None:
        """Do nothing: the file was closed when it had been read."""


class _Tape:
    """What every stream of a backend shares: the steps, and where they go."""

    __slots__ = ("choices", "model", "offsets", "runs", "runtime", "sink")

    runtime: Runtime
    sink: Sink

    def __init__(self, steps: Sequence[Step], speed: float) -> None:
        self.offsets = tuple(round(step.t_ns / speed) if speed else 0 for step in steps)
        self.runs = tuple(step.events for step in steps)
        said = [event for run in self.runs for event in run]
        self.model = next((event.model for event in said if isinstance(event, StreamStart)), "")
        self.choices = 1 + max((event.choice for event in said if isinstance(event, _OF_A_CHOICE)), default=0)

    def due_at(self, begin: int, at: int) -> int | None:
        """Say when a step is due of a stream that began at a time; None past the last."""
        return begin + self.offsets[at] if at < len(self.offsets) else None

    def events(self, at: int, end: int, choices: int) -> list[Event]:
        """Join steps; what belongs to further choices is left out."""
        run = [event for run in self.runs[at:end] for event in run]
        if choices >= self.choices:
            return run
        return [event for event in run if not isinstance(event, _OF_A_CHOICE) or event.choice < choices]


class _ReplayJob:
    """One stream: where it is in the recording. A timer runs while a step is to come and the reader takes it."""

    __slots__ = ("_armed", "_at", "_begin", "_blocked", "_cancelled", "_choices", "_stream", "_tape")

    def __init__(self, tape: _Tape, stream: StreamHandle, choices: int) -> None:
        self._tape = tape
        self._stream = stream
        self._choices = choices
        self._begin = tape.runtime.now()
        self._at = 0
        self._blocked = False
        self._cancelled = False
        self._armed = False
        self._arm()

    def cancel(self) -> None:
        """Say nothing more."""
        self._cancelled = True

    def set_blocked(self, blocked: bool) -> None:
        """Rest, or go on with what is due."""
        self._blocked = blocked
        if not blocked:
            self._arm()

    def _arm(self) -> None:
        due = self._tape.due_at(self._begin, self._at)
        if due is not None and not self._armed and not self._cancelled:
            self._armed = True
            self._tape.runtime.call_at(due, self._go_on)

    def _go_on(self) -> None:
        """Say what is due, in one batch."""
        self._armed = False
        if self._blocked or self._cancelled:
            return
        now = self._tape.runtime.now()
        begin, self._at = self._at, self._end_of_due(now)
        if self._at > begin:
            self._tape.sink.deliver([(self._stream, self._tape.events(begin, self._at, self._choices))], now)
        self._arm()

    def _end_of_due(self, now: int) -> int:
        for at in range(self._at, self._at + _STEPS_AT_ONCE):
            due = self._tape.due_at(self._begin, at)
            if due is None or due > now:
                return at
        return self._at + _STEPS_AT_ONCE
