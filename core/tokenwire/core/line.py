"""One stream's line through the house: what produces it, its grammar, and who reads it.

A Line is also the handle by which a backend knows the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .contracts import Carrier, Job
from .delivery import Delivery
from .events import Event
from .request import GenerationRequest
from .stream import Stream

__all__ = ["Line", "Reader"]


class Reader:
    """One reader of a stream: a delivery and the carrier that its bytes go to.

    The two methods that a token needs are bound once.
    """

    __slots__ = ("carrier", "deliver", "delivery", "write")

    def __init__(self, delivery: Delivery, carrier: Carrier) -> None:
        self.delivery = delivery
        self.carrier = carrier
        self.deliver: Callable[[Sequence[Event], int], bytes] = delivery.deliver
        self.write: Callable[[bytes], None] = carrier.write


class Line:
    """A stream on its way: made by an exchange, run by the dispatcher, gone with its terminal event.

    Attributes:
        stream: the grammar that the backend's items pass.
        request: what was asked for.
        delivery: the creator's own reader, not bound to a carrier yet.
        readers: who gets the events.
        job: the backend's work on it; None while it waits in the queue, or where it could not start.
        blocked: whether its reader does not keep up; told to the job when it starts.
    """

    __slots__ = ("blocked", "delivery", "job", "readers", "request", "stream")

    def __init__(self, stream: Stream, request: GenerationRequest, delivery: Delivery) -> None:
        self.stream = stream
        self.request = request
        self.delivery = delivery
        self.readers: tuple[Reader, ...] = ()
        self.job: Job | None = None
        self.blocked = False

    def bind(self, carrier: Carrier) -> None:
        """Give the creator's delivery its carrier: from now on events reach it."""
        self.readers = (Reader(self.delivery, carrier),)

    def unbind(self) -> None:
        """Let all readers go."""
        self.readers = ()
