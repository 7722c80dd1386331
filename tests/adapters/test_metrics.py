"""The accountant in somebody else's registry, and a server's log, metrics and loop lag on every loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.adapters.serving import MILLISECOND, SECOND, Push, Start, turns, until
from tests.carriers import Asked

from tokenwire.adapters.logs import JsonFormatter, facts_of, text_of
from tokenwire.adapters.loop_lag import watch_loop
from tokenwire.adapters.metrics import observe_active, observed, register
from tokenwire.adapters.runtime import log_record
from tokenwire.adapters.server import ServerOptions
from tokenwire.backends.base import Runtime
from tokenwire.backends.mock import MockBackend
from tokenwire.core.actions import Record
from tokenwire.core.contracts import Batch, Job, Sink, StreamHandle
from tokenwire.core.events import StreamEnd, TextDelta
from tokenwire.core.exposition import encode, families
from tokenwire.core.latency import Accountant
from tokenwire.core.request import GenerationRequest

pytestmark = pytest.mark.anyio

RECORD = Record(method="POST", path="/v1/chat/completions", status=200, end="finished", dialect="openai_chat",
                stream_id="chatcmpl-1", model="tiny-1", model_label="tiny-1",
                tokens=5, sent_bytes=900, first_token_ns=200 * MILLISECOND,
                duration_ns=281_500_000, queue_ns=3 * MILLISECOND, tpot_ns=20_123_456.7,
                gap_p99_ns=21 * MILLISECOND)  # fmt: skip


def counted() -> Accountant:
    accountant = Accountant()
    for end in ("finished", "finished", "cancelled"):
        trace = accountant.open("tiny-1", "plain", 0)
        for at in (200, 220, 245):
            trace.receive((TextDelta("a"),), at * MILLISECOND)
        trace.close(end, 300 * MILLISECOND)
    accountant.open("tiny-1", "plain", 0)
    return accountant


def samples(text: str) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ---------------------------------------------------------------------------------------------------------- registries


def test_a_registry_of_prometheus_says_what_our_own_exposition_says() -> None:
    accountant, registry = counted(), CollectorRegistry()
    collector = register(accountant, registry)
    theirs = samples(generate_latest(registry).decode())
    assert theirs == samples(encode(families(accountant)).decode())
    assert ("tokenwire_tokens_total", (("dialect", "plain"), ("model", "tiny-1")), 9.0) in theirs
    accountant.open("tiny-2", "plain", 0)
    assert samples(generate_latest(registry).decode()) > set()
    assert any(("model", "tiny-2") in labels for _, labels, _ in samples(generate_latest(registry).decode()))
    registry.unregister(collector)
    assert generate_latest(registry) == b""


def test_a_registry_takes_one_accountant_only() -> None:
    registry = CollectorRegistry()
    register(counted(), registry)
    with pytest.raises(ValueError, match="Duplicated"):
        register(counted(), registry)


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: list(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_opentelemetry_gets_each_stream_at_its_end() -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    passed_on: list[Record] = []
    log = observed(meter, passed_on.append)
    failed = Record(method="GET", path="/chat", status=200, end="failed", stream_id="tw1", model="made-up", dialect="plain",
                    model_label="unlisted", tokens=2, first_token_ns=5 * MILLISECOND, duration_ns=SECOND)  # fmt: skip
    for record in (RECORD, RECORD, failed, Record(method="GET", path="/healthz", status=200, end="answered")):
        log(record)
    found = points(reader)
    (ttft,) = found["gen_ai.server.time_to_first_token"]
    assert isinstance(ttft, HistogramDataPoint)
    assert (ttft.count, ttft.sum, 0.25 in ttft.explicit_bounds) == (2, 0.4, True)
    assert dict(ttft.attributes or {})["gen_ai.request.model"] == "tiny-1"
    (tpot,) = found["gen_ai.server.time_per_output_token"]
    assert tpot.sum == pytest.approx(2 * 0.0201234567)
    assert {point.attributes["gen_ai.request.model"] for point in found["gen_ai.server.request.duration"]} == {
        "tiny-1", "unlisted"}  # fmt: skip
    durations = {point.attributes.get("error.type"): point.sum for point in found["gen_ai.server.request.duration"]}
    assert durations == {None: pytest.approx(0.563), "failed": 1.0}
    assert sum(point.value for point in found["tokenwire.tokens"]) == 12
    assert len(passed_on) == 4


def test_opentelemetry_may_ask_how_many_streams_there_are() -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    observe_active(meter, counted(), Observation)
    observed(meter)(RECORD)
    (active,) = points(reader)["tokenwire.streams.active"]
    assert (active.value, dict(active.attributes)) == (
        1,
        {"gen_ai.request.model": "tiny-1", "tokenwire.dialect": "plain"},
    )


# ------------------------------------------------------------------------------------------------------------- the log


def test_a_stream_s_line() -> None:
    expected = (
        "POST /v1/chat/completions 200 finished dialect=openai_chat stream=chatcmpl-1 model=tiny-1 tokens=5 "
        "ttft_ms=200.0 ms=281.5 tpot_ms=20.1 gap_p99_ms=21.0 queue_ms=3.0 bytes=900"
    )
    assert text_of(facts_of(RECORD)) == expected
    refused = Record(method="GET", path="/x", status=404, end="refused", error="There is nothing at 'x'.")
    assert text_of(facts_of(refused)) == """GET /x 404 refused ms=0.0 error="There is nothing at 'x'.\""""


def test_a_stream_s_line_has_its_zeros() -> None:
    empty = Record(method="GET", path="/chat", status=0, end="cancelled", stream_id="tw1", model="m", dialect="plain")
    assert text_of(facts_of(empty)) == "GET /chat 0 cancelled dialect=plain stream=tw1 model=m tokens=0 ms=0.0 bytes=0"


def test_what_a_client_says_makes_no_line_and_no_fact() -> None:
    forged = Record(method="GET", path="/x\nGET / 200 finished", status=404, end="refused", model='a tokens=9 "b"')
    line = text_of(facts_of(forged))
    assert line == """GET '/x\\nGET / 200 finished' 404 refused model='a tokens=9 "b"' ms=0.0"""


def logged(caplog: pytest.LogCaptureFixture, log: Callable[[], None]) -> dict[str, Any]:
    caplog.set_level(logging.INFO)
    log()
    line = JsonFormatter().format(caplog.records[-1])
    assert "\n" not in line
    read: dict[str, Any] = json.loads(line)
    return read


def test_a_stream_s_line_as_json(caplog: pytest.LogCaptureFixture) -> None:
    line = logged(caplog, lambda: log_record(RECORD))
    assert line.pop("time")[10] == "T"
    assert line == {
        "level": "info", "logger": "tokenwire.access", "method": "POST", "path": "/v1/chat/completions", "status": 200,
        "end": "finished", "dialect": "openai_chat", "stream": "chatcmpl-1", "model": "tiny-1", "tokens": 5,
        "ttft_ms": 200.0, "ms": 281.5, "tpot_ms": 20.123, "gap_p99_ms": 21.0, "queue_ms": 3.0, "bytes": 900,
    }  # fmt: skip


def test_other_lines_as_json(caplog: pytest.LogCaptureFixture) -> None:
    line = logged(caplog, lambda: logging.getLogger("other").warning("%d things\nin two lines", 2))
    assert (line["level"], line["message"]) == ("warning", "2 things\nin two lines")

    def fail() -> None:
        try:
            int("broken")
        except ValueError:
            logging.getLogger("other").exception("oh")

    assert "ValueError: invalid literal" in logged(caplog, fail)["traceback"]


# ------------------------------------------------------------------------------------------------------------ loop lag


def test_the_loop_is_looked_at_once_a_second_while_there_are_streams() -> None:
    accountant = Accountant()
    clock = [1000 * SECOND]
    due: list[tuple[int, Callable[[], None]]] = []
    watch_loop(accountant, lambda deadline, callback: due.append((deadline, callback)), lambda: clock[0])
    assert not due
    trace = accountant.open("tiny-1", "plain", clock[0])
    accountant.open("tiny-1", "plain", clock[0]).close("finished", clock[0])
    for late in (2 * MILLISECOND, 30 * MILLISECOND):
        ((deadline, callback),) = due
        due.clear()
        assert deadline == clock[0] + SECOND
        clock[0] = deadline + late
        callback()
    assert (accountant.loop_lag.count, accountant.loop_lag.total) == (2, 32 * MILLISECOND)
    trace.close("finished", clock[0])
    ((deadline, callback),) = due
    due.clear()
    accountant.open("tiny-1", "plain", clock[0]).close("finished", clock[0])
    assert not due
    clock[0] = deadline
    callback()
    assert not due
    accountant.open("tiny-1", "plain", clock[0])
    assert len(due) == 1


# ---------------------------------------------------------------------------------------------------------- the server


async def test_a_server_says_what_its_log_says(start: Start) -> None:
    async with start(MockBackend(ttft_ns=200 * MILLISECOND, itl_ns=20 * MILLISECOND)) as serving:
        client = serving.connect()
        client.ask(Asked("GET", "/chat?prompt=hi&max_tokens=5"))
        await until(lambda: serving.streams)
        serving.clock.advance(200 * MILLISECOND)
        await client.until(b'{"token":')
        serving.clock.advance(4 * 20 * MILLISECOND)
        await client.answer()
        assert "ttft_ms=200.0 ms=280.0 tpot_ms=20.0 gap_p99_ms=" in serving.access_lines[0]
        client.ask(Asked("GET", "/metrics"))
        found = {(name, value) for name, _, value in samples((await client.answer()).body.decode())}
        assert {("tokenwire_time_to_first_token_seconds_sum", 0.2), ("tokenwire_tokens_total", 5.0)} <= found
        assert ("tokenwire_delivery_lag_seconds_count", 5.0) in found


async def test_a_server_gives_its_records_to_whoever_is_named(start: Start) -> None:
    records: list[Record] = []
    push = Push()
    push.script = None
    async with start(push, ServerOptions(log=records.append)) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: push.jobs)
        push.say(push.jobs[0], "a", StreamEnd())
        await client.answer()
        await turns()
        assert [record.end for record in records] == ["finished"]
        assert serving.access == []


class Witness(MockBackend):
    """The mock, which writes down when it was asked for a stream and when it said each token of it."""

    _deliver: Callable[[Batch, int], None]

    def __init__(self) -> None:
        super().__init__(ttft_ns=200 * MILLISECOND, itl_ns=20 * MILLISECOND, jitter=0.5, seed=3)
        self.asked: dict[StreamHandle, int] = {}
        self.said: dict[StreamHandle, list[int]] = {}

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        self._deliver = sink.deliver
        super().attach(runtime, self)

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        self.asked[stream] = self._runtime.now()
        return super().start(stream, request)

    def deliver(self, batch: Batch, now: int) -> None:
        """Pass a step on."""
        steps = list(batch)
        for stream, items in steps:
            self.said.setdefault(stream, []).extend(now for item in items if isinstance(item, TextDelta))
        self._deliver(steps, now)


async def test_the_server_s_figures_are_the_mock_s_own(start: Start) -> None:
    witness = Witness()
    async with start(witness) as serving:
        clients = [serving.connect() for _ in range(5)]
        for number, client in enumerate(clients):
            client.ask(Asked("GET", f"/chat?prompt=hi{number}&max_tokens={20 + number}"))
        await until(lambda: len(witness.asked) == len(clients))
        for _ in range(80):
            serving.clock.advance(10 * MILLISECOND)
            await turns(2)
        for client in clients:
            await client.answer()
        clients[0].ask(Asked("GET", "/metrics"))
        found = {name: value for name, _, value in samples((await clients[0].answer()).body.decode())}
    ttft = [said[0] - witness.asked[stream] for stream, said in witness.said.items()]
    tpot = [round((said[-1] - said[0]) / (len(said) - 1)) for said in witness.said.values()]
    assert found["tokenwire_time_to_first_token_seconds_sum"] == pytest.approx(sum(ttft) / 1e9, abs=1e-9)
    assert found["tokenwire_time_per_output_token_seconds_sum"] == pytest.approx(sum(tpot) / 1e9, abs=1e-9)
    assert found["tokenwire_inter_token_latency_seconds_count"] == sum(len(said) - 1 for said in witness.said.values())
    assert found["tokenwire_tokens_total"] == sum(map(len, witness.said.values()))
