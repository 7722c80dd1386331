"""Whether the peer still lives: pings, and a judgement that waits until our own loop has kept time."""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["LATE_NS", "Keepalive", "Step"]

_MS: Final = 1_000_000
_SECOND: Final = 1000 * _MS

LATE_NS: Final = 500 * _MS
"""A call that comes later than this after its deadline shows that our own loop lags. Timers are late by some ms, and a
loop that steps an engine itself by the length of a step."""

_LOOK_NS: Final = 500 * _MS
_LOOKS: Final = 2  # trio may run a timer before the reader of the same turn of its loop: so two turns


class Step(Enum):
    """What to do when a deadline has passed."""

    WAIT = "wait"
    """Nothing but to read the next deadline."""
    PING = "ping"
    """Send a ping."""
    GIVE_UP = "give up"
    """Abort the transport: the peer is gone, or does not end the connection. Nothing comes after it."""


class Keepalive:
    """Pings a silent peer, and gives it up when it does not answer.

    Any byte that comes shows life, not the pong alone: a peer in the middle of a long frame cannot send one. Sending
    changes nothing, so a token costs nothing here, and a stream on which only we talk is pinged once an interval, which
    also keeps proxies from closing it.

    While our own loop lags nobody is given up, for the answer may lie unread in the socket: a deadline that is told more
    than `LATE_NS` late begins the wait anew, and a verdict comes only after two more short waits, each a turn of the loop
    in which it has looked at its sockets.

    Args:
        now: when the connection opened, in monotonic nanoseconds.
        interval_ns: the peer's silence after which it is pinged.
        timeout_ns: how long its answer may take.
        close_timeout_ns: how long it may take to end the connection after our close frame.
    """

    __slots__ = ("_asked", "_close_timeout", "_closing", "_due", "_heard", "_interval", "_looks", "_timeout")

    def __init__(
        self,
        now: int,
        *,
        interval_ns: int = 15 * _SECOND,
        timeout_ns: int = 20 * _SECOND,
        close_timeout_ns: int = 5 * _SECOND,
    ) -> None:
        self._interval = interval_ns
        self._timeout = timeout_ns
        self._close_timeout = close_timeout_ns
        self._closing = False
        self._heard = now
        self._asked: int | None = None  # when it was heard last before the ping that waits for an answer
        self._looks = 0
        self._due = now + interval_ns

    def received(self, now: int) -> None:
        """Take note that bytes came from the peer."""
        self._heard = now

    def begin_closing(self, now: int) -> None:
        """Wait for nothing but the end from now on: our close frame has left. A second call changes nothing."""
        if not self._closing:
            self._closing = True
            self._wait(now)

    def next_deadline(self) -> int:
        """Say when `handle_deadline` wants to be called. It moves by no other call than that and `begin_closing`."""
        return self._due

    def handle_deadline(self, now: int) -> Step:
        """Say what a passed deadline asks for; WAIT where none has passed.

        Args:
            now: monotonic nanoseconds.
        """
        late = now - self._due
        if late < 0:
            return Step.WAIT
        if not self._closing:
            if self._asked != self._heard and self._asked is not None:
                self._asked = None  # it has answered
            if self._asked is None:
                return self._listen(now)
        if late > LATE_NS:
            self._wait(now)
        elif self._looks:
            self._looks -= 1
            self._due = now + _LOOK_NS
        else:
            return Step.GIVE_UP
        return Step.WAIT

    def _listen(self, now: int) -> Step:
        if self._heard + self._interval > now:
            self._due = self._heard + self._interval
            return Step.WAIT
        self._asked = self._heard
        self._wait(now)
        return Step.PING

    def _wait(self, now: int) -> None:
        self._due = now + (self._close_timeout if self._closing else self._timeout)
        self._looks = _LOOKS
