"""Two connections of ours, joined by wires that cut anywhere: what one sends the other gets, in order, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.strategies import texts

from tokenwire.core.errors import LocalProtocolError
from tokenwire.core.websocket import (
    BinaryMessage,
    CloseCode,
    Closed,
    Deflate,
    Ping,
    Pong,
    Role,
    State,
    TextMessage,
    WebSocketConnection,
    WebSocketEvent,
)

sides = st.sampled_from([0, 1])


class Side:
    """One end: its connection, what is on the wire to it, and what it has to get."""

    def __init__(self, role: Role, deflate: Deflate | None) -> None:
        self.connection = WebSocketConnection(role, deflate=deflate, mask=lambda: b"\x9a\x01\xfe\x37")
        self.wire = bytearray()
        self.expected: list[WebSocketEvent] = []
        self.got: list[WebSocketEvent] = []
        self.ended = False
        self.cut_off = False  # the transport ended before the peer's close frame had come


class Joined(RuleBasedStateMachine):
    """The model: messages sent in state OPEN arrive, all of them, unless the transport ends."""

    @initialize(deflate=st.none() | st.builds(Deflate, server_no_context_takeover=st.booleans()))
    def join(self, deflate: Deflate | None) -> None:
        self.sides = Side(Role.SERVER, deflate), Side(Role.CLIENT, deflate)

    def _send(self, at: int, wire: bytes, event: WebSocketEvent | None = None) -> None:
        peer = self.sides[1 - at]
        peer.wire += wire
        if event is not None:
            peer.expected.append(event)

    def _is_open(self, at: int) -> bool:
        return self.sides[at].connection.state is State.OPEN

    @rule(at=sides, text=texts | st.integers(0, 70_000).map("é".__mul__))
    def send_text(self, at: int, text: str) -> None:
        connection = self.sides[at].connection
        if self._is_open(at):
            self._send(at, connection.send_text(text), TextMessage(text))
            return
        state = connection.state
        with pytest.raises(LocalProtocolError):
            connection.send_text(text)
        with pytest.raises(LocalProtocolError):
            connection.send_binary(text.encode())
        assert connection.state is state

    @rule(at=sides, data=st.binary(max_size=300))
    def send_binary(self, at: int, data: bytes) -> None:
        if self._is_open(at):
            self._send(at, self.sides[at].connection.send_binary(data), BinaryMessage(data))

    @rule(at=sides, payload=st.binary(max_size=125))
    def ping(self, at: int, payload: bytes) -> None:
        if self._is_open(at):
            self._send(at, self.sides[at].connection.send_ping(payload), Ping(payload))

    @rule(at=sides, code=st.sampled_from([1000, 1001, 1011, 4000, CloseCode.NO_STATUS]), reason=texts)
    def close(self, at: int, code: int, reason: str) -> None:
        side = self.sides[at]
        if self._is_open(at):
            said = "" if code == CloseCode.NO_STATUS else reason
            self._send(at, side.connection.send_close(code, said), Closed(code, said, clean=True))
            assert side.connection.state is (State.CLOSED if side.ended else State.CLOSING)

    @rule(at=sides, size=st.integers(1, 100_000))
    def deliver(self, at: int, size: int) -> None:
        side = self.sides[at]
        piece = bytes(side.wire[:size])
        del side.wire[:size]
        self._take(side, side.connection.receive_data(piece))

    @rule(at=sides)
    def fetch(self, at: int) -> None:
        side = self.sides[at]
        answers = self._is_open(at) and side.ended
        self._send(at, b"".join(side.connection.data_to_send()))
        if answers:
            closed = side.got[-1]
            assert isinstance(closed, Closed)
            self.sides[1 - at].expected.append(Closed(closed.code, "", clean=True))
            assert side.connection.state is State.CLOSED

    @precondition(lambda self: not any(side.cut_off for side in self.sides))
    @rule(at=sides)
    def lose_transport(self, at: int) -> None:
        side = self.sides[at]
        was_ended = side.ended
        events = side.connection.receive_eof()
        assert events == ([] if was_ended else [Closed(CloseCode.ABNORMAL, "", clean=False)])
        side.ended = True
        side.cut_off = not was_ended
        side.wire.clear()

    def _take(self, side: Side, events: list[WebSocketEvent]) -> None:
        if side.ended:
            assert events == []
            return
        side.got += events
        side.ended = any(isinstance(event, Closed) for event in events)

    @invariant()
    def nothing_is_lost_changed_or_made_up(self) -> None:
        for side in getattr(self, "sides", ()):
            spoken = [event for event in side.got if not isinstance(event, Pong)]
            assert spoken == side.expected[: len(spoken)]
            if not side.wire and not side.cut_off and not side.ended:
                assert spoken == side.expected
            if side.connection.state is State.CLOSED:
                assert side.ended
            assert side.ended >= any(isinstance(event, Closed) for event in side.got)

    def teardown(self) -> None:
        """Let both sides finish: without a lost transport, a close by one closes both."""
        if not hasattr(self, "sides") or any(side.cut_off for side in self.sides):
            return
        self.close(0, 1000, "")
        for at in (1, 0, 1, 0):
            self.deliver(at, 1 << 30)
            self.fetch(at)
        for side in self.sides:
            assert side.connection.state is State.CLOSED
            assert [event for event in side.got if not isinstance(event, Pong)] == side.expected


TestJoined = Joined.TestCase
TestJoined.settings = settings(max_examples=60, stateful_step_count=40)
