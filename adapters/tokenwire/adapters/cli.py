"""The command line: `tokenwire serve` and `tokenwire bench codec`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from tokenwire.backends.base import Backend
from tokenwire.backends.generators import LoadError, load
from tokenwire.backends.mock import MockBackend
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.guard import LOOPBACK_HOSTS, Guard
from tokenwire.core.service import ServiceOptions

from .server import LOOPS, ServerOptions, bind, run

__all__ = ["duration_ns", "main"]

_UNITS_NS: Final = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(us|ms|s|m)", re.ASCII)
_LOOPBACK_ADDRESSES: Final = frozenset({"localhost", "127.0.0.1", "::1"})

_OPEN_FILES: Final = 65_536
"""Open files that are asked for at the start: one a connection. The usual soft limit of 1024 is soon reached."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 1 for a failure that is told in one line, 2 for wrong usage.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (LoadError, OSError, ImportError) as error:
        print(f"tokenwire: {error}", file=sys.stderr)
        return 1


def duration_ns(text: str) -> int:
    """Read a duration such as 200ms, 1.5s or 2m; a bare 0 needs no unit.

    Returns:
        Nanoseconds.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        if text == "0":
            return 0
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 200ms, 1.5s or 2m")
    return round(float(match[1]) * _UNITS_NS[match[2]])


def _jitter(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return value


def _heartbeat(text: str) -> int:
    value = duration_ns(text)
    if not value:
        raise argparse.ArgumentTypeError("a heartbeat after no silence would never pause")
    return value


def _whole_number(least: int, most: int = 1_000_000) -> Callable[[str], int]:
    """Make a reader of whole numbers within bounds."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenwire", description="The streaming layer of an LLM server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="run the bundled server",
        description="Run the bundled server. A first Ctrl-C or SIGTERM lets running streams end, a second does not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    serve.set_defaults(command=_serve)
    add = serve.add_argument
    add("--backend", default="mock", help="mock, or module:attribute of any Python generator function")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_whole_number(0, 65_535), default=8000, help="port to listen on; 0 for any")
    add("--loop", choices=sorted(LOOPS), default="asyncio", help="event loop")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a further name to answer to")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may call, * for any",
    )
    add("--max-streams", type=_whole_number(1), default=1024, help="streams that run at once")
    add("--max-queue", type=_whole_number(0), default=256, help="streams that wait; more are refused with 429")
    add("--max-connections", type=_whole_number(1), default=4096, help="connections at once")
    add("--heartbeat", type=_heartbeat, default="15s", help="silence after which a heartbeat is sent")
    add("--drain", type=duration_ns, default="30s", help="how long running streams may go on after the first signal")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="what to log")
    mock = serve.add_argument_group("the mock backend")
    mock.add_argument("--mock-ttft", type=duration_ns, default="200ms", help="time to the first token")
    mock.add_argument("--mock-itl", type=duration_ns, default="20ms", help="time between tokens")
    mock.add_argument("--mock-jitter", type=_jitter, default=0.0, help="share by which each gap varies, 0 to 1")
    mock.add_argument("--mock-seed", type=int, default=0, help="makes texts and gaps repeatable")
    _add_bench(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="measure on this machine").add_subparsers(required=True, metavar="WHAT")
    about = "what framing a token costs here, beside the peers that are installed"
    codec = bench.add_parser("codec", help=about, description=f"Measure {about}.")
    codec.set_defaults(command=_bench_codec)
    codec.add_argument("--rounds", type=int, default=31, help="how often each contender runs (31)")
    for form in ("json", "html", "svg"):
        codec.add_argument(f"--{form}", type=Path, metavar="FILE", help=f"also write the result as {form.upper()}")


def _bench_codec(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("rich") is None:
        raise ImportError("the table needs rich: pip install 'tokenwire[cli]'")
    from . import bench_codec

    report = bench_codec.measure(max(options.rounds, 1), progress=lambda title: print(title, file=sys.stderr))
    bench_codec.print_table(report)
    if options.json:
        options.json.write_bytes(bench_codec.to_json(report))
    if options.html:
        options.html.write_text(bench_codec.to_html(report), encoding="utf-8")
    if options.svg:
        options.svg.write_text(bench_codec.to_svg(report), encoding="utf-8")
    return 0


def _serve(options: argparse.Namespace) -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=options.log_level.upper())
    _raise_open_file_limit()
    backend = _backend(options)
    listeners = bind(options.host, options.port)
    url = _url(options.host, listeners[0])

    def started() -> None:
        print(_greeting(url, backend, options), flush=True)

    run(backend, listeners, loop=options.loop, options=_server_options(options), started=started)
    return 0


def _backend(options: argparse.Namespace) -> Backend:
    if options.backend == "mock":
        return MockBackend(
            ttft_ns=options.mock_ttft, itl_ns=options.mock_itl, jitter=options.mock_jitter, seed=options.mock_seed
        )
    return load(options.backend)


def _server_options(options: argparse.Namespace) -> ServerOptions:
    local = options.host in _LOOPBACK_ADDRESSES
    named = frozenset(name.lower() for name in options.allow_host)
    guard = Guard(
        allowed_hosts=(LOOPBACK_HOSTS if local else frozenset[str]()) | named if local or named else None,
        allowed_origins=frozenset(options.allow_origin),
    )
    service = ServiceOptions(
        guard=guard,
        max_running=options.max_streams,
        max_waiting=options.max_queue,
        delivery=DeliveryOptions(heartbeat_ns=options.heartbeat),
        page=resources.files("tokenwire.adapters").joinpath("page.html").read_bytes(),
    )
    return ServerOptions(service=service, max_connections=options.max_connections, drain_ns=options.drain)


def _url(host: str, listener: socket.socket) -> str:
    shown = "localhost" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  # shown, not bound
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"


def _greeting(url: str, backend: Backend, options: argparse.Namespace) -> str:
    models = ", ".join(model.name for model in backend.models)
    try_it = f"curl -N '{url}/chat?prompt=Hello'"
    return f"tokenwire on {url} | model: {models} | dialects: plain, OpenAI chat | loop: {options.loop} | try: {try_it}"


def _raise_open_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
