"""The encoders under pytest-benchmark: a round is one workload through a fresh encoder.

`make bench` runs it, after tests/test_benchmarks.py has decoded what the contenders write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytest

from encode import CONTENDERS, Encode
from workloads import WORKLOADS


class Benchmark(Protocol):
    """The fixture of pytest-benchmark, which has no types."""

    group: str
    extra_info: dict[str, Any]

    def pedantic(
        self, target: Callable[..., list[bytes]], *, setup: Callable[[], Any], rounds: int, warmup_rounds: int
    ) -> list[bytes]:
        """Time the target, given what the set-up returns, so many times."""
        ...


def _encode(encode: Encode, items: list[Any]) -> list[bytes]:
    return encode(items)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_encode(benchmark: Benchmark, workload: str, name: str) -> None:
    contender = CONTENDERS[name]
    tokens = WORKLOADS[workload]
    items = [contender.prepare(token) for token in tokens]
    benchmark.group = workload
    benchmark.extra_info["tokens"] = len(tokens)

    def start() -> tuple[tuple[Encode, list[Any]], dict[str, Any]]:
        return (contender.start(), items), {}

    wire = benchmark.pedantic(_encode, setup=start, rounds=100, warmup_rounds=2)
    assert len(wire) == len(tokens)
