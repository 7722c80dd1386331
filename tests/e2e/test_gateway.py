"""`tokenwire serve --backend openai=URL`: before our own server, before servers that fail, and before none at all."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from tests.e2e.conftest import Serve
from tests.e2e.harness import ENVIRONMENT, HERE, Reader, Relay, Server, curl, notes, run_program, text_of, until

Gateway = Callable[..., Server]

_LOOPS: Final = ("asyncio", "trio")
_JSON: Final = ("-H", "content-type: application/json")
_OWN_KEY: Final = "sk-of-the-gateway"
_ASK: Final = {"model": "mock", "messages": [{"role": "user", "content": "Tell me about owls."}], "max_tokens": 12}


@pytest.fixture(params=_LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    """The loops that gateways are run on; the servers behind them run on asyncio."""
    name: str = request.param
    return name


@pytest.fixture
def gateway(tmp_path_factory: pytest.TempPathFactory, loop: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Start a gateway before a base URL."""
    monkeypatch.setitem(ENVIRONMENT, "OPENAI_API_KEY", _OWN_KEY)
    with ExitStack() as gateways:

        def start(url: str, *arguments: str) -> Server:
            folder = tmp_path_factory.mktemp("gateway")
            backend = ("--backend", f"openai={url}/v1")
            return gateways.enter_context(Server(folder, *backend, *arguments, loop=loop))

        yield start


def ask(url: str, body: Mapping[str, object] = _ASK, *arguments: str) -> tuple[int, str]:
    """Post a chat completion; return the status and the body."""
    told = curl(
        f"{url}/v1/chat/completions",
        *_JSON,
        "-d",
        json.dumps(body),
        "-w",
        "\n%{http_code}",
        "--max-time",
        "30",
        *arguments,
    )
    answer, _, status = told.rpartition("\n")
    return int(status), answer


def content(answer: str) -> str:
    """The text of a whole chat completion."""
    text: str = json.loads(answer)["choices"][0]["message"]["content"]
    return text


def streamed(answer: str) -> str:
    """The text of a chat completion's stream.

    Raises:
        AssertionError: it is not whole, or failed.
    """
    *events, done = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]", answer
    said: list[dict[str, Any]] = [json.loads(event) for event in events]
    return "".join(choice["delta"].get("content") or "" for chunk in said for choice in chunk["choices"])


def listed(server: Server) -> list[str]:
    models: list[dict[str, str]] = json.loads(curl(f"{server.url}/v1/models"))["data"]
    return [model["id"] for model in models]


def error_in(answer: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer)["error"]
    return error


class Canned(ThreadingHTTPServer):
    """A server that gives one answer to whatever is posted, and knows what it was asked.

    Args:
        status: the answer's status.
        body: its body.
        headers: its headers.

    Attributes:
        asked: the heads of the requests, as text.
    """

    daemon_threads = True

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked.append(f"{self.requestline}\n{self.headers}")
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = asked
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def server_close(self) -> None:
        """Stop serving, then close."""
        self.shutdown()
        self._thread.join()
        super().server_close()


def test_every_client_reads_through_it_what_it_reads_without(shared: Serve, gateway: Gateway) -> None:
    mock = shared("mock")
    through = gateway(mock.url)
    until(lambda: listed(through) == ["mock"], "the server's models")
    direct = ask(mock.url)
    assert direct[0] == 200
    assert content(ask(through.url)[1]) == content(direct[1])
    assert json.loads(ask(through.url)[1])["usage"] == json.loads(direct[1])["usage"]
    asked = {**_ASK, "stream": True, "stream_options": {"include_usage": True}}
    assert streamed(ask(through.url, asked)[1]) == content(direct[1])
    prompt = ("-G", "--data-urlencode", "prompt=Tell me about owls.", "-d", "max_tokens=12")
    assert text_of(curl(f"{through.url}/chat", *prompt)) == text_of(curl(f"{mock.url}/chat", *prompt))


def _forget_what_differs(result: dict[str, Any]) -> None:
    """Leave out ids and times, which are each server's own, and the number of chunks, which may be merged on the way."""
    told: dict[str, Any] = result.get("heard", result)
    told.pop("envelopes", None)
    told["usages"] = [usage for usage in told.get("usages", ()) if usage]


def test_the_openai_sdk_cannot_tell_the_difference(shared: Serve, gateway: Gateway) -> None:
    mock, failing = shared("mock"), shared("fails_midway")
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": schema}}]
    calls: dict[str, dict[str, object]] = {
        "text": {"max_tokens": 30},
        "own end": {"max_tokens": 1000},
        "n": {"n": 3, "max_tokens": 9},
        "tools": {"tools": tools, "tool_choice": "required"},
        "no model": {"model": "gpt-none"},
        "bad value": {"top_logprobs": 3},
    }
    made: dict[str, dict[str, object]] = {
        f"{verb}/{name}": {"do": verb, "with": call}
        for verb in ("stream", "async_whole")
        for name, call in calls.items()
    }
    made["usage"] = {"do": "stream", "with": {"max_tokens": 5, "stream_options": {"include_usage": True}}}
    made["models"] = {"do": "models"}
    broken: dict[str, object] = {"do": "stream", "with": {"model": "fails_midway"}}
    through = {mock.url: gateway(mock.url).url, failing.url: gateway(failing.url).url}
    until(lambda: '"mock"' in curl(f"{through[mock.url]}/v1/models"), "the server's models")
    asked: dict[str, dict[str, object]] = {
        f"{side}/{name}": {**call, "url": through[url] if side == "through" else url}
        for side in ("direct", "through")
        for name, call, url in [*((n, c, mock.url) for n, c in made.items()), ("broken", broken, failing.url)]
    }
    client = HERE / "clients" / "openai_client.py"
    results: dict[str, dict[str, Any] | list[Any]] = json.loads(
        run_program([sys.executable, str(client)], given=json.dumps(asked))
    )["results"]
    for result in results.values():
        if isinstance(result, dict):
            _forget_what_differs(result)
    for name in (*made, "broken"):
        assert results[f"through/{name}"] == results[f"direct/{name}"], name
    broke = results["through/broken"]
    assert isinstance(broke, dict)
    assert broke["raised"]["message"]


def test_only_the_gateways_own_key_goes_up(shared: Serve, gateway: Gateway) -> None:
    with Relay(shared("mock")) as relay:
        through = gateway(relay.url)
        secrets = ("-H", "authorization: Bearer sk-of-the-client", "-H", "cookie: a=b", "-H", "x-api-key: sk-other")
        hop_by_hop = ("-H", "connection: keep-alive, x-secret", "-H", "x-secret: 1", "-H", "te: trailers")
        assert ask(through.url, _ASK, *secrets, *hop_by_hop)[0] == 200
        (head,) = relay.heads("/v1/chat/completions")
        names = [line.partition(":")[0].lower() for line in head.splitlines()[1:]]
        assert sorted(names) == sorted(
            ["host", "accept", "accept-encoding", "content-type", "user-agent", "authorization", "content-length"]
        )
        assert f"Bearer {_OWN_KEY}" in head
        (asked,) = relay.heads("/v1/models")
        assert f"Bearer {_OWN_KEY}" in asked


def test_one_connection_carries_many_requests(shared: Serve, gateway: Gateway) -> None:
    with Relay(shared("mock")) as relay:
        through = gateway(relay.url, "--model-name", "mock")
        for _ in range(5):
            assert ask(through.url)[0] == 200
        assert [bytes(asked).count(b"POST /v1/chat/completions ") for asked in relay._asked] == [5]


def test_leaving_is_heard_by_the_server_at_once(shared: Serve, gateway: Gateway, room: Path) -> None:
    server = shared("endless")
    cancelled = len(server.logged("cancelled"))
    through = gateway(server.url, "--model-name", "endless")
    with Reader(through, {"prompt": str(room)}) as reader:
        reader.read_until(b"more")
        assert notes(room) == ["run"]
    until(lambda: notes(room) == ["run", "closed"], "the end of the work behind the gateway")
    until(lambda: len(server.logged("cancelled")) == cancelled + 1, "the server's log")
    until(lambda: through.logged(" 200 cancelled "), "the gateway's log")


@pytest.mark.parametrize("reset", [False, True])
def test_a_server_that_is_lost_in_the_middle_is_a_failed_stream(
    shared: Serve, gateway: Gateway, room: Path, reset: bool
) -> None:
    server = shared("endless")
    with Relay(server) as relay:
        through = gateway(relay.url, "--model-name", "endless")
        with Reader(through, {"prompt": str(room)}) as reader:
            reader.read_until(b"more")
            relay.cut(reset=reset)
            answer = reader.read_until(b"[DONE]")
        assert b'"error"' in answer
        assert b"broke off" in answer
        line = until(lambda: through.logged("GET /chat "), "the gateway's log")[0]
        assert " truncated " in line
        until(lambda: notes(room) == ["run", "closed"], "the end of the work")


def test_a_server_that_is_killed_and_comes_back(tmp_path_factory: pytest.TempPathFactory, gateway: Gateway) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:  # a port that nobody takes before we do
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    through = gateway(url)
    assert listed(through) == []
    status, answer = ask(through.url)
    assert status == 502
    assert "cannot be reached" in error_in(answer)["message"]
    arguments = ("--backend", "mock", "--mock-ttft", "5ms", "--mock-itl", "0", "--port", str(port))
    with Server(tmp_path_factory.mktemp("first"), *arguments) as first:
        until(lambda: listed(through) == ["mock"], "the server's models")
        text = content(ask(through.url)[1])
        first.signal(signal.SIGKILL)
        first.process.wait()
        assert ask(through.url)[0] == 502
        with Server(tmp_path_factory.mktemp("second"), *arguments):
            assert content(ask(through.url)[1]) == text
        first.process.returncode = 0  # it did not end by itself


@pytest.mark.parametrize("status", [401, 403])
def test_trouble_with_our_key_is_our_trouble(gateway: Gateway, status: int) -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {_OWN_KEY}."}}).encode()
    with Canned(status, body, {"content-type": "application/json"}) as server:
        told, answer = ask(gateway(server.url, "--model-name", "m").url)
        assert told == 502
        assert "operator" in error_in(answer)["message"]
        assert _OWN_KEY not in answer
        assert len(server.asked) == 1


def test_an_error_keeps_its_status_its_words_and_its_wait(gateway: Gateway) -> None:
    error = {"message": "Slow down.", "type": "tokens", "param": None, "code": "rate_limit_exceeded"}
    headers = {"content-type": "application/json", "retry-after": "17", "connection": "close, x-hop", "x-hop": "1"}
    with Canned(429, json.dumps({"error": error}).encode(), headers) as server:
        through = gateway(server.url, "--model-name", "m")
        told, answer = ask(through.url, {**_ASK, "stream": True}, "-i")
        head, _, body = answer.replace("\r\n", "\n").partition("\n\n")
        assert told == 429
        assert error_in(body) == error
        assert "\nretry-after: 17\n" in head
        assert "x-hop" not in head
        assert len(server.asked) == 1


def test_a_redirect_is_not_followed(shared: Serve, gateway: Gateway) -> None:
    location = {"location": f"{shared('mock').url}/v1/chat/completions"}
    with Canned(307, b"", location) as server:
        told, answer = ask(gateway(server.url, "--model-name", "m").url)
        assert told == 502
        assert "redirect" in error_in(answer)["message"]


def test_a_page_of_a_proxy_is_an_error(gateway: Gateway) -> None:
    with Canned(200, b"<html>Sign in</html>", {"content-type": "text/html"}) as server:
        told, answer = ask(gateway(server.url, "--model-name", "m").url)
        assert told == 502
        assert "text/html" in error_in(answer)["message"]


def test_what_is_busy_for_a_moment_is_asked_again(gateway: Gateway) -> None:
    with Canned(503, b"", {}) as server:
        assert ask(gateway(server.url, "--model-name", "m").url)[0] == 503
        assert len(server.asked) == 3


def test_somebody_elses_server(llamacpp: str, gateway: Gateway) -> None:
    through = gateway(llamacpp)
    (model,) = until(lambda: listed(through), "the server's models")
    patient = ("--max-time", "240")
    asked = {**_ASK, "model": model, "max_tokens": 6}
    status, whole = ask(through.url, asked, *patient)
    assert status == 200
    assert content(whole)
    assert 0 < json.loads(whole)["usage"]["completion_tokens"] <= 6
    status, stream = ask(through.url, {**asked, "stream": True}, *patient)
    assert status == 200
    assert streamed(stream)
    too_long = {**asked, "messages": [{"role": "user", "content": "owl " * 2000}]}
    status, refusal = ask(through.url, too_long, *patient)
    direct, meant = ask(llamacpp, too_long, *patient)
    assert status == direct == 400
    error, original = error_in(refusal), error_in(meant)
    assert (error["message"], error["type"]) == (original["message"], original["type"])


def test_a_url_that_cannot_be_used_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="write http://host:port/v1"):
        Server(tmp_path, "--backend", "openai=localhost:8000")
