"""One peer after its upgrade to WebSocket: frames in, actions out; frames out; the next deadline.

    OPEN --close frame, ours or the peer's--> CLOSING --transport's end--> GONE
      |                                          |
      +---- transport lost, peer given up -------+

It stands between the codec and the conversation, and takes the place of the `Connection` that read the handshake. Tokens
do not pass through it: a delivery's frames go straight to the carrier. They are whole frames, so that pongs may stand
between them.

There are two kinds of patience. While the peer takes what we send, pings show whether it lives. While it takes nothing a
ping would only wait behind the rest, so that nothing but progress counts: whoever takes some goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ._ws_frames import TABLED, TEXT_LEADS
from .actions import Abort, Action, Close
from .contracts import Reply, ResponseHead
from .conversation import Conversation
from .framing import BORDER, Folded, Template
from .text import repair_surrogates
from .websocket import (
    BinaryMessage,
    Closed,
    Keepalive,
    Role,
    State,
    Step,
    TextMessage,
    WebSocketConnection,
    WebSocketEvent,
    fold_websocket,
    text_header,
)

__all__ = ["FRAMING", "FrameFraming", "UpgradedConnection"]


class FrameFraming:
    """One text frame a message; a `tokenwire.core.contracts.Framing`."""

    __slots__ = ()

    def begin(self, head: ResponseHead) -> bytes:
        """Say nothing: the connection is open already."""
        del head
        return b""

    def frame(self, payload: bytes) -> bytes:
        """Make each of a payload's messages a frame."""
        if BORDER in payload:
            return b"".join(map(self.frame, payload.split(BORDER)))
        return text_header(len(payload)) + payload if payload else b""

    def fold(self, template: Template) -> Folded:
        """Fold a template into one frame a token."""
        # Only bare text can be two messages: in an object it is escaped.
        return fold_websocket(template) if template.prefix else _BareText(template)

    def end(self) -> bytes:
        """Say nothing: the dialect's last message is the end."""
        return b""

    def reply(self, reply: Reply) -> bytes:
        """Make a whole answer's body a message."""
        return self.frame(reply.body)


FRAMING: Final = FrameFraming()
"""The one instance: it has no state."""


class _BareText(Folded):
    """A template of nothing but text, which may ask to be split."""

    __slots__ = ()

    def __init__(self, template: Template) -> None:
        super().__init__(template, (), text_header)

    def encode(self, text: str, number: int) -> bytes:
        """Make one frame of a token, or the two of one that a client would take for the end."""
        del number
        try:
            payload = self._escape(text)
        except UnicodeEncodeError:
            payload = self._escape(repair_surrogates(text))
        size = len(payload)
        if not size or BORDER in payload:
            return FRAMING.frame(payload)
        return (TEXT_LEADS[size] if size < TABLED else text_header(size)) + payload


class UpgradedConnection:
    """One peer on WebSocket, as a server; a `tokenwire.core.actions.PeerMachine`.

    Args:
        conversation: what is talked about, opened with `FRAMING`.
        now: when the handshake was done.
        max_message_bytes: the longest message that is read.
        stall_ns: how long the peer may take nothing of what waits for it.

    Attributes:
        conversation: as given.
    """

    __slots__ = ("_blocked", "_gone", "_keepalive", "_out", "_stall_ns", "_taken_ns", "_websocket", "conversation")

    def __init__(self, conversation: Conversation, now: int, *, max_message_bytes: int, stall_ns: int) -> None:
        self.conversation = conversation
        self._websocket = WebSocketConnection(Role.SERVER, max_message_bytes=max_message_bytes)
        self._keepalive = Keepalive(now)
        self._stall_ns = stall_ns
        self._taken_ns = now
        self._out: list[bytes] = []
        self._blocked = False
        self._gone = False

    def receive_data(self, data: bytes, now: int) -> list[Action]:
        """Take bytes from the peer; see `PeerMachine`."""
        if self._gone or not data:
            return []
        self._keepalive.received(now)
        return self._handle(self._websocket.receive_data(data), now)

    def receive_eof(self, now: int) -> list[Action]:
        """Learn that the peer sends no more: without a close frame before, it has broken off. Idempotent."""
        return [] if self._gone else self._handle(self._websocket.receive_eof(), now)

    def lost(self, now: int) -> list[Action]:
        """Learn that the transport is gone. Idempotent."""
        self._gone = True
        self._out.clear()
        return self.conversation.leave(now)

    def data_to_send(self) -> list[bytes]:
        """Hand over what is to be written, in order, and forget it; pongs wait while the peer takes nothing."""
        out, self._out = self._out, []
        return out if self._blocked else [*out, *self._websocket.data_to_send()]

    def set_blocked(self, blocked: bool, now: int) -> list[Action]:
        """Learn that the transport takes no more, or takes again."""
        self._blocked = blocked
        self._taken_ns = now
        return self._after(self.conversation.set_blocked(blocked, now), now)

    def settle(self, now: int) -> list[Action]:
        """Look at the answer that runs."""
        return self._after(self.conversation.settle(now), now)

    def next_deadline(self) -> int | None:
        """Say when a ping is due, or the end of patience."""
        if self._gone:
            return None
        if not self._blocked:
            return self._keepalive.next_deadline()
        stalled = self._taken_ns + self._stall_ns
        reader = self.conversation.next_deadline()
        return stalled if reader is None else min(reader, stalled)

    def handle_deadline(self, now: int) -> list[Action]:
        """Ping a silent peer, or give up one that is gone or takes nothing; nothing where no deadline has passed."""
        if self._gone:
            return []
        if self._blocked:
            actions = self._after(self.conversation.handle_deadline(now), now)
            if _gives_up(actions) or now < self._taken_ns + self._stall_ns:
                return actions
            return [*actions, *self.lost(now), Abort()]
        step = self._keepalive.handle_deadline(now)
        if step is Step.GIVE_UP:
            return [*self.lost(now), Abort()]
        if step is Step.PING and self._websocket.state is State.OPEN:
            self._out.append(self._websocket.send_ping())
        return []

    def drain(self, now: int) -> list[Action]:
        """The server is going down."""
        return self._after(self.conversation.drain(now), now)

    def _handle(self, events: Sequence[WebSocketEvent], now: int) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            match event:
                case TextMessage():
                    actions += self._after(self.conversation.receive_text(event.text, now), now)
                case BinaryMessage():
                    actions += self._after(self.conversation.receive_binary(now), now)
                case Closed():
                    actions += self.conversation.leave(now)
                    actions += self._end(now)
                case _:
                    pass  # pings and pongs are the codec's own business
        return actions

    def _after(self, actions: list[Action], now: int) -> list[Action]:
        """Take over what the conversation says, and close where it wants that."""
        if _gives_up(actions):
            self._gone = True
            self._out.clear()
            return actions
        self._out += self.conversation.data_to_send()
        closing = self.conversation.closing
        if closing is not None and self._websocket.state is State.OPEN:
            self._out.append(self._websocket.send_close(closing.code, closing.reason))
        if closing is not None and not self._blocked:
            self._keepalive.begin_closing(now)  # while the peer takes nothing, our close frame has not left
        return actions

    def _end(self, now: int) -> list[Action]:
        """The closing handshake is over: a server ends the transport first (RFC 6455, 7.1.1), and waits for the peer."""
        self._out += self._websocket.data_to_send()
        if not self._blocked:
            self._keepalive.begin_closing(now)
        return [Close()]


def _gives_up(actions: Sequence[Action]) -> bool:
    return any(isinstance(action, Abort) for action in actions)
