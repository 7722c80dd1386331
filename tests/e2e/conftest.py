"""Servers that tests share, and folders by which a test and a backend talk."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.e2e.harness import ENVIRONMENT, HERE, Server

LOOPS = ("asyncio", "uvloop", "trio")
_LLAMACPP = HERE.parents[1] / ".venv-e2e-llamacpp" / "bin" / "python"
_QUICK_MOCK = ("--backend", "mock", "--mock-ttft", "5ms", "--mock-itl", "0")

Serve = Callable[..., Server]
"""See the fixture `serve`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start a server, or find the one that was started so: `shared("fails_midway", "--max-streams", "1", loop="trio")`."""
    with ExitStack() as servers:

        @functools.cache
        def start(backend: str, *arguments: str, loop: str = "asyncio") -> Server:
            return servers.enter_context(_server(tmp_path_factory.mktemp("shared"), backend, *arguments, loop=loop))

        yield start


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start a server of this test's own, as `shared` does."""
    with ExitStack() as servers:

        def start(backend: str, *arguments: str, loop: str = "asyncio") -> Server:
            return servers.enter_context(_server(tmp_path_factory.mktemp("own"), backend, *arguments, loop=loop))

        yield start


def _server(folder: Path, backend: str, *arguments: str, loop: str) -> Server:
    chosen = _QUICK_MOCK if backend == "mock" else ("--backend", f"backends_under_test:{backend}")
    return Server(folder, *chosen, *arguments, loop=loop)


@pytest.fixture(scope="session", params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    """The name of each loop."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def mock(shared: Serve, loop: str) -> Server:
    """The mock backend on each of the loops."""
    return shared("mock", loop=loop)


@pytest.fixture(scope="module")
def llamacpp() -> Iterator[str]:
    """Somebody else's server, the one inside xllamacpp, with a real model; its address.

    It is killed in the end: how it would end by itself is no matter of ours.
    """
    command = [str(_LLAMACPP), str(HERE / "clients" / "llamacpp_server.py")]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().decode().strip()
            assert address.startswith("http://"), "it did not start"
            yield address
            assert process.poll() is None, f"it ended by itself with {process.returncode}"
        finally:
            process.kill()


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """The folder that a watched backend gets as its prompt."""
    folder = tmp_path / "room"
    folder.mkdir()
    return folder
