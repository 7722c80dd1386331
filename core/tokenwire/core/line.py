"""One stream's line through the house: what produces it, its grammar, and who reads it.

A Line is also the handle by which a backend knows the stream.
"""

from __future__ import annotations

from .contracts import Carrier, Job
from .delivery import Delivery
from .request import GenerationRequest
from .stream import Stream

__all__ = ["Line"]


class Line:
    """A stream on its way: made by an exchange, run by the dispatcher, gone with its terminal event.

    Attributes:
        stream: the grammar that the backend's items pass.
        request: what was asked for.
        delivery: the way to the client that asked.
        carrier: where the delivery's bytes go; None before the line was handed over, and after the client has gone.
        job: the backend's work on it; None while it waits in the queue, or where it could not start.
    """

    __slots__ = ("carrier", "delivery", "job", "request", "stream")

    def __init__(self, stream: Stream, request: GenerationRequest, delivery: Delivery) -> None:
        self.stream = stream
        self.request = request
        self.delivery = delivery
        self.carrier: Carrier | None = None
        self.job: Job | None = None
