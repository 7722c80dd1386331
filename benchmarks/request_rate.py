"""Short answers: how many one-token answers a second a server gives on one core, beside uvicorn on bare ASGI.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/request_rate.py --runs 7 --check

Each answer is a whole request: a POST with a small JSON body on a connection that is kept alive, and a stream of one
token. Ours goes the whole way: guard, JSON, model, stream, dialect, accounting. The peers read the body and send constant
bytes, so that our whole server is compared with their byte path alone; but for uvicorn-json, which reads the JSON and words
the answer, token by token, and does without everything else.

The runs are interleaved (A B C, A B C, ...), each with a fresh server process, pinned to one core while the asking end
(request_load.c) has another. Two rates are told: answers by the clock, and answers by the server's own CPU time, which
other work on the machine does not change as long as the core is not shared. They are the same where the core is busy
with nothing else. What is checked is the second, by the median over the rounds of each round's own ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from command_line import cores, exit_on_sigterm, names_of
from processes import cpu_ns, process_tree
from servers import Server, Site, StartError, available, compile_c, prepare, running

__all__ = ["RATED", "Rate", "failed_targets", "main"]

HERE = Path(__file__).resolve().parent
PEER = "uvicorn-httptools"
OURS = "tokenwire-uvloop"  # the peer's loop
MIN_RATIO = 1.0
WARM_UP_MS = 500
DEADLINE_S = 120.0
MAX_RUNS = 100


def _tokenwire(loop: str) -> Callable[[Site, int], list[str]]:
    mock = "--backend mock --mock-ttft 0 --mock-itl 0 --mock-seed 7"
    serve = f"-m tokenwire.adapters.cli serve {mock} --loop {loop} --log-level warning"
    return lambda site, port: [site.python, *serve.split(), "--port", str(port)]


def _uvicorn(parser: str, app: str = "one_token_asgi") -> Callable[[Site, int], list[str]]:
    flags = f"--loop uvloop --http {parser} --ws none --lifespan off --timeout-graceful-shutdown 1"
    run = f"-m uvicorn {flags} --no-access-log --log-level warning {app}:app --host 127.0.0.1"
    return lambda site, port: [site.peers_python, *run.split(), "--port", str(port)]


RATED: dict[str, Server] = {
    PEER: Server(_uvicorn("httptools"), ("uvicorn", "uvloop", "httptools"), peer=True),
    "uvicorn-json": Server(
        _uvicorn("httptools", "one_token_json_asgi"), ("uvicorn", "uvloop", "httptools", "msgspec"), peer=True
    ),
    "uvicorn-h11": Server(_uvicorn("h11"), ("uvicorn", "uvloop", "h11"), peer=True),
    "tokenwire-asyncio": Server(_tokenwire("asyncio"), ("tokenwire.adapters.cli",)),
    OURS: Server(_tokenwire("uvloop"), ("tokenwire.adapters.cli", "uvloop")),
    "tokenwire-trio": Server(_tokenwire("trio"), ("tokenwire.adapters.cli", "trio")),
}


@dataclass(frozen=True, slots=True)
class Rate:
    """One window of one server.

    Attributes:
        by_clock: answers a second.
        by_cpu: answers a second of the server's CPU time.
        answer_bytes: bytes of one answer, head and all.
    """

    by_clock: float
    by_cpu: float
    answer_bytes: float


def _request() -> bytes:
    body = b'{"prompt":"Say one word.","max_tokens":1}'
    head = b"POST /chat HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: request_load\r\nAccept: */*\r\n"
    return head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _measure(name: str, site: Site, client_core: int, options: argparse.Namespace) -> Rate:
    contain = [sys.executable, str(HERE / "contain.py"), str(client_core)]
    with running(name, site, RATED[name]) as (pid, port):
        arguments = (port, options.connections, WARM_UP_MS, options.seconds * 1000, site.scratch / "request")
        command = [*contain, str(site.scratch / "request_load"), *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as load:
            assert load.stdout is not None
            assert load.stderr is not None
            try:
                begun = load.stdout.readline()
                tree = process_tree(pid)
                cpu = cpu_ns(tree)
                words = load.stdout.readline().split()
                cpu = cpu_ns(tree) - cpu
                error = load.stderr.read()
                load.wait(DEADLINE_S)
            finally:
                load.kill()
    if load.returncode or not begun or len(words) != 3:
        raise StartError(f"{name}: {error.strip()}")
    answers, received = int(words[1]), int(words[2])
    return Rate(answers / options.seconds, answers * 1e9 / cpu, received / answers)


def _measure_all(options: argparse.Namespace, names: list[str], site: Site, client_core: int) -> dict[str, list[Rate]]:
    table: dict[str, list[Rate]] = {name: [] for name in names}
    for number in range(options.runs):
        for name in names:
            rate = _measure(name, site, client_core, options)
            table[name].append(rate)
            print(f"run {number + 1} {name}: {rate.by_clock:.0f}/s, {rate.by_cpu:.0f} per CPU second", file=sys.stderr)
    return table


def _paired_ratio(rates: list[Rate], peer: list[Rate]) -> float:
    return statistics.median(own.by_cpu / its.by_cpu for own, its in zip(rates, peer, strict=True))


def failed_targets(table: dict[str, list[Rate]]) -> list[str]:
    """What the project promises and these figures do not show, one sentence each; what was not measured is not shown."""
    missing = [f"{name}: not measured" for name in (OURS, PEER) if not table.get(name)]
    if missing:
        return missing
    ratio = _paired_ratio(table[OURS], table[PEER])
    return [f"{OURS}: {ratio:.2f} times the answers of {PEER}, under {MIN_RATIO}"] if ratio < MIN_RATIO else []


def _print_table(table: dict[str, list[Rate]]) -> None:
    print(f"{'server':20}{'answers/s':>12}{'per CPU second':>16}{'CPU us':>9}{'B/answer':>10}{'ratio':>8}")
    for name, rates in table.items():
        by_cpu = statistics.median(rate.by_cpu for rate in rates)
        ratio = f"{_paired_ratio(rates, table[PEER]):.2f}" if PEER in table else "-"
        print(
            f"{name:20}{statistics.median(rate.by_clock for rate in rates):>12.0f}{by_cpu:>16.0f}{1e6 / by_cpu:>9.1f}"
            f"{statistics.median(rate.answer_bytes for rate in rates):>10.0f}{ratio:>8}"
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare servers by one-token answers a second on one core.")
    add = parser.add_argument
    add("--runs", type=int, choices=range(1, MAX_RUNS + 1), default=7, metavar=f"1..{MAX_RUNS}")
    add("--seconds", type=int, default=3, help="length of each measured window")
    add("--connections", type=int, default=16, help="connections, each with one request on its way")
    add("--only", type=names_of(RATED), default=list(RATED), metavar="NAME,...", help=", ".join(RATED))
    add("--pin", action=argparse.BooleanOptionalAction, default=len(os.sched_getaffinity(0)) > 1)
    add("--peers-python", default=sys.executable, help="interpreter that has the peers installed")
    add("--skip-missing", action="store_true", help="leave out servers that are not installed")
    add("--check", action="store_true", help="exit with 1 where our server misses its target")
    add("--json", type=Path, metavar="FILE", help="also write every run")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> dict[str, list[Rate]]:
    server_core, client_core = cores(options.pin)
    with tempfile.TemporaryDirectory(prefix="request-rate-") as scratch:
        site = prepare(Path(scratch), options.peers_python, server_core, None)
        compile_c(HERE / "request_load.c", site.scratch / "request_load")
        (site.scratch / "request").write_bytes(_request())
        names = available(options.only, RATED, site, skip_missing=options.skip_missing)
        return _measure_all(options, names, site, client_core)


def main(arguments: list[str]) -> int:
    """Runs the command line; the exit code is 1 when a server failed, or with --check missed the target."""
    options = _parse(arguments)
    exit_on_sigterm()
    try:
        table = _run(options)
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    _print_table(table)
    if options.json:
        rows = {
            name: [{"by_clock": rate.by_clock, "by_cpu": rate.by_cpu} for rate in rates]
            for name, rates in table.items()
        }
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    failures = failed_targets(table) if options.check else []
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
