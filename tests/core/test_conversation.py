"""Prompts and answers on one WebSocket, through both of its carriers: wording, order, waiting, cancelling, leaving."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.carriers import SECOND, Carriage, House
from tests.conversing import DONE, OBJECTS, WIRES, ByteSocket, MessageSocket, Wire

from tokenwire.core.contracts import ModelCard
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    FinishReason,
    ReasoningDelta,
    StreamEnd,
    StreamError,
    StreamTruncated,
    ToolCallStart,
)
from tokenwire.core.peers import PeerLimits, PeerTable
from tokenwire.core.service import ServiceOptions
from tokenwire.core.stream import Item

OVERLOADED = StreamError(ErrorKind.OVERLOADED, "The engine is full.", "engine_full", retryable=True)
MS = 1_000_000
STALL = DeliveryOptions(stall_ns=20 * SECOND, budget_bytes=4000)


class Talk:
    """A house, one WebSocket to it, and a backend that says what the test lets it say."""

    def __init__(
        self,
        wire: Wire,
        *,
        subprotocols: tuple[str, ...] = (),
        options: ServiceOptions | None = None,
        target: str = "/ws/chat",
    ) -> None:
        self.house = Carriage("http").house(options=options)
        self.house.source.script = None
        self.socket: ByteSocket | MessageSocket = wire.open(self.house, target, subprotocols=subprotocols)
        assert self.socket.accepted

    @property
    def texts(self) -> list[str]:
        return self.socket.texts

    @property
    def closed(self) -> tuple[int, str] | None:
        return self.socket.closed

    @property
    def ends(self) -> list[str]:
        """How the prompts ended; the handshake's own record is left out."""
        first, *records = self.house.records
        assert (first.status, first.end, first.path) == (101, "answered", "/ws/chat")
        assert all(record.status == 101 for record in records)
        return [record.end for record in records]

    @property
    def cancels(self) -> list[int]:
        return [job.cancels for job in self.house.source.jobs]

    @property
    def prompts(self) -> list[str]:
        """What the backend was asked."""
        return [job.request.prompt for job in self.house.source.jobs]

    def ask(self, prompt: str = "hi", **fields: Any) -> None:
        self.socket.say(json.dumps({"prompt": prompt, **fields}))

    def say(self, *items: Item, job: int = -1) -> None:
        self.socket.within(partial(self.house.say, self.house.source.jobs[job], *items))

    def objects(self) -> list[Any]:
        """The messages so far, as objects; `[DONE]` as it is."""
        return [text if text == DONE else json.loads(text) for text in self.texts]

    def check_nothing_is_left(self) -> None:
        admission = self.house.service.admission
        assert (self.house.dispatcher.streams, admission.running, admission.waiting) == (0, 0, 0)
        assert self.house.service.accountant.streams_active == 0
        ended = [record.end for record in self.house.records if record.stream_id is not None]
        counted: Counter[str] = Counter()
        for ledger in self.house.service.accountant.ledgers.values():
            counted.update(ledger.ends)
        assert +counted == Counter(ended)
        assert self.house.reports == []


@pytest.fixture
def talk(wire: Wire) -> Talk:
    return Talk(wire)


@pytest.fixture
def objects(wire: Wire) -> Talk:
    return Talk(wire, subprotocols=OBJECTS)


# --------------------------------------------------------------------------------------------------------- the wording


def test_tokens_as_text(talk: Talk) -> None:
    assert talk.socket.subprotocol is None
    talk.ask("two owls")
    assert talk.prompts == ["two owls"]
    assert talk.texts == []
    talk.say("Two ")
    assert talk.texts == ["Two "]
    talk.say("owls\u2028 é😀")
    talk.say(ReasoningDelta("Easy."), ToolCallStart(0, "c", "f"), "")
    talk.say(StreamEnd())
    assert talk.texts == ["Two ", "owls\u2028 é😀", DONE]
    assert talk.ends == ["finished"]
    talk.ask("more")
    talk.say("x", StreamEnd())
    assert talk.texts[3:] == ["x", DONE]
    assert talk.socket.is_open()
    talk.check_nothing_is_left()


def test_answers_are_counted(objects: Talk) -> None:
    house = objects.house
    for end in ("finished", "failed", "cancelled"):
        objects.ask()
        (trace,) = house.service.accountant.ledger("tiny-1", "plain").open
        house.advance(200 * MS)
        objects.say("Two ")
        assert (trace.ttft_ns, trace.ttfb_ns) == (200 * MS, 200 * MS)
        house.advance(20 * MS)
        objects.say("owls")
        if end == "cancelled":
            objects.socket.say('{"cancel":true}')
        else:
            objects.say(StreamEnd() if end == "finished" else OVERLOADED)
    ledger = house.service.accountant.ledger("tiny-1", "plain")
    assert {end: count for end, count in ledger.ends.items() if count} == {"finished": 1, "failed": 1, "cancelled": 1}
    assert (ledger.tokens, ledger.good, ledger.queue.count) == (6, 1, 3)
    assert (ledger.ttft.count, ledger.ttft.total) == (3, 600 * MS)
    assert (ledger.event_gaps().count, ledger.event_gaps().total) == (3, 60 * MS)
    assert ledger.tpot.total == 60 * MS
    assert [record.tpot_ns for record in house.records[1:]] == [20 * MS] * 3
    objects.check_nothing_is_left()


def test_tokens_as_objects(objects: Talk) -> None:
    assert objects.socket.subprotocol == OBJECTS[0]
    objects.ask()
    objects.say("Two ")
    objects.say(DONE, ReasoningDelta("Easy."))
    objects.say(ChoiceEnd(reason=FinishReason.LENGTH), StreamEnd())
    usage = {"input_tokens": 0, "output_tokens": 3}
    assert objects.objects() == [
        {"token": "Two "},
        {"token": DONE},
        {"token": "", "reasoning": "Easy."},
        {"token": "", "finish_reason": "length", "usage": usage},
        DONE,
    ]
    assert all(text.isascii() for text in objects.texts)
    objects.check_nothing_is_left()


@pytest.mark.parametrize("before", [(), ("x",)], ids=["first", "later"])
@pytest.mark.parametrize("pieces", [(DONE,), ("[DO", "NE]"), (f"a{DONE}",)], ids=["whole", "merged", "within"])
def test_the_word_for_the_end_as_the_models_own_text(
    talk: Talk, before: tuple[str, ...], pieces: tuple[str, ...]
) -> None:
    talk.ask()
    for text in before:
        talk.say(text)
    talk.say(*pieces)
    assert DONE not in talk.texts
    talk.say(DONE)
    assert DONE not in talk.texts
    assert "".join(talk.texts) == "".join((*before, *pieces, DONE))
    talk.say(StreamEnd())
    assert talk.texts[-1] == DONE
    assert talk.texts.count(DONE) == 1


def test_the_word_for_the_end_merged_while_nobody_reads(talk: Talk) -> None:
    talk.ask()
    talk.say("x")
    talk.socket.stall()
    for text in ("wait ", "[DO", "NE", "]", DONE):
        talk.say(text)
    talk.say(StreamEnd())
    talk.socket.read_on()
    assert "".join(talk.texts[:-1]) == f"xwait {DONE}{DONE}"
    assert talk.texts.index(DONE) == len(talk.texts) - 1
    assert talk.ends == ["finished"]


tokens = st.lists(
    st.sampled_from(["[DONE]", "[DONE", "]", "[DO", "NE]", "a", "\n", "é", "", "\ud83d", "\ude00"]), max_size=8
)


@given(st.sampled_from(sorted(WIRES)), st.lists(tokens, min_size=1, max_size=5), st.booleans())
def test_any_text_arrives_and_only_the_end_is_the_end(name: str, steps: list[list[str]], stalls: bool) -> None:
    talk = Talk(WIRES[name])
    talk.ask()
    for number, step in enumerate(steps):
        if stalls and number == 1:
            talk.socket.stall()
        talk.say(*step)
    talk.say(StreamEnd())
    talk.socket.read_on()
    *said, last = talk.texts
    assert last == DONE
    assert DONE not in said
    assert "" not in said
    expected = "".join(text for step in steps for text in step)
    repaired = expected.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert "".join(said) == repaired


def test_parameters_of_the_handshake_hold_for_every_prompt(wire: Wire) -> None:
    talk = Talk(wire, target="/ws/chat?model=tiny-2&max_tokens=2")
    for prompt, most in (('{"prompt":"hi"}', 2), ('{"prompt":"hi","max_tokens":1}', 1)):
        talk.socket.say(prompt)
        talk.say("a", "b", "c")
        assert talk.texts == [*["a", "b"][:most], DONE]
        assert talk.house.source.jobs[-1].request.model == "tiny-2"
        talk.texts.clear()


# ------------------------------------------------------------------------------------------------------- order and turn


def test_prompts_wait_for_their_turn(talk: Talk) -> None:
    for number in range(1 + talk.house.service.options.max_prompts):
        talk.ask(str(number))
    assert talk.prompts == ["0"]
    for number in range(1 + talk.house.service.options.max_prompts):
        talk.say(f"answer {number}", StreamEnd())
    assert talk.prompts == [str(number) for number in range(9)]
    assert talk.texts == [text for number in range(9) for text in (f"answer {number}", DONE)]
    assert talk.ends == ["finished"] * 9
    talk.check_nothing_is_left()


def test_too_many_prompts(talk: Talk) -> None:
    for number in range(2 + talk.house.service.options.max_prompts):
        talk.ask(str(number))
    assert talk.closed == (1013, "too many prompts wait for their turn")
    assert talk.cancels == [1]
    assert talk.ends == ["cancelled"]
    talk.ask("late")
    assert talk.prompts == ["0"]
    talk.check_nothing_is_left()


def test_prompts_that_wait_have_room_for_one_message_of_the_greatest_size(wire: Wire) -> None:
    talk = Talk(wire, options=ServiceOptions(max_body_bytes=1000))
    for _ in range(3):
        talk.ask("x" * 300)
    assert talk.socket.is_open()
    for _ in range(2):
        talk.ask("x" * 300)
    assert talk.closed == (1013, "too many prompts wait for their turn")
    assert talk.cancels == [1]


def test_room_that_a_prompt_leaves_is_room_for_another(wire: Wire) -> None:
    talk = Talk(wire, options=ServiceOptions(max_body_bytes=1000, max_prompts=1))
    talk.ask("0")
    for number in range(1, 5):
        talk.ask(f"{number}" + "x" * 600)
        talk.say(StreamEnd())
    talk.say(StreamEnd())
    assert [prompt[0] for prompt in talk.prompts] == list("01234")
    assert talk.socket.is_open()


def test_many_refused_prompts_in_the_queue(wire: Wire) -> None:
    talk = Talk(wire, subprotocols=OBJECTS, options=ServiceOptions(max_prompts=5000))
    talk.ask()
    for _ in range(5000):
        talk.socket.say("{}")
    talk.say("a", StreamEnd())
    assert talk.texts.count(DONE) == 5001
    assert talk.ends == ["finished", *["refused"] * 5000]
    assert talk.socket.is_open()
    talk.check_nothing_is_left()


def test_the_servers_queue(wire: Wire) -> None:
    options = ServiceOptions(max_running=1, max_waiting=1)
    talk = Talk(wire, subprotocols=OBJECTS, options=options)
    second, third = (wire.open(talk.house, subprotocols=OBJECTS) for _ in range(2))
    talk.ask("first")
    second.say('{"prompt":"second"}')
    third.say('{"prompt":"third"}')
    error, done = third.texts
    assert json.loads(error)["error"]["code"] == "queue_full"
    assert json.loads(error)["error"]["retryable"] is True
    assert done == DONE
    assert third.closed is None
    assert talk.prompts == ["first"]
    talk.say("1", StreamEnd())
    assert talk.prompts == ["first", "second"]
    talk.say("2", StreamEnd())
    second.read()
    assert json.loads(second.texts[0]) == {"token": "2"}
    talk.check_nothing_is_left()


def test_one_that_waits_in_the_servers_queue_leaves_or_cancels(wire: Wire) -> None:
    talk = Talk(wire, options=ServiceOptions(max_running=1))
    leaver, canceller = (wire.open(talk.house, subprotocols=OBJECTS) for _ in range(2))
    talk.ask("first")
    for socket in (leaver, canceller):
        socket.say('{"prompt":"later"}')
    assert talk.house.service.admission.waiting == 2
    leaver.close()
    canceller.say('{"cancel":true}')
    assert talk.house.service.admission.waiting == 0
    assert json.loads(canceller.texts[0])["error"]["code"] == "cancelled"
    assert canceller.texts[1:] == [DONE]
    talk.say("a", StreamEnd())
    assert talk.prompts == ["first"]
    talk.check_nothing_is_left()


# ------------------------------------------------------------------------------------------------------------ refusals

BAD: dict[str, tuple[str, str, str]] = {
    "not JSON": ("hello", "invalid_request_error", "not valid JSON"),
    "no prompt": ("{}", "invalid_request_error", "prompt"),
    "not streamed": (
        '{"prompt":"x","stream":false}',
        "invalid_request_error",
        "a WebSocket answers with a stream only",
    ),
    "no such model": ('{"prompt":"x","model":"nope"}', "not_found_error", "does not exist"),
    "empty": ("", "invalid_request_error", "prompt"),
    "deep": ("[" * 100_000, "invalid_request_error", "deeper"),
    "no cancel": ('{"cancel":1}', "invalid_request_error", "prompt"),
    "cancel not alone": ('{"cancel":true,"x":1}', "invalid_request_error", "prompt"),
}


@pytest.mark.parametrize(("message", "kind", "words"), BAD.values(), ids=BAD)
def test_a_bad_prompt_as_objects(objects: Talk, message: str, kind: str, words: str) -> None:
    objects.socket.say(message)
    (refusal, done) = objects.objects()
    assert refusal["token"] == ""
    assert refusal["error"]["type"] == kind
    assert words in refusal["error"]["message"]
    assert done == DONE
    assert objects.ends == ["refused"]
    objects.ask()
    objects.say("still here", StreamEnd())
    assert objects.objects()[2] == {"token": "still here"}
    assert objects.socket.is_open()
    objects.check_nothing_is_left()


@pytest.mark.parametrize(("message", "kind", "words"), BAD.values(), ids=BAD)
def test_a_bad_prompt_as_text(talk: Talk, message: str, kind: str, words: str) -> None:
    talk.socket.say(message)
    assert talk.texts == []
    assert talk.closed is not None
    code, reason = talk.closed
    assert code == 1011
    assert reason.startswith(f"{kind}: ")
    assert words in reason
    assert len(reason.encode()) <= 123
    assert talk.ends == ["refused"]
    talk.check_nothing_is_left()


def test_a_long_reason_is_cut_between_two_characters(wire: Wire) -> None:
    talk = Talk(wire)
    talk.ask()
    talk.say(StreamError(ErrorKind.SERVER, "é" * 100))
    assert talk.closed is not None
    reason = talk.closed[1]
    assert reason == "server_error: " + "é" * 54
    assert len(reason.encode()) == 122


def test_words_for_cancelling_mean_nothing_without_objects(talk: Talk) -> None:
    talk.ask()
    talk.say("a")
    talk.socket.say('{"cancel":true}')
    talk.say("b", StreamEnd())
    assert talk.texts == ["a", "b", DONE]
    assert talk.closed is not None
    assert talk.closed[0] == 1011


# -------------------------------------------------------------------------------------------------------------- failing


@pytest.mark.parametrize("before", [(), ("a",)], ids=["at once", "midway"])
def test_a_failure_as_text(talk: Talk, before: tuple[str, ...]) -> None:
    talk.ask()
    talk.ask("never begun")
    talk.say(*before, OVERLOADED)
    assert talk.texts == list(before)
    assert talk.closed == (1011, "overloaded_error: The engine is full.")
    assert talk.ends == ["failed"]
    assert len(talk.prompts) == 1
    talk.check_nothing_is_left()


def test_a_failure_whose_words_are_no_text(talk: Talk) -> None:
    talk.ask()
    talk.say("a", StreamError(ErrorKind.SERVER, "no \ud800"))
    assert talk.closed == (1011, "server_error: no \ufffd")
    talk.check_nothing_is_left()


@pytest.mark.parametrize("before", [(), ("a",)], ids=["at once", "midway"])
@pytest.mark.parametrize("end", [OVERLOADED, StreamTruncated("it broke off")], ids=["error", "truncated"])
def test_a_failure_as_objects(objects: Talk, before: tuple[str, ...], end: Item) -> None:
    objects.ask()
    objects.ask("next")
    objects.say(*before, end)
    failure, done = objects.objects()[len(before) :]
    assert failure["error"]["code"] == ("engine_full" if end is OVERLOADED else "stream_truncated")
    assert done == DONE
    assert objects.socket.is_open()
    objects.say("b", StreamEnd())
    assert objects.objects()[-3] == {"token": "b"}
    assert objects.ends == ["failed" if end is OVERLOADED else "truncated", "finished"]
    objects.check_nothing_is_left()


def test_a_backend_that_does_not_start(objects: Talk) -> None:
    objects.house.source.fault = RuntimeError("no")
    objects.ask()
    objects.ask()
    assert [value if value == DONE else value["error"]["code"] for value in objects.objects()] == [
        "backend_error",
        DONE,
    ] * 2
    assert objects.ends == ["failed", "failed"]
    assert objects.socket.is_open()
    assert len(objects.house.reports) == 2


# ----------------------------------------------------------------------------------------------------------- cancelling


def test_cancelling_what_runs(objects: Talk) -> None:
    objects.ask("first")
    objects.ask("second")
    objects.say("a")
    objects.socket.say(' {"cancel" : true}\n')
    token, failure, done = objects.objects()
    assert token == {"token": "a"}
    assert failure["error"]["code"] == "cancelled"
    assert done == DONE
    assert objects.cancels == [1, 0]
    assert objects.prompts == ["first", "second"]
    objects.say("late", job=0)
    objects.say("b", StreamEnd())
    assert objects.objects()[3] == {"token": "b"}
    assert objects.ends == ["cancelled", "finished"]
    objects.check_nothing_is_left()


def test_cancelling_before_the_first_token(objects: Talk) -> None:
    objects.ask()
    objects.socket.say('{"cancel":true}')
    assert objects.objects()[0]["error"]["code"] == "cancelled"
    assert objects.cancels == [1]
    objects.check_nothing_is_left()


def test_cancelling_nothing(objects: Talk) -> None:
    for _ in range(3):
        objects.socket.say('{"cancel":true}')
    assert objects.texts == []
    assert objects.socket.is_open()
    objects.ask()
    objects.say("a", StreamEnd())
    objects.socket.say('{"cancel":true}')
    assert objects.objects()[-1] == DONE
    assert objects.ends == ["finished"]
    assert objects.cancels == [0]


def test_cancelling_while_nobody_reads(objects: Talk) -> None:
    objects.ask()
    objects.ask("next")
    objects.say("a")
    objects.socket.stall()
    for text in "bcd":
        objects.say(text)
    for _ in range(2):  # the second finds it stopped
        objects.socket.say('{"cancel":true}')
    assert objects.cancels == [1]
    objects.say("late", job=0)
    assert len(objects.prompts) == 1
    objects.socket.read_on()
    told = objects.objects()
    assert [value["error"]["code"] for value in told if value != DONE and "error" in value] == ["cancelled"]
    assert told.count(DONE) == 1
    assert "late" not in str(told)
    assert objects.prompts == ["hi", "next"]
    objects.say("e", StreamEnd())
    assert objects.ends == ["cancelled", "finished"]
    objects.check_nothing_is_left()


def test_cancelling_an_answer_that_has_ended_and_was_not_taken(objects: Talk) -> None:
    objects.ask()
    objects.say("a")
    objects.socket.stall()
    for text in "bc":
        objects.say(text)
    objects.say(StreamEnd())
    objects.socket.say('{"cancel":true}')
    objects.socket.read_on()
    assert objects.objects()[-1] == DONE
    assert objects.texts.count(DONE) == 1
    assert not any("error" in value for value in objects.objects() if value != DONE)
    assert objects.ends == ["finished"]
    assert objects.cancels == [0]
    objects.check_nothing_is_left()


# ----------------------------------------------------------------------------------------------- messages that end it


def test_a_binary_message(talk: Talk) -> None:
    talk.ask()
    talk.ask("waits")
    talk.say("a")
    talk.socket.say_bytes(b'{"prompt":"hi"}')
    assert talk.closed == (1003, "prompts are text messages")
    assert talk.cancels == [1]
    assert talk.ends == ["cancelled"]
    talk.say("late")
    assert talk.texts == ["a"]
    talk.check_nothing_is_left()


def test_a_message_that_is_too_long(wire: Wire) -> None:
    talk = Talk(wire, options=ServiceOptions(max_body_bytes=100))
    talk.ask("x" * (100 - len('{"prompt": ""}')))
    talk.ask("y" * 100)
    assert talk.closed is not None
    assert talk.closed[0] == 1009
    assert talk.cancels == [1]
    talk.check_nothing_is_left()


# -------------------------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("how", ["close", "vanish"])
@pytest.mark.parametrize("stage", ["idle", "silent", "midway", "stalled", "answered"])
def test_leaving_stops_the_backend_at_once(talk: Talk, how: str, stage: str) -> None:
    if stage != "idle":
        talk.ask()
        talk.ask("waits")
    if stage in {"midway", "stalled", "answered"}:
        talk.say("a")
    if stage == "stalled":
        talk.socket.stall()
        talk.say("b")
        talk.say("c")
    if stage == "answered":
        talk.say(StreamEnd())
        talk.say(StreamEnd())
    getattr(talk.socket, how)()
    running = stage in {"silent", "midway", "stalled"}
    assert talk.cancels == ([1] if running else [] if stage == "idle" else [0, 0])
    assert talk.ends == (["cancelled"] if running else [] if stage == "idle" else ["finished", "finished"])
    if running:
        talk.say("late", StreamEnd())
    talk.check_nothing_is_left()


# --------------------------------------------------------------------------------------------------------- slow readers


def test_a_reader_that_stalls_is_given_up(wire: Wire) -> None:
    talk = Talk(wire, options=ServiceOptions(delivery=STALL))
    other = wire.open(talk.house)
    talk.ask()
    talk.ask("waits")
    other.say('{"prompt":"other"}')
    talk.say("a", job=0)
    talk.socket.stall()
    talk.say("b", job=0)
    talk.say("c", job=0)
    assert talk.house.source.jobs[0].blocked == [True]
    talk.house.advance(STALL.stall_ns - 1)
    talk.say("d", job=1)
    other.read()
    assert other.texts == ["d"]
    assert talk.socket.is_open()
    talk.house.advance(1)
    assert talk.closed == (1006, "")
    assert talk.cancels == [1, 0]
    assert talk.ends[-1:] == ["slow_reader"]
    assert talk.prompts == ["hi", "other"]
    talk.say(StreamEnd(), job=1)
    talk.check_nothing_is_left()


def test_a_reader_that_falls_behind_its_budget_is_given_up(wire: Wire) -> None:
    talk = Talk(wire, options=ServiceOptions(delivery=STALL))
    talk.ask()
    talk.say("a")
    talk.socket.stall()
    for _ in range(10):
        talk.say("0123456789" * 100)
    assert talk.closed == (1006, "")
    assert talk.cancels == [1]
    assert talk.ends == ["slow_reader"]
    talk.check_nothing_is_left()


def test_a_reader_that_comes_back_misses_nothing(wire: Wire) -> None:
    talk = Talk(wire, options=ServiceOptions(delivery=STALL))
    talk.ask()
    talk.say("a")
    talk.socket.stall()
    for text in "bcdef":
        talk.say(text)
    talk.socket.read_on()
    assert talk.house.source.jobs[0].blocked == [True, False]
    talk.say("g", StreamEnd())
    assert "".join(talk.texts) == f"abcdefg{DONE}"
    assert talk.ends == ["finished"]
    talk.check_nothing_is_left()


# -------------------------------------------------------------------------------------------------------- what is noted


def test_each_prompt_has_its_record(wire: Wire) -> None:
    talk = Talk(wire, target="/ws/chat?system=secret")
    talk.house.advance(5 * SECOND)
    talk.ask("secret")
    talk.house.advance(SECOND)
    talk.say("a", "b")
    talk.house.advance(2 * SECOND)
    talk.say("c", StreamEnd())
    record = talk.house.records[-1]
    assert (record.method, record.path, record.status, record.end) == ("GET", "/ws/chat", 101, "finished")
    assert (record.dialect, record.model, record.stream_id) == ("plain", "tiny-1", "tw0001")
    assert (record.tokens, record.first_token_ns, record.duration_ns) == (3, SECOND, 3 * SECOND)
    assert record.sent_bytes > len("abc" + DONE)
    assert record.error is None
    assert "secret" not in repr(talk.house.records)


def test_the_record_of_a_failure_says_why(objects: Talk) -> None:
    objects.ask()
    objects.say("a", OVERLOADED)
    objects.socket.say("{}")
    failed, refused = objects.house.records[1:]
    assert (failed.end, failed.error, failed.tokens) == ("failed", "The engine is full.", 1)
    assert refused.end == "refused"
    assert refused.error is not None
    assert "prompt" in refused.error
    assert refused.stream_id is None


# ------------------------------------------------------------------------------------------------- shares of an address


def test_an_addresss_share_of_streams() -> None:
    house: House = Carriage("http").house(models=(ModelCard("tiny-1"),))
    house.source.script = None
    table = PeerTable(PeerLimits(max_streams=1))
    share = table.enter("192.0.2.1")
    assert share is not None
    assert not isinstance(share, StreamError)
    one, two = (ByteSocket(house, subprotocols=OBJECTS, share=share) for _ in range(2))
    one.say('{"prompt":"x"}')
    two.say('{"prompt":"y"}')
    assert json.loads(two.texts[0])["error"]["code"] == "too_many_streams"
    assert share.streams == 1
    house.say(house.source.jobs[0], "a", StreamEnd())
    assert share.streams == 0
    two.say("{}")
    assert share.streams == 0
    two.say('{"prompt":"y"}')
    assert share.streams == 1
    two.say('{"cancel":true}')
    assert share.streams == 0
    two.say('{"prompt":"y"}')
    two.close()
    assert [job.cancels for job in house.source.jobs] == [0, 1, 1]
    assert share.streams == 0
