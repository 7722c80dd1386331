"""The rate benchmark compares like with like: its request gets one token from us, and the peer's constant answer is one too."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import anyio
from tests.carriers import Carriage, HttpClient

import request_rate
from request_rate import OURS, PEER, Rate, failed_targets
from tokenwire.core.dialects.plain import DIALECT
from tokenwire.core.events import ChoiceEnd, Event, StreamEnd, StreamStart, TextDelta, UsageReport

PEERS = Path(request_rate.__file__).parent / "peers"
ONE_TOKEN = [StreamStart, TextDelta, UsageReport, ChoiceEnd, StreamEnd]


def decoded(body: bytes) -> list[Event]:
    decoder = DIALECT.decoder()
    return [*decoder.receive_data(body), *decoder.receive_eof()]


def test_the_request_asks_for_one_token() -> None:
    house = Carriage("http").house()
    answer = HttpClient(house).ask_bytes(request_rate._request().replace(b"127.0.0.1", b"localhost"), "POST")
    assert (answer.status, answer.closed) == (200, False)
    assert sum(isinstance(event, TextDelta) for event in decoded(answer.body)) == 1
    assert [job.request.max_tokens for job in house.source.jobs] == [1]


def test_the_peer_answers_with_one_token() -> None:
    body = runpy.run_path(str(PEERS / "one_token_asgi.py"))["_EVENTS"]
    assert [type(event) for event in decoded(body)] == ONE_TOKEN


def test_the_peer_that_words_its_answer_says_the_same() -> None:
    body = request_rate._request().partition(b"\r\n\r\n")[2]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = runpy.run_path(str(PEERS / "one_token_json_asgi.py"))["app"]
    anyio.run(app, {"type": "http", "path": "/chat"}, receive, send)
    assert [type(event) for event in decoded(b"".join(message.get("body", b"") for message in sent))] == ONE_TOKEN


def rates(*by_cpu: float) -> list[Rate]:
    return [Rate(1.0, rate, 400.0) for rate in by_cpu]


def test_a_missed_target_is_told() -> None:
    assert failed_targets({OURS: rates(10, 30, 20), PEER: rates(10, 20, 25)}) == []
    (missed,) = failed_targets({OURS: rates(9, 30, 20), PEER: rates(10, 20, 25)})
    assert "0.90 times" in missed
    assert len(failed_targets({OURS: rates(1.0)})) == 1
    assert len(failed_targets({})) == 2
