"""What the command line reads from its arguments: durations, shares, whole numbers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Final

__all__ = ["duration_ns", "share", "some_duration_ns", "whole_number"]

_UNITS_NS: Final = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(us|ms|s|m)", re.ASCII)


def duration_ns(text: str) -> int:
    """Read a duration such as 200ms, 1.5s or 2m; a bare 0 needs no unit.

    Returns:
        Nanoseconds.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        if text == "0":
            return 0
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 200ms, 1.5s or 2m")
    return round(float(match[1]) * _UNITS_NS[match[2]])


def some_duration_ns(text: str) -> int:
    """Read a duration longer than none.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    value = duration_ns(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all")
    return value


def share(text: str) -> float:
    """Read a number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return value


def whole_number(least: int, most: int = 1_000_000) -> Callable[[str], int]:
    """Make a reader of whole numbers within bounds."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return read
