"""What a WebSocket frame costs to send and to receive, beside wsproto and websockets, as ratios of medians in one run.

    python benchmarks/frames.py --rounds 100 --check

The contenders are interleaved (A B C, A B C, ...), so that a noisy moment falls on all alike. Each is a server's
connection without compression, as its users drive it; each round is a fresh one. What they make is compared before it is
timed: frames byte by byte, and the text that a frame carried.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from wsproto.connection import Connection, ConnectionType
from wsproto.events import TextMessage as WsprotoText

from tokenwire.core.websocket import Role, TextMessage, WebSocketConnection

__all__ = ["TARGETS", "check_contenders", "failed_targets", "idle_bytes", "main", "measure"]

OWN: Final = "tokenwire"
REPEATS: Final = 500
SENT: Final = '{"id":"chatcmpl-0123456789","choices":[{"index":0,"delta":{"content":" token"}}]}'.ljust(195, ".")
TEXT: Final = "A prompt as a client sends it, with some letters beyond ASCII: äöü. ".ljust(197, "x")
MAX_IDLE_BYTES: Final = 6 * 1024

TARGETS: Final = {("send", "wsproto"): 10.0, ("send", "websockets"): 4.0, ("receive", "wsproto"): 3.0}
"""How many times the peer's cost at least is ours, by work and peer."""

Work = Callable[[], object]


def _masked(text: str) -> bytes:
    connection = WebSocketConnection(Role.CLIENT, mask=lambda: b"\x37\xfa\x21\x3d")
    return connection.send_text(text)


FRAME: Final = _masked(TEXT)


def _send_own() -> Work:
    return partial(WebSocketConnection(Role.SERVER).send_text, SENT)


def _send_wsproto() -> Work:
    connection = Connection(ConnectionType.SERVER)
    return lambda: connection.send(WsprotoText(SENT))


def _websockets() -> Any:
    """A server's open connection of websockets, which only the environment of `make bench` has."""
    protocol = importlib.import_module("websockets.protocol")
    return protocol.Protocol(protocol.SERVER, state=protocol.State.OPEN)


def _send_websockets() -> Work:
    protocol = _websockets()

    def send() -> bytes:
        protocol.send_text(SENT.encode())
        return b"".join(protocol.data_to_send())

    return send


def _receive_own() -> Work:
    connection = WebSocketConnection(Role.SERVER)

    def receive() -> list[str]:
        return [event.text for event in connection.receive_data(FRAME) if isinstance(event, TextMessage)]

    return receive


def _receive_wsproto() -> Work:
    connection = Connection(ConnectionType.SERVER)

    def receive() -> list[str]:
        connection.receive_data(FRAME)
        return [event.data for event in connection.events() if isinstance(event, WsprotoText)]

    return receive


def _receive_websockets() -> Work:
    protocol = _websockets()

    def receive() -> list[str]:
        protocol.receive_data(FRAME)
        return [frame.data.decode() for frame in protocol.events_received()]

    return receive


CONTENDERS: Final[dict[str, dict[str, Callable[[], Work]]]] = {
    "send": {OWN: _send_own, "wsproto": _send_wsproto, "websockets": _send_websockets},
    "receive": {OWN: _receive_own, "wsproto": _receive_wsproto, "websockets": _receive_websockets},
}


def check_contenders() -> None:
    """Make sure that all do the same work.

    Raises:
        AssertionError: they do not.
    """
    size = len(SENT.encode())
    assert size == 195
    assert len(TEXT.encode()) == 200
    wire = b"\x81\x7e" + size.to_bytes(2, "big") + SENT.encode()
    for name, start in CONTENDERS["send"].items():
        assert start()() == wire, name
    for name, start in CONTENDERS["receive"].items():
        assert start()() == [TEXT], name


def measure(rounds: int) -> dict[tuple[str, str], float]:
    """Nanoseconds a frame, by work and contender, the median over the rounds."""
    taken: dict[tuple[str, str], list[float]] = {}
    gc.disable()
    try:
        for _ in range(rounds):
            for work, contenders in CONTENDERS.items():
                for name, start in contenders.items():
                    taken.setdefault((work, name), []).append(_time(start()))
    finally:
        gc.enable()
    return {key: statistics.median(times) for key, times in taken.items()}


def _time(do: Work) -> float:
    begun = time.perf_counter_ns()
    for _ in range(REPEATS):
        do()
    return (time.perf_counter_ns() - begun) / REPEATS


def idle_bytes(count: int = 1000) -> float:
    """Bytes of a server's connection that has received a message and sent one, as tracemalloc counts them."""
    kept: list[WebSocketConnection] = []
    tracemalloc.start()
    try:
        for _ in range(count):
            connection = WebSocketConnection(Role.SERVER)
            connection.receive_data(FRAME)
            connection.send_text(SENT)
            kept.append(connection)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return held / len(kept)


def failed_targets(medians: dict[tuple[str, str], float], idle: float) -> list[str]:
    """What the project promises and these figures do not show, one sentence each."""
    failures = [
        f"{work}: {medians[work, peer] / medians[work, OWN]:.1f} times under {peer}, less than {least}"
        for (work, peer), least in TARGETS.items()
        if medians[work, peer] / medians[work, OWN] < least
    ]
    if idle > MAX_IDLE_BYTES:
        failures.append(f"{idle:.0f} bytes an idle connection, over {MAX_IDLE_BYTES}")
    return failures


def main(arguments: Sequence[str]) -> int:
    """Run the command line; with --check the exit code is 1 when a target was missed."""
    parser = argparse.ArgumentParser(description="Compare ways to send and receive WebSocket frames.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("websockets") is None:
        print("not installed: websockets; see make bench", file=sys.stderr)
        return 1
    check_contenders()
    medians = measure(options.rounds)
    print("".ljust(22), "ns/frame".rjust(9), "to tokenwire".rjust(13))
    for (work, name), median in medians.items():
        print(f"{work} {name}".ljust(22), f"{median:9.0f} {median / medians[work, OWN]:13.2f}")
    idle = idle_bytes()
    print(f"an idle connection: {idle:.0f} bytes")
    failures = failed_targets(medians, idle) if options.check else []
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
