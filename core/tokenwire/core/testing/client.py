"""A simulated client: asks what is drawn, reads with h11, and leaves when it is drawn to.

h11 is not what the server's writer is made of, so that the two can disagree; bodies are decoded by the dialects' own
decoders, which are tested apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

import h11
import msgspec
from msgspec import Struct
from msgspec.structs import replace

from tokenwire.core.dialects.openai_chat import DIALECT as CHAT
from tokenwire.core.dialects.plain import DIALECT as PLAIN
from tokenwire.core.errors import MalformedData
from tokenwire.core.events import (
    TERMINALS,
    ChoiceEnd,
    Event,
    ReasoningDelta,
    RefusalDelta,
    Terminal,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    UsageReport,
)

from .clock import VirtualClock
from .ledger import Told
from .network import Endpoint, Outbox

__all__ = ["Answer", "Asked", "Heard", "Habits", "SimulatedClient", "draw_habits", "draw_requests", "hear"]  # noqa: RUF022

_MILLISECOND: Final = 1_000_000

_DRIP_NS: Final = 700 * _MILLISECOND
"""Between two bytes of a client that drips: it is well within every deadline that a byte could move."""


class Asked(Struct, frozen=True, kw_only=True):
    """One request."""

    data: bytes
    """Its bytes; a part of them where it is cut."""
    method: str
    """Its method, as h11 has to know it."""
    statuses: frozenset[int]
    """Statuses that it may be answered with, those of backend, queue and drain apart."""
    dialect: str = ""
    """plain or chat where it generates, else empty."""
    stream: bool = False
    """Whether a stream is asked for."""
    include_usage: bool = False
    """Whether a stream has to end with token counts."""
    cut: str = ""
    """Where the request is not whole: ends, for the client says so, stalls, or drips, which is to go on with a byte now
    and then; empty where it is whole."""
    last: bool = False
    """Whether the connection must end with the answer."""


class Answer:
    """What came back for one request.

    Attributes:
        asked: the request.
        status: its status, 0 before a head came.
        headers: the head's, by name.
        body: what came of the body.
        complete: whether the message ended as HTTP says.
    """

    __slots__ = ("asked", "body", "complete", "headers", "status")

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False


class Heard(Struct):
    """What a body says."""

    told: Told
    """What was accumulated."""
    ends: dict[int, ChoiceEnd]
    """How each choice ended."""
    usage: UsageReport | None
    """The last token counts."""
    terminal: Terminal
    """How it ended, in the decoder's words."""


def hear(answer: Answer) -> Heard:
    """Decode the body of an answer to a request that generates.

    Raises:
        MalformedData: it is not what its dialect says.
    """
    body = bytes(answer.body)
    dialect = PLAIN if answer.asked.dialect == "plain" else CHAT
    if not answer.asked.stream:
        return _fold(dialect.decode_result(body))
    decoder = dialect.decoder()
    return _fold([*decoder.receive_data(body), *decoder.receive_eof()])


def _fold(events: Sequence[Event]) -> Heard:
    told: Told = {}
    ends: dict[int, ChoiceEnd] = {}
    usage: UsageReport | None = None
    for event in events:
        match event:
            case TextDelta():
                _add(told, "text", event.choice, event.text)
                _add(told, "logprobs", event.choice, "".join(f"{token.token}\0" for token in event.logprobs or ()))
            case ReasoningDelta():
                _add(told, "reasoning", event.choice, event.text)
            case RefusalDelta():
                _add(told, "refusal", event.choice, event.text)
            case ToolCallStart():
                _add(told, "call", event.choice, f"{event.call_id}\0{event.name}\0", event.call_index)
            case ToolCallDelta():
                _add(told, "call", event.choice, event.arguments, event.call_index)
            case ChoiceEnd():
                ends[event.choice] = event
            case UsageReport():
                usage = event
            case _:
                pass
    ending = [event for event in events if isinstance(event, TERMINALS)]
    if len(ending) != 1 or events[-1] is not ending[0]:
        raise MalformedData(f"{len(ending)} terminal events")
    return Heard(told, ends, usage, ending[0])


def _add(told: Told, kind: str, choice: int, text: str, call: int = 0) -> None:
    if text:
        told[kind, choice, call] = told.get((kind, choice, call), "") + text


# ------------------------------------------------------------------------------------------------- drawn requests

_HOST: Final = b"host: localhost\r\n"
_OK: Final = frozenset({200})
_STOPS: Final = ("END", "E", "stop", "</s>", "ND", "日本", "\n", "x" * 41)


def draw_requests(
    random: Random, count: int, *, model: str, honours: frozenset[str], max_body_bytes: int
) -> list[Asked]:
    """Draw what a client asks on one connection, one after the other.

    Args:
        random: where it is drawn from.
        count: how many.
        model: a model that exists.
        honours: fields of GenerationRequest that the backend acts on; others are asked for only where the core does.
        max_body_bytes: the server's limit, which some requests go past.
    """
    drawn: list[Asked] = []
    for _ in range(count):
        lot = random.random()
        if lot < 0.75:
            asked = _draw_generation(random, model, honours)
            drawn.append(_in_old_http(asked) if random.random() < 0.06 else asked)
        elif lot < 0.945:
            drawn.append(random.choice(_SIMPLE))
        elif lot < 0.97:
            drawn.append(random.choice(_ODD))
        else:
            drawn.append(_too_large(max_body_bytes))
        if drawn[-1].last:
            break
    if drawn[-1].dialect and random.random() < 0.06:
        drawn[-1] = _cut_in_half(random, drawn[-1])
    return drawn


def _cut_in_half(random: Random, asked: Asked) -> Asked:
    cut = random.choice(("ends", "stalls", "drips"))
    if cut == "drips":
        data = b"POST /chat HTTP/1.1\r\n%b%bcontent-length: 1999\r\n\r\n" % (_HOST, _JSON)
        return Asked(data=data, method="POST", statuses=frozenset({400, 408}), cut=cut, last=True)
    data = asked.data[: random.randrange(1, len(asked.data))]
    return Asked(data=data, method=asked.method, statuses=frozenset({400, 408}), cut=cut, last=True)


def _draw_generation(random: Random, model: str, honours: frozenset[str]) -> Asked:
    dialect = random.choice(("plain", "chat"))
    stream = random.random() < 0.8
    fields: dict[str, object] = {"stream": stream}
    if random.random() < 0.3:
        fields["max_tokens"] = random.choice((1, 2, 5, 20))
    if random.random() < 0.3:
        fields["stop"] = random.sample(_STOPS, random.choice((1, 1, 2, 3)))
    if dialect == "plain":
        return _plain(random, fields, stream=stream)
    fields |= {"model": model, "messages": [{"role": "user", "content": "Say what is drawn."}]}
    if "n" in honours and random.random() < 0.4:
        fields["n"] = random.choice((1, 2, 3))
    if "logprobs" in honours and random.random() < 0.2:
        fields["logprobs"] = True
    usage = stream and random.random() < 0.5
    if usage:
        fields["stream_options"] = {"include_usage": True}
    data = _post(random, b"/v1/chat/completions", fields)
    return Asked(data=data, method="POST", statuses=_OK, dialect="chat", stream=stream, include_usage=usage)


def _in_old_http(asked: Asked) -> Asked:
    """Ask in HTTP/1.0, whose answers end with the connection; it has no chunks and no 100 Continue."""
    if b"transfer-encoding" in asked.data or b"expect" in asked.data:
        return asked
    return replace(asked, data=asked.data.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1), last=True)


def _plain(random: Random, fields: dict[str, object], *, stream: bool) -> Asked:
    if random.random() < 0.25:
        query = b"prompt=Say%20it" + (b"" if stream else b"&stream=false")
        data = b"GET /chat?%b HTTP/1.1\r\n%b\r\n" % (query, _HOST)
        return Asked(data=data, method="GET", statuses=_OK, dialect="plain", stream=stream, include_usage=True)
    data = _post(random, b"/chat", fields | {"prompt": "Say what is drawn."})
    return Asked(data=data, method="POST", statuses=_OK, dialect="plain", stream=stream, include_usage=True)


def _post(random: Random, path: bytes, fields: dict[str, object]) -> bytes:
    body = msgspec.json.encode(fields)
    head = b"POST %b HTTP/1.1\r\n%bcontent-type: application/json\r\n" % (path, _HOST)
    lot = random.random()
    if lot < 0.15:
        half = random.randrange(1, len(body))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]))
        return head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    expect = b"expect: 100-continue\r\n" if lot < 0.2 else b""
    return head + expect + b"content-length: %d\r\n\r\n" % len(body) + body


def _simple(line: bytes, *statuses: int, body: bytes = b"", headers: bytes = b"", last: bool = False) -> Asked:
    length = b"content-length: %d\r\n" % len(body) if body else b""
    data = b"%b HTTP/1.1\r\n%b%b%b\r\n%b" % (line, _HOST, headers, length, body)
    return Asked(data=data, method=line.split()[0].decode(), statuses=frozenset(statuses), last=last)


def _raw(data: bytes, *statuses: int) -> Asked:
    return Asked(data=data, method="GET", statuses=frozenset(statuses), last=True)


_JSON: Final = b"content-type: application/json\r\n"
_SIMPLE: Final = (
    *(_simple(b"GET /healthz", 200),) * 6,
    _simple(b"HEAD /healthz", 200),
    _simple(b"GET /readyz", 200),
    _simple(b"GET /v1/models", 200),
    _simple(b"GET /v1/models/nobody", 404),
    _simple(b"GET /nowhere", 404),
    _simple(b"DELETE /chat", 405),
    _simple(b"OPTIONS /chat", 204),
    _simple(b"POST /chat", 400, headers=_JSON, body=b"{"),
    _simple(b"POST /chat", 400, headers=_JSON, body=b'{"prompt": 5}'),
    _simple(b"POST /chat", 404, headers=_JSON, body=b'{"prompt": "", "model": "nobody"}'),
    _simple(b"POST /v1/chat/completions", 400, headers=_JSON, body=b"[]"),
    _simple(b"POST /chat", 415, headers=b"content-type: text/plain\r\n", body=b"hello"),
    _simple(b"GET /chat?prompt=x", 204, headers=b"last-event-id: a.1\r\n"),
    _simple(b"GET /chat?prompt=x", 403, headers=b"origin: http://evil.example\r\n"),
    _simple(b"GET /healthz", 200, headers=b"connection: close\r\n", last=True),
    _raw(b"GET /healthz HTTP/1.0\r\nhost: localhost\r\n\r\n", 200),
    _raw(b"GET /healthz HTTP/2.0\r\n\r\n", 505),
    _raw(b"\x16\x03\x01\x02\x00", 400),
    _raw(b"GET /healthz HTTP/1.1\nhost: localhost\n\n", 400),
    _raw(b"GET /healthz HTTP/1.1\r\n\r\n", 400),
)


_TE: Final = b"POST /chat HTTP/1.1\r\n%b%btransfer-encoding: chunked\r\n" % (_HOST, _JSON)
_HIDDEN: Final = b"GET /chat?prompt=hidden HTTP/1.1\r\n%b\r\n" % _HOST
_ODD: Final = (
    _raw(_TE + b"content-length: 4\r\n\r\n0\r\n\r\n" + _HIDDEN, 400),
    _raw(_TE + b"transfer-encoding: identity\r\n\r\n0\r\n\r\n" + _HIDDEN, 501),
    _raw(_TE.replace(b"1.1", b"1.0") + b"\r\n0\r\n\r\n" + _HIDDEN, 400),
    _raw(_TE + b"\r\n0;\n" + _HIDDEN, 400),
    _raw(_TE + b"\r\n+2\r\n{}\r\n0\r\n\r\n" + _HIDDEN, 400),
    _raw(_TE + b"\r\n2\r\n{}\r\n0\r\nhost: evil.example\r\n\r\n" + _HIDDEN, 400),
    _raw(b"GET /healthz HTTP/1.1\r\n%bcontent-length: 0\r\ncontent-length: 5\r\n\r\n" % _HOST + _HIDDEN, 400),
    _raw(b"GET /healthz HTTP/1.1\r\n%bx: y\r\n z\r\n\r\n" % _HOST, 400),
    _raw(b"GET /healthz HTTP/1.1\r\n%bx: y\rz\r\n\r\n" % _HOST, 400),
    _raw(b"GET /healthz HTTP/1.1\r\n%b%b\r\n" % (_HOST, _HOST), 400),
    _raw(b"GET /healthz HTTP/1.1\r\nhost : localhost\r\n\r\n", 400),
    _raw(b"GET http://evil.example/healthz HTTP/1.1\r\n%b\r\n" % _HOST, 400),
    _simple(b"GET /healthz", 417, headers=b"expect: x\r\n"),
    _simple(b"GET http://localhost/healthz", 200),
    _simple(b"OPTIONS *", 404),
    _simple(b"get /healthz", 405),
)
"""What only trouble-makers send. What is hidden behind some of it must never be answered."""


def _too_large(max_body_bytes: int) -> Asked:
    return _simple(b"POST /chat", 413, headers=_JSON, body=b" " * (max_body_bytes + 1), last=True)


# --------------------------------------------------------------------------------------------------------- habits


class Habits(Struct, frozen=True, kw_only=True):
    """How a client behaves besides what it asks. The default is one that stays and reads."""

    pipelines: bool = False
    """Whether it sends all requests at once."""
    leaves: str = ""
    """How it leaves: close, reset, half-close, or stalls, which is to read no more; empty for not at all."""
    after_bytes: int | None = None
    """After so many bytes have come it leaves."""
    after_ns: int | None = None
    """After so long it leaves."""
    at_done: bool = False
    """It leaves with the first [DONE]."""
    pause_after: int | None = None
    """After so many bytes have come it reads nothing for a while."""
    pause_ns: int = 0
    """How long that while is."""
    read_bytes: int = 65536
    """How much it reads at a time."""
    dawdle_ns: int = 0
    """How long it waits in the middle of sending a request."""
    floods: int = 0
    """How many bytes of further requests it sends behind the first, whether they are answered or not."""

    @property
    def faithful(self) -> bool:
        """Whether it stays to the end and reads all the time."""
        return not (self.leaves or self.pause_after is not None or self.floods)


_LEAVING: Final = ("close", "close", "reset", "half-close", "stall")


def draw_habits(random: Random) -> Habits:
    """Draw how a client behaves: every second one stays and reads."""
    lot = random.random()
    pipelines = random.random() < 0.3
    if lot < 0.4:
        return Habits(pipelines=pipelines)
    if lot < 0.5:
        return Habits(dawdle_ns=random.choice((5, 200, 800)) * _MILLISECOND)
    if lot < 0.6:
        return Habits(pipelines=pipelines, pause_after=random.randrange(3000), pause_ns=_draw_pause(random))
    if lot < 0.64:
        pause = random.choice((None, 0, 300))
        return Habits(floods=random.choice((9000, 20000, 60000)), pause_after=pause, pause_ns=_draw_pause(random))
    leaves = random.choice(_LEAVING)
    if lot < 0.72:
        return Habits(pipelines=pipelines, leaves=leaves, at_done=True)
    if lot < 0.85:
        return Habits(pipelines=pipelines, leaves=leaves, after_ns=random.randrange(1500) * _MILLISECOND)
    return Habits(pipelines=pipelines, leaves=leaves, after_bytes=random.randrange(4000))


def _draw_pause(random: Random) -> int:
    return random.choice((20, 300, 2500, 9000)) * _MILLISECOND


class SimulatedClient:
    """One connection's client.

    Args:
        endpoint: its end of the link.
        clock: the time.
        requests: what it asks.
        habits: how it behaves.
        note: takes what happens, for the story.

    Attributes:
        answers: what came back, an answer for each request that was sent as long as answers came.
        habits: how it behaves.
        left: whether it went by itself before everything was answered.
        lost: whether the connection broke.
        error: h11's objection to what the server sent, if any.
        done: nothing more will be asked or read.
        ended_at: when that was.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        clock: VirtualClock,
        requests: Sequence[Asked],
        habits: Habits,
        note: Callable[[str, object], None],
    ) -> None:
        self.habits = habits
        self.answers: list[Answer] = []
        self.left = False
        self.lost = False
        self.error: str | None = None
        self.done = False
        self.ended_at = 0
        self._endpoint = endpoint
        self._clock = clock
        self._note = note
        self._waiting = deque(requests)
        self._flood = 0 if requests[-1].last else habits.floods // len(_SIMPLE[0].data)
        self._outbox = Outbox(endpoint, self._all_sent, self._lose)
        self._late = b""
        self._parser = h11.Connection(h11.CLIENT)
        self._received = 0
        self._paused = False
        self._tail = b""

    def start(self) -> None:
        """Ask the first question, or all."""
        self._endpoint.set_reader(self._read)
        if self.habits.after_ns is not None:
            self._clock.call_at(self._clock.now() + self.habits.after_ns, self._leave)
        if self.habits.pipelines or self.habits.floods:
            self._outbox.send(b"".join(asked.data for asked in self._waiting))
        if self.habits.floods:
            self._outbox.send(_SIMPLE[0].data * self._flood)
        self._ask_next()

    def _ask_next(self) -> None:
        """Get ready for the next answer, and ask for it where that has not been done."""
        asked = self._waiting.popleft() if self._waiting else None
        if asked is None and self._flood:
            self._flood -= 1
            asked = _SIMPLE[0]
        if asked is None:
            self._finish()
            return
        self.answers.append(Answer(asked))
        self._parser.send(h11.Request(method=asked.method, target="/", headers=[("host", "localhost")]))
        self._parser.send(h11.EndOfMessage())
        if not (self.habits.pipelines or self.habits.floods):
            self._send_in_two(asked.data)
        if asked.cut == "ends":
            self._shut_down_when_sent()
        elif asked.cut == "drips":
            self._clock.call_at(self._clock.now() + _DRIP_NS, self._drip)

    def _drip(self) -> None:
        if not self.done and not self.left:
            self._outbox.send(b" ")
            self._clock.call_at(self._clock.now() + _DRIP_NS, self._drip)

    def _finish(self) -> None:
        self._note("done", len(self.answers))
        self._end()
        self._endpoint.close()

    def _leave(self) -> None:
        if self.done:
            return
        how = self.habits.leaves
        self.left = True
        self._note("leaves", how)
        if how == "stall":
            self._endpoint.set_reader(None)
        elif how == "half-close":
            self._shut_down_when_sent()
        else:
            self._end()
            (self._endpoint.reset if how == "reset" else self._endpoint.close)()

    def _end(self) -> None:
        self.done = True
        self.ended_at = self._clock.now()

    def give_up(self) -> None:
        """Wait no longer."""
        if not self.done:
            self._note("gives up", self._received)
            self._end()
            self._endpoint.close()

    # -- writing -----------------------------------------------------------------------------------------------------

    def _send_in_two(self, data: bytes) -> None:
        """Send a request, or its head first and the rest after a while."""
        if not self.habits.dawdle_ns:
            self._outbox.send(data)
            return
        head, separator, rest = data.partition(b"\r\n\r\n")
        self._late = rest
        self._outbox.send(head + separator)
        self._clock.call_at(self._clock.now() + self.habits.dawdle_ns, self._send_late)

    def _send_late(self) -> None:
        rest, self._late = self._late, b""
        if rest and not self.done:
            self._outbox.send(rest)
            if self.answers[-1].asked.cut == "ends":
                self._shut_down_when_sent()

    def _shut_down_when_sent(self) -> None:
        try:
            if not self._outbox.waiting and not self._late:
                self._endpoint.shutdown()
        except OSError:
            self._lose()

    def _all_sent(self) -> None:
        if (self.left and self.habits.leaves == "half-close") or (
            self.answers and self.answers[-1].asked.cut == "ends"
        ):
            self._shut_down_when_sent()

    def _lose(self) -> None:
        if not self.done:
            self._note("loses", self._received)
            self.lost = True
            self._end()
            self._endpoint.close()

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data = self._endpoint.recv(self.habits.read_bytes)
        except OSError:
            self._lose()
            return
        self._note("reads", data)
        self._received += len(data)
        try:
            self._parser.receive_data(data)
            self._parse()
        except h11.RemoteProtocolError as error:
            # An end of input where the message is not whole is a cut, and no fault of what came before it.
            self.error = None if not data else str(error)
            self._lose()
            return
        if not self.done:
            self._obey_habits(data)

    def _parse(self) -> None:
        while not self.done:
            event = self._parser.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            answer = self.answers[-1]
            if isinstance(event, h11.Response):
                answer.status = event.status_code
                answer.headers = {bytes(name).decode(): bytes(value).decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                answer.body += event.data
            elif isinstance(event, h11.EndOfMessage):
                answer.complete = True
                self._next_cycle()
            elif isinstance(event, h11.ConnectionClosed):
                self._lose()

    def _next_cycle(self) -> None:
        if self._parser.our_state is h11.DONE and self._parser.their_state is h11.DONE:
            self._parser.start_next_cycle()
            self._ask_next()
        else:
            self._finish()

    def _obey_habits(self, data: bytes) -> None:
        habits, received = self.habits, self._received
        if habits.after_bytes is not None and received >= habits.after_bytes and not self.left:
            self._leave()
        elif habits.at_done and not self.left:
            if b"[DONE]\n\n" in self._tail + data:
                self._leave()
            self._tail = data[-8:]
        if habits.pause_after is not None and received >= habits.pause_after and not self._paused:
            self._paused = True
            self._note("pauses", habits.pause_ns)
            self._endpoint.set_reader(None)
            self._clock.call_at(self._clock.now() + habits.pause_ns, self._go_on)

    def _go_on(self) -> None:
        if not self.done:
            self._endpoint.set_reader(self._read)
