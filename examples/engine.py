"""A batch engine: one step serves every stream, and its tokens leave in the very call that made them.

Serve it with `tokenwire serve --backend examples.engine:Countdown`.
"""

from collections.abc import Sequence

from tokenwire.backends.base import Runtime
from tokenwire.core import ChoiceEnd, FinishReason, StreamEnd
from tokenwire.core.contracts import ModelCard, Sink, StreamHandle
from tokenwire.core.request import GenerationRequest
from tokenwire.core.stream import Item

STEP_NS = 50_000_000


class Countdown:
    """Counts down from ten for everybody at once."""

    models = (ModelCard("countdown"),)
    honours = frozenset[str]()

    def __init__(self) -> None:
        self._left: dict[StreamHandle, int] = {}

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        self._runtime, self._sink = runtime, sink

    def start(self, stream: StreamHandle, request: GenerationRequest) -> "CountdownJob":
        del request  # it counts down whatever it is asked
        if not self._left:
            self._runtime.call_at(self._runtime.now() + STEP_NS, self._step)
        self._left[stream] = 10
        return CountdownJob(self._left, stream)

    def _step(self) -> None:
        batch: list[tuple[StreamHandle, Sequence[Item]]] = []
        for stream, left in self._left.items():
            said: list[Item] = [f"{left} "]
            if left == 1:
                said += [ChoiceEnd(reason=FinishReason.STOP), StreamEnd()]
            batch.append((stream, said))
            self._left[stream] = left - 1
        self._left = {stream: left for stream, left in self._left.items() if left}
        self._sink.deliver(batch, self._runtime.now())
        if self._left:
            self._runtime.call_at(self._runtime.now() + STEP_NS, self._step)

    def close(self) -> None:
        self._left.clear()


class CountdownJob:
    """A stream's place in the engine."""

    def __init__(self, left: dict[StreamHandle, int], stream: StreamHandle) -> None:
        self._left, self._stream = left, stream

    def cancel(self) -> None:
        self._left.pop(self._stream, None)

    def set_blocked(self, blocked: bool) -> None:
        """An engine's step cannot wait for one reader: what it says meanwhile is merged."""
