"""The vectors as others use them: the files keep to their schema, and the runner drives a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parents[1] / "vectors"
FORMATS = ("sse", "ndjson", "utf8", "stops", "openai_chat")
TYPES = {"string": str, "boolean": bool, "integer": int, "object": dict, "null": type(None)}

each_format = pytest.mark.parametrize("name", FORMATS)


def load(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(VECTORS / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@each_format
def test_vectors_keep_to_their_schema(name: str) -> None:
    """Each has the members that it must have and no others, of the types that the schema says."""
    schema = load("schema")["$defs"][name]["items"]
    vectors = load(name)
    for vector in vectors:
        assert vector.keys() >= set(schema["required"])
        for member, value in vector.items():
            allowed = schema["properties"][member].get("type", [])
            kinds = [allowed] if isinstance(allowed, str) else allowed
            assert "array" in kinds or any(isinstance(value, TYPES[kind]) for kind in kinds), (vector["name"], member)
    assert len({vector["name"] for vector in vectors}) == len(vectors)


@each_format
def test_readme_says_how_many_there_are(name: str) -> None:
    (row,) = (line for line in (VECTORS / "README.md").read_text().splitlines() if line.startswith(f"| `{name}.json` | "
              ) and line.count("|") == 5 and line.rstrip("| ").rsplit(" ", 1)[-1].isdigit())  # fmt: skip
    assert row.rstrip("| ").rsplit(" ", 1)[-1] == str(len(load(name)))


@pytest.mark.parametrize("arguments", [[], ["--strict", "--format", "sse", "--splits", "bytes"]], ids=["all", "strict"])
def test_own_decoders_answer_every_question_right(arguments: list[str]) -> None:
    result = run(*arguments, "--", sys.executable, str(VECTORS / "tokenwire_decoder.py"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not compared" not in result.stdout


WRONG = "import sys\nfor line in sys.stdin: print('{\"events\": []}', flush=True)"


def test_wrong_answers_are_reported() -> None:
    result = run("--format", "sse", "--splits", "whole", "--", sys.executable, "-c", WRONG)
    assert result.returncode == 1
    assert "one event" in result.stdout
    assert "not compared, for the program did not say: error, last_event_id, retry_ms, truncated" in result.stdout


@pytest.mark.parametrize("program", ["pass", "print('no JSON')\ninput()", "print([])\ninput()"])
def test_program_that_does_not_answer_is_told_apart(program: str) -> None:
    result = run("--format", "utf8", "--", sys.executable, "-c", program)
    assert result.returncode == 2
    assert "ended" in result.stderr or "answered" in result.stderr
