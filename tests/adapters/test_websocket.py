"""WebSocket on real sockets, on every loop: answers, leaving, slow readers, pings, and the server's end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.adapters.serving import SECOND, Client, Push, Serving, Start, plateau, turns, until
from tests.conversing import DONE, OBJECTS, Frame, read_frames
from wsproto import ConnectionType, WSConnection
from wsproto.events import BytesMessage, CloseConnection, Event, Request, TextMessage

from tokenwire.adapters.server import ServerOptions
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.events import StreamEnd
from tokenwire.core.service import ServiceOptions

pytestmark = pytest.mark.anyio

PROMPT = '{"prompt":"hi"}'
CLOSE, PING = 0x8, 0x9
SMALL = 4096


class Socket:
    """A WebSocket on a client's socket. It reads when the test says so, and answers nothing by itself."""

    def __init__(self, client: Client, *, subprotocols: Sequence[str] = ()) -> None:
        self.client = client
        self._protocol = WSConnection(ConnectionType.CLIENT)
        head = self._protocol.send(Request(host="127.0.0.1", target="/ws/chat", subprotocols=list(subprotocols)))
        client.send(head)

    async def opened(self) -> None:
        """Wait for the handshake's end."""
        await self.client.until(b"\r\n\r\n")
        head, _, _ = bytes(self.client.received).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        self._protocol.receive_data(head + b"\r\n\r\n")

    def say(self, text: str = PROMPT) -> None:
        self.send(TextMessage(text))

    def send(self, event: Event) -> None:
        self.client.send(self._protocol.send(event))

    @property
    def frames(self) -> list[Frame]:
        """The frames so far, but a half one at the end."""
        data = bytes(self.client.received).partition(b"\r\n\r\n")[2]
        try:
            return read_frames(data)
        except AssertionError:
            return []

    @property
    def texts(self) -> list[str]:
        return [frame.payload.decode() for frame in self.frames if frame.opcode == 1]

    @property
    def closed(self) -> tuple[int, str] | None:
        found = [frame.payload for frame in self.frames if frame.opcode == CLOSE]
        return (int.from_bytes(found[0][:2], "big"), found[0][2:].decode()) if found else None

    async def until(self, condition: Callable[[], object]) -> None:
        """Read until something is so."""
        while not condition():
            assert not self.client.ended, f"the end came after {bytes(self.client.received)!r}"
            await self.client.read()


async def connect(serving: Serving, *, subprotocols: Sequence[str] = (), buffer: int | None = None) -> Socket:
    socket = Socket(serving.connect(receive_buffer=buffer), subprotocols=subprotocols)
    await socket.opened()
    return socket


async def asked(serving: Serving, push: Push, **options: Any) -> Socket:
    """Connect, ask, and wait until the backend was told."""
    socket = await connect(serving, **options)
    jobs = len(push.jobs)
    socket.say()
    await until(lambda: len(push.jobs) > jobs)
    return socket


async def test_prompts_and_answers(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        socket = await asked(serving, push)
        socket.say('{"prompt":"second"}')
        push.say(push.jobs[0], "a")
        await socket.until(lambda: socket.texts == ["a"])
        push.say(push.jobs[0], "b", StreamEnd())
        await until(lambda: len(push.jobs) == 2)
        push.say(push.jobs[1], "c", StreamEnd())
        await socket.until(lambda: socket.texts == ["a", "b", DONE, "c", DONE])
        socket.send(CloseConnection(1000))
        await socket.until(lambda: socket.closed == (1000, ""))
        await socket.client.until_end()
        socket.client.close()
        await until(lambda: not serving.connections)
        assert serving.access == [f"GET /ws/chat 101 {end}" for end in ("answered", "finished", "finished")]
        assert serving.complaints == []


async def test_objects_and_the_word_to_cancel(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        socket = await asked(serving, push, subprotocols=OBJECTS)
        push.say(push.jobs[0], "a")
        socket.say('{"cancel":true}')
        await socket.until(lambda: len(socket.texts) == 3)
        assert push.jobs[0].cancels == 1
        assert json.loads(socket.texts[0]) == {"token": "a"}
        assert json.loads(socket.texts[1])["error"]["code"] == "cancelled"
        assert serving.streams == 0


@pytest.mark.parametrize("how", ["close frame", "half_close", "close", "reset"])
@pytest.mark.parametrize("stage", ["idle", "silent", "midway"])
async def test_leaving_stops_the_backend(start: Start, how: str, stage: str) -> None:
    push = Push()
    async with start(push) as serving:
        socket = await connect(serving) if stage == "idle" else await asked(serving, push)
        if stage == "midway":
            push.say(push.jobs[0], "a")
            await socket.until(lambda: socket.texts == ["a"])
        if how == "close frame":
            socket.send(CloseConnection(1001))
            await socket.client.until_end()
            assert socket.closed == (1001, "")
            socket.client.close()
        else:
            getattr(socket.client, how)()
        if how == "half_close":
            await socket.client.until_end()
        await until(lambda: not serving.connections)
        assert [job.cancels for job in push.jobs] == ([] if stage == "idle" else [1])
        assert serving.access[1:] == ([] if stage == "idle" else ["GET /ws/chat 101 cancelled"])
        assert serving.complaints == []


async def test_a_stalled_reader_holds_up_nobody_and_is_given_up(start: Start) -> None:
    push = Push()
    delivery = DeliveryOptions(stall_ns=20 * SECOND, budget_bytes=1 << 20)
    async with start(push, ServerOptions(service=ServiceOptions(delivery=delivery))) as serving:
        slow = await asked(serving, push, buffer=SMALL)
        quick = await asked(serving, push)
        text = "x" * 8000
        said = 0
        while not push.jobs[0].blocked:
            push.step((push.jobs[0], [text]), (push.jobs[1], [f"{said}"]))
            said += 1
            await turns(3)
        push.say(push.jobs[1], "end", StreamEnd())
        await quick.until(lambda: quick.texts[-1:] == [DONE])
        assert quick.texts == [*map(str, range(said)), "end", DONE]
        assert push.jobs[0].cancels == 0
        serving.clock.advance(20 * SECOND)
        assert push.jobs[0].cancels == 1
        await until(lambda: serving.connections == 1)
        assert serving.access[-1] == "GET /ws/chat 101 slow_reader"
        slow.client.hurry()
        await slow.client.until_end()
        assert b"[DONE]" not in slow.client.received


async def test_a_reader_that_was_slow_misses_nothing(start: Start) -> None:
    push = Push()
    async with start(
        push, ServerOptions(service=ServiceOptions(delivery=DeliveryOptions(budget_bytes=1 << 20)))
    ) as serving:
        socket = await asked(serving, push, buffer=SMALL)
        text = ""
        while not push.jobs[0].blocked:
            piece = f"{len(text)} ".ljust(5000, ".")
            push.say(push.jobs[0], piece)
            text += piece
            await turns(3)
        for _ in range(20):
            push.say(push.jobs[0], "more ")
            text += "more "
        push.say(push.jobs[0], StreamEnd())
        socket.client.hurry()
        await socket.until(lambda: bytes(socket.client.received).endswith(b"[DONE]"))
        assert "".join(socket.texts) == text + DONE
        assert serving.access[-1] == "GET /ws/chat 101 finished"


async def test_a_peer_that_never_answers_is_given_up(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        socket = await asked(serving, push)
        serving.clock.advance(15 * SECOND)
        await socket.until(lambda: socket.frames == [Frame(PING, b"")])
        for _ in range(25):
            serving.clock.advance(SECOND)
        assert push.jobs[0].cancels == 1
        await socket.client.until_end()
        assert await plateau(lambda: serving.connections) == 0
        assert serving.access[-1] == "GET /ws/chat 101 cancelled"


async def test_a_binary_message(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        socket = await asked(serving, push)
        socket.send(BytesMessage(b"hi"))
        await socket.until(lambda: socket.closed)
        assert socket.closed == (1003, "prompts are text messages")
        assert push.jobs[0].cancels == 1
        socket.send(CloseConnection(1003))
        await socket.client.until_end()
        socket.client.close()
        await until(lambda: not serving.connections)


@pytest.mark.parametrize("running", [True, False])
async def test_the_servers_end(start: Start, running: bool) -> None:
    push = Push()
    async with start(push) as serving:
        socket = await asked(serving, push) if running else await connect(serving)
        serving.server.stop()
        if running:
            push.say(push.jobs[0], "a", StreamEnd())
        await socket.until(lambda: socket.closed)
        assert socket.closed == (1001, "the server is shutting down")
        assert socket.texts == (["a", DONE] if running else [])
        socket.client.send(b"\x88\x82\0\0\0\0\x03\xe9")
        await socket.client.until_end()
        socket.client.close()
        await serving.ended.wait()


async def test_a_second_signal_ends_the_answer(start: Start) -> None:
    push = Push()
    async with start(push) as serving:
        socket = await asked(serving, push, subprotocols=OBJECTS)
        push.say(push.jobs[0], "a")
        serving.server.stop()
        serving.server.stop()
        await serving.ended.wait()
        await socket.client.until_end()
        token, failure, done = socket.texts
        assert json.loads(token) == {"token": "a"}
        assert json.loads(failure)["error"]["code"] == "server_shutdown"
        assert done == DONE
        assert socket.closed == (1001, "the server is shutting down")
