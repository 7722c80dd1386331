"""What one client's address may hold: who counts as one client, and that each place is given back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenwire.core.events import ErrorKind, StreamError
from tokenwire.core.peers import PeerLimits, PeerShare, PeerTable, peer_key

SAME = [
    ("192.0.2.1", "192.0.2.1"),
    ("192.0.2.1", "::ffff:192.0.2.1"),
    ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff"),
    ("fe80::1%eth0", "fe80::2%eth1"),
    ("::1", "::2"),
]
APART = [
    ("192.0.2.1", "192.0.2.2"),
    ("2001:db8::1", "2001:db8:0:1::1"),
    ("::ffff:192.0.2.1", "::ffff:192.0.2.2"),
    ("127.0.0.1", "::1"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_addresses_of_one_client(one: str, other: str) -> None:
    assert peer_key(one) == peer_key(other)


@pytest.mark.parametrize(("one", "other"), APART)
def test_addresses_of_two_clients(one: str, other: str) -> None:
    assert peer_key(one) != peer_key(other)


def test_nothing_is_counted_by_default() -> None:
    table = PeerTable(PeerLimits())
    assert [table.enter("192.0.2.1") for _ in range(1000)] == [None] * 1000
    assert len(table) == 0


@pytest.mark.parametrize(
    ("exempt", "address", "counted"),
    [
        ("10.0.0.0/8", "10.1.2.3", False),
        ("10.1.2.3/8", "10.4.5.6", False),
        ("10.0.0.0/8", "::ffff:10.1.2.3", False),
        ("10.0.0.0/8", "11.0.0.1", True),
        ("2001:db8::/32", "2001:db8:5::1", False),
        ("2001:db8::/32", "10.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.2", True),
        ("127.0.0.1", "", False),
    ],
)
def test_addresses_that_stand_for_many_clients(exempt: str, address: str, counted: bool) -> None:
    table = PeerTable(PeerLimits(max_connections=1, exempt=(exempt,)))
    assert (table.enter(address) is not None) is counted


def test_what_is_no_network_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="localhost"):
        PeerTable(PeerLimits(exempt=("localhost",)))


def test_the_refusals() -> None:
    table = PeerTable(PeerLimits(max_connections=1, max_streams=1))
    share = table.enter("192.0.2.1")
    assert isinstance(share, PeerShare)
    refused = table.enter("192.0.2.1")
    assert isinstance(refused, StreamError)
    assert (refused.kind, refused.code, refused.retryable) == (ErrorKind.RATE_LIMIT, "too_many_connections", True)
    assert isinstance(table.enter("192.0.2.2"), PeerShare)
    assert share.begin_stream() is None
    error = share.begin_stream()
    assert error is not None
    assert (error.kind, error.code, error.retryable) == (ErrorKind.RATE_LIMIT, "too_many_streams", True)
    share.end_stream()
    assert share.begin_stream() is None


class PeersMachine(RuleBasedStateMachine):
    """Connections come and go in any order, and begin and end streams while they are here."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PeerTable(PeerLimits(max_connections=3, max_streams=2))
        self.open: dict[str, int] = {}
        self.entered: list[tuple[str, PeerShare]] = []
        self.streams: dict[int, int] = {}

    @rule(address=st.sampled_from(["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "2001:db8::2", "::1"]))
    def enter(self, address: str) -> None:
        share = self.table.enter(address)
        key = peer_key(address)
        if not isinstance(share, PeerShare):
            assert self.open[key] == 3
            return
        self.open[key] = self.open.get(key, 0) + 1
        assert share.connections == self.open[key]
        self.entered.append((key, share))
        self.streams.setdefault(id(share), 0)

    @precondition(lambda self: self.entered)
    @rule(number=st.integers(0, 20))
    def leave(self, number: int) -> None:
        key, share = self.entered[number % len(self.entered)]
        if share.connections:
            share.leave()
            self.open[key] -= 1

    @precondition(lambda self: self.entered)
    @rule(number=st.integers(0, 20))
    def begin(self, number: int) -> None:
        _, share = self.entered[number % len(self.entered)]
        begun = share.begin_stream() is None
        assert begun is (self.streams[id(share)] < 2)
        self.streams[id(share)] += begun

    @precondition(lambda self: self.entered)
    @rule(number=st.integers(0, 20))
    def end(self, number: int) -> None:
        _, share = self.entered[number % len(self.entered)]
        if self.streams[id(share)]:
            share.end_stream()
            self.streams[id(share)] -= 1
        assert share.streams == self.streams[id(share)]

    @invariant()
    def only_clients_that_are_here_are_remembered(self) -> None:
        assert len(self.table) == sum(count > 0 for count in self.open.values())


TestPeersMachine = PeersMachine.TestCase
TestPeersMachine.settings = settings(max_examples=60, stateful_step_count=30)
