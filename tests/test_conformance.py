"""How the conformance suite's report is judged; the suite itself runs by `make conformance`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from tests.conformance import AGENT, failed_cases, main, specification

if TYPE_CHECKING:
    from pathlib import Path


def test_only_ok_and_informational_pass() -> None:
    outcomes = ["OK", "INFORMATIONAL", "NON-STRICT", "FAILED", "UNIMPLEMENTED"]
    cases = {f"1.{at}": {"behavior": outcome, "behaviorClose": "OK"} for at, outcome in enumerate(outcomes)}
    cases["2.1"] = {"behavior": "OK", "behaviorClose": "FAILED"}
    assert [line.partition(":")[0] for line in failed_cases({AGENT: cases})] == ["1.2", "1.3", "1.4", "2.1"]
    assert failed_cases({AGENT: {"1.1": {"behavior": "OK", "behaviorClose": "INFORMATIONAL"}}}) == []


def test_cases_are_patterns_with_commas_between_them() -> None:
    assert specification("ws://127.0.0.1:1", "1.*,2.1")["cases"] == ["1.*", "2.1"]


@pytest.mark.parametrize("code", [0, 3])
def test_a_runner_is_given_a_server_that_listens_and_the_cases(tmp_path: Path, code: int) -> None:
    runner = tmp_path / "runner"
    lines = [
        f"#!{sys.executable}",
        "import socket, sys, urllib.parse",
        "url = urllib.parse.urlsplit(sys.argv[1])",
        "socket.create_connection((url.hostname, url.port)).close()",
        f"sys.exit({code} if sys.argv[2] == '1.*' else 9)",
    ]
    runner.write_text("\n".join(lines), encoding="utf-8")
    runner.chmod(0o700)
    assert main(["--runner", str(runner), "--cases", "1.*"]) == code
