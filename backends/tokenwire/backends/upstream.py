"""Any other model server as a backend: the gateway.

A request goes out in the server's dialect, always as a stream with token counts, so that it is measured, merged and
cancelled as every other stream is; whoever did not ask for a stream gets the events collected. Nothing of the client's
head is sent on: no key, no cookie, no hop-by-hop field; the key that is sent is the gateway's own.

What a server's failure becomes:

| the server | the client sees |
|---|---|
| answers 4xx or 5xx | the same status, message, type, code, param, and how long to wait |
| answers 401, 403 or 407, which is about the gateway's key | 502 in our words; none of the server's, which may quote it |
| answers a redirect | 502: following it would take the key along |
| cannot be reached, breaks off before anything came, answers nonsense | 502 |
| is silent for too long | 504 |
| breaks off in the middle | the stream's error, or a truncated stream, in the client's dialect; 502 where it is no stream |

Asked again, a bounded number of times, with growing pauses, and only before anything of the answer was handed on: what
could not be connected; what died on a connection that was used before, without a byte of an answer, for a server may
close such a one at any moment; and 502, 503 and 429 where the server says no wait or a short one (429 only where it says
one). Never asked again is what a server may be at work on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import replace

from tokenwire.core.client import StreamClient, encode_request
from tokenwire.core.contracts import ANY_MODEL, ModelCard
from tokenwire.core.dialects.openai_chat import DIALECT as OPENAI_CHAT
from tokenwire.core.errors import RequestRefused
from tokenwire.core.events import TERMINALS, ErrorKind, Event, StreamError, StreamStart, StreamTruncated
from tokenwire.core.request import GenerationRequest

from ._upstream_models import ModelsInquiry
from .address import USUAL_PORTS, Address
from .pool import DEFAULT_IDLE_NS, DEFAULT_MAX_IDLE, Connection, Pool

if TYPE_CHECKING:
    from tokenwire.core.contracts import Dialect, Headers, Sink, StreamHandle

from .base import Dialer, Runtime

__all__ = ["UpstreamBackend", "UpstreamOptions", "parse_url"]

_log = logging.getLogger("tokenwire.backends")

_SECOND: Final = 1_000_000_000
_LOOK_NS: Final = _SECOND
"""How often deadlines are looked at: one timer for all streams, and no stream is given up much too late."""

_TERMINAL_TYPES: Final = frozenset(TERMINALS)
_UNSAID_TYPES: Final = frozenset({StreamStart, StreamError, StreamTruncated})
_TRY_AGAIN: Final = frozenset({502, 503})
_ABOUT_OUR_KEY: Final = frozenset({401, 403, 407})
_MALFORMED: Final = frozenset({"malformed_answer", "malformed_stream"})
"""The decoders' codes for what is not of their dialect: to a client of ours the server's nonsense is a bad gateway."""
_CHAT_PATH: Final = "/chat/completions"
_MODELS_PATH: Final = "/models"


class UpstreamOptions(Struct, frozen=True, kw_only=True):
    """How patient a gateway is."""

    connect_ns: int = 10 * _SECOND
    """How long connecting may take, TLS included."""
    first_token_ns: int = 300 * _SECOND
    """How long a server may be silent before it says anything, for its queue and its prefill; some send the head before."""
    gap_ns: int = 120 * _SECOND
    """How long it may be silent from then on. In either case a heartbeat is a sign of life."""
    linger_ns: int = _SECOND
    """How long the end of HTTP's message may take behind the stream's own end, for the connection to be kept."""
    attempts: int = 3
    """How often a request is sent at most, but for connections that had been used before."""
    backoff_ns: int = _SECOND // 4
    """The pause before the second attempt; it doubles with each further one."""
    max_wait_ns: int = 2 * _SECOND
    """The longest wait that a server may ask for and is waited for here; a longer one is for the client to decide."""
    models_ns: int = 60 * _SECOND
    """How old a list of models may be that a request is served by; an older one is asked for again meanwhile."""
    models_backoff_ns: int = _SECOND
    """The pause before a list is asked for again that was not got; it doubles, up to `models_ns`."""
    max_idle: int = DEFAULT_MAX_IDLE
    """Connections that are kept for later requests."""
    idle_ns: int = DEFAULT_IDLE_NS
    """How long each is kept."""


def parse_url(url: str) -> Address:
    """Read a server's URL: its base, as SDKs take it, or the endpoint itself.

    Raises:
        ValueError: it is no http or https URL; it holds a user, a query or a fragment, which would be lost or leak; or
            the host or the path is not ASCII.
    """
    parts = urlsplit(url)
    if "@" in (parts.netloc or url) or parts.query or parts.fragment:
        raise ValueError("the server's URL must not hold a user, a query or a fragment")
    if parts.scheme not in USUAL_PORTS or not parts.hostname or parts.port == 0:
        raise ValueError(f"{url!r} is no URL of a server; write http://host:port/v1")
    address = Address.of(parts, parts.path.rstrip("/").removesuffix(_CHAT_PATH))
    encode_request("GET", address.path + _MODELS_PATH, host=address.authority)  # refuses what cannot be written
    return address


class UpstreamBackend:
    """Serves requests from another server; everything the neutral request says is passed on to it.

    Its models are those that are configured, else those that the server lists. It is asked in the background when the
    backend is attached, again until it answers, and again when the list has become old and a request comes: a gateway
    starts though its server is down. Whether a model exists is the server's matter: a name that is not listed is passed
    on, and its refusal passed back; a request without a name asks for the first that is listed, and for none while none is.

    Args:
        url: the server's base URL, such as http://127.0.0.1:8080/v1.
        key: the gateway's own key, sent as a bearer token; none where empty.
        models: names to list instead of asking.
        dialect: what the server speaks.
        options: how patient to be.
        wall_s: reads the wall clock in Unix seconds, for a Retry-After that is a date.

    Raises:
        ValueError: the URL or the key cannot be used.
    """

    honours = frozenset({*GenerationRequest.__struct_fields__, ANY_MODEL})
    """All: the server acts on them, also on max_tokens and stop, so that nobody counts twice."""

    models: Sequence[ModelCard]
    """What can be asked for; the same list for good, whose content changes. May be empty for a time."""

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        models: Sequence[str] = (),
        dialect: Dialect = OPENAI_CHAT,
        options: UpstreamOptions | None = None,
        wall_s: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self.address = parse_url(url)
        self.dialect = dialect
        self.options = options or UpstreamOptions()
        self.wall_s = wall_s
        self.key = key.strip()
        self.headers: Headers = (("authorization", f"Bearer {self.key}"),) if self.key else ()
        encode_request("GET", "/", host="a", headers=self.headers)
        self._cards = [ModelCard(name, owner="upstream") for name in models]
        self.models = self._cards
        self._asks = not models
        self._dialer: Dialer | None = None
        self._inquiry: ModelsInquiry | None = None
        self._next_inquiry = 0
        self._failures = 0
        self._watched: dict[_Attempt, None] = {}
        self._looks = False
        self.closed = False
        self.pool: Pool
        self.runtime: Runtime
        self.sink: Sink

    def use_dialer(self, dialer: Dialer) -> None:
        """Take what connections are made with. Called once, before `attach`."""
        self._dialer = dialer

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        """Get ready, and ask for the models where none are configured.

        Raises:
            RuntimeError: there is no dialer.
        """
        if self._dialer is None:
            raise RuntimeError("a gateway needs a dialer: call use_dialer before attach")
        self.runtime = runtime
        self.sink = sink
        options, address = self.options, self.address
        self.pool = Pool(
            self._dialer,
            runtime,
            address.host,
            address.port,
            tls=address.tls,
            connect_ns=options.connect_ns,
            max_idle=options.max_idle,
            idle_ns=options.idle_ns,
        )
        self._ask_models()

    def start(self, stream: StreamHandle, request: GenerationRequest) -> _Job:
        """Begin to ask the server."""
        if self._failures == 0 and self.runtime.now() >= self._next_inquiry:
            self._ask_models()
        try:
            body = self.dialect.encode_request(replace(request, stream=True, include_usage=True))
        except RequestRefused as refused:
            job = _Job(self, stream, b"", streams=request.stream)
            self.runtime.wake_soon(partial(job.fail, refused.error))
            return job
        job = _Job(self, stream, body, streams=request.stream)
        job.ask()
        return job

    def close(self) -> None:
        """Close every connection; nothing is asked any more."""
        self.closed = True
        if self._inquiry is not None:
            self._inquiry.close()
        for attempt in list(self._watched):
            attempt.close()
        self.pool.close()

    # ------------------------------------------------------------------------------------------------------- deadlines

    def watch(self, attempt: _Attempt) -> None:
        """Look at an attempt's deadline from time to time, until `unwatch`."""
        self._watched[attempt] = None
        self._look_later()

    def unwatch(self, attempt: _Attempt) -> None:
        """Look at it no more."""
        self._watched.pop(attempt, None)

    def _look_later(self) -> None:
        if self._watched and not self._looks:
            self._looks = True
            period = min(_LOOK_NS, self.options.first_token_ns, self.options.gap_ns)
            self.runtime.call_at(self.runtime.now() + period, self._look)

    def _look(self) -> None:
        self._looks = False
        now = self.runtime.now()
        for attempt in list(self._watched):
            if attempt.deadline is not None and attempt.deadline <= now:
                attempt.time_out(now)
        self._look_later()

    # ---------------------------------------------------------------------------------------------------------- models

    def _ask_models(self) -> None:
        if not self._asks or self.closed or self._inquiry is not None:
            return
        now = self.runtime.now()
        self._next_inquiry = now + self.options.models_ns
        request = encode_request(
            "GET",
            self.address.path + _MODELS_PATH,
            host=self.address.authority,
            headers=(("accept", "application/json"), ("accept-encoding", "identity"), *self.headers),
        )
        self._inquiry = inquiry = ModelsInquiry(self.pool, request, self._learn_models)
        self.runtime.call_at(now + self.options.connect_ns, partial(self._give_up_models, inquiry))
        inquiry.begin(now)

    def _give_up_models(self, inquiry: ModelsInquiry) -> None:
        if inquiry is self._inquiry:
            inquiry.close()
            self._learn_models("it does not answer in time")

    def _learn_models(self, found: list[ModelCard] | str) -> None:
        self._inquiry = None
        if isinstance(found, str):
            if not self._failures:
                _log.warning("the models of %s are not known yet: %s", self.address.authority, found)
            pause = min(self.options.models_backoff_ns << min(self._failures, 16), self.options.models_ns)
            self._failures += 1
            self.runtime.call_at(self.runtime.now() + pause, self._ask_models)
        else:
            self._failures = 0
            self._cards[:] = found


class _Job:
    """One stream's request, through all its attempts."""

    __slots__ = (
        "_attempt",
        "_backend",
        "_blocked",
        "_body",
        "_held",
        "_over",
        "_said",
        "_stream",
        "_streams",
        "_tries",
    )

    def __init__(self, backend: UpstreamBackend, stream: StreamHandle, body: bytes, *, streams: bool) -> None:
        self._backend = backend
        self._stream = stream
        self._body = body
        self._streams = streams  # whether the client takes events as they come, so that it has some of them already
        self._attempt: _Attempt | None = None
        self._tries = 0
        self._blocked = False
        self._held: Sequence[Event] = ()
        self._said = False
        self._over = False

    # ------------------------------------------------------------------------------------------- as the core steers it

    def cancel(self) -> None:
        """Drop the connection: it is how the server learns that nobody listens."""
        self._over = True
        self._body = b""
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None

    def set_blocked(self, blocked: bool) -> None:
        """Take nothing from the server while the reader takes nothing from us, so that the server is held back too."""
        self._blocked = blocked
        if self._attempt is not None and not self._over:
            self._attempt.hold(blocked, self._backend.runtime.now())

    # ------------------------------------------------------------------------------------------- as its attempts see it

    def ask(self, *, fresh: bool = False) -> None:
        """Send the request, on a connection that was used before or on a fresh one."""
        if self._over or self._backend.closed:
            return
        self._tries += 1
        self._attempt = _Attempt(self._backend, self, self._body, fresh=fresh)
        self._attempt.begin(self._backend.runtime.now(), blocked=self._blocked)

    def take(self, events: Sequence[Event], now: int) -> None:
        """Hand on what an answer says; ask again instead where it failed before it said anything, and that may help."""
        if not self._said:
            # A stream's envelope says nothing yet: with it the answer's status would be decided.
            events = self._held = (*self._held, *events)
            self._said = any(type(event) not in _UNSAID_TYPES for event in events)
            if type(events[-1]) is StreamStart:
                return
        last = events[-1]
        if type(last) in _TERMINAL_TYPES:
            if isinstance(last, StreamError | StreamTruncated):
                pause = None if self._said else self._pause_before_next(last)
                if pause is not None:
                    self._ask_again(pause, now)
                    return
                events = (*(events[:-1] if self._said else ()), self._in_our_words(last))
            self._over = True
            self._body = b""
        self._held = ()
        self._backend.sink.deliver(((self._stream, events),), now)

    def fail(self, error: StreamError) -> None:
        """End the stream with an error of our own."""
        if not self._over:
            self._over = True
            self._backend.sink.deliver(((self._stream, (error,)),), self._backend.runtime.now())

    def _ask_again(self, pause: int, now: int) -> None:
        self._held = ()
        stale = self._attempt is not None and self._attempt.died_unheard
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None
        if stale:
            self._tries -= 1
            self.ask(fresh=True)
        else:
            self._backend.runtime.call_at(now + pause, self.ask)

    def _pause_before_next(self, failure: StreamError | StreamTruncated) -> int | None:
        """Say how long to wait before the request is sent again; None where it must not be."""
        attempt, options = self._attempt, self._backend.options
        if attempt is None:
            return None
        if attempt.died_unheard:
            return 0
        if self._tries >= options.attempts:
            return None
        backoff = options.backoff_ns << (self._tries - 1)
        if attempt.unreachable is not None:
            return backoff
        wait = failure.retry_after_ns if isinstance(failure, StreamError) else None
        if attempt.status not in _TRY_AGAIN and not (attempt.status == 429 and wait is not None):
            return None
        return max(wait or 0, backoff) if (wait or 0) <= options.max_wait_ns else None

    def _in_our_words(self, failure: StreamError | StreamTruncated) -> StreamError | StreamTruncated:
        """Word a failure for the client, who must not take the gateway's trouble for its own."""
        attempt = self._attempt
        if attempt is not None and attempt.unreachable is not None:
            message = f"The model server cannot be reached: {attempt.unreachable}."
            return StreamError(ErrorKind.UNAVAILABLE, message, "upstream_unreachable", status=502, retryable=True)
        if isinstance(failure, StreamTruncated):
            if self._said and self._streams:
                return failure
            message = f"The model server broke off: {failure.reason}."
            return StreamError(ErrorKind.UNAVAILABLE, message, "upstream_broke_off", status=502, retryable=True)
        if failure.kind in (ErrorKind.AUTHENTICATION, ErrorKind.PERMISSION) or failure.status in _ABOUT_OUR_KEY:
            return _about_our_key(has_key=bool(self._backend.key))
        failure = _without_key(failure, self._backend.key)
        if failure.code in _MALFORMED or not 400 <= (failure.status or 502) <= 599:
            return replace(failure, status=502)
        return failure


def _without_key(failure: StreamError, key: str) -> StreamError:
    """Strike the gateway's key out of whatever the server said."""
    if not key:
        return failure
    said = {name: getattr(failure, name) for name in ("message", "code", "param", "type")}
    quoted = {name: text.replace(key, "[the gateway's key]") for name, text in said.items() if text and key in text}
    return replace(failure, **quoted) if quoted else failure


def _about_our_key(*, has_key: bool) -> StreamError:
    what = "does not accept the gateway's key" if has_key else "wants a key, and the gateway has none"
    message = f"The model server {what}; this is for the gateway's operator to mend."
    return StreamError(ErrorKind.SERVER, message, "upstream_authentication", status=502)


class _Attempt:
    """The request on one connection; a `tokenwire.backends.base.Peer`.

    Attributes:
        deadline: when to give it up; None while nothing is due.
        unreachable: in words why no connection could be made, or None.
    """

    __slots__ = (
        "_backend",
        "_client",
        "_connection",
        "_held",
        "_job",
        "_patience_ns",
        "_released",
        "_sent",
        "deadline",
        "unreachable",
    )

    _connection: Connection

    def __init__(self, backend: UpstreamBackend, job: _Job, body: bytes, *, fresh: bool) -> None:
        address = backend.address
        self._backend = backend
        self._job = job
        self._sent = False
        self._held = False
        self._released = False
        self._patience_ns = backend.options.first_token_ns
        self.deadline: int | None = None
        self.unreachable: str | None = None
        self._client = StreamClient(
            backend.dialect,
            body,
            target=address.path + _CHAT_PATH,
            host=address.authority,
            headers=backend.headers,
            wall_s=backend.wall_s(),
        )
        self._connection = backend.pool.acquire(self, fresh=fresh)

    @property
    def status(self) -> int | None:
        """The answer's status, once its head has come."""
        head = self._client.head
        return None if head is None else head.status

    @property
    def died_unheard(self) -> bool:
        """Whether the connection had been used before, and ended without a byte of an answer."""
        ended = isinstance(self._client.terminal, StreamTruncated)
        return ended and self._connection.reused and not self._client.begun

    def begin(self, now: int, *, blocked: bool) -> None:
        """Send at once where the connection stands already."""
        self.hold(blocked, now)
        if self._connection.ready:
            self.connected(now)

    def hold(self, blocked: bool, now: int) -> None:
        """Take no more bytes, or go on. While nothing is taken the server cannot be late."""
        self._held = blocked
        self._connection.set_reading(not blocked)
        if self._sent:
            self.deadline = None if blocked else now + self._patience_ns

    def close(self) -> None:
        """Give it up, and the connection with it unless that is another's by now. Idempotent."""
        self._backend.unwatch(self)
        if not self._released:
            self._connection.close()

    def time_out(self, now: int) -> None:
        """The deadline has passed."""
        self.close()
        if self._client.terminal is None:
            message = f"The model server was silent for {self._patience_ns // _SECOND} s."
            self._job.take((StreamError(ErrorKind.TIMEOUT, message, "upstream_timeout", status=504),), now)

    # ------------------------------------------------------------------------------------- as the connection tells it

    def connected(self, now: int) -> None:
        """The connection stands: ask; see `Peer`."""
        self._sent = True
        self.deadline = None if self._held else now + self._patience_ns
        self._backend.watch(self)
        self._connection.write(self._client.data_to_send())

    def receive_data(self, data: bytes, now: int) -> None:
        """Bytes came; see `Peer`."""
        lingers = self._client.terminal is not None
        events = self._client.receive_data(data)
        if events and type(events[-1]) is not StreamStart:
            self._patience_ns = self._backend.options.gap_ns
        if not lingers:
            self.deadline = now + self._patience_ns
        if self._client.terminal is not None:
            self._settle(now, lingers=lingers)
        if events:
            self._job.take(events, now)

    def set_blocked(self, blocked: bool, now: int) -> None:
        """Nothing: the request is whole, and the connection keeps what the server does not take yet; see `Peer`."""

    def receive_eof(self, now: int) -> None:
        """The server hung up; see `Peer`."""
        self._backend.unwatch(self)
        events = self._client.receive_eof()
        if events:
            self._job.take(events, now)

    def failed(self, reason: str, now: int) -> None:
        """The connection could not be made, or broke; see `Peer`."""
        if not self._sent:
            self.unreachable = reason
        self.receive_eof(now)

    def _settle(self, now: int, *, lingers: bool) -> None:
        """The stream has ended: keep the connection for others where its answer is whole, or will be in a moment."""
        if self._client.reusable:
            self._backend.unwatch(self)
            self._released = True
            self._connection.release(now)
        elif self._client.may_become_reusable:
            if not lingers:
                self._connection.set_reading(True)
                self.deadline = now + self._backend.options.linger_ns
        else:
            self.close()
