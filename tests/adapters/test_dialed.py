"""A dialled connection that stands, with TLS and without, on every loop: bytes both ways, back-pressure, and every end."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.adapters.authorities import Certificates
from tests.adapters.dialing import Connected, Dialing, FarEnd, Heard, Listener, OpenDialing
from tests.adapters.serving import turns, until

from tokenwire.adapters.byte_path import RECEIVE_BYTES

pytestmark = pytest.mark.anyio

LARGE = bytes(range(256)) * 4 * 5_000
"""More than the kernel takes for somebody who does not read."""


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def listener(certificates: Certificates, *, tls: bool) -> Iterator[Listener]:
    with closing(Listener(certificates.server if tls else None)) as one:
        yield one


async def stand(near: Dialing, listener: Listener, *, tls: bool) -> tuple[Heard, FarEnd]:
    return await near.stand(listener, tls=tls)


async def test_a_large_body_goes_out_as_there_is_room(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        heard.link.write(LARGE)
        heard.link.write(b"and more")
        assert heard.calls == [Connected(), True]
        await turns()
        await far.until(lambda: len(far.received) == len(LARGE) + 8)
        assert far.received == LARGE + b"and more"
        await until(lambda: heard.calls[-1] is False)
        heard.link.write(b"last")
        await far.until(lambda: far.received.endswith(b"morelast"))
        assert set(heard.calls[1:-1]) == {True}
        heard.link.close()


async def test_a_large_answer_comes_whole(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        await far.say_much(LARGE)
        await until(lambda: len(heard.received) == len(LARGE))
        assert heard.received == LARGE
        heard.link.close()


async def test_a_slow_reader_holds_the_server_back(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        heard.on_data = lambda: heard.link.set_reading(False)
        far.say(b"first")
        await until(lambda: heard.received)
        far.say(b"second")
        far.say(b"third")
        await turns()
        assert heard.received == b"first"
        assert near.readiness.watched == set()  # a loop that went on watching would spin
        heard.on_data = lambda: None
        heard.link.set_reading(True)
        await until(lambda: bytes(heard.received) == b"firstsecondthird")
        heard.link.close()


async def test_a_read_is_bounded_while_nobody_wants_more(
    dialing: OpenDialing, listener: Listener, *, tls: bool
) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        heard.on_data = lambda: heard.link.set_reading(False)
        far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1_000_000)
        far.say(LARGE[:500_000])
        await until(lambda: heard.received)
        await turns()
        assert len(heard.received) <= RECEIVE_BYTES + 16 * 1024
        total = 0
        while total < 500_000:
            total = len(heard.received)
            heard.link.set_reading(True)
            await turns(3)
        assert heard.received == LARGE[:500_000]
        heard.link.close()


async def test_a_pause_that_is_over_at_once_changes_nothing(
    dialing: OpenDialing, listener: Listener, *, tls: bool
) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        for _ in range(3):
            heard.link.set_reading(False)
            heard.link.set_reading(True)
        far.say(b"here")
        await until(lambda: bytes(heard.received) == b"here")
        heard.link.close()


async def test_who_does_not_want_to_read_yet(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    """Asked before it stands; the handshake is read all the same."""
    async with dialing() as near:
        heard = near.dial(listener.address[0], listener.port, tls=tls)
        heard.link.set_reading(False)
        far = await listener.accept()
        await far.until(lambda: heard.stands)
        if tls:
            await far.until(lambda: far.shaken)
        far.say(b"early")
        await turns()
        assert heard.received == b""
        heard.link.set_reading(True)
        await until(lambda: bytes(heard.received) == b"early")
        heard.link.close()


async def test_the_end(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        far.say(b"all")
        if tls:
            far.notify()
        far.half_close()
        await until(lambda: heard.over)
        assert heard.received == b"all"
        assert heard.ended
        await far.until_ended()
        heard.link.write(b"nobody")
        heard.link.set_reading(True)
        heard.link.close()


async def test_the_end_waits_for_who_does_not_read(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        heard.link.set_reading(False)
        far.say(b"all")
        if tls:
            far.notify()
        far.close()
        await turns()
        assert heard.calls == [Connected()]
        heard.link.set_reading(True)
        await until(lambda: heard.over)
        assert heard.received == b"all"
        assert heard.ended


async def test_a_reset_in_the_middle(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        heard.link.set_reading(False)
        far.say(b"half")
        far.reset()
        await turns()
        heard.link.set_reading(True)
        await until(lambda: heard.over)
        assert heard.received == b"half"
        assert heard.reason == "the connection broke: Connection reset by peer"


async def test_a_reset_behind_more_than_one_turn_takes(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2_000_000)
        heard.link.set_reading(False)
        await turns()
        far.say(LARGE[:600_000])
        await turns()
        far.reset()
        await turns()
        heard.link.set_reading(True)
        await until(lambda: heard.over)
        assert LARGE.startswith(bytes(heard.received))
        assert heard.reason == "the connection broke: Connection reset by peer"


async def test_a_refusal_in_the_middle_of_a_body_is_still_heard(
    dialing: OpenDialing, listener: Listener, *, tls: bool
) -> None:
    """The server answers, and closes with the body unread, which resets the connection under the writer."""
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        heard.link.set_reading(False)
        heard.link.write(LARGE)
        far.say(b"413")
        far.close()
        await until(lambda: not near.readiness.watched)
        await turns()
        assert heard.calls[-1] is True
        heard.link.set_reading(True)
        await until(lambda: heard.over)
        assert bytes(heard.received) in {b"413", b""}  # systems may drop what came before a reset; Linux keeps it
        assert heard.reason.startswith("the connection broke: ")


async def test_a_half_close_without_a_close_notify(dialing: OpenDialing, certificates: Certificates) -> None:
    """Whoever can cut a connection could cut an answer short; TLS tells it from its end."""
    with closing(Listener(certificates.server)) as listener:
        async with dialing() as near:
            heard, far = await near.stand(listener, tls=True)
            far.say(b"half an answer")
            far.half_close()
            await until(lambda: heard.over)
            assert heard.received == b"half an answer"
            assert "without TLS's close_notify" in heard.reason


async def test_a_forged_record(dialing: OpenDialing, certificates: Certificates) -> None:
    with closing(Listener(certificates.server)) as listener:
        async with dialing() as near:
            heard, far = await near.stand(listener, tls=True)
            far.say(b"good")
            far.say_raw(b"\x17\x03\x03\x00\x20" + b"x" * 32)
            await until(lambda: heard.over)
            assert heard.received == b"good"
            assert heard.reason.startswith("TLS failed: ")


@pytest.mark.parametrize("on", ["connected", "data"])
async def test_close_from_within(dialing: OpenDialing, listener: Listener, on: str, *, tls: bool) -> None:
    async with dialing() as near:
        if on == "data":
            heard, far = await near.stand(listener, tls=tls)
            heard.on_data = heard.link.close
            far.say(b"one")
            far.half_close()
        else:
            heard = near.dial(listener.address[0], listener.port, tls=tls)
            heard.on_connected = heard.link.close
            far = await listener.accept()
        await far.until_ended()
        await turns()
        assert heard.calls == [Connected()]
        assert bytes(heard.received) == (b"one" if on == "data" else b"")


async def test_close_drops_what_was_not_sent(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        heard.link.write(LARGE)
        heard.link.close()
        assert near.readiness.watched == set()
        await far.until_ended()
        assert len(far.received) < len(LARGE)
        assert heard.calls == [Connected(), True]


async def test_nothing_is_held_after_the_end(dialing: OpenDialing, listener: Listener, *, tls: bool) -> None:
    async with dialing() as near:
        heard, far = await near.stand(listener, tls=tls)
        sockets = list(near.readiness.sockets)
        far.close()
        await until(lambda: heard.over)
        gc.collect()
        assert [sock for sock in sockets if sock.fileno() >= 0] == []
