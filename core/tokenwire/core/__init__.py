"""tokenwire.core: the sans-IO core for token streams.

This package re-exports the events only, so that importing it loads no protocol library; every other module is
imported by its name, such as `from tokenwire.core import sse`.
"""

from __future__ import annotations

from .events import (
    DELTAS,
    TERMINALS,
    ChoiceEnd,
    Delta,
    ErrorKind,
    Event,
    Failure,
    FinishReason,
    ProviderData,
    ReasoningDelta,
    RefusalDelta,
    StreamCancelled,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTruncated,
    Terminal,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
    TopLogprob,
    UsageReport,
)

__all__ = [
    "DELTAS",
    "TERMINALS",
    "ChoiceEnd",
    "Delta",
    "ErrorKind",
    "Event",
    "Failure",
    "FinishReason",
    "ProviderData",
    "ReasoningDelta",
    "RefusalDelta",
    "StreamCancelled",
    "StreamEnd",
    "StreamError",
    "StreamStart",
    "StreamTruncated",
    "Terminal",
    "TextDelta",
    "TokenLogprob",
    "ToolCallDelta",
    "ToolCallStart",
    "TopLogprob",
    "UsageReport",
]
