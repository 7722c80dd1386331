"""Hours of mixed clients against the bundled server: what it holds must not grow.

    python benchmarks/soak.py --seconds 3600 --loop uvloop

Clients come and go without end: some read a stream to its end, some leave in the middle, some stop reading, some ask for
whole answers, some send garbage. After a warm-up the server's memory, descriptors and threads are looked at whenever all
clients have gone; the last look may not exceed the first by more than is allowed. Every stream that is read to its end
must be whole.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from processes import memory
from servers import free_port, is_healthy
from workloads import chat_completions_request

__all__ = ["Look", "main"]

MAX_GROWTH_BYTES: Final = 4 * 1024 * 1024
"""What the allocator may hold more at the end than after the warm-up."""
_WARM_UP_ROUNDS: Final = 20
_CLIENTS: Final = 200
_PATIENCE_S: Final = 30.0
_REQUEST_TOKENS: Final = 40

Client = Callable[[int, random.Random], Awaitable[None]]


class Look(NamedTuple):
    """What the server holds while nobody is connected."""

    rss: int
    """Resident bytes."""
    descriptors: int
    """Open files."""
    threads: int
    """Threads."""


class SoakError(Exception):
    """The server did what it must not."""


async def _read_all(port: int, rng: random.Random) -> None:
    del rng
    body = await _ask(port, None)
    if not body.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in body or not body.endswith(b"0\r\n\r\n"):
        raise SoakError(f"a stream was not whole: {body[:80]!r} ... {body[-80:]!r}")


async def _leave(port: int, rng: random.Random) -> None:
    await _ask(port, rng.randrange(1, 4000))


async def _stop_reading(port: int, rng: random.Random) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(chat_completions_request(port, "mock", _REQUEST_TOKENS))
    await asyncio.sleep(rng.random())
    del reader
    writer.transport.abort()


async def _send_garbage(port: int, rng: random.Random) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(rng.randbytes(rng.randrange(1, 2000)) + b"\r\n\r\n")
    writer.write_eof()
    with suppress(ConnectionError):
        await reader.read()
    writer.close()


async def _ask(port: int, leave_after: int | None) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = chat_completions_request(port, "mock", _REQUEST_TOKENS)
    writer.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    try:
        body = b""
        while (leave_after is None or len(body) < leave_after) and (data := await reader.read(65536)):
            body += data
        return body
    finally:
        writer.close()


_CLIENT_MIX: Final[tuple[Client, ...]] = (_read_all, _read_all, _leave, _leave, _stop_reading, _send_garbage)


async def _round(port: int, rng: random.Random) -> Counter[str]:
    """Let a crowd of clients come and go."""
    chosen = rng.choices(_CLIENT_MIX, k=_CLIENTS)
    async with asyncio.timeout(_PATIENCE_S):
        await asyncio.gather(*(client(port, rng) for client in chosen))
    return Counter(client.__name__.strip("_") for client in chosen)


def _look(pid: int) -> Look:
    process = Path("/proc") / str(pid)
    return Look(memory([pid]).rss, len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())))


def _settled(pid: int, expected: int | None) -> Look:
    """Look once the server has let go of the last client; it may take as long as a closed connection lingers."""
    deadline = time.monotonic() + _PATIENCE_S
    look = _look(pid)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        before, look = look, _look(pid)
        if before.descriptors == look.descriptors and (expected is None or look.descriptors <= expected):
            break
    return look


def _failures(first: Look, last: Look) -> list[str]:
    grown = last.rss - first.rss
    checks = (
        (grown <= MAX_GROWTH_BYTES, f"memory grew by {grown / 1024:.0f} KiB"),
        (last.descriptors <= first.descriptors, f"descriptors grew from {first.descriptors} to {last.descriptors}"),
        (last.threads <= first.threads, f"threads grew from {first.threads} to {last.threads}"),
    )
    return [words for fine, words in checks if not fine]


def _soak(port: int, pid: int, seconds: float, seed: int) -> list[str]:
    rng = random.Random(seed)
    served: Counter[str] = Counter()
    for _ in range(_WARM_UP_ROUNDS):
        served += asyncio.run(_round(port, rng))
    first = last = _settled(pid, None)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        served += asyncio.run(_round(port, rng))
        last = _settled(pid, first.descriptors)
        print(
            f"{served.total():>9} clients  {last.rss / 2**20:6.1f} MiB  {last.descriptors} fds  {last.threads} threads"
        )
    print(", ".join(f"{count} x {name}" for name, count in sorted(served.items())))
    return _failures(first, last)


def main(arguments: list[str]) -> int:
    """Run the soak; 1 where something grew or broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--loop", default="asyncio", choices=("asyncio", "uvloop", "trio"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    port = free_port()
    serve = f"-m tokenwire.adapters.cli serve --backend mock --mock-ttft 20ms --mock-itl 5ms --mock-jitter 0.5 --port {port}"
    command = [sys.executable, *serve.split(), "--loop", options.loop, "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while not is_healthy(port):
                if process.poll() is not None:
                    print("the server did not start", file=sys.stderr)
                    return 1
                time.sleep(0.1)
            failures = _soak(port, process.pid, options.seconds, options.seed)
        except SoakError as error:
            failures = [str(error)]
        finally:
            process.terminate()
    for words in failures:
        print(f"FAILED: {words}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
