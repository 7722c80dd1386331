"""The servers that are compared: how each is started, what it needs, and what is known of its settings.

Every server streams the same bytes, 20 times a second to each client, on one core, with access logs off, and answers
GET /healthz. Each is given the settings of its own documentation that suit many small writes on one core. The limits
on a graceful stop let the peers end soon after SIGTERM, which is what they get when this program dies before it can
kill them.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workloads import STEP_NS, openai_chunk_payload

__all__ = [
    "BASELINE",
    "SERVERS",
    "TARGETS",
    "Server",
    "Site",
    "StartError",
    "available",
    "compile_c",
    "free_port",
    "is_healthy",
    "missing_modules",
    "prepare",
    "running",
]

HERE = Path(__file__).resolve().parent
BASELINE = "c_loop"
START_DEADLINE_S = 20.0


class StartError(Exception):
    """A server, or what it needs, that could not be started."""


@dataclass(frozen=True, slots=True)
class Site:
    """What all servers of one invocation share.

    Attributes:
        scratch: a directory that is deleted afterwards; holds `payload`, the compiled loop, and the servers' output.
        payload: file of the event's bytes.
        c_loop: the compiled C loop.
        python: interpreter of our own server.
        peers_python: interpreter that has the peers installed.
        core: the core the servers are pinned to; -1 for none.
    """

    scratch: Path
    payload: Path
    c_loop: Path
    python: str
    peers_python: str
    core: int


@dataclass(frozen=True, slots=True)
class Server:
    """One row of the table.

    Attributes:
        command: makes the command line, given the site and a free port.
        modules: what the interpreter must be able to import.
        peer: runs in the peers' interpreter.
    """

    command: Callable[[Site, int], list[str]]
    modules: tuple[str, ...] = ()
    peer: bool = False


def _c_loop(site: Site, port: int) -> list[str]:
    return [str(site.c_loop), str(port), str(site.payload), str(STEP_NS)]


def _tokenwire(loop: str) -> Callable[[Site, int], list[str]]:
    step_ms = STEP_NS // 1_000_000
    mock = f"--mock-ttft {step_ms}ms --mock-itl {step_ms}ms --mock-jitter 0 --mock-seed 7"
    serve = f"-m tokenwire.adapters.cli serve --backend mock --loop {loop} {mock}"
    return lambda site, port: [site.python, *serve.split(), "--port", str(port)]


def _granian(mode: str) -> Callable[[Site, int], list[str]]:
    flags = f"--interface asgi --http 1 --no-ws --workers 1 --loop uvloop --runtime-mode {mode} --runtime-threads 1"
    flags += " --backlog 4096 --workers-kill-timeout 1"
    run = f"-m granian {flags} --no-access-log --log-level warning bare_asgi:app"
    return lambda site, port: [site.peers_python, *run.split(), "--host", "127.0.0.1", "--port", str(port)]


def _uvicorn(application: str) -> Callable[[Site, int], list[str]]:
    flags = "--loop uvloop --http httptools --ws none --lifespan off --backlog 4096 --timeout-graceful-shutdown 1"
    run = f"-m uvicorn {flags} --no-access-log --log-level warning {application}"
    return lambda site, port: [site.peers_python, *run.split(), "--host", "127.0.0.1", "--port", str(port)]


_UVICORN = ("uvicorn", "uvloop", "httptools")

SERVERS: dict[str, Server] = {
    BASELINE: Server(_c_loop),
    "tokenwire-asyncio": Server(_tokenwire("asyncio"), ("tokenwire.adapters.cli",)),
    "tokenwire-uvloop": Server(_tokenwire("uvloop"), ("tokenwire.adapters.cli", "uvloop")),
    "tokenwire-trio": Server(_tokenwire("trio"), ("tokenwire.adapters.cli", "trio")),
    "granian": Server(_granian("st"), ("granian", "uvloop"), peer=True),
    "uvicorn": Server(_uvicorn("bare_asgi:app"), _UVICORN, peer=True),
    "tokenwire-asgi": Server(_uvicorn("tokenwire_asgi:app"), (*_UVICORN, "tokenwire.adapters.asgi"), peer=True),
    "fastapi-streaming": Server(_uvicorn("frameworks:streaming"), (*_UVICORN, "fastapi"), peer=True),
    "fastapi-prebuilt": Server(_uvicorn("frameworks:prebuilt"), (*_UVICORN, "fastapi"), peer=True),
    "fastapi-native": Server(_uvicorn("frameworks:native"), (*_UVICORN, "fastapi"), peer=True),
    "sse-starlette": Server(_uvicorn("frameworks:sse"), (*_UVICORN, "fastapi", "sse_starlette"), peer=True),
}
TARGETS = ("tokenwire-asyncio", "tokenwire-uvloop", "tokenwire-trio")

_FIND = (
    "import importlib, sys\n"
    "for name in sys.argv[1:]:\n"
    "    try:\n"
    "        importlib.import_module(name)\n"
    "    except ImportError:\n"
    "        print(name)\n"
)


def missing_modules(server: Server, site: Site) -> list[str]:
    """The modules that the server needs and its interpreter cannot import."""
    python = site.peers_python if server.peer else site.python
    command = [python, "-c", _FIND, *server.modules]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return found.stdout.split()


def available(names: list[str], servers: Mapping[str, Server], site: Site, *, skip_missing: bool) -> list[str]:
    """Those of the named servers that can be started.

    Raises:
        StartError: one lacks a module, and none is to be skipped.
    """
    missing = {name: modules for name in names if (modules := missing_modules(servers[name], site))}
    if missing and not skip_missing:
        lines = "\n".join(f"{name} needs {', '.join(modules)}" for name, modules in missing.items())
        python = site.peers_python if any(servers[name].peer for name in missing) else site.python
        requirements = HERE / "requirements.txt"
        raise StartError(f"{lines}\ninstall with: {python} -m pip install -e . -r {os.path.relpath(requirements)}")
    for name, modules in missing.items():
        print(f"skipped {name}: {', '.join(modules)} not installed", file=sys.stderr)
    return [name for name in names if name not in missing]


def prepare(scratch: Path, peers_python: str, core: int, payload: Path | None) -> Site:
    """Writes the payload and compiles the C loop into the scratch directory.

    Raises:
        StartError: there is no C compiler, or it refused.
    """
    bytes_sent = payload.read_bytes() if payload else openai_chunk_payload()
    site = Site(scratch, scratch / "payload", scratch / "c_loop", sys.executable, peers_python, core)
    site.payload.write_bytes(bytes_sent)
    compile_c(HERE / "c_loop.c", site.c_loop)
    return site


def compile_c(source: Path, target: Path) -> None:
    """Compiles a program.

    Raises:
        StartError: there is no C compiler, or it refused.
    """
    command = [os.environ.get("CC", "cc"), "-O2", "-o", str(target), str(source)]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except FileNotFoundError as error:
        raise StartError(f"no C compiler: {command[0]}") from error
    except subprocess.CalledProcessError as error:
        raise StartError(f"{' '.join(command)}\n{error.stderr}") from error


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_healthy(port: int) -> bool:
    """Ask whether a server has come up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _await_health(name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not is_healthy(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise StartError(f"{name} did not start (exit code {process.poll()}):\n{log.read_text()[-2000:]}")
        time.sleep(0.05)


@contextmanager
def running(name: str, site: Site, server: Server | None = None) -> Generator[tuple[int, int], None, None]:
    """A fresh process of the named server, answering; yields pid and port, and kills it and its children afterwards.

    Args:
        name: its key in `SERVERS`, or what its output's file is named by.
        site: what all servers share.
        server: how it is started, where it is none of `SERVERS`.

    Raises:
        StartError: it ended, or did not answer in time; holds the end of its output.
    """
    port = free_port()
    log = site.scratch / f"{name}.log"
    contain = [sys.executable, str(HERE / "contain.py"), str(site.core)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE / "peers"), os.environ.get("PYTHONPATH")))),
        "TOKENWIRE_BENCH_PAYLOAD": str(site.payload),
        "TOKENWIRE_BENCH_STEP_NS": str(STEP_NS),
    }
    command = contain + (server or SERVERS[name]).command(site, port)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        _await_health(name, process, port, log)
        yield process.pid, port
    finally:
        # The group, not the process: granian serves from a child. It is killed outright, since nothing of it is kept.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
