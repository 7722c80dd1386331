"""Autobahn|Testsuite against examples/websocket_echo.py: `make conformance` tells how it is started.

The echo server runs on a port of the system's choice. The suite's fuzzing client is either a program of the user's, which
judges by itself, or the suite's container image, whose report is judged here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["failed_cases", "main", "specification"]

ECHO: Final = Path(__file__).parents[1] / "examples" / "websocket_echo.py"
IMAGE: Final = "crossbario/autobahn-testsuite"
GOOD: Final = frozenset({"OK", "INFORMATIONAL"})
AGENT: Final = "tokenwire"


def specification(url: str, cases: str) -> dict[str, object]:
    """Write what the suite's fuzzing client wants to know."""
    return {"servers": [{"agent": AGENT, "url": url}], "outdir": "/reports", "cases": cases.split(",")}


def failed_cases(index: Mapping[str, Mapping[str, Mapping[str, object]]]) -> list[str]:
    """Name the cases of a report that are neither OK nor INFORMATIONAL, in behaviour or in how they closed.

    Args:
        index: the suite's index.json: agents, cases, and what came out.
    """
    return [
        f"{case}: {result['behavior']}, close {result['behaviorClose']}"
        for case, result in index.get(AGENT, {}).items()
        if not GOOD.issuperset((result["behavior"], result["behaviorClose"]))
    ]


def _run_image(url: str, cases: str) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(specification(url, cases)), encoding="utf-8")
        mounts = ["--volume", f"{folder}:/config", "--volume", f"{folder}:/reports"]
        command = ["wstest", "--mode", "fuzzingclient", "--spec", "/config/spec.json"]
        subprocess.run(["docker", "run", "--rm", "--network", "host", *mounts, IMAGE, *command], check=True)
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    failures = failed_cases(index)
    sys.stdout.write("".join(f"{line}\n" for line in failures) or f"all {len(index[AGENT])} cases are OK\n")
    return 1 if failures or not index[AGENT] else 0


def main(arguments: list[str]) -> int:
    """Run the command line; the exit code is 0 when every case conforms."""
    parser = argparse.ArgumentParser(description="Run Autobahn|Testsuite against the echo example.")
    parser.add_argument("--runner", default="", help="a program that takes URL and cases; default: the suite's image")
    parser.add_argument("--cases", default="*", help="patterns with commas between them")
    options = parser.parse_args(arguments)
    with subprocess.Popen([sys.executable, str(ECHO), "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip() if server.stdout is not None else ""
            if not url:
                return 1  # it has told why on stderr
            if options.runner:
                return subprocess.run([options.runner, url, options.cases], check=False).returncode
            return _run_image(url, options.cases)
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
