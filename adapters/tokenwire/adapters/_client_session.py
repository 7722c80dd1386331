"""One question to one server, apart from how its asker waits: the client's machine on a dialled connection."""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from msgspec import Struct

from tokenwire.backends.address import USUAL_PORTS, Address
from tokenwire.backends.base import Dialer, Link
from tokenwire.core.client import StreamClient
from tokenwire.core.contracts import Dialect, Headers
from tokenwire.core.dialects.base import failure_of
from tokenwire.core.events import TERMINALS, Event, Failure, StreamEnd, StreamTruncated, Terminal
from tokenwire.core.request import GenerationRequest

from .timers import Alarm, Timers

__all__ = ["MAX_EVENTS", "ConnectFailed", "Patience", "Question", "Session", "StreamFailed", "parse_url"]

_SECOND: Final = 1_000_000_000

MAX_EVENTS: Final = 256
"""Events that wait for a slow asker before nothing more is read from the server; the read that passes it is finished."""


class Patience(Struct, frozen=True, kw_only=True):
    """How long a server may take, in nanoseconds."""

    connect_ns: int = 10 * _SECOND
    """To be found, to take the connection and to shake hands."""
    first_byte_ns: int = 600 * _SECOND
    """For the first byte of the answer; a long prompt takes its time, and many servers say nothing meanwhile."""
    silence_ns: int = 60 * _SECOND
    """Between two bytes of the answer; a heartbeat is as good as a token. Tokenwire's own come every 15 s."""


class ConnectFailed(ConnectionError):
    """There is no connection, so that nothing was asked.

    Attributes:
        reason: why, in words.
    """

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"cannot connect to {host} port {port}: {reason}")
        self.reason = reason


class StreamFailed(Exception):
    """A stream did not end well, and its asker wanted that raised.

    Attributes:
        terminal: how it ended: a StreamError, StreamCancelled or StreamTruncated, or None where it has not ended.
    """

    def __init__(self, terminal: Failure | None) -> None:
        super().__init__("the stream has not ended" if terminal is None else failure_of(terminal).message)
        self.terminal = terminal


def parse_url(url: str, endpoint: str, *, prefix: str) -> Address:
    """Find out where a URL points.

    Args:
        url: a server's address, its base URL, or the endpoint itself; a query stays.
        endpoint: the dialect's path below its base, such as /chat/completions.
        prefix: the base where the URL has no path at all, such as /v1.

    Raises:
        ValueError: it is no http or https URL, or holds a user's name or a fragment.
    """
    parts = urlsplit(url)
    if parts.scheme not in USUAL_PORTS or not parts.hostname:
        raise ValueError("the URL must be http://HOST or https://HOST, with a port and a path as needed")
    if parts.username is not None or parts.fragment:
        raise ValueError("the URL may hold neither a user's name nor a fragment; a key is an argument of its own")
    base = parts.path.rstrip("/") or prefix
    path = base if base.endswith(endpoint) else base + endpoint
    return Address.of(parts, f"{path}?{parts.query}" if parts.query else path)


class Question(NamedTuple):
    """What to ask, whom, and how patiently."""

    target: Address
    dialect: Dialect
    request: GenerationRequest | bytes
    headers: Headers
    patience: Patience
    context: ssl.SSLContext | None


class Session:
    """One question on one connection; a `tokenwire.backends.base.Peer`. It closes the connection once it has the answer.

    Args:
        question: what to ask.
        now: the monotonic clock, in nanoseconds.

    Raises:
        RequestRefused: the dialect has no word for what is asked.
        ValueError: something of it cannot be written in a request's head.

    Attributes:
        stands: the connection stood, and the question was put.
        failure: why there is no connection.
        over: there is nothing more to wait for.
        terminal: how the answer ended, once that event was taken.
        wake: called whenever something has changed.
    """

    __slots__ = (
        "_alarm",
        "_client",
        "_events",
        "_last",
        "_link",
        "_now",
        "_paused",
        "_question",
        "_seen",
        "_timers",
        "failure",
        "over",
        "stands",
        "terminal",
        "wake",
    )

    _link: Link
    _timers: Timers

    def __init__(self, question: Question, now: Callable[[], int]) -> None:
        self._question = question
        self._now = now
        self._client = StreamClient(
            question.dialect,
            question.request,
            target=question.target.path,
            host=question.target.authority,
            headers=question.headers,
            wall_s=int(time.time()),
        )
        self._events: deque[Event] = deque()
        self._alarm: Alarm | None = None
        self._last = 0
        self._seen = 0
        self._paused = False
        self.stands = False
        self.failure: ConnectFailed | None = None
        self.over = False
        self.terminal: Terminal | None = None
        self.wake: Callable[[], None] = _nobody_waits

    @property
    def status(self) -> int | None:
        """The answer's HTTP status, once its head has come."""
        return None if self._client.head is None else self._client.head.status

    def begin(self, dialer: Dialer, timers: Timers) -> None:
        """Begin to connect."""
        self._timers = timers
        target = self._question.target
        deadline = self._now() + self._question.patience.connect_ns
        self._link = dialer.connect(target.host, target.port, self, tls=target.tls, deadline=deadline)

    def next_event(self) -> Event | None:
        """Take the next event; None where there is none yet, or none any more."""
        if not self._events:
            return None
        event = self._events.popleft()
        if isinstance(event, TERMINALS):
            self.terminal = event
        if self._paused and len(self._events) <= MAX_EVENTS // 2:
            self._paused = False
            self._last = self._now()
            self._link.set_reading(True)
        return event

    def close(self) -> None:
        """Drop the connection at once. Idempotent."""
        self._link.close()
        self._finish()

    # -------------------------------------------------------------------------------------------- as the dialer sees it

    def connected(self, now: int) -> None:
        """Put the question; see `Peer`."""
        self.stands = True
        self._last = now
        self._alarm = self._timers.call_at(now + self._limit(), self._on_alarm)
        self._link.write(self._client.data_to_send())
        self.wake()

    def receive_data(self, data: bytes, now: int) -> None:
        """Take some of the answer; see `Peer`."""
        self._last = now
        self._seen += len(data)
        begun = self._seen > len(data)
        self._events.extend(self._client.receive_data(data))
        if self._client.terminal is not None:
            self.close()
            return
        if not begun:
            self._watch_silence(now)
        if len(self._events) >= MAX_EVENTS and not self._paused:
            self._paused = True
            self._link.set_reading(False)
        self.wake()

    def set_blocked(self, blocked: bool, now: int) -> None:
        """A long question goes out piece by piece; see `Peer`."""
        del blocked
        self._last = now

    def receive_eof(self, now: int) -> None:
        """The answer may end with the connection; see `Peer`."""
        del now
        self._events.extend(self._client.receive_eof())
        self._finish()

    def failed(self, reason: str, now: int) -> None:
        """There is no connection, or none any more; see `Peer`."""
        del now
        if self.stands:
            self._truncate(reason)
        else:
            self.failure = ConnectFailed(self._question.target.host, self._question.target.port, reason)
        self._finish()

    # -------------------------------------------------------------------------------------------------------- deadlines

    def _limit(self) -> int:
        return self._question.patience.silence_ns if self._seen else self._question.patience.first_byte_ns

    def _watch_silence(self, now: int) -> None:
        """The first byte has come: from now on another limit holds."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._timers.call_at(now + self._limit(), self._on_alarm)

    def _on_alarm(self) -> None:
        now = self._now()
        since = now if self._paused else self._last  # while nothing is read, nothing can be heard
        due = since + self._limit()
        if due > now:
            self._alarm = self._timers.call_at(due, self._on_alarm)
            return
        self._link.close()
        seconds = self._limit() / _SECOND
        nothing = "the server sent nothing for" if self._seen else "the server did not begin to answer within"
        self._truncate(f"{nothing} {seconds:g} s")
        self._finish()

    def _truncate(self, reason: str) -> None:
        """End an answer that is known to be cut off, whatever its end looks like to the dialect."""
        for event in self._client.receive_eof():
            cut = isinstance(event, StreamEnd | StreamTruncated)
            self._events.append(StreamTruncated(reason, self._seen) if cut else event)

    def _finish(self) -> None:
        self.over = True
        if self._alarm is not None:
            self._alarm.cancel()
        self.wake()


def _nobody_waits() -> None:
    """Where `wake` leads while nobody waits."""
