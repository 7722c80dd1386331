"""Runs the vectors against any decoder, in any language, as a program that talks over its standard input and output.

    python tests/vectors/run.py -- node my_decoder.js
    python tests/vectors/run.py --format sse --splits whole --strict -- ./my_decoder

Needs this folder and Python, nothing else. README.md says what the program is asked and what it answers. The exit code
is 0 where every answer was right, 1 where one was not, 2 where the program did not answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

__all__ = ["FORMATS", "Failure", "ProgramError", "Question", "Tally", "load", "main", "questions", "run"]

FORMATS = ("sse", "ndjson", "utf8", "stops", "openai_chat")
HERE = Path(__file__).resolve().parent
SHOWN_FAILURES = 20

# What a vector expects where it does not say.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sse": {"events": [], "truncated": False, "retry_ms": None, "last_event_id": "", "error": False},
    "ndjson": {"values": [], "truncated": False, "error": False},
    "utf8": {"text": "", "invalid": False, "truncated": False},
    "stops": {"text": "", "held": "", "stop": None},
    "openai_chat": {"choices": [], "usage": None, "end": "finished"},
}
NEW_EVENT = {"event": "message", "data": "", "id": ""}
NEW_CHOICE: dict[str, Any] = {
    "index": 0,
    "text": "",
    "reasoning": "",
    "refusal": "",
    "tool_calls": [],
    "finish_reason": None,
}
NEW_USAGE = {"input_tokens": 0, "output_tokens": 0, "cached_tokens": 0, "reasoning_tokens": 0}
# Compared only where the vector says them: what an error means that the server did not word is the decoder's to say.
ERROR_MEMBERS = ("error_kind", "error_message", "error_code")


class ProgramError(Exception):
    """The program ended, or answered something that is not one line with a JSON object."""


class Question(NamedTuple):
    """What the program is asked, and the right answer."""

    vector: str
    asked: dict[str, Any]
    expected: dict[str, Any]


class Failure(NamedTuple):
    """A wrong answer; `got` holds only the members that are wrong."""

    question: Question
    got: dict[str, Any]


class Tally(NamedTuple):
    """How a run went."""

    asked: int
    failures: list[Failure]
    silent: set[str]
    """Members that the program left out at least once, so that they were not compared."""


def load(name: str) -> list[dict[str, Any]]:
    """Reads the vectors of one format."""
    vectors: list[dict[str, Any]] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return vectors


def cuts(stream: str, splits: str) -> Iterator[list[str]]:
    """Cuts a stream in the ways that were asked for; all of them mean the same."""
    yield [stream]
    if splits == "whole":
        return
    yield list(stream)
    if splits == "all":
        yield [piece for byte in stream for piece in (byte, "")]
        for at in range(1, len(stream)):
            yield [stream[:at], stream[at:]]


def expected_answer(name: str, vector: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    """Fills in what a vector leaves to the defaults."""
    if strict and vector.get("invalid_utf8"):
        return {"error": True}
    expected = {member: vector.get(member, default) for member, default in DEFAULTS[name].items()}
    if name == "sse":
        expected["events"] = [NEW_EVENT | event for event in vector["events"]]
    if name == "openai_chat":
        expected["choices"] = [NEW_CHOICE | choice for choice in vector["choices"]]
        expected["usage"] = vector.get("usage") and NEW_USAGE | vector["usage"]
        expected |= {member: vector[member] for member in ERROR_MEMBERS if member in vector}
    return expected


def questions(name: str, splits: str, *, strict: bool = False) -> Iterator[Question]:
    """Makes every question of one format."""
    for vector in load(name):
        expected = expected_answer(name, vector, strict=strict)
        for pieces in cuts(vector["stream"], splits):
            asked: dict[str, Any] = {"format": name, "pieces": pieces}
            if name == "stops":
                asked["stops"] = vector["stops"]
            if strict:
                asked["strict"] = True
            yield Question(vector["name"], asked, expected)


def run(program: Sequence[str], asked: Iterator[Question]) -> Tally:
    """Asks a program every question.

    Raises:
        ProgramError: it ended, or did not answer with a JSON object.
    """
    count, failures, silent = 0, list[Failure](), set[str]()
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for question in asked:
                answer = ask(process.stdin, process.stdout, question.asked)
                count += 1
                silent.update(question.expected.keys() - answer.keys())
                if got := wrong_members(question.expected, answer):
                    failures.append(Failure(question, got))
        finally:
            process.stdin.close()
    return Tally(count, failures, silent)


def wrong_members(expected: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Picks what is wrong in an answer. As JSON: in Python, true equals 1."""
    return {
        name: answer[name]
        for name, right in expected.items()
        if name in answer and json.dumps(answer[name], sort_keys=True) != json.dumps(right, sort_keys=True)
    }


def ask(questions_to: IO[str], answers_from: IO[str], asked: dict[str, Any]) -> dict[str, Any]:
    """Asks one question."""
    try:
        questions_to.write(json.dumps(asked) + "\n")
        questions_to.flush()
    except BrokenPipeError:
        raise ProgramError("the program ended before all was asked") from None
    line = answers_from.readline()
    try:
        answer = json.loads(line)
    except ValueError:
        raise ProgramError(f"asked {json.dumps(asked)}\nanswered {line!r}") from None
    if not isinstance(answer, dict):
        raise ProgramError(f"asked {json.dumps(asked)}\nanswered {line!r}")
    return answer  # pyright: ignore[reportUnknownVariableType]  # JSON


def report(name: str, tally: Tally) -> None:
    """Prints how a run went, and the first failures."""
    wrong = len({failure.question.vector for failure in tally.failures})
    total = len(load(name))
    print(f"{name}: {total - wrong} of {total} vectors right, {tally.asked} questions")
    if tally.silent:
        print(f"  not compared, for the program did not say: {', '.join(sorted(tally.silent))}")
    for question, got in tally.failures[:SHOWN_FAILURES]:
        right = {member: question.expected[member] for member in got}
        print(f"  {question.vector}\n    asked    {json.dumps(question.asked)}")
        print(f"    expected {json.dumps(right)}\n    got      {json.dumps(got)}")
    if len(tally.failures) > SHOWN_FAILURES:
        print(f"  and {len(tally.failures) - SHOWN_FAILURES} more")


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", action="append", choices=FORMATS, help="what to ask about; may be repeated; all")
    parser.add_argument("--splits", choices=("whole", "bytes", "all"), default="all", help="how streams are cut; all")
    parser.add_argument("--strict", action="store_true", help="ask for errors in place of U+FFFD (sse)")
    parser.add_argument("program", nargs="+", help="the program and its arguments, after --")
    options = parser.parse_args()
    failed = False
    for name in options.format or FORMATS:
        try:
            tally = run(options.program, questions(name, options.splits, strict=options.strict and name == "sse"))
        except (ProgramError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        report(name, tally)
        failed = failed or bool(tally.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
