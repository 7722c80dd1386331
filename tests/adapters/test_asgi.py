"""The ASGI application, called directly: leaving, back-pressure, deadlines, lifespan, and cancellation at each await."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from tests.adapters.serving import SECOND, Clock, Push, plain_text, turns, until

from tokenwire.adapters import asgi_carrier, runtime
from tokenwire.adapters.asgi import App, app
from tokenwire.adapters.asgi_messages import Message, Scope
from tokenwire.adapters.runtime import Loop, RunningLoop, Waiter, run_timers, running_loop
from tokenwire.backends.base import Backend
from tokenwire.backends.generators import GeneratorBackend
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.events import StreamEnd
from tokenwire.core.service import ServiceOptions

pytestmark = pytest.mark.anyio

STREAM = {"prompt": "hi"}
WHOLE = {"prompt": "hi", "stream": False}


class CountingLoop:
    """The real loop on virtual time, which counts what it is asked for; a `Loop`."""

    def __init__(self, real: Loop, clock: Clock) -> None:
        self.waiters = 0
        self.tasks = 0
        self.timers = 0
        self.wake_soon = real.wake_soon
        self._real = real
        self._clock = clock

    def set_timer(self, deadline: int, callback: Callable[[], None]) -> None:
        self.timers += 1
        self._clock.set_timer(deadline, callback)

    def start_task(self, main: Any) -> None:
        self.tasks += 1
        self._real.start_task(main)

    def new_waiter(self) -> Waiter:
        self.waiters += 1
        return self._real.new_waiter()


class Client:
    """One request. It takes what is sent, unless the test has it hold back.

    Attributes:
        sent: what the application has sent.
        room: `send` returns while this is set.
    """

    def __init__(
        self, application: Callable[..., Awaitable[None]], fields: dict[str, Any], path: str = "/chat"
    ) -> None:
        self.sent: list[Message] = []
        self.receivers = 0
        self.room = anyio.Event()
        self.room.set()
        self.gone = anyio.Event()
        self.ended = anyio.Event()
        self._application = application
        self._body: list[Message] = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"1")]
        self.scope: Scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": headers,
        }

    async def run(self) -> None:
        try:
            await self._application(self.scope, self.receive, self.send)
        finally:
            self.ended.set()

    async def receive(self) -> Message:
        if self._body:
            return self._body.pop()
        self.receivers += 1
        assert self.receivers == 1, "receive has two owners"
        try:
            await self.gone.wait()
        finally:
            self.receivers -= 1
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        await self.room.wait()

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]

    @property
    def whole(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1]["more_body"]


class Serving:
    """An application on virtual time, and its clients."""

    def __init__(self, backend: Backend, group: anyio.abc.TaskGroup, options: ServiceOptions | None) -> None:
        self.clock = Clock()
        self.loop = CountingLoop(running_loop().loop, self.clock)
        self.running = run_timers(self.loop, self.clock.now)
        self.app = App(backend, options, find_loop=self._find)
        self.group = group

    def _find(self) -> RunningLoop:
        return self.running

    def ask(self, fields: dict[str, Any], around: Callable[[App], Any] | None = None) -> Client:
        client = Client(around(self.app) if around else self.app, fields)
        self.group.start_soon(client.run)
        return client


@asynccontextmanager
async def serving(backend: Backend, **options: Any) -> AsyncGenerator[Serving]:
    async with anyio.create_task_group() as group:
        house = Serving(backend, group, ServiceOptions(**options))
        yield house
        await house.app.aclose()
        assert house.app.service.admission.running == 0
        group.cancel_scope.cancel()


class Watched:
    """An async generator that says what becomes of it."""

    def __init__(self, before: Sequence[str] = ()) -> None:
        self.began = 0
        self.closed = 0
        self._before = before

    async def __call__(self, prompt: str) -> AsyncIterator[str]:
        del prompt
        self.began += 1
        try:
            for one in self._before:
                yield one
            await anyio.sleep_forever()
        finally:
            self.closed += 1


def wrapping_receive(inner: App) -> Callable[..., Awaitable[None]]:
    """A middleware that, like Starlette's, runs the application in a task of its own and wraps receive and send."""

    async def application(scope: Scope, receive: Any, send: Any) -> None:
        answered = anyio.Event()
        to_client, from_inner = anyio.create_memory_object_stream[Message]()

        async def receive_or_disconnect() -> Message:
            if answered.is_set():
                return {"type": "http.disconnect"}
            got: list[Message] = []
            async with anyio.create_task_group() as tasks:

                async def take() -> None:
                    got.append(await receive())
                    tasks.cancel_scope.cancel()

                tasks.start_soon(take)
                await answered.wait()
                tasks.cancel_scope.cancel()
            return got[0] if got else {"type": "http.disconnect"}

        async def run_inner() -> None:
            async with to_client:
                await inner(scope, receive_or_disconnect, to_client.send)

        async with anyio.create_task_group() as tasks, from_inner:
            tasks.start_soon(run_inner)
            async for message in from_inner:
                await send(message)
            answered.set()

    return application


# Leaving

LEAVING: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "before": ((), STREAM, 0),
    "midway": (("one", "two"), STREAM, 0),
    "whole": (("one",), WHOLE, 0),
    "queued": ((), STREAM, 1),
}


@pytest.mark.parametrize("around", [None, wrapping_receive], ids=["bare", "middleware"])
@pytest.mark.parametrize("stage", LEAVING)
async def test_a_client_that_leaves_stops_the_backend(
    stage: str, around: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tokenwire")
    before, fields, ahead = LEAVING[stage]
    watched = Watched(before)
    async with serving(GeneratorBackend(watched), max_running=1) as house:
        first = house.ask(fields, around)
        await until(lambda: watched.began)
        client = house.ask(fields, around) if ahead else first
        await turns()
        if stage == "midway":
            assert plain_text(b"".join(client.bodies) + b"data: [DONE]\n\n") == "onetwo"
        admission = house.app.service.admission
        assert (admission.running, admission.waiting) == (1, ahead)
        started = house.clock.time
        client.gone.set()
        await client.ended.wait()
        assert (admission.running, admission.waiting) == (ahead, 0)
        if not ahead:
            await until(lambda: watched.closed)
        assert house.clock.time == started  # no time had to pass for it
        assert watched.began == 1
        assert [message["status"] for message in client.sent[:1]] == [200 if stage == "midway" else 499]
        assert client.whole is (stage != "midway")
        assert [record.getMessage().split()[3] for record in caplog.records] == ["cancelled"]
        first.gone.set()


async def test_a_client_that_leaves_while_it_is_sent_to() -> None:
    push = Push()
    async with serving(push) as house:
        client = house.ask(STREAM)
        await until(lambda: push.jobs)
        client.room = anyio.Event()
        push.say(push.jobs[0], "one")
        await until(lambda: client.sent)
        client.gone.set()
        await client.ended.wait()
        assert push.jobs[0].cancels == 1


async def test_a_send_that_says_that_the_client_has_left() -> None:
    push = Push()
    async with serving(push) as house:

        def broken(inner: App) -> Any:
            async def application(scope: Scope, receive: Any, send: Any) -> None:
                async def fail(message: Message) -> None:
                    await send(message)
                    raise OSError("the client has left")

                await inner(scope, receive, fail)

            return application

        client = house.ask(STREAM, broken)
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "one")
        await client.ended.wait()
        assert push.jobs[0].cancels == 1


async def test_a_client_that_leaves_in_the_middle_of_its_body(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tokenwire")
    push = Push()
    async with serving(push) as house:
        client = Client(house.app, STREAM)
        client._body[0]["more_body"] = True
        client.gone.set()
        await client.run()
        assert client.sent[0]["status"] == 499
        assert push.jobs == []
        assert [record.getMessage().split()[3] for record in caplog.records] == ["disconnected"]


@pytest.mark.parametrize("fields", [STREAM, WHOLE], ids=["stream", "whole"])
async def test_cancellation_at_each_await(fields: dict[str, Any]) -> None:
    """The server may cancel a request's task wherever it waits; nothing of it may stay behind."""
    at, finished = 0, False
    while not finished:
        at += 1
        watched = Watched(("one", "two"))

        async def ends(prompt: str, watched: Watched = watched) -> AsyncIterator[str]:
            watched.began += 1
            try:
                yield f"{prompt} "
                await anyio.lowlevel.checkpoint()
                yield "there"
            finally:
                watched.closed += 1

        async with serving(GeneratorBackend(ends)) as house:
            client = Client(house.app, fields)
            awaits = 0
            scope = anyio.CancelScope()

            def counted(inner: Any, scope: anyio.CancelScope = scope, at: int = at) -> Any:
                async def call(*arguments: Any) -> Any:
                    nonlocal awaits
                    for _ in range(2):  # before it is done, and when it is
                        awaits += 1
                        if awaits == at:
                            scope.cancel()
                        await anyio.lowlevel.checkpoint()
                    return await inner(*arguments)

                return call

            with scope:
                await house.app(client.scope, counted(client.receive), counted(client.send))
            finished = not scope.cancel_called
            await turns()
            assert watched.began == watched.closed
            admission = house.app.service.admission
            assert admission.running == admission.waiting == 0
            assert client.receivers == 0
            assert client.whole or not finished
    assert at > 6


# Counts


async def test_one_wake_up_and_one_message_a_step() -> None:
    push = Push()
    async with serving(push) as house:
        clients = [house.ask(STREAM) for _ in range(5)]
        await until(lambda: len(push.jobs) == 5)
        push.step(*((job, ("a",)) for job in push.jobs))
        await until(lambda: all(client.bodies for client in clients))
        await turns()
        before = (house.loop.waiters, house.loop.tasks, house.loop.timers, len(clients[0].sent))
        for _ in range(20):
            push.step(*((job, ("b", "c", "d")) for job in push.jobs))
            await turns()
        after = (house.loop.waiters, house.loop.tasks, house.loop.timers, len(clients[0].sent))
        assert [now - then for now, then in zip(after, before, strict=True)] == [20 * 5, 0, 0, 20]
        push.step(*((job, (StreamEnd(),)) for job in push.jobs))
        for client in clients:
            await client.ended.wait()
            assert plain_text(b"".join(client.bodies)) == "a" + "bcd" * 20
        assert house.loop.tasks == 0


async def test_the_last_bytes_and_the_end_are_one_message() -> None:
    push = Push()
    async with serving(push) as house:
        client = house.ask(STREAM)
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "one", StreamEnd())
        await client.ended.wait()
        assert [message["type"] for message in client.sent] == ["http.response.start", "http.response.body"]
        assert client.whole


class KnownServer(Client):
    """A server whose `send` is begun in the call that made the bytes; it suspends by a bare future, like uvicorn's."""

    full: Waiter | None = None
    fault: Exception | None = None
    new_waiter: Callable[[], Waiter]

    async def send(self, message: Message) -> None:
        if self.full is not None:
            await self.full
        if self.fault is not None:
            raise self.fault
        self.sent.append(message)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    if loop == "trio":
        pytest.skip("uvicorn runs on asyncio")
    monkeypatch.setattr(asgi_carrier, "sends_at_once", callable)


def known_client(house: Serving) -> KnownServer:
    client = KnownServer(house.app, STREAM)
    client.new_waiter = house.loop.new_waiter
    house.group.start_soon(client.run)
    return client


@pytest.mark.usefixtures("known")
async def test_a_known_server_is_sent_to_in_the_call_that_made_the_bytes() -> None:
    push = Push()
    async with serving(push) as house:
        client = known_client(house)
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "a")
        await until(lambda: client.bodies)
        await turns()
        before = house.loop.waiters
        for number in range(20):
            push.say(push.jobs[0], "b", "c")
            assert len(client.bodies) == 2 + number
        assert house.loop.waiters == before
        push.say(push.jobs[0], StreamEnd())
        await client.ended.wait()
        assert client.whole
        assert len(client.bodies) == 22
        assert plain_text(b"".join(client.bodies)) == "a" + "bc" * 20


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("end", ["goes-on", "leaves"])
async def test_a_known_server_that_suspends_is_awaited_by_the_task(end: str) -> None:
    push = Push()
    async with serving(push) as house:
        client = known_client(house)
        await until(lambda: push.jobs)
        job = push.jobs[0]
        push.say(job, "a")
        await until(lambda: client.bodies)
        await turns()
        client.full = client.new_waiter()
        push.say(job, "b")
        await turns()
        push.say(job, "c")
        push.say(job, "d")
        assert job.blocked == [True]
        assert len(client.bodies) == 1
        if end == "leaves":
            client.gone.set()
            await client.ended.wait()
            assert job.cancels == 1
            return
        full, client.full = client.full, None
        full.set_result(None)
        await turns()
        assert job.blocked == [True, False]
        push.say(job, "e", StreamEnd())
        await client.ended.wait()
        assert plain_text(b"".join(client.bodies)) == "abcde"


@pytest.mark.usefixtures("known")
async def test_a_known_server_that_fails_fails_in_the_task() -> None:
    push = Push()
    async with serving(push) as house:
        clients = [known_client(house) for _ in range(2)]
        await until(lambda: len(push.jobs) == 2)
        push.step(*((job, ("a",)) for job in push.jobs))
        await until(lambda: all(client.bodies for client in clients))
        await turns()
        clients[0].fault = OSError("gone")
        push.step(*((job, ("b",)) for job in push.jobs))
        assert len(clients[1].bodies) == 2
        await clients[0].ended.wait()
        assert [job.cancels for job in push.jobs] == [1, 0]


def test_only_known_servers_are() -> None:
    class RequestResponseCycle:
        async def send(self, message: Message) -> None:
            del message

    cycle = RequestResponseCycle()
    assert not asgi_carrier.sends_at_once(cycle.send)
    RequestResponseCycle.send.__qualname__ = "RequestResponseCycle.send"
    RequestResponseCycle.send.__module__ = "uvicorn.protocols.http.h11_impl"
    assert asgi_carrier.sends_at_once(cycle.send)

    async def wrapped(message: Message) -> None:
        await cycle.send(message)

    assert not asgi_carrier.sends_at_once(wrapped)


# Back-pressure


async def test_a_slow_reader_rests_the_source_and_merges() -> None:
    push = Push()
    async with serving(push) as house:
        client = house.ask(STREAM)
        await until(lambda: push.jobs)
        job = push.jobs[0]
        client.room = anyio.Event()
        push.say(job, "one")
        await until(lambda: client.sent)
        for number in range(100):
            push.say(job, f"{number} ")
        assert job.blocked == [True]
        client.room.set()
        await turns()
        assert job.blocked == [True, False]
        assert len(client.bodies) == 2
        push.say(job, StreamEnd())
        await client.ended.wait()
        assert plain_text(b"".join(client.bodies)) == "one" + "".join(f"{number} " for number in range(100))
        assert b"".join(client.bodies).count(b"data: ") < 8  # what waited has left in few events


@pytest.mark.parametrize("by", ["budget", "stall"])
async def test_a_reader_that_is_too_slow_is_cut_off(by: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tokenwire")
    push = Push()
    async with serving(push, delivery=DeliveryOptions(budget_bytes=1000, stall_ns=60 * SECOND)) as house:
        client = house.ask(STREAM)
        await until(lambda: push.jobs)
        client.room = anyio.Event()
        push.say(push.jobs[0], "one")
        await until(lambda: client.sent)
        push.say(push.jobs[0], "two")
        push.say(push.jobs[0], "x" * (2000 if by == "budget" else 10))
        house.clock.advance(60 * SECOND if by == "stall" else 0)
        await client.ended.wait()
        assert not client.whole
        assert push.jobs[0].cancels == 1
        assert [record.getMessage().split()[3] for record in caplog.records] == ["slow_reader"]


async def test_an_end_that_comes_while_the_head_is_being_sent_is_not_lost() -> None:
    push = Push()
    async with serving(push) as house:
        client = house.ask(STREAM)
        await until(lambda: push.jobs)
        client.room = anyio.Event()
        push.say(push.jobs[0], "one")
        await until(lambda: client.sent)
        push.say(push.jobs[0], " two", StreamEnd())
        client.room.set()
        await until(lambda: client.whole)
        assert plain_text(b"".join(client.bodies)) == "one two"


async def test_silence_is_broken_by_a_heartbeat() -> None:
    push = Push()
    async with serving(push, delivery=DeliveryOptions(heartbeat_ns=15 * SECOND)) as house:
        client = house.ask(STREAM)
        await until(lambda: push.jobs)
        house.clock.advance(15 * SECOND - 1)
        await turns()
        assert client.sent == []
        house.clock.advance(1)
        await until(lambda: client.bodies == [b": ka\n"])
        push.say(push.jobs[0], StreamEnd())
        await client.ended.wait()


async def test_an_ended_answer_is_not_held_until_its_deadline() -> None:
    push = Push()
    async with serving(push) as house:
        client = house.ask(STREAM)
        await until(lambda: push.jobs)
        push.say(push.jobs[0], StreamEnd())
        await client.ended.wait()
        sent = len(client.sent)
        house.clock.advance(60 * SECOND)
        await turns()
        assert len(client.sent) == sent


# Places to be mounted in


@pytest.mark.parametrize(
    ("path", "root", "status"),
    [("/ai/healthz", "/ai", 200), ("/healthz", "/ai", 200), ("/ai", "/ai", 200), ("/aihealthz", "/ai", 404),
     ("/healthz", "", 200), ("/wörld", "", 404)],
)  # fmt: skip
async def test_the_path_below_a_mount(path: str, root: str, status: int) -> None:
    async with serving(Push(), page=b"<p>") as house:
        client = Client(house.app, {})
        client.scope.update({"method": "GET", "path": path, "root_path": root, "headers": [(b"host", b"localhost")]})
        await client.run()
        assert client.sent[0]["status"] == status


@pytest.mark.parametrize(("raw", "status"), [(b"/ai/healthz", 200), (b"/ai/healthz/", 404), (b"/ai/healthz?x=/", 200)])
async def test_a_slash_that_the_framework_has_added(raw: bytes, status: int) -> None:
    async with serving(Push()) as house:
        client = Client(house.app, {})
        client.scope.update(
            {"method": "GET", "path": "/healthz/", "raw_path": raw, "headers": [(b"host", b"localhost")]}
        )
        await client.run()
        assert client.sent[0]["status"] == status


async def test_http2_announces_no_body() -> None:
    async with serving(Push()) as house:
        client = Client(house.app, STREAM)
        client.scope.update({"http_version": "2", "headers": [(b"host", b"localhost")]})
        await client.run()
        assert client.sent[0]["status"] == 415  # there was a body, and no type


async def test_a_scope_of_another_kind() -> None:
    async with serving(Push()) as house:
        client = Client(house.app, {})
        client.scope["type"] = "smoke"
        with pytest.raises(ValueError, match="'smoke'"):
            await client.run()
        assert client.sent == []


# The beginning and the end


async def lifespan(application: App, meanwhile: Callable[[], Awaitable[None]]) -> list[str]:
    sent: list[str] = []
    turn = 0

    async def receive() -> Message:
        nonlocal turn
        turn += 1
        if turn == 2:
            await meanwhile()
        return {"type": "lifespan.startup" if turn == 1 else "lifespan.shutdown"}

    async def send(message: Message) -> None:
        sent.append(message["type"])

    await application({"type": "lifespan"}, receive, send)
    return sent


async def test_a_lifespan() -> None:
    push = Push()
    application = App(push)
    client = Client(application, STREAM)

    async def meanwhile() -> None:
        group.start_soon(client.run)
        await until(lambda: push.jobs)

    async with anyio.create_task_group() as group:
        assert await lifespan(application, meanwhile) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert client.sent[0]["status"] == 503
    assert push.closed == 1
    with pytest.raises(RuntimeError, match="closed"):
        application.start()


async def test_a_lifespan_that_fails() -> None:
    class Broken(Push):
        def attach(self, runtime: Any, sink: Any) -> None:  # noqa: ARG002  # it gets no further
            raise OSError("no engine")

    async def nothing() -> None:
        pass

    with pytest.raises(OSError, match="no engine"):
        await lifespan(App(Broken()), nothing)


async def test_without_a_lifespan_the_first_request_starts_it() -> None:
    async def hello(prompt: str) -> AsyncIterator[str]:
        yield f"{prompt}, world"

    application = app(hello, max_running=3)
    client = Client(application, STREAM)
    await client.run()
    assert plain_text(b"".join(client.bodies)) == "hi, world"
    assert application.service.options.max_running == 3
    await application.aclose()
    await application.aclose()


async def test_an_application_belongs_to_one_loop() -> None:
    application = App(Push())
    application.start()
    elsewhere = App(Push(), find_loop=lambda: RunningLoop(running_loop().loop, running_loop().timers, lambda: 0))
    elsewhere.start()
    with pytest.raises(RuntimeError, match="another event loop"):
        elsewhere.start()
    await application.aclose()


async def test_the_end_cancels_the_backends_tasks() -> None:
    class Busy(Push):
        ended = 0

        def attach(self, runtime: Any, sink: Any) -> None:
            super().attach(runtime, sink)
            runtime.start_task(self._work)

        async def _work(self) -> None:
            try:
                await anyio.sleep_forever()
            finally:
                self.ended += 1

    busy = Busy()
    application = App(busy)
    application.start()
    await turns()
    await application.aclose()
    assert busy.ended == 1


def test_without_a_loop() -> None:
    with pytest.raises(RuntimeError):
        runtime.running_loop()
