"""Models that a backend learns while it runs, and names that only it can judge; through every carrier."""

from __future__ import annotations

import json

from tests.carriers import Asked, Carriage

from tokenwire.core.contracts import ANY_MODEL, ModelCard

CHAT = "/v1/chat/completions"


def ask(model: str) -> Asked:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]})
    return Asked("POST", CHAT, (("content-type", "application/json"),), body.encode())


def plain() -> Asked:
    return Asked("POST", "/chat", (("content-type", "application/json"),), b'{"prompt":"hi"}')


def test_the_list_is_what_it_is_at_the_time(carrier: Carriage) -> None:
    models: list[ModelCard] = []
    house = carrier.house(models=models)
    assert house.ask(Asked("GET", "/v1/models")).json()["data"] == []
    assert house.ask(ask("new")).status == 404
    models.append(ModelCard("new"))
    assert [model["id"] for model in house.ask(Asked("GET", "/v1/models")).json()["data"]] == ["new"]
    assert house.ask(Asked("GET", "/v1/models/new")).json()["id"] == "new"
    assert house.ask(ask("new")).status == 200
    assert house.ask(plain()).status == 200
    assert [job.request.model for job in house.source.jobs] == ["new", "new"]


def test_a_request_without_a_name_is_passed_on_without_one_while_none_is_known(carrier: Carriage) -> None:
    house = carrier.house(models=[])
    assert house.ask(plain()).status == 200
    assert [job.request.model for job in house.source.jobs] == [""]


def test_a_name_that_only_the_backend_can_judge_is_passed_on(carrier: Carriage) -> None:
    house = carrier.house(honours=frozenset({ANY_MODEL}))
    assert house.ask(ask("unheard-of")).status == 200
    assert [job.request.model for job in house.source.jobs] == ["unheard-of"]
    assert house.ask(Asked("GET", "/v1/models/unheard-of")).status == 404
    assert house.ask(ask("tiny-1")).status == 200
    accounted = {model for model, _ in house.service.accountant.ledgers}
    assert accounted == {"unlisted", "tiny-1"}


def test_a_name_that_is_not_listed_is_refused_otherwise(carrier: Carriage) -> None:
    house = carrier.house(honours=frozenset({"model"}))
    assert house.ask(ask("unheard-of")).status == 404
