"""Recording a server's answer: on virtual time byte by byte, from a running server on every loop, and played back."""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.serving import SECOND, Start, plain_text, until
from tests.strategies import splits

from tokenwire.adapters import record as recording_module
from tokenwire.adapters._backend_choice import Choice, add_options
from tokenwire.adapters._backend_choice import choose as choose_backend
from tokenwire.adapters.cli import main
from tokenwire.adapters.record import Question, RecordedAnswer, RecordError, RecordingPeer, record
from tokenwire.adapters.runtime import running_loop
from tokenwire.adapters.server import LOOPS
from tokenwire.backends.generators import GeneratorBackend, LoadError
from tokenwire.backends.replay import DIALECTS, ReplayBackend
from tokenwire.backends.upstream import parse_url
from tokenwire.core.events import StreamEnd, StreamTruncated, TextDelta
from tokenwire.core.recording import Recording, decode_steps, parse_recording

MS = 1_000_000
PLAIN = DIALECTS["plain"]
STREAM = b'data: {"token":"Two "}\n\ndata: {"token":"owls","finish_reason":"stop"}\n\ndata: [DONE]\n\n'


def question(url: str = "http://localhost:8000", *, key: str = "", target: str = "/chat") -> Question:
    return Question(parse_url(url), target, PLAIN, b'{"prompt":"hi"}', key)


class NoLink:
    """A link that remembers what was written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def set_reading(self, reading: bool) -> None:
        raise AssertionError(f"nothing is held back: {reading}")

    def close(self) -> None:
        self.written = b""


class Recorded:
    """A peer that is called by the test, and the file that it writes."""

    def __init__(self) -> None:
        self.file = bytearray()
        self.ends = 0
        self.link = NoLink()
        self.peer = RecordingPeer(question(key="secret"), self.file.extend, 1_790_000_000)
        self.peer.link = self.link
        self.peer.ended = self._end
        self.peer.connected(5 * SECOND)

    def _end(self) -> None:
        self.ends += 1

    @property
    def recording(self) -> Recording:
        return parse_recording(bytes(self.file))

    def say(self, *pieces: bytes, begin: int = 5 * SECOND) -> None:
        for number, piece in enumerate(pieces, 1):
            self.peer.receive_data(piece, begin + number * MS)


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def chunked(*bodies: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"


CHUNKED = head("content-type: text/event-stream", "transfer-encoding: chunked") + chunked(STREAM[:20], STREAM[20:])


# ---- on virtual time


def test_a_question_is_one_request_with_the_key_and_the_recording_does_not_hold_it() -> None:
    made = Recorded()
    first, *lines = made.link.written.decode().split("\r\n")
    assert first == "POST /chat HTTP/1.1"
    assert {"host: localhost:8000", "authorization: Bearer secret", "accept-encoding: identity"} <= set(lines)
    assert lines[-1] == '{"prompt":"hi"}'
    made.say(CHUNKED)
    assert b"secret" not in made.file
    assert made.recording.header.url == "http://localhost:8000/chat"
    assert made.recording.header.started_at == 1_790_000_000


@given(st.data())
def test_however_an_answer_is_cut_its_body_is_recorded(data: st.DataObject) -> None:
    pieces = data.draw(splits(CHUNKED))
    made = Recorded()
    made.say(*pieces)
    read = made.recording
    assert b"".join(one.data for one in read.reads) == STREAM
    assert [one.t_ns for one in read.reads] == sorted(one.t_ns for one in read.reads)
    assert (read.end_ns, read.failure) == (len(pieces) * MS, None)
    assert made.peer.answer == RecordedAnswer(len(read.reads), len(made.file), None)
    assert made.ends == 1
    text = [event.text for step in decode_steps(read, PLAIN) for event in step.events if isinstance(event, TextDelta)]
    assert "".join(text) == "Two owls"


def test_times_count_from_the_request() -> None:
    made = Recorded()
    made.peer.receive_data(head("transfer-encoding: chunked"), 5 * SECOND + 100 * MS)
    made.peer.receive_data(b"3\r\nabc\r\n", 5 * SECOND + 250 * MS)
    made.peer.receive_data(b"3\r\ndef\r\n", 5 * SECOND + 270 * MS)
    made.peer.receive_data(b"0\r\n\r\n", 5 * SECOND + 275 * MS)
    assert [(one.t_ns, one.data) for one in made.recording.reads] == [(250 * MS, b"abc"), (270 * MS, b"def")]
    assert made.recording.end_ns == 275 * MS


def test_a_body_that_ends_with_the_connection_is_whole() -> None:
    made = Recorded()
    made.say(head("connection: close"), STREAM)
    made.peer.receive_eof(6 * SECOND)
    assert (made.recording.failure, made.ends) == (None, 1)


@pytest.mark.parametrize("broken", [b"", b"5\r\nhel", b"zz\r\n"])
def test_a_body_that_breaks_off_is_a_failure(broken: bytes) -> None:
    made = Recorded()
    made.say(head("transfer-encoding: chunked"), b"3\r\nabc\r\n", *([broken] if broken else []))
    made.peer.receive_eof(6 * SECOND)
    assert made.recording.failure
    assert made.recording.reads[0].data == b"abc"
    assert made.peer.answer is not None
    assert made.peer.answer.failure == made.recording.failure
    assert made.ends == 1


def test_silence_ends_a_recording_and_a_sign_of_life_does_not() -> None:
    made = Recorded()
    made.say(head("transfer-encoding: chunked"), b"3\r\nabc\r\n")
    made.peer.look(5 * SECOND + 2 * MS + 9 * SECOND, 10 * SECOND)
    assert made.ends == 0
    made.peer.look(5 * SECOND + 2 * MS + 10 * SECOND, 10 * SECOND)
    assert made.recording.failure == "the server was silent for too long"
    made.say(b"3\r\ndef\r\n", begin=20 * SECOND)
    assert len(made.recording.reads) == made.ends == 1


def test_before_the_request_is_sent_silence_is_the_dialers_matter() -> None:
    peer = RecordingPeer(question(), bytearray().extend, 0)
    peer.look(10**18, SECOND)
    ends: list[str | None] = []
    peer.ended = lambda: ends.append(peer.refusal)
    peer.failed("Connection refused", 10**18)
    assert ends == ["Connection refused"]
    assert peer.answer is None


@pytest.mark.parametrize(
    ("wire", "refusal"),
    [
        (
            head("content-length: 44", status="429 Slow") + b'{"error":{"message":"Slow.","code":"quota"}}',
            "the server answered 429: Slow.",
        ),
        (head("content-encoding: gzip", "content-length: 1") + b"x", "the server answered with a content-encoding"),
        (head(status="302 Found"), "the server answered 302: The server answered with status 302"),
        (b"HELLO\r\n\r\n", ""),
        (b"", "the connection was closed before an answer came"),
    ],
)
def test_what_is_no_answer_is_refused_and_nothing_is_written(wire: bytes, refusal: str) -> None:
    made = Recorded()
    made.say(*([wire] if wire else []))
    made.peer.receive_eof(6 * SECOND)
    assert (made.peer.refusal or "").startswith(refusal)
    assert made.peer.refusal
    assert (made.peer.answer, bytes(made.file), made.ends) == (None, b"", 1)


def test_an_answer_without_end_is_recorded_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "MAX_READS", 10)
    made = Recorded()
    made.say(head("connection: close"), *[b"x"] * 20)
    assert (len(made.recording.reads), made.ends) == (5, 1)
    assert made.recording.failure == "the answer is longer than a recording may be"


def test_a_file_that_takes_no_more_ends_the_recording() -> None:
    def full(lines: bytes) -> None:
        raise OSError(28, f"No space left for {len(lines)} bytes")

    made = Recorded()
    made.peer = RecordingPeer(question(), full, 0)
    made.peer.link, made.peer.ended = made.link, made._end
    made.peer.connected(0)
    made.say(CHUNKED)
    made.peer.receive_eof(6 * SECOND)
    assert (made.peer.answer, made.ends) == (None, 1)
    assert isinstance(made.peer.fault, OSError)


# ---- on every loop


async def hello(prompt: str) -> AsyncIterator[str]:
    yield f"{prompt}, "
    yield "world"


@pytest.mark.anyio
async def test_a_servers_answer_is_recorded_and_replayed(start: Start, tmp_path: Path) -> None:
    running_loop()  # what it starts lives as long as the loop, and is not the server's
    file = bytearray()
    async with start(GeneratorBackend(hello)) as serving:
        asked = question(f"http://{serving.address[0]}:{serving.address[1]}")
        answer = await record(asked, file.extend)
        assert (answer.size, answer.failure) == (len(file), None)
        await until(lambda: not serving.connections)
        assert serving.access == ["POST /chat 200 finished"]
    (tmp_path / "r").write_bytes(file)
    (*_, last) = decode_steps(parse_recording(bytes(file)), PLAIN)
    assert last.events[-1] == StreamEnd()
    async with start(ReplayBackend(tmp_path / "r")) as serving:
        client = serving.connect()
        client.ask()
        await until(lambda: serving.streams)
        serving.clock.advance(3600 * SECOND)
        assert plain_text((await client.answer()).body) == "hi, world"


async def endless(prompt: str) -> AsyncIterator[str]:
    yield prompt
    await anyio.sleep_forever()


@pytest.mark.anyio
async def test_a_recording_that_is_cancelled_has_its_end(start: Start) -> None:
    running_loop()  # what it starts lives as long as the loop, and is not the server's
    file = bytearray()
    async with start(GeneratorBackend(endless)) as serving:
        asked = question(f"http://{serving.address[0]}:{serving.address[1]}")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(record, asked, file.extend))
            await until(lambda: b"hi" in file)
            tasks.cancel_scope.cancel()
        await until(lambda: not serving.connections)
    recording = parse_recording(bytes(file))
    assert recording.failure == "the recording was interrupted"
    (*_, last) = decode_steps(recording, PLAIN)
    assert isinstance(last.events[-1], StreamTruncated)


@pytest.mark.anyio
async def test_a_server_that_refuses_is_told(start: Start) -> None:
    running_loop()  # what it starts lives as long as the loop, and is not the server's
    async with start(GeneratorBackend(hello)) as serving:
        asked = question(f"http://{serving.address[0]}:{serving.address[1]}", target="/nowhere")
        with pytest.raises(RecordError, match="the server answered 404: "):
            await record(asked, bytearray().extend)
        await until(lambda: not serving.connections)


@pytest.mark.anyio
async def test_a_server_that_is_not_there_is_told() -> None:
    with socket.socket() as sock:  # bound and not listening: what connects is refused
        sock.bind(("127.0.0.1", 0))
        asked = question(f"http://127.0.0.1:{sock.getsockname()[1]}")
        with pytest.raises(RecordError, match="refused"):
            await record(asked, bytearray().extend)


@pytest.mark.anyio
async def test_what_the_file_raises_is_raised(start: Start) -> None:
    running_loop()  # what it starts lives as long as the loop, and is not the server's

    def full(lines: bytes) -> None:
        raise OSError(28, f"No space left for {len(lines)} bytes")

    async with start(GeneratorBackend(hello)) as serving:
        asked = question(f"http://{serving.address[0]}:{serving.address[1]}")
        with pytest.raises(OSError, match="No space left"):
            await record(asked, full)
        await until(lambda: not serving.connections)


# ---- the command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, answer: RecordedAnswer | None) -> tuple[int, list[Question]]:
    """Run the command with the network left out."""
    questions: list[Question] = []

    async def recorded(asked: Question, write: Callable[[bytes], object], **_: object) -> RecordedAnswer:
        questions.append(asked)
        if answer is None:
            raise RecordError("Connection refused")
        write(b"recorded\n")
        return answer

    monkeypatch.setattr(recording_module, "record", recorded)
    return main(["record", *arguments]), questions


@pytest.mark.parametrize(
    ("url", "dialect", "expected"),
    [
        ("http://localhost:8000/v1", "openai_chat", "http://localhost:8000/v1/chat/completions"),
        ("https://example.com/v1/chat/completions/", "openai_chat", "https://example.com/v1/chat/completions"),
        ("http://localhost", "plain", "http://localhost/chat"),
        ("http://localhost/chat", "plain", "http://localhost/chat"),
    ],
)
def test_the_endpoint_follows_from_url_and_dialect(
    url: str, dialect: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"
    monkeypatch.setenv("OPENAI_API_KEY", " k ")
    done = RecordedAnswer(3, 9, None)
    code, (asked,) = run(
        monkeypatch, url, "-o", str(path), "--dialect", dialect, "--prompt", "P", "--max-tokens", "5", answer=done
    )
    assert (code, asked.url, asked.key, path.read_bytes()) == (0, expected, "k", b"recorded\n")
    body = json.loads(asked.body)
    assert (body["stream"], body["max_tokens"], body["messages"]) == (True, 5, [{"role": "user", "content": "P"}])


@pytest.mark.parametrize("loop", sorted(LOOPS))
def test_a_body_may_be_given_whole_and_the_loop_chosen(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "body").write_bytes(b'{"own":1}')
    arguments = ("http://localhost/v1", "--body", str(tmp_path / "body"), "-o", str(tmp_path / "r"), "--loop", loop)
    _, (asked,) = run(monkeypatch, *arguments, answer=RecordedAnswer(1, 1, None))
    assert asked.body == b'{"own":1}'


def test_failures_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r"
    assert run(monkeypatch, "http://localhost/v1", "-o", str(path), answer=None)[0] == 1
    assert not path.exists()
    assert run(monkeypatch, "ftp://localhost", "-o", str(path), answer=None)[0] == 1
    assert run(monkeypatch, "http://localhost/v1", "-o", str(path), answer=RecordedAnswer(1, 9, "reset"))[0] == 1
    assert run(monkeypatch, "http://localhost/v1", "-o", str(path), answer=RecordedAnswer(1, 9, None))[0] == 1
    assert path.read_bytes() == b"recorded\n"
    refused, no_url, counts, failed, exists = capsys.readouterr().err.splitlines()
    assert refused == "tokenwire: Connection refused"
    assert "no URL of a server" in no_url
    assert counts == f"1 reads, 9 bytes into {path}"
    assert failed == "tokenwire: the answer is not whole: reset"
    assert "exists" in exists


def test_from_the_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = [b"", b"recorded\n"]
    sizes: list[list[int]] = []

    def kept() -> list[int]:
        return sorted(path.stat().st_size for path in tmp_path.iterdir())

    async def interrupted(_asked: Question, write: Callable[[bytes], object], **_: object) -> RecordedAnswer:
        write(said.pop())
        sizes.append(kept())
        raise KeyboardInterrupt if said else BaseExceptionGroup("as trio does", [KeyboardInterrupt()])

    monkeypatch.setattr(recording_module, "record", interrupted)
    for name in "ab":
        arguments = ["record", "http://localhost", "--dialect", "plain", "-o", str(tmp_path / name)]
        assert main(arguments) == 130
    assert (tmp_path / "a").read_bytes() == b"recorded\n"
    assert not (tmp_path / "b").exists()
    assert sizes == [[9], [0, 9]]  # what was written is there at once, in case of a kill
    told, nothing = capsys.readouterr().err.splitlines()
    assert told == f"tokenwire: interrupted; what came before is in {tmp_path / 'a'}"
    assert nothing == "tokenwire: interrupted; nothing had come"


# ---- serving it


def choose(*arguments: str) -> Choice:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return choose_backend(parser.parse_args(arguments))


def test_serve_takes_a_recording_and_its_speed(tmp_path: Path) -> None:
    made = Recorded()
    made.say(CHUNKED)
    path = tmp_path / "r"
    path.write_bytes(made.file)
    choice = choose("--backend", f"replay={path}", "--speed", "2.5")
    assert isinstance(choice.backend, ReplayBackend)
    assert choice.reason.startswith(f"replay={path}")
    for speed in ("-1", "fast", "nan"):
        with pytest.raises(SystemExit):
            choose("--backend", f"replay={path}", "--speed", speed)


def test_serve_tells_which_line_of_a_recording_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(b'{"tokenwire_recording":1,"dialect":"plain"}\noops\n')
    with pytest.raises(LoadError, match=f"--backend replay={path}: line 2: JSON is malformed"):
        choose("--backend", f"replay={path}")
    with pytest.raises(FileNotFoundError):
        choose("--backend", f"replay={path}-none")
