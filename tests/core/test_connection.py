"""One peer on HTTP/1.1: what a connection does step by step, and a machine that does anything in any order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.carriers import SECOND, Answer, Asked, Carriage, HttpClient, read_answers, request_bytes
from tests.strategies import splits

from tokenwire.core.actions import Abort, Cancel, Close, Pause, Record, Resume, Start, Wait
from tokenwire.core.connection import ConnectionOptions, Phase
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.events import ErrorKind, StreamEnd, StreamError
from tokenwire.core.http import MAX_PIPELINED_BYTES
from tokenwire.core.service import ServiceOptions

OPTIONS = ConnectionOptions(
    head_ns=10 * SECOND, body_ns=20 * SECOND, idle_ns=30 * SECOND, linger_ns=2 * SECOND, stall_ns=40 * SECOND
)
JSON = ("content-type", "application/json")


def chat(prompt: str = "hi", *headers: tuple[str, str]) -> bytes:
    return request_bytes(Asked("POST", "/chat", (JSON, *headers), b'{"prompt":"%b"}' % prompt.encode()))


def get(path: str, *headers: tuple[str, str]) -> bytes:
    return request_bytes(Asked("GET", path, headers))


class Wired:
    """A house with one connection, and a backend that says what the test lets it say."""

    def __init__(self, service: ServiceOptions | None = None, options: ConnectionOptions = OPTIONS) -> None:
        self.house = Carriage("http").house(options=service)
        self.house.source.script = None
        self.client = HttpClient(self.house, options)
        self.peer = self.client.peer
        self.house._clients.append(self.client)

    def phase(self) -> Phase:
        return self.peer.connection.phase

    @property
    def kinds(self) -> list[type]:
        return [type(action) for action in self.peer.actions]

    @property
    def ends(self) -> list[tuple[int, str]]:
        return [(record.status, record.end) for record in self.house.records]

    def answers(self, *methods: str) -> list[Answer]:
        return read_answers(bytes(self.peer.received), methods or ["GET"] * 20, ended=self.peer.ended)

    def say(self, *items: str | StreamEnd | StreamError, job: int = -1) -> None:
        self.house.say(self.house.source.jobs[job], *items)


@pytest.fixture
def wired() -> Wired:
    return Wired()


# -------------------------------------------------------------------------------------------------------- the usual way


def test_an_answer_and_the_next(wired: Wired) -> None:
    assert wired.phase() is Phase.WAITING
    wired.peer.receive(chat()[:30])
    assert wired.phase() is Phase.WAITING
    wired.peer.receive(chat()[30:-3])
    assert wired.phase() is Phase.RECEIVING
    wired.peer.receive(chat()[-3:])
    assert wired.phase() is Phase.ANSWERING
    assert wired.kinds == [Start]
    assert not wired.peer.writes
    wired.say("a")
    assert len(wired.peer.writes) == 1
    wired.say("b", StreamEnd())
    assert wired.phase() is Phase.WAITING
    assert wired.ends == [(200, "finished")]
    wired.peer.receive(get("/healthz"))
    assert [answer.status for answer in wired.answers()] == [200, 200]
    assert wired.phase() is Phase.WAITING
    assert Close not in wired.kinds


def test_empty_bytes_mean_nothing(wired: Wired) -> None:
    deadline = wired.peer.connection.next_deadline()
    wired.house.now += 1
    assert wired.peer.connection.receive_data(b"", wired.house.now) == []
    assert wired.peer.connection.next_deadline() == deadline
    assert wired.peer.connection.data_to_send() == []


def test_pipelined_requests_are_answered_in_order(wired: Wired) -> None:
    wired.peer.receive(chat("one") + get("/healthz") + chat("two") + get("/nope") + chat("three")[:20])
    assert len(wired.house.source.jobs) == 1
    wired.say("1", StreamEnd())
    assert len(wired.house.source.jobs) == 2
    assert [job.request.prompt for job in wired.house.source.jobs] == ["one", "two"]
    assert [answer.status for answer in wired.answers()] == [200, 200]
    wired.say("2", StreamEnd())
    assert [answer.status for answer in wired.answers()] == [200, 200, 200, 404]
    wired.peer.receive(chat("three")[20:])
    assert wired.house.source.jobs[-1].request.prompt == "three"
    assert b'"token":"1"' in wired.answers()[0].body
    assert b'"token":"2"' in wired.answers()[2].body


def test_requests_that_overflow_the_pipeline_are_not_answered(wired: Wired) -> None:
    wired.peer.receive(chat())
    wired.peer.receive(get("/healthz") * (MAX_PIPELINED_BYTES // len(get("/healthz")) + 1))
    wired.say("a", StreamEnd())
    assert [answer.status for answer in wired.answers()] == [200]
    assert wired.phase() is Phase.CLOSING
    assert len(wired.house.records) == 1


def test_an_overflow_behind_a_slow_answer_ends_the_connection(wired: Wired) -> None:
    wired.peer.room = 0
    wired.peer.receive(get("/healthz"))
    wired.peer.receive(get("/healthz"))
    assert wired.phase() is Phase.WAITING
    wired.peer.receive(b"x" * MAX_PIPELINED_BYTES)
    wired.peer.receive(b"x" + get("/healthz"))
    wired.peer.take()
    assert [answer.status for answer in wired.answers()] == [200, 200]
    assert wired.phase() is Phase.CLOSING
    wired.peer.receive(get("/healthz"))  # what follows dropped bytes may be the middle of a body
    assert len(wired.house.records) == 2


def test_what_the_client_says_about_keeping_alive(wired: Wired) -> None:
    wired.peer.receive(get("/healthz", ("connection", "close")) + get("/healthz"))
    (answer,) = wired.answers()
    assert answer.header("connection") == "close"
    assert wired.kinds == [Record, Close]


def test_http_1_0_ends_with_the_answer(wired: Wired) -> None:
    body = b'{"prompt":"hi"}'
    head = b"POST /chat HTTP/1.0\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    wired.peer.receive(head % len(body) + body)
    wired.say("a")
    wired.say(StreamEnd())
    (answer,) = wired.answers()
    assert answer.header("transfer-encoding") is None
    assert answer.body.startswith(b'data: {"token":"a"}')
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert wired.peer.ended
    assert wired.ends == [(200, "finished")]


def test_100_continue(wired: Wired) -> None:
    request = chat("hi", ("expect", "100-continue"))
    head, _, body = request.partition(b"\r\n\r\n")
    wired.peer.receive(head + b"\r\n\r\n")
    assert wired.peer.writes == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    wired.peer.receive(body)
    wired.say("a", StreamEnd())
    assert [answer.status for answer in wired.answers()] == [200]


def test_100_continue_is_not_said_to_what_is_refused(wired: Wired) -> None:
    wired.peer.receive(b"POST /nope HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
    (answer,) = wired.answers()
    assert answer.status == 404
    assert answer.closed  # whether the body comes or not is not known


@pytest.mark.parametrize(("length", "closes"), [(100, False), (64 * 1024, False), (64 * 1024 + 1, True)])
def test_the_body_of_a_refused_request_is_drained_up_to_a_limit(wired: Wired, length: int, closes: bool) -> None:
    wired.peer.receive(b"POST /nope HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % length)
    assert bool(wired.peer.writes) is closes
    wired.peer.receive(b"x" * length)
    wired.peer.receive(get("/healthz"))
    assert [answer.status for answer in wired.answers()] == ([404] if closes else [404, 200])
    assert wired.peer.ended is closes


# ------------------------------------------------------------------------------------------------------- ends and leaves


@pytest.mark.parametrize("said", [False, True], ids=["before", "after"])
def test_a_half_close_cancels(wired: Wired, said: bool) -> None:
    wired.peer.receive(chat() + get("/healthz"))
    if said:
        wired.say("a")
    wired.peer.end()
    wired.peer.end()
    assert wired.kinds == [Start, Cancel, Record, Abort]
    assert [job.cancels for job in wired.house.source.jobs] == [1]
    assert wired.ends == [(200 if said else 0, "cancelled")]
    assert wired.phase() is Phase.CLOSED
    assert wired.peer.connection.next_deadline() is None
    wired.peer.receive(get("/healthz"))
    wired.say("b", StreamEnd())
    assert len(wired.house.records) == 1


def test_a_close_right_after_the_end_is_a_success(wired: Wired) -> None:
    wired.peer.receive(chat())
    wired.say("a", StreamEnd())
    wired.peer.end()
    assert wired.ends == [(200, "finished")]
    assert wired.kinds == [Start, Record, Close]
    assert [job.cancels for job in wired.house.source.jobs] == [0]


def test_a_reset_cancels(wired: Wired) -> None:
    wired.peer.receive(chat())
    wired.say("a")
    wired.peer.lose()
    assert [job.cancels for job in wired.house.source.jobs] == [1]
    assert wired.ends == [(200, "cancelled")]
    assert wired.peer.connection.lost(wired.house.now) == []


def test_a_reset_in_the_middle_of_a_request_is_not_recorded(wired: Wired) -> None:
    wired.peer.receive(chat()[:-1])
    wired.peer.lose()
    assert wired.house.records == []
    assert wired.phase() is Phase.CLOSED
    assert wired.peer.connection.receive_data(b"}", wired.house.now) == []
    assert wired.peer.connection.next_deadline() is None


def test_an_end_between_requests(wired: Wired) -> None:
    wired.peer.end()
    assert wired.kinds == [Close]
    assert wired.house.records == []
    assert not wired.peer.writes


@pytest.mark.parametrize("size", [1, 30, -1])
def test_an_end_in_the_middle_of_a_request(wired: Wired, size: int) -> None:
    wired.peer.receive(chat()[:size])
    wired.peer.end()
    (answer,) = wired.answers()
    assert answer.status == 400
    assert wired.kinds == [Record, Close]
    assert wired.ends == [(400, "refused")]


@pytest.mark.parametrize("how", ["cut", "broken", "slow"])
def test_a_refused_request_that_breaks_off_is_refused_by_its_head(wired: Wired, how: str) -> None:
    wired.peer.receive(b"POST /nope HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nab")
    if how == "cut":
        wired.peer.end()
    elif how == "slow":
        wired.house.advance(OPTIONS.body_ns)
    else:
        wired = Wired()
        chunked = b"POST /nope HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        wired.peer.receive(chunked + b"zz\r\n")
    (answer,) = wired.answers()
    assert (answer.status, answer.closed) == (404, True)
    (record,) = wired.house.records
    assert (record.method, record.path, record.status) == ("POST", "/nope", 404)


def test_an_error_after_the_head_closes_after_the_last_chunk(wired: Wired) -> None:
    wired.peer.receive(chat() + get("/healthz"))
    wired.say("a")
    wired.say(StreamError(ErrorKind.SERVER, "It broke.", "backend_error"))
    assert bytes(wired.peer.received).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert wired.kinds == [Start, Record, Close]
    assert [answer.status for answer in wired.answers()] == [200]


def test_an_error_before_the_head_keeps_the_connection(wired: Wired) -> None:
    wired.peer.receive(chat() + get("/healthz"))
    wired.say(StreamError(ErrorKind.SERVER, "It broke.", "backend_error"))
    assert [answer.status for answer in wired.answers()] == [500, 200]
    assert Close not in wired.kinds


# ------------------------------------------------------------------------------------------------------------ deadlines


def test_an_idle_connection_is_closed(wired: Wired) -> None:
    wired.house.advance(OPTIONS.idle_ns - 1)
    assert wired.phase() is Phase.WAITING
    wired.house.advance(1)
    assert wired.kinds == [Close]
    assert wired.house.records == []


def test_idle_time_begins_with_the_answer(wired: Wired) -> None:
    wired.house.advance(OPTIONS.idle_ns - 1)
    wired.peer.receive(chat())
    wired.house.advance(100 * OPTIONS.idle_ns)
    wired.say("a", StreamEnd())
    wired.house.advance(OPTIONS.idle_ns - 1)
    assert wired.phase() is Phase.WAITING
    wired.house.advance(1)
    assert wired.phase() is Phase.CLOSING


def test_empty_lines_do_not_keep_a_connection(wired: Wired) -> None:
    for _ in range(10):
        wired.peer.receive(b"\r")
        wired.peer.receive(b"\n")
        wired.house.advance(OPTIONS.idle_ns // 10)
    assert wired.phase() is Phase.CLOSING


def test_a_slow_head_is_refused(wired: Wired) -> None:
    wired.house.advance(OPTIONS.idle_ns - 1)
    for byte in chat()[:10]:  # each byte in time, the whole not
        wired.peer.receive(bytes([byte]))
        wired.house.advance(OPTIONS.head_ns // 10)
    (answer,) = wired.answers()
    assert answer.status == 408
    assert answer.closed
    assert wired.ends == [(408, "refused")]


def test_a_slow_body_is_refused(wired: Wired) -> None:
    request = chat("a" * 100)
    at = request.index(b"\r\n\r\n") + 4
    wired.peer.receive(request[:at])
    for byte in request[at : at + 10]:
        assert wired.phase() is Phase.RECEIVING
        wired.peer.receive(bytes([byte]))
        wired.house.advance(OPTIONS.body_ns // 10)
    (answer,) = wired.answers()
    assert answer.status == 408
    assert answer.json()["error"]["message"] == "The request took too long."
    record = wired.house.records[0]
    assert (record.method, record.path, record.status, record.duration_ns) == ("POST", "/chat", 408, OPTIONS.body_ns)


def test_the_next_head_has_its_own_deadline(wired: Wired) -> None:
    wired.peer.receive(chat() + chat()[:10])
    wired.house.advance(3 * OPTIONS.head_ns)
    wired.say("a", StreamEnd())
    wired.house.advance(OPTIONS.head_ns - 1)
    assert wired.phase() is Phase.WAITING
    wired.house.advance(1)
    assert [answer.status for answer in wired.answers()] == [200, 408]


def test_a_peer_that_does_not_end_is_aborted_after_lingering(wired: Wired) -> None:
    wired.peer.receive(get("/healthz", ("connection", "close")))
    assert wired.phase() is Phase.CLOSING
    wired.house.advance(OPTIONS.linger_ns - 1)
    wired.peer.receive(b"x" * 100_000)
    assert wired.kinds == [Record, Close]
    wired.house.advance(1)
    assert wired.kinds == [Record, Close, Abort]
    assert wired.phase() is Phase.CLOSED


def test_lingering_waits_for_what_is_still_to_be_taken(wired: Wired) -> None:
    wired.peer.room = 10
    wired.peer.receive(get("/healthz", ("connection", "close")))
    assert not wired.peer.ended
    wired.house.advance(OPTIONS.stall_ns - 1)
    wired.peer.take(10)
    wired.house.advance(OPTIONS.stall_ns - 1)  # it has taken something meanwhile
    assert wired.phase() is Phase.CLOSING
    wired.peer.take()
    assert wired.answers()[0].closed
    wired.house.advance(OPTIONS.linger_ns)
    assert wired.phase() is Phase.CLOSED


def test_a_peer_that_takes_nothing_of_the_last_words_is_aborted(wired: Wired) -> None:
    wired.peer.room = 10
    wired.peer.receive(get("/healthz", ("connection", "close")))
    wired.house.advance(OPTIONS.stall_ns)
    assert wired.kinds == [Record, Close, Abort]


def test_a_stalled_reader_is_aborted() -> None:
    wired = Wired(ServiceOptions(delivery=DeliveryOptions(stall_ns=7 * SECOND)))
    wired.peer.receive(chat())
    wired.peer.room = 10
    wired.say("a")
    assert wired.kinds == [Start, Pause]
    wired.house.advance(6 * SECOND)
    wired.peer.take(5)
    wired.house.advance(6 * SECOND)
    assert wired.phase() is Phase.ANSWERING
    wired.house.advance(SECOND)
    assert wired.kinds == [Start, Pause, Cancel, Record, Abort]
    assert wired.ends == [(200, "slow_reader")]
    assert [job.cancels for job in wired.house.source.jobs] == [1]
    assert not wired.answers()


def test_a_reader_that_overflows_its_budget_is_aborted() -> None:
    wired = Wired(ServiceOptions(delivery=DeliveryOptions(budget_bytes=500)))
    wired.peer.receive(chat())
    wired.peer.room = 500
    wired.say("a")
    wired.peer.room = 0
    wired.say("b")
    wired.say("c" * 300)
    assert wired.phase() is Phase.ANSWERING
    wired.say("c" * 300)
    assert wired.phase() is Phase.CLOSED
    assert wired.ends == [(200, "slow_reader")]
    (answer,) = wired.answers()
    assert not answer.whole  # truncation, never a clean end
    assert [job.cancels for job in wired.house.source.jobs] == [1]


def test_a_slow_reader_pauses_and_resumes(wired: Wired) -> None:
    wired.peer.receive(chat())
    wired.peer.room = 10
    wired.say("a")
    wired.say("b")
    wired.say("c")
    wired.peer.take(10)
    assert wired.kinds == [Start, Pause]
    wired.peer.take()
    assert wired.kinds == [Start, Pause, Resume]
    assert wired.house.source.jobs[0].blocked == [True, False]
    assert b'"token":"bc"' in wired.answers()[0].body
    wired.say("d", StreamEnd())
    assert wired.answers()[0].whole


def test_an_end_that_waits_for_a_slow_reader(wired: Wired) -> None:
    wired.peer.receive(chat() + get("/healthz"))
    wired.peer.room = 10
    wired.say("a")
    wired.say("b", StreamEnd())
    assert wired.phase() is Phase.ANSWERING
    assert wired.house.records == []
    wired.peer.take()
    assert [answer.status for answer in wired.answers()] == [200, 200]
    assert wired.ends == [(200, "finished"), (200, "answered")]


def test_requests_wait_for_a_peer_that_does_not_take_its_answers(wired: Wired) -> None:
    wired.peer.room = 0
    for _ in range(5):
        wired.peer.receive(get("/healthz"))
    assert len(wired.house.records) == 2  # one was on its way when the first answer blocked
    wired.peer.take()
    assert [answer.status for answer in wired.answers()] == [200] * 5
    assert wired.phase() is Phase.WAITING


def test_a_request_whose_reader_is_slow_already_starts_paused(wired: Wired) -> None:
    wired.peer.room = 0
    request = chat("hi", ("expect", "100-continue"))
    at = request.index(b"\r\n\r\n") + 4
    wired.peer.receive(request[:at])
    wired.peer.receive(request[at:])
    assert wired.house.source.jobs[0].blocked == [True]
    wired.say("a")
    wired.peer.take()
    assert wired.house.source.jobs[0].blocked == [True, False]
    assert wired.answers()[0].status == 200


def test_heartbeats_come_with_silence() -> None:
    wired = Wired(ServiceOptions(delivery=DeliveryOptions(heartbeat_ns=3 * SECOND)))
    wired.peer.receive(chat())
    wired.house.advance(3 * SECOND)
    wired.house.advance(SECOND)
    wired.say("a")
    wired.house.advance(2 * SECOND)
    assert wired.answers()[0].body.count(b": ka\n") == 1
    wired.house.advance(SECOND)
    wired.say(StreamEnd())
    body = wired.answers()[0].body
    assert body.startswith(b': ka\ndata: {"token":"a"}')
    assert body.count(b": ka\n") == 2
    assert wired.house.records[0].first_token_ns == 4 * SECOND


# ---------------------------------------------------------------------------------------------------------------- drain


def test_draining_closes_an_idle_connection(wired: Wired) -> None:
    wired.house.drain()
    assert wired.kinds == [Close]


def test_draining_lets_the_running_answer_be_the_last(wired: Wired) -> None:
    wired.peer.receive(chat() + get("/healthz"))
    wired.house.drain()
    assert wired.kinds == [Start]
    wired.say("a", StreamEnd())
    assert [answer.status for answer in wired.answers()] == [200]
    assert wired.kinds == [Start, Record, Close]


@pytest.mark.parametrize("size", [5, -1])
def test_draining_answers_a_request_that_has_begun(wired: Wired, size: int) -> None:
    wired.peer.receive(chat()[:size])
    wired.house.drain()
    assert wired.kinds == []
    wired.peer.receive(chat()[size:])
    (answer,) = wired.answers()
    assert answer.status == 503
    assert answer.closed


# ------------------------------------------------------------------------------------------------------ cut in any way


REQUESTS = {
    "two": chat() + get("/healthz"),
    "refused": request_bytes(Asked("POST", "/nope", (), b"12345")) + get("/healthz"),
    "wrong-type": request_bytes(Asked("POST", "/chat", (JSON,), b"5")) + get("/v1/models") + b"\r\n",
    "garbage-after": get("/healthz") + b"\x00\x01",
    "bad-chunk": b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\nzz\r\n",
    "bad-chunk-of-refused": b"POST /nope HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    "reconnect": get("/chat?prompt=a", ("last-event-id", "x.1")) + chat(),
}


def run(pieces: Sequence[bytes]) -> tuple[bytes, list[Record], list[type]]:
    wired = Wired()
    for piece in pieces:
        wired.peer.receive(piece)
        wired.house.source.script = lambda _: [["a"], [StreamEnd()]]
        wired.house.play()
    return bytes(wired.peer.received), wired.house.records, wired.kinds


@given(st.sampled_from(sorted(REQUESTS)), st.data())
def test_the_answers_do_not_depend_on_how_requests_are_cut(name: str, data: st.DataObject) -> None:
    raw = REQUESTS[name]
    whole = run([raw])
    assert run([bytes([byte]) for byte in raw]) == whole
    assert run(data.draw(splits(raw))) == whole


# ----------------------------------------------------------------------------------------------------------- the machine

PIECES = st.sampled_from(
    [
        chat(),
        chat("two"),
        chat()[:20],
        chat()[20:],
        request_bytes(
            Asked(
                "POST",
                "/v1/chat/completions",
                (JSON,),
                b'{"model":"tiny-1","messages":[{"role":"user","content":"a"}]}',
            )
        ),
        get("/chat?prompt=a"),
        get("/healthz"),
        get("/nope"),
        get("/healthz", ("connection", "close")),
        get("/healthz") * 3 + chat(),
        chat("hi", ("expect", "100-continue")),
        b"\r\n",
        b"GET /",
        b"\x00",
        b"x" * 9000,
        request_bytes(Asked("POST", "/chat", (JSON,), b"x" * 70_000)),
    ]
)
WORDS = st.sampled_from(
    [
        ("a",),
        ("",),
        ("a", "b"),
        (StreamEnd(),),
        ("a", StreamEnd()),
        ("x" * 40,),
        (StreamError(ErrorKind.SERVER, "It broke."),),
    ]
)


class ConnectionMachine(RuleBasedStateMachine):
    """Anything may happen at any time; what must hold is in the invariants."""

    wired: Wired

    @initialize(room=st.none() | st.integers(0, 400), waiting=st.integers(0, 1))
    def begin(self, room: int | None, waiting: int) -> None:
        delivery = DeliveryOptions(heartbeat_ns=5 * SECOND, stall_ns=15 * SECOND, budget_bytes=200)
        self.wired = Wired(ServiceOptions(max_running=1, max_waiting=waiting, max_body_bytes=50_000, delivery=delivery))
        self.wired.peer.room = room
        self.other = self.wired.house.connect()
        assert isinstance(self.other, HttpClient)

    @rule(data=PIECES)
    def receive(self, data: bytes) -> None:
        self.wired.peer.receive(data)

    @rule()
    def end(self) -> None:
        self.wired.peer.end()

    @rule()
    def lose(self) -> None:
        self.wired.peer.lose()

    @rule(size=st.none() | st.integers(0, 600))
    def take(self, size: int | None) -> None:
        if not self.wired.peer.aborted:
            self.wired.peer.take(size)

    @rule(seconds=st.sampled_from([0, 1, 3, 5, 11, 21, 31, 41]))
    def advance(self, seconds: int) -> None:
        self.wired.house.advance(seconds * SECOND)
        deadline = self.wired.peer.connection.next_deadline()
        assert deadline is None or self.wired.peer.aborted or deadline > self.wired.house.now

    @precondition(lambda self: self.wired.house.source.jobs)
    @rule(data=st.data(), words=WORDS)
    def say(self, data: st.DataObject, words: tuple[str | StreamEnd | StreamError, ...]) -> None:
        job = data.draw(st.sampled_from(range(len(self.wired.house.source.jobs))))
        self.wired.say(*words, job=job)

    @rule()
    def occupy(self) -> None:
        """Somebody else takes the one place that there is, or leaves it."""
        if self.other.closed:
            self.other = self.wired.house.connect()
        self.other.begin(Asked("GET", "/chat?prompt=b"))

    @rule()
    def leave(self) -> None:
        self.other.leave()

    @rule()
    def drain(self) -> None:
        self.wired.house.drain()

    @rule()
    def shut_down(self) -> None:
        house = self.wired.house
        house.dispatcher.shut_down(house.service.shutting_down(), house.now)

    @invariant()
    def no_more_than_one_answer_runs(self) -> None:
        started = [action.stream for action in self.wired.peer.actions if isinstance(action, Start | Wait)]
        ended = [record for record in self._records() if record.stream_id is not None]
        running = self.wired.phase() is Phase.ANSWERING
        assert len(started) == len(ended) + running
        assert all(line.stream.terminal is not None for line in started[: len(ended)])

    @invariant()
    def the_end_comes_once(self) -> None:
        kinds = self.wired.kinds
        assert kinds.count(Close) <= 1
        assert kinds.count(Abort) <= 1
        if Abort in kinds:
            assert kinds[-1] is Abort
            assert self.wired.phase() is Phase.CLOSED
        if Close in kinds:
            assert self.wired.phase() in (Phase.CLOSING, Phase.CLOSED)
            assert set(kinds[kinds.index(Close) + 1 :]) <= {Abort}

    @invariant()
    def there_is_a_deadline_while_it_is_needed(self) -> None:
        deadline = self.wired.peer.connection.next_deadline()
        if self.wired.phase() is Phase.CLOSED:
            assert deadline is None
        elif self.wired.phase() is not Phase.ANSWERING:
            assert deadline is not None
        assert self.wired.peer.connection.data_to_send() == []

    @invariant()
    def each_answer_has_one_record(self) -> None:
        statuses = [record.status for record in self._records() if record.status]
        answers = read_answers(b"".join(self.wired.peer.writes), ["GET"] * 50, ended=self.wired.phase() is Phase.CLOSED)
        begun = [answer.status for answer in answers]
        assert begun[: len(statuses)] == statuses
        assert len(begun) - len(statuses) <= (self.wired.phase() is Phase.ANSWERING)

    def _records(self) -> list[Record]:
        return [action for action in self.wired.peer.actions if isinstance(action, Record)]

    def teardown(self) -> None:
        if not hasattr(self, "wired"):
            return
        self.wired.peer.lose()
        self.other.leave()
        house = self.wired.house
        for job in house.source.jobs:
            house.say(job, StreamEnd())
        assert house.dispatcher.streams == 0
        assert house.service.admission.running == house.service.admission.waiting == 0
        assert all(job.cancels <= 1 for job in house.source.jobs)
        assert house.reports == []


TestConnectionMachine = ConnectionMachine.TestCase
TestConnectionMachine.settings = settings(max_examples=150, stateful_step_count=25)
