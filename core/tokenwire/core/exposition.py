"""What an accountant knows, as Prometheus reads it: the text format 0.0.4, and the families that it is written from.

The bounds of the buckets are ends of the histograms' own buckets, a nanosecond below a round binary number, so that each
count is exact and not an estimate. The families by OpenTelemetry's names have the bounds of its conventions instead, and
are counted at these bounds from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

from .histogram import Buckets, Histogram
from .latency import Accountant
from .ledger import Ledger

__all__ = ["CONTENT_TYPE", "Family", "Sample", "encode", "families"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_SECOND: Final = 1_000_000_000

Labels = tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """One line."""

    name: str
    """The family's name, with what a kind appends to it."""
    labels: Labels
    """Names and values."""
    value: float
    """The number."""


class Family(NamedTuple):
    """Lines of one name."""

    name: str
    """As it is asked for."""
    kind: str
    """counter, gauge or histogram."""
    says: str
    """What it means."""
    samples: Sequence[Sample]
    """Its lines."""


def _ends(first: int, last: int, parts: int) -> tuple[int, ...]:
    """Bounds that are the largest values of their buckets: from one power of two to another, so many an octave."""
    starts = (((parts + part) << octave) // parts for octave in range(first, last) for part in range(parts))
    return tuple(start - 1 for start in (*starts, 1 << last))


_GAP_BOUNDS: Final = (*_ends(17, 24, 4), *_ends(24, 34, 2)[1:])
"""From 0.13 ms to 17 s, four to the octave below 17 ms."""
_WAIT_BOUNDS: Final = _ends(20, 37, 2)
"""From 1 ms to 137 s."""
_LAG_BOUNDS: Final = _ends(13, 31, 2)
"""From 8 us to 2 s."""


class _Kind(Struct, frozen=True):
    """One family of histograms."""

    name: str
    says: str
    of: Callable[[Ledger], Histogram | Buckets]
    bounds: Sequence[int] = ()
    """Where to count; the histogram's own bounds where it has some."""


_HISTOGRAMS: Final[tuple[_Kind, ...]] = (
    _Kind("tokenwire_time_to_first_token_seconds", "From the request's head to the first token event, of all streams.",
          lambda ledger: ledger.ttft, _WAIT_BOUNDS),
    _Kind("tokenwire_time_per_output_token_seconds",
          "Per stream: from the first to the last token event, by the tokens that came after the first event.",
          lambda ledger: ledger.tpot, _GAP_BOUNDS),
    _Kind("tokenwire_inter_token_latency_seconds", "Gaps between token events.", Ledger.event_gaps, _GAP_BOUNDS),
    _Kind("tokenwire_inter_token_latency_shared_seconds", "The same gaps, shared among the tokens of their events.",
          Ledger.token_gaps, _GAP_BOUNDS),
    _Kind("tokenwire_queue_seconds", "From the whole request to the start of the backend.",
          lambda ledger: ledger.queue, _WAIT_BOUNDS),
    _Kind("tokenwire_delivery_lag_seconds",
          "Per write: from the arrival of its oldest event to the end of the writes of its batch.",
          lambda ledger: ledger.lag, _LAG_BOUNDS),
    _Kind("gen_ai_server_time_to_first_token_seconds", "OpenTelemetry: time to first token, of finished streams.",
          lambda ledger: ledger.successful["time_to_first_token"]),
    _Kind("gen_ai_server_time_per_output_token_seconds",
          "OpenTelemetry: time per output token after the first, of finished streams.",
          lambda ledger: ledger.successful["time_per_output_token"]),
    _Kind("gen_ai_server_request_duration_seconds", "OpenTelemetry: from the request's head to the stream's end.",
          lambda ledger: ledger.successful["request_duration"]),
)  # fmt: skip


def families(accountant: Accountant) -> list[Family]:
    """Read what an accountant knows.

    It may be called on another thread than the server's; what is being counted meanwhile may be in or not.
    """
    labelled = [((("model", model), ("dialect", dialect)), ledger) for (model, dialect), ledger in _ledgers(accountant)]
    found = [
        Family(kind.name, "histogram", kind.says,
               [sample for labels, ledger in labelled
                for sample in _histogram(kind.name, labels, kind.of(ledger), kind.bounds)])
        for kind in _HISTOGRAMS
    ]  # fmt: skip
    return [
        *found,
        Family("tokenwire_tokens_total", "counter", "Output tokens.",
               [Sample("tokenwire_tokens_total", labels, ledger.tokens) for labels, ledger in labelled]),
        Family("tokenwire_streams_total", "counter", "Streams that have ended, by how they did.",
               [Sample("tokenwire_streams_total", (*labels, ("end", end)), count)
                for labels, ledger in labelled for end, count in list(ledger.ends.items())]),
        Family("tokenwire_streams_good_total", "counter", "Streams that finished and met the targets: goodput.",
               [Sample("tokenwire_streams_good_total", labels, ledger.good) for labels, ledger in labelled]),
        Family("tokenwire_streams_active", "gauge", "Streams on their way, those that wait in the queue included.",
               [Sample("tokenwire_streams_active", labels, len(ledger.open)) for labels, ledger in labelled]),
        Family("tokenwire_loop_lag_seconds", "histogram", "How late the event loop called when a timer was due.",
               _histogram("tokenwire_loop_lag_seconds", (), accountant.loop_lag, _LAG_BOUNDS)),
    ]  # fmt: skip


def _ledgers(accountant: Accountant) -> list[tuple[tuple[str, str], Ledger]]:
    return sorted(accountant.ledgers.copy().items(), key=lambda item: item[0])


def _histogram(name: str, labels: Labels, counts: Histogram | Buckets, bounds: Sequence[int]) -> list[Sample]:
    if isinstance(counts, Buckets):
        bounds, below = counts.bounds, counts.counts_up_to_bounds()
    else:
        below = counts.counts_up_to(bounds)
    count = counts.count
    return [
        *(
            Sample(f"{name}_bucket", (*labels, ("le", _seconds(bound))), seen)
            for bound, seen in zip(bounds, below, strict=True)
        ),
        Sample(f"{name}_bucket", (*labels, ("le", "+Inf")), count),
        Sample(f"{name}_sum", labels, counts.total / _SECOND),
        Sample(f"{name}_count", labels, count),
    ]


def _seconds(bound: int) -> str:
    """Write nanoseconds as seconds, exactly."""
    whole, rest = divmod(bound, _SECOND)
    return f"{whole}.{rest:09}".rstrip("0").removesuffix(".") if rest else f"{whole}.0"


def encode(found: Iterable[Family]) -> bytes:
    """Write families in the text format 0.0.4."""
    lines: list[str] = []
    for family in found:
        lines.append(f"# HELP {family.name} {_escaped(family.says)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        lines += [f"{sample.name}{_braces(sample.labels)} {sample.value!r}" for sample in family.samples]
    return "".join(f"{line}\n" for line in lines).encode()


def _braces(labels: Labels) -> str:
    inside = ",".join(f'{name}="{_quoted(value)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')
