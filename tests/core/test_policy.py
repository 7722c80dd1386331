"""What may be asked and what is answered, through every carrier: routes, limits, refusals, queue, drain, hosts, origins.

Every refusal is asked for in the same way: the right status, the error in the shape of the path's dialect, one Record,
nothing of a traceback, and the next request is served.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.carriers import HOST, SECOND, Answer, Asked, Carriage, House, HttpClient, request_bytes

from tokenwire.core.actions import Record
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.dialects.base import MAX_JSON_DEPTH, MAX_MESSAGES
from tokenwire.core.events import (
    ChoiceEnd,
    ErrorKind,
    FinishReason,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    TextDelta,
    UsageReport,
)
from tokenwire.core.guard import LOOPBACK_HOSTS, Guard
from tokenwire.core.http import MAX_HEAD_BYTES
from tokenwire.core.service import ServiceOptions
from tokenwire.core.stream import Item

JSON = (("content-type", "application/json"),)
PLAIN, CHAT = "/chat", "/v1/chat/completions"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
TRACES = (b"Traceback", b'File "', b".py", b"msgspec", b"object at 0x")


def post(path: str, body: bytes, *headers: tuple[str, str]) -> Asked:
    return Asked("POST", path, (*JSON, *headers), body)


def plain(*headers: tuple[str, str], **fields: Any) -> Asked:
    return post(PLAIN, json.dumps({"prompt": "hello"} | fields).encode(), *headers)


def chat(*headers: tuple[str, str], **fields: Any) -> Asked:
    return post(CHAT, json.dumps({"model": "tiny-1", "messages": MESSAGES} | fields).encode(), *headers)


def data_of(answer: Answer) -> list[str]:
    """The data of each SSE event."""
    return [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]


def text_of(answer: Answer) -> str:
    """What a reader of plain.v1 puts together."""
    return "".join(json.loads(data)["token"] for data in data_of(answer) if data != "[DONE]")


def check_error(answer: Answer, status: int, path: str) -> dict[str, Any]:
    """Check what every refusal has in common; return its error object."""
    assert answer.status == status
    assert answer.whole
    assert answer.header("content-type") == "application/json"
    assert answer.header("date") == "Tue, 14 Nov 2023 22:13:20 GMT"
    error: dict[str, Any] = answer.json()["error"]
    assert answer.json() == {"error": error}
    members = {"message", "type", "param", "code"}
    assert set(error) == (members if path.startswith("/v1/") else members | {"retryable"})
    assert error["message"]
    assert error["code"]
    assert not any(trace in answer.body for trace in TRACES)
    return error


def check_record(answer: Answer, status: int, end: str, **facts: object) -> Record:
    (record,) = answer.records
    assert (record.status, record.end) == (status, end)
    for name, value in facts.items():
        assert getattr(record, name) == value, name
    return record


def check_serves(house: House) -> None:
    """The next request is served, on the same connection where that goes on, else on a new one."""
    answer = house.ask(plain())
    assert answer.status == 200
    assert text_of(answer) == "Hello"
    check_record(answer, 200, "finished", tokens=2)


# --------------------------------------------------------------------------------------------------------- bad bodies

DEEP = b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1)
MANY = json.dumps([{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)).encode()
CONVERSATION = b'"messages":[{"role":"user","content":"hello"}]'

# A body, the words that its refusal must have, and the parameter that it names.
BAD_PLAIN: dict[str, tuple[bytes, Sequence[str], str | None]] = {
    "empty": (b"", ["Missing required parameter", "prompt"], "prompt"),
    "not-json": (b"{'prompt': 1}", ["not valid JSON"], None),
    "cut": (b'{"prompt":"hel', ["not valid JSON"], None),
    "not-utf8": (b'{"prompt":"\xff"}', ["not UTF-8"], None),
    "surrogate": (b'{"prompt":"\\ud800"}', ["surrogate"], None),
    "array": (b"[]", ["JSON object"], None),
    "deep": (b'{"prompt":' + DEEP + b"}", ["deeper", str(MAX_JSON_DEPTH)], None),
    "very-deep": (b'{"x":' * 100_000, ["deeper", str(MAX_JSON_DEPTH)], None),
    "no-prompt": (b"{}", ["Missing required parameter", "prompt"], "prompt"),
    "prompt-type": (b'{"prompt":5}', ["'prompt'", "expected `str`", "got `int`"], "prompt"),
    "tokens-type": (b'{"prompt":"a","max_tokens":"5"}', ["'max_tokens'", "`int`", "got `str`"], "max_tokens"),
    "tokens-range": (b'{"prompt":"a","max_tokens":0}', ["'max_tokens'", ">= 1"], "max_tokens"),
    "no-messages": (b'{"messages":[]}', ["'messages'", "length >= 1"], "messages"),
    "many-messages": (b'{"messages":' + MANY + b"}", ["'messages'", f"length <= {MAX_MESSAGES}"], "messages"),
    "two-answers": (b'{"prompt":"a","n":2}', ["'n'"], "n"),
    "model": (b'{"prompt":"a","model":"nope"}', ["'nope'", "does not exist"], "model"),
}

BAD_CHAT: dict[str, tuple[bytes, Sequence[str], str | None]] = {
    "empty": (b"", ["not valid JSON"], None),
    "not-json": (b"hello", ["not valid JSON"], None),
    "deep": (b'{"messages":' + DEEP + b"}", ["deeper", str(MAX_JSON_DEPTH)], None),
    "no-model": (b"{" + CONVERSATION + b"}", ["Missing required parameter", "model"], "model"),
    "no-messages": (b'{"model":"tiny-1"}', ["Missing required parameter", "messages"], "messages"),
    "empty-messages": (b'{"model":"tiny-1","messages":[]}', ["'messages'", "length >= 1"], "messages"),
    "role": (b'{"model":"tiny-1","messages":[{"role":"x","content":""}]}', ["'x'"], "messages[0].role"),
    "role-type": (b'{"model":"tiny-1","messages":[{"role":1,"content":""}]}', ["`str`", "`int`"], "messages[0].role"),
    "no-role": (b'{"model":"tiny-1","messages":[{"content":""}]}', ["Missing"], "messages[0].role"),
    "no-content": (b'{"model":"tiny-1","messages":[{"role":"user"}]}', ["Missing"], "messages[0].content"),
    "stream-type": (b'{"model":"tiny-1","stream":"yes",' + CONVERSATION + b"}", ["`bool`", "`str`"], "stream"),
    "temperature": (b'{"model":"tiny-1","temperature":3,' + CONVERSATION + b"}", ["<= 2"], "temperature"),
    "n": (b'{"model":"tiny-1","n":2,' + CONVERSATION + b"}", ["'n'"], "n"),
    "tools": (
        b'{"model":"tiny-1","tools":[{"type":"function","function":{"name":"f"}}],' + CONVERSATION + b"}",
        ["'tools'", "cannot be honoured"],
        "tools",
    ),
    "model": (b'{"model":"nope",' + CONVERSATION + b"}", ["'nope'", "does not exist"], "model"),
}

BAD_BODIES = [
    pytest.param(path, *row, id=f"{path}-{name}")
    for path, rows in ((PLAIN, BAD_PLAIN), (CHAT, BAD_CHAT))
    for name, row in rows.items()
]


@pytest.mark.parametrize(("path", "body", "words", "param"), BAD_BODIES)
def test_a_bad_body_is_refused(
    carrier: Carriage, path: str, body: bytes, words: Sequence[str], param: str | None
) -> None:
    house = carrier.house()
    answer = house.ask(post(path, body))
    unknown_model = param == "model" and b"nope" in body
    error = check_error(answer, 404 if unknown_model else 400, path)
    assert [word for word in words if word not in error["message"]] == []
    assert error["param"] == param
    assert error["type"] == ("not_found_error" if unknown_model else "invalid_request_error")
    if unknown_model:
        assert error["code"] == "model_not_found"
    record = check_record(answer, answer.status, "refused", method="POST", path=path, tokens=0, stream_id=None)
    assert record.dialect == ("plain" if path == PLAIN else "openai_chat")
    assert not answer.closed
    assert house.source.jobs == []
    check_serves(house)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(
    ["prompt", "messages", "model", "max_tokens", "stop", "n", "stream", "temperature", "tools", "logit_bias", "x\n"]
)
bodies = st.binary(max_size=40) | st.dictionaries(field_names, json_values, max_size=5).map(
    lambda value: json.dumps(value).encode()
)


@given(st.sampled_from([PLAIN, CHAT]), bodies)
def test_any_body_is_served_or_refused(path: str, body: bytes) -> None:
    house = Carriage("http").house()
    answer = house.ask(post(path, body))
    assert len(answer.records) == 1
    if answer.status == 200:
        assert answer.records[0].end == "finished"
    else:
        assert 400 <= answer.status < 500
        check_error(answer, answer.status, path)
    check_serves(house)


@pytest.mark.parametrize("path", [PLAIN, CHAT])
@pytest.mark.parametrize("announced", [True, False], ids=["length", "chunked"])
def test_a_body_over_the_limit(carrier: Carriage, path: str, announced: bool) -> None:
    house = carrier.house(options=ServiceOptions(max_body_bytes=100))
    body = json.dumps({"prompt": "a" * 100}).encode()
    asked = post(path, body) if announced else post(path, in_chunks(body), ("transfer-encoding", "chunked"))
    answer = house.ask(asked)
    error = check_error(answer, 413, path)
    assert error["code"] == "request_too_large"
    assert "100 bytes" in error["message"]
    assert answer.closed  # the rest of the body is not read
    check_record(answer, 413, "refused", method="POST", path=path)
    check_serves(house)


def test_a_body_at_the_limit(carrier: Carriage) -> None:
    body = json.dumps({"prompt": "a" * 100}).encode()
    answer = carrier.house(options=ServiceOptions(max_body_bytes=len(body))).ask(post(PLAIN, body))
    assert answer.status == 200


def in_chunks(body: bytes, size: int = 30) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# ------------------------------------------------------------------------------------------------------------- routes


@pytest.mark.parametrize("path", ["/nope", "/chat/", "//chat", "/v1/", "/v1/nope", "/v1/models/nope", "/ws/none"])
@pytest.mark.parametrize("body", [b"", b"{}"], ids=["bare", "body"])
def test_an_unknown_path(carrier: Carriage, path: str, body: bytes) -> None:
    house = carrier.house()
    answer = house.ask(Asked("GET", f"{path}?secret=1", (), body))
    error = check_error(answer, 404, path)
    assert error["code"] == ("model_not_found" if path.startswith("/v1/models/") else "not_found")
    assert b"secret" not in answer.body
    check_record(answer, 404, "refused", method="GET", path=path)
    assert not answer.closed
    check_serves(house)


METHODS = {
    PLAIN: {"GET", "POST", "OPTIONS"},
    CHAT: {"POST", "OPTIONS"},
    "/v1/models": {"GET", "HEAD", "OPTIONS"},
    "/v1/models/tiny-1": {"GET", "HEAD", "OPTIONS"},
    "/healthz": {"GET", "HEAD", "OPTIONS"},
    "/readyz": {"GET", "HEAD", "OPTIONS"},
    "/": {"GET", "HEAD", "OPTIONS"},
}


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "BREW", "get"])
def test_a_wrong_method(carrier: Carriage, path: str, method: str) -> None:
    if method in METHODS[path]:
        return
    house = carrier.house()
    answer = house.ask(Asked(method, path))
    if method == "HEAD":
        assert answer.status == 405
        assert answer.body == b""
    else:
        error = check_error(answer, 405, path)
        assert error["code"] == "method_not_allowed"
        assert method in error["message"]
    allowed = answer.header("allow")
    assert allowed is not None
    assert set(allowed.split(", ")) == METHODS[path]
    check_record(answer, 405, "refused", method=method, path=path)
    check_serves(house)


@pytest.mark.parametrize("path", [PLAIN, CHAT])
@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", ""],
)
def test_an_unsupported_media_type(carrier: Carriage, path: str, content_type: str) -> None:
    house = carrier.house()
    answer = house.ask(Asked("POST", path, (("content-type", content_type),), b"{}"))
    error = check_error(answer, 415, path)
    assert error["code"] == "unsupported_media_type"
    assert "application/json" in error["message"]
    check_record(answer, 415, "refused", method="POST", path=path)
    assert not answer.closed
    check_serves(house)


@pytest.mark.parametrize("path", [PLAIN, CHAT])
def test_a_missing_media_type(carrier: Carriage, path: str) -> None:
    house = carrier.house()
    answer = house.ask(Asked("POST", path, (), b"{}"))
    assert "missing" in check_error(answer, 415, path)["message"]
    check_serves(house)


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_media_types_that_are_json(carrier: Carriage, content_type: str) -> None:
    house = carrier.house()
    assert house.ask(Asked("POST", PLAIN, (("content-type", content_type),), b'{"prompt":"a"}')).status == 200


def test_a_streamed_answer(carrier: Carriage) -> None:
    house = carrier.house()
    answer = house.ask(plain())
    assert answer.status == 200
    assert answer.whole
    assert not answer.closed
    assert answer.header("content-type") == "text/event-stream"
    assert answer.header("cache-control") == "no-cache, no-transform"
    assert answer.header("x-accel-buffering") == "no"
    assert answer.header("x-request-id") == "tw0001"
    assert answer.header("content-length") is None
    assert data_of(answer)[-1] == "[DONE]"
    assert text_of(answer) == "Hello"
    record = check_record(answer, 200, "finished", method="POST", path=PLAIN, dialect="plain", model="tiny-1", tokens=2)
    assert record.stream_id == "tw0001"
    assert record.sent_bytes >= len(answer.body)
    assert record.error is None
    check_serves(house)


def test_a_streamed_chat_answer(carrier: Carriage) -> None:
    house = carrier.house()
    answer = house.ask(chat(stream=True, stream_options={"include_usage": True}))
    assert answer.header("content-type") == "text/event-stream"
    chunks = [json.loads(data) for data in data_of(answer)[:-1]]
    assert data_of(answer)[-1] == "[DONE]"
    assert {chunk["id"] for chunk in chunks} == {answer.header("x-request-id")} == {"chatcmpl-0001"}
    assert {chunk["model"] for chunk in chunks} == {"tiny-1"}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "Hello"
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    check_record(answer, 200, "finished", dialect="openai_chat", model="tiny-1", tokens=2)


@pytest.mark.parametrize("asked", [plain(stream=False), chat()], ids=["plain", "chat"])
def test_a_whole_answer(carrier: Carriage, asked: Asked) -> None:
    house = carrier.house()
    answer = house.ask(asked)
    assert answer.status == 200
    assert answer.header("content-type") == "application/json"
    assert answer.header("content-length") == str(len(answer.body))
    said = answer.json()["text"] if asked.target == PLAIN else answer.json()["choices"][0]["message"]["content"]
    assert said == "Hello"
    check_record(answer, 200, "finished", tokens=2, sent_bytes=answer.records[0].sent_bytes)
    check_serves(house)


def test_a_prompt_in_the_query(carrier: Carriage) -> None:
    house = carrier.house()
    answer = house.ask(Asked("GET", "/chat?prompt=a%20b%26c&max_tokens=5&model=tiny-2"))
    assert text_of(answer) == "Hello"
    (job,) = house.source.jobs
    assert job.request.prompt == "a b&c"
    assert job.request.max_tokens == 5
    assert job.request.model == "tiny-2"
    check_record(answer, 200, "finished", method="GET", path=PLAIN, model="tiny-2")


def test_the_default_model(carrier: Carriage) -> None:
    house = carrier.house()
    house.ask(plain())
    assert house.source.jobs[0].request.model == "tiny-1"


# --------------------------------------------------------------------------------------------- clients that ask again

EVENT_SOURCE = Asked("GET", "/chat?prompt=a", (("host", "127.0.0.1"), ("accept", "text/event-stream")))


def test_an_event_source_hears_an_id_before_the_backend_runs(carrier: Carriage) -> None:
    house = carrier.house()
    house.source.script = None
    client = house.connect()
    client.begin(EVENT_SOURCE)
    answer = client.answer()
    assert (answer.status, answer.whole) == (200, False)
    assert answer.body == b'data: {"token":""}\nid: tw0001.0\nretry: 1000\n\n'


def test_a_failure_is_an_event_for_an_event_source_for_it_cannot_read_a_status(carrier: Carriage) -> None:
    house = carrier.house()
    house.source.fault = RuntimeError("secret")
    answer = house.ask(EVENT_SOURCE)
    assert answer.status == 200
    first, failure, done, _ = answer.body.split(b"\n\n")
    assert b'"error"' in failure
    assert b"secret" not in answer.body
    assert (first.count(b"\nretry: "), failure.count(b"\nretry: "), done) == (1, 0, b"data: [DONE]")


@pytest.mark.parametrize("headers", [(), (("accept", "*/*"),)], ids=["none", "any"])
def test_other_clients_get_a_failure_before_the_first_token_as_a_status(
    carrier: Carriage, headers: tuple[tuple[str, str], ...]
) -> None:
    house = carrier.house()
    house.source.fault = RuntimeError("secret")
    assert house.ask(Asked("GET", "/chat?prompt=a", (("host", "127.0.0.1"), *headers))).status == 500


@pytest.mark.parametrize("target", ["/chat", "/chat?prompt=hello"])
def test_a_reconnect_that_cannot_resume_is_stopped(carrier: Carriage, target: str) -> None:
    house = carrier.house()
    answer = house.ask(Asked("GET", target, (("last-event-id", "tw0001.3"),)))
    assert answer.status == 204
    assert answer.body == b""
    assert answer.header("content-length") is None
    check_record(answer, 204, "answered", method="GET", path=PLAIN)
    assert house.source.jobs == []  # the prompt does not run again
    check_serves(house)


def test_a_reconnect_with_a_body_is_stopped(carrier: Carriage) -> None:
    house = carrier.house()
    assert house.ask(plain(("last-event-id", "tw0001.3"))).status == 204
    assert house.source.jobs == []
    check_serves(house)


def test_models(carrier: Carriage) -> None:
    house = carrier.house()
    answer = house.ask(Asked("GET", "/v1/models"))
    assert answer.status == 200
    assert [model["id"] for model in answer.json()["data"]] == ["tiny-1", "tiny-2"]
    assert answer.json()["object"] == "list"
    check_record(answer, 200, "answered", method="GET", path="/v1/models")
    one = house.ask(Asked("GET", "/v1/models/tiny%2D2"))
    assert one.json()["id"] == "tiny-2"
    check_serves(house)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/v1/models/tiny-1", "/", "/v1/models/nope"])
def test_head_is_get_without_a_body(carrier: Carriage, path: str) -> None:
    house = carrier.house(options=ServiceOptions(page=b"<p>hello"))
    got, head = house.ask(Asked("GET", path)), house.ask(Asked("HEAD", path))
    assert got.body
    assert head.body == b""
    assert (head.status, head.headers) == (got.status, got.headers)
    assert head.header("content-length") == str(len(got.body))
    assert len(head.records) == 1
    check_serves(house)


def test_the_page(carrier: Carriage) -> None:
    answer = carrier.house(options=ServiceOptions(page=b"<p>hello")).ask(Asked("GET", "/"))
    assert answer.body == b"<p>hello"
    assert answer.header("content-type") == "text/html; charset=utf-8"
    assert "default-src 'self'" in (answer.header("content-security-policy") or "")
    check_error(carrier.house().ask(Asked("GET", "/")), 404, "/")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_is_open_to_every_host(carrier: Carriage, path: str) -> None:
    answer = carrier.house().ask(Asked("GET", path, (("host", "10.0.0.1:8000"), ("sec-fetch-site", "cross-site"))))
    assert answer.status == 200
    assert answer.json()["status"] in {"ok", "ready"}
    check_record(answer, 200, "answered", path=path)


# --------------------------------------------------------------------------------------------------- ignored parameters


def test_parameters_without_effect_are_named(carrier: Carriage) -> None:
    house = carrier.house()
    answer = house.ask(plain(temperature=0.5, seed=1, foo=1, **{"bad\r\nname": 1}))
    assert answer.status == 200
    assert answer.header("x-tokenwire-ignored") == "temperature, seed, foo, bad??name"
    assert house.ask(chat(temperature=0.5, store=True)).header("x-tokenwire-ignored") == "temperature, store"


def test_parameters_with_an_effect_are_not_named(carrier: Carriage) -> None:
    house = carrier.house(honours=frozenset({"temperature", "n"}))
    answer = house.ask(plain(temperature=0.5, max_tokens=5, stop=["x"]))
    assert answer.header("x-tokenwire-ignored") is None
    house.source.script = lambda _: [["a", TextDelta("b", 1)], [StreamEnd()]]
    two = house.ask(chat(n=2, temperature=1.5))
    assert [choice["message"]["content"] for choice in two.json()["choices"]] == ["a", "b"]
    assert two.header("x-tokenwire-ignored") is None


def test_the_core_honours_stop_and_max_tokens(carrier: Carriage) -> None:
    house = carrier.house()
    assert text_of(house.ask(plain(stop="llo"))) == "He"
    short = house.ask(plain(max_tokens=1))
    assert text_of(short) == "Hel"
    assert json.loads(data_of(short)[-2])["finish_reason"] == "length"
    assert [job.cancels for job in house.source.jobs] == [1, 1]


# ------------------------------------------------------------------------------------------------- hosts and origins


@pytest.mark.parametrize("host", ["evil.test", "127.0.0.1.evil.test:8000", "192.168.0.1:8000", "localhost.", "[::2]"])
@pytest.mark.parametrize("target", ["/chat?prompt=a", "/v1/models", "/nope", "/"])
def test_a_foreign_host_is_refused(carrier: Carriage, host: str, target: str) -> None:
    house = carrier.house(options=ServiceOptions(page=b"<p>"))
    answer = house.ask(Asked("GET", target, (("host", host),)))
    error = check_error(answer, 403, target)
    assert error["code"] == "host_not_allowed"
    assert "--allow-host" in error["message"]
    check_record(answer, 403, "refused")
    assert house.source.jobs == []
    check_serves(house)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_a_loopback_host_is_served(carrier: Carriage, host: str) -> None:
    assert carrier.house().ask(Asked("GET", "/chat?prompt=a", (("host", host),))).status == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.test", "null", "http://localhost.evil.test", "http://[", "file://", ""]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_foreign_origin_is_refused(carrier: Carriage, origin: str, method: str) -> None:
    house = carrier.house()
    body = b'{"prompt":"a"}' if method == "POST" else b""
    answer = house.ask(Asked(method, "/chat?prompt=a", (*JSON, ("origin", origin)), body))
    assert check_error(answer, 403, PLAIN)["code"] == "origin_not_allowed"
    assert answer.header("access-control-allow-origin") is None
    assert len(answer.records) == 1
    assert house.source.jobs == []
    check_serves(house)


@pytest.mark.parametrize("origin", [f"http://{HOST}", "http://localhost:3000", "https://127.0.0.1", "http://[::1]:9"])
def test_a_local_page_may_read_the_answer(carrier: Carriage, origin: str) -> None:
    house = carrier.house()
    for asked in (plain(("origin", origin)), Asked("GET", "/v1/models", (("origin", origin),))):
        answer = house.ask(asked)
        assert answer.status == 200
        assert answer.header("access-control-allow-origin") == origin
        assert answer.header("vary") == "origin"
        assert "x-tokenwire-ignored" in (answer.header("access-control-expose-headers") or "")


def test_a_refusal_can_be_read_by_an_allowed_page(carrier: Carriage) -> None:
    answer = carrier.house().ask(post(PLAIN, b"{}", ("origin", "http://localhost:3000")))
    check_error(answer, 400, PLAIN)
    assert answer.header("access-control-allow-origin") == "http://localhost:3000"


def test_without_an_origin_there_is_no_cors(carrier: Carriage) -> None:
    answer = carrier.house().ask(plain())
    assert not [name for name, _ in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", METHODS)
def test_a_preflight(carrier: Carriage, path: str) -> None:
    house = carrier.house()
    wants = (("access-control-request-method", "POST"), ("access-control-request-headers", "content-type"))
    answer = house.ask(Asked("OPTIONS", path, (("origin", "http://localhost:3000"), *wants)))
    assert answer.status == 204
    assert answer.body == b""
    assert set((answer.header("access-control-allow-methods") or "").split(", ")) == METHODS[path]
    assert set((answer.header("allow") or "").split(", ")) == METHODS[path]
    allowed = (answer.header("access-control-allow-headers") or "").split(", ")
    assert {"content-type", "authorization", "last-event-id"} <= set(allowed)
    assert answer.header("access-control-allow-origin") == "http://localhost:3000"
    assert int(answer.header("access-control-max-age") or 0) > 0
    check_record(answer, 204, "answered", method="OPTIONS", path=path)
    check_serves(house)


def test_an_allowed_origin_and_host(carrier: Carriage) -> None:
    guard = Guard(allowed_hosts=LOOPBACK_HOSTS | {"api.test"}, allowed_origins=frozenset({"https://app.test"}))
    house = carrier.house(options=ServiceOptions(guard=guard))
    answer = house.ask(plain(("host", "api.test"), ("origin", "https://app.test")))
    assert answer.status == 200
    assert answer.header("access-control-allow-origin") == "https://app.test"
    assert house.ask(plain(("origin", "https://other.test"))).status == 403


@pytest.mark.parametrize(
    ("site", "target", "status"),
    [
        ("cross-site", "/chat?prompt=a", 403),
        ("same-site", "/chat?prompt=a", 200),
        ("same-origin", "/chat?prompt=a", 200),
        ("none", "/chat?prompt=a", 200),
        ("cross-site", "/v1/models", 200),
        ("cross-site", "/", 200),
    ],
)
def test_a_cross_site_image_cannot_generate(carrier: Carriage, site: str, target: str, status: int) -> None:
    house = carrier.house(options=ServiceOptions(page=b"<p>"))
    answer = house.ask(Asked("GET", target, (("sec-fetch-site", site),)))
    assert answer.status == status
    if status == 403:
        assert check_error(answer, 403, target)["code"] == "cross_site_request"
        assert house.source.jobs == []
    assert len(answer.records) == 1
    check_serves(house)


# ----------------------------------------------------------------------------------------------------- queue and drain


def test_the_queue_is_bounded(carrier: Carriage) -> None:
    house = carrier.house(options=ServiceOptions(max_running=1, max_waiting=1, retry_after_ns=3 * SECOND // 2))
    house.source.script = None
    first, second = house.connect(), house.connect()
    for client in (first, second):
        client.begin(plain())
    assert len(house.source.jobs) == 1
    for asked in (plain(), chat()):
        answer = house.ask_on(house.connect(), asked)
        error = check_error(answer, 429, asked.target)
        assert error["code"] == "queue_full"
        assert error["type"] == "rate_limit_error"
        assert answer.header("retry-after") == "2"  # rounded up
        check_record(answer, 429, "refused")
    house.say(house.source.jobs[0], "one", StreamEnd())
    assert text_of(first.answer()) == "one"
    assert len(house.source.jobs) == 2  # the one that waited runs now
    house.say(house.source.jobs[1], "two", StreamEnd())
    assert text_of(second.answer()) == "two"
    assert house.service.admission.running == house.service.admission.waiting == 0


def test_a_place_in_the_queue_is_given_up_with_the_client(carrier: Carriage) -> None:
    house = carrier.house(options=ServiceOptions(max_running=1, max_waiting=1))
    house.source.script = None
    clients = [house.connect() for _ in range(2)]
    for client in clients:
        client.begin(plain())
    clients[1].leave()
    assert [record.end for record in house.records] == ["cancelled"]
    assert house.service.admission.waiting == 0
    clients[0].leave()
    assert house.service.admission.running == 0
    assert [job.cancels for job in house.source.jobs] == [1]
    assert house.dispatcher.streams == 0


def test_a_waiting_stream_gets_heartbeats(carrier: Carriage) -> None:
    options = ServiceOptions(max_running=1, max_waiting=1, delivery=DeliveryOptions(heartbeat_ns=SECOND))
    house = carrier.house(options=options)
    house.source.script = None
    clients = [house.connect() for _ in range(2)]
    for client in clients:
        client.begin(plain())
    house.advance(SECOND)
    assert clients[1].answer().status == 200
    assert clients[1].answer().body == b": ka\n"


@pytest.mark.parametrize("path", [PLAIN, CHAT])
def test_draining(carrier: Carriage, path: str) -> None:
    house = carrier.house()
    house.source.script = None
    running = house.connect()
    running.begin(plain())
    house.say(house.source.jobs[0], "one")
    house.drain()
    answer = house.ask_on(house.connect(), plain() if path == PLAIN else chat())
    error = check_error(answer, 503, path)
    assert error["code"] == "server_shutdown"
    assert answer.header("retry-after") == "1"
    assert answer.closed
    check_record(answer, 503, "refused", path=path)
    house.say(house.source.jobs[0], " two", StreamEnd())
    assert text_of(running.answer()) == "one two"
    assert running.answer().whole
    assert running.closed is carrier.closes_late


def test_draining_shows_in_readyz_only(carrier: Carriage) -> None:
    house = carrier.house()
    assert house.ask(Asked("GET", "/readyz")).json() == {"status": "ready"}
    house.drain()
    check_error(house.ask(Asked("GET", "/readyz")), 503, "/readyz")
    assert house.ask(Asked("GET", "/healthz")).status == 200


def test_the_end_of_the_drain_is_an_error_that_clients_see(carrier: Carriage) -> None:
    house = carrier.house(options=ServiceOptions(max_running=2, max_waiting=1))
    house.source.script = None
    begun, held, waiting = (house.connect() for _ in range(3))
    for client in (begun, held, waiting):
        client.begin(plain())
    house.say(house.source.jobs[0], "one")
    house.dispatcher.shut_down(house.service.shutting_down(), house.now)
    error = json.loads(data_of(begun.answer())[-2])["error"]
    assert error["code"] == "server_shutdown"
    assert error["retryable"] is True
    for client in (held, waiting):
        assert check_error(client.answer(), 503, PLAIN)["code"] == "server_shutdown"
    assert [record.end for record in house.records] == ["failed"] * 3
    assert house.dispatcher.streams == 0
    assert len(house.source.jobs) == 2
    assert [job.cancels for job in house.source.jobs] == [1, 1]


# ------------------------------------------------------------------------------------------------- failing backends


@pytest.mark.parametrize("asked", [plain(), chat(stream=True), plain(stream=False), chat()])
def test_a_backend_that_cannot_start(carrier: Carriage, asked: Asked) -> None:
    house = carrier.house()
    house.source.fault = RuntimeError("secret of the engine")
    answer = house.ask(asked)
    error = check_error(answer, 500, asked.target)
    assert error["code"] == "backend_error"
    assert "secret" not in error["message"]
    check_record(answer, 500, "failed", path=asked.target, tokens=0, error=error["message"])
    ((fault, stream_id),) = house.reports
    assert fault is house.source.fault
    assert stream_id == answer.header("x-request-id") == answer.records[0].stream_id
    assert not answer.closed
    house.source.fault = None
    check_serves(house)


FAILURES = [
    (StreamError(ErrorKind.SERVER, "It broke.", "backend_error"), 500),
    (StreamError(ErrorKind.OVERLOADED, "Too much.", "engine_full", retry_after_ns=SECOND), 529),
    (StreamError(ErrorKind.INVALID_REQUEST, "Too long a prompt.", "context_length_exceeded", "messages"), 400),
    (StreamTruncated("upstream closed"), 500),
]


@pytest.mark.parametrize(("failure", "status"), FAILURES)
@pytest.mark.parametrize("begun", [False, True], ids=["nothing", "start"])
@pytest.mark.parametrize("asked", [plain(), chat(stream=True), plain(stream=False), chat()])
def test_an_error_before_the_first_token_is_a_status(
    carrier: Carriage, asked: Asked, begun: bool, failure: StreamError | StreamTruncated, status: int
) -> None:
    house = carrier.house()
    before: list[list[Item]] = [[StreamStart("x", "tiny-1", 0), UsageReport(5, 0)]] if begun else []
    house.source.script = lambda _: [*before, [failure]]
    answer = house.ask(asked)
    check_error(answer, status, asked.target)
    wait = failure.retry_after_ns if isinstance(failure, StreamError) else None
    assert answer.header("retry-after") == (None if wait is None else "1")
    check_record(answer, status, "truncated" if isinstance(failure, StreamTruncated) else "failed")
    assert not answer.closed
    house.source.script = lambda _: [["Hel"], ["lo"], [StreamEnd()]]
    check_serves(house)


@pytest.mark.parametrize(("failure", "status"), FAILURES)
@pytest.mark.parametrize("asked", [plain(), chat(stream=True)], ids=["plain", "chat"])
def test_an_error_after_the_first_token_is_an_event(
    carrier: Carriage, asked: Asked, failure: StreamError | StreamTruncated, status: int
) -> None:
    del status
    house = carrier.house()
    house.source.script = lambda _: [["Hel"], [failure]]
    answer = house.ask(asked)
    assert answer.status == 200
    assert answer.whole
    assert answer.closed is carrier.closes_late
    events = data_of(answer)
    if asked.target == PLAIN:
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["message"]
    else:
        # openai-python raises on an `error` member, and would take [DONE] for a good end.
        assert json.loads(events[-1])["error"]["message"]
        assert "[DONE]" not in events
    check_record(answer, 200, "truncated" if isinstance(failure, StreamTruncated) else "failed", tokens=1)
    house.source.script = lambda _: [["Hel"], ["lo"], [StreamEnd()]]
    check_serves(house)


@pytest.mark.parametrize("asked", [plain(stream=False), chat()], ids=["plain", "chat"])
def test_a_whole_answer_that_fails_late_is_a_status(carrier: Carriage, asked: Asked) -> None:
    house = carrier.house()
    house.source.script = lambda _: [["Hel"], [StreamError(ErrorKind.SERVER, "It broke.", "backend_error")]]
    answer = house.ask(asked)
    check_error(answer, 500, asked.target)
    check_record(answer, 500, "failed", tokens=1)


@pytest.mark.parametrize("asked", [plain(), chat(stream=True)], ids=["plain", "chat"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_backend_that_breaks_the_grammar(carrier: Carriage, asked: Asked, begun: bool) -> None:
    house = carrier.house()
    before: list[list[Item]] = [["Hel"]] if begun else []
    house.source.script = lambda _: [*before, [ChoiceEnd(3, FinishReason.STOP)], ["more"]]
    answer = house.ask(asked)
    if begun:
        assert answer.closed is carrier.closes_late
        assert b'"error"' in answer.body
    else:
        check_error(answer, 500, asked.target)
    check_record(answer, 200 if begun else 500, "failed")
    assert len(house.reports) == 1
    assert [job.cancels for job in house.source.jobs] == [1]
    house.source.script = lambda _: [["Hel"], ["lo"], [StreamEnd()]]
    check_serves(house)


def test_a_client_that_leaves(carrier: Carriage) -> None:
    house = carrier.house()
    house.source.script = None
    for asked in (plain(), chat(), chat(stream=True)):
        client = house.connect()
        client.begin(asked)
        job = house.source.jobs[-1]
        house.say(job, "Hel")
        client.leave()
        assert job.cancels == 1
        assert house.records[-1].end == "cancelled"
        assert house.records[-1].tokens == 1
        house.say(job, "lo", StreamEnd())  # an engine step that was under way
    assert len(house.records) == 3
    assert house.dispatcher.streams == house.service.admission.running == 0


# --------------------------------------------------------------------------------------- what only bytes can get wrong

NO_REQUESTS = {
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", False, 400),
    "words": (b"hello server, how are you?\r\n\r\n", False, 400),
    "cut-head": (b"POST /chat HTTP/1.1\r\nhost: 127.0.0.1\r\n", True, 400),
    "cut-body": (
        b"POST /chat HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{",
        True,
        400,
    ),
    "long-head": (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", False, 431),
    "endless-line": (b"GET /" + b"a" * MAX_HEAD_BYTES, False, 414),
    "smuggled": (
        b"POST /chat HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        False,
        400,
    ),
    "bad-chunk": (
        request_bytes(Asked("POST", CHAT, (*JSON, ("transfer-encoding", "chunked")), b"zz\r\n")),
        False,
        400,
    ),
    "gzip": (b"POST /chat HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: gzip\r\n\r\n", False, 501),
    "http2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", False, 505),
}


@pytest.mark.parametrize(("data", "eof", "status"), NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_bytes_that_are_no_request(data: bytes, eof: bool, status: int) -> None:
    house = Carriage("http").house()
    answer = HttpClient(house).ask_bytes(data, eof=eof)
    chat_began = data.startswith(b"POST /v1/chat") and status == 400
    check_error(answer, status, CHAT if chat_began else PLAIN)
    assert answer.closed
    record = check_record(answer, status, "refused", tokens=0)
    assert record.error
    assert house.source.jobs == []
    check_serves(house)


@given(st.binary(min_size=1, max_size=60).filter(lambda data: data.strip(b"\r\n") != b"" and b" HTTP/" not in data))
def test_garbage_is_refused(garbage: bytes) -> None:
    house = Carriage("http").house()
    answer = HttpClient(house).ask_bytes(garbage, eof=True)
    assert 400 <= answer.status < 600
    check_error(answer, answer.status, PLAIN)
    assert answer.closed
    assert len(answer.records) == 1
    check_serves(house)


def test_prompts_and_queries_are_never_recorded(carrier: Carriage) -> None:
    house = carrier.house()
    house.ask(Asked("GET", "/chat?prompt=secret"))
    house.ask(plain(prompt="secret"))
    house.ask(post(PLAIN, b'{"prompt":"secret", 5}'))
    house.ask(post(PLAIN, b'{"prompt":"secret","max_tokens":"secret"}'))
    assert len(house.records) == 4
    assert "secret" not in repr(house.records)
