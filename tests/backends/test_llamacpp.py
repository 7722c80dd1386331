"""The embedded model's backend over a scripted engine: slots and queue, cancelling, errors, watchdogs, on virtual time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.backends.fakes import FakeRuntime, RecordingSink, reasons_of, request
from tests.backends.scripted_engine import Call, ScriptedEngine, chunk, ended, error, progress, role, text

from tokenwire.backends import _llama_answer
from tokenwire.backends.llamacpp import LlamaBackend, Patience
from tokenwire.core.dialects.base import failure_of, status_of
from tokenwire.core.events import (
    ErrorKind,
    Event,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.request import ImagePart, Message, Tool

SECOND = 1_000_000_000
PATIENCE = Patience(first_token_ns=30 * SECOND, gap_ns=10 * SECOND, total_ns=100 * SECOND)


class House:
    """A backend, its engine, and the loop that the test is."""

    def __init__(self, **options: Any) -> None:
        self.engine = ScriptedEngine()
        chosen: dict[str, Any] = {"patience": PATIENCE, "close_limit_s": 60.0, **options}
        self.backend = LlamaBackend(self.engine, model="m", **chosen)
        self.runtime, self.sink = FakeRuntime(), RecordingSink()
        self.backend.attach(self.runtime, self.sink)

    def start(self, stream: str, /, **fields: Any) -> Any:
        return self.backend.start(stream, request(stream, **fields))

    def call(self, number: int = 0) -> Call:
        """The engine's call of this number, once it has come."""
        return self.engine.wait_for(number + 1)[number]

    def until(self, done: Callable[[], bool]) -> None:
        self.runtime.run_until(done)

    def events(self, stream: str, choices: int = 1) -> list[Event]:
        """All that a stream says, once it has ended."""
        self.until(lambda: self.sink.has_ended(stream))
        return self.sink.events(stream, choices)

    def failure(self, stream: str = "s") -> StreamError:
        """The error that a stream ends with."""
        *_, last = self.events(stream)
        assert isinstance(last, StreamError)
        return last

    def settle(self, call: Call) -> None:
        """Wait until a call has returned and its slot is free again, and run what it woke."""
        call.wait()
        self.until(lambda: len(self.backend._running) == sum(not call.over.is_set() for call in self.engine.calls))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, firing what is due on the way."""
        target = self.runtime.clock + round(seconds * SECOND)
        while self.runtime.pending and self.runtime.pending[0] <= target:
            self.runtime.fire()
        self.runtime.clock = target


@contextmanager
def opened(**options: Any) -> Generator[House, None, None]:
    house = House(**options)
    try:
        yield house
    finally:
        house.engine.release()
        house.backend.close()


@pytest.fixture
def house() -> Iterator[House]:
    with opened() as house:
        yield house


def usage_of(events: list[Event]) -> UsageReport:
    return [event for event in events if isinstance(event, UsageReport)][-1]


# What is said


def test_chunks_become_events_under_our_own_name(house: House) -> None:
    house.start("s")
    house.call().end(progress(0, 10), progress(10, 10), role(), text("Par"), text("is"), *ended(cached=4))
    events = house.events("s")
    assert house.sink.text("s") == "Paris"
    assert reasons_of(events) == ["stop"]
    assert usage_of(events) == UsageReport(10, 3, 4)
    assert [event.model for event in events if isinstance(event, StreamStart)] == ["m"]
    assert events[-1] == StreamEnd()


def test_what_does_not_show_wakes_nobody(house: House) -> None:
    house.start("s")
    call = house.call()
    house.runtime.run_until(lambda: bool(house.backend._running))
    before = house.runtime.wakes
    call.end(progress(0, 10), progress(5, 10), role())
    call.wait()
    house.events("s")
    assert house.runtime.wakes == before + 2  # the end of the stream, and the slot that is free again


def test_tokens_of_all_slots_cross_with_one_wake_up(house: House) -> None:
    for stream in "abcd":
        house.start(stream)
    calls = house.engine.wait_for(4)
    house.until(lambda: len(house.backend._running) == 4)
    before = house.runtime.wakes
    for call in calls:
        call.say(text("one "), text("two "), text("three"))
    house.until(lambda: house.runtime.wakes > before and all(len(call.answers) == 3 for call in calls))
    house.runtime.run_woken()
    assert {stream: house.sink.said[stream][-1] for stream in "abcd"} == dict.fromkeys("abcd", TextDelta("three"))
    assert house.runtime.wakes - before == len(house.sink.batches)  # however they fell together


@pytest.mark.parametrize("said", ["🌟", "日本語", "é", "👩🏻‍🚀", "\u2028"])
def test_characters_of_many_tokens_are_whole(house: House, said: str) -> None:
    house.start("s")
    escaped = json.dumps({"choices": [{"index": 0, "delta": {"content": said}}]}).encode()
    house.call().end(role(), text(said), escaped, *ended())
    house.events("s")
    assert house.sink.text("s") == said * 2


def test_logprobs_have_as_many_alternatives_as_were_asked_for() -> None:
    top = [{"token": token, "logprob": -1.0, "bytes": [*token.encode()]} for token in ("a", "b", "c")]
    logprobs = {"content": [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": top}]}
    for wanted in (0, 2):
        with opened() as house:
            house.start("s", logprobs=True, top_logprobs=wanted)
            house.call().end(role(), text("a", logprobs=logprobs), *ended())
            (delta,) = [event for event in house.events("s") if isinstance(event, TextDelta)]
            assert delta.logprobs is not None
            assert [other.token for other in delta.logprobs[0].top] == ["a", "b"][:wanted]


def test_a_tool_call(house: House) -> None:
    house.start("s", tools=(Tool("f"),))
    begun = {"index": 0, "id": "x1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    rest = {"index": 0, "function": {"arguments": "}"}}
    house.call().end(role(), chunk({"tool_calls": [begun]}), chunk({"tool_calls": [rest]}), *ended("tool_calls"))
    events = house.events("s")
    assert [event for event in events if isinstance(event, ToolCallStart)] == [ToolCallStart(0, "x1", "f")]
    assert "".join(event.arguments for event in events if isinstance(event, ToolCallDelta)) == "{}"
    assert reasons_of(events) == ["tool_calls"]


def test_each_choice_has_a_slot_and_a_seed_of_its_own(house: House) -> None:
    house.start("s", n=3, seed=7)
    calls = sorted(house.engine.wait_for(3), key=lambda call: call.request["seed"])
    assert [call.request["seed"] for call in calls] == [7, 8, 9]
    for number, call in enumerate(calls):
        call.end(role(), text(f"choice {number}"), *ended(output=number))
    events = house.events("s", 3)
    assert [house.sink.text("s", number, choices=3) for number in range(3)] == ["choice 0", "choice 1", "choice 2"]
    assert usage_of(events) == UsageReport(10, 3)
    assert reasons_of(events) == ["stop"] * 3


def test_a_choice_that_fails_ends_the_others(house: House) -> None:
    house.start("s", n=2)
    first, second = house.engine.wait_for(2)
    first.end(error("server_error", "boom", 500))
    assert house.failure().kind is ErrorKind.SERVER
    second.say(text("late"))
    second.wait()
    assert second.answers == [True]


# Slots and queue


def test_four_run_and_four_wait_first_come_first_served(house: House) -> None:
    streams = "abcdefgh"
    for stream in streams:
        house.start(stream)
    assert sorted(call.prompt for call in house.engine.wait_for(4)) == [*"abcd"]
    for number in range(8):
        assert len(house.engine.calls) == min(8, number + 4)
        (call,) = [call for call in house.engine.calls if call.prompt == streams[number]]
        call.end(role(), text(call.prompt), *ended())
        if number < 4:
            assert house.call(number + 4).prompt == streams[number + 4]
    for stream in streams:
        house.events(stream)
        assert house.sink.text(stream) == stream


def test_what_waits_is_withdrawn_at_once(house: House) -> None:
    jobs = {stream: house.start(stream) for stream in "abcdef"}
    calls = house.engine.wait_for(4)
    jobs["e"].cancel()
    calls[0].end(*ended())
    assert house.call(4).prompt == "f"


def test_too_many_that_wait_are_overloaded() -> None:
    with opened(slots=1, max_waiting=1) as house:
        house.start("runs")
        house.call()
        house.start("waits")
        house.start("s")
        assert house.failure().kind is ErrorKind.OVERLOADED


@pytest.mark.parametrize(
    "before",
    [(), (progress(0, 3000),), (progress(0, 3000), progress(32, 3000)), (role(), text("a"), text("b"))],
    ids=["queued in the engine", "at the prompt's beginning", "in prefill", "in decode"],
)
def test_a_cancelled_answer_is_given_up_at_the_next_call(before: tuple[bytes, ...]) -> None:
    with opened(slots=1) as house:
        job = house.start("s")
        house.start("next")
        call = house.call()
        call.say(*before)
        if before[-1:] == (text("b"),):
            house.until(lambda: len(house.sink.said.get("s", ())) == 2)
        job.cancel()
        call.say(progress(64, 3000), text("never"), text("read"))
        call.wait()
        assert call.answers[-1]
        assert not any(call.answers[: len(before)]) or len(call.answers) <= len(before)
        assert len(call.answers) <= len(before) + 1
        assert house.call(1).prompt == "next"
        house.settle(call)
        assert TextDelta("never") not in house.sink.said.get("s", ())


def test_whole_answers_are_asked_for_as_streams_so_that_they_can_be_cancelled(house: House) -> None:
    house.start("s", stream=False)
    sent = house.call().request
    assert sent["stream"] is True
    assert sent["return_progress"] is True
    assert sent["stream_options"] == {"include_usage": True}


# Errors


@pytest.mark.parametrize(
    ("said", "kind", "status", "code", "param"),
    [
        (
            error("exceed_context_size_error", n_prompt_tokens=9000, n_ctx=8192),
            ErrorKind.INVALID_REQUEST,
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            error("invalid_request_error", "Field 'temperature': [json.exception.type_error.302] must be number"),
            ErrorKind.INVALID_REQUEST,
            400,
            "invalid_value",
            "temperature",
        ),
        (error("invalid_request_error", "no"), ErrorKind.INVALID_REQUEST, 400, "invalid_value", None),
        (error("not_supported_error", "no"), ErrorKind.INVALID_REQUEST, 400, "unsupported_parameter", None),
    ],
)
def test_the_engines_refusals(
    house: House, said: bytes, kind: ErrorKind, status: int, code: str, param: str | None
) -> None:
    house.start("s")
    house.call().end(said)
    failure = house.failure()
    assert (failure.kind, status_of(failure), failure.code, failure.param) == (kind, status, code, param)


def test_the_overflow_names_both_sizes(house: House) -> None:
    house.start("s")
    house.call().end(error("exceed_context_size_error", n_prompt_tokens=9000, n_ctx=8192))
    assert (
        house.failure().message == "The prompt has 9000 tokens; the model's context holds 8192, the answer's included."
    )


@pytest.mark.parametrize(("kind", "code"), [("server_error", 500), ("unavailable_error", 503), ("of_tomorrow", 500)])
def test_the_engines_own_failures(house: House, kind: str, code: int) -> None:
    house.start("s")
    house.call().end(error(kind, "boom", code))
    failure = house.failure()
    assert status_of(failure) == code
    assert "boom" in failure.message


def test_an_error_after_tokens_ends_the_stream(house: House) -> None:
    house.start("s")
    house.call().end(role(), text("half"), error("server_error", "boom", 500))
    assert house.failure().kind is ErrorKind.SERVER
    assert house.sink.text("s") == "half"


def test_a_schema_that_the_engine_cannot_follow(house: House) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}
    house.start("s", response_format=schema)
    house.call().fail(ValueError("No parser. JSON schema error at #: unrecognized type nope"))
    failure = house.failure()
    assert (status_of(failure), failure.code, failure.param) == (400, "invalid_schema", "response_format")
    assert failure.message == "JSON schema error at #: unrecognized type nope."


@pytest.mark.parametrize("said", [(), (role(), text("half"))], ids=["at once", "after tokens"])
def test_a_call_that_raises_is_a_failure_whose_text_stays_here(
    house: House, said: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    house.start("s")
    call = house.call()
    call.say(*said)
    call.fail(RuntimeError("hunter2"))
    failure = house.failure()
    assert (status_of(failure), failure.code) == (500, "engine_failed")
    assert "hunter2" not in failure.message
    assert [record.message for record in caplog.records] == ["the engine failed"]


def test_a_value_error_after_tokens_is_no_refusal(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.start("s")
    call = house.call()
    call.say(role(), text("half"))
    call.fail(ValueError("hunter2"))
    assert house.failure().code == "engine_failed"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("said", [(), (role(),), (role(), text("half"))])
def test_a_call_that_returns_too_soon_is_truncation(house: House, said: tuple[bytes, ...]) -> None:
    house.start("s")
    house.call().end(*said)
    *_, last = house.events("s")
    assert isinstance(last, StreamTruncated)
    assert status_of(failure_of(last)) == 500


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[]", b'{"error"', b'{"error":"text"}', b'{"error":{}}'])
def test_nonsense_is_an_error(house: House, data: bytes) -> None:
    house.start("s")
    house.call().end(data)
    *_, last = house.events("s")
    assert isinstance(last, StreamError | StreamTruncated)
    assert status_of(failure_of(last)) >= 500


def test_an_exception_in_the_callback_does_not_vanish(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> list[Event]:
        raise KeyError("hunter2")

    monkeypatch.setattr(_llama_answer.Answer, "receive_data", fail)
    house.start("s")
    call = house.call()
    call.say(text("a"), text("b"))
    assert house.failure().code == "engine_failed"
    assert call.answers == [True]
    assert caplog.records[0].exc_info is not None


def test_an_image_is_refused_without_the_engine(house: House) -> None:
    message = Message("user", (ImagePart("data:,"),))
    house.backend.start("s", request(messages=(message,)))
    failure = house.failure()
    assert (status_of(failure), failure.param) == (400, "messages[0].content")
    assert house.engine.calls == []


def test_a_server_of_one_failure_after_another_lives(house: House, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(12):
        house.start(f"{number}")
        house.call(number).fail(RuntimeError("no"))
        house.failure(f"{number}")
    house.start("s")
    house.call(12).end(role(), text("fine"), *ended())
    house.events("s")
    assert house.sink.text("s") == "fine"
    assert len(caplog.records) == 12


# Watchdogs


def test_no_token_in_time_although_the_prompt_moves(house: House) -> None:
    house.start("s")
    call = house.call()
    house.until(lambda: bool(house.backend._running))
    for step in range(6):
        call.say(progress(step, 100))
        while len(call.answers) <= step:
            call.over.wait(0.001)
        house.pass_time(4.99)
        assert "s" not in house.sink.said
    house.pass_time(0.1)
    failure = house.failure()
    assert (status_of(failure), failure.code) == (504, "engine_timeout")
    assert failure.message == "The model gave no token within 30 s."
    call.say(progress(6, 100))
    call.wait()
    assert call.answers[-1] is True


@pytest.mark.parametrize("said", [(), (role(), text("half"))], ids=["before a token", "after one"])
def test_silence(house: House, said: tuple[bytes, ...]) -> None:
    house.start("s")
    call = house.call()
    house.until(lambda: bool(house.backend._running))
    call.say(*said)
    if said:
        house.until(lambda: "s" in house.sink.said)
    house.pass_time(9.9)
    assert not house.sink.has_ended("s")
    house.pass_time(0.2)
    failure = house.failure()
    assert (status_of(failure), failure.message) == (504, "The model was silent for 10 s.")


def test_an_answer_that_never_ends(house: House) -> None:
    house.start("s")
    call = house.call()
    house.until(lambda: bool(house.backend._running))
    said = 0
    while not house.sink.has_ended("s"):
        call.say(text("x"))
        said += 1
        house.until(lambda: len(house.sink.said.get("s", ())) >= said)  # noqa: B023  # called at once
        house.pass_time(5)
    assert house.failure().message == "The answer took longer than 100 s."
    assert house.runtime.clock // SECOND == 100


def test_a_silent_slot_is_lost_and_the_others_serve(house: House) -> None:
    house.start("silent")
    house.call()
    house.until(lambda: bool(house.backend._running))
    house.pass_time(11)
    assert status_of(house.failure("silent")) == 504
    for number in range(1, 7):
        house.start(f"{number}")
        house.call(number).end(role(), text("fine"), *ended())
        house.events(f"{number}")


def test_when_all_slots_are_lost_nobody_waits_for_them() -> None:
    with opened(slots=2) as house:
        for stream in ("a", "b", "waits"):
            house.start(stream)
        calls = house.engine.wait_for(2)
        house.until(lambda: len(house.backend._running) == 2)
        house.pass_time(11)
        assert [status_of(house.failure(stream)) for stream in ("a", "b", "waits")] == [504, 504, 503]
        house.start("later")
        assert (status_of(house.failure("later")), house.failure("later").code) == (503, "engine_lost")
        calls[0].end()
        house.settle(calls[0])
        house.start("s")
        house.call(2).end(role(), text("back"), *ended())
        house.events("s")
        assert house.sink.text("s") == "back"


def test_a_cancelled_answer_that_is_not_given_up_is_a_lost_slot() -> None:
    with opened(slots=1) as house:
        job = house.start("gone")
        house.call()
        house.until(lambda: bool(house.backend._running))
        job.cancel()
        house.start("waits")
        house.pass_time(25)
        assert status_of(house.failure("waits")) == 503


def test_one_timer_watches_all_and_none_is_left(house: House) -> None:
    for number in range(20):
        house.start(f"{number}")
        call = house.call(number)
        call.end(role(), text("x"), *ended())
        house.events(f"{number}")
        house.settle(call)
    assert len(house.runtime.timers) == 1
    house.pass_time(1000)
    assert house.runtime.pending == []


# The end


def test_close_gives_up_what_runs_and_drops_what_waits() -> None:
    house = House(slots=1)
    house.start("runs")
    house.start("waits")
    call = house.call()
    call.say(role(), text("a"))
    call.say(text("b"))
    house.until(lambda: len(house.sink.said.get("runs", ())) >= 1)
    call.end(*ended())
    house.backend.close()
    assert call.over.is_set()
    assert len(house.engine.calls) == 1


def test_close_leaves_a_thread_behind_that_the_engine_does_not_let_go(caplog: pytest.LogCaptureFixture) -> None:
    house = House(close_limit_s=0.0)
    house.start("s")
    call = house.call()
    with caplog.at_level(logging.WARNING):
        house.backend.close()
    assert not call.over.is_set()
    assert "1 calls of the engine did not return; they are left behind" in caplog.text
    assert all(thread.daemon for thread in house.backend._pool.threads)
    house.engine.release()
    call.wait()
