"""Gateways compared: CPU per token, and the time that a token takes longer than without one.

    python benchmarks/gateway.py --runs 5 --streams 64 --seconds 6
    python benchmarks/gateway.py --litellm-python /path/to/venv/bin/python

Every gateway stands before the same server, which stamps each token with the time it was sent; the reader takes the
difference. `direct` is no gateway: its median is what the machine itself takes, and is taken off the others'. `relay` is a
TCP relay in Python that looks at nothing. The runs are interleaved and each has fresh processes. The gateway has one core,
the server and the reader another, where there are two. Times are comparable within one invocation only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from command_line import cores, names_of
from processes import cpu_ns, process_tree
from workloads import STEP_NS, TOKENS_PER_SECOND, chat_completions_request

__all__ = ["GATEWAYS", "Run", "failed_targets", "main"]

HERE = Path(__file__).resolve().parent
BASELINE = "relay"
RIVAL = "litellm"
OWN = ("tokenwire-asyncio", "tokenwire-uvloop", "tokenwire-trio")
MAX_OF_RIVAL = 1 / 20
MAX_TIMES_RELAY = 5.0
START_DEADLINE_S = 90.0  # LiteLLM's import alone takes 10 to 30 s
OPEN_DEADLINE_S = 60.0
MAX_OPENING = 64  # streams that wait for their first token at one time
WARM_UP_S = 2.0
LATE_BELOW = 0.95
_LITELLM_ENVIRONMENT = {
    "LITELLM_LOG": "ERROR",
    # It does not start without a key otherwise. Nobody's key is checked by the others either.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}
_STAMP = re.compile(rb'"content": ?"([0-9]{6,20}) "')


class RunError(Exception):
    """A run that measured nothing."""


@dataclass(frozen=True, slots=True)
class Run:
    """One window of one gateway.

    Attributes:
        gateway: its key in `GATEWAYS`, or direct.
        tokens: tokens received.
        seconds: the window's length.
        cpu_us: the gateway's CPU microseconds per token; 0 where there is none.
        p50_us: the median time from the server's write to the reader's read.
        p99_us: its 99th percentile.
        late: fewer than 95 % of the tokens asked for arrived.
    """

    gateway: str
    tokens: int
    seconds: float
    cpu_us: float
    p50_us: float
    p99_us: float
    late: bool


@dataclass(frozen=True, slots=True)
class Site:
    """What the gateways of one run share."""

    scratch: Path
    upstream: int
    litellm_python: str


def _tokenwire(loop: str) -> Callable[[Site, int], list[str]]:
    serve = f"-m tokenwire.adapters.cli serve --loop {loop} --log-level error --model-name mock"
    return lambda site, port: [
        sys.executable, *serve.split(), "--backend", f"openai=http://127.0.0.1:{site.upstream}/v1", "--port", str(port),
    ]  # fmt: skip


def _relay(site: Site, port: int) -> list[str]:
    return [sys.executable, str(HERE / "peers" / "tcp_relay.py"), str(port), str(site.upstream)]


def _litellm(site: Site, port: int) -> list[str]:
    """LiteLLM's proxy with one model and nothing else that could cost: no logging, no callbacks, no data base."""
    model = {"model": "openai/mock", "api_base": f"http://127.0.0.1:{site.upstream}/v1", "api_key": "none"}
    config = {"model_list": [{"model_name": "mock", "litellm_params": model}]}
    path = site.scratch / "litellm.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    program = str(Path(site.litellm_python).with_name("litellm"))
    return [program, "--config", str(path), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]


GATEWAYS: dict[str, Callable[[Site, int], list[str]]] = {
    BASELINE: _relay,
    **{f"tokenwire-{loop}": _tokenwire(loop) for loop in ("asyncio", "uvloop", "trio")},
    RIVAL: _litellm,
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _process(name: str, command: list[str], core: int, scratch: Path, port: int) -> Generator[int, None, None]:
    """Start a program that listens on a port; kill it and its children afterwards."""
    log = scratch / f"{name}.log"
    environment = os.environ | {"OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1", **_LITELLM_ENVIRONMENT}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "contain.py"), str(core), *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield process.pid
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Reader:
    """All streams of one run, drained by one epoll; takes the age of each token as it comes.

    Attributes:
        ages: nanoseconds from the server's write to our read, of each token.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._poller = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._rests: dict[int, bytes] = {}
        self._silent: set[int] = set()
        self.ages: list[int] = []

    def open_streams(self, count: int) -> None:
        """Open streams until all are past their first token, or at the deadline most of them.

        A gateway that cannot follow the streams that run has no time left for new ones: its window is marked as late.

        Raises:
            RunError: a stream ended, or most of them gave no token in time.
        """
        request = chat_completions_request(self._port, "mock", 100_000)
        deadline = time.monotonic() + OPEN_DEADLINE_S
        while len(self._sockets) < count or self._silent:
            if len(self._sockets) < count and len(self._silent) < MAX_OPENING:
                peer = socket.create_connection(("127.0.0.1", self._port), timeout=10)
                peer.sendall(request)
                self._sockets[peer.fileno()] = peer
                self._silent.add(peer.fileno())
                self._poller.register(peer, select.EPOLLIN)
            self.drain_until(time.monotonic() + 0.01)
            if time.monotonic() > deadline:
                if 2 * len(self._silent) < count:
                    return
                raise RunError(f"{len(self._silent)} of {len(self._sockets)} streams gave no token in time")

    def drain_until(self, end: float) -> None:
        """Read whatever comes until the time given.

        Raises:
            RunError: a stream ended.
        """
        while (left := end - time.monotonic()) > 0:
            for descriptor, _ in self._poller.poll(left, 256):
                data = self._sockets[descriptor].recv(65_536)
                now = time.monotonic_ns()
                if not data:
                    raise RunError(f"a stream ended: {self._rests.get(descriptor, b'')[-500:]!r}")
                whole, mark, rest = (self._rests.get(descriptor, b"") + data).rpartition(b"\n\n")
                self._rests[descriptor] = rest
                for stamp in _STAMP.findall(whole + mark):
                    self.ages.append(now - int(stamp))
                    self._silent.discard(descriptor)

    def close(self) -> None:
        """Close every socket."""
        for peer in self._sockets.values():
            peer.close()
        self._poller.close()


def _window(name: str, port: int, pid: int | None, options: argparse.Namespace) -> Run:
    reader = Reader(port)
    try:
        reader.open_streams(int(options.streams))
        reader.drain_until(time.monotonic() + WARM_UP_S)
        tree = process_tree(pid) if pid is not None else []
        reader.ages.clear()
        start, cpu = time.monotonic(), cpu_ns(tree)
        reader.drain_until(start + float(options.seconds))
        cpu, seconds = cpu_ns(tree) - cpu, time.monotonic() - start
        ages = sorted(reader.ages)
    finally:
        reader.close()
    if not ages:
        raise RunError(f"{name}: no token came")
    wanted = LATE_BELOW * int(options.streams) * TOKENS_PER_SECOND * seconds
    return Run(
        gateway=name,
        tokens=len(ages),
        seconds=seconds,
        cpu_us=cpu / len(ages) / 1000,
        p50_us=ages[len(ages) // 2] / 1000,
        p99_us=ages[len(ages) * 99 // 100] / 1000,
        late=len(ages) < wanted,
    )


def _measure(name: str, options: argparse.Namespace, cores: tuple[int, int], scratch: Path) -> Run:
    upstream = _free_port()
    arguments = (str(upstream), str(STEP_NS), str(options.phases))
    stamping = [sys.executable, str(HERE / "peers" / "stamping_server.py"), *arguments]
    with _process("upstream", stamping, cores[1], scratch, upstream):
        if name == "direct":
            return _window(name, upstream, None, options)
        port = _free_port()
        command = GATEWAYS[name](Site(scratch, upstream, str(options.litellm_python)), port)
        with _process(name, command, cores[0], scratch, port) as pid:
            return _window(name, port, pid, options)


def _median(runs: list[Run], name: str, member: str) -> float:
    return statistics.median(float(getattr(run, member)) for run in runs if run.gateway == name)


def _added_us(runs: list[Run], name: str) -> float:
    """How much longer a token takes at the median than without a gateway."""
    return _median(runs, name, "p50_us") - _median(runs, "direct", "p50_us")


def failed_targets(runs: list[Run]) -> list[str]:
    """What the project promises of its gateway and these runs do not show, one sentence each."""
    measured = {run.gateway for run in runs}
    failures = [f"{name}: not measured" for name in ("direct", *GATEWAYS) if name not in measured]
    for name in (name for name in OWN if name in measured):
        if RIVAL in measured:
            share = _median(runs, name, "cpu_us") / _median(runs, RIVAL, "cpu_us")
            if share > MAX_OF_RIVAL:
                failures.append(f"{name}: 1/{1 / share:.1f} of {RIVAL}'s CPU per token, over 1/{1 / MAX_OF_RIVAL:.0f}")
        if {"direct", BASELINE} <= measured:
            times = _added_us(runs, name) / _added_us(runs, BASELINE)
            if times > MAX_TIMES_RELAY:
                failures.append(f"{name}: adds {times:.1f} times what a relay adds, over {MAX_TIMES_RELAY:.0f}")
        failures.extend(f"{name}: a run was late" for run in runs if run.gateway == name and run.late)
    return failures


def _print_table(runs: list[Run], names: list[str]) -> None:
    measured = {run.gateway for run in runs}
    rows = [["gateway", "us/token", f"of {RIVAL}", "p50 us", "p99 us", "added us", "x relay", "tokens/s", "late"]]
    for name in names:
        cpu, own = _median(runs, name, "cpu_us"), [run for run in runs if run.gateway == name]
        shown = name != "direct"
        added = _added_us(runs, name) if shown and "direct" in measured else None
        relay = _added_us(runs, BASELINE) if {"direct", BASELINE} <= measured else None
        rows.append(
            [
                name,
                f"{cpu:.1f}" if shown else "-",
                f"1/{_median(runs, RIVAL, 'cpu_us') / cpu:.1f}" if shown and RIVAL in measured else "-",
                f"{_median(runs, name, 'p50_us'):.0f}",
                f"{_median(runs, name, 'p99_us'):.0f}",
                "-" if added is None else f"{added:.0f}",
                "-" if added is None or relay is None else f"{added / relay:.2f}",
                f"{statistics.median(run.tokens / run.seconds for run in own):.0f}",
                f"{sum(run.late for run in own)}/{len(own)}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare gateways: CPU per token and added time.")
    add = parser.add_argument
    add("--runs", type=int, default=5)
    add("--streams", type=int, default=64)
    add("--seconds", type=float, default=6.0, help="length of each measured window")
    add(
        "--only",
        type=names_of(["direct", *GATEWAYS]),
        default=["direct", *GATEWAYS],
        metavar="NAME,...",
        help=", ".join(GATEWAYS),
    )
    add("--phases", type=int, default=1, help="moments of a step at which tokens come; 1: all together, 64: one by one")
    add("--litellm-python", default=sys.executable, help="interpreter beside whose programs `litellm` is")
    add("--pin", action=argparse.BooleanOptionalAction, default=len(os.sched_getaffinity(0)) > 1)
    add("--check", action="store_true", help="exit with 1 where our gateway misses its targets")
    add("--json", type=Path, metavar="FILE", help="also write every run")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs the command line; the exit code is 1 when a gateway failed, or with --check missed a target."""
    options = _parse(arguments)
    names: list[str] = options.only
    if RIVAL in names and not Path(options.litellm_python).with_name("litellm").exists():
        print(f"skipped {RIVAL}: it is not installed beside {options.litellm_python}", file=sys.stderr)
        names.remove(RIVAL)
    gateway_core, other_core = cores(options.pin)
    os.sched_setaffinity(0, {other_core} if other_core >= 0 else os.sched_getaffinity(0))
    runs: list[Run] = []
    try:
        with tempfile.TemporaryDirectory(prefix="gateway-") as scratch:
            for number in range(options.runs):
                for name in names:
                    run = _measure(name, options, (gateway_core, other_core), Path(scratch))
                    runs.append(run)
                    told = f"{run.cpu_us:.1f} us per token, p50 {run.p50_us:.0f} us{', late' if run.late else ''}"
                    print(f"run {number + 1} {name}: {told}", file=sys.stderr)
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    _print_table(runs, names)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(run) for run in runs], indent=2) + "\n")
    failures = failed_targets(runs) if options.check else []
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
