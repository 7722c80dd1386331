"""The way from a backend's own threads to the loop's thread: one wake-up a batch, however many threads and streams."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenwire.core.contracts import Batch, Sink, StreamHandle
    from tokenwire.core.stream import Item

    from .base import Runtime

__all__ = ["Mailbox"]


class Mailbox:
    """A thread-safe hand-over of items to a sink.

    The first put after a drain wakes the loop; every put until the loop gets to it joins the same batch. So the busier
    the loop, the larger the batches and the fewer the wake-ups. What waits here is bounded by whoever puts: an engine
    by its step, a generator by its read-ahead.

    Args:
        runtime: whose loop is woken, and whose clock stamps the batch.
        sink: where each batch goes, on the loop's thread.
    """

    __slots__ = ("_lock", "_runtime", "_sink", "_waiting")

    def __init__(self, runtime: Runtime, sink: Sink) -> None:
        self._runtime = runtime
        self._sink = sink
        self._lock = threading.Lock()
        self._waiting: dict[StreamHandle, list[Item]] = {}

    def put(self, stream: StreamHandle, items: Sequence[Item]) -> None:
        """Hand items over, from any thread. Returns at once; the items of one stream keep their order.

        Args:
            stream: whose items they are.
            items: what it said; none at all wakes nobody.
        """
        self.put_batch(((stream, items),))

    def put_batch(self, batch: Batch) -> None:
        """Hand one engine step's items over, from any thread: one wake-up for all of them.

        Args:
            batch: streams and what each said; none at all wakes nobody.
        """
        said = [(stream, items) for stream, items in batch if items]
        if not said:
            return
        with self._lock:
            is_first = not self._waiting
            for stream, items in said:
                self._waiting.setdefault(stream, []).extend(items)
        if is_first:
            self._runtime.wake_soon(self._drain)

    def _drain(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, {}
        self._sink.deliver(batch.items(), self._runtime.now())
