"""Any callable as a backend: what it is told, what it may say, and what happens when it blocks, fails or never ends."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.backends.fakes import (
    FakeRuntime,
    LoopRuntime,
    RecordingSink,
    heard,
    open_runtime,
    reasons_of,
    request,
    text_of,
)

from tokenwire.backends.generators import ITEMS_PER_TURN, READ_AHEAD, GeneratorBackend, LoadError, load
from tokenwire.backends.mock import MockBackend
from tokenwire.core.errors import RequestRefused
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    ReasoningDelta,
    StreamEnd,
    StreamError,
    StreamStart,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.request import GenerationRequest
from tokenwire.core.stream import Item

Attach = Callable[..., GeneratorBackend]


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def attach(runtime: FakeRuntime, sink: RecordingSink) -> Iterator[Attach]:
    """Makes backends on the fake runtime; at the end their threads have ended, so no test leaves one behind."""
    made: list[GeneratorBackend] = []

    def make(function: Callable[..., object], **options: Any) -> GeneratorBackend:
        backend = GeneratorBackend(function, **options)
        backend.attach(runtime, sink)
        made.append(backend)
        return backend

    yield make
    for backend in made:
        backend.close()
        join(backend)


def join(backend: GeneratorBackend) -> None:
    for thread in backend._pool.threads:
        thread.join()


def run(function: Callable[..., object], **fields: Any) -> list[Item]:
    """All that a sync callable's stream says."""
    runtime, sink = FakeRuntime(), RecordingSink()
    backend = GeneratorBackend(function)
    backend.attach(runtime, sink)
    backend.start("s", request(**fields))
    runtime.run_until(lambda: sink.has_ended("s"))
    backend.close()
    join(backend)
    runtime.run_woken()
    return sink.said["s"]


def error_of(items: list[Item]) -> StreamError:
    error = items[-1]
    assert isinstance(error, StreamError)
    assert heard(items)
    return error


# What it is told


def by_prompt(prompt: str) -> Iterator[str]:
    yield prompt


def by_request(request: Any) -> Iterator[str]:
    yield request.prompt


def by_annotation(asked: GenerationRequest) -> Iterator[str]:
    yield asked.prompt


def by_messages(messages: tuple[Any, ...]) -> Iterator[str]:
    yield messages[0].text


def by_other_name(text: str) -> Iterator[str]:
    yield text


def by_str(question: str, /, style: str = "plain") -> Iterator[str]:
    yield question + ("" if style == "plain" else "!")


def by_keyword(*rest: object, prompt: str, **more: object) -> Iterator[str]:
    yield prompt + "".join(map(str, rest)) + "".join(more)


def by_nothing() -> Iterator[str]:
    yield "hello there"


def with_text_and_fields(text: str, max_tokens: int | None, stop: tuple[str, ...], top_p: float = 0.5) -> Iterator[str]:
    yield f"{text} {max_tokens} {stop} {top_p}".replace(" None () 0.5", "")


class Model:
    def __call__(self, prompt: str) -> Iterator[str]:
        yield prompt

    def method(self, prompt: str) -> Iterator[str]:
        yield prompt


def after_default(style: str = "", prompt: str = "", /) -> Iterator[str]:
    yield style + prompt


@pytest.mark.parametrize(
    "function",
    [
        by_prompt,
        by_request,
        by_annotation,
        by_messages,
        by_other_name,
        by_str,
        by_keyword,
        by_nothing,
        with_text_and_fields,
        after_default,
        Model(),
        Model().method,
        partial(by_str, style="plain"),
    ],
)
def test_the_parameters_names_say_what_it_gets(function: Callable[..., object]) -> None:
    assert text_of(heard(run(function))) == "hello there"


def test_a_field_that_was_left_out_leaves_the_default() -> None:
    def generate(prompt: str, temperature: float = 0.7, max_tokens: int = 9) -> str:
        return f"{prompt} {temperature} {max_tokens}"

    assert text_of(heard(run(generate))) == "hello there 0.7 9"
    assert text_of(heard(run(generate, temperature=0.1, max_tokens=3))) == "hello there 0.1 3"


def test_fields_that_it_is_told_are_honoured() -> None:
    assert GeneratorBackend(with_text_and_fields).honours == {"max_tokens", "stop", "top_p", "n"}
    assert GeneratorBackend(by_request).honours == {"n"}
    assert GeneratorBackend(by_request, honours=["temperature"]).honours == {"n", "temperature"}


def wants_a_tokenizer(prompt: str, tokenizer: object) -> str:
    return f"{prompt} {tokenizer}"


def wants_two_texts(a: str, b: str) -> str:
    return a + b


def wants_more_than_a_request(request: GenerationRequest, more: str) -> str:
    return request.prompt + more


@pytest.mark.parametrize("function", [wants_a_tokenizer, wants_two_texts, wants_more_than_a_request])
def test_a_parameter_that_no_request_has_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="a request can give: request, prompt, frequency_penalty"):
        GeneratorBackend(function)


def test_a_number_is_no_prompt() -> None:
    def generate(count: int) -> str:
        return str(count)

    with pytest.raises(TypeError, match="wants count"):
        GeneratorBackend(generate)


def test_what_cannot_be_called_or_read_is_refused() -> None:
    with pytest.raises(TypeError, match="a int cannot be called"):
        GeneratorBackend(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="parameters cannot be read"):
        GeneratorBackend(max)


def test_the_model_is_named_after_the_callable() -> None:
    assert GeneratorBackend(by_prompt).models[0].name == "by_prompt"
    assert GeneratorBackend(Model()).models[0].name == "Model"
    assert GeneratorBackend(by_prompt, model="tiny").models[0].name == "tiny"


# What it may say


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: "whole", "whole"),
        (lambda: b"\xc3\xa9", "é"),
        (lambda: ["a", b"\xc3", b"\xa9", TextDelta("b")], "aéb"),
        (lambda: (piece for piece in "abc"), "abc"),
        (lambda: TextDelta("one"), "one"),
        (list, ""),
        (lambda: [StreamStart("their", "m", 1), "x", ChoiceEnd(), StreamEnd(), "lost"], "x"),
    ],
)
def test_a_function_may_return_any_of_these(function: Callable[[], object], text: str) -> None:
    items = run(function)
    assert text_of(heard(items)) == text
    assert reasons_of(heard(items)) == ["stop"]
    assert isinstance(items[-1], StreamEnd)


ANY_ITEM = st.sampled_from(["a", b"\xe6\x97\xa5", "", b"\xff", TextDelta("t"), ReasoningDelta("r"), UsageReport(1, 2)])


@given(st.lists(ANY_ITEM))
def test_whatever_it_yields_is_a_legal_stream_with_one_end(items: list[Item]) -> None:
    def generate() -> Iterator[Item]:
        yield from items

    assert isinstance(heard(run(generate))[-1], StreamEnd)


def test_an_error_that_it_yields_ends_the_stream_and_closes_it() -> None:
    closed: list[bool] = []

    def generate() -> Iterator[Item]:
        try:
            yield "a"
            yield StreamError(ErrorKind.RATE_LIMIT, "slow down")
            yield "never"
        finally:
            closed.append(True)

    assert error_of(run(generate)).kind == "rate_limit"
    assert closed == [True]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: ["a", 7], "yielded a value of type int"),
        (lambda: None, "returned a value of type NoneType"),
        (lambda: 3.5, "returned a value of type float"),
        (lambda: [None], "yielded a value of type NoneType"),
    ],
)
def test_a_wrong_type_is_named(function: Callable[[], object], message: str, caplog: pytest.LogCaptureFixture) -> None:
    error = error_of(run(function))
    assert message in error.message
    assert not error.retryable
    assert len(caplog.records) == 1


# How it may fail


def fail(error: Exception) -> str:
    """Raise in the place of an expression."""
    raise error


def raises_when_called(prompt: str) -> Iterator[str]:
    raise ValueError("a secret of " + prompt)


def raises_at_once(prompt: str) -> Iterator[str]:
    yield fail(ValueError("a secret of " + prompt))


def raises_later(prompt: str) -> Iterator[str]:
    yield "some"
    raise ValueError("a secret of " + prompt)


@pytest.mark.parametrize(
    ("function", "said"),
    [(raises_when_called, []), (raises_at_once, []), (raises_later, ["some"])],
)
def test_an_exception_is_named_to_the_client_and_told_to_the_log(
    function: Callable[..., object], said: list[Item], caplog: pytest.LogCaptureFixture
) -> None:
    items = run(function)
    assert error_of(items) == StreamError(ErrorKind.SERVER, "The backend failed with ValueError.", retryable=True)
    assert items[:-1] == said
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("tokenwire.backends", logging.ERROR)
    assert record.exc_info is not None
    assert "a secret of hello there" in str(record.exc_info[1])


def test_a_refusal_says_what_the_client_reads(caplog: pytest.LogCaptureFixture) -> None:
    refusal = StreamError(ErrorKind.INVALID_REQUEST, "No poems.", param="messages")

    def generate() -> Iterator[str]:
        yield fail(RequestRefused(refusal))

    assert error_of(run(generate)) is refusal
    assert caplog.records == []


def test_an_exit_ends_the_stream_and_not_the_thread(attach: Attach, runtime: FakeRuntime, sink: RecordingSink) -> None:
    def generate(prompt: str) -> Iterator[str]:
        yield "a"
        if prompt == "exit":
            sys.exit(1)

    backend = attach(generate, max_threads=1)
    backend.start("a", request("exit"))
    backend.start("b", request("stay"))
    runtime.run_until(lambda: sink.has_ended("a", "b"))
    assert error_of(sink.said["a"]).message == "The backend failed with SystemExit."
    assert sink.text("b") == "a"


def test_a_failure_to_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def generate() -> Iterator[Item]:
        try:
            yield StreamError(ErrorKind.SERVER, "enough")
        finally:
            raise ValueError("while closing")

    assert error_of(run(generate)).message == "enough"
    assert [record.getMessage() for record in caplog.records] == ["generate failed while it was closed"]


# Threads


def test_a_generator_that_blocks_holds_up_nobody_else(
    attach: Attach, runtime: FakeRuntime, sink: RecordingSink
) -> None:
    release, entered = threading.Event(), threading.Event()

    def generate(prompt: str) -> Iterator[str]:
        if prompt == "block":
            entered.set()
            release.wait()
        yield prompt

    backend = attach(generate)
    blocked = backend.start("blocked", request("block"))
    entered.wait()
    backend.start("other", request("go"))
    runtime.run_until(lambda: sink.has_ended("other"))
    blocked.cancel()
    assert sink.text("other") == "go"
    assert all(thread.daemon for thread in backend._pool.threads)
    release.set()
    backend.close()
    join(backend)
    runtime.run_woken()
    assert "blocked" not in sink.said


def test_one_that_never_ends_is_at_most_the_read_ahead_ahead(
    attach: Attach, runtime: FakeRuntime, sink: RecordingSink
) -> None:
    closed, full = threading.Event(), threading.Event()
    pulled = 0

    def generate() -> Iterator[str]:
        nonlocal pulled
        try:
            while True:
                pulled += 1
                if pulled == READ_AHEAD:
                    full.set()
                yield "x"
        finally:
            closed.set()

    job = attach(generate).start("s", request())
    full.wait()
    runtime.run_until(lambda: len(sink.said.get("s", ())) >= 10 * READ_AHEAD)
    assert pulled - len(sink.said["s"]) <= READ_AHEAD
    assert max(len(items) for _, entries in sink.batches for _, items in entries) <= READ_AHEAD
    job.cancel()
    closed.wait()
    count = len(sink.said["s"])
    runtime.run_woken()
    assert len(sink.said["s"]) == count


def test_while_blocked_nothing_more_is_pulled(attach: Attach, runtime: FakeRuntime, sink: RecordingSink) -> None:
    entered, go = threading.Event(), threading.Event()
    blocked_at_pull: list[bool] = []

    def generate() -> Iterator[str]:
        entered.set()
        go.wait()
        yield "a"
        blocked_at_pull.append(is_blocked)
        yield "b"

    job = attach(generate).start("s", request())
    entered.wait()
    is_blocked = True
    job.set_blocked(True)
    go.set()
    runtime.run_until(lambda: sink.said.get("s") == ["a"])
    is_blocked = False
    job.set_blocked(False)
    runtime.run_until(lambda: sink.has_ended("s"))
    assert blocked_at_pull == [False]
    assert sink.text("s") == "ab"


def test_a_blocked_one_can_be_cancelled(attach: Attach, runtime: FakeRuntime, sink: RecordingSink) -> None:
    entered, closed = threading.Event(), threading.Event()
    threads: list[int] = []

    def generate() -> Iterator[str]:
        threads.append(threading.get_ident())
        entered.set()
        try:
            yield "a"
            yield "b"
        finally:
            threads.append(threading.get_ident())
            closed.set()

    job = attach(generate).start("s", request())
    entered.wait()
    job.set_blocked(True)
    job.cancel()
    closed.wait()
    runtime.run_woken()
    assert sink.batches == []
    assert len(set(threads)) == 1  # closed where it ran, and nowhere else


def test_the_pool_is_bounded_and_first_come_first_served(
    attach: Attach, runtime: FakeRuntime, sink: RecordingSink
) -> None:
    release, entered = threading.Event(), threading.Event()
    order: list[str] = []

    def generate(prompt: str) -> Iterator[str]:
        order.append(prompt)
        entered.set()
        release.wait()
        yield prompt

    backend = attach(generate, max_threads=1, max_waiting=4)
    jobs = {name: backend.start(name, request(name)) for name in "abcde"}
    entered.wait()
    jobs["c"].cancel()
    backend.start("f", request("f"))
    backend.start("g", request("g"))
    runtime.run_woken()
    assert error_of(sink.said["g"]).kind == "overloaded"
    release.set()
    runtime.run_until(lambda: sink.has_ended(*"abdef"))
    assert order == ["a", "b", "d", "e", "f"]
    assert len(backend._pool.threads) == 1


def test_a_thread_is_used_again(attach: Attach, runtime: FakeRuntime, sink: RecordingSink) -> None:
    backend = attach(by_prompt, max_threads=2)
    for number in range(20):
        backend.start(number, request(f"{number}"))
    runtime.run_until(lambda: sink.has_ended(*range(20)))
    assert [sink.text(number) for number in range(20)] == [f"{number}" for number in range(20)]
    assert len(backend._pool.threads) <= 2


def test_a_closed_backend_takes_no_more(attach: Attach, runtime: FakeRuntime, sink: RecordingSink) -> None:
    backend = attach(by_prompt)
    backend.close()
    backend.start("s", request())
    runtime.run_woken()
    assert error_of(sink.said["s"]).kind == "overloaded"


def test_items_of_many_threads_cross_with_one_wake_up(
    attach: Attach, runtime: FakeRuntime, sink: RecordingSink
) -> None:
    all_have_put = threading.Barrier(9)

    def generate() -> Iterator[str]:
        yield from "abc"
        all_have_put.wait()

    backend = attach(generate)
    for stream in range(8):
        backend.start(stream, request())
    all_have_put.wait()
    backend.close()
    join(backend)
    assert runtime.wakes == 1
    runtime.run_woken()
    assert [sink.text(stream) for stream in range(8)] == ["abc"] * 8
    assert len(sink.batches) == 1


# Choices


def test_each_choice_has_a_generator_of_its_own() -> None:
    def generate(request: GenerationRequest) -> Iterator[Item]:
        assert request.n == 1
        choice = (request.seed or 0) - 40
        yield f"text {choice} "
        yield b"\xe6\x97"
        yield b"\xa5"
        yield TextDelta("!")
        yield UsageReport(5, choice + 1, reasoning_tokens=1)
        if choice == 1:
            yield ToolCallStart(0, "c", "tool")
            yield ToolCallDelta(0, "{}")
        yield b"\xe6"

    items = run(generate, n=3, seed=40)
    events = heard(items, 3)
    assert [text_of(events, choice) for choice in range(3)] == [f"text {choice} 日!\ufffd" for choice in range(3)]
    assert reasons_of(events) == ["stop", "tool_calls", "stop"]
    assert [item for item in items if isinstance(item, UsageReport)] == [UsageReport(5, 6, reasoning_tokens=3)]


def test_choices_of_one_drain_are_one_entry_of_the_batch(
    attach: Attach, runtime: FakeRuntime, sink: RecordingSink
) -> None:
    backend = attach(lambda: ["a", StreamStart("their", "m", 1), "b"])
    backend.start("s", request(n=4))
    runtime.run_until(lambda: sink.has_ended("s"))
    assert {sink.text("s", choice, choices=4) for choice in range(4)} == {"ab"}
    assert all(len(entries) <= 1 for _, entries in sink.batches)


def test_one_choice_that_fails_ends_all() -> None:
    others = threading.Event()

    def generate(seed: int) -> Iterator[str]:
        if seed == 0:
            yield "a"
            others.wait()
            raise ValueError
        try:
            while True:
                yield "x"
                others.set()
        finally:
            others.set()

    items = run(generate, n=2, seed=0)
    assert isinstance(items[-1], StreamError)
    assert heard(items, 2)


def test_a_foreign_choice_is_an_error_where_one_was_asked_for() -> None:
    items = run(lambda: [TextDelta("a", 1)], n=2)
    assert isinstance(items[-1], StreamError)
    assert "choice of its own" in items[-1].message


def test_a_callable_with_n_makes_all_choices_itself() -> None:
    def generate(n: int) -> Iterator[Item]:
        for choice in range(n):
            yield TextDelta(f"{choice}", choice)

    events = heard(run(generate, n=3), 3)
    assert [text_of(events, choice) for choice in range(3)] == ["0", "1", "2"]


# Async callables, on both loops


class Line:
    """A backend on the running loop."""

    def __init__(self, backend: GeneratorBackend, runtime: LoopRuntime, sink: RecordingSink | None = None) -> None:
        self.backend = backend
        self.soon = runtime.wake_soon
        self.sink = sink or RecordingSink()
        backend.attach(runtime, self.sink)

    async def said(self, *, n: int = 1) -> list[Item]:
        self.backend.start("s", request(n=n))
        await self.sink.until(lambda: self.sink.has_ended("s"))
        return self.sink.said["s"]


async def on_loop(
    function: Callable[..., object],
    body: Callable[[Line], Awaitable[None]],
    *,
    sink: RecordingSink | None = None,
    **options: Any,
) -> None:
    """Run a test's body with a backend; what still runs at its end is cancelled, as at a server's end."""
    backend = GeneratorBackend(function, **options)
    async with open_runtime() as runtime:
        await body(Line(backend, runtime, sink))
        backend.close()
    join(backend)


async def agen(prompt: str) -> AsyncIterator[Item]:
    yield prompt
    await anyio.lowlevel.checkpoint()
    yield b"!"


async def coroutine_of_text(prompt: str) -> str:
    await anyio.lowlevel.checkpoint()
    return prompt + "!"


async def coroutine_of_list(prompt: str) -> list[str]:
    return [prompt, "!"]


async def coroutine_of_agen(prompt: str) -> AsyncIterator[Item]:
    return agen(prompt)


def function_of_agen(prompt: str) -> AsyncIterator[Item]:
    return agen(prompt)


def function_of_coroutine(prompt: str) -> Awaitable[str]:
    return coroutine_of_text(prompt)


class AsyncModel:
    async def __call__(self, prompt: str) -> AsyncIterator[str]:
        yield prompt
        yield "!"


class Pages:
    """An async iterable that is no generator."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> Pages:
        return self

    async def __anext__(self) -> str:
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop(0)


def pages(prompt: str) -> Pages:
    return Pages([prompt, "!"])


@pytest.mark.anyio
@pytest.mark.parametrize(
    "function",
    [
        agen,
        coroutine_of_text,
        coroutine_of_list,
        coroutine_of_agen,
        function_of_agen,
        function_of_coroutine,
        AsyncModel(),
        partial(agen),
        pages,
    ],
)
async def test_async_callables_of_every_kind(function: Callable[..., object]) -> None:
    async def body(line: Line) -> None:
        assert text_of(heard(await line.said())) == "hello there!"

    await on_loop(function, body)


@pytest.mark.anyio
async def test_an_async_item_is_delivered_in_its_own_task() -> None:
    sink = RecordingSink()
    seen: list[int] = []

    async def generate() -> AsyncIterator[str]:
        yield "a"
        seen.append(len(sink.batches))
        yield "b"
        seen.append(len(sink.batches))

    async def body(line: Line) -> None:
        assert await line.said() == ["a", "b", StreamEnd()]

    await on_loop(generate, body, sink=sink)
    assert seen == [1, 2]


@pytest.mark.anyio
@pytest.mark.parametrize("n", [1, 2])
async def test_async_choices_and_failures(n: int, caplog: pytest.LogCaptureFixture) -> None:
    async def generate(prompt: str) -> AsyncIterator[str]:
        yield prompt
        await anyio.lowlevel.checkpoint()
        raise ValueError("a secret")

    async def body(line: Line) -> None:
        items = await line.said(n=n)
        assert items[-1] == StreamError(ErrorKind.SERVER, "The backend failed with ValueError.", retryable=True)
        assert heard(items, n)

    await on_loop(generate, body)
    assert "a secret" in caplog.text


@pytest.mark.anyio
async def test_async_generators_make_choices() -> None:
    async def body(line: Line) -> None:
        events = heard(await line.said(n=2), 2)
        assert [text_of(events, choice) for choice in range(2)] == ["hello there!"] * 2

    await on_loop(agen, body)


@pytest.mark.anyio
async def test_an_async_generator_may_raise_at_once_or_yield_the_wrong_thing(caplog: pytest.LogCaptureFixture) -> None:
    async def raises() -> AsyncIterator[str]:
        yield fail(RequestRefused(StreamError(ErrorKind.NOT_FOUND, "no such thing")))

    async def wrong() -> AsyncIterator[Any]:
        yield 7

    async def ends() -> AsyncIterator[Item]:
        yield StreamError(ErrorKind.TIMEOUT, "too slow")
        yield "never"

    async def nothing() -> None:
        pass

    expected = {raises: "no such thing", wrong: "type int", ends: "too slow", nothing: "type NoneType"}
    for function, message in expected.items():

        async def body(line: Line, message: str = message) -> None:
            assert message in error_of(await line.said()).message

        await on_loop(function, body)
    assert len(caplog.records) == 2


@pytest.mark.anyio
async def test_one_that_never_awaits_leaves_the_loop_its_turns_and_can_be_cancelled() -> None:
    closed = anyio.Event()

    async def generate() -> AsyncIterator[str]:
        try:
            while True:
                yield "x"
        finally:
            closed.set()

    async def body(line: Line) -> None:
        job = line.backend.start("s", request())
        await line.sink.until(lambda: len(line.sink.batches) >= 3 * ITEMS_PER_TURN)
        line.soon(job.cancel)
        await closed.wait()
        count = len(line.sink.batches)
        await anyio.wait_all_tasks_blocked()
        assert len(line.sink.batches) == count

    await on_loop(generate, body)


@pytest.mark.anyio
async def test_a_cancelled_async_generator_runs_its_finally_where_it_waits() -> None:
    closed = anyio.Event()

    async def generate() -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep_forever()
        finally:
            closed.set()

    async def body(line: Line) -> None:
        job = line.backend.start("s", request())
        await line.sink.until(lambda: "s" in line.sink.said)
        line.soon(job.cancel)
        await closed.wait()
        assert line.sink.said["s"] == ["a"]

    await on_loop(generate, body)


@pytest.mark.anyio
async def test_a_blocked_async_generator_is_not_pulled_and_its_finally_may_await() -> None:
    closed = anyio.Event()
    pulled: list[str] = []

    async def generate() -> AsyncIterator[str]:
        try:
            for item in "abc":
                pulled.append(item)
                yield item
        finally:
            await anyio.lowlevel.checkpoint()
            closed.set()

    async def body(line: Line) -> None:
        job = line.backend.start("s", request())
        job.set_blocked(True)
        job.set_blocked(True)
        await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        assert pulled == []
        # Each item finds the reader slow again.
        line.sink.deliver = blocking_deliver(line, job)  # type: ignore[method-assign]  # a slow reader's sink
        line.soon(partial(job.set_blocked, False))
        await line.sink.until(lambda: "s" in line.sink.said)
        await anyio.wait_all_tasks_blocked()
        assert pulled == ["a"]
        line.soon(job.cancel)
        await closed.wait()
        assert line.sink.said["s"] == ["a"]

    await on_loop(generate, body)


def blocking_deliver(line: Line, job: Any) -> Callable[..., None]:
    deliver = line.sink.deliver

    def blocking(batch: Any, now: int) -> None:
        deliver(batch, now)
        job.set_blocked(True)

    return blocking


@pytest.mark.anyio
async def test_a_finally_that_does_not_end_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def generate() -> AsyncIterator[Item]:
        try:
            yield StreamError(ErrorKind.SERVER, "enough")
        finally:
            await anyio.sleep_forever()

    async def body(line: Line) -> None:
        assert error_of(await line.said()).message == "enough"
        await anyio.wait_all_tasks_blocked()

    await on_loop(generate, body, close_limit_ns=0)
    assert [record.getMessage() for record in caplog.records] == ["generate was still closing after 0.0 seconds"]


@pytest.mark.anyio
async def test_an_async_failure_to_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def generate() -> AsyncIterator[Item]:
        try:
            yield StreamError(ErrorKind.SERVER, "enough")
        finally:
            raise ValueError("while closing")

    async def body(line: Line) -> None:
        assert error_of(await line.said()).message == "enough"
        await anyio.wait_all_tasks_blocked()

    await on_loop(generate, body)
    assert [record.getMessage() for record in caplog.records] == ["generate failed while it was closed"]


@pytest.mark.anyio
async def test_a_task_that_is_stopped_from_outside_still_ends_its_stream() -> None:
    sink = RecordingSink()

    async def generate() -> AsyncIterator[str]:
        yield "a"
        await anyio.sleep_forever()

    async def body(line: Line) -> None:
        line.backend.start("s", request())
        await sink.until(lambda: "s" in sink.said)

    await on_loop(generate, body, sink=sink)
    assert error_of(sink.said["s"]).message == "The backend's task was stopped."


@pytest.mark.anyio
async def test_a_job_that_is_cancelled_before_it_began_calls_nothing() -> None:
    called: list[bool] = []
    sink = RecordingSink()

    async def generate() -> AsyncIterator[str]:
        called.append(True)
        yield "a"

    async def body(line: Line) -> None:
        line.backend.start("s", request()).cancel()
        await anyio.wait_all_tasks_blocked()

    await on_loop(generate, body, sink=sink)
    assert called == []
    assert sink.said == {}


# Loading


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory to load from, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in [name for name in sys.modules if name.startswith("theirs_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


SOURCE = """
from tokenwire.backends.mock import MockBackend

def generate(prompt):
    yield prompt

class Model:
    def __call__(self, prompt):
        yield prompt
    def method(self, prompt):
        yield prompt

class Needy:
    def __init__(self, path):
        self.path = path

class Ready(MockBackend):
    def __init__(self):
        super().__init__(ttft_ns=1, itl_ns=1)

ready = MockBackend(ttft_ns=1, itl_ns=1)
model = Model()
number = 3

def needy(prompt, tokenizer):
    yield prompt

def bare(text):
    yield text + "!"
"""


def test_what_is_named_is_found_and_made_a_backend(project: Path) -> None:
    (project / "theirs_good.py").write_text(SOURCE)
    for path, name in {"generate": "generate", "Model": "Model", "model": "Model", "model.method": "method"}.items():
        backend = load(f"theirs_good:{path}")
        assert isinstance(backend, GeneratorBackend)
        assert backend.models[0].name == name
    assert load("theirs_good:generate", model="tiny").models[0].name == "tiny"
    assert load("theirs_good:ready") is sys.modules["theirs_good"].ready
    assert isinstance(load("theirs_good:Ready"), MockBackend)
    assert sys.path.count(os.getcwd()) == 1


def test_a_lone_parameter_of_any_name_is_the_prompt(project: Path, runtime: FakeRuntime, sink: RecordingSink) -> None:
    (project / "theirs_bare.py").write_text(SOURCE)
    backend = load("theirs_bare:bare")
    backend.attach(runtime, sink)
    backend.start("s", request())
    runtime.run_until(lambda: sink.has_ended("s"))
    backend.close()
    assert sink.text("s") == "hello there!"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("generate", "not of the form module:attribute"),
        (":generate", "not of the form"),
        ("theirs_bad:", "not of the form"),
        ("theirs_missing:generate", "there is no module theirs_missing in /"),
        ("theirs_missing.inner:generate", "there is no module theirs_missing in /"),
        ("theirs_bad:nothing", "theirs_bad has no attribute nothing"),
        ("theirs_bad:model.nothing", "Model has no attribute nothing"),
        ("theirs_bad:number", "theirs_bad:number is a int, which cannot be called"),
        ("theirs_bad:needy", "theirs_bad:needy: needy wants tokenizer"),
        ("theirs_bad:Needy", "the class Needy wants arguments: missing a required argument: 'path'"),
    ],
)
def test_what_cannot_be_loaded_is_said_clearly(project: Path, target: str, message: str) -> None:
    (project / "theirs_bad.py").write_text(SOURCE)
    with pytest.raises(LoadError, match=message):
        load(target)


def test_a_module_that_fails_by_itself_shows_its_own_failure(project: Path) -> None:
    (project / "theirs_broken.py").write_text("import theirs_dependency_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="theirs_dependency_that_is_missing"):
        load("theirs_broken:generate")
