"""What the end-to-end tests stand on: a started server, conditions with deadlines, and a relay that cuts connections.

Nothing here sleeps in the hope that something will have happened: `until` asks again and again, up to a deadline.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlencode, urlsplit

__all__ = [
    "DONE",
    "ENVIRONMENT",
    "HERE",
    "Reader",
    "Relay",
    "Server",
    "curl",
    "data_of",
    "notes",
    "readable",
    "run_program",
    "text_of",
    "until",
]

T = TypeVar("T")

HERE: Final = Path(__file__).parent
DONE: Final = "[DONE]"

_PATIENCE_S: Final = 20.0
"""How long a condition may take on a busy machine. Nothing gets slower by it: a wait ends as soon as its condition holds."""

_STARTING_S: Final = 90.0
"""How long a server may take to listen: one with a model loads it first."""

_GREETING: Final = re.compile(r"^tokenwire on (http://\S+) \|", re.MULTILINE)
_TRACEBACK: Final = "Traceback (most recent call last)"
_BACKEND_FAILED: Final = re.compile(r" ERROR tokenwire\.backends: \w+ failed$")
_LEAKS: Final = ("ResourceWarning", "never awaited", "never retrieved", "Exception ignored", "Task was destroyed")
_LINGER_RESET: Final = struct.pack("ii", 1, 0)

ENVIRONMENT: Final = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
"""The environment of every program that a test starts: a proxy has no business on the loopback."""


def until(condition: Callable[[], T | None], what: str, seconds: float = _PATIENCE_S) -> T:
    """Wait until a condition returns something true, and return that.

    Raises:
        AssertionError: it did not in time; the message says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)


# ----------------------------------------------------------------------------------------------------------- servers


class Server:
    """A started `tokenwire serve`. Leaving the context stops it by SIGTERM and looks at how it ended.

    Args:
        folder: an empty folder for its output and its log.
        arguments: of `serve`, besides the port.
        loop: the event loop.
        python: the interpreter of the environment that it runs in.

    Attributes:
        url: where it listens, as it says itself.
        greeting: the whole line that it says when it listens.
    """

    def __init__(
        self, folder: Path, *arguments: str, loop: str = "asyncio", python: Path | str = sys.executable
    ) -> None:
        self._output = folder / "server.out"
        self._log = folder / "server.log"
        command = [str(python), "-W", "default::ResourceWarning", "-m", "tokenwire.adapters.cli", "serve"]
        with self._output.open("wb") as output, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0", "--loop", loop, *arguments],
                cwd=HERE,  # so that --backend finds the backends of the tests
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
            )
        try:
            greeting = until(self._greeted, "the server's greeting", _STARTING_S)
            self.url, self.greeting = greeting[1], greeting.string
        except BaseException:
            self._kill()
            raise

    @property
    def port(self) -> int:
        """The port it listens on."""
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    def logged(self, pattern: str) -> list[str]:
        """The lines of the log that a pattern is found in."""
        return [line for line in self.log.splitlines() if re.search(pattern, line)]

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = _PATIENCE_S) -> None:
        """Wait for its end, which has to be a clean one."""
        code = self.process.wait(seconds)
        assert code == 0, f"exit code {code}\n{self.log}"
        self._check_log()

    def stop(self) -> None:
        """End it as an operator would, and wait for it."""
        if self.process.poll() is None:
            self.signal()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self._kill()

    def _greeted(self) -> re.Match[str] | None:
        assert self.process.poll() is None, f"the server ended at once:\n{self.log}"
        return _GREETING.search(self._output.read_text())

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(_PATIENCE_S)

    def _check_log(self) -> None:
        """A backend's own failure is logged with its traceback; there is no other."""
        lines = self.log.splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            unexpected = _TRACEBACK in line and not _BACKEND_FAILED.search(before)
            assert not unexpected, f"a traceback in the log:\n{self.log}"
        leaks = [line for line in lines if any(word in line for word in _LEAKS)]
        assert not leaks, leaks


# ----------------------------------------------------------------------------------------------------------- clients


def run_program(command: Sequence[str], *, given: str = "", seconds: float = 60.0) -> str:
    """Run a program to its end, and return what it printed.

    Raises:
        AssertionError: it failed.
    """
    done = subprocess.run(
        command, input=given.encode(), capture_output=True, timeout=seconds, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stderr.decode()}"
    return done.stdout.decode()


def curl(url: str, *arguments: str) -> str:
    """Ask with curl, unbuffered and without its progress bar; return the body."""
    return run_program(["curl", "-N", "-sS", *arguments, url])


def data_of(body: str) -> list[str]:
    """The data of the events of a stream in plain.v1, where each has one line of data."""
    return [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]


def text_of(body: str) -> str:
    """The text of a whole stream in plain.v1.

    Raises:
        AssertionError: the stream is not whole, or failed.
    """
    *events, last = data_of(body)
    assert last == DONE, body
    said: list[dict[str, Any]] = [json.loads(data) for data in events]
    assert not any("error" in event for event in said), body
    return "".join(event["token"] for event in said)


def notes(folder: Path) -> list[str]:
    """What the backend under test has written down in a folder."""
    path = folder / "notes"
    return path.read_text().splitlines() if path.exists() else []


class Reader:
    """A client of /chat on a bare socket, for what no well-behaved client lets a test do.

    Attributes:
        received: all bytes of the answer so far.
    """

    def __init__(self, server: Server, query: Mapping[str, str]) -> None:
        self.received = b""
        self._sock = socket.create_connection(("127.0.0.1", server.port), _PATIENCE_S)
        head = f"GET /chat?{urlencode(query)} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n"
        self._sock.sendall(head.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_until(self, mark: bytes) -> bytes:
        """Read until the answer has a mark in it; return all of the answer so far.

        Raises:
            AssertionError: it ended before.
        """
        while mark not in self.received:
            data = self._sock.recv(65_536)
            assert data, f"the answer ended before {mark!r}: {self.received!r}"
            self.received += data
        return self.received

    def read_to_end(self) -> bytes:
        """Read until the server closes; return all of the answer."""
        while data := self._sock.recv(65_536):
            self.received += data
        return self.received

    def fileno(self) -> int:
        """Its socket's file descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close."""
        self._sock.close()


def readable(*readers: Reader) -> list[Reader]:
    """Those readers for whom something has arrived."""
    return select.select(readers, (), (), 0)[0]


# ------------------------------------------------------------------------------------------------------------- relay


class Relay:
    """A TCP relay before a server, whose connections a test can cut. It runs in a thread of its own.

    Args:
        server: what it stands before.

    Attributes:
        url: where it listens.
    """

    def __init__(self, server: Server) -> None:
        self._target = server.port
        self._connections: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._asked: list[bytearray] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(_PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_PATIENCE_S)
        self._loop.close()

    def heads(self, path: str) -> list[str]:
        """The heads of the requests for a path so far, in the order of their connections."""
        heads = [head for asked in list(self._asked) for head in asked.decode("latin-1").split("\r\n\r\n")]
        return [head for head in heads if head.partition(" ")[2].startswith((f"{path}?", f"{path} "))]

    def cut(self, *, reset: bool) -> None:
        """Cut every connection, by a reset or by an end of data, on both sides."""
        self._loop.call_soon_threadsafe(self._cut, reset)

    def _cut(self, reset: bool) -> None:
        for pair in self._connections:
            for writer in pair:
                if reset:
                    sock: socket.socket = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
                writer.transport.abort()
        self._connections.clear()

    async def _main(self) -> None:
        self._closing = asyncio.Event()
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._closing.wait()
        listener.close()
        self._cut(reset=False)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), _PATIENCE_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        self._connections.append((writer, to_server))
        asked = bytearray()
        self._asked.append(asked)
        await asyncio.gather(_pass_on(reader, to_server, asked), _pass_on(upstream, writer, bytearray()))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray) -> None:
    try:
        while data := await reader.read(65_536):
            seen += data
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # the end of a connection, like any other
    finally:
        writer.close()
