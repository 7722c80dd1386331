"""curl and httpx against the plain dialect, and the small routes beside it."""
# pyright: basic, reportMissingImports=false
# httpx is in the environment of these tests, and not where the type checkers look.

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx  # type: ignore[import-not-found, unused-ignore]  # see above
import pytest
from tests.e2e.conftest import Serve
from tests.e2e.harness import DONE, Reader, Server, curl, data_of, notes, readable, run_program, text_of, until

_JSON = ("-H", "content-type: application/json", "-d")
_WAYS = {
    "post": ("/chat", "-X", "POST", *_JSON, '{"prompt":"Hello"}'),
    "post_query": ("/chat?prompt=Hello", "-X", "POST"),
    "get_query": ("/chat?prompt=Hello",),
    "get_encoded": ("/chat", "-G", "--data-urlencode", "prompt=Hello"),
}


@pytest.mark.parametrize("way", _WAYS)
def test_curl_prints_tokens_and_done(mock: Server, way: str) -> None:
    path, *arguments = _WAYS[way]
    body = curl(f"{mock.url}{path}", *arguments)
    *events, last = data_of(body)
    assert last == DONE
    assert body.startswith('data: {"token":"')
    assert all(isinstance(json.loads(data)["token"], str) for data in events)
    assert len(events) > 10
    assert text_of(body) == text_of(curl(f"{mock.url}/chat?prompt=Hello"))


def test_curl_sees_the_headers_of_a_stream(mock: Server) -> None:
    head = curl(f"{mock.url}/chat?prompt=Hello", "-o", "/dev/null", "-D", "-").lower()
    assert head.startswith("http/1.1 200 ")
    assert "\r\ncontent-type: text/event-stream\r\n" in head
    assert "\r\ncache-control: no-cache" in head
    assert "\r\nx-accel-buffering: no\r\n" in head


def test_an_old_client_gets_a_body_without_chunks(mock: Server) -> None:
    body = curl(f"{mock.url}/chat?prompt=Hello", "--http1.0", "--raw")
    assert text_of(body) == text_of(curl(f"{mock.url}/chat?prompt=Hello"))


def test_a_whole_answer_is_one_object(mock: Server) -> None:
    answer = json.loads(curl(f"{mock.url}/chat", *_JSON, '{"prompt":"Hello","stream":false}'))
    assert answer["text"] == text_of(curl(f"{mock.url}/chat?prompt=Hello"))
    assert answer["model"] == "mock"


def test_max_tokens_and_stop_are_honoured(mock: Server) -> None:
    text = text_of(curl(f"{mock.url}/chat?prompt=Hello"))
    stop = text[20:26]
    few = curl(f"{mock.url}/chat?prompt=Hello&max_tokens=3")
    stopped = curl(f"{mock.url}/chat", *_JSON, json.dumps({"prompt": "Hello", "stop": [stop]}))
    assert json.loads(data_of(few)[-2])["finish_reason"] == "length"
    assert json.loads(data_of(few)[-2])["usage"]["output_tokens"] == 3
    assert text_of(stopped) == text.partition(stop)[0]
    assert json.loads(data_of(stopped)[-2])["stop_sequence"] == stop


def test_httpx_reads_lines(mock: Server) -> None:
    expected = curl(f"{mock.url}/chat?prompt=Hello").splitlines()
    with (
        httpx.Client(trust_env=False) as client,
        client.stream("POST", f"{mock.url}/chat", json={"prompt": "Hello"}) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert text_of("\n".join(lines)) == text_of("\n".join(expected))
    assert [line.partition(":")[0] for line in lines] == [line.partition(":")[0] for line in expected]


def test_a_connection_is_used_again(mock: Server) -> None:
    with httpx.Client(trust_env=False, limits=httpx.Limits(max_connections=1)) as client:
        bodies = [client.get(f"{mock.url}/chat", params={"prompt": "Hello"}).text for _ in range(3)]
        ready = client.get(f"{mock.url}/readyz")
    assert len({text_of(body) for body in bodies}) == 1
    assert ready.json() == {"status": "ready"}


@pytest.mark.parametrize("text", ["a\u2028b\u0085c", "naïve 🦉 日本", '"[DONE]" \\n', "\x1b[31m"])
def test_httpx_keeps_every_character(shared: Serve, loop: str, text: str) -> None:
    server = shared("words", loop=loop)
    response = httpx.post(f"{server.url}/chat", json={"prompt": text}, trust_env=False)
    assert text_of(response.text).split() == text.split()


@pytest.mark.parametrize("backend", ["gated", "async_gated"])
def test_tokens_arrive_before_the_stream_ends(shared: Serve, room: Path, loop: str, backend: str) -> None:
    server = shared(backend, loop=loop)
    said = ""
    with httpx.stream("POST", f"{server.url}/chat", json={"prompt": str(room)}, trust_env=False) as response:
        for line in response.iter_lines():
            said += f"{line}\n"
            if "before-2" in line:
                (room / "go").touch()
    assert text_of(said) == "before-0 before-1 before-2 behind-0 behind-1 "
    assert notes(room) == ["run", "closed"]


@pytest.mark.parametrize("backend", ["words", "async_words"])
def test_generators_of_both_kinds_answer(shared: Serve, loop: str, backend: str) -> None:
    server = shared(backend, loop=loop)
    body = curl(f"{server.url}/chat", *_JSON, '{"prompt":"two small owls"}')
    assert text_of(body) == "two small owls "
    assert json.loads(data_of(body)[-2])["finish_reason"] == "stop"


def test_a_backend_that_raises_at_once_is_a_500(shared: Serve, loop: str) -> None:
    server = shared("fails_at_once", loop=loop)
    response = httpx.post(f"{server.url}/chat", json={"prompt": "Hello"}, trust_env=False)
    error = response.json()["error"]
    assert response.status_code == 500
    assert error["type"] == "server_error"
    assert "hunter2" not in response.text


@pytest.mark.parametrize("backend", ["fails_midway", "async_fails_midway"])
def test_a_backend_that_raises_midway_is_an_error_event_and_the_end(shared: Serve, loop: str, backend: str) -> None:
    server = shared(backend, loop=loop)
    body = curl(f"{server.url}/chat?prompt=Hello")
    *events, last = data_of(body)
    said = [json.loads(data) for data in events]
    assert [event["token"] for event in said] == ["one ", "two ", ""]
    assert said[-1]["error"]["type"] == "server_error"
    assert "finish_reason" not in said[-1]
    assert "hunter2" not in body
    assert last == DONE


def test_a_stream_waits_in_the_queue_until_there_is_room(serve: Serve, room: Path, loop: str) -> None:
    server = serve("gated", "--max-streams", "1", "--max-queue", "1", loop=loop)
    query = {"prompt": str(room)}
    with Reader(server, query) as first:
        first.read_until(b"before-0")
        with Reader(server, query) as one, Reader(server, query) as other:
            # Which of them came first nobody knows. The one that is answered found the other one in the queue.
            (refused,) = until(lambda: readable(one, other), "a refusal")
            waiting = other if refused is one else one
            assert b" 429 " in refused.read_until(b"queue_full")
            assert notes(room) == ["run"]
            (room / "go").touch()
            body = waiting.read_until(DONE.encode())
    assert b"behind-1" in body
    until(lambda: notes(room) == ["run", "closed", "run", "closed"], "the end of the second stream")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_and_readiness_are_told(mock: Server, path: str) -> None:
    response = httpx.get(f"{mock.url}{path}", trust_env=False)
    assert response.status_code == 200
    assert response.json()["status"] in {"ok", "ready"}
    assert httpx.head(f"{mock.url}{path}", trust_env=False).content == b""


def test_models_are_listed(mock: Server) -> None:
    models = httpx.get(f"{mock.url}/v1/models", trust_env=False).json()
    assert [model["id"] for model in models["data"]] == ["mock"]


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (400, ("/chat", *_JSON, "{}")),
        (400, ("/chat", *_JSON, '{"prompt":')),
        (400, ("/chat?prompt=Hello&max_tokens=none",)),
        (403, ("/chat?prompt=Hello", "-H", "Host: evil.test")),
        (403, ("/chat?prompt=Hello", "-H", "Origin: http://evil.test")),
        (403, ("/chat?prompt=Hello", "-H", "Sec-Fetch-Site: cross-site")),
        (404, ("/nothing",)),
        (405, ("/chat?prompt=Hello", "-X", "DELETE")),
        (415, ("/chat", "-d", '{"prompt":"Hello"}')),
    ],
)
def test_refusals_are_statuses_with_an_error_object(mock: Server, status: int, arguments: tuple[str, ...]) -> None:
    path, *rest = arguments
    body, _, code = curl(f"{mock.url}{path}", *rest, "-w", "\n%{http_code}").rpartition("\n")
    assert int(code) == status
    assert {"message", "type", "code"} <= json.loads(body)["error"].keys()


def test_the_installed_command_shows_its_options() -> None:
    command = Path(sys.executable).with_name("tokenwire")
    assert "--backend" in run_program([str(command), "serve", "--help"])
