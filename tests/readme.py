"""The README's code blocks, so that every snippet and command in it is run by a test."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["ROOT", "blocks", "commands"]

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    """List the README's fenced blocks of a language, in order."""
    text = (ROOT / "README.md").read_text()
    return [body for name, body in _BLOCK.findall(text) if name == language]


def commands() -> list[str]:
    """List the shell commands of the README's console blocks, in order."""
    return [
        line.removeprefix("$ ") for body in blocks("console") for line in body.splitlines() if line.startswith("$ ")
    ]
