"""What the accountant knows, in somebody else's registry: Prometheus's client library, or OpenTelemetry.

The bundled server and `tokenwire.adapters.asgi.app` answer GET /metrics by themselves. This is for a process that has
metrics of its own already:

    register(app.service.accountant)                                   # prometheus_client, read when it is scraped
    app = asgi.app(backend, log=observed(meter, log_record))           # OpenTelemetry, once at a stream's end

Neither library is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol

from tokenwire.core.actions import Record
from tokenwire.core.exposition import families
from tokenwire.core.latency import Accountant
from tokenwire.core.ledger import SEMCONV_BOUNDS

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.registry import CollectorRegistry

__all__ = ["Counter", "Histogram", "Meter", "PrometheusCollector", "observe_active", "observed", "register"]

_SECOND: Final = 1_000_000_000


class PrometheusCollector:
    """A custom collector of `prometheus_client`: reads the accountant each time the registry is collected.

    Args:
        accountant: whose families are given.
    """

    def __init__(self, accountant: Accountant) -> None:
        self._accountant = accountant

    def describe(self) -> Iterator[Metric]:
        """Give the families' names, so that a registry finds out whether it has them already."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Give every family."""
        metric_of = import_module("prometheus_client.core").Metric
        for family in families(self._accountant):
            metric = metric_of(family.name.removesuffix("_total"), family.says, family.kind)
            for sample in family.samples:
                metric.add_sample(sample.name, dict(sample.labels), sample.value)
            yield metric


def register(accountant: Accountant, registry: CollectorRegistry | None = None) -> PrometheusCollector:
    """Register an accountant with `prometheus_client`.

    Args:
        accountant: of a server's or an application's `service`.
        registry: by default the library's own.

    Returns:
        The collector, for `registry.unregister`.

    Raises:
        ImportError: prometheus_client is not installed: pip install 'tokenwire[metrics]'.
        ValueError: the registry has these names already.
    """
    library: Any = import_module("prometheus_client")
    collector = PrometheusCollector(accountant)
    (registry or library.REGISTRY).register(collector)
    return collector


Attributes = Mapping[str, str]


class Histogram(Protocol):
    """What is needed of OpenTelemetry's histogram."""

    def record(self, amount: float, attributes: Attributes) -> None:
        """Count a value."""
        ...


class Counter(Protocol):
    """What is needed of OpenTelemetry's counter."""

    def add(self, amount: int, attributes: Attributes) -> None:
        """Add to it."""
        ...


class Meter(Protocol):
    """What is needed of `opentelemetry.metrics.Meter`."""

    def create_histogram(
        self, name: str, unit: str, description: str, *, explicit_bucket_boundaries_advisory: Sequence[float]
    ) -> Any:
        """Make a histogram."""
        ...

    def create_counter(self, name: str, unit: str, description: str) -> Any:
        """Make a counter."""
        ...

    def create_observable_gauge(
        self, name: str, callbacks: Sequence[Callable[[Any], Iterable[Any]]], unit: str, description: str
    ) -> Any:
        """Make a gauge that is asked."""
        ...


def observed(meter: Meter, then: Callable[[Record], None] | None = None) -> Callable[[Record], None]:
    """Make what records each stream with OpenTelemetry at its end, by the names of its conventions for GenAI.

    Args:
        meter: of the application's own provider.
        then: what takes the record besides, such as `tokenwire.adapters.runtime.log_record`.

    Returns:
        A `log` for `ServerOptions` and for `tokenwire.adapters.asgi.app`.
    """
    ttft, tpot, duration = (
        _histogram(meter, name) for name in ("time_to_first_token", "time_per_output_token", "request_duration")
    )
    tokens: Counter = meter.create_counter("tokenwire.tokens", "{token}", "Output tokens.")

    def observe(record: Record) -> None:
        if record.stream_id is not None:
            attributes = _attributes(record)
            duration.record(record.duration_ns / _SECOND, attributes)
            if record.end == "finished" and record.first_token_ns is not None:
                ttft.record(record.first_token_ns / _SECOND, attributes)
            if record.end == "finished" and record.tpot_ns is not None:
                tpot.record(record.tpot_ns / _SECOND, attributes)
            tokens.add(record.tokens, attributes)
        if then is not None:
            then(record)

    return observe


def observe_active(meter: Meter, accountant: Accountant, observation: Callable[[int, dict[str, str]], object]) -> None:
    """Let OpenTelemetry ask how many streams there are.

    Args:
        meter: of the application's own provider.
        accountant: who knows.
        observation: `opentelemetry.metrics.Observation`.
    """

    def ask(options: object) -> Iterable[object]:
        del options
        return [
            observation(len(ledger.open), {"gen_ai.request.model": model, "tokenwire.dialect": dialect})
            for (model, dialect), ledger in accountant.ledgers.copy().items()
        ]

    meter.create_observable_gauge("tokenwire.streams.active", [ask], "{stream}", "Streams on their way.")


def _histogram(meter: Meter, name: str) -> Histogram:
    bounds = [bound / _SECOND for bound in SEMCONV_BOUNDS[name]]
    dotted = name.replace("request_", "request.")
    says = f"{name.replace('_', ' ').capitalize()}, from the request's head."
    histogram: Histogram = meter.create_histogram(
        f"gen_ai.server.{dotted}", "s", says, explicit_bucket_boundaries_advisory=bounds
    )
    return histogram


def _attributes(record: Record) -> Attributes:
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenwire",
        "gen_ai.request.model": record.model_label or "",
        "tokenwire.dialect": record.dialect or "",
    }
    return attributes if record.end == "finished" else attributes | {"error.type": record.end}
