"""Every command of the README and every snippet that needs a server, as a reader would run them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.e2e.harness import DONE, ENVIRONMENT, curl, data_of, run_program, text_of, until
from tests.readme import ROOT, blocks, commands

STATED_URL = "http://127.0.0.1:8000"
TOKENWIRE = [sys.executable, "-m", "tokenwire.adapters.cli"]
BUILT_BY_CI = ["make test"]
"""What .ci/run itself runs beside this test."""

SERVES = [command for command in commands() if command.startswith("tokenwire serve")]
CURLS = [command for command in commands() if command.startswith("curl")]


@contextmanager
def started(command: list[str], folder: Path, cwd: Path) -> Generator[str, None, None]:
    """Run a server's command on a free port; give its URL; end it as Ctrl-C would."""
    output = folder / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        found = until(
            lambda: re.search(r"^tokenwire on (http://\S+) \|", output.read_text(), re.MULTILINE), "the greeting", 90
        )
        assert found is not None
        yield found[1]
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        assert "Traceback" not in output.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.fixture
def story(tmp_path: Path) -> Iterator[str]:
    """The first screen's server."""
    (tmp_path / "story.py").write_text(blocks("python")[0])
    command = shlex.split(SERVES[0])[1:]
    with started([*TOKENWIRE, *command, "--port", "0"], tmp_path, tmp_path) as url:
        yield url


def test_every_command_is_known_here() -> None:
    known = {*SERVES, *CURLS, "make serve", *BUILT_BY_CI}
    assert set(commands()) == known
    assert len(SERVES) == 2
    assert len(CURLS) == 6


def test_a_generator_of_your_own(story: str) -> None:
    body = curl(story + CURLS[1].split(STATED_URL)[1].rstrip("'"))
    assert text_of(body) == "Once upon a time somebody said: Hello "


def test_the_client_snippet(story: str) -> None:
    snippet = next(body for body in blocks("python") if "connect_sync" in body)
    assert run_program([sys.executable, "-c", snippet.replace(STATED_URL, story)]) == (
        "Once upon a time somebody said: Hello "
    )


def test_the_openai_snippet(story: str) -> None:
    snippet = next(body for body in blocks("python") if "openai import" in body)
    assert run_program([sys.executable, "-c", snippet.replace(STATED_URL, story)]) == (
        "Once upon a time somebody said: Hello "
    )


def test_the_mock_and_its_curls(tmp_path: Path) -> None:
    command = shlex.split(SERVES[1])[1:]
    with started([*TOKENWIRE, *command, "--port", "0"], tmp_path, ROOT) as url:
        for line in CURLS[2:]:
            body = run_program(shlex.split(line.replace(STATED_URL, url)))
            assert body.endswith("data: [DONE]\n\n") if "/chat" in line else '"' in body, line


def test_make_serve_and_the_first_screen(tmp_path: Path) -> None:
    with started(["make", "serve", "SERVE_ARGS=--port 0"], tmp_path, ROOT) as url:
        assert "<title>tokenwire</title>" in curl(url + "/")
        body = curl(url + CURLS[0].split(STATED_URL)[1].rstrip("'"))
    stated = [line for line in blocks("console")[0].splitlines() if line.startswith("data: ")]
    assert data_of(body)[:2] == [data_of(line)[0] for line in stated[:2]]
    assert data_of(body)[-1] == DONE == data_of(stated[-1])[0]
    assert text_of(body) == "The capital of France is Paris."
    assert f'"{text_of(body)}"' in (ROOT / "README.md").read_text()
