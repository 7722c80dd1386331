"""What the server adds to a real model: time to the first token, time per token, and tokens per second.

    python benchmarks/real_model.py --runs 5 --tokens 100

It wants xllamacpp and a model: the environment of `make serve` has both. Ours and the HTTP server that xllamacpp has
built in each run in a process of their own, with the same model, slots, threads and steps, and are asked in turns
(A B, A B, ...), so that a noisy minute falls on both. The client reads raw sockets.

What is added to the first token and to each token is the client's time less what the engine's own `timings` say of the
same answer. Those of ours are written to a file by the engine's wrapper: the server itself does not show them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenwire.adapters.server import bind, run
from tokenwire.backends._llama_engine import EngineOptions, open_engine
from tokenwire.backends._llama_model import read_chat_template
from tokenwire.backends._llama_template import template_for
from tokenwire.backends.llamacpp import Engine, LlamaBackend, find_installed_model

START_DEADLINE_S = 120.0
ANSWER_DEADLINE_S = 600.0
_TOKEN = b'"delta":{"content":"'
_NO_END = {"0": -100, "2": -100}  # the model's two end tokens: every answer has all of its tokens


@dataclass(slots=True)
class Answer:
    """One answer as its client saw it.

    Attributes:
        asked: when the request was sent, by time.monotonic.
        came: when each piece came, and how many tokens were in it.
        received: all of it.
    """

    asked: float
    came: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    received: bytes = b""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.came)

    @property
    def first_s(self) -> float:
        return self.came[0][0] - self.asked

    @property
    def token_s(self) -> float:
        return (self.came[-1][0] - self.came[0][0]) / (self.tokens - self.came[0][1])


class _Timed:
    """The engine, whose `timings` are written down."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path

    def handle_chat_completions(self, request: bytes, callback: Callable[[bytes], bool]) -> None:
        def note(data: bytes) -> bool:
            if b'"predicted_per_token_ms"' in data and b'"usage"' in data:
                with self._path.open("ab") as file:
                    file.write(json.dumps(json.loads(data)["timings"]).encode() + b"\n")
            return callback(data)

        self._engine.handle_chat_completions(request, note)


def _serve(name: str, model: Path, folder: Path, slots: int) -> None:
    """Be one of the two servers; say the port on standard output."""
    options = EngineOptions(slots=slots, template=template_for(read_chat_template(model)))
    if name == "tokenwire":
        backend = LlamaBackend(_Timed(open_engine(model, options), folder / "timings"), model="m", slots=slots)
        listeners = bind("127.0.0.1", 0)
        port = listeners[0].getsockname()[1]
        run(backend, listeners, started=lambda: print(port, flush=True))
        return
    engine: Any = open_engine(model, options, listen="127.0.0.1")
    print(engine.listening_address.rpartition(":")[2], flush=True)
    signal.sigwait({signal.SIGTERM})
    os._exit(0)  # nothing of it is needed any more


@contextmanager
def _started(name: str, model: Path, folder: Path, slots: int) -> Generator[int, None, None]:
    command = [sys.executable, __file__, "--serve", name, "--model", str(model), "--folder", str(folder)]
    with subprocess.Popen([*command, "--slots", str(slots)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], START_DEADLINE_S)[0], f"{name} does not start"
            yield int(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _model_of(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/models")
    name: str = json.loads(connection.getresponse().read())["data"][0]["id"]
    connection.close()
    return name


def _ask(port: int, model: str, prompts: list[str], tokens: int) -> list[Answer]:
    """Ask for several answers at once, and read them all to their ends."""
    poller, open_now = select.poll(), dict[int, tuple[socket.socket, Answer]]()
    for prompt in prompts:
        asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}
        asked |= {
            "max_tokens": tokens,
            "temperature": 0,
            "logit_bias": _NO_END,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(asked).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        peer = socket.create_connection(("127.0.0.1", port), 30)
        open_now[peer.fileno()] = (peer, Answer(time.monotonic()))
        peer.sendall(head.encode() + body)
        poller.register(peer, select.POLLIN)
    answers = [answer for _, answer in open_now.values()]
    deadline = time.monotonic() + ANSWER_DEADLINE_S
    while open_now:
        assert time.monotonic() < deadline, "an answer does not end"
        for descriptor, _ in poller.poll(1000):
            peer, answer = open_now[descriptor]
            data = peer.recv(65_536)
            answer.received += data
            if _TOKEN in data:
                answer.came.append((time.monotonic(), data.count(_TOKEN)))
            if not data:
                poller.unregister(descriptor)
                peer.close()
                del open_now[descriptor]
    assert all(b"[DONE]" in answer.received for answer in answers), answers[0].received[-500:]
    return answers


def _rate(answers: list[Answer]) -> float:
    """Tokens per second from the first request to the last token, all streams together."""
    begin, end = min(answer.asked for answer in answers), max(answer.came[-1][0] for answer in answers)
    return sum(answer.tokens for answer in answers) / (end - begin)


def _built_in_timings(answer: Answer) -> dict[str, float]:
    lines = [line for line in answer.received.splitlines() if b'"predicted_per_token_ms"' in line]
    timings: dict[str, float] = json.loads(lines[-1].removeprefix(b"data: "))["timings"]
    return timings


def _added(answer: Answer, timings: dict[str, float]) -> tuple[float, float]:
    """Milliseconds added to the first token, and the share added to a token's time."""
    return answer.first_s * 1000 - timings["prompt_ms"], answer.token_s * 1000 / timings["predicted_per_token_ms"] - 1


def _measure(options: argparse.Namespace, folder: Path) -> None:
    model, names = options.model, ("tokenwire", "built-in")
    added: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for name in names for count in (1, options.slots)}
    for number in range(options.runs + 1):  # the first is a warm-up
        for name in names if number % 2 else reversed(names):
            (folder / "timings").unlink(missing_ok=True)
            with _started(name, model, folder, options.slots) as port:
                asked = _model_of(port)
                _ask(port, asked, ["Hello"], 5)
                (one,) = _ask(port, asked, [f"Tell me a story about the number {number}."], options.tokens)
                timings = (
                    json.loads((folder / "timings").read_text().splitlines()[-1])
                    if name == "tokenwire"
                    else _built_in_timings(one)
                )
                prompts = [f"Tell me a story about {what}." for what in range(options.slots)]
                several = _ask(port, asked, prompts, options.tokens)
            if number:
                added[name].append(_added(one, timings))
                rates[name, 1].append(_rate([one]))
                rates[name, options.slots].append(_rate(several))
                print(
                    f"run {number} {name}: {added[name][-1]} {_rate([one]):.1f} {_rate(several):.1f}", file=sys.stderr
                )
    _report(added, rates, options.slots)


def _report(added: dict[str, list[tuple[float, float]]], rates: dict[tuple[str, int], list[float]], slots: int) -> None:
    for name, pairs in added.items():
        first, each = statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)
        print(f"{name}: added to the first token {first:.2f} ms, to each token {each:.2%} (medians of {len(pairs)})")
    for count in (1, slots):
        ours, theirs = rates["tokenwire", count], rates["built-in", count]
        ratio = statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
        medians = f"{statistics.median(ours):.1f} against {statistics.median(theirs):.1f} tokens/s"
        print(f"{count} streams: {medians}; ratio, median of the rounds: {ratio:.3f}")


def main(arguments: list[str]) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Compare the server with the engine's own, and with its timings.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--slots", type=int, default=4, help="streams of the second measurement")
    parser.add_argument("--model", type=Path, default=find_installed_model())
    parser.add_argument("--serve", choices=("tokenwire", "built-in"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.model is None:
        print("there is no model: run it by .venv/bin/python after `make serve`, or say --model", file=sys.stderr)
        return 1
    if options.serve:
        _serve(options.serve, options.model, options.folder, options.slots)
        return 0
    with tempfile.TemporaryDirectory(prefix="real-model-") as scratch:
        _measure(options, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
