"""A WebSocket of ASGI, called directly: leaving, back-pressure, a `send` that raises, shutdown, cancellation at each await."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest
from tests.adapters.serving import SECOND, Push, turns, until
from tests.adapters.test_asgi import Watched, serving

from tokenwire.adapters.asgi_messages import Message, Scope
from tokenwire.backends.generators import GeneratorBackend
from tokenwire.core.conversation import SUBPROTOCOLS
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.events import ErrorKind, StreamEnd, StreamError

pytestmark = pytest.mark.anyio

PROMPT = {"type": "websocket.receive", "text": '{"prompt":"hi"}'}
SLOW = DeliveryOptions(stall_ns=20 * SECOND)


class Socket:
    """One WebSocket. It takes what is sent, unless the test has it hold back.

    Attributes:
        sent: what the application has sent, each message before `send` returned.
        room: `send` returns while this is set.
        fault: what `send` raises from now on.
        ended: the application has returned.
        raised: what it has raised.
    """

    def __init__(self, application: Callable[..., Awaitable[None]], **scope: Any) -> None:
        self.sent: list[Message] = []
        self.room = anyio.Event()
        self.room.set()
        self.fault: Exception | None = None
        self.raised: BaseException | None = None
        self.ended = anyio.Event()
        self.scope: Scope = {
            "type": "websocket",
            "path": "/ws/chat",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"upgrade", b"websocket")],
            "subprotocols": [],
            **scope,
        }
        self._application = application
        self._receiving = 0
        self._give, self._inbox = anyio.create_memory_object_stream[Message](100)
        self._cancel = anyio.CancelScope()
        self.hand_in({"type": "websocket.connect"})

    async def run(self) -> None:
        with self._give, self._inbox, self._cancel:
            try:
                await self._application(self.scope, self._receive, self._send)
            except Exception as error:  # noqa: BLE001  # the test looks at it
                self.raised = error
            finally:
                self.ended.set()

    def hand_in(self, message: Message) -> None:
        """Let the application receive a message."""
        self._give.send_nowait(message)

    def leave(self) -> None:
        self.hand_in({"type": "websocket.disconnect", "code": 1006})

    def stall(self) -> None:
        self.room = anyio.Event()

    def cancel(self) -> None:
        self._cancel.cancel()

    async def _receive(self) -> Message:
        self._receiving += 1
        assert self._receiving == 1, "receive has two owners"
        try:
            return await self._inbox.receive()
        finally:
            self._receiving -= 1

    async def _send(self, message: Message) -> None:
        assert not (self._receiving and message["type"] == "websocket.close"), "granian would lose this close"
        if self.fault is not None:
            raise self.fault
        self.sent.append(message)
        await self.room.wait()

    @property
    def kinds(self) -> list[str]:
        return [message["type"].removeprefix("websocket.") for message in self.sent]

    def has_heard(self, count: int) -> bool:
        return len(self.texts) == count

    @property
    def texts(self) -> list[str]:
        return [message["text"] for message in self.sent if message["type"] == "websocket.send"]


def _is_accepted(socket: Socket) -> bool:
    return socket.kinds == ["accept"]


async def test_prompts_and_answers() -> None:
    push = Push()
    async with serving(push) as house:
        socket = Socket(house.app)
        house.group.start_soon(socket.run)
        socket.hand_in(PROMPT)
        socket.hand_in(PROMPT)
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "a")
        await until(lambda: socket.texts)
        push.say(push.jobs[0], "b")
        push.say(push.jobs[0], "c", StreamEnd())
        await until(lambda: len(push.jobs) == 2)
        push.say(push.jobs[1], "d", StreamEnd())
        await until(lambda: socket.texts.count("[DONE]") == 2)
        assert "".join(socket.texts) == "abc[DONE]d[DONE]"
        socket.leave()
        await socket.ended.wait()
        assert socket.raised is None
        assert socket.kinds[0] == "accept"
        assert "close" not in socket.kinds


async def test_objects_and_the_word_to_cancel() -> None:
    push = Push()
    async with serving(push) as house:
        socket = Socket(house.app, subprotocols=["x", *SUBPROTOCOLS])
        house.group.start_soon(socket.run)
        socket.hand_in(PROMPT)
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "a")
        await until(lambda: socket.texts)
        socket.hand_in({"type": "websocket.receive", "text": '{"cancel":true}', "bytes": None})
        await until(lambda: len(socket.texts) == 3)
        assert push.jobs[0].cancels == 1
        assert socket.sent[0]["subprotocol"] == SUBPROTOCOLS[0]
        assert json.loads(socket.texts[1])["error"]["code"] == "cancelled"
        socket.leave()
        await socket.ended.wait()


async def test_what_an_engine_says_at_once_is_sent_by_one_wake_up() -> None:
    push = Push()
    async with serving(push) as house:
        socket = Socket(house.app)
        house.group.start_soon(socket.run)
        socket.hand_in(PROMPT)
        await until(lambda: push.jobs)
        await turns()
        waiters = house.loop.waiters
        for number in range(10):
            push.say(push.jobs[0], str(number))
        await until(lambda: "".join(socket.texts) == "0123456789")
        await turns()
        assert house.loop.waiters - waiters == 1
        socket.leave()
        await socket.ended.wait()


# Leaving


@pytest.mark.parametrize("stage", ["silent", "midway", "away"])
async def test_a_client_that_leaves_stops_the_backend(stage: str) -> None:
    watched = Watched(() if stage == "silent" else ("a", "b"))
    async with serving(GeneratorBackend(watched)) as house:
        socket = Socket(house.app)
        house.group.start_soon(socket.run)
        await until(lambda: socket.kinds == ["accept"])
        if stage == "away":
            socket.stall()
        socket.hand_in(PROMPT)
        await until(lambda: watched.began)
        if stage != "silent":
            await until(lambda: socket.texts)
        socket.leave()
        await socket.ended.wait()
        await until(lambda: watched.closed)
        assert socket.raised is None


async def test_a_client_that_has_left_before_it_was_answered() -> None:
    async with serving(Push()) as house:
        socket = Socket(house.app)
        socket._inbox.receive_nowait()
        socket.leave()
        await socket.run()
        assert socket.sent == []


# A `send` that blocks or raises


async def test_a_reader_that_stalls_holds_up_nobody_and_is_given_up() -> None:
    push = Push()
    async with serving(push, delivery=SLOW) as house:
        slow, quick = Socket(house.app), Socket(house.app)
        for socket in (slow, quick):
            house.group.start_soon(socket.run)
            await until(partial(_is_accepted, socket))
            socket.hand_in(PROMPT)
        await until(lambda: len(push.jobs) == 2)
        slow.stall()
        for number in range(50):
            push.step((push.jobs[0], ["x"]), (push.jobs[1], [str(number)]))
            await until(partial(quick.has_heard, number + 1))
        assert slow.texts == ["x"]
        assert push.jobs[0].blocked == [True]
        house.clock.advance(SLOW.stall_ns)
        await slow.ended.wait()
        assert push.jobs[0].cancels == 1
        assert push.jobs[1].cancels == 0
        assert slow.raised is None
        push.say(push.jobs[1], "end", StreamEnd())
        await until(lambda: quick.texts[-1] == "[DONE]")
        quick.leave()
        await quick.ended.wait()


@pytest.mark.parametrize("last", ["end", "too many prompts", "cancel"])
async def test_a_reader_that_does_not_take_the_last_of_it_is_given_up(last: str) -> None:
    """No answer runs any more whose patience could end: the connection's own does."""
    push = Push()
    async with serving(push, delivery=SLOW) as house:
        socket = Socket(house.app, subprotocols=list(SUBPROTOCOLS))
        house.group.start_soon(socket.run)
        await until(partial(_is_accepted, socket))
        socket.hand_in(PROMPT)
        await until(lambda: push.jobs)
        socket.stall()
        push.say(push.jobs[0], "a")
        await until(lambda: socket.texts)
        house.clock.advance(SECOND)
        if last == "end":
            push.say(push.jobs[0], StreamEnd())
        for _ in range(20 if last == "too many prompts" else 0):
            socket.hand_in(PROMPT)
        if last == "cancel":
            push.say(push.jobs[0], "b")
            socket.hand_in({"type": "websocket.receive", "text": '{"cancel":true}'})
        await turns()
        assert push.jobs[0].cancels == (last != "end")
        house.clock.advance(SLOW.stall_ns - 1)
        await turns()
        assert not socket.ended.is_set()
        house.clock.advance(1)
        await socket.ended.wait()
        assert socket.kinds == ["accept", "send"]
        assert socket.raised is None
        assert house.app.service.admission.running == 0


async def test_a_reader_that_comes_back_gets_all_of_it() -> None:
    push = Push()
    async with serving(push, delivery=SLOW) as house:
        socket = Socket(house.app)
        house.group.start_soon(socket.run)
        await until(lambda: socket.kinds == ["accept"])
        socket.stall()
        socket.hand_in(PROMPT)
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "a")
        await until(lambda: socket.texts)
        for text in "bcd":
            push.say(push.jobs[0], text)
        push.say(push.jobs[0], StreamEnd())
        socket.room.set()
        await until(lambda: socket.texts[-1] == "[DONE]")
        assert "".join(socket.texts) == "abcd[DONE]"
        assert push.jobs[0].cancels == 0
        socket.leave()
        await socket.ended.wait()


@pytest.mark.parametrize("fault", [OSError("gone"), RuntimeError("a server's bug")], ids=["left", "bug"])
@pytest.mark.parametrize("when", ["accept", "token", "close"])
async def test_a_send_that_raises(fault: Exception, when: str) -> None:
    push = Push()
    async with serving(push) as house:
        socket = Socket(house.app)
        if when == "accept":
            socket.fault = fault
        house.group.start_soon(socket.run)
        if when != "accept":
            await until(lambda: socket.kinds == ["accept"])
            socket.hand_in(PROMPT)
            await until(lambda: push.jobs)
            socket.fault = fault
            push.say(push.jobs[0], *(["a"] if when == "token" else [StreamError(ErrorKind.SERVER, "It broke.")]))
        await socket.ended.wait()
        assert [job.cancels for job in push.jobs] == ([1] if when == "token" else [0] if when == "close" else [])
        if isinstance(fault, OSError):
            assert socket.raised is None
        else:
            assert fault in (socket.raised, *getattr(socket.raised, "exceptions", ()))
        assert house.app.service.admission.running == 0


# Cancellation, and the server's end


@pytest.mark.parametrize("stage", ["connect", "accept", "idle", "silent", "midway", "away", "closing"])
async def test_a_cancelled_socket_stops_the_backend(stage: str) -> None:
    push = Push()
    async with serving(push) as house:
        socket = Socket(house.app)
        if stage == "connect":
            socket._inbox.receive_nowait()
        if stage == "accept":
            socket.stall()
        house.group.start_soon(socket.run)
        await turns()
        if stage not in {"connect", "accept", "idle"}:
            socket.hand_in(PROMPT)
            await until(lambda: push.jobs)
        if stage == "away":
            socket.stall()
        if stage in {"midway", "away"}:
            push.say(push.jobs[0], "a")
            await until(lambda: socket.texts)
            push.say(push.jobs[0], "b")
        if stage == "closing":
            socket.stall()
            push.say(push.jobs[0], StreamError(ErrorKind.SERVER, "It broke."))
            await until(lambda: socket.kinds[-1] == "close")
        socket.cancel()
        await socket.ended.wait()
        assert [job.cancels for job in push.jobs] == {"silent": [1], "midway": [1], "away": [1], "closing": [0]}.get(
            stage, []
        )
        assert house.app.service.admission.running == 0


@pytest.mark.parametrize("subprotocols", [[], list(SUBPROTOCOLS)], ids=["text", "objects"])
async def test_the_application_is_closed_during_an_answer(subprotocols: list[str]) -> None:
    watched = Watched(("a",))
    async with serving(GeneratorBackend(watched)) as house:
        socket = Socket(house.app, subprotocols=subprotocols)
        house.group.start_soon(socket.run)
        socket.hand_in(PROMPT)
        socket.hand_in(PROMPT)
        await until(lambda: socket.texts)
        await house.app.aclose()
        await socket.ended.wait()
        assert watched.began == watched.closed == 1
        assert socket.kinds[-1] == "close"
        assert socket.sent[-1]["code"] == 1001
        assert ("[DONE]" in socket.texts) == bool(subprotocols)


# Handshakes that open nothing

WITH_RESPONSE: dict[str, Any] = {"extensions": {"websocket.http.response": {}}}


async def test_a_scope_without_headers_has_no_host_that_is_allowed() -> None:
    async with serving(Push()) as house:
        socket = Socket(house.app)
        socket.scope = {"type": "websocket", "path": "/ws/chat"}
        await socket.run()
        assert socket.kinds == ["close"]
        assert socket.sent[0]["code"] == 1008
        assert "does not answer to the name" in socket.sent[0]["reason"]


REJECTED: dict[str, tuple[dict[str, Any], int]] = {
    "foreign origin": ({"headers": [(b"host", b"localhost"), (b"origin", b"http://evil.example")]}, 403),
    "no such path": ({"path": "/ws"}, 404),
    "a path that generates over HTTP": ({"path": "/chat", "query_string": b"prompt=x"}, 404),
    "a path that answers at once": ({"path": "/healthz"}, 200),
}


@pytest.mark.parametrize(("scope", "status"), REJECTED.values(), ids=REJECTED)
async def test_a_rejected_handshake(scope: dict[str, Any], status: int) -> None:
    push = Push()
    async with serving(push) as house:
        socket = Socket(house.app, **scope, **WITH_RESPONSE)
        await socket.run()
        start, body = socket.sent
        assert (start["type"], start["status"]) == ("websocket.http.response.start", status)
        assert (b"content-type", b"application/json") in start["headers"]
        assert json.loads(body["body"])
        socket = Socket(house.app, **scope, extensions=None)
        await socket.run()
        (close,) = socket.sent
        assert (close["type"], close["code"]) == ("websocket.close", 1008)
        assert len(close["reason"].encode()) <= 123
        assert push.jobs == []


@pytest.mark.parametrize("extensions", [{}, WITH_RESPONSE["extensions"]])
async def test_a_client_that_leaves_while_it_is_rejected(extensions: dict[str, Any]) -> None:
    async with serving(Push()) as house:
        socket = Socket(house.app, path="/nowhere", extensions=extensions)
        socket.fault = OSError("gone")
        await socket.run()
        assert socket.raised is None


async def test_http2_has_another_method_and_no_upgrade() -> None:
    async with serving(Push()) as house:
        socket = Socket(house.app, headers=[(b"host", b"localhost")], http_version="2")
        house.group.start_soon(socket.run)
        await until(lambda: socket.kinds == ["accept"])
        socket.leave()
        await socket.ended.wait()
