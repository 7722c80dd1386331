"""Limits per client on real sockets: who is turned away, how it is told, and that places come back."""

from __future__ import annotations

import pytest
from tests.adapters.serving import Push, Start, turns, until
from tests.carriers import Asked

from tokenwire.adapters import cli
from tokenwire.adapters.server import ServerOptions
from tokenwire.core.events import StreamEnd
from tokenwire.core.peers import PeerLimits

by_loops = pytest.mark.anyio

HEALTH = Asked("GET", "/healthz")


def limits(*, max_connections: int = 0, max_streams: int = 0, exempt: tuple[str, ...] = ()) -> ServerOptions:
    return ServerOptions(peers=PeerLimits(max_connections=max_connections, max_streams=max_streams, exempt=exempt))


@by_loops
async def test_one_client_has_so_many_connections(start: Start) -> None:
    async with start(Push(), limits(max_connections=2)) as serving:
        first, second = serving.connect(), serving.connect()
        await until(lambda: serving.connections == 2)
        third = serving.connect()
        await third.until_end()
        assert third.received.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
        assert b"\r\nconnection: close\r\n" in third.received
        assert b"\r\nretry-after: 1\r\n" in third.received
        assert b'"code":"too_many_connections"' in third.received
        first.ask(HEALTH)
        assert (await first.answer()).status == 200
        first.close()
        await until(lambda: serving.connections == 1)
        fourth = serving.connect()
        fourth.ask(HEALTH)
        assert (await fourth.answer()).status == 200
        second.reset()
        await until(lambda: serving.connections == 1)
        assert serving.complaints == []


@by_loops
async def test_a_client_that_is_turned_away_in_the_middle_of_its_request_is_told(start: Start) -> None:
    async with start(Push(), limits(max_connections=1)) as serving:
        first = serving.connect()
        await until(lambda: serving.connections == 1)
        second = serving.connect()
        second.ask(HEALTH)
        assert (await second.answer()).status == 429
        first.ask(HEALTH)
        assert (await first.answer()).status == 200


@by_loops
async def test_one_client_has_so_many_streams(start: Start) -> None:
    push = Push()
    async with start(push, limits(max_streams=1)) as serving:
        first, second = serving.connect(), serving.connect()
        first.ask()
        await until(lambda: push.jobs)
        second.ask()
        answer = await second.answer()
        assert answer.status == 429
        assert answer.json()["error"]["code"] == "too_many_streams"
        push.say(push.jobs[0], "a", StreamEnd())
        assert (await first.answer()).status == 200
        second.ask()
        await until(lambda: len(push.jobs) == 2)
        second.close()
        await until(lambda: serving.streams == 0)
        first.ask()
        await until(lambda: len(push.jobs) == 3)


@pytest.mark.parametrize(
    "options", [limits(), limits(max_connections=1, exempt=("127.0.0.0/8",))], ids=["off", "exempt"]
)
@by_loops
async def test_who_is_not_counted(start: Start, options: ServerOptions) -> None:
    async with start(Push(), options) as serving:
        clients = [serving.connect() for _ in range(5)]
        await until(lambda: serving.connections == 5)
        for client in clients:
            client.ask(HEALTH)
            assert (await client.answer()).status == 200
        await turns()
        assert serving.connections == 5


def test_the_command_line_sets_limits_per_client() -> None:
    arguments = "serve --max-connections-per-peer 3 --max-streams-per-peer 2 --exempt-peer 10.1.2.3/8 --exempt-peer ::1"
    options = cli._server_options(cli._parser().parse_args(arguments.split()))
    assert options.peers == PeerLimits(max_connections=3, max_streams=2, exempt=("10.0.0.0/8", "::1/128"))
    assert cli._server_options(cli._parser().parse_args(["serve"])).peers == PeerLimits()


@pytest.mark.parametrize(
    "arguments", ["--exempt-peer localhost", "--max-streams-per-peer -1", "--max-connections-per-peer x"]
)
def test_the_command_line_refuses_what_is_no_limit(arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli._parser().parse_args(["serve", *arguments.split()])
    assert caught.value.code == 2
