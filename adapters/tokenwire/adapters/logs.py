"""What is logged of an answered request, as one line of text or as JSON.

Prompts and query strings are never among the facts.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from tokenwire.core.actions import Record

__all__ = ["FACTS", "JsonFormatter", "facts_of", "text_of"]

FACTS: Final = "tokenwire_facts"
"""The attribute of a `logging.LogRecord` that holds a request's facts."""

_IN_FRONT: Final = ("method", "path", "status", "end")
_APART: Final = frozenset(" \"'")
"""What a fact in a line of text may hold in quotes only."""

Fact = str | int | float


def facts_of(record: Record) -> dict[str, Fact]:
    """Name what is known about a request; times in milliseconds. What is not known is left out."""
    is_stream = record.stream_id is not None
    facts: dict[str, Fact | None] = {
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "end": record.end,
        "dialect": record.dialect,
        "stream": record.stream_id,
        "model": record.model,
        "tokens": record.tokens if is_stream else None,
        "ttft_ms": _ms(record.first_token_ns),
        "ms": _ms(record.duration_ns),
        "tpot_ms": _ms(record.tpot_ns),
        "gap_p99_ms": _ms(record.gap_p99_ns),
        "queue_ms": _ms(record.queue_ns or None),
        "bytes": record.sent_bytes if is_stream else None,
        "error": record.error,
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def text_of(facts: dict[str, Fact]) -> str:
    """Write facts in one line."""
    front = " ".join(_shown(name, facts[name]) for name in _IN_FRONT)
    return " ".join((front, *(f"{name}={_shown(name, fact)}" for name, fact in facts.items() if name not in _IN_FRONT)))


def _ms(span_ns: float | None) -> float | None:
    return None if span_ns is None else round(span_ns / 1e6, 3)


def _shown(name: str, fact: Fact) -> str:
    if isinstance(fact, float):
        return f"{fact:.1f}"
    text = str(fact)
    # A client chooses the path and perhaps the model: neither may look like another fact, or like another line.
    return text if name != "error" and text.isprintable() and not _APART.intersection(text) else repr(text)


class JsonFormatter(logging.Formatter):
    """Writes each log record as one JSON object: time, level, logger, message; for an answered request its facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        facts: dict[str, Fact] | None = getattr(record, FACTS, None)
        said: dict[str, Fact] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03}",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        said |= {"message": record.getMessage()} if facts is None else facts
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said).decode()
