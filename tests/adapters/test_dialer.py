"""A dialled connection on every loop: how it is made, and how making it fails."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial

import pytest
from tests.adapters.authorities import Certificates
from tests.adapters.dialing import Connected, Failed, Heard, Listener, OpenDialing
from tests.adapters.serving import MILLISECOND, SECOND, turns, until

from tokenwire.adapters import dialer as dialer_module
from tokenwire.adapters.dialer import look_up
from tokenwire.adapters.tls import default_context
from tokenwire.backends.threads import ThreadPool

pytestmark = pytest.mark.anyio

REFUSED = "Connection refused"


@pytest.fixture
def listener() -> Iterator[Listener]:
    with closing(Listener()) as one:
        yield one


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, and where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def heard_something(heard: Heard) -> bool:
    return bool(heard.calls)


def never_connected(sock: socket.socket) -> bool:
    return sock.fileno() < 0


# Addresses and names


async def test_an_address_is_not_looked_up(dialing: OpenDialing, listener: Listener) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener)
        heard.link.write(b"hello")
        await far.until_received(b"hello")
        far.say(b"welcome")
        await until(lambda: bytes(heard.received) == b"welcome")
        heard.link.close()
        await far.until_ended()
        assert heard.calls == [Connected()]


async def test_an_ipv6_literal(dialing: OpenDialing) -> None:
    try:
        listener = Listener(host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with closing(listener):
        async with dialing() as near:
            heard, far = await near.stand(listener, "::1")
            heard.link.write(b"six")
            await far.until_received(b"six")
            heard.link.close()


async def test_a_name_is_looked_up_in_a_thread(dialing: OpenDialing, listener: Listener) -> None:
    async with dialing() as near:
        threads: list[int] = []

        def slow(host: str, port: int) -> list[dialer_module.Address]:
            assert (host, port) == ("server.test", listener.port)
            threads.append(threading.get_ident())
            gate.wait()
            return [listener.resolved]

        gate = threading.Event()
        near.dialer.look_up = slow
        heard = near.dial("server.test", listener.port)
        await until(lambda: threads)
        await turns()  # the loop goes on meanwhile
        assert not listener.waiting()
        gate.set()
        await until(lambda: heard.stands)
        assert threads[0] != threading.get_ident()
        heard.link.close()


async def test_localhost_is_found_by_the_system(dialing: OpenDialing, listener: Listener) -> None:
    async with dialing() as near:
        near.dialer.look_up = look_up
        heard, _ = await near.stand(listener, "localhost")
        heard.link.close()


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("nowhere.test", "the name is not found: Name or service not known"),
        ("", "the name is not found: "),
        ("a\0b", "the name is not found: "),
        (".".join(["x" * 64] * 2), "the name is not found: "),
    ],
)
async def test_a_name_that_is_none(dialing: OpenDialing, host: str, reason: str) -> None:
    async with dialing() as near:
        heard = near.dial(host, 80)
        await until(lambda: heard.calls)
        assert heard.reason.startswith(reason)
        heard.link.write(b"nothing")
        heard.link.set_reading(True)
        heard.link.close()


async def test_a_port_that_is_none(dialing: OpenDialing) -> None:
    async with dialing() as near:
        for port in (-1, 65_536):
            heard = near.dial("127.0.0.1", port)
            await until(partial(heard_something, heard))
            assert heard.reason


async def test_a_name_without_addresses(dialing: OpenDialing) -> None:
    async with dialing() as near:
        near.names["empty.test"] = []
        heard = near.dial("empty.test", 80)
        await until(lambda: heard.calls)
        assert heard.reason == "the name has no address"


async def test_a_look_up_that_never_ends(dialing: OpenDialing) -> None:
    async with dialing() as near:
        begun, gate = threading.Event(), threading.Event()

        def hang(host: str, port: int) -> list[dialer_module.Address]:
            begun.set()
            gate.wait()
            return [(socket.AF_INET, (host, port))]

        near.dialer.look_up = hang
        heard = near.dial("slow.test", 80, seconds=3)
        await until(begun.is_set)
        near.clock.advance(3 * SECOND - 1)
        assert heard.calls == []
        near.clock.advance(1)
        assert heard.reason == "the name is not found in time"
        gate.set()
        await turns()
        assert len(heard.calls) == 1


async def test_look_ups_are_bounded(dialing: OpenDialing, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPool("names", max_threads=2, max_waiting=3)
    monkeypatch.setattr(dialer_module, "_NAMES", pool)
    gate = threading.Event()

    def hang(host: str, port: int) -> list[dialer_module.Address]:
        gate.wait()
        raise socket.gaierror(socket.EAI_NONAME, f"no {host}:{port}")

    async with dialing() as near:
        near.dialer.look_up = hang
        all_heard = [near.dial(f"{number}.test", 80) for number in range(6)]
        await until(lambda: all_heard[5].calls)
        assert all_heard[5].reason == "too many names are being looked up"
        assert len(pool.threads) == 2
        all_heard[4].link.close()  # makes room
        further = near.dial("further.test", 80)
        await turns()
        assert further.calls == []
        gate.set()
        await until(lambda: all(heard.calls for heard in (*all_heard[:4], further)))
        assert further.reason == "the name is not found: no further.test:80"
        assert all_heard[4].calls == []
    pool.close()


# Trying


async def test_a_refused_port(dialing: OpenDialing, closed_port: int) -> None:
    async with dialing() as near:
        heard = near.dial("127.0.0.1", closed_port)
        await until(lambda: heard.calls)
        assert heard.calls == [Failed(REFUSED)]


async def test_a_refused_address_gives_way_at_once(dialing: OpenDialing, listener: Listener, closed_port: int) -> None:
    async with dialing() as near:
        near.names["server.test"] = [(socket.AF_INET, ("127.0.0.1", closed_port)), listener.resolved]
        heard, _ = await near.stand(listener, "server.test")
        heard.link.close()


async def test_all_addresses_fail(dialing: OpenDialing, closed_port: int) -> None:
    async with dialing() as near:
        near.names["server.test"] = [
            (socket.AF_INET, ("127.0.0.1", closed_port)),
            (socket.AF_INET, ("127.0.0.2", closed_port)),
            (9_999, ("127.0.0.1", closed_port)),
        ]
        heard = near.dial("server.test", closed_port)
        await until(lambda: heard.calls)
        assert heard.reason.startswith(f"{REFUSED}; Address family not supported")


async def test_a_black_hole(dialing: OpenDialing, listener: Listener) -> None:
    async with dialing() as near:
        near.readiness.mute = {listener.address}
        heard = near.dial(listener.address[0], listener.port, seconds=5)
        await until(listener.waiting)
        near.clock.advance(5 * SECOND - 1)
        await turns()
        assert heard.calls == []
        near.clock.advance(1)
        assert heard.calls == [Failed("nothing answers in time")]


async def test_a_black_hole_gets_a_head_start_only(dialing: OpenDialing, listener: Listener) -> None:
    with closing(Listener()) as hole:
        async with dialing() as near:
            near.readiness.mute = {hole.address}
            near.names["server.test"] = [hole.resolved, listener.resolved]
            heard = near.dial("server.test", listener.port)
            await until(hole.waiting)
            near.clock.advance(250 * MILLISECOND - 1)
            await turns()
            assert not listener.waiting()
            near.clock.advance(1)
            await listener.accept()
            await until(lambda: heard.calls)
            assert heard.calls == [Connected()]
            assert len(near.readiness.watched) == 1  # the other attempt is closed
            near.clock.advance(SECOND)
            heard.link.close()


async def test_the_one_that_was_late_may_still_win(dialing: OpenDialing, closed_port: int) -> None:
    """Both of two addresses hang; the first answers after the second was begun."""
    with closing(Listener()) as first, closing(Listener()) as second:
        async with dialing() as near:
            near.readiness.mute = {first.address, second.address}
            near.names["server.test"] = [first.resolved, second.resolved, (socket.AF_INET, ("127.0.0.1", closed_port))]
            heard = near.dial("server.test", 80)
            await until(first.waiting)
            near.clock.advance(250 * MILLISECOND)
            await until(second.waiting)
            assert heard.calls == []
            near.readiness.speak(first.address)
            await until(lambda: heard.calls)
            assert heard.calls == [Connected()]
            assert len(near.readiness.watched) == 1
            heard.link.close()


async def test_families_take_turns(dialing: OpenDialing, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    class Refusing(socket.socket):
        def connect_ex(self, address: object) -> int:
            tried.append(address)
            raise OSError(101, "Network is unreachable")

    six = [(socket.AF_INET6, (f"::{number}", 80, 0, 0)) for number in range(1, 4)]
    four = [(socket.AF_INET, (f"127.0.0.{number}", 80)) for number in range(1, 20)]
    async with dialing() as near:
        near.names["server.test"] = [*six, *four]
        monkeypatch.setattr(socket, "socket", Refusing)
        heard = near.dial("server.test", 80)
        await until(lambda: heard.calls)
        monkeypatch.undo()
        assert heard.reason == "Network is unreachable"
        expected = [six[0], four[0], six[1], four[1], six[2], *four[2:]]
        assert tried == [address for _, address in expected[:16]]


async def test_a_socket_that_is_connected_to_itself_is_refused(
    dialing: OpenDialing, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port of the ephemeral range where nobody listens may be given to the very socket that calls it."""
    async with dialing() as near:
        monkeypatch.setattr(dialer_module, "_is_connected", never_connected)
        heard = near.dial(listener.address[0], listener.port)
        await until(lambda: heard.calls)
        assert heard.calls == [Failed(REFUSED)]


def test_a_socket_that_calls_itself() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert not dialer_module._is_connected(sock)


# Leaving while it is made


@pytest.mark.parametrize("turn", range(4))
async def test_close_while_connecting(dialing: OpenDialing, listener: Listener, turn: int) -> None:
    async with dialing() as near:
        near.names["server.test"] = [listener.resolved]
        by_name, by_address = near.dial("server.test", 80), near.dial(listener.address[0], listener.port)
        for heard in (by_name, by_address):
            heard.on_connected = heard.link.close
        await turns(turn)
        for heard in (by_name, by_address):
            heard.link.close()
            heard.link.close()
            heard.link.write(b"never")
        await turns()
        near.clock.advance(20 * SECOND)
        await turns()
        assert [heard.calls for heard in (by_name, by_address)] in ([[], []], [[], [Connected()]], [[Connected()]] * 2)
        assert near.readiness.watched == set()


async def test_close_before_a_failure_is_told(dialing: OpenDialing, closed_port: int) -> None:
    async with dialing() as near:
        heard = near.dial("127.0.0.1", closed_port)
        near.readiness.mute = {("127.0.0.1", closed_port)}
        refused = near.dial("127.0.0.1", -1)
        refused.link.close()
        heard.link.close()
        await turns()
        assert heard.calls == refused.calls == []


async def test_nothing_is_kept_until_the_deadline(
    dialing: OpenDialing, listener: Listener, certificates: Certificates, closed_port: int
) -> None:
    """A heap of deadlines must not hold on to connections that stand or are long over."""
    with closing(Listener(certificates.server)) as speaks_tls:
        async with dialing() as near:
            await near.stand(listener)
            await near.stand(speaks_tls, tls=True)
            refused = near.dial("127.0.0.1", closed_port)
            await until(lambda: refused.calls)
            near.dial("127.0.0.1", listener.port).link.close()
            assert [entry for entry in near.timers._heap if entry[2].pending] == []
            near.drop()


async def test_a_peer_that_raises_ends_its_own_connection_only(
    dialing: OpenDialing, listener: Listener, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(Heard):
        def connected(self, now: int) -> None:
            raise RuntimeError(f"connected at {now}")

        def failed(self, reason: str, now: int) -> None:
            raise RuntimeError(f"failed at {now}: {reason}")

    async with dialing() as near:
        other, far = await near.stand(listener)
        deadline = near.clock.now() + SECOND
        near.dialer.connect(listener.address[0], listener.port, Raising(), tls=False, deadline=deadline)
        await (await listener.accept()).until_ended()
        near.dialer.connect("127.0.0.1", closed_port, Raising(), tls=False, deadline=deadline)
        await until(lambda: len(caplog.records) == 2)
        far.say(b"still here")
        await until(lambda: bytes(other.received) == b"still here")
        other.link.close()
    assert [record.getMessage() for record in caplog.records] == ["the peer of a connection failed"] * 2


# TLS


async def test_tls(dialing: OpenDialing, certificates: Certificates) -> None:
    with closing(Listener(certificates.server)) as listener:
        async with dialing() as near:
            near.names["server.test"] = [listener.resolved]
            heard, far = await near.stand(listener, "server.test", tls=True)
            heard.link.write(b"hello")
            await far.until_received(b"hello")
            far.say(b"welcome")
            await until(lambda: bytes(heard.received) == b"welcome")
            heard.link.close()
            await far.until_ended()
            assert far.notified
            assert far.failure is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_tls_to_an_address(dialing: OpenDialing, certificates: Certificates, host: str) -> None:
    try:
        listener = Listener(certificates.server, host=host)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with closing(listener):
        async with dialing() as near:
            heard, _ = await near.stand(listener, tls=True)
            heard.link.close()


@pytest.mark.parametrize(
    ("server", "host", "reason"),
    [
        ("server", "other.test", "Hostname mismatch, certificate is not valid for 'other.test'"),
        ("nameless", "127.0.0.1", "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        ("expired", "server.test", "certificate has expired"),
        ("stranger", "server.test", "unable to get local issuer certificate"),
        ("self_signed", "server.test", "self-signed certificate"),
    ],
)
async def test_a_certificate_that_is_refused(
    dialing: OpenDialing, certificates: Certificates, server: str, host: str, reason: str
) -> None:
    with closing(Listener(getattr(certificates, server))) as listener:
        async with dialing() as near:
            near.names["server.test"] = near.names["other.test"] = [listener.resolved]
            heard = near.dial(host, listener.port, tls=True)
            far = await listener.accept()
            await far.until(lambda: heard.calls)
            assert heard.reason.startswith("the server's certificate is refused: ")
            assert reason in heard.reason
            await far.until_ended()
            assert far.received == b""


async def test_a_server_that_speaks_no_tls(dialing: OpenDialing, listener: Listener) -> None:
    async with dialing() as near:
        heard = near.dial(listener.address[0], listener.port, tls=True)
        far = await listener.accept()
        await far.until(lambda: far.received)
        far.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await until(lambda: heard.calls)
        assert heard.reason.startswith("TLS failed: ")


async def test_a_server_that_does_not_shake_hands(dialing: OpenDialing, listener: Listener) -> None:
    async with dialing() as near:
        heard = near.dial(listener.address[0], listener.port, tls=True, seconds=2)
        far = await listener.accept()
        await far.until(lambda: far.received)
        near.clock.advance(2 * SECOND - 1)
        await turns()
        assert heard.calls == []
        near.clock.advance(1)
        assert heard.calls == [Failed("the TLS handshake is not done in time")]
        await far.until_ended()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
async def test_a_server_that_leaves_in_the_handshake(dialing: OpenDialing, listener: Listener, how: str) -> None:
    async with dialing() as near:
        heard = near.dial(listener.address[0], listener.port, tls=True)
        far = await listener.accept()
        await far.until(lambda: far.received)
        {"close": far.close, "reset": far.reset, "half": far.half_close}[how]()
        await until(lambda: heard.calls)
        reset = "the connection broke: Connection reset by peer"
        assert heard.reason == (reset if how == "reset" else "the server hung up during the TLS handshake")


async def test_close_in_the_handshake(dialing: OpenDialing, listener: Listener) -> None:
    async with dialing() as near:
        heard = near.dial(listener.address[0], listener.port, tls=True)
        far = await listener.accept()
        await far.until(lambda: far.received)
        heard.link.write(b"too early")
        heard.link.close()
        await far.until_ended()
        near.clock.advance(20 * SECOND)
        assert heard.calls == []


async def test_names_that_no_certificate_is_for(dialing: OpenDialing, listener: Listener) -> None:
    async with dialing() as near:
        for name in (".test", "\u2603" * 80):
            near.names[name] = [listener.resolved]
            heard = near.dial(name, 80, tls=True)
            await until(partial(heard_something, heard))
            assert heard.reason


async def test_the_systems_authorities_are_trusted_by_default(
    dialing: OpenDialing, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Listener(certificates.server)) as listener, ExitStack() as undo:
        undo.callback(default_context.cache_clear)
        default_context.cache_clear()
        async with dialing() as near:
            near.dialer._context = None
            heard = near.dial(listener.address[0], listener.port, tls=True)
            far = await listener.accept()
            await far.until(lambda: heard.calls)
            assert "certificate is refused" in heard.reason
            default_context.cache_clear()
            monkeypatch.setenv("SSL_CERT_FILE", str(certificates.save_authority()))
            heard, _ = await near.stand(listener, tls=True)
            heard.link.close()
