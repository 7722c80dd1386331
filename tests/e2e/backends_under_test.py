"""Backends of the tests, served by `--backend backends_under_test:NAME`.

Those that are watched take a folder as their prompt: they write there, in `notes`, what happens to them, and go on past
their gate when the test has made the file `go`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import anyio

__all__ = [
    "async_endless",
    "async_fails_midway",
    "async_gated",
    "async_words",
    "endless",
    "fails_at_once",
    "fails_midway",
    "flaky",
    "gated",
    "silent",
    "words",
]

_BEFORE_THE_GATE: Final = 3
_BEHIND_THE_GATE: Final = 2
_PATIENCE_S: Final = 30.0
_STEP_S: Final = 0.005


class SecretError(Exception):
    """Its text must reach the log, and no client."""


def words(prompt: str) -> Iterator[str]:
    """Say the prompt, word by word."""
    for word in prompt.split():
        yield f"{word} "


async def async_words(prompt: str) -> AsyncIterator[str]:
    """Say the prompt, word by word."""
    for word in prompt.split():
        await anyio.lowlevel.checkpoint()
        yield f"{word} "


def fails_at_once(prompt: str) -> Iterator[str]:
    """Raise before the first token."""
    if prompt:
        raise SecretError("hunter2")
    yield prompt


def fails_midway(prompt: str) -> Iterator[str]:
    """Raise after two tokens."""
    yield "one "
    yield "two "
    raise SecretError(f"hunter2 and {prompt}")


async def async_fails_midway(prompt: str) -> AsyncIterator[str]:
    """Raise after two tokens."""
    yield "one "
    yield "two "
    raise SecretError(f"hunter2 and {prompt}")


def flaky(prompt: str) -> Iterator[str]:
    """Raise before the first token when called for the first time, and answer the second."""
    folder = Path(prompt)
    _note(folder, "run")
    if _count(folder, "run") == 1:
        raise SecretError("hunter2")
    yield "at last"


def gated(prompt: str) -> Iterator[str]:
    """Say some tokens, wait at the gate, say some more."""
    folder = Path(prompt)
    _note(folder, "run")
    try:
        for number in range(_BEFORE_THE_GATE):
            yield f"before-{number} "
        _wait_for(folder / "go")
        for number in range(_BEHIND_THE_GATE):
            yield f"behind-{number} "
    finally:
        _note(folder, "closed")


async def async_gated(prompt: str) -> AsyncIterator[str]:
    """Say some tokens, wait at the gate, say some more."""
    folder = Path(prompt)
    _note(folder, "run")
    try:
        for number in range(_BEFORE_THE_GATE):
            yield f"before-{number} "
        with anyio.fail_after(_PATIENCE_S):
            while not (folder / "go").exists():  # noqa: ASYNC110  # the gate is another process's file
                await anyio.sleep(_STEP_S)
        for number in range(_BEHIND_THE_GATE):
            yield f"behind-{number} "
    finally:
        _note(folder, "closed")


def silent(prompt: str) -> Iterator[str]:
    """Wait at the gate before the first token."""
    folder = Path(prompt)
    _note(folder, "run")
    _wait_for(folder / "go")
    yield "after all"


def endless(prompt: str) -> Iterator[str]:
    """Say tokens until somebody stops it."""
    folder = Path(prompt)
    _note(folder, "run")
    try:
        while True:
            yield "more "
            time.sleep(_STEP_S)
    finally:
        _note(folder, "closed")


async def async_endless(prompt: str) -> AsyncIterator[str]:
    """Say tokens until somebody stops it."""
    folder = Path(prompt)
    _note(folder, "run")
    try:
        while True:
            yield "more "
            await anyio.sleep(_STEP_S)
    finally:
        _note(folder, "closed")


def _note(folder: Path, what: str) -> None:
    with (folder / "notes").open("a") as notes:
        notes.write(f"{what}\n")


def _count(folder: Path, what: str) -> int:
    return (folder / "notes").read_text().splitlines().count(what)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody opened the gate")
        time.sleep(_STEP_S)
