"""Accepting connections: how many, how fast, and what happens when the system has no room."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator

import pytest
from tests.adapters.serving import SECOND, Push, Start, plain_text, turns, until
from tests.carriers import Asked

from tokenwire.adapters.server import ServerOptions
from tokenwire.backends.generators import GeneratorBackend

pytestmark = pytest.mark.anyio

HEALTH = Asked("GET", "/healthz")


async def hello(prompt: str) -> AsyncIterator[str]:
    yield f"{prompt}!"


async def test_beyond_the_most_connections_a_client_waits(start: Start) -> None:
    async with start(GeneratorBackend(hello), ServerOptions(max_connections=2)) as serving:
        clients = [serving.connect() for _ in range(4)]
        for client in clients:
            client.ask(HEALTH)
        for client in clients[:2]:
            await client.answer()
        await turns()
        assert serving.connections == 2
        clients[0].close()
        assert (await clients[2].answer()).status == 200
        clients[1].reset()
        assert (await clients[3].answer()).status == 200
        assert serving.connections == 2


async def test_more_than_a_turns_worth_of_connections(start: Start) -> None:
    async with start(GeneratorBackend(hello)) as serving:
        clients = [serving.connect() for _ in range(150)]
        await until(lambda: serving.connections == 150)
        clients[-1].ask()
        assert plain_text((await clients[-1].answer()).body) == "hi!"


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENETDOWN, errno.EPERM])
async def test_accepting_rests_when_it_fails(start: Start, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Accept passes on errors of the new connection's network too (accept(2), Error handling)."""
    tries = 0
    push = Push()

    def fail(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal tries
        assert listener in serving.listeners
        tries += 1
        raise OSError(error, "no room")

    async with start(push) as serving:
        running = serving.connect()
        running.ask()
        await until(lambda: push.jobs)
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", fail)
            client = serving.connect()
            client.ask(HEALTH)
            await until(lambda: tries)
            await turns()
            assert tries == 1
            assert serving.complaints == ["cannot accept: no room; resting"]
            push.say(push.jobs[0], "still here")
            await running.until(b"still here")
            serving.clock.advance(SECOND)
            await until(lambda: tries == 2)
            await turns()
        serving.clock.advance(SECOND)
        assert (await client.answer()).status == 200
        assert tries == 2


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ECONNABORTED, errno.EINTR])
async def test_a_client_that_left_before_it_was_accepted(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    tries = 0
    accept = socket.socket.accept

    def fail_once(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError(error, "gone")
        return accept(listener)

    async with start(GeneratorBackend(hello)) as serving:
        monkeypatch.setattr(socket.socket, "accept", fail_once)
        client = serving.connect()
        client.ask(HEALTH)
        assert (await client.answer()).status == 200
        assert serving.complaints == []


async def test_a_socket_that_broke_before_it_was_tuned(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems refuse options of a connection that was reset already."""

    def fail(sock: socket.socket, blocking: bool) -> None:
        broken.append((sock, blocking))
        raise OSError(errno.EINVAL, "broken")

    broken: list[tuple[socket.socket, bool]] = []
    async with start(GeneratorBackend(hello)) as serving:
        client = serving.connect()
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "setblocking", fail)
            await until(lambda: broken)
        assert serving.connections == 0
        assert broken[0][0].fileno() == -1
        await client.until_end()
        other = serving.connect()
        other.ask(HEALTH)
        assert (await other.answer()).status == 200


async def test_who_accepts_again_does_so_on_every_listener(start: Start) -> None:
    async with start(GeneratorBackend(hello), ServerOptions(max_connections=1), host="localhost") as serving:
        first = serving.connect()
        first.ask(HEALTH)
        await first.answer()
        assert {sock.family for sock in serving.listeners} <= {socket.AF_INET, socket.AF_INET6}
        others = [serving.connect() for _ in serving.listeners]
        await turns()
        first.close()
        for other in others:
            other.ask(HEALTH)
            assert (await other.answer()).status == 200
            other.close()
