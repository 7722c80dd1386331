"""How long the engine may take: to its first token, between two signs of life, and over all."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from tokenwire.core.events import ErrorKind, StreamError

__all__ = ["Patience", "Signs"]

_SECOND: Final = 1_000_000_000


class Patience(Struct, frozen=True, kw_only=True):
    """Limits on one answer, from the moment that it has a slot."""

    first_token_ns: int = 600 * _SECOND
    """To its first token: a prompt that fills the context takes minutes on a slow CPU, and shows its progress."""
    gap_ns: int = 60 * _SECOND
    """Without any sign of life, which each step of a prompt is too: no step takes as long."""
    total_ns: int = 3600 * _SECOND
    """Over all: no answer that somebody waits for takes as long."""


class Signs:
    """What is known of one answer's pace. The engine's thread writes it, the loop reads it.

    Attributes:
        began_ns: when it got its slot.
        heard_ns: when the engine last called back.
        has_said: whether a token has come.
    """

    __slots__ = ("began_ns", "has_said", "heard_ns")

    def __init__(self, now: int) -> None:
        self.began_ns = now
        self.heard_ns = now
        self.has_said = False

    def is_silent(self, patience: Patience, now: int) -> bool:
        """Say whether the engine has given no sign of life for too long."""
        return now >= self.heard_ns + patience.gap_ns

    def next_deadline(self, patience: Patience) -> int:
        """Say when the next of the limits will have passed, if nothing is heard until then."""
        return min(deadline for deadline, _ in self._deadlines(patience))

    def overdue(self, patience: Patience, now: int) -> StreamError | None:
        """Word the limit that has passed; None while there is none."""
        for deadline, words in self._deadlines(patience):
            if now >= deadline:
                return StreamError(ErrorKind.TIMEOUT, words, "engine_timeout", retryable=True)
        return None

    def _deadlines(self, patience: Patience) -> list[tuple[int, str]]:
        found = [
            (self.heard_ns + patience.gap_ns, f"The model was silent for {_seconds(patience.gap_ns)}."),
            (self.began_ns + patience.total_ns, f"The answer took longer than {_seconds(patience.total_ns)}."),
        ]
        if not self.has_said:
            words = f"The model gave no token within {_seconds(patience.first_token_ns)}."
            found.append((self.began_ns + patience.first_token_ns, words))
        return found


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds / _SECOND:g} s"
