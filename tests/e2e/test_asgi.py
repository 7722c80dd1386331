"""The ASGI application under real servers and in real frameworks, with the official SDK and curl as clients."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from tests.e2e.harness import ENVIRONMENT, HERE, curl, notes, run_program, text_of, until

ROOT: Final = HERE.parents[1]
PYTHON: Final = str(ROOT / ".venv-e2e-asgi" / "bin" / "python")
SAID: Final = "You said: Hello there "


def _uvicorn(*flags: str) -> Callable[[str, int], Sequence[str]]:
    return lambda app, port: ("-m", "uvicorn", *flags, "--log-level", "warning", "--port", str(port), app)


def _hypercorn(kind: str) -> Callable[[str, int], Sequence[str]]:
    return lambda app, port: ("-m", "hypercorn", "-k", kind, "-b", f"127.0.0.1:{port}", "--graceful-timeout", "1", app)


def _granian(app: str, port: int) -> Sequence[str]:
    flags = ("--interface", "asgi", "--workers", "1", "--log-level", "warning", "--workers-kill-timeout", "2")
    return ("-m", "granian", *flags, "--host", "127.0.0.1", "--port", str(port), app)


SERVERS: Final[dict[str, Callable[[str, int], Sequence[str]]]] = {
    "uvicorn-h11": _uvicorn("--http", "h11", "--loop", "asyncio"),
    "uvicorn-httptools": _uvicorn("--http", "httptools", "--loop", "uvloop"),
    "hypercorn-asyncio": _hypercorn("asyncio"),
    "hypercorn-trio": _hypercorn("trio"),
    "granian": _granian,
}


class Running(NamedTuple):
    """A started program."""

    url: str
    log: Path


Run = Callable[[str, str], Running]


@contextmanager
def running(folder: Path, arguments: Callable[[int], Sequence[str]], where: Path) -> Generator[Running]:
    """Start a program that listens on a port, and stop it by SIGTERM; its log may have no traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PYTHON, *arguments(port)],
            cwd=where,
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(where)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        until(lambda: process.poll() is not None or _listens(port), f"{arguments(port)} to listen")
        assert process.poll() is None, log.read_text()
        yield Running(f"http://127.0.0.1:{port}", log)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Start an application of asgi_apps under a server, or find it started."""
    found: dict[tuple[str, str], Running] = {}
    with ExitStack() as programs:

        def start(server: str, app: str) -> Running:
            if (server, app) not in found:
                folder = tmp_path_factory.mktemp("asgi")
                program = running(folder, lambda port: SERVERS[server](f"asgi_apps:{app}", port), HERE)
                found[server, app] = programs.enter_context(program)
            return found[server, app]

        yield start


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    """Each server's name."""
    name: str = request.param
    return name


def ask_sdk(url: str, content: str = "Hello there", **more: Any) -> dict[str, Any]:
    """Ask with the official SDK, as a stream and whole."""
    asked = {"messages": [{"role": "user", "content": content}], **more}
    calls = {verb: {"do": verb, "url": url, "with": asked} for verb in ("stream", "whole", "async_stream")}
    said = run_program([sys.executable, str(HERE / "clients" / "openai_client.py")], given=json.dumps(calls))
    results: dict[str, Any] = json.loads(said)["results"]
    return results


def text_in(result: Any) -> str:
    found = re.search(r"You said: Hello there ?|Hello there ?", json.dumps(result))
    assert found is not None, result
    return found[0]


# ----------------------------------------------------------------------------------------------------------- servers


@pytest.mark.parametrize("app", ["bare", "mounted", "behind_middleware"])
def test_every_server_serves_it(run: Run, server: str, app: str) -> None:
    url = run(server, app).url
    assert text_of(curl(f"{url}/chat", "-G", "--data-urlencode", "prompt=one two three")) == "one two three "
    assert json.loads(curl(f"{url}/v1/models"))["data"][0]["id"] == "generate"
    assert "<title>" in curl(f"{url}/")
    refused = curl(f"{url}/chat", "-H", "content-type: application/json", "-d", "{}", "-w", "\n%{http_code}")
    assert refused.endswith("\n400")
    heads = curl(f"{url}/healthz", "-i").lower()
    assert heads.count("\ndate:") == 1


def test_http2_without_tls(run: Run) -> None:
    for kind in ("hypercorn-asyncio", "hypercorn-trio", "granian"):
        url = run(kind, "bare").url
        data = '{"prompt":"one two","stream":true}'
        told = curl(f"{url}/chat", "--http2-prior-knowledge", "-H", "content-type: application/json", "-d", data, "-i")
        assert told.startswith("HTTP/2 200")
        assert text_of(told.partition("\r\n\r\n")[2]) == "one two "


def test_the_sdk_under_every_server(run: Run, server: str) -> None:
    results = ask_sdk(run(server, "bare").url, model="generate")
    for verb in ("stream", "whole", "async_stream"):
        assert text_in(results[verb]).strip() == "Hello there"


# ----------------------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("app", ["bare", "behind_middleware", "response"])
@pytest.mark.parametrize("stage", ["midway", "silent", "whole"])
def test_a_client_that_leaves_stops_the_backend(run: Run, server: str, app: str, stage: str, tmp_path: Path) -> None:
    url = run(server, app).url
    folder = tmp_path / stage
    folder.mkdir()
    asked = {
        "model": "generate",
        "messages": [{"role": "user", "content": str(folder)}],
        "stream": stage != "whole",
    }
    body = json.dumps(asked).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 20) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        sock.sendall(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        received = b""
        while stage == "midway" and b"two" not in received:
            data = sock.recv(65536)
            assert data, received
            received += data
        until(lambda: "run" in notes(folder), "the backend to run")
        assert notes(folder) == ["run"]
    until(lambda: "closed" in notes(folder), "the backend to be closed")
    assert notes(folder) == ["run", "closed"]


# ---------------------------------------------------------------------------------------------------------- examples

EXAMPLES: Final[dict[str, Callable[[int], Sequence[str]]]] = {
    "fastapi": lambda port: SERVERS["uvicorn-httptools"]("fastapi_app:app", port),
    "starlette": lambda port: SERVERS["uvicorn-h11"]("starlette_app:app", port),
    "starlette-trio": lambda port: SERVERS["hypercorn-trio"]("starlette_app:app", port),
    "litestar": lambda port: SERVERS["granian"]("litestar_app:app", port),
    "quart": lambda port: SERVERS["hypercorn-asyncio"]("quart_app:app", port),
    "django": lambda port: SERVERS["uvicorn-h11"]("django_app:app", port),
    "aiohttp": lambda port: ("aiohttp_app.py", str(port)),
    "sanic": lambda port: ("sanic_app.py", str(port)),
    "tornado": lambda port: ("tornado_app.py", str(port)),
    "asyncio-codec": lambda port: ("asyncio_codec_server.py", str(port)),
    "threaded": lambda port: ("threaded_server.py", str(port)),
}
MOUNTED: Final = {"fastapi", "starlette", "starlette-trio", "litestar", "quart", "django"}
STREAMS_ONLY: Final = {"asyncio-codec", "threaded"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name: str, tmp_path: Path) -> None:
    with running(tmp_path, EXAMPLES[name], ROOT / "examples") as program:
        results = ask_sdk(program.url, model="example")
        for verb in ("stream", "async_stream") if name in STREAMS_ONLY else results:
            assert text_in(results[verb]) == SAID, results[verb]
        if name in MOUNTED:
            url = f"{program.url}/ai"
            assert text_of(curl(f"{url}/chat", "-G", "--data-urlencode", "prompt=Hello there")) == SAID
            assert json.loads(curl(f"{url}/readyz")) == {"status": "ready"}
