"""`tokenwire record URL`: one answer of a running server, with its times, into a file; docs/recording.md is the format."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import anyio
from msgspec import Struct

from tokenwire.backends.address import Address
from tokenwire.backends.base import Link
from tokenwire.backends.upstream import parse_url
from tokenwire.core.client import MAX_ERROR_BYTES, ResponseEvent, ResponseReader, ResponseReceived, encode_request
from tokenwire.core.contracts import Dialect, Headers
from tokenwire.core.errors import RemoteProtocolError
from tokenwire.core.http import BodyEnded, BodyReceived
from tokenwire.core.recording import MAX_READS, MAX_RECORDING_BYTES, Recorder
from tokenwire.core.request import GenerationRequest, Message, TextPart

from ._readers import some_duration_ns, whole_number
from .client import ENDPOINTS
from .dialer import dialer_on
from .runtime import running_loop
from .server import LOOPS

__all__ = ["DEFAULT_SILENCE_NS", "Question", "RecordError", "RecordedAnswer", "RecordingPeer", "add_command", "record"]

_SECOND: Final = 1_000_000_000
_CONNECT_NS: Final = 10 * _SECOND
DEFAULT_SILENCE_NS: Final = 120 * _SECOND
"""How long a server may be silent: a queue and a long prompt come before the first token."""

_LOOK_NS: Final = _SECOND
"""How often the silence is looked at."""

_KEY_VARIABLE: Final = "OPENAI_API_KEY"
_INTERRUPTED: Final = 128 + signal.SIGINT
"""The exit code of what Ctrl-C has ended, as shells have it."""


class RecordError(Exception):
    """Nothing could be recorded: the server was not reached, or refused."""


class Question(Struct, frozen=True):
    """What is asked, and where."""

    address: Address
    """The server."""
    target: str
    """The path."""
    dialect: Dialect
    """What it speaks."""
    body: bytes
    """The request's body."""
    key: str = ""
    """Sent as a bearer token where it is not empty."""

    @property
    def url(self) -> str:
        """The URL as the recording tells it."""
        return f"{'https' if self.address.tls else 'http'}://{self.address.authority}{self.target}"

    def encode(self) -> bytes:
        """Encode the HTTP request.

        Raises:
            ValueError: the key or the path cannot be written.
        """
        authorization: Headers = (("authorization", f"Bearer {self.key}"),) if self.key else ()
        headers = (
            ("accept", f"{self.dialect.media_type}, application/json"),
            ("accept-encoding", "identity"),
            ("content-type", "application/json"),
            ("user-agent", "tokenwire"),
            *authorization,
        )
        return encode_request("POST", self.target, host=self.address.authority, headers=headers, body=self.body)


class RecordedAnswer(Struct, frozen=True):
    """What came of a question."""

    reads: int
    """How many reads of the body were recorded."""
    size: int
    """The recording's bytes."""
    failure: str | None
    """Why the answer is not whole, None where it is."""


class RecordingPeer:
    """The one side of a dialled connection: asks, and writes down what is answered; a `tokenwire.backends.base.Peer`.

    Args:
        question: what to ask.
        write: takes the recording's lines.
        wall_s: Unix time in seconds.

    Attributes:
        link: the connection; set before anything is called.
        ended: called once, when the answer has ended or nothing will come.
        last_sign_ns: when something came last.
        answer: what was recorded; None before the end, and where nothing was.
        refusal: why nothing was recorded.
        fault: what `write` raised; nothing is written after it.
    """

    link: Link

    def __init__(self, question: Question, write: Callable[[bytes], object], wall_s: int) -> None:
        self.ended: Callable[[], None] = lambda: None
        self.last_sign_ns = 0
        self.answer: RecordedAnswer | None = None
        self.refusal: str | None = None
        self.fault: OSError | None = None
        self._question = question
        self._request = question.encode()
        self._write = write
        self._wall_s = wall_s
        self._reader = ResponseReader("POST")
        self._recorder: Recorder | None = None
        self._head: ResponseReceived | None = None
        self._records = False
        self._error_body = bytearray()
        self._reads = self._size = 0

    def connected(self, now: int) -> None:
        """Send the request: times count from here."""
        question = self._question
        self.last_sign_ns = now
        self._recorder = Recorder(
            question.dialect.name, url=question.url, request=question.body, now=now, wall_s=self._wall_s
        )
        self.link.write(self._request)

    def receive_data(self, data: bytes, now: int) -> None:
        """Take bytes of the answer."""
        self.last_sign_ns = now
        try:
            for event in self._reader.receive_data(data):
                self._take(event, now)
            self._reader.check()
        except RemoteProtocolError as error:
            self.failed(str(error), now)

    def set_blocked(self, blocked: bool, now: int) -> None:
        """Do nothing: the request is small, and kept until it can be sent."""

    def receive_eof(self, now: int) -> None:
        """Take the end of input."""
        try:
            for event in self._reader.receive_eof():
                self._take(event, now)
        except RemoteProtocolError as error:
            self.failed(str(error), now)

    def look(self, now: int, silence_ns: int) -> None:
        """Give up where the server has been silent for so long since the request was sent."""
        if self._recorder is not None and now - self.last_sign_ns >= silence_ns:
            self.failed("the server was silent for too long", now)

    def failed(self, reason: str, now: int) -> None:
        """End the recording as one that is not whole; what had ended before stays as it ended."""
        if self._is_over:
            return
        if self._head is not None and not self._records:
            self._refuse(self._head)
        elif self._recorder is not None and self._records:
            self._append(self._recorder.fail(reason, now))
            self._end(reason)
        else:
            self.refusal = reason
            self.ended()

    @property
    def _is_over(self) -> bool:
        return self.answer is not None or self.refusal is not None or self.fault is not None

    def _take(self, event: ResponseEvent, now: int) -> None:
        recorder = self._recorder
        if recorder is None or self._is_over:
            return
        match event:
            case ResponseReceived():
                self._take_head(event, recorder)
            case BodyReceived(data=data) if self._records:
                self._append(recorder.receive_data(data, now))
                self._reads += 1
                if self._reads >= MAX_READS // 2 or self._size > MAX_RECORDING_BYTES // 2:
                    self.failed("the answer is longer than a recording may be", now)
            case BodyReceived(data=data):
                self._error_body += data[: MAX_ERROR_BYTES - len(self._error_body)]
            case BodyEnded() if self._records:
                self._append(recorder.receive_eof(now))
                self._end(None)
            case BodyEnded() if self._head is not None:
                self._refuse(self._head)
            case _:
                pass

    def _take_head(self, head: ResponseReceived, recorder: Recorder) -> None:
        self._head = head
        coding = (head.header(b"content-encoding") or "identity").strip().lower()
        if 200 <= head.status < 300 and coding == "identity":
            self._records = True
            self._append(recorder.begin())

    def _append(self, lines: bytes) -> None:
        self._size += len(lines)
        try:
            self._write(lines)
        except OSError as error:  # such as a full disk; here it would be the event loop's to deal with
            self.fault = error
            self.ended()

    def _end(self, failure: str | None) -> None:
        if self.fault is not None:
            return
        self.answer = RecordedAnswer(self._reads, self._size, failure)
        self.ended()

    def _refuse(self, head: ResponseReceived) -> None:
        if 200 <= head.status < 300:
            self.refusal = "the server answered with a content-encoding, which was not asked for"
        else:
            said = self._question.dialect.decode_error(head.status, bytes(self._error_body))
            self.refusal = f"the server answered {head.status}: {said.message}"
        self.ended()


async def record(
    question: Question, write: Callable[[bytes], object], *, silence_ns: int = DEFAULT_SILENCE_NS
) -> RecordedAnswer:
    """Ask a server, and write its answer down. On asyncio and on trio.

    Args:
        question: what to ask.
        write: takes the recording's lines, as they come.
        silence_ns: how long the server may be silent.

    Raises:
        RecordError: the server was not reached, or refused; nothing was written.
        OSError: `write` raised it.
        ValueError: the question cannot be sent.

    Cancelled, or interrupted from the keyboard, it writes the recording's end first.
    """
    peer = RecordingPeer(question, write, int(time.time()))
    await _ask(peer, question.address, silence_ns)
    if peer.fault is not None:
        raise peer.fault
    if peer.answer is None:
        raise RecordError(peer.refusal or "nothing came")
    return peer.answer


async def _ask(peer: RecordingPeer, address: Address, silence_ns: int) -> None:
    """Connect, and wait until the peer has its answer, or the server has been silent for too long."""
    running = running_loop()
    now, timers = running.now, running.timers
    ended = anyio.Event()
    peer.ended = ended.set
    deadline = now() + _CONNECT_NS
    peer.link = dialer_on(running).connect(address.host, address.port, peer, tls=address.tls, deadline=deadline)

    def look() -> None:
        peer.look(now(), silence_ns)
        if not ended.is_set():
            timers.call_at(now() + min(_LOOK_NS, silence_ns), look)

    look()
    try:
        await ended.wait()
    finally:
        peer.failed("the recording was interrupted", now())  # nothing, where it has ended
        peer.link.close()


# ------------------------------------------------------------------------------------------------------ command line


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `record` to the command line."""
    about = "keep one answer of a running server, with its times, for --backend replay=FILE"
    parser = commands.add_parser(
        "record",
        help=about,
        description=f"{about[0].upper()}{about[1:]}. The key is read from the environment, {_KEY_VARIABLE}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(command=_record)
    add = parser.add_argument
    add("url", help="the server's URL, such as http://localhost:8000/v1, or the endpoint's")
    add("--output", "-o", type=Path, default=Path("recording.jsonl"), help="the file; it must not exist")
    add("--dialect", choices=sorted(ENDPOINTS), default="openai_chat", help="what the server speaks")
    add("--prompt", default="Name two birds.", help="what to ask")
    add("--model", default="", help="which model to ask; the server's own choice where it is left out")
    add("--max-tokens", type=whole_number(1), default=argparse.SUPPRESS, help="the longest answer")
    add("--body", type=Path, default=argparse.SUPPRESS, help="a file with a request's whole body instead")
    add("--silence", type=some_duration_ns, default="120s", help="how long the server may be silent")
    add("--loop", choices=sorted(LOOPS), default="asyncio", help="event loop")


def _record(options: argparse.Namespace) -> int:
    try:
        answer = _run(options, options.output)
    except (RecordError, ValueError) as error:
        sys.stderr.write(f"tokenwire: {error}\n")
        return 1
    except KeyboardInterrupt:
        kept = f"what came before is in {options.output}" if options.output.exists() else "nothing had come"
        sys.stderr.write(f"tokenwire: interrupted; {kept}\n")
        return _INTERRUPTED
    sys.stderr.write(f"{answer.reads} reads, {answer.size} bytes into {options.output}\n")
    if answer.failure is None:
        return 0
    sys.stderr.write(f"tokenwire: the answer is not whole: {answer.failure}\n")
    return 1


def _run(options: argparse.Namespace, path: Path) -> RecordedAnswer:
    """Record into a new file, which is taken away again where nothing was recorded."""
    question = _question(options)
    choice = LOOPS[options.loop]
    with path.open("xb") as file:
        try:

            def write(lines: bytes) -> None:
                file.write(lines)
                file.flush()  # so that a process which is killed leaves whole lines

            main = partial(record, question, write, silence_ns=options.silence)
            return anyio.run(main, backend=choice.backend, backend_options=dict(choice.options))
        except BaseExceptionGroup as group:
            if group.subgroup(KeyboardInterrupt) is None:
                raise
            raise KeyboardInterrupt from None  # trio has it in a group
        finally:
            if not file.tell():
                path.unlink()


def _question(options: argparse.Namespace) -> Question:
    """Make the question of the command line.

    Raises:
        ValueError: the URL cannot be used.
        OSError: the body's file cannot be read.
    """
    endpoint, address = ENDPOINTS[options.dialect], parse_url(options.url)
    target = address.path if address.path.endswith(endpoint.path) else address.path + endpoint.path
    body: Path | None = getattr(options, "body", None)
    asked = endpoint.dialect.encode_request(_request(options)) if body is None else body.read_bytes()
    return Question(address, target, endpoint.dialect, asked, os.environ.get(_KEY_VARIABLE, "").strip())


def _request(options: argparse.Namespace) -> GenerationRequest:
    return GenerationRequest(
        model=options.model,
        messages=(Message("user", (TextPart(options.prompt),)),),
        max_tokens=getattr(options, "max_tokens", None),
        stream=True,
        include_usage=True,
    )
