"""Clients that leave, and a server that is told to go: what ends, how, and what the log says of it."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest
from tests.e2e.conftest import Serve
from tests.e2e.harness import DONE, Reader, Server, curl, data_of, notes, text_of, until

_DRAIN_LONGER_THAN_ANY_TEST = ("--drain", "10m")
_WHOLE = "before-0 before-1 before-2 behind-0 behind-1 "


def _body(answer: bytes) -> str:
    return answer.partition(b"\r\n\r\n")[2].decode()


def _error(answer: bytes) -> dict[str, object]:
    *_, last, done = data_of(_body(answer))
    assert done == DONE
    error: dict[str, object] = json.loads(last)["error"]
    return error


def _refuses_connections(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port)).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("backend", ["endless", "async_endless"])
def test_leaving_midway_closes_the_generator(shared: Serve, room: Path, loop: str, backend: str) -> None:
    server = shared(backend, loop=loop)
    cancelled = len(server.logged(" 200 cancelled "))
    with Reader(server, {"prompt": str(room)}) as reader:
        reader.read_until(b"more")
        assert notes(room) == ["run"]
    until(lambda: notes(room) == ["run", "closed"], "the generator's finally block")
    until(lambda: len(server.logged(" 200 cancelled ")) == cancelled + 1, "the log's line")


def test_leaving_right_after_done_is_no_cancel(serve: Serve, loop: str) -> None:
    server = serve("words", loop=loop)
    for _ in range(20):
        with Reader(server, {"prompt": "two owls"}) as reader:
            reader.read_until(DONE.encode())
    lines = until(lambda: found if len(found := server.logged("GET /chat ")) == 20 else None, "20 lines of the log")
    assert all(" 200 finished " in line for line in lines)


def test_leaving_while_waiting_takes_the_place_back(serve: Serve, room: Path, tmp_path: Path, loop: str) -> None:
    server = serve("gated", "--max-streams", "1", loop=loop)
    with Reader(server, {"prompt": str(room)}) as first:
        first.read_until(b"before-2")
        Reader(server, {"prompt": str(tmp_path)}).close()
        until(lambda: server.logged(" cancelled "), "the log's line")
        (room / "go").touch()
        assert text_of(_body(first.read_until(DONE.encode()))) == _WHOLE
    assert notes(tmp_path) == []


@pytest.mark.parametrize("backend", ["gated", "async_gated"])
def test_the_first_signal_lets_streams_end(serve: Serve, room: Path, loop: str, backend: str) -> None:
    server = serve(backend, *_DRAIN_LONGER_THAN_ANY_TEST, loop=loop)
    with Reader(server, {"prompt": str(room)}) as reader:
        reader.read_until(b"before-2")
        server.signal(signal.SIGTERM)
        until(lambda: _refuses_connections(server), "the end of listening")
        assert server.process.poll() is None
        (room / "go").touch()
        assert text_of(_body(reader.read_to_end())) == _WHOLE
    server.wait()
    assert server.logged("GET /chat 200 finished ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("backend", ["endless", "async_endless", "gated"])
def test_the_second_signal_ends_streams_with_an_error(
    serve: Serve, room: Path, loop: str, backend: str, number: signal.Signals
) -> None:
    server = serve(backend, *_DRAIN_LONGER_THAN_ANY_TEST, loop=loop)
    with Reader(server, {"prompt": str(room)}) as reader:
        reader.read_until(b"token")
        server.signal(number)
        until(lambda: server.logged("draining"), "the first signal")
        server.signal(number)
        error = _error(reader.read_to_end())
    assert (error["code"], error["type"]) == ("server_shutdown", "service_unavailable")
    assert error["retryable"] is True
    server.wait()  # the gate stays shut: a thread that is blocked in a generator must not hold the process


def test_a_drain_has_an_end(serve: Serve, room: Path, loop: str) -> None:
    server = serve("endless", "--drain", "100ms", loop=loop)
    with Reader(server, {"prompt": str(room)}) as reader:
        reader.read_until(b"more")
        server.signal()
        assert _error(reader.read_to_end())["code"] == "server_shutdown"
    server.wait()


def test_a_stream_without_a_token_yet_is_refused_with_503(serve: Serve, room: Path, loop: str) -> None:
    server = serve("silent", *_DRAIN_LONGER_THAN_ANY_TEST, loop=loop)
    with Reader(server, {"prompt": str(room)}) as reader:
        until(lambda: notes(room) == ["run"], "the start of the stream")
        server.signal()
        until(lambda: server.logged("draining"), "the first signal")
        server.signal()
        answer = reader.read_to_end()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: " in answer.lower()
    assert json.loads(_body(answer))["error"]["code"] == "server_shutdown"
    server.wait()


def test_an_idle_connection_does_not_hold_the_server(serve: Serve, loop: str) -> None:
    server = serve("mock", *_DRAIN_LONGER_THAN_ANY_TEST, loop=loop)
    with Reader(server, {"prompt": "Hello", "stream": "false"}) as idle:
        idle.read_until(b"finish_reason")
        server.stop()


def test_prompts_are_not_logged(serve: Serve) -> None:
    server = serve("mock", "--log-level", "debug")
    curl(f"{server.url}/chat?prompt=private-query")
    curl(f"{server.url}/chat", "-H", "content-type: application/json", "-d", '{"prompt":"private-body"}')
    server.stop()
    assert server.logged("POST /chat 200 finished ")
    assert "private" not in server.log
