"""What the benchmarks send means what it should, whoever encodes it: nothing is timed that was not decoded first."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from typing import Any

import pytest
from tests.hot_path import ROWS, open_rig

import accounting
from encode import CONTENDERS
from encode_ratios import failed_targets
from tokenwire.core.dialects.openai_chat import DIALECT
from tokenwire.core.events import TextDelta
from tokenwire.core.latency import Trace
from tokenwire.core.sse import Decoder
from workloads import CHUNK_ID, MODEL, WORKLOADS, http_chunk, openai_chunk, openai_chunk_payload

INSTALLED = [name for name, contender in CONTENDERS.items() if contender.is_installed]
by_contender = pytest.mark.parametrize("name", INSTALLED)
by_workload = pytest.mark.parametrize("workload", WORKLOADS)


def encoded(name: str, workload: str) -> list[bytes]:
    """Encode a workload by a contender, and take each token's bytes out of their HTTP chunk."""
    contender = CONTENDERS[name]
    wire = contender.start()([contender.prepare(token) for token in WORKLOADS[workload]])
    return [unchunk(data, constant_size=name == "bare concatenation") for data in wire]


def unchunk(data: bytes, *, constant_size: bool) -> bytes:
    """Take the payload out of one HTTP chunk."""
    size, _, rest = data.partition(b"\r\n")
    payload = rest.removesuffix(b"\r\n")
    assert len(payload) == len(rest) - 2
    assert constant_size or len(payload) == int(size, 16)
    return payload


def sse_objects(payloads: list[bytes]) -> list[Any]:
    """Decode server-sent events, and the JSON in them by the standard library."""
    decoder = Decoder()
    return [json.loads(event.data) for payload in payloads for event in decoder.receive_data(payload)]


@by_workload
def test_each_workload_has_its_expected_decoding(workload: str) -> None:
    tokens = WORKLOADS[workload]
    assert len(tokens) == 1000
    assert [json.loads(token.escaped) for token in tokens] == [token.text for token in tokens]


def test_tokenwire_and_what_the_standard_library_can_do_are_always_compared() -> None:
    own = {"bare concatenation", "tokenwire", "tokenwire, the whole line", "json.dumps and f-string"}
    assert own <= set(INSTALLED)


@by_workload
@by_contender
def test_every_contender_carries_the_same_content(name: str, workload: str) -> None:
    payloads = encoded(name, workload)
    assert len(payloads) == len(WORKLOADS[workload])
    assert sse_objects(payloads) == [openai_chunk(token.text) for token in WORKLOADS[workload]]


@by_workload
@by_contender
def test_our_decoder_reads_every_contender(name: str, workload: str) -> None:
    decoder = DIALECT.decoder()
    events = [event for payload in encoded(name, workload) for event in decoder.receive_data(payload)]
    texts = [event.text for event in events if isinstance(event, TextDelta) and event.text]
    assert texts == [token.text for token in WORKLOADS[workload]]


def test_the_servers_payload_is_what_the_mock_sends() -> None:
    assert sse_objects([openai_chunk_payload()]) == [openai_chunk(" token")]
    with open_rig(ROWS[0], 1) as rig:
        for _ in range(8):
            rig.step()
        (answer,) = rig.received()
    events = [
        event + b"\n\n" for event in answer.split(b"data: ")[2:] for event in [b"data: " + event.split(b"\n\n")[0]]
    ]
    (first, *_) = sse_objects(events)
    assert first | {"id": CHUNK_ID, "created": 0, "choices": []} == openai_chunk("") | {"created": 0, "choices": []}
    assert len(first["id"]) == len(CHUNK_ID)
    assert first["model"] == MODEL
    mean = statistics.mean(map(len, events))
    assert abs(mean / len(openai_chunk_payload()) - 1) < 0.02
    assert http_chunk(openai_chunk_payload()) == b"%x\r\n%b\r\n" % (len(openai_chunk_payload()), openai_chunk_payload())


def test_a_missed_target_is_told() -> None:
    good = {"bare concatenation": 100.0, "tokenwire": 300.0, "sse-starlette over json.dumps": 6000.0}
    assert failed_targets(good) == []
    assert len(failed_targets(good | {"tokenwire": 301.0})) == 2
    assert len(failed_targets(good | {"bare concatenation": 99.0})) == 1


# ---------------------------------------------------------------------------------------------------------- accounting


@pytest.mark.parametrize("pace", accounting.PACES)
def test_the_accountant_counts_every_pace_that_is_timed(pace: str) -> None:
    arrivals = accounting.PACES[pace]
    gaps = [after - before for before, after in pairwise(arrivals)]
    trace = Trace(arrivals[0])
    for now in arrivals:
        trace.receive_token(now)
    counted = trace.ledger.event_gaps()
    assert (counted.count, counted.total, trace.longest_ns) == (len(gaps), sum(gaps), max(gaps))
    assert trace.itl_sd_ns == pytest.approx(statistics.pstdev(gaps))


def test_a_missed_target_of_the_accountant_is_told() -> None:
    assert accounting.failed_targets("jitter", {"tokenwire": 70, "ddsketch": 100, "hdrh": 175}) == []
    told = accounting.failed_targets("jitter", {"tokenwire": 71, "ddsketch": 100, "hdrh": 177})
    assert told == ["jitter: 0.71 times ddsketch, over 0.7", "jitter: 0.40 times hdrh, over 0.4"]
