"""The latency accountant around any async iterator of tokens: `python latency_of_any_iterator.py`. No server runs."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic_ns

from tokenwire.core.definitions import by_tool
from tokenwire.core.events import TextDelta
from tokenwire.core.latency import Trace


async def measured(tokens: AsyncIterator[str], trace: Trace) -> AsyncIterator[str]:
    end = "cancelled"
    try:
        async for token in tokens:
            trace.receive((TextDelta(token),), monotonic_ns())
            yield token
        end = "finished"
    finally:
        trace.close(end, monotonic_ns())


async def generate() -> AsyncIterator[str]:
    for word in [
        "Once",
        "upon",
        "a",
        "time",
        "there",
        "was",
        "a",
        "clock",
        "that",
        "nobody",
        "had",
        "to",
        "read",
        "twice.",
    ]:
        await asyncio.sleep(0.02)
        yield word + " "


async def main() -> None:
    trace = Trace(monotonic_ns())
    async for token in measured(generate(), trace):
        print(token, end="", flush=True)
    print()
    for tool, metrics in by_tool(trace).items():
        for metric, value in metrics.items():
            if value is not None and metric.endswith("_ns"):
                print(f"{tool:>22} {metric.removesuffix('_ns'):<38} {value / 1e6:9.3f} ms")


if __name__ == "__main__":
    asyncio.run(main())
