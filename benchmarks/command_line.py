"""What the command lines of the measuring programs share: names of contenders, cores to pin to, the end by a signal."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import NoReturn

__all__ = ["cores", "exit_on_sigterm", "names_of"]


def cores(pin: bool) -> tuple[int, int]:
    """The cores of the server and of its reader; -1 for none."""
    first, second, *_ = (*sorted(os.sched_getaffinity(0)), -1) if pin else (-1, -1)
    return first, second


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Makes a reader of names that are separated by commas."""

    def read(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
        return text.split(",")

    return read


def exit_on_sigterm() -> None:
    """Ends the program by an exception, so that the servers are killed on the way out."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
