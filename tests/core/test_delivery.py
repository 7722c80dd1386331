"""One stream to one reader: the held head, heartbeats, merging for a slow reader, and the fast path beside the slow."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.carriers import read_answers
from tests.strategies import legal_streams

from tokenwire.core.collect import Collector, Result
from tokenwire.core.contracts import Dialect, Reply, ResponseHead
from tokenwire.core.delivery import DeliveryOptions, ResultDelivery, StreamDelivery
from tokenwire.core.dialects.base import failure_of
from tokenwire.core.dialects.openai_chat import OpenAIChat
from tokenwire.core.dialects.plain import Plain
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    Event,
    ReasoningDelta,
    StreamCancelled,
    StreamEnd,
    StreamError,
    StreamStart,
    Terminal,
    TextDelta,
    ToolCallStart,
    UsageReport,
)
from tokenwire.core.http import ResponseWriter
from tokenwire.core.request import GenerationRequest, Message, TextPart

START = StreamStart("s", "tiny-1", 1_700_000_000)
USAGE = UsageReport(3, 2)
ERROR = StreamError(ErrorKind.OVERLOADED, "Too much.", "engine_full", status=503)
END: list[Event] = [ChoiceEnd(), USAGE, StreamEnd()]
REQUEST = GenerationRequest(model="tiny-1", messages=(Message("user", (TextPart("hi"),)),), include_usage=True)
BUDGET = 500
OPTIONS = DeliveryOptions(heartbeat_ns=100, stall_ns=1000, budget_bytes=BUDGET)
BEAT = b": ka\n"
DIALECTS: list[Dialect] = [Plain(), OpenAIChat()]
BEGUN = 1_000
RESULT_STATUS = 200


def refuse(terminal: Terminal) -> Reply:
    assert not isinstance(terminal, StreamEnd)
    error = failure_of(terminal)
    return Reply(error.status or 500, (), error.message.encode())


def new(dialect: Dialect, options: DeliveryOptions = OPTIONS, version: str = "1.1") -> StreamDelivery:
    head = ResponseHead(200, (("content-type", "text/event-stream"),))
    writer = ResponseWriter(version=version)
    return StreamDelivery(dialect.encoder(REQUEST, "s"), writer, head, refuse, options, BEGUN)


@pytest.fixture(params=DIALECTS, ids=lambda dialect: str(dialect.name))
def dialect(request: pytest.FixtureRequest) -> Dialect:
    chosen: Dialect = request.param
    return chosen


def given_up(delivery: StreamDelivery) -> bool:
    return delivery.overflowed


def ended(delivery: StreamDelivery) -> bool:
    return delivery.ended


def body(data: bytes) -> bytes:
    (answer,) = read_answers(data, ["GET"], ended=False)
    return answer.body


def decoded(dialect: Dialect, data: bytes) -> list[Event]:
    decoder = dialect.decoder()
    return [*decoder.receive_data(body(data)), *decoder.receive_eof()]


def text_of(dialect: Dialect, data: bytes) -> str:
    return "".join(event.text for event in decoded(dialect, data) if isinstance(event, TextDelta))


# -------------------------------------------------------------------------------------------------------- the held head


@pytest.mark.parametrize("held", [[START], [START, UsageReport(5, 0)]], ids=["start", "usage"])
def test_the_head_waits_for_the_first_token(dialect: Dialect, held: list[Event]) -> None:
    delivery = new(dialect)
    assert delivery.deliver(held, BEGUN) == b""
    assert (delivery.status, delivery.sent_bytes, delivery.first_ns) == (0, 0, None)
    data = delivery.deliver([TextDelta("a")], BEGUN + 7)
    assert data.startswith(b"HTTP/1.1 200 OK\r\n")
    assert text_of(dialect, data) == "a"
    assert (delivery.status, delivery.sent_bytes, delivery.first_ns) == (200, len(data), BEGUN + 7)


def test_role_and_first_token_leave_in_one_write() -> None:
    delivery = new(OpenAIChat())
    delivery.deliver([START], BEGUN)
    data = delivery.deliver([TextDelta("a")], BEGUN)
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in body(data).decode().split("\n") if line]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}]


@pytest.mark.parametrize(
    "token", [TextDelta("a"), ReasoningDelta("a"), ToolCallStart(0, "c", "f")], ids=lambda event: type(event).__name__
)
def test_what_counts_as_the_first_token(dialect: Dialect, token: Event) -> None:
    delivery = new(dialect)
    assert delivery.deliver([START, token], BEGUN + 3)
    assert delivery.first_ns == BEGUN + 3
    delivery.deliver([TextDelta("b")], BEGUN + 4)
    assert delivery.first_ns == BEGUN + 3


def test_an_answer_without_tokens_has_no_first(dialect: Dialect) -> None:
    delivery = new(dialect)
    data = delivery.deliver([START, *END], BEGUN)
    assert isinstance(decoded(dialect, data)[-1], StreamEnd)
    assert (delivery.first_ns, delivery.ended, delivery.failed) == (None, True, False)


@pytest.mark.parametrize("before", [[], [START], [START, USAGE]], ids=["nothing", "start", "usage"])
@pytest.mark.parametrize("failure", [ERROR, StreamCancelled("operator")], ids=["error", "cancelled"])
def test_a_failure_before_the_first_token_is_a_status(
    dialect: Dialect, before: list[Event], failure: StreamError | StreamCancelled
) -> None:
    delivery = new(dialect)
    data = delivery.deliver([*before, failure], BEGUN)
    status = 503 if failure is ERROR else 500
    assert (delivery.status, delivery.ended, delivery.failed, delivery.sent_bytes) == (status, True, True, len(data))
    (answer,) = read_answers(data, ["GET"], ended=False)
    assert answer.status == status
    assert answer.body == failure_of(failure).message.encode()
    assert delivery.error == (ERROR.message if failure is ERROR else "operator")


def test_a_failure_after_the_first_token_is_an_event(dialect: Dialect) -> None:
    delivery = new(dialect)
    data = delivery.deliver([START, TextDelta("a")], BEGUN) + delivery.deliver([ERROR], BEGUN)
    (answer,) = read_answers(data, ["GET"], ended=False)
    assert (answer.status, answer.whole) == (200, True)
    last = decoded(dialect, data)[-1]
    assert isinstance(last, StreamError)
    assert last.message == ERROR.message
    assert (delivery.status, delivery.ended, delivery.failed, delivery.error) == (200, True, True, ERROR.message)


def test_nothing_follows_the_end(dialect: Dialect) -> None:
    delivery = new(dialect)
    delivery.deliver([START, TextDelta("a"), *END], BEGUN)
    assert delivery.deliver([TextDelta("b")], BEGUN) == b""
    assert delivery.set_blocked(False, BEGUN) == b""
    assert delivery.next_deadline() is None
    assert delivery.handle_deadline(10**9) == b""


# ----------------------------------------------------------------------------------------------------------- heartbeats


def test_a_heartbeat_before_the_first_token_opens_the_answer(dialect: Dialect) -> None:
    delivery = new(dialect)
    assert delivery.next_deadline() == BEGUN + 100
    assert delivery.handle_deadline(BEGUN + 99) == b""
    data = delivery.handle_deadline(BEGUN + 100)
    assert body(data) == BEAT
    assert (delivery.status, delivery.first_ns) == (200, None)
    assert delivery.next_deadline() == BEGUN + 200
    data += delivery.deliver([START, TextDelta("a")], BEGUN + 150)
    assert text_of(dialect, data) == "a"
    assert delivery.first_ns == BEGUN + 150
    assert delivery.next_deadline() == BEGUN + 250


def test_the_first_token_after_a_heartbeat_is_stamped(dialect: Dialect) -> None:
    delivery = new(dialect)
    data = delivery.deliver([START], BEGUN) + delivery.handle_deadline(BEGUN + 100)
    data += delivery.deliver([TextDelta("a")], BEGUN + 150)
    assert delivery.first_ns == BEGUN + 150
    assert text_of(dialect, data) == "a"


def test_an_error_after_a_heartbeat_is_an_event(dialect: Dialect) -> None:
    delivery = new(dialect)
    data = delivery.handle_deadline(BEGUN + 100) + delivery.deliver([ERROR], BEGUN + 101)
    last = decoded(dialect, data)[-1]
    assert isinstance(last, StreamError)
    assert delivery.status == 200


def test_tokens_put_the_heartbeat_off(dialect: Dialect) -> None:
    delivery = new(dialect)
    data = b""
    for step in range(20):
        data += delivery.deliver([START, TextDelta("a")] if not step else [TextDelta("a")], BEGUN + 60 * step)
        data += delivery.handle_deadline(BEGUN + 60 * step + 59)
    assert BEAT not in data
    assert text_of(dialect, data) == "a" * 20


def test_what_is_written_says_when_silence_began(dialect: Dialect) -> None:
    delivery = new(dialect)
    delivery.deliver([START, TextDelta("a")], BEGUN)
    delivery.deliver([UsageReport(1, 1)], BEGUN + 50)  # says nothing on the wire
    assert delivery.next_deadline() == BEGUN + 100


@given(st.data(), st.sampled_from(DIALECTS))
def test_heartbeats_stand_between_events_only(data: st.DataObject, dialect: Dialect) -> None:
    events = data.draw(legal_streams())
    delivery, quiet = new(dialect), new(dialect)
    sent, without = b"", b""
    now = BEGUN
    for event in events:
        if data.draw(st.booleans()):
            now += 100
            sent += delivery.handle_deadline(now)
        sent += delivery.deliver([event], now)
        without += quiet.deliver([event], BEGUN)
    frames = re.findall(rb": ka\n|(?:[^\n]+\n)+?\n", body(sent))
    assert b"".join(frames) == body(sent)
    assert b"".join(frame for frame in frames if frame != BEAT) == body(without)


# ---------------------------------------------------------------------------------------------------------- slow readers


def test_a_blocked_reader_gets_what_has_waited_merged(dialect: Dialect) -> None:
    delivery = new(dialect)
    data = delivery.deliver([START, TextDelta("a")], BEGUN)
    assert delivery.set_blocked(True, BEGUN) == b""
    for text in ("b", "c", "d"):
        assert delivery.deliver([TextDelta(text)], BEGUN) == b""
    flushed = delivery.set_blocked(False, BEGUN)
    assert flushed.count(b"data: ") == 1
    assert text_of(dialect, data + flushed) == "abcd"
    assert delivery.deliver([TextDelta("e")], BEGUN) != b""


def test_without_merging_each_event_stays_itself(dialect: Dialect) -> None:
    delivery = new(dialect, DeliveryOptions(merge=False))
    delivery.deliver([START, TextDelta("a")], BEGUN)
    delivery.set_blocked(True, BEGUN)
    for text in ("b", "c", "d"):
        delivery.deliver([TextDelta(text)], BEGUN)
    assert delivery.set_blocked(False, BEGUN).count(b"data: ") == 3


def test_the_first_token_is_not_merged_with_the_second(dialect: Dialect) -> None:
    together = new(dialect)
    data = together.deliver([START, TextDelta("a"), TextDelta("b"), TextDelta("c")], BEGUN)
    assert [event.text for event in decoded(dialect, data) if isinstance(event, TextDelta) and event.text] == [
        "a",
        "bc",
    ]
    blocked = new(dialect)
    blocked.set_blocked(True, BEGUN)
    for text in ("a", "b", "c"):
        blocked.deliver([START, TextDelta(text)] if text == "a" else [TextDelta(text)], BEGUN)
    assert blocked.set_blocked(False, BEGUN) == data


def test_a_reader_over_its_budget_is_given_up(dialect: Dialect) -> None:
    delivery = new(dialect)
    delivery.deliver([START, TextDelta("a")], BEGUN)
    delivery.set_blocked(True, BEGUN)
    delivery.deliver([TextDelta("é" * (BUDGET // 3))], BEGUN)
    assert not given_up(delivery)
    assert delivery.deliver([TextDelta("b" * (BUDGET // 2))], BEGUN) == b""
    assert given_up(delivery)
    assert delivery.failed
    assert not delivery.ended
    assert delivery.deliver([TextDelta("c"), *END], BEGUN) == b""
    assert delivery.set_blocked(False, BEGUN) == b""
    assert delivery.next_deadline() is None


def test_a_reader_that_takes_nothing_is_given_up(dialect: Dialect) -> None:
    delivery = new(dialect)
    delivery.deliver([START, TextDelta("a")], BEGUN)
    delivery.set_blocked(True, BEGUN + 10)
    assert delivery.next_deadline() == BEGUN + 1010
    delivery.set_blocked(True, BEGUN + 500)  # it has taken something
    assert delivery.next_deadline() == BEGUN + 1500
    assert delivery.handle_deadline(BEGUN + 1499) == b""
    assert not given_up(delivery)
    assert delivery.handle_deadline(BEGUN + 1500) == b""  # no heartbeat into a full pipe, and no clean end
    assert given_up(delivery)


def test_an_end_waits_with_the_rest(dialect: Dialect) -> None:
    delivery = new(dialect)
    data = delivery.deliver([START, TextDelta("a")], BEGUN)
    delivery.set_blocked(True, BEGUN)
    assert delivery.deliver([TextDelta("b"), *END], BEGUN) == b""
    assert not ended(delivery)
    data += delivery.set_blocked(False, BEGUN)
    assert ended(delivery)
    assert isinstance(decoded(dialect, data)[-1], StreamEnd)
    assert text_of(dialect, data) == "ab"


def test_an_error_waits_for_a_reader_that_has_seen_nothing(dialect: Dialect) -> None:
    delivery = new(dialect)
    delivery.set_blocked(True, BEGUN)
    delivery.deliver([START, ERROR], BEGUN)
    (answer,) = read_answers(delivery.set_blocked(False, BEGUN), ["GET"], ended=False)
    assert answer.status == 503


# --------------------------------------------------------------------------------------------- in whatever way delivered

STEPS = st.lists(st.sampled_from(["one", "two", "block", "unblock", "beat"]), max_size=30)


def deliver_in_steps(dialect: Dialect, events: Sequence[Event], steps: Sequence[str]) -> bytes:
    """Hand events over in runs of one or two, between blocks, unblocks and heartbeats."""
    delivery = new(dialect, DeliveryOptions(heartbeat_ns=100, budget_bytes=10**6))
    data, now, rest = b"", BEGUN, list(events)
    for step in [*steps, "unblock", *["one"] * len(events)]:
        if step in {"one", "two"} and rest:
            count = 1 if step == "one" else 2
            data += delivery.deliver(rest[:count], now)
            del rest[:count]
        elif step == "beat":
            now += 100
            data += delivery.handle_deadline(now)
        elif step in {"block", "unblock"}:
            data += delivery.set_blocked(step == "block", now)
    assert delivery.ended
    assert delivery.sent_bytes == len(data)
    return data


def folded(events: Sequence[Event]) -> Result:
    collector = Collector()
    for event in events:
        collector.receive(event)
    return collector.result()


@given(st.sampled_from(DIALECTS), legal_streams(), STEPS)
def test_a_reader_accumulates_the_same_however_it_was_delivered(
    dialect: Dialect, events: list[Event], steps: list[str]
) -> None:
    data = deliver_in_steps(dialect, events, steps)
    assert folded(decoded(dialect, data)) == folded(decoded(dialect, deliver_in_steps(dialect, events, [])))


@given(legal_streams(choices=2), STEPS)
def test_two_choices_accumulate_the_same(events: list[Event], steps: list[str]) -> None:
    dialect = OpenAIChat()
    data = deliver_in_steps(dialect, events, steps)
    assert folded(decoded(dialect, data)) == folded(decoded(dialect, deliver_in_steps(dialect, events, [])))


@given(legal_streams(), STEPS)
def test_event_ids_of_plain_grow_and_end_with_the_number_of_events(events: list[Event], steps: list[str]) -> None:
    data = deliver_in_steps(Plain(), events, steps)
    ids = [int(number) for number in re.findall(rb"^id: s\.([0-9]+)$", body(data), re.MULTILINE)]
    assert ids == sorted(set(ids))
    assert ids[-1] == len(events)
    assert body(data).count(b"retry: ") == 1


@given(st.sampled_from(DIALECTS), legal_streams(), st.sampled_from(["1.0", "1.1"]))
def test_the_fast_path_writes_what_the_slow_path_writes(dialect: Dialect, events: list[Event], version: str) -> None:
    fast, slow = new(dialect, version=version), new(dialect, version=version)
    assert [fast.deliver([event], BEGUN) for event in events] == [slow._deliver([event], BEGUN) for event in events]
    assert (fast.sent_bytes, fast.ended, fast.first_ns) == (slow.sent_bytes, slow.ended, slow.first_ns)


# --------------------------------------------------------------------------------------------------------- whole answers


def whole(result: Result) -> Reply:
    return Reply(RESULT_STATUS, (), "".join(choice.text for choice in result.choices).encode())


def test_a_whole_answer_is_written_at_the_end() -> None:
    delivery = ResultDelivery(whole, ResponseWriter(), refuse)
    assert delivery.deliver([START, UsageReport(1, 0)], 1) == b""
    assert delivery.deliver([TextDelta("a")], 2) == b""
    assert delivery.set_blocked(True, 3) == b""
    assert (delivery.first_ns, delivery.status, delivery.next_deadline()) == (2, 0, None)
    assert delivery.handle_deadline(10**18) == b""
    data = delivery.deliver([TextDelta("b"), *END], 4)
    (answer,) = read_answers(data, ["GET"], ended=False)
    assert (answer.status, answer.body, answer.header("content-length")) == (200, b"ab", "2")
    assert (delivery.ended, delivery.failed, delivery.status, delivery.sent_bytes) == (True, False, 200, len(data))
    assert delivery.error is None


def test_a_whole_answer_that_fails_is_a_status() -> None:
    delivery = ResultDelivery(whole, ResponseWriter(), refuse)
    data = delivery.deliver([START, TextDelta("a"), ERROR], 1)
    (answer,) = read_answers(data, ["GET"], ended=False)
    assert (answer.status, answer.body) == (503, b"Too much.")
    assert (delivery.ended, delivery.failed, delivery.status, delivery.error) == (True, True, 503, ERROR.message)
