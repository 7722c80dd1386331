"""A real model in this process: llama.cpp by way of xllamacpp, any GGUF file.

The engine has a number of slots, answers that it generates side by side. A call of the engine occupies its thread until
the answer has ended, so there is a thread for each slot; what has no slot yet waits here, first come first served,
where it can be withdrawn at once. Chunks come as JSON text in those threads and are decoded there; what they say crosses
to the loop with one wake-up for all that is there.

A cancelled answer is given up at the engine's next call, which comes with every token and with every step of a prompt:
while a client reads an answer nothing else tells the engine that it has left, streaming or not.

An engine that falls silent cannot be stopped from outside. Its clients are told so after a time limit, and its slot is
counted as lost until the call returns; when all are lost, requests are refused at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from tokenwire.core.contracts import ModelCard
from tokenwire.core.errors import RequestRefused
from tokenwire.core.events import TERMINALS, ErrorKind, StreamError

from ._llama_answer import Answer, refusal_of
from ._llama_engine import CONTEXT_TOKENS, SLOTS, Engine, EngineOptions, open_engine
from ._llama_model import MODEL_PACKAGE, find_installed_model, read_chat_template
from ._llama_request import HONOURED, HONOURED_WITH_TOOLS, request_bodies
from ._llama_template import knows_tools, template_for
from ._llama_watch import Patience, Signs
from ._weave import Weave
from .mailbox import Mailbox
from .threads import ThreadPool, Work

if TYPE_CHECKING:
    from pathlib import Path

    from tokenwire.core.contracts import Batch, Job, Sink, StreamHandle
    from tokenwire.core.request import GenerationRequest
    from tokenwire.core.stream import Item

    from .base import Runtime

__all__ = [
    "CLOSE_LIMIT_S",
    "CONTEXT_TOKENS",
    "DEFAULT_MAX_TOKENS",
    "MAX_WAITING",
    "MODEL_PACKAGE",
    "SLOTS",
    "Engine",
    "EngineOptions",
    "LlamaBackend",
    "Patience",
    "find_installed_model",
    "open_llama",
]

DEFAULT_MAX_TOKENS: Final = 512
"""Tokens of a choice where the request does not say: a small model may never come to an end by itself."""

MAX_WAITING: Final = 1024
"""Choices that wait for a slot; the next one is refused as overloaded. Each holds its request's text."""

CLOSE_LIMIT_S: Final = 5.0
"""How long the engine's threads may take to leave it at the end: many steps of a prompt."""

_logger = logging.getLogger("tokenwire.backends")


def open_llama(
    path: Path,
    *,
    slots: int = SLOTS,
    context_tokens: int = CONTEXT_TOKENS,
    threads: int = 0,
    default_max_tokens: int = DEFAULT_MAX_TOKENS,
    patience: Patience | None = None,
) -> LlamaBackend:
    """Load a model file, and make a backend of it that is named after the file. Takes seconds to minutes.

    Args:
        path: a GGUF file.
        slots: answers that are generated at a time.
        context_tokens: the most tokens of a prompt with its answer; 0 for as many as the model was trained with.
        threads: CPU threads; 0 for the engine's own choice.
        default_max_tokens: tokens of a choice where the request does not say.
        patience: how long the engine may take.

    Raises:
        ImportError: xllamacpp is not installed.
        OSError: there is no such file, or it cannot be loaded.
    """
    own = read_chat_template(path)
    template = template_for(own)
    options = EngineOptions(slots=slots, context_tokens=context_tokens, threads=threads, template=template)
    return LlamaBackend(
        open_engine(path, options),
        model=path.stem,
        slots=slots,
        default_max_tokens=default_max_tokens,
        takes_tools=template is not None or knows_tools(own),
        marks_calls=template is not None,
        patience=patience,
    )


class LlamaBackend:
    """An engine with a model loaded, as a backend.

    Each choice of a request has a slot of its own, with seed, seed + 1, ...

    Args:
        engine: the engine; `open_llama` makes one.
        model: the model's name.
        slots: how many answers the engine generates at a time.
        default_max_tokens: tokens of a choice where the request does not say.
        takes_tools: whether the model's template has a place for tools; without, requests with tools are refused.
        marks_calls: whether its tool calls begin with `_llama_template.CALL_MARK`, so that one can be forced.
        patience: how long the engine may take.
        max_waiting: the most choices that wait for a slot.
        close_limit_s: how long `close` waits for the engine's threads, in seconds.
    """

    __slots__ = (
        "_close_limit_s",
        "_default_max_tokens",
        "_engine",
        "_jobs",
        "_mailbox",
        "_marks_calls",
        "_patience",
        "_pool",
        "_running",
        "_runtime",
        "_sink",
        "_slots",
        "_watched_until",
        "honours",
        "models",
    )

    honours: frozenset[str]
    """Fields of GenerationRequest that the engine acts on."""
    models: Sequence[ModelCard]
    """The one model."""
    _runtime: Runtime
    _sink: Sink
    _mailbox: Mailbox

    def __init__(
        self,
        engine: Engine,
        *,
        model: str,
        slots: int = SLOTS,
        default_max_tokens: int = DEFAULT_MAX_TOKENS,
        takes_tools: bool = True,
        marks_calls: bool = False,
        patience: Patience | None = None,
        max_waiting: int = MAX_WAITING,
        close_limit_s: float = CLOSE_LIMIT_S,
    ) -> None:
        self.models = (ModelCard(model),)
        self.honours = HONOURED_WITH_TOOLS if takes_tools else HONOURED
        self._engine = engine
        self._slots = slots
        self._default_max_tokens = default_max_tokens
        self._marks_calls = marks_calls
        self._patience = patience or Patience()
        self._close_limit_s = close_limit_s
        self._pool = ThreadPool("tokenwire-llama", max_threads=slots, max_waiting=max_waiting)
        self._jobs: dict[_Job, None] = {}
        self._running: dict[_Run, None] = {}
        self._watched_until: int | None = None

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        """Get ready. Called once, on the loop's thread, before the first `start`."""
        self._runtime = runtime
        self._sink = sink
        self._mailbox = Mailbox(runtime, self)

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        """Begin to answer a request, or let it wait for a slot."""
        job = _Job(self, stream, request.n)
        self._jobs[job] = None
        failure = self._begin(job, request)
        if failure is not None:
            self._runtime.wake_soon(partial(self._fail, job, failure))
        return job

    def close(self) -> None:
        """Have every answer given up, and wait for the engine's threads: the process must not end under them.

        A thread that stays in the engine is left behind; it cannot keep the process alive.
        """
        for job in list(self._jobs):
            job.cancel()
        self._pool.close()
        deadline = time.monotonic() + self._close_limit_s
        for thread in self._pool.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = sum(thread.is_alive() for thread in self._pool.threads)
        if stuck:
            _logger.warning("%d calls of the engine did not return; they are left behind", stuck)

    # What jobs and their runs call. `deliver` is the mailbox's sink: its streams are runs.

    def deliver(self, batch: Batch, now: int) -> None:
        """Give what runs said to their streams; on the loop's thread."""
        said: dict[StreamHandle, list[Item]] = {}
        for run, items in batch:
            if isinstance(run, _Run) and (told := run.job.relay(run.choice, items)):
                said.setdefault(run.job.stream, []).extend(told)
        if said:
            self._sink.deliver(said.items(), now)

    def call_engine(self, run: _Run) -> None:
        """Answer one choice, in a thread of the pool."""
        if run.job.closed:
            return
        run.signs = Signs(self._runtime.now())
        self._runtime.wake_soon(partial(self._watch, run))
        try:
            self._engine.handle_chat_completions(run.body, run.receive)
        except Exception as error:  # noqa: BLE001  # told to the client; it must not end a thread of the pool
            events = run.events_of(error)
        else:
            events = run.events_at_end()
        self._mailbox.put(run, events)
        self._runtime.wake_soon(partial(self._left, run))

    def put(self, run: _Run, items: Sequence[Item], now: int) -> None:
        """Hand over what a run has said, from its thread, and note the time."""
        run.signs.heard_ns = now
        if items:
            run.signs.has_said = True
            self._mailbox.put(run, items)

    def now(self) -> int:
        """Read the clock, from any thread."""
        return self._runtime.now()

    def forget(self, job: _Job) -> None:
        """Let go of a job that has ended: what waits for a slot is withdrawn, what runs gives up at its next call."""
        self._jobs.pop(job, None)
        for run in job.runs:
            self._pool.withdraw(run.work)

    # On the loop's thread.

    def _begin(self, job: _Job, request: GenerationRequest) -> StreamError | None:
        if self._is_lost():
            return _lost()
        try:
            bodies = request_bodies(request, default_max_tokens=self._default_max_tokens, marks_calls=self._marks_calls)
        except RequestRefused as refused:
            return refused.error
        job.runs = [_Run(self, job, choice, request, body) for choice, body in enumerate(bodies)]
        if all(self._pool.submit(run.work) for run in job.runs):
            return None
        return StreamError(ErrorKind.OVERLOADED, "Too many requests wait for the model.", retryable=True)

    def _fail(self, job: _Job, error: StreamError) -> None:
        if not job.closed:
            job.close()
            self._sink.deliver([(job.stream, (error,))], self._runtime.now())

    def _left(self, run: _Run) -> None:
        """Know that a run has left the engine: its slot is free."""
        self._running.pop(run, None)

    def _watch(self, run: _Run) -> None:
        """Watch a run that has got its slot."""
        self._running[run] = None
        self._arm(run.signs.next_deadline(self._patience))

    def _arm(self, deadline: int) -> None:
        """Have a timer for the deadline. One is enough for all runs: it is set again for whatever is due next."""
        if self._watched_until is None or deadline < self._watched_until:
            self._watched_until = deadline
            self._runtime.call_at(deadline, partial(self._look, deadline))

    def _look(self, deadline: int) -> None:
        if deadline != self._watched_until:
            return  # an earlier one has taken its place
        self._watched_until = None
        now = self._runtime.now()
        for run in list(self._running):
            error = run.signs.overdue(self._patience, now)
            if error is not None:
                run.is_lost = run.signs.is_silent(self._patience, now)
                self._fail(run.job, error)
        if self._is_lost():
            for job in list(self._jobs):
                self._fail(job, _lost())
        following = [run.signs.next_deadline(self._patience) for run in self._running if not run.job.closed]
        # A run that is cancelled has to leave; whether it does shows one gap from now at the latest.
        following += [now + self._patience.gap_ns for run in self._running if run.job.closed and not run.is_lost]
        if following:
            self._arm(min(following))

    def _is_lost(self) -> bool:
        """Whether no slot can be hoped for."""
        return sum(run.is_lost for run in self._running) >= self._slots


class _Job:
    """The work on one stream: a run for each choice. All but `closed` is touched on the loop's thread only.

    Attributes:
        closed: nothing more is wanted; read from any thread.
        runs: one for each choice.
    """

    __slots__ = ("_backend", "_weave", "closed", "runs", "stream")

    def __init__(self, backend: LlamaBackend, stream: StreamHandle, choices: int) -> None:
        self._backend = backend
        self.stream = stream
        self.closed = False
        self.runs: list[_Run] = []
        self._weave = Weave(choices) if choices > 1 else None

    def cancel(self) -> None:
        """Give every choice up."""
        self.close()

    def set_blocked(self, blocked: bool) -> None:
        """Do nothing: an engine's step cannot wait for one reader."""

    def relay(self, choice: int, items: Sequence[Item]) -> Sequence[Item]:
        """Make what one choice says a part of what the stream says."""
        if self.closed:
            return ()
        if self._weave is not None:
            items = self._weave.take(choice, items)
        if items and isinstance(items[-1], TERMINALS):
            self.close()
        return items

    def close(self) -> None:
        """Want nothing more."""
        self.closed = True
        self._backend.forget(self)


class _Run:
    """One choice, in one slot.

    Attributes:
        signs: its pace, from when it has its slot.
        is_lost: it is cancelled and the engine does not let go of it.
    """

    __slots__ = ("_answer", "_backend", "_failure", "body", "choice", "is_lost", "job", "request", "signs", "work")

    signs: Signs

    def __init__(self, backend: LlamaBackend, job: _Job, choice: int, request: GenerationRequest, body: bytes) -> None:
        self._backend = backend
        self._answer = Answer(request)
        self._failure: Exception | None = None
        self.job = job
        self.choice = choice
        self.request = request
        self.body = body
        self.is_lost = False
        self.work: Work = partial(backend.call_engine, self)

    def receive(self, data: bytes) -> bool:
        """Take a chunk, in the engine's thread.

        Returns:
            Whether to give the answer up. What is raised here vanishes in the engine, so it is kept and gives it up too.
        """
        try:
            if not self.job.closed:
                self._backend.put(self, self._answer.receive_data(data), self._backend.now())
        except Exception as error:  # noqa: BLE001  # told in events_at_end
            self._failure = error
            return True
        return self.job.closed

    def events_at_end(self) -> Sequence[Item]:
        """Say what comes when the engine has returned."""
        return self._answer.receive_eof() if self._failure is None else (_failure(self._failure),)

    def events_of(self, error: Exception) -> Sequence[Item]:
        """Say what comes when the engine has raised: before its first word it means the request."""
        if self._answer.ended:
            return ()
        if isinstance(error, ValueError) and not self.signs.has_said:
            return (refusal_of(error, self.request),)
        return (_failure(error),)


def _failure(error: Exception) -> StreamError:
    """Word an exception for the client, and log it in full. Its own text may hold what no client may read."""
    _logger.error("the engine failed", exc_info=error)
    message = f"The model failed with {type(error).__name__}."
    return StreamError(ErrorKind.SERVER, message, "engine_failed", retryable=True)


def _lost() -> StreamError:
    message = "The model does not answer any more; an operator has to restart the server."
    return StreamError(ErrorKind.UNAVAILABLE, message, "engine_lost")
