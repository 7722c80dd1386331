"""The system calls of a started server, as strace sees them: in steady state a token is one write, and a step is one wait.

`make deps-debian` installs strace.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest
from tests.e2e.harness import ENVIRONMENT, HERE, until

STREAMS: Final = 8
TOKENS: Final = 60

WAITS: Final = {
    "asyncio": ("epoll_wait", 1),
    "trio": ("epoll_wait", 1),
    "uvloop": ("epoll_pwait", 2),  # libuv's clock has whole milliseconds: a timer may ring one early, to be set again
}
"""How each loop waits, and how often per step at most. A look that does not wait, as libuv takes before it does, wakes
nobody."""

_GREETING: Final = re.compile(r"http://127\.0\.0\.1:(\d+)")
_CALL: Final = re.compile(r"\d+ +(\w+)\(")
_TOKEN: Final = re.compile(r'\d+ +write\((\d+), "[0-9a-f]+\\r\\ndata: ')
_TEXT: Final = re.compile(rb'\{"token":"[^"]')
_LOOK: Final = re.compile(r"\d+ +epoll_p?wait\(\d+, \[\], \d+, 0[,)]")
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


@contextmanager
def traced_server(folder: Path, loop: str) -> Generator[int, None, None]:
    """Start a server under strace, which writes `trace` into a folder; give its port, and end it by SIGTERM."""
    strace = ["strace", "-f", "-qq", "-s", "24", "-e", "signal=none", "-o", str(folder / "trace")]
    serve = [sys.executable, "-m", "tokenwire.adapters.cli", "serve", "--port", "0", "--loop", loop]
    output = folder / "output"
    with output.open("wb") as written:
        process = subprocess.Popen(
            [*strace, *serve, "--mock-ttft", "50ms", "--mock-itl", "20ms"],
            cwd=HERE,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        greeting = until(lambda: _greeting(process, output), "the server's greeting")
        yield int(greeting[1])
        (server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(server), signal.SIGTERM)
        assert process.wait(20) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()


def _greeting(process: subprocess.Popen[bytes], output: Path) -> re.Match[str] | None:
    assert process.poll() is None, f"the server ended at once:\n{output.read_text()}"
    return _GREETING.search(output.read_text())


def read_streams(port: int) -> list[bytes]:
    """Ask for all streams at once, and read each to its end."""
    request = f"GET /chat?prompt=hi&max_tokens={TOKENS} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with ExitStack() as opened:
        clients = [opened.enter_context(socket.create_connection(("127.0.0.1", port), 20)) for _ in range(STREAMS)]
        for sock in clients:
            sock.sendall(request)
        return [_read_to_end(sock) for sock in clients]


def _read_to_end(sock: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(_LAST_CHUNK):
        data = sock.recv(65_536)
        assert data, f"the answer broke off: {answer!r}"
        answer += data
    return answer


def steady(lines: list[str]) -> list[str]:
    """Cut out the lines of whole steps of all streams: from a step's first token to another's, past all beginnings."""
    tokens = [(at, match[1]) for at, line in enumerate(lines) if (match := _TOKEN.match(line))]
    first = Counter(descriptor for _, descriptor in tokens).most_common()[0][0]
    steps = [at for at, descriptor in tokens if descriptor == first]
    return lines[steps[TOKENS // 4] : steps[TOKENS * 3 // 4]]


@pytest.mark.parametrize("loop", WAITS)
def test_a_token_is_one_write_and_a_step_one_wait(tmp_path: Path, loop: str) -> None:
    with traced_server(tmp_path, loop) as port:
        answers = read_streams(port)
    assert [len(_TEXT.findall(answer)) for answer in answers] == [TOKENS] * STREAMS
    window = steady((tmp_path / "trace").read_text().splitlines())
    calls = Counter(match[1] if (match := _CALL.match(line)) else line for line in window if not _LOOK.match(line))
    steps = TOKENS // 2
    wait, most = WAITS[loop]
    assert calls.keys() == {"write", wait}
    assert calls["write"] == sum(bool(_TOKEN.match(line)) for line in window) == steps * STREAMS
    assert calls[wait] <= steps * most
