"""The client on every loop and without one, against a server whose every byte is the test's."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, cast

import anyio
import pytest
from tests.adapters.authorities import Certificates
from tests.adapters.dialing import FarEnd, Listener
from tests.adapters.serving import SECOND, Clock, WatchedReadiness, turns, until

from tokenwire.adapters import client as client_module
from tokenwire.adapters.byte_path import Readiness
from tokenwire.adapters.client import (
    MAX_EVENTS,
    AsyncStream,
    ConnectFailed,
    Patience,
    StreamFailed,
    connect,
    connect_sync,
)
from tokenwire.adapters.runtime import RunningLoop, run_timers, running_loop
from tokenwire.core.errors import RequestRefused
from tokenwire.core.events import ErrorKind, Event, StreamEnd, StreamError, StreamTruncated, TextDelta, UsageReport
from tokenwire.core.request import GenerationRequest, Message, TextPart

on_every_loop = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
TO_ITS_END = HEAD + b"connection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def delta(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    said = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


WHOLE = CHUNKED + chunk(delta("Hel") + delta("lo")) + chunk(delta("", "stop") + DONE) + chunk(b"")


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def body_of(request: bytes | bytearray) -> dict[str, Any]:
    head, _, body = bytes(request).partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head
    read: dict[str, Any] = json.loads(body)
    return read


@pytest.fixture
def listener() -> Iterator[Listener]:
    with closing(Listener()) as one:
        yield one


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The client's clock, which the test moves."""
    clock = Clock()

    def find() -> RunningLoop:
        running = running_loop()
        readiness: Any = WatchedReadiness(cast("Readiness", running.loop), clock)
        readiness.new_waiter = running.loop.new_waiter
        return run_timers(readiness, clock.now)

    monkeypatch.setattr(client_module, "running_loop", find)
    return clock


def url_of(listener: Listener, *, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{listener.port}"


class Asking:
    """A client's block in a task of its own.

    Attributes:
        events: what it has taken.
        raised: what left the block.
    """

    def __init__(self, stream: AsyncStream) -> None:
        self.stream = stream
        self.events: list[Event] = []
        self.entered = False
        self.over = False
        self.raised: Exception | None = None

    async def run(self) -> None:
        try:
            async with self.stream:
                self.entered = True
                async for event in self.stream:
                    self.events.append(event)
        except ConnectFailed as error:
            self.raised = error
        self.over = True


async def put(tasks: anyio.abc.TaskGroup, listener: Listener, stream: AsyncStream) -> tuple[Asking, FarEnd]:
    """Have a stream asked, up to where the server has the question."""
    asking = Asking(stream)
    tasks.start_soon(asking.run)
    far = await listener.accept()
    await far.until(lambda: asking.entered and b"\r\n\r\n" in far.received)
    return asking, far


# A whole stream


@on_every_loop
async def test_a_stream_is_taken_as_it_comes(listener: Listener) -> None:
    async with anyio.create_task_group() as tasks:
        asking, far = await put(tasks, listener, connect(url_of(listener), "Hi", model="m", max_tokens=5))
        head, _, _ = bytes(far.received).partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert b"host: 127.0.0.1:%d" % listener.port in head
        assert b"authorization" not in head
        asked = body_of(far.received)
        assert asked["messages"] == [{"role": "user", "content": "Hi"}]
        assert (asked["model"], asked["stream"]) == ("m", True)
        assert asked["stream_options"] == {"include_usage": True}
        assert 5 in {asked.get("max_tokens"), asked.get("max_completion_tokens")}
        far.say(CHUNKED + chunk(delta("Hel")))
        await until(lambda: text_of(asking.events) == "Hel")
        assert not asking.over
        assert asking.stream.status == 200
        far.say(chunk(delta("lo")) + chunk(delta("", "stop") + DONE) + chunk(b""))
        await until(lambda: asking.over)
        assert text_of(asking.events) == "Hello"
        assert asking.events[-1] == asking.stream.terminal == StreamEnd()
        asking.stream.raise_for_error()
        await far.until_ended()


@on_every_loop
async def test_collect(listener: Listener) -> None:
    async with anyio.create_task_group() as tasks:

        async def answer() -> None:
            far = await listener.accept()
            await far.until(lambda: b"\r\n\r\n" in far.received)
            far.say(WHOLE)

        tasks.start_soon(answer)
        async with connect(url_of(listener), "Hi") as stream:
            result = await stream.collect()
        assert result.choices[0].text == "Hello"
        assert result.terminal == StreamEnd()


@on_every_loop
async def test_tls(certificates: Certificates) -> None:
    with closing(Listener(certificates.server)) as listener:
        async with anyio.create_task_group() as tasks:
            url = url_of(listener, scheme="https")
            asking, far = await put(tasks, listener, connect(url, "Hi", tls=certificates.client, api_key="secret"))
            assert b"\r\nauthorization: Bearer secret\r\n" in far.received
            far.say(WHOLE)
            await far.until(lambda: asking.over)
            assert text_of(asking.events) == "Hello"
            await far.until(lambda: far.notified)


@on_every_loop
async def test_plain(listener: Listener) -> None:
    async with anyio.create_task_group() as tasks:
        asking, far = await put(tasks, listener, connect(url_of(listener), "Hi", dialect="plain"))
        assert far.received.startswith(b"POST /chat HTTP/1.1\r\n")
        far.say(CHUNKED + chunk(b'data: {"token":"Hello"}\n\n') + chunk(DONE) + chunk(b""))
        await until(lambda: asking.over)
        assert text_of(asking.events) == "Hello"
        assert asking.stream.terminal == StreamEnd()


# How it ends otherwise


@on_every_loop
async def test_a_refusal_is_an_event(listener: Listener) -> None:
    async with anyio.create_task_group() as tasks:
        asking, far = await put(tasks, listener, connect(url_of(listener), "Hi"))
        body = b'{"error":{"message":"slow down","type":"rate_limit_error"}}'
        far.say(
            b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 2\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        await until(lambda: asking.over)
        (error,) = asking.events
        assert isinstance(error, StreamError)
        assert (error.kind, error.message, error.status) == (ErrorKind.RATE_LIMIT, "slow down", 429)
        assert error.retry_after_ns == 2 * SECOND
        with pytest.raises(StreamFailed, match="slow down") as failed:
            asking.stream.raise_for_error()
        assert failed.value.terminal == error
        assert asking.stream.status == 429


@on_every_loop
@pytest.mark.parametrize("head", [CHUNKED, TO_ITS_END], ids=["chunked", "to its end"])
@pytest.mark.parametrize("how", [FarEnd.half_close, FarEnd.reset], ids=["end", "reset"])
async def test_a_stream_that_breaks_off(listener: Listener, head: bytes, how: Callable[[FarEnd], None]) -> None:
    async with anyio.create_task_group() as tasks:
        asking, far = await put(tasks, listener, connect(url_of(listener), "Hi"))
        said = delta("Hel")
        far.say(head + (chunk(said) if head is CHUNKED else said))
        await until(lambda: asking.events)
        how(far)
        await until(lambda: asking.over)
        assert text_of(asking.events) == "Hel"
        assert isinstance(asking.events[-1], StreamTruncated)
        assert asking.events[-1].bytes_seen > 0
        with pytest.raises(StreamFailed, match="broke off"):
            asking.stream.raise_for_error()


@on_every_loop
async def test_tls_that_is_cut_is_no_end(certificates: Certificates) -> None:
    """An answer that lasts to its connection's end, all said but close_notify: somebody else may have cut it."""
    with closing(Listener(certificates.server)) as listener:
        async with anyio.create_task_group() as tasks:
            url = url_of(listener, scheme="https")
            asking, far = await put(tasks, listener, connect(url, "Hi", tls=certificates.client))
            far.say(TO_ITS_END + delta("Hel") + delta("", "stop"))
            await until(lambda: text_of(asking.events) == "Hel")
            far.half_close()
            await until(lambda: asking.over)
            (truncated,) = (event for event in asking.events if isinstance(event, StreamTruncated | StreamEnd))
            assert isinstance(truncated, StreamTruncated)
            assert "close_notify" in truncated.reason


@on_every_loop
async def test_no_answer_at_all(listener: Listener) -> None:
    async with anyio.create_task_group() as tasks:
        asking, far = await put(tasks, listener, connect(url_of(listener), "Hi"))
        far.close()
        await until(lambda: asking.over)
        (truncated,) = asking.events
        assert isinstance(truncated, StreamTruncated)
        assert truncated.bytes_seen == 0


# Deadlines


@on_every_loop
async def test_silence(listener: Listener, clock: Clock) -> None:
    patience = Patience(first_byte_ns=9 * SECOND, silence_ns=3 * SECOND)
    async with anyio.create_task_group() as tasks:
        asking, far = await put(tasks, listener, connect(url_of(listener), "Hi", patience=patience))
        clock.advance(9 * SECOND - 1)
        far.say(CHUNKED)
        await until(lambda: asking.stream.status)
        for _ in range(5):  # heartbeats are as good as tokens
            clock.advance(3 * SECOND - 1)
            before = asking.stream._session._seen
            far.say(chunk(b": still here\n"))
            await until(lambda before=before: asking.stream._session._seen > before)  # type: ignore[misc]
        clock.advance(3 * SECOND - 1)
        await turns()
        assert not asking.over
        clock.advance(1)
        await until(lambda: asking.over)
        await far.until_ended()
        (truncated,) = asking.events
        assert isinstance(truncated, StreamTruncated)
        assert truncated.reason == "the server sent nothing for 3 s"
        assert truncated.bytes_seen > 0


@on_every_loop
async def test_the_first_byte(listener: Listener, clock: Clock) -> None:
    patience = Patience(first_byte_ns=9 * SECOND, silence_ns=3 * SECOND)
    async with anyio.create_task_group() as tasks:
        asking, far = await put(tasks, listener, connect(url_of(listener), "Hi", patience=patience))
        clock.advance(9 * SECOND)
        await until(lambda: asking.over)
        await far.until_ended()
        assert asking.events == [StreamTruncated("the server did not begin to answer within 9 s", 0)]


@on_every_loop
async def test_a_slow_asker_is_no_silent_server(listener: Listener, clock: Clock) -> None:
    patience = Patience(silence_ns=3 * SECOND)
    async with anyio.create_task_group() as tasks:

        async def answer() -> None:
            far = await listener.accept()
            await far.until(lambda: b"\r\n\r\n" in far.received)
            far.say(CHUNKED + chunk(delta("x") * MAX_EVENTS * 2))
            await until(lambda: stream._session._paused)
            clock.advance(30 * SECOND)
            gate.set()
            await until(lambda: not stream._session._paused)
            clock.advance(3 * SECOND - 1)
            far.say(chunk(delta("y", "stop") + DONE) + chunk(b""))

        gate = anyio.Event()
        stream = connect(url_of(listener), "Hi", patience=patience)
        tasks.start_soon(answer)
        async with stream:
            await gate.wait()
            events = [event async for event in stream]
        assert text_of(events) == "x" * MAX_EVENTS * 2 + "y"
        assert stream.terminal == StreamEnd()


@on_every_loop
async def test_back_pressure(listener: Listener) -> None:
    """A server that says more than anybody takes is held back by the kernel, not by our memory."""
    async with anyio.create_task_group() as tasks:
        sent = 0

        async def answer() -> None:
            nonlocal sent
            far = await listener.accept()
            far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
            await far.until(lambda: b"\r\n\r\n" in far.received)
            far.say(CHUNKED)
            for number in range(4_000):
                await far.say_much(chunk(delta(f"{number} ") * 10))
                sent = number
            await far.say_much(chunk(delta("", "stop") + DONE) + chunk(b""))

        tasks.start_soon(answer)
        async with connect(url_of(listener), "Hi") as stream:
            await until(lambda: stream._session._paused)
            await turns(200)
            held = len(stream._session._events)
            assert MAX_EVENTS <= held <= MAX_EVENTS + 64 * 1024 // len(delta("0 "))
            events = [event async for event in stream]
        assert sent == 3_999
        assert text_of(events) == "".join(f"{number} " * 10 for number in range(4_000))


# Connecting


@on_every_loop
async def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(
            ConnectFailed, match=f"cannot connect to 127.0.0.1 port {port}: Connection refused"
        ) as failed:
            async with connect(f"http://127.0.0.1:{port}", "Hi"):
                pytest.fail("it was entered")
    assert failed.value.reason == "Connection refused"


@on_every_loop
async def test_a_certificate_that_is_refused(certificates: Certificates) -> None:
    with closing(Listener(certificates.stranger)) as listener:
        async with anyio.create_task_group() as tasks:
            asking = Asking(connect(url_of(listener, scheme="https"), "Hi", tls=certificates.client))
            tasks.start_soon(asking.run)
            far = await listener.accept()
            await far.until(lambda: asking.over)
            assert isinstance(asking.raised, ConnectFailed)
            assert "certificate is refused" in asking.raised.reason


@on_every_loop
async def test_a_server_that_does_not_take_the_connection(clock: Clock, certificates: Certificates) -> None:
    with closing(Listener(certificates.server)) as listener:
        async with anyio.create_task_group() as tasks:
            patience = Patience(connect_ns=2 * SECOND)
            asking = Asking(connect(url_of(listener, scheme="https"), "Hi", patience=patience))
            tasks.start_soon(asking.run)
            await listener.accept()  # and never shakes hands
            await turns()
            clock.advance(2 * SECOND)
            await until(lambda: asking.over)
            assert isinstance(asking.raised, ConnectFailed)
            assert asking.raised.reason == "the TLS handshake is not done in time"


# Leaving


@on_every_loop
async def test_leaving_closes_at_once(listener: Listener) -> None:
    async with anyio.create_task_group() as tasks:
        left = anyio.Event()

        async def ask() -> None:
            async with connect(url_of(listener), "Hi") as stream:
                async for event in stream:
                    if isinstance(event, TextDelta):
                        break
            left.set()
            assert stream.terminal is None
            assert [event async for event in stream] == []
            with pytest.raises(StreamFailed, match="has not ended"):
                stream.raise_for_error()

        tasks.start_soon(ask)
        far = await listener.accept()
        await far.until(lambda: b"\r\n\r\n" in far.received)
        far.say(CHUNKED + chunk(delta("Hel")))
        await far.until_ended()
        await left.wait()


@on_every_loop
@pytest.mark.parametrize("when", ["connecting", "waiting"])
async def test_a_cancel_closes_at_once(listener: Listener, certificates: Certificates, when: str) -> None:
    scheme = "https" if when == "connecting" else "http"
    asking = Asking(connect(url_of(listener, scheme=scheme), "Hi", tls=certificates.client))
    ends: list[FarEnd] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asking.run)
        far = await listener.accept()
        await far.until(lambda: far.received)
        await turns()
        assert asking.entered == (when == "waiting")
        ends.append(far)
        tasks.cancel_scope.cancel()
    await ends[0].until_ended()
    assert asking.events == []


@on_every_loop
async def test_one_task_at_a_time(listener: Listener) -> None:
    async with anyio.create_task_group() as tasks:
        asking, far = await put(tasks, listener, connect(url_of(listener), "Hi"))
        await turns()
        with pytest.raises(RuntimeError, match="another task"):
            await anext(aiter(asking.stream))
        far.say(WHOLE)
        await until(lambda: asking.over)
        assert text_of(asking.events) == "Hello"


# Without a loop


@contextmanager
def answering(answer: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> Generator[int]:
    """Run a server for one connection in a thread; give its port."""

    def serve() -> None:
        sock, _ = listening.accept()
        with sock if context is None else context.wrap_socket(sock, server_side=True) as connection:
            while b"\r\n\r\n" not in connection.recv(65_536):
                pass
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_sync(host: str) -> None:
    with (
        answering(lambda sock: sock.sendall(WHOLE)) as port,
        connect_sync(f"http://{host}:{port}", "Hi") as stream,
    ):
        events = list(stream)
    assert text_of(events) == "Hello"
    stream.raise_for_error()
    assert list(stream) == []


def test_sync_over_tls(certificates: Certificates) -> None:
    def answer(sock: socket.socket) -> None:
        sock.sendall(WHOLE)
        left.append(sock.recv(1))  # close_notify; else an SSLEOFError is raised here

    left: list[bytes] = []
    with (
        answering(answer, certificates.server) as port,
        connect_sync(f"https://127.0.0.1:{port}", "Hi", tls=certificates.client) as stream,
    ):
        result = stream.collect()
    assert result.choices[0].text == "Hello"
    assert left == [b""]


def test_sync_leaving_closes_at_once() -> None:
    def answer(sock: socket.socket) -> None:
        sock.sendall(CHUNKED + chunk(delta("Hel")))
        left.append(sock.recv(1))

    left: list[bytes] = []
    with (
        answering(answer) as port,
        connect_sync(f"http://127.0.0.1:{port}", "Hi") as stream,
    ):
        events = [next(stream) for _ in range(2)]
    assert text_of(events) == "Hel"
    assert left == [b""]


def test_sync_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs a thousand times as fast once the first byte has come."""

    def answer(sock: socket.socket) -> None:
        sock.sendall(CHUNKED + chunk(delta("Hel")))
        left.append(sock.recv(1))

    left: list[bytes] = []
    with (
        answering(answer) as port,
        connect_sync(f"http://127.0.0.1:{port}", "Hi", patience=Patience(silence_ns=30 * SECOND)) as stream,
    ):
        first = [next(stream) for _ in range(2)]
        ahead, real = 40 * SECOND, time.monotonic_ns
        monkeypatch.setattr(time, "monotonic_ns", lambda: real() + ahead)
        (last,) = stream
    assert text_of(first) == "Hel"
    assert isinstance(last, StreamTruncated)
    assert last.reason == "the server sent nothing for 30 s"
    assert left == [b""]


def test_sync_refused() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with (
            pytest.raises(ConnectFailed, match="Connection refused"),
            connect_sync(f"http://127.0.0.1:{sock.getsockname()[1]}", "Hi"),
        ):
            pytest.fail("it was entered")


# What is asked


@pytest.mark.parametrize(
    ("url", "dialect", "target", "host"),
    [
        ("http://h", "openai_chat", "/v1/chat/completions", "h"),
        ("http://h/", "openai_chat", "/v1/chat/completions", "h"),
        ("http://h:80/v1", "openai_chat", "/v1/chat/completions", "h"),
        ("https://h:443/v1/", "openai_chat", "/v1/chat/completions", "h"),
        ("https://h:80/api/v3", "openai_chat", "/api/v3/chat/completions", "h:80"),
        ("http://h/x/chat/completions?api-version=1", "openai_chat", "/x/chat/completions?api-version=1", "h"),
        ("http://[::1]:8000", "plain", "/chat", "[::1]:8000"),
        ("http://h/llm", "plain", "/llm/chat", "h"),
        ("http://h/chat", "plain", "/chat", "h"),
    ],
)
def test_urls(url: str, dialect: str, target: str, host: str) -> None:
    stream = connect_sync(url, "Hi", dialect=dialect)
    lines = stream._session._client.data_to_send().split(b"\r\n")
    assert lines[0] == f"POST {target} HTTP/1.1".encode()
    assert lines[1] == f"host: {host}".encode()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("h:8000", "must be http"),
        ("ftp://h", "must be http"),
        ("http://", "must be http"),
        ("http://user:secret@h", "neither a user's name"),
        ("http://h/#here", "neither a user's name"),
        ("http://h:99999", "Port out of range"),
        ("http://h/a b", "percent-encoded"),
    ],
)
def test_urls_that_are_none(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        connect_sync(url, "Hi")
    assert "secret" not in str(raised.value)


def test_headers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="authorization") as raised:
        connect_sync("http://h", "Hi", api_key="se\ncret")
    assert "se\ncret" not in str(raised.value)
    with pytest.raises(ValueError, match="not the caller's"):
        connect_sync("http://h", "Hi", headers={"Transfer-Encoding": "chunked"})


def test_a_dialect_that_is_none() -> None:
    with pytest.raises(ValueError, match="there is no dialect 'latin'; there are openai_chat, plain"):
        connect_sync("http://h", "Hi", dialect="latin")


def test_what_a_dialect_cannot_say() -> None:
    with pytest.raises(RequestRefused):
        connect_sync("http://h", "Hi", dialect="plain", n=2)


Said = str | Sequence[Message | Mapping[str, str]] | GenerationRequest


@pytest.mark.parametrize(
    "prompt",
    [
        "Hi",
        [{"role": "user", "content": "Hi"}],
        [Message("user", (TextPart("Hi"),))],
        GenerationRequest(model="m", messages=(Message("user", (TextPart("Hi"),)),)),
    ],
    ids=["text", "mappings", "messages", "request"],
)
def test_prompts(prompt: Said) -> None:
    stream = connect_sync("http://h", prompt, model="m", temperature=0.5)
    asked = body_of(stream._session._client.data_to_send())
    assert asked["messages"] == [{"role": "user", "content": "Hi"}]
    assert (asked["model"], asked["temperature"], asked["stream"]) == ("m", 0.5, True)


def test_a_body_is_sent_as_it_is() -> None:
    body = b'{"model":"m","stream":true,"messages":[]}'
    stream = connect_sync("http://h", body)
    assert stream._session._client.data_to_send().endswith(b"\r\n\r\n" + body)
    with pytest.raises(TypeError, match="takes no parameters"):
        connect_sync("http://h", body, n=2)


@pytest.mark.parametrize("message", [{"content": "Hi"}, {"role": "robot", "content": "Hi"}])
def test_messages_that_are_none(message: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="role"):
        connect_sync("http://h", [message])


def test_a_parameter_that_is_none() -> None:
    with pytest.raises(TypeError, match="warmth"):
        connect_sync("http://h", "Hi", warmth=1)


def test_usage_comes_too() -> None:
    usage = (
        b'data: {"id":"c","created":1,"model":"m","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
    )
    said = CHUNKED + chunk(delta("Hello") + delta("", "stop") + usage + DONE) + chunk(b"")
    with answering(lambda sock: sock.sendall(said)) as port, connect_sync(f"http://127.0.0.1:{port}", "Hi") as stream:
        events = list(stream)
    assert [event for event in events if isinstance(event, UsageReport)] == [UsageReport(3, 2)]
