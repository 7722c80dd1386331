"""The command line: `tokenwire serve`, `tokenwire record` and `tokenwire bench codec`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from tokenwire.backends.generators import LoadError
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.guard import LOOPBACK_HOSTS, Guard
from tokenwire.core.peers import PeerLimits, read_network
from tokenwire.core.service import ServiceOptions

from ._backend_choice import Choice, add_options, choose
from ._readers import duration_ns, whole_number
from .logs import JsonFormatter
from .record import add_command as add_record
from .server import LOOPS, ServerOptions, bind, run

__all__ = ["duration_ns", "main"]

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


def _heartbeat(text: str) -> int:
    value = duration_ns(text)
    if not value:
        raise argparse.ArgumentTypeError("a heartbeat after no silence would never pause")
    return value


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
    add_options(serve)
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=whole_number(0, 65_535), default=8000, help="port to listen on; 0 for any")
    add("--loop", choices=sorted(LOOPS), default="asyncio", help="event loop")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a further name to answer to")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may call, * for any",
    )
    add("--max-streams", type=whole_number(1), default=1024, help="streams that run at once")
    add("--max-queue", type=whole_number(0), default=256, help="streams that wait; more are refused with 429")
    add("--max-connections", type=whole_number(1), default=4096, help="connections at once")
    _add_peer_limits(serve.add_argument_group("limits per client", _ABOUT_PEERS))
    add("--heartbeat", type=_heartbeat, default="15s", help="silence after which a heartbeat is sent")
    add("--drain", type=duration_ns, default="30s", help="how long running streams may go on after the first signal")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="what to log")
    add("--log-format", choices=("text", "json"), default="text", help="how to log")
    add(
        "--accounting",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count latencies, for /metrics and log",
    )
    add_record(commands)
    _add_bench(commands)
    return parser


_ABOUT_PEERS: Final = (
    "Counted by address, and by /64 where it is IPv6; 0 for no limit. Off by default: behind a proxy every client comes "
    "from the proxy's address. Name it with --exempt-peer before you set a limit there."
)


def _add_peer_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max-connections-per-peer", type=whole_number(0), default=0, help="connections at once; more get 429")
    add("--max-streams-per-peer", type=whole_number(0), default=0, help="streams at once; more get 429")
    add(
        "--exempt-peer",
        type=_network,
        action="append",
        default=[],
        metavar="ADDRESS",
        help="an address or network that stands for many clients, such as 10.0.0.0/8",
    )


def _network(text: str) -> str:
    try:
        return str(read_network(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an address nor a network") from None


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
    _set_up_log(options)
    _raise_open_file_limit()
    choice = choose(options)
    listeners = bind(options.host, options.port)
    url = _url(options.host, listeners[0])

    def started() -> None:
        print(_greeting(url, choice, options), flush=True)

    run(choice.backend, listeners, loop=options.loop, options=_server_options(options), started=started)
    return 0


def _set_up_log(options: argparse.Namespace) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=options.log_level.upper())
    if options.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


def _server_options(options: argparse.Namespace) -> ServerOptions:
    local = options.host in _LOOPBACK_ADDRESSES
    named = frozenset(name.lower() for name in options.allow_host)
    guard = Guard(
        allowed_hosts=(LOOPBACK_HOSTS if local else frozenset[str]()) | named if local or named else None,
        allowed_origins=frozenset(options.allow_origin),
    )
    service = ServiceOptions(
        guard=guard,
        accounting=options.accounting,
        max_running=options.max_streams,
        max_waiting=options.max_queue,
        delivery=DeliveryOptions(heartbeat_ns=options.heartbeat),
        page=resources.files("tokenwire.adapters").joinpath("page.html").read_bytes(),
    )
    peers = PeerLimits(
        max_connections=options.max_connections_per_peer,
        max_streams=options.max_streams_per_peer,
        exempt=tuple(options.exempt_peer),
    )
    return ServerOptions(service=service, max_connections=options.max_connections, peers=peers, drain_ns=options.drain)


def _url(host: str, listener: socket.socket) -> str:
    shown = "localhost" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  # shown, not bound
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"


def _greeting(url: str, choice: Choice, options: argparse.Namespace) -> str:
    models = ", ".join(model.name for model in choice.backend.models) or "those that the server lists"
    served = f"model: {models} | backend: {choice.reason}"
    try_it = f"curl -N '{url}/chat?prompt=Hello'"
    return f"tokenwire on {url} | {served} | dialects: plain, OpenAI chat | loop: {options.loop} | try: {try_it}"


def _raise_open_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
