"""The command line: what it takes, what it refuses and in which words, what it says when it serves."""

from __future__ import annotations

import argparse
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tokenwire.adapters import _backend_choice, cli
from tokenwire.adapters.cli import duration_ns, main
from tokenwire.adapters.server import LOOPS, ServerOptions
from tokenwire.backends.base import Backend
from tokenwire.backends.generators import GeneratorBackend
from tokenwire.backends.mock import MockBackend
from tokenwire.core.guard import LOOPBACK_HOSTS

MS = 1_000_000
EVERYWHERE = "0.0.0.0"  # noqa: S104  # the socket is closed before anybody can connect


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may load a real model, which `make serve` has put into the same environment."""
    monkeypatch.setattr(_backend_choice, "find_installed_model", lambda: None)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("1us", 1_000),
        ("200ms", 200 * MS),
        ("0.5ms", 500_000),
        ("1.5s", 1_500 * MS),
        ("15s", 15_000 * MS),
        ("2m", 120_000 * MS),
        ("0.1ms", 100_000),
        ("1000m", 60_000_000 * MS),
    ],
)
def test_durations(text: str, nanoseconds: int) -> None:
    assert duration_ns(text) == nanoseconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "5", "1", "00", "s", "-1s", "+1s", "1 s", " 1s", "1s ", "1S", "1h", "1ns", "1.s", ".5s", "1e3s", "1_0s"),
        *("1,5s", "nan", "inf", "1s\n", "\u0663s", "9" * 400 + "s"),
    ],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no duration; write 200ms, 1\.5s or 2m"):
        duration_ns(text)


# Serving, with the loop left out


class Ran:
    """What `run` was called with."""

    def __init__(self) -> None:
        self.backend: Backend
        self.options: ServerOptions
        self.loop = ""

    def run(
        self, backend: Backend, listeners: Sequence[socket.socket], *, loop: str, options: ServerOptions, started: Any
    ) -> None:
        self.backend, self.loop, self.options = backend, loop, options
        started()
        for sock in listeners:
            sock.close()


def leave_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_nothing(*_: object, **__: object) -> None: ...

    monkeypatch.setattr(logging, "basicConfig", do_nothing)
    monkeypatch.setattr(resource, "setrlimit", do_nothing)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    ran = Ran()
    monkeypatch.setattr(cli, "run", ran.run)
    leave_the_process_as_it_is(monkeypatch)
    return ran


def test_the_greeting_is_one_line(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--loop", "trio"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(
        r"tokenwire on (http://127\.0\.0\.1:\d+) \| model: mock \| backend: mock \([^|]*\) "
        r"\| dialects: plain, OpenAI chat \| loop: trio \| try: curl -N '\1/chat\?prompt=Hello'\n",
        said.out,
    )
    assert said.err == ""
    assert ran.loop == "trio"


@pytest.mark.parametrize(
    ("host", "shown"), [("::1", "[::1]"), ("localhost", "localhost"), (EVERYWHERE, "localhost"), ("::", "localhost")]
)
def test_the_url_that_is_shown_can_be_opened(
    ran: Ran, capsys: pytest.CaptureFixture[str], host: str, shown: str
) -> None:
    assert main(["serve", "--port", "0", "--host", host]) == 0
    assert capsys.readouterr().out.startswith(f"tokenwire on http://{shown}:")
    assert ran.loop == "asyncio"


def test_the_defaults(ran: Ran) -> None:
    assert main(["serve", "--port", "0"]) == 0
    assert isinstance(ran.backend, MockBackend)
    service = ran.options.service
    assert service.guard.allowed_hosts == LOOPBACK_HOSTS
    assert service.guard.allowed_origins == frozenset()
    assert (service.max_running, service.max_waiting) == (1024, 256)
    assert service.delivery.heartbeat_ns == 15_000 * MS
    assert service.page.startswith(b"<!")
    assert (ran.options.max_connections, ran.options.drain_ns) == (4096, 30_000 * MS)


def test_every_option_arrives(ran: Ran) -> None:
    options = "--allow-host MY.example --allow-host two --allow-origin https://a --max-streams 3 --max-queue 0"
    more = "--max-connections 5 --heartbeat 500ms --drain 0 --mock-ttft 1s --mock-itl 0 --mock-jitter 0.5 --mock-seed 7"
    assert main(["serve", "--port", "0", *options.split(), *more.split()]) == 0
    service = ran.options.service
    assert service.guard.allowed_hosts == LOOPBACK_HOSTS | {"my.example", "two"}
    assert service.guard.allowed_origins == {"https://a"}
    assert (service.max_running, service.max_waiting) == (3, 0)
    assert service.delivery.heartbeat_ns == 500 * MS
    assert (ran.options.max_connections, ran.options.drain_ns) == (5, 0)


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        (("--host", "127.0.0.1"), LOOPBACK_HOSTS),
        (("--host", "::1"), LOOPBACK_HOSTS),
        (("--host", EVERYWHERE), None),
        (("--host", EVERYWHERE, "--allow-host", "Me"), {"me"}),
    ],
)
def test_which_hosts_are_answered_to(ran: Ran, arguments: Sequence[str], hosts: object) -> None:
    assert main(["serve", "--port", "0", *arguments]) == 0
    assert ran.options.service.guard.allowed_hosts == hosts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory to import from."""
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def test_a_generator_by_name(ran: Ran, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cli_mine.py").write_text("def generate(prompt):\n    yield prompt\n")
    assert main(["serve", "--port", "0", "--backend", "cli_mine:generate"]) == 0
    assert isinstance(ran.backend, GeneratorBackend)
    assert "| model: generate |" in capsys.readouterr().out


# Refusing


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("brew", "invalid choice: 'brew'"),
        ("serve --prot 1", "unrecognized arguments: --prot 1"),
        ("serve --loop curio", "argument --loop: invalid choice: 'curio'"),
        ("serve --log-level loud", "argument --log-level: invalid choice: 'loud'"),
        ("serve --drain 1h", "argument --drain: '1h' is no duration; write 200ms, 1.5s or 2m"),
        ("serve --mock-ttft -1s", "argument --mock-ttft: expected one argument"),
        ("serve --mock-itl 5", "argument --mock-itl: '5' is no duration; write 200ms, 1.5s or 2m"),
        ("serve --heartbeat 0", "argument --heartbeat: a heartbeat after no silence would never pause"),
        ("serve --mock-jitter 1.5", "argument --mock-jitter: '1.5' is no share from 0 to 1"),
        ("serve --mock-jitter nan", "argument --mock-jitter: 'nan' is no share from 0 to 1"),
        ("serve --mock-jitter x", "argument --mock-jitter: 'x' is no share from 0 to 1"),
        ("serve --mock-seed x", "argument --mock-seed: invalid int value: 'x'"),
        ("serve --port 65536", "argument --port: '65536' is no whole number from 0 to 65535"),
        ("serve --port http", "argument --port: 'http' is no whole number from 0 to 65535"),
        ("serve --max-streams 0", "argument --max-streams: '0' is no whole number from 1 to 1000000"),
        ("serve --max-queue=-1", "argument --max-queue: '-1' is no whole number from 0 to 1000000"),
        ("serve --max-connections 0", "argument --max-connections: '0' is no whole number from 1 to 1000000"),
    ],
)
def test_wrong_usage_is_told_and_exits_with_2(
    ran: Ran, capsys: pytest.CaptureFixture[str], arguments: str, complaint: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert complaint in said.err.splitlines()[-1]
    assert said.out == ran.loop == ""


BACKENDS: Mapping[str, tuple[str, str]] = {
    "no module": ("cli_nothing:generate", "there is no module cli_nothing in "),
    "no attribute": ("cli_mine:nothing", "cli_mine has no attribute nothing"),
    "no colon": ("cli_mine", "'cli_mine' is not of the form module:attribute"),
    "not callable": ("cli_mine:NUMBER", "cli_mine:NUMBER is a int, which cannot be called"),
    "wants too much": ("cli_mine:greedy", "cli_mine:greedy: "),
    "imports what is not there": ("cli_broken:generate", "No module named 'cli_not_installed'"),
}


@pytest.mark.parametrize("case", BACKENDS)
def test_a_backend_that_cannot_be_had_is_one_line(
    ran: Ran, folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    (folder / "cli_mine.py").write_text("NUMBER = 1\ndef greedy(prompt, sauce: int):\n    yield prompt\n")
    (folder / "cli_broken.py").write_text("import cli_not_installed\n")
    target, complaint = BACKENDS[case]
    assert main(["serve", "--port", "0", "--backend", target]) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("tokenwire: ")
    assert complaint in line
    assert said.out == ran.loop == ""


def test_a_port_that_is_taken_is_one_line(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    said = capsys.readouterr()
    assert said.err == (
        f"tokenwire: [Errno {98 if sys.platform == 'linux' else 48}] "
        f"cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    )
    assert said.out == ran.loop == ""


def test_a_name_that_is_no_host_is_one_line(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--host", "a..b"]) == 1
    said = capsys.readouterr()
    assert said.err == "tokenwire: cannot listen on 'a..b': there is no such host\n"
    assert said.out == ran.loop == ""


def test_a_loop_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'uvloop'")

    monkeypatch.setattr(cli, "run", missing)
    leave_the_process_as_it_is(monkeypatch)
    listeners: list[socket.socket] = []

    def bind(host: str, port: int) -> list[socket.socket]:
        listeners.append(socket.create_server((host, port)))
        return listeners

    monkeypatch.setattr(cli, "bind", bind)
    assert main(["serve", "--port", "0", "--loop", "uvloop"]) == 1
    for sock in listeners:
        sock.close()
    assert capsys.readouterr().err == "tokenwire: No module named 'uvloop'\n"


# The real thing, once


def test_a_program_that_serves_until_it_is_told_to_end() -> None:
    command = [sys.executable, "-m", "tokenwire.adapters.cli", "serve", "--port", "0", "--backend", "mock"]
    with subprocess.Popen(
        [*command, "--mock-ttft", "0", "--mock-itl", "0", "--loop", "trio"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    ) as program:
        assert program.stdout is not None
        greeting = program.stdout.readline()
        port = re.findall(r"http://127\.0\.0\.1:(\d+) ", greeting)[0]
        client = HTTPConnection("127.0.0.1", int(port))
        client.request("GET", "/chat?prompt=Hello&max_tokens=3")
        answer = client.getresponse()
        assert answer.read().endswith(b"data: [DONE]\n\n")
        client.close()
        program.send_signal(signal.SIGTERM)
        rest, log = program.communicate()
    assert program.returncode == 0
    assert rest == ""
    assert "GET /chat 200 finished" in log
    assert "Traceback" not in log
    assert "loop: trio" in greeting
    assert "trio" in LOOPS
