"""Drawn lives of WebSockets, beside each other and beside HTTP; and proof that a broken server would have been noticed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

import pytest

from tokenwire.backends.mock import MockBackend
from tokenwire.core import conversation
from tokenwire.core.actions import Action, Cancel, Record
from tokenwire.core.connection import ConnectionOptions
from tokenwire.core.conversation import Conversation
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.dialects import plain_messages
from tokenwire.core.events import TextDelta
from tokenwire.core.service import Service, ServiceOptions
from tokenwire.core.testing.backend import SimulatedRuntime
from tokenwire.core.testing.clock import VirtualClock
from tokenwire.core.testing.network import Faults, Link
from tokenwire.core.testing.peer import SimulatedServer
from tokenwire.core.testing.simulator import Report, Simulation
from tokenwire.core.testing.websocket_client import Manners, WebSocketClient
from tokenwire.core.upgraded import FrameFraming, UpgradedConnection
from tokenwire.core.websocket import text_header

SEEDS = 300
MILLISECOND = 1_000_000
Patch = pytest.MonkeyPatch


class Facts:
    """Ids that count, and a wall clock that stands."""

    def __init__(self) -> None:
        self._count = count()

    def new_id(self) -> str:
        return f"{next(self._count)}"

    def wall_s(self) -> int:
        return 0


def simulate(seed: int) -> Report:
    return Simulation(seed, clients=seed % 2, sockets=2).run()


def test_no_seed_finds_a_broken_promise() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        report = simulate(seed)
        report.check()
        counts.update(report.counts)
    # A simulation in which nothing happens finds nothing.
    assert counts["prompts answered"] > SEEDS
    assert min(counts[f"record {end}"] for end in ("failed", "cancelled", "slow_reader", "refused")) > 0


def test_a_seed_replays_exactly() -> None:
    assert simulate(7) == simulate(7)
    assert simulate(7).digest != simulate(8).digest


def _heard_by_another(manners: Manners) -> list[int]:
    """Let a client and one that behaves otherwise ask at the same time; say when the first hears something."""
    clock, heard = VirtualClock(), list[int]()
    backend = MockBackend(ttft_ns=30 * MILLISECOND, itl_ns=10 * MILLISECOND)
    delivery = DeliveryOptions(budget_bytes=2000, stall_ns=2000 * MILLISECOND)
    service = Service(
        models=backend.models, honours=backend.honours, facts=Facts(), options=ServiceOptions(delivery=delivery)
    )
    server = SimulatedServer(
        service,
        backend,
        clock,
        options=ConnectionOptions(),
        log=_returns(None),
        report=_returns(None),
        inspect=_returns(None),
    )
    backend.attach(SimulatedRuntime(clock), server.dispatcher)

    def note(what: str, detail: object) -> None:
        if what == "reads":
            heard.append(clock.now())
        del detail

    clients: list[WebSocketClient] = []
    for number, behaviour in enumerate((Manners(objects=True, prompts=3), manners)):
        link = Link(clock, Random(number), upward=Faults(), downward=Faults(capacity=500))
        server.accept(number, link.server)
        tell: Callable[[str, object], None] = note if number == 0 else _returns(None)
        clients.append(WebSocketClient(link.client, clock, Random(number), behaviour, tell))
        clients[-1].start()
    clock.advance(600_000 * MILLISECOND)
    assert [len(answer) > 2 and answer[-1] == "[DONE]" for answer in clients[0].answers] == [True] * 3
    assert not server.peers
    assert service.admission.running == 0
    return heard


def test_one_stalled_reader_never_delays_another() -> None:
    good = Manners(objects=True, prompts=3)
    usual = _heard_by_another(good)
    assert len(usual) > 20
    for bad in (
        Manners(objects=True, prompts=3, leaves="stall", after_messages=2),
        Manners(objects=True, prompts=3, at_once=True, leaves="stall", after_messages=0, pings=40),
    ):
        assert _heard_by_another(bad) == usual


# ------------------------------------------------------------------------------------------------- broken on purpose


def _returns(value: Any) -> Callable[..., Any]:
    def method(*_: object, **__: object) -> Any:
        return value

    return method


def _overlooks_eof(patch: Patch) -> None:
    patch.setattr(UpgradedConnection, "receive_eof", _returns(()))


def _cancels_nobody(patch: Patch) -> None:
    honest = Conversation._drop

    def drop(self: Conversation, end: str, by: str, now: int) -> list[Action]:
        return [action for action in honest(self, end, by, now) if not isinstance(action, Cancel)]

    patch.setattr(Conversation, "_drop", drop)


def _records_twice(patch: Patch) -> None:
    honest = Conversation.settle

    def settle(self: Conversation, now: int) -> list[Action]:
        actions = honest(self, now)
        return actions + [action for action in actions if isinstance(action, Record)]

    patch.setattr(Conversation, "settle", settle)


def _says_two_messages_as_one(patch: Patch) -> None:
    def frame(self: FrameFraming, payload: bytes) -> bytes:
        del self
        payload = payload.replace(b"\xff", b" ")
        return text_header(len(payload)) + payload if payload else b""

    patch.setattr(FrameFraming, "frame", frame)


def _forgets_the_end(patch: Patch) -> None:
    patch.setattr(plain_messages, "_DONE", b"[DONE].")


def _a_failure_ends_like_a_success(patch: Patch) -> None:
    honest = plain_messages.TextMessages.encode

    def encode(self: plain_messages.TextMessages, event: Any, number: int) -> bytes:
        return honest(self, event, number) or (b"[DONE]" if getattr(event, "message", None) else b"")

    patch.setattr(plain_messages.TextMessages, "encode", encode)


def _drops_reasoning(patch: Patch) -> None:
    honest = plain_messages.ObjectMessages.encode

    def encode(self: plain_messages.ObjectMessages, event: Any, number: int) -> bytes:
        return honest(self, event, number) if type(event) is not TextDelta or event.text != "a" else b""

    patch.setattr(plain_messages.ObjectMessages, "encode", encode)


def _queues_without_end(patch: Patch) -> None:
    def put_off(self: Conversation, message: bytes, now: int) -> list[Action]:
        del now
        self._waiting = self._waiting or deque()
        self._waiting.append(message)
        return []

    patch.setattr(Conversation, "_put_off", put_off)


def _answers_nobody_who_waits(patch: Patch) -> None:
    patch.setattr(Conversation, "_next", _returns(()))


def _goes_on_after_the_close(patch: Patch) -> None:
    honest = UpgradedConnection.data_to_send

    def data_to_send(self: UpgradedConnection) -> list[bytes]:
        closing = self.conversation.closing
        return [*honest(self), *([text_header(1) + b"x"] if closing else [])]

    patch.setattr(UpgradedConnection, "data_to_send", data_to_send)


def _waits_for_ever(patch: Patch) -> None:
    patch.setattr(UpgradedConnection, "next_deadline", _returns(None))


def _ends_without_a_close(patch: Patch) -> None:
    patch.setattr(Conversation, "drain", _returns(()))
    patch.setattr(conversation, "Closing", _returns(None))


MUTANTS = (
    _overlooks_eof,
    _cancels_nobody,
    _records_twice,
    _says_two_messages_as_one,
    _forgets_the_end,
    _a_failure_ends_like_a_success,
    _drops_reasoning,
    _queues_without_end,
    _answers_nobody_who_waits,
    _goes_on_after_the_close,
    _waits_for_ever,
    _ends_without_a_close,
)


@pytest.mark.parametrize("mutate", MUTANTS, ids=[mutate.__name__.strip("_") for mutate in MUTANTS])
def test_a_broken_server_is_found_out(mutate: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutate(monkeypatch)
    assert any(simulate(seed).violations for seed in range(SEEDS))
