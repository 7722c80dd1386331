"""One WebSocket of ASGI: the server's messages to a conversation, and what it says back.

The server before us does frames, pings and the handshake. What an engine's step says is put together by `Carrier.write`
and leaves from the WebSocket's own task, woken once for all of it; while that task is away in `send` the conversation is
blocked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import anyio

from tokenwire.core.actions import Abort, Action, Record
from tokenwire.core.contracts import Folded, Principal, Reply, RequestHead, ResponseHead, Template
from tokenwire.core.conversation import SUBPROTOCOLS, Conversation
from tokenwire.core.events import ErrorKind, StreamError
from tokenwire.core.framing import BORDER, fold_messages
from tokenwire.core.routes import PLAIN
from tokenwire.core.service import Exchange

from .asgi_carrier import NOBODY, Hall
from .asgi_messages import BareFraming, Message, Receive, Scope, Send, encode_headers, head_of
from .runtime import Waiter
from .timers import Deadline

__all__ = ["MessageFraming", "converse"]

_ANYBODY: Final = Principal()
_POLICY_VIOLATION: Final = 1008
_ELSEWHERE: Final = "There is no WebSocket here, but at /ws/chat."
_SWITCHED: Final = 101
_UPGRADE: Final = ((b"upgrade", b"websocket"),)


class MessageFraming:
    """One message a payload, with a border behind it that the carrier cuts at; a `tokenwire.core.contracts.Framing`."""

    __slots__ = ()

    def begin(self, head: ResponseHead) -> bytes:
        """Say nothing: the WebSocket is open already."""
        del head
        return b""

    def frame(self, payload: bytes) -> bytes:
        """Put the border behind a payload."""
        return payload + BORDER if payload else b""

    def fold(self, template: Template) -> Folded:
        """Put the border into the template."""
        return fold_messages(template)

    def end(self) -> bytes:
        """Say nothing: the dialect's last message is the end."""
        return b""

    def reply(self, reply: Reply) -> bytes:
        """Make a whole answer's body a message."""
        return self.frame(reply.body)


class _Speaker:
    """What a conversation says, until its WebSocket takes it; a `tokenwire.core.contracts.Carrier`.

    Args:
        hall: the application.
        conversation: opened.

    Attributes:
        conversation: what it speaks for.
        on_abort: called when the peer is given up, who may be the one that `send` waits for.
        said_all: the conversation wants to close, and what it said before was sent.
    """

    __slots__ = (
        "_away",
        "_blocked",
        "_deadline",
        "_gone",
        "_hall",
        "_out",
        "_stuck_ns",
        "_waiter",
        "conversation",
        "on_abort",
        "said_all",
    )

    def __init__(self, hall: Hall, conversation: Conversation) -> None:
        self.conversation = conversation
        self.on_abort: Callable[[], object] = _nothing
        self.said_all = False
        self._hall = hall
        self._out = b""
        self._waiter: Waiter | None = None
        self._deadline = Deadline(hall.call_at, self._on_deadline)
        self._away = False
        self._blocked = False
        self._stuck_ns: int | None = None  # since when something waits for a `send` to return
        self._gone = False

    def write(self, data: bytes) -> None:
        """Keep messages until they are taken, and wake whoever takes them; see `Carrier`."""
        if self._gone:
            return
        self._out += data
        if self._away and not self._blocked:
            self._blocked = True
            now = self._hall.now()
            self._perform(self.conversation.set_blocked(True, now), now)
        self._wake()

    def settle(self, now: int) -> None:
        """An answer has ended or given up; see `Carrier`."""
        self._perform(self.conversation.settle(now), now)

    def receive(self, message: Message) -> bool:
        """Take one of the server's messages; False once the WebSocket is closed."""
        if message["type"] == "websocket.disconnect":
            return False
        now = self._hall.now()
        text = message.get("text")
        if text is None:
            self._perform(self.conversation.receive_binary(now), now)
        else:
            self._perform(self.conversation.receive_text(text, now), now)
        return True

    async def take(self) -> bytes:
        """Wait for messages; b"" once the conversation wants to close and has said all. Until the next call it is blocked."""
        self._away = False
        self._stuck_ns = None
        if self._blocked:
            self._blocked = False
            now = self._hall.now()
            self._perform(self.conversation.set_blocked(False, now), now)
        while not self._out and self.conversation.closing is None:
            self._waiter = waiter = self._hall.new_waiter()
            try:
                await waiter
            finally:
                self._waiter = None
        data, self._out = self._out, b""
        self._away = True
        return data

    def leave(self) -> None:
        """The WebSocket is closed. Idempotent."""
        if not self._gone:
            self._gone = True
            self._deadline.cancel()
            now = self._hall.now()
            self._hall.dispatcher.perform(self.conversation.leave(now), self, now)

    def _perform(self, actions: Sequence[Action], now: int) -> None:
        data = b"".join(self.conversation.data_to_send())
        if data:
            self.write(data)
        self._hall.dispatcher.perform(actions, self, now)
        if any(isinstance(action, Abort) for action in actions):
            self.on_abort()
        if self.conversation.closing is not None:
            self._wake()
        if self._away and self._stuck_ns is None and (self._blocked or self.conversation.closing is not None):
            self._stuck_ns = now
        self._deadline.expect(self._next_deadline(), now)

    def _on_deadline(self) -> None:
        now = self._hall.now()
        patience = self._end_of_patience()
        if patience is not None and patience <= now:
            self._stuck_ns = None
            self.on_abort()
        self._perform(self.conversation.handle_deadline(now), now)

    def _next_deadline(self) -> int | None:
        """Say when patience ends: the running answer's, else with a peer that does not take the last of what was said."""
        if self._gone:
            return None
        deadline = self.conversation.next_deadline()
        return self._end_of_patience() if deadline is None else deadline

    def _end_of_patience(self) -> int | None:
        return None if self._stuck_ns is None else self._stuck_ns + self._hall.service.options.delivery.stall_ns

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


async def converse(hall: Hall, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one WebSocket, from its handshake to its end.

    Args:
        hall: the application.
        scope: of type websocket.
        receive: gives the server's messages.
        send: takes ours.
    """
    if (await receive())["type"] != "websocket.connect":
        return  # the client has left before it was answered
    head = _head_of(scope)
    outcome = hall.service.open(head, _ANYBODY, hall.now())
    if isinstance(outcome, Exchange):
        outcome = hall.service.refuse(PLAIN, StreamError(ErrorKind.NOT_FOUND, _ELSEWHERE, "not_found"), head)
    if isinstance(outcome, Reply):
        await _turn_away(hall, head, outcome, scope, send)
        return
    subprotocol = next((name for name in scope.get("subprotocols", ()) if name in SUBPROTOCOLS), None)
    outcome.open(MessageFraming(), subprotocol)
    try:
        await send({"type": "websocket.accept", "subprotocol": subprotocol})
    except OSError:
        return  # as above
    now = hall.now()
    hall.dispatcher.perform((Record(method="GET", path=head.path, status=_SWITCHED, end="answered"),), NOBODY, now)
    await _talk(_Speaker(hall, outcome), receive, send)


async def _talk(speaker: _Speaker, receive: Receive, send: Send) -> None:
    """Hand messages back and forth until either side has had enough; the conversation's own close comes last."""
    left = False
    try:
        with suppress(OSError):  # the client has left, and that is all there is to say
            async with anyio.create_task_group() as tasks:
                speaker.on_abort = tasks.cancel_scope.cancel
                tasks.start_soon(_send_all, speaker, send, tasks.cancel_scope)
                while speaker.receive(await receive()):
                    pass
                left = True
                tasks.cancel_scope.cancel()
            closing = speaker.conversation.closing
            if closing is not None and speaker.said_all and not left:
                # Only now that nobody waits in `receive`: granian loses a close that is sent meanwhile.
                await send({"type": "websocket.close", "code": closing.code, "reason": closing.reason})
    finally:
        speaker.leave()


async def _send_all(speaker: _Speaker, send: Send, scope: anyio.CancelScope) -> None:
    """Send what the conversation says, until it wants to close."""
    with suppress(OSError):  # as above
        while data := await speaker.take():
            for message in data.split(BORDER):
                if message:  # an empty token is not sent
                    await send({"type": "websocket.send", "text": message.decode()})
        speaker.said_all = True
    scope.cancel()


async def _turn_away(hall: Hall, head: RequestHead, reply: Reply, scope: Scope, send: Send) -> None:
    """Answer the handshake by HTTP, where the server can; else close, which it words as 403."""
    end = "answered" if reply.status < 400 else "refused"
    record = Record(method=head.method, path=head.path, status=reply.status, end=end, error=reply.error)
    hall.dispatcher.perform((record,), NOBODY, hall.now())
    with suppress(OSError):  # the client may have left
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": (reply.error or "")[:60]})
            return
        framing = BareFraming()
        body = framing.reply(reply)
        headers = encode_headers(framing.head.headers) if framing.head else []
        await send({"type": "websocket.http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": body})


def _head_of(scope: Scope) -> RequestHead:
    """Read a handshake's head; over HTTP/2 and 3 it asks for the upgrade by another method (RFC 8441), which means the same."""
    head = head_of({"headers": (), **scope, "method": "GET"})
    asked = head.headers if head.header(b"upgrade") else (*head.headers, *_UPGRADE)
    return RequestHead("GET", head.path, head.query, asked)


def _nothing() -> None:
    """Stand in for what is not there yet."""
