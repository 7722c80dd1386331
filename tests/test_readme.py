"""What the README says that needs no running server; tests/e2e/test_readme.py runs the rest."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
from tests.readme import ROOT, blocks

OFFLINE = [body for body in blocks("python") if "http://" not in body]


@pytest.mark.parametrize("body", OFFLINE, ids=lambda body: body.splitlines()[0])
def test_a_snippet_runs(body: str) -> None:
    module = types.ModuleType("snippet")
    exec(compile(body, "README.md", "exec"), module.__dict__)  # noqa: S102  # our own README
    assert len(vars(module)) > len(vars(types.ModuleType("empty")))


def test_the_first_snippet_is_the_shipped_example() -> None:
    snippet, shipped = types.ModuleType("snippet"), types.ModuleType("shipped")
    exec(compile(OFFLINE[0], "README.md", "exec"), snippet.__dict__)  # noqa: S102  # our own README
    exec(compile((ROOT / "examples/story.py").read_text(), "story.py", "exec"), shipped.__dict__)  # noqa: S102
    assert list(snippet.generate("Hello")) == list(shipped.generate("Hello"))


def test_every_linked_file_is_there() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert linked
    assert [path for path in linked if not Path(ROOT, path).exists()] == []
