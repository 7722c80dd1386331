"""The accountant in the line: whatever carries a stream and however it ends, it is counted once, and /metrics says so."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.carriers import Answer, Asked, Carriage, House, HttpClient

from tokenwire.core.actions import Record
from tokenwire.core.contracts import ANY_MODEL, ModelCard
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.dispatch import STREAMS_PER_TURN
from tokenwire.core.events import (
    ErrorKind,
    Event,
    ReasoningDelta,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    TextDelta,
    UsageReport,
)
from tokenwire.core.exposition import CONTENT_TYPE, Family, Sample, encode, families
from tokenwire.core.latency import Accountant
from tokenwire.core.ledger import ENDS, Ledger
from tokenwire.core.service import ServiceOptions

MS = 1_000_000
TARGET = "/chat?prompt=hi"
JSON = ("content-type", "application/json")
Steps = Sequence[tuple[int, Sequence[Event | str | bytes]]]
STEADY: Steps = [(200 * MS, ["a"]), (20 * MS, ["b"]), (20 * MS, ["c"]), (25 * MS, ["d"]), (MS, [StreamEnd()])]

Found = dict[tuple[str, frozenset[tuple[str, str]]], float]


def chat(stream: bool, n: int = 1) -> Asked:
    fields = {"model": "tiny-1", "messages": [{"role": "user", "content": "hi"}], "stream": stream, "n": n}
    return Asked("POST", "/v1/chat/completions", (JSON,), json.dumps(fields).encode())


ASKED = {
    "plain": Asked("GET", TARGET),
    "plain whole": Asked("GET", f"{TARGET}&stream=false"),
    "chat": chat(True),
    "chat whole": chat(False),
}


def begin(house: House, asked: Asked) -> None:
    house.source.script = None
    house.connect().begin(asked)


def play(house: House, steps: Steps) -> None:
    """Let time pass, and the backend's last job speak."""
    for wait, items in steps:
        house.advance(wait)
        house.say(house.source.jobs[-1], *items)


def run(house: House, asked: Asked, steps: Steps) -> Record:
    begin(house, asked)
    play(house, steps)
    return house.records[-1]


def the_ledger(house: House) -> Ledger:
    (ledger,) = house.service.accountant.ledgers.values()
    return ledger


def scrape(house: House) -> Found:
    answer = house.ask_on(house.connect(), Asked("GET", "/metrics"))
    assert answer.status == 200
    assert answer.header("content-type") == CONTENT_TYPE
    return read(answer.body)


def read(body: bytes) -> Found:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def labels(dialect: str = "plain", model: str = "tiny-1", **more: str) -> frozenset[tuple[str, str]]:
    return frozenset({"model": model, "dialect": dialect, **more}.items())


# --------------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_stream_and_a_whole_answer_are_counted_alike(carrier: Carriage, asked: Asked) -> None:
    house = carrier.house()
    record = run(house, asked, STEADY)
    assert (record.end, record.tokens, record.queue_ns) == ("finished", 4, 0)
    assert (record.first_token_ns, record.duration_ns) == (200 * MS, 266 * MS)
    assert record.tpot_ns == 65 * MS / 3
    assert record.gap_p99_ns is not None
    assert abs(record.gap_p99_ns / (25 * MS) - 1) < 0.01
    ledger = the_ledger(house)
    assert (ledger.ends["finished"], ledger.tokens, ledger.good, len(ledger.open)) == (1, 4, 1, 0)
    assert (ledger.ttft.count, ledger.ttft.total) == (1, 200 * MS)
    assert (ledger.event_gaps().count, ledger.event_gaps().total) == (3, 65 * MS)
    assert (ledger.queue.count, ledger.e2e.total) == (1, 266 * MS)


def test_the_first_byte_of_a_stream_comes_with_its_first_token_and_of_a_whole_answer_with_its_end(
    carrier: Carriage,
) -> None:
    for asked, at in ((ASKED["chat"], 200 * MS), (ASKED["chat whole"], 266 * MS)):
        house = carrier.house()
        begin(house, asked)
        (trace,) = house.service.accountant.ledger("tiny-1", "openai_chat").open
        play(house, STEADY)
        assert trace.ttfb_ns == at


def test_a_greeting_or_a_heartbeat_is_a_first_byte_and_no_token(carrier: Carriage) -> None:
    house = carrier.house(options=ServiceOptions(delivery=DeliveryOptions(heartbeat_ns=100 * MS)))
    begin(house, ASKED["chat"])
    (trace,) = house.service.accountant.ledger("tiny-1", "openai_chat").open
    house.advance(150 * MS)
    play(house, STEADY)
    assert trace.ttfb_ns == 150 * MS
    assert (trace.ttft_ns, trace.events) == (350 * MS, 4)


@pytest.mark.parametrize(
    ("terminal", "end"),
    [
        (StreamEnd(), "finished"),
        (StreamError(ErrorKind.SERVER, "It broke."), "failed"),
        (StreamTruncated("cut"), "truncated"),
    ],
)
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_how_streams_end(carrier: Carriage, asked: Asked, terminal: Event, end: str) -> None:
    house = carrier.house()
    assert run(house, asked, [(MS, ["a"]), (MS, [terminal])]).end == end
    assert the_ledger(house).ends == {**dict.fromkeys(ENDS, 0), end: 1}


def test_a_client_that_leaves_while_it_waits_and_one_that_leaves_while_it_reads(carrier: Carriage) -> None:
    house = carrier.house(options=ServiceOptions(max_running=1))
    house.source.script = None
    reading, waiting = house.connect(), house.connect()
    reading.begin(ASKED["plain"])
    waiting.begin(ASKED["plain"])
    play(house, [(30 * MS, ["a"]), (20 * MS, ["b"])])
    assert house.service.accountant.streams_active == 2
    waiting.leave()
    reading.leave()
    ledger = the_ledger(house)
    assert (ledger.ends["cancelled"], ledger.tokens, ledger.ttft.count, ledger.queue.count) == (2, 2, 1, 1)
    assert house.service.accountant.streams_active == 0


def test_time_in_the_queue_is_apart(carrier: Carriage) -> None:
    house = carrier.house(options=ServiceOptions(max_running=1))
    house.source.script = None
    house.connect().begin(ASKED["plain"])
    house.connect().begin(ASKED["plain"])
    play(house, [(300 * MS, ["a", StreamEnd()])])
    play(house, [(100 * MS, ["a", StreamEnd()])])
    assert [record.queue_ns for record in house.records] == [0, 300 * MS]
    assert [record.first_token_ns for record in house.records] == [300 * MS, 400 * MS]
    assert the_ledger(house).queue.total == 300 * MS


def test_reasoning_and_usage() -> None:
    house = Carriage("http").house()
    steps: Steps = [
        (10 * MS, [StreamStart("x", "tiny-1", 0)]),
        (20 * MS, [ReasoningDelta("hm", token_count=2)]),
        (30 * MS, [ReasoningDelta("ah")]),
        (10 * MS, [UsageReport(3, 11), StreamEnd()]),
    ]
    record = run(house, ASKED["chat"], steps)
    assert (record.first_token_ns, record.tokens, the_ledger(house).tokens) == (30 * MS, 11, 11)
    assert record.tpot_ns == 30 * MS / (11 - 2)


def test_tokens_that_say_nothing_are_counted_as_the_client_is_told(carrier: Carriage) -> None:
    house = carrier.house()
    stops = Asked("POST", "/chat", (JSON,), b'{"prompt": "hi", "stop": ["END"]}')
    record = run(house, stops, [(MS, ["a"]), (MS, ["E"]), (MS, ["ND"])])
    assert (record.end, record.tokens, the_ledger(house).tokens) == ("finished", 3, 3)


def test_an_empty_delta_is_no_first_token_of_the_log_either(carrier: Carriage) -> None:
    house = carrier.house()
    record = run(house, ASKED["plain"], [(50 * MS, [ReasoningDelta("")]), (150 * MS, ["a"]), (MS, [StreamEnd()])])
    assert record.first_token_ns == the_ledger(house).ttft.total == 200 * MS


def test_a_model_that_a_client_made_up_is_no_label(carrier: Carriage) -> None:
    house = carrier.house(honours=frozenset({ANY_MODEL}))
    record = run(house, Asked("GET", f"{TARGET}&model=made-up"), STEADY)
    assert (record.model, record.model_label) == ("made-up", "unlisted")
    assert scrape(house)["tokenwire_tokens_total", labels(model="unlisted")] == 4
    assert run(house, ASKED["plain"], STEADY).model_label == "tiny-1"


def test_gaps_are_the_stream_s_over_all_choices() -> None:
    house = Carriage("http").house(honours=frozenset({"n"}))
    both = [TextDelta("a"), TextDelta("b", 1)]
    run(house, chat(True, n=2), [(10 * MS, both), (20 * MS, both), (20 * MS, [*both, StreamEnd()])])
    ledger = the_ledger(house)
    assert (ledger.event_gaps().count, ledger.event_gaps().total, ledger.tokens) == (5, 40 * MS, 6)


def test_a_refused_request_is_no_stream(carrier: Carriage) -> None:
    house = carrier.house()
    assert house.ask(Asked("POST", "/chat", (JSON,), b"{}")).status == 400
    assert not house.service.accountant.ledgers


def test_without_accounting_nothing_is_counted_and_streams_go_on(carrier: Carriage) -> None:
    house = carrier.house(options=ServiceOptions(accounting=False))
    record = run(house, ASKED["plain"], STEADY)
    assert (record.end, record.tokens, record.first_token_ns) == ("finished", 4, 200 * MS)
    assert (record.tpot_ns, record.gap_p99_ns, record.queue_ns) == (None, None, None)
    assert not house.service.accountant.ledgers
    assert house.ask(Asked("GET", "/metrics")).status == 404


# ------------------------------------------------------------------------------------------------------- delivery lag


def test_the_lag_is_read_once_a_batch_after_its_writes() -> None:
    house = Carriage("http").house()
    begin(house, ASKED["plain"])
    house.connect().begin(ASKED["plain"])
    read_at: list[int] = []

    def clock() -> int:
        read_at.append(house.now)
        return house.now + 70_000

    house.dispatcher._clock = clock
    house.dispatcher.deliver([(job.stream, ["a"]) for job in house.source.jobs], house.now)
    assert len(read_at) == 1
    lag = the_ledger(house).lag
    assert (lag.count, lag.total) == (2, 140_000)
    house.dispatcher.deliver([(house.source.jobs[0].stream, [UsageReport(1, 0)])], house.now)
    house.dispatcher.deliver([], house.now)
    assert the_ledger(house).lag.count == 2 + len(read_at) - 1


def test_what_waits_for_a_slow_reader_lags_until_it_is_handed_over() -> None:
    house = Carriage("http").house()
    house.source.script = None
    client = house.connect()
    assert isinstance(client, HttpClient)
    client.begin(ASKED["plain"])
    client.peer.room = 10
    house.say(house.source.jobs[0], "a")
    for _ in range(3):
        house.advance(5 * MS)
        house.say(house.source.jobs[0], "b")
    house.advance(7 * MS)
    client.peer.take()
    lag = the_ledger(house).lag
    assert (lag.count, lag.total) == (1, 17 * MS)
    assert the_ledger(house).event_gaps().total == 15 * MS


def test_a_batch_that_is_cut_into_turns_has_arrived_at_once() -> None:
    house = Carriage("http").house(options=ServiceOptions(max_running=STREAMS_PER_TURN + 1))
    house.source.script = None
    for _ in range(STREAMS_PER_TURN + 1):
        house.connect().begin(ASKED["plain"])
    house.dispatcher._clock = lambda: house.now
    arrived = house.now
    house.dispatcher.deliver([(job.stream, ["a"]) for job in house.source.jobs], arrived)
    house.now += 3 * MS
    house.dispatcher.deliver([(house.source.jobs[0].stream, ["b"])], house.now)
    house.dispatcher.resume(house.now)
    assert not house.dispatcher.deferred
    ledger = the_ledger(house)
    assert (ledger.ttft.count, ledger.ttft.total) == (STREAMS_PER_TURN + 1, 0)
    assert (ledger.lag.count, ledger.lag.total) == (STREAMS_PER_TURN + 2, 3 * MS)
    assert (ledger.event_gaps().count, ledger.event_gaps().total) == (1, 3 * MS)


# ------------------------------------------------------------------------------------------------------------ /metrics


def test_metrics_are_what_was_counted(carrier: Carriage) -> None:
    house = carrier.house()
    for _ in range(3):
        run(house, ASKED["plain"], STEADY)
    run(house, ASKED["chat"], [(9 * MS, ["a"]), (MS, [StreamError(ErrorKind.SERVER, "It broke.")])])
    begin(house, ASKED["plain"])
    play(house, [(40 * MS, ["a"]), (30 * MS, ["b"])])
    found = scrape(house)

    def value(name: str, dialect: str = "plain", **more: str) -> float:
        return found[f"tokenwire_{name}", labels(dialect, **more)]

    assert value("time_to_first_token_seconds_count") == 4
    assert value("time_to_first_token_seconds_sum") == pytest.approx(0.640)
    assert value("time_per_output_token_seconds_sum") == pytest.approx(0.065)
    assert (value("inter_token_latency_seconds_count"), value("inter_token_latency_seconds_sum")) == (10, 0.225)
    assert value("inter_token_latency_shared_seconds_sum") == 0.225
    assert (value("tokens_total"), value("tokens_total", "openai_chat")) == (14, 1)
    assert (value("streams_active"), value("streams_active", "openai_chat")) == (1, 0)
    assert value("streams_total", end="finished") == value("streams_good_total") == 3
    assert value("streams_total", "openai_chat", end="failed") == 1
    assert value("queue_seconds_count") == 4
    assert {value for (name, _), value in found.items() if name == "tokenwire_loop_lag_seconds_count"} == {0}
    ttft = ("gen_ai_server_time_to_first_token_seconds_count", labels("openai_chat"))
    assert (found[ttft], found[ttft[0], labels()]) == (0, 3)
    duration = "gen_ai_server_request_duration_seconds"
    assert (found[f"{duration}_count", labels()], found[f"{duration}_count", labels("openai_chat")]) == (3, 1)


def buckets(found: Found, name: str) -> list[tuple[float, float]]:
    rows = ((dict(named)["le"], value) for (key, named), value in found.items() if key == f"{name}_bucket")
    return sorted((float(le), value) for le, value in rows)


@pytest.mark.parametrize("name", ["tokenwire_inter_token_latency_seconds", "tokenwire_time_to_first_token_seconds"])
def test_bucket_counts_are_exact(name: str) -> None:
    house = Carriage("http").house()
    gaps = [(1 << octave) + off for octave in range(10, 33) for off in (-2, -1, 0, 1)]
    if name.startswith("tokenwire_inter"):
        begin(house, ASKED["plain"])
        play(house, [(0, ["a"]), *((gap, ["b"]) for gap in gaps)])
    else:
        for gap in gaps:
            run(house, ASKED["plain"], [(gap, ["a", StreamEnd()])])
    rows = buckets(scrape(house), name)
    assert [str(rows[-1][0]), int(rows[-1][1])] == ["inf", len(gaps)]
    assert [count for _, count in rows[:-1]] == [sum(gap <= round(le * 1e9) for gap in gaps) for le, _ in rows[:-1]]


@pytest.mark.parametrize(
    ("name", "standard"),
    [
        ("time_to_first_token", "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10"),
        ("time_per_output_token", "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5"),
        ("request_duration", "0.01 0.02 0.04 0.08 0.16 0.32 0.64 1.28 2.56 5.12 10.24 20.48 40.96 81.92"),
    ],
)
def test_the_standard_s_buckets_are_all_there_with_finer_ones(name: str, standard: str) -> None:
    house = Carriage("http").house()
    run(house, ASKED["plain"], [(10 * MS, ["a"]), (10 * MS, ["b", StreamEnd()])])
    rows = dict(buckets(scrape(house), f"gen_ai_server_{name}_seconds"))
    assert {float(bound) for bound in standard.split()} <= rows.keys()
    assert sum(bound < 0.01 for bound in rows) == 10
    assert rows[0.01] == (0 if name == "request_duration" else 1)
    assert rows[0.008] == 0


def test_metrics_are_guarded_like_any_page(carrier: Carriage) -> None:
    house = carrier.house()
    assert house.ask(Asked("GET", "/metrics", (("host", "evil.test"),))).status in (400, 403, 421)
    assert house.ask(Asked("POST", "/metrics")).status == 405
    assert house.ask(Asked("HEAD", "/metrics")).body == b""


def test_names_with_any_character_survive(carrier: Carriage) -> None:
    name = 'a"b\\c\nd é'
    house = carrier.house(models=[ModelCard(name)])
    run(house, ASKED["plain"], STEADY)
    assert scrape(house)["tokenwire_tokens_total", labels(model=name)] == 4


def test_the_text_of_the_format() -> None:
    family = Family(
        "a_total", "counter", "One\nand \\ two.", [Sample("a_total", (("x", "y"), ("z", "")), 3), Sample("b", (), 0.5)]
    )
    expected = b'# HELP a_total One\\nand \\\\ two.\n# TYPE a_total counter\na_total{x="y",z=""} 3\nb 0.5\n'
    assert encode([family]) == expected
    assert read(encode(families(Accountant())))["tokenwire_loop_lag_seconds_count", frozenset()] == 0


def test_a_model_that_nobody_has_is_no_label(carrier: Carriage) -> None:
    house = carrier.house()
    answer: Answer = house.ask(Asked("GET", f"{TARGET}&model=nonsense"))
    assert answer.status == 404
    assert not house.service.accountant.ledgers
