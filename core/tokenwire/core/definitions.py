"""Rival definitions of latency, by the tool that uses each: one trace, and what every tool would say about it.

The same word differs by up to a factor of two between tools (docs/latency.md). Here is one line for each of their words,
from documentation and code of the tools themselves. A tool's clock starts with the attempt and not with the user's first
try; ours starts with what the user waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from .latency import Trace

__all__ = ["DEFINITIONS", "Definition", "Value", "by_tool"]

Value = float | None
"""Nanoseconds, or tokens per second, or a bare number, as the metric's name says; None where the trace has no such thing."""

_SECOND: Final = 1_000_000_000

_Read = Callable[[Trace], Value]


class Definition(Struct, frozen=True):
    """One tool's word."""

    tool: str
    """Who says it."""
    metric: str
    """The word, with _ns where it is a time."""
    says: str
    """What it means."""
    of: _Read
    """Reads it from a trace."""


def _until(point: str) -> _Read:
    """From the attempt's begin to a point."""

    def read(trace: Trace) -> Value:
        at: int | None = getattr(trace, point)
        return None if at is None else at - trace.attempt_ns

    return read


def _between(begin: str, end: str) -> _Read:
    """From a point to another."""

    def read(trace: Trace) -> Value:
        first, last = getattr(trace, begin), getattr(trace, end)
        return None if first is None or last is None else float(last - first)

    return read


def _per(span: _Read, parts: Callable[[Trace], int], otherwise: Value = None) -> _Read:
    """A span divided by a number; something else where there is nothing to divide by."""

    def read(trace: Trace) -> Value:
        whole, number = span(trace), parts(trace)
        return None if whole is None else whole / number if number > 0 else otherwise

    return read


def _or_zero(read: _Read) -> _Read:
    """Zero where there is nothing."""
    return lambda trace: read(trace) or 0.0


def _of_finished(read: _Read) -> _Read:
    """Only of streams that finished."""
    return lambda trace: read(trace) if trace.end == "finished" else None


def _rate(read: _Read) -> _Read:
    """How many in a second, from the time for one."""

    def rate(trace: Trace) -> Value:
        one = read(trace)
        return _SECOND / one if one else None

    return rate


def _later_tokens(trace: Trace) -> int:
    return trace.tokens - 1


def _sglang_tpot(trace: Trace) -> Value:
    last, first = _until("last_event_ns")(trace), _until("first_answer_ns")(trace)
    return None if last is None or trace.tokens < 2 else (last - (first or 0.0)) / (trace.tokens - 1)


_SPAN: Final = _between("first_ns", "last_ns")
_AIPERF_ITL: Final = _per(_SPAN, _later_tokens)

_OURS: Final[tuple[Definition, ...]] = (
    Definition("tokenwire", "queue_ns", "from the whole request to the backend's start", lambda trace: trace.queue_ns),
    Definition("tokenwire", "ttfb_ns", "to the answer's first byte", lambda trace: trace.ttfb_ns),
    Definition("tokenwire", "ttft_ns", "to the first token event", lambda trace: trace.ttft_ns),
    Definition("tokenwire", "ttfa_ns", "to the first token event that is not reasoning",
               lambda trace: None if trace.first_answer_ns is None else trace.first_answer_ns - trace.begun_ns),
    Definition("tokenwire", "second_token_ns", "from the first token event to the second",
               _between("first_ns", "second_ns")),
    Definition("tokenwire", "itl_event_ns", "mean gap between token events", lambda trace: trace.itl_ns),
    Definition("tokenwire", "itl_event_sd_ns", "standard deviation of these gaps", lambda trace: trace.itl_sd_ns),
    Definition("tokenwire", "itl_token_ns", "mean gap, shared among its event's tokens",
               lambda trace: trace.token_itl_ns),
    Definition("tokenwire", "itl_token_sd_ns", "standard deviation of these gaps", lambda trace: trace.token_itl_sd_ns),
    Definition("tokenwire", "itl_p50_ns", "median gap between token events", lambda trace: trace.gap_percentile(50)),
    Definition("tokenwire", "itl_p99_ns", "99th percentile of them", lambda trace: trace.gap_percentile(99)),
    Definition("tokenwire", "itl_p99_over_p50", "the last divided by the one before", lambda trace: trace.p99_over_p50),
    Definition("tokenwire", "longest_stall_ns", "longest gap between token events",
               lambda trace: trace.longest_ns if trace.events > 1 else None),
    Definition("tokenwire", "tpot_ns", "from the first to the last token event, by n - k tokens: k came with the first",
               lambda trace: trace.tpot_ns),
    Definition("tokenwire", "tokens_per_event", "tokens by token events", lambda trace: trace.tokens_per_event),
    Definition("tokenwire", "e2e_ns", "to the end, whichever", lambda trace: trace.e2e_ns),
)  # fmt: skip

_BENCHMARKS: Final[tuple[Definition, ...]] = (
    Definition("vllm", "ttft_ns", "to the first event with choices: a role chunk counts", _until("first_chunk_ns")),
    Definition("vllm", "itl_ns", "mean gap between events with choices, the role chunk and the end among them",
               _per(_between("first_chunk_ns", "last_chunk_ns"), lambda trace: trace.chunks - 1)),
    Definition("vllm", "tpot_ns", "(e2el - ttft) / (n - 1); 0 for one token or none",
               _or_zero(_per(_between("first_chunk_ns", "last_chunk_ns"), _later_tokens))),
    Definition("vllm", "e2el_ns", "to the last event with choices", _until("last_chunk_ns")),
    Definition("sglang", "ttft_ns", "to the first text that is not reasoning; 0 without any",
               _or_zero(_until("first_answer_ns"))),
    Definition("sglang", "itl_ns", "mean gap between events that have text",
               _per(_between("first_answer_ns", "last_answer_ns"), lambda trace: trace.answer_events - 1)),
    Definition("sglang", "tpot_ns", "(e2e - ttft) / (n - 1)", _sglang_tpot),
    Definition("sglang", "e2e_ns", "to the last event", _until("last_event_ns")),
    Definition("aiperf", "ttft_ns", "to the first response that is not empty", _until("first_ns")),
    Definition("aiperf", "ttst_ns", "from the first of them to the second", _between("first_ns", "second_ns")),
    Definition("aiperf", "ttfo_ns", "to the first that is not reasoning", _until("first_answer_ns")),
    Definition("aiperf", "itl_ns", "(e2e - ttft) / (n - 1), which others call TPOT", _AIPERF_ITL),
    Definition("aiperf", "itl_per_chunk_usage_ns", "(e2e - ttft) / (n - tokens of the first event)",
               _per(_SPAN, lambda trace: trace.tokens - trace.first_tokens)),
    Definition("aiperf", "icl_ns", "mean gap between responses", _per(_SPAN, lambda trace: trace.events - 1)),
    Definition("aiperf", "tokens_per_second_per_user", "1 / itl", _rate(_AIPERF_ITL)),
    Definition("aiperf", "e2e_ns", "to the last response with content", _until("last_ns")),
    Definition("guidellm", "ttft_ns", "to the first content or reasoning", _until("first_ns")),
    Definition("guidellm", "ttfot_ns", "to the first content", _until("first_answer_ns")),
    Definition("guidellm", "itl_ns", "from the first to the last token event, by n - 1", _AIPERF_ITL),
    Definition("guidellm", "tpot_ns", "from the request to the last token event, by n: the first token is in it",
               _per(_until("last_ns"), lambda trace: trace.tokens)),
    Definition("guidellm", "e2e_ns", "to the last token event", _until("last_ns")),
    Definition("llmperf", "ttft_ns", "to the first content", _until("first_answer_ns")),
    Definition("llmperf", "itl_ns", "from the request to the last content, by events: TTFT is in it, empty events too",
               _per(_until("last_answer_ns"), lambda trace: trace.chunks)),
    Definition("llmperf", "e2e_ns", "to the end of the body", _until("end_ns")),
    Definition("inference_benchmarker", "ttft_ns", "to the first token event", _until("first_ns")),
    Definition("inference_benchmarker", "itl_ns", "later gaps by n - 1; 0 for a single event",
               _per(_SPAN, lambda trace: trace.tokens - 1 if trace.events > 1 else 0, 0.0)),
    Definition("inference_benchmarker", "e2e_ns", "to the stop", _until("last_chunk_ns")),
    Definition("mlperf", "ttft_ns", "to the first token", _until("first_ns")),
    Definition("mlperf", "tpot_ns", "mean interval between generated tokens", _per(_SPAN, _later_tokens)),
    Definition("mlperf", "e2e_ns", "to the last token", _until("last_ns")),
    Definition("llama_bench", "tokens_per_second", "tokens after the first, by their time: it knows no latencies",
               _rate(_per(_SPAN, _later_tokens))),
)  # fmt: skip

_SERVERS: Final[tuple[Definition, ...]] = (
    Definition("vllm_server", "time_to_first_token_ns", "from arrival to the engine's first output",
               _until("first_ns")),
    Definition("vllm_server", "inter_token_latency_ns", "mean gap between the engine's outputs",
               _per(_SPAN, lambda trace: trace.events - 1)),
    Definition("vllm_server", "request_time_per_output_token_ns", "from the first to the last output, by n - 1",
               _per(_SPAN, _later_tokens)),
    Definition("vllm_server", "request_queue_time_ns", "in the queue", lambda trace: trace.queue_ns),
    Definition("vllm_server", "e2e_request_latency_ns", "from arrival to the last output", _until("last_ns")),
    Definition("opentelemetry", "server.time_to_first_token_ns", "to the first token, of what finished",
               _of_finished(_until("first_ns"))),
    Definition("opentelemetry", "server.time_per_output_token_ns", "per token after the first, of what finished",
               _of_finished(lambda trace: trace.tpot_ns)),
    Definition("opentelemetry", "server.request.duration_ns", "to the end", _until("end_ns")),
    Definition("opentelemetry", "client.operation.time_to_first_chunk_ns", "to the first event of any kind",
               _until("first_chunk_ns")),
    Definition("opentelemetry", "client.operation.time_per_output_chunk_ns", "mean gap between events of choices",
               _per(_between("first_chunk_ns", "last_chunk_ns"), lambda trace: trace.chunks - 1)),
)  # fmt: skip

DEFINITIONS: Final = (*_OURS, *_BENCHMARKS, *_SERVERS)
"""Every definition."""


def by_tool(trace: Trace) -> dict[str, dict[str, Value]]:
    """Say what each tool would report about a stream, by tool and metric."""
    said: dict[str, dict[str, Value]] = {}
    for definition in DEFINITIONS:
        said.setdefault(definition.tool, {})[definition.metric] = definition.of(trace)
    return said
