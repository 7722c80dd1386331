"""The WebSocket clients of a simulation, well-behaved and otherwise, and what they may have heard.

Which stream an answer belongs to is not told on a WebSocket. But its answers come in the order of its prompts, and so do
the server's records of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

import msgspec
from msgspec import Struct

from tokenwire.core.actions import Record
from tokenwire.core.conversation import SUBPROTOCOLS
from tokenwire.core.errors import RemoteProtocolError
from tokenwire.core.events import StreamEnd
from tokenwire.core.websocket import (
    ClientHandshake,
    CloseCode,
    Closed,
    Ping,
    Role,
    State,
    TextMessage,
    UpgradeRefused,
    WebSocketConnection,
)

from .client import Answer, Asked
from .clock import VirtualClock
from .judge import Judge
from .ledger import Ledger, tell
from .network import Endpoint, Outbox

__all__ = ["Manners", "WebSocketClient", "draw_manners", "look_at_answers", "look_for_end"]

_MILLISECOND: Final = 1_000_000
_DONE: Final = "[DONE]"
_CANCEL: Final = '{"cancel":true}'
_TEXT, _CONTINUATION, _PING = 0x1, 0x0, 0x9
_FIN: Final = 0x80
_SHORT: Final = 126
_OPEN_ALREADY: Final = b": ka\n"
_GENERATES: Final = Asked(
    data=b"a prompt", method="GET", statuses=frozenset({200}), dialect="plain", stream=True, include_usage=True
)

_REFUSALS: Final = frozenset({"queue_full", "server_shutdown", "too_many_streams"})
_BAD: Final = ("{}", "no", '{"prompt":"x","stream":false}', '{"prompt":"x","model":"nobody"}', "[]")
_OFFENCES: Final = (
    b"\x81\x02{}",  # not masked
    b"\x82\x80\0\0\0\0",  # binary
    b"\x83\x80\0\0\0\0",  # an opcode that is none
    b"\x80\x80\0\0\0\0",  # goes on with nothing
    b"\x81\x81\0\0\0\0\xff",  # not UTF-8
    b"\x81\xff\0\0\0\1\0\0\0\0\0\0\0\0",  # a message of 4 GiB
    b"\x88\x81\0\0\0\0\x03",  # half a close code
)


class Manners(Struct, frozen=True, kw_only=True):
    """How a client behaves. The default asks one prompt, reads its answer, and closes."""

    objects: bool = False
    """Whether it wants objects; else tokens as text."""
    prompts: int = 1
    """How many prompts it has."""
    bad: bool = False
    """Whether some of them cannot be served."""
    at_once: bool = False
    """Whether it sends all of them at once; else each when the one before is answered."""
    piece_bytes: int = 0
    """It cuts each message into frames of so many bytes; 0 for not at all."""
    pings: int = 0
    """How many pings it sends with each prompt, between the pieces too."""
    cancels_after: int | None = None
    """After so many messages have come it says that the answer is to be stopped."""
    offends_after: int | None = None
    """After so many messages have come it sends what no client may."""
    leaves: str = ""
    """How it leaves: frame, close, reset, half-close, or stall, which is to read no more; empty for not at all."""
    after_messages: int | None = None
    """After so many messages have come it leaves."""
    after_ns: int | None = None
    """After so long it leaves."""
    pause_ns: int = 0
    """Once it has heard something it reads nothing for so long."""
    mute: bool = False
    """Whether it answers no ping and no close."""

    @property
    def faithful(self) -> bool:
        """Whether it stays to the end, reads all the time and keeps to the protocol."""
        return not (self.leaves or self.pause_ns or self.mute or self.offends_after is not None)


def draw_manners(random: Random) -> Manners:
    """Draw how a client behaves: every second one is good."""
    objects, at_once = random.random() < 0.6, random.random() < 0.4
    prompts = random.choice((1, 2, 3, 12)) if at_once else random.choice((1, 2, 4))
    good = Manners(
        objects=objects,
        prompts=prompts,
        bad=random.random() < 0.2,
        at_once=at_once,
        piece_bytes=random.choice((0, 0, 1, 7)),
        pings=random.choice((0, 0, 1, 40)),
        cancels_after=random.randrange(8) if random.random() < 0.3 else None,
    )
    lot, after = random.random(), random.randrange(12)
    if lot < 0.5:
        return good
    if lot < 0.6:
        return msgspec.structs.replace(good, pause_ns=random.choice((20, 300, 2500, 9000)) * _MILLISECOND)
    if lot < 0.67:
        return msgspec.structs.replace(good, offends_after=after)
    if lot < 0.72:
        return msgspec.structs.replace(good, mute=True)
    leaves = random.choice(("frame", "close", "reset", "half-close", "stall"))
    if lot < 0.86:
        return msgspec.structs.replace(good, leaves=leaves, after_messages=after)
    return msgspec.structs.replace(good, leaves=leaves, after_ns=random.randrange(1500) * _MILLISECOND)


class WebSocketClient:
    """One connection's client.

    Args:
        endpoint: its end of the link.
        clock: the time.
        random: where prompts and masks are drawn from.
        manners: how it behaves.
        note: takes what happens, for the story.

    Attributes:
        manners: how it behaves.
        answers: the messages of each answer so far, its `[DONE]` included.
        asked: how many prompts were sent.
        cancels: how many times it has said that an answer is to be stopped.
        refused: the status of a handshake that opened nothing; 0 for none.
        closed: the close that came, if any.
        lost: whether the connection broke.
        error: what the server did that RFC 6455 forbids, if anything.
        done: nothing more will be asked or read.
        ended_at: when that was.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        clock: VirtualClock,
        random: Random,
        manners: Manners,
        note: Callable[[str, object], None],
    ) -> None:
        self.manners = manners
        self.answers: list[list[str]] = []
        self.asked = 0
        self.cancels = 0
        self.refused = 0
        self.closed: Closed | None = None
        self.lost = False
        self.error: str | None = None
        self.done = False
        self.ended_at = 0
        self._endpoint = endpoint
        self._clock = clock
        self._random = random
        self._note = note
        offered = SUBPROTOCOLS if manners.objects else ()
        self._handshake = ClientHandshake("localhost", "/ws/chat", nonce=random.randbytes(16), subprotocols=offered)
        self._websocket: WebSocketConnection | None = None
        self._outbox = Outbox(endpoint, self._all_sent, self._lose)
        self._messages = 0
        self._left = False
        self._paused = False
        self._offended = False

    def start(self) -> None:
        """Ask for the WebSocket."""
        self._endpoint.set_reader(self._read)
        if self.manners.after_ns is not None:
            self._clock.call_at(self._clock.now() + self.manners.after_ns, self._leave)
        self._send(b"".join(self._handshake.data_to_send()))

    def give_up(self) -> None:
        """Wait no longer."""
        if not self.done:
            self._note("gives up", self._messages)
            self._finish()

    # -- saying ------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Send the next prompt, or all; close after the last answer."""
        manners = self.manners
        if self.asked == manners.prompts and len(self._whole()) == manners.prompts:
            self._close()
        while self.asked < manners.prompts and (manners.at_once or self.asked == len(self._whole())):
            self.asked += 1
            self._say(self._draw_prompt())
            if self.done:
                return

    def _whole(self) -> list[list[str]]:
        return [answer for answer in self.answers if answer[-1] == _DONE]

    def _draw_prompt(self) -> str:
        random = self._random
        if self.manners.bad and random.random() < 0.5:
            return random.choice(_BAD)
        fields: dict[str, object] = {"prompt": "Say what is drawn."}
        if random.random() < 0.3:
            fields["max_tokens"] = random.choice((1, 2, 5, 20))
        return msgspec.json.encode(fields).decode()

    def _say(self, text: str) -> None:
        payload = text.encode()
        size = self.manners.piece_bytes or len(payload)
        pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
        out = bytearray()
        for number, piece in enumerate(pieces):
            final = _FIN if number == len(pieces) - 1 else 0
            out += self._frame(final | (_CONTINUATION if number else _TEXT), piece)
            if number < self.manners.pings:
                out += self._frame(_FIN | _PING, b"%d" % number)
        for number in range(len(pieces), self.manners.pings):
            out += self._frame(_FIN | _PING, b"%d" % number)
        self._send(bytes(out))

    def _frame(self, first: int, payload: bytes) -> bytes:
        mask = self._random.randbytes(4)
        masked = bytes(byte ^ mask[at & 3] for at, byte in enumerate(payload))
        size = len(payload)
        length = bytes([0x80 | size]) if size < _SHORT else bytes([0x80 | _SHORT, *size.to_bytes(2, "big")])
        return b"%c%b%b%b" % (first, length, mask, masked)

    def _close(self) -> None:
        websocket = self._websocket
        if websocket is not None and websocket.state is State.OPEN:
            self._send(websocket.send_close(CloseCode.NORMAL))

    def _leave(self) -> None:
        if self.done or self._left:
            return
        self._left = True
        how = self.manners.leaves
        self._note("leaves", how)
        if how == "stall":
            self._endpoint.set_reader(None)
        elif how == "frame":
            self._close()
        elif how == "half-close":
            self._shut_down_when_sent()
        else:
            self._over()
            (self._endpoint.reset if how == "reset" else self._endpoint.close)()

    def _send(self, data: bytes) -> None:
        if not self.done:
            self._outbox.send(data)

    def _all_sent(self) -> None:
        if self._left and self.manners.leaves == "half-close":
            self._shut_down_when_sent()

    def _shut_down_when_sent(self) -> None:
        try:
            if not self._outbox.waiting:
                self._endpoint.shutdown()
        except OSError:
            self._lose()

    # -- hearing -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data = self._endpoint.recv(65536)
        except OSError:
            self._lose()
            return
        self._note("reads", data)
        if not data:
            self._end()
        elif self.closed is not None:
            self.error = f"{data!r} after the close frame"
            self._finish()
        elif self._websocket is None:
            self._shake_hands(data)
        else:
            self._hear(self._websocket, data)

    def _shake_hands(self, data: bytes) -> None:
        try:
            accepted = self._handshake.receive_data(data)
        except UpgradeRefused as refused:
            self.refused = refused.status
            self._finish()
            return
        except RemoteProtocolError as error:
            self.error = str(error)
            self._finish()
            return
        if accepted is not None:
            mask = self._random.randbytes
            self._websocket = WebSocketConnection(Role.CLIENT, mask=lambda: mask(4))
            self._ask()
            self._hear(self._websocket, self._handshake.trailing_data)

    def _hear(self, websocket: WebSocketConnection, data: bytes) -> None:
        for event in websocket.receive_data(data):
            match event:
                case TextMessage():
                    self._on_message(event.text)
                case Ping():
                    pass  # its pong is fetched below
                case Closed():
                    self.closed = event
                    self.error = event.reason if event.fault else None
                case _:
                    self.error = self.error if type(event).__name__ == "Pong" else f"{event!r} from a server"
        if not self.manners.mute:
            self._send(b"".join(websocket.data_to_send()))

    def _on_message(self, text: str) -> None:
        if not self.answers or self.answers[-1][-1] == _DONE:
            self.answers.append([])
        self.answers[-1].append(text)
        self._messages += 1
        self._obey_manners()
        if text == _DONE and not self.done:
            self._ask()

    def _obey_manners(self) -> None:
        manners = self.manners
        if manners.cancels_after is not None and self._messages > manners.cancels_after and not self.cancels:
            self.cancels += 1
            if manners.objects:
                self._say(_CANCEL)
        if manners.offends_after is not None and self._messages > manners.offends_after and not self._offended:
            self._offended = True
            self._send(self._random.choice(_OFFENCES))
        if manners.after_messages is not None and self._messages > manners.after_messages:
            self._leave()
        if manners.pause_ns and not self._paused and not self.done:
            self._paused = True
            self._endpoint.set_reader(None)
            self._clock.call_at(self._clock.now() + manners.pause_ns, self._go_on)

    def _go_on(self) -> None:
        if not self.done and not (self._left and self.manners.leaves == "stall"):
            self._endpoint.set_reader(self._read)

    def _end(self) -> None:
        """The server has ended the transport."""
        if self.closed is None:
            self._lose()
        else:
            self._finish()

    def _lose(self) -> None:
        self.lost = self.lost or not self.done
        self._finish()

    def _finish(self) -> None:
        if not self.done:
            self._note("done", (len(self.answers), self.closed))
            self._over()
            self._endpoint.close()

    def _over(self) -> None:
        self.done = True
        self.ended_at = self._clock.now()


# ------------------------------------------------------------------------------------------------- what was to be heard


def look_at_answers(
    client: WebSocketClient, who: str, records: Sequence[Record], ledger: Ledger, complain: Callable[[str], None]
) -> None:
    """Compare what a client has heard with what the backend said.

    Args:
        client: the client.
        who: its name.
        records: those of its prompts, in order.
        ledger: what the backend said.
        complain: takes a sentence about each thing that should not be.
    """
    if client.error is not None:
        complain(f"{who}: {client.error}")
    if len(client.answers) > len(records):
        complain(f"{who} has {len(client.answers)} answers, and {len(records)} records were made")
    if len(records) > client.asked:
        complain(f"{who} sent {client.asked} prompts, and {len(records)} records were made")
    judge = Judge(ledger, complain)
    for number, (answer, record) in enumerate(zip(client.answers, records, strict=False)):
        if not client.manners.objects:
            _look_at_text(answer, record, f"{who}, answer {number}", ledger, complain)
        elif record.stream_id is None:
            _look_at_refusal(answer, f"{who}, answer {number}", bad=client.manners.bad, complain=complain)
        else:
            _look_at_objects(answer, record, f"{who}, answer {number}", judge, complain)


def look_for_end(
    client: WebSocketClient,
    who: str,
    records: Sequence[Record],
    *,
    slow: bool,
    draining: bool,
    complain: Callable[[str], None],
) -> None:
    """Look whether a client that was good, on a link that holds, was told why where it was not answered.

    Args:
        client: the client.
        who: its name.
        records: those of its prompts, in order.
        slow: whether the server gave it up as too slow.
        draining: whether the server went down before the client had its last word.
        complain: takes a sentence where it was not.
    """
    if len([answer for answer in client.answers if answer[-1] == _DONE]) == client.manners.prompts or slow:
        return
    failed = not client.manners.objects and any(record.end in {"failed", "refused", "truncated"} for record in records)
    code = client.closed.code if client.closed else None
    if (
        (draining and (code == CloseCode.GOING_AWAY or client.refused or client.lost))
        or (failed and code == CloseCode.INTERNAL_ERROR)
        or (client.manners.at_once and code == CloseCode.TRY_AGAIN_LATER)
    ):
        return
    complain(f"{who} stayed, was not answered to the end, and was told {client.closed!r}")


def _look_at_text(
    answer: Sequence[str], record: Record, who: str, ledger: Ledger, complain: Callable[[str], None]
) -> None:
    complete = answer[-1] == _DONE
    heard = "".join(answer[:-1] if complete else answer)
    account = ledger.accounts.get(record.stream_id or "")
    telling = tell(account, ledger.honours) if account else None
    said = "".join(text for key, text in telling.told.items() if key[:2] == ("text", 0)) if telling else ""
    if complete and (telling is None or telling.broken or not isinstance(telling.terminal, StreamEnd)):
        complain(f"{who}: a clean end where the backend had none")
    if heard != said if complete else not said.startswith(heard):
        complain(f"{who}: heard {heard!r}, but said was {said!r}")


def _look_at_refusal(answer: Sequence[str], who: str, *, bad: bool, complain: Callable[[str], None]) -> None:
    code = _error_code(answer)
    if code is None or len(answer) > 2 or (code not in _REFUSALS and not bad):
        complain(f"{who}: {answer!r} for a prompt that was refused")


def _look_at_objects(
    answer: Sequence[str], record: Record, who: str, judge: Judge, complain: Callable[[str], None]
) -> None:
    complete = answer[-1] == _DONE
    heard = Answer(_GENERATES)
    heard.status = 200
    heard.headers["x-request-id"] = record.stream_id or ""
    stopped = complete and _error_code(answer) == "cancelled" and record.end == "cancelled"
    told = answer[:-2] if stopped else answer
    # An answer on an open WebSocket is like one whose head has left with a heartbeat: it cannot fail by a status.
    heard.body += _OPEN_ALREADY + b"".join(b"data: %b\n\n" % message.encode() for message in told)
    heard.complete = complete and not stopped
    if not all(message.isascii() for message in answer):
        complain(f"{who}: an object that is not ASCII")
    judge.look(heard, who, sound=True)


class _Error(Struct):
    code: str | None = None


class _Object(Struct):
    error: _Error | None = None


_decode_object: Final = msgspec.json.Decoder(_Object).decode


def _error_code(answer: Sequence[str]) -> str | None:
    """The code of the error that an answer ends with, if it does."""
    if len(answer) < 2 or answer[-1] != _DONE:
        return None
    try:
        error = _decode_object(answer[-2]).error
    except msgspec.DecodeError:
        return None
    return error.code if error else None
