"""What stands around the pump: listening, the access log, the loops by name, signals."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tokenwire.adapters import server as server_module
from tokenwire.adapters.runtime import WorldFacts, log_record, report_failure
from tokenwire.adapters.server import LOOPS, ServerOptions, bind, run
from tokenwire.backends.mock import MockBackend
from tokenwire.core.actions import Record
from tokenwire.core.connection import ConnectionOptions
from tokenwire.core.delivery import DeliveryOptions

V4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
V6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))

Opened = list[socket.socket]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Sockets to close at the test's end."""
    sockets: Opened = []
    yield sockets
    for sock in sockets:
        sock.close()


def resolve(monkeypatch: pytest.MonkeyPatch, *found: object) -> None:
    """Have every name stand for these addresses."""

    def look_up(*_: object, **__: object) -> list[object]:
        return list(found)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


# Listening


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_bind_listens(opened: Opened, host: str) -> None:
    opened += bind(host, 0)
    (listener,) = opened
    assert listener.getsockname()[0] == host
    assert not listener.getblocking()
    opened.append(socket.create_connection(listener.getsockname()[:2]))
    accepted, _ = listener.accept()
    opened.append(accepted)
    assert accepted.getpeername()[1] == opened[1].getsockname()[1]


def test_bind_takes_every_address_of_a_name_and_one_port(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, V4, V6, V4)
    opened += bind("localhost", 0)
    assert [sock.family for sock in opened] == [socket.AF_INET, socket.AF_INET6]
    assert len({sock.getsockname()[1] for sock in opened}) == 1


def test_ipv6_listens_to_ipv6_only(opened: Opened) -> None:
    opened += bind("::", 0)
    (listener,) = (sock for sock in opened if sock.family == socket.AF_INET6)
    assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_bind_raises_where_the_port_is_taken(opened: Opened) -> None:
    opened += bind("127.0.0.1", 0)
    port = opened[0].getsockname()[1]
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use") as caught:
        bind("127.0.0.1", port)
    assert caught.value.errno == errno.EADDRINUSE


def test_bind_lets_go_of_what_it_had_where_a_later_port_is_taken(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened += bind("::1", 0)
    port = opened[0].getsockname()[1]
    resolve(monkeypatch, V4, V6)
    with pytest.raises(OSError, match="Address already in use"):
        bind("localhost", port)
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))
        assert free.getsockname()[1] == port


def test_bind_passes_over_an_address_that_the_machine_does_not_have(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0))
    resolve(monkeypatch, missing, V4)
    opened += bind("localhost", 0)
    assert [sock.family for sock in opened] == [socket.AF_INET]
    resolve(monkeypatch, missing)
    with pytest.raises(OSError, match="cannot listen on localhost port 0") as caught:
        bind("localhost", 0)
    assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 70])
def test_bind_raises_for_what_is_no_host(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    look_up = socket.getaddrinfo

    def fail(name: str, *arguments: Any, **options: Any) -> object:
        if name == "no.such.host.invalid":  # without asking the network
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(name, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(OSError, match="there is no such host"):
        bind(host, 0)


# The log


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            Record(
                method="POST",
                path="/v1/chat/completions",
                status=200,
                end="finished",
                dialect="openai_chat",
                stream_id="chatcmpl-1",
                model="mock",
                tokens=64,
                sent_bytes=9_000,
                first_token_ns=200_000_000,
                duration_ns=1_460_250_000,
            ),
            (
                "POST /v1/chat/completions 200 finished dialect=openai_chat stream=chatcmpl-1 model=mock tokens=64 "
                "ttft_ms=200.0 ms=1460.2 bytes=9000"
            ),
        ),
        (
            Record(method="-", path="-", status=400, end="refused", error="the request line\nis malformed"),
            r"- - 400 refused ms=0.0 error='the request line\nis malformed'",
        ),
        (Record(method="GET", path="/healthz", status=200, end="answered"), "GET /healthz 200 answered ms=0.0"),
    ],
)
def test_a_record_is_one_line(caplog: pytest.LogCaptureFixture, record: Record, line: str) -> None:
    caplog.set_level(logging.INFO, "tokenwire.access")
    log_record(record)
    assert caplog.record_tuples == [("tokenwire.access", logging.INFO, line)]


def test_a_backends_fault_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("oh")
    report_failure(error, "tw1")
    (record,) = caplog.records
    assert record.getMessage() == "the backend failed on stream tw1"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_ids_are_many_and_plain() -> None:
    facts = WorldFacts()
    ids = {facts.new_id() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(len(one) == 24 and one.isalnum() and one.isascii() for one in ids)
    assert facts.wall_s() > 1_700_000_000


def test_a_forked_process_makes_ids_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = WorldFacts()
    facts.new_id()
    made = set(facts._ids)
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert made
    assert {facts.new_id() for _ in range(10)}.isdisjoint(made)


# Running


def test_the_loops_have_a_module_each() -> None:
    assert {name: loop.module for name, loop in LOOPS.items()} == {
        "asyncio": "asyncio_server",
        "uvloop": "asyncio_server",
        "trio": "trio_server",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_right_after_the_start_ends_it(loop: str, number: signal.Signals) -> None:
    """Whoever waits for the greeting may signal at once: the server must be the one that hears it."""
    before = signal.getsignal(number)
    listeners = bind("127.0.0.1", 0)
    run(MockBackend(ttft_ns=0, itl_ns=0), listeners, loop=loop, started=lambda: os.kill(os.getpid(), number))
    assert [sock.fileno() for sock in listeners] == [-1]
    assert signal.getsignal(number) == before


def test_a_heartbeat_is_more_frequent_than_the_patience_of_usual_proxies() -> None:
    """Many a proxy closes after 60 s of silence; the idle time is longer, so that the client's pool closes first."""
    assert DeliveryOptions().heartbeat_ns * 2 < 60 * server_module._SECOND < ConnectionOptions().idle_ns
    assert ServerOptions().drain_ns == 30 * server_module._SECOND
