"""Any Python callable that makes text, as a backend.

    def generate(prompt):
        yield "Hello, "
        yield "world!"

It may be a generator function, sync or async, or a function, sync or async, that returns an iterable, an async iterable
or one whole answer; or an object with `__call__` of any of these kinds. What it yields are str, bytes of UTF-8 cut
anywhere, or events of `tokenwire.core.events`. What it is called with is a matter of its parameters' names: see
`GeneratorBackend`.

Sync code runs in a thread of a bounded pool, async code in a task on the loop. A thread's items cross to the loop
through a `Mailbox`; a task's items go to the sink in the task itself: nothing lies between the generator and the wire.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast, get_args

import anyio
import anyio.lowlevel
import msgspec

from tokenwire.core.contracts import ModelCard
from tokenwire.core.errors import RequestRefused
from tokenwire.core.events import TERMINALS, ErrorKind, Event, StreamEnd, StreamError

from ._arguments import Arguments, name_of
from ._weave import Weave
from .mailbox import Mailbox
from .threads import ThreadPool, Work

if TYPE_CHECKING:
    from tokenwire.core.contracts import Batch, Job, Sink, StreamHandle
    from tokenwire.core.request import GenerationRequest
    from tokenwire.core.stream import Item

    from .base import Backend, Runtime

__all__ = [
    "CLOSE_LIMIT_NS",
    "ITEMS_PER_TURN",
    "MAX_THREADS",
    "MAX_WAITING",
    "READ_AHEAD",
    "GeneratorBackend",
    "LoadError",
    "load",
]

MAX_THREADS: Final = 64
"""Sync generators that run at a time: more would only wait for the interpreter's lock, at 8 MiB of addresses each."""

MAX_WAITING: Final = 1024
"""Sync generators that wait for a thread; the next one is refused as overloaded. Some kilobytes each."""

READ_AHEAD: Final = 64
"""Items that a sync generator may be ahead of the loop: enough to keep it busy while the loop serves a large batch."""

ITEMS_PER_TURN: Final = 16
"""Items that an async generator may yield before the loop gets a turn, for it may never await anything itself."""

CLOSE_LIMIT_NS: Final = 5_000_000_000
"""How long the `finally` blocks of a stopped async generator may take."""

_logger = logging.getLogger("tokenwire.backends")

_EVENTS: Final = get_args(Event)
_ITEMS: Final = (str, bytes, *_EVENTS)
_ITEM_TYPES: Final = frozenset(_ITEMS)
_EXHAUSTED: Final = object()

_Call = Callable[[], object]


class GeneratorBackend:
    """A callable as a backend.

    The callable is told what was asked for by the names of its parameters: `request` is the GenerationRequest, `prompt`
    the text of the last user message, and `messages`, `max_tokens`, `temperature` or any other field of
    GenerationRequest is that field. A lone parameter of any other name is the prompt. A callable without parameters is
    called without.

    For n choices it is called n times, each time for one choice: with n=1, and with seed, seed + 1, ... so that the
    choices differ. A callable with a parameter named `n` makes all choices itself.

    An exception becomes a StreamError that names its class; the traceback goes to the log `tokenwire.backends`. What a
    raised RequestRefused says is what the client reads.

    A sync generator that blocks for ever keeps its thread, but neither the loop nor its client, nor the end of the
    process.

    Args:
        function: the callable.
        model: the model's name; the callable's own by default.
        honours: fields of GenerationRequest that a callable which takes the whole `request` acts on.
        max_threads: the most sync generators that run at a time.
        max_waiting: the most sync generators that wait for a thread, first come first served.
        close_limit_ns: how long the `finally` blocks of a stopped async generator may take, in nanoseconds.

    Raises:
        TypeError: it cannot be called, or wants an argument that no request has.
    """

    __slots__ = (
        "_arguments",
        "_close_limit_ns",
        "_function",
        "_is_async",
        "_name",
        "_pool",
        "_shared",
        "honours",
        "models",
    )

    honours: frozenset[str]
    """Fields of GenerationRequest that the callable is told, those it was declared to honour, and n."""
    models: Sequence[ModelCard]
    """The one model."""
    _shared: _Shared

    def __init__(
        self,
        function: Callable[..., object],
        *,
        model: str = "",
        honours: Iterable[str] = (),
        max_threads: int = MAX_THREADS,
        max_waiting: int = MAX_WAITING,
        close_limit_ns: int = CLOSE_LIMIT_NS,
    ) -> None:
        if not callable(function):
            raise TypeError(f"a {type(function).__name__} cannot be called")
        self._name = name_of(function)
        self.models = (ModelCard(model or self._name),)
        self._function = function
        self._arguments = Arguments(function)
        self._is_async = _is_async(function)
        self._close_limit_ns = close_limit_ns
        self._pool = ThreadPool(f"tokenwire-{self._name}", max_threads=max_threads, max_waiting=max_waiting)
        self.honours = self._arguments.fields | frozenset(honours) | {"n"}

    def attach(self, runtime: Runtime, sink: Sink) -> None:
        """Get ready. Called once, on the loop's thread, before the first `start`."""
        mailbox = Mailbox(runtime, _ThreadSink(sink))
        self._shared = _Shared(self._name, runtime, sink, mailbox, self._pool, self._close_limit_ns / 1_000_000_000)

    def start(self, stream: StreamHandle, request: GenerationRequest) -> Job:
        """Begin to call the callable, once for each choice."""
        makes_choices = "n" in self._arguments.fields
        requests = [request] if makes_choices or request.n == 1 else _split(request)
        job = _Job(self._shared, stream, len(requests))
        for choice, one in enumerate(requests):
            positional, keywords = self._arguments.bind(one)
            job.begin(choice, partial(self._function, *positional, **keywords), on_loop=self._is_async)
        return job

    def close(self) -> None:
        """Let the threads go. One that is blocked in a generator is left behind; it cannot keep the process alive."""
        self._pool.close()


class _Shared(NamedTuple):
    """What all runs of a backend use."""

    name: str
    runtime: Runtime
    sink: Sink
    mailbox: Mailbox
    """How items of the pool's threads come to the loop, put under the run that they come from."""
    pool: ThreadPool
    close_limit_seconds: float


class _Run(Protocol):
    """The work on one choice."""

    def wake(self) -> None:
        """Look at the job's flags again."""
        ...

    def stop(self) -> None:
        """End: the job was closed."""
        ...


class _Job:
    """The work on one stream: a run for each choice. All but the flags is touched on the loop's thread only.

    Attributes:
        closed: nothing more is wanted; read from any thread.
        blocked: nothing more may be pulled; read from any thread.
    """

    __slots__ = ("_runs", "_weave", "blocked", "closed", "shared", "stream")

    def __init__(self, shared: _Shared, stream: StreamHandle, choices: int) -> None:
        self.shared = shared
        self.stream = stream
        self.closed = False
        self.blocked = False
        self._runs: dict[int, _Run] = {}
        self._weave = Weave(choices) if choices > 1 else None

    def cancel(self) -> None:
        """Stop every run; generators are closed where they run."""
        self._close()

    def set_blocked(self, blocked: bool) -> None:
        """Stop pulling, or go on."""
        self.blocked = blocked
        for run in self._runs.values():
            run.wake()

    def begin(self, choice: int, call: _Call, *, on_loop: bool) -> None:
        """Begin a choice's run, or go on with it on the other side: what a call returned says where it belongs."""
        if self.closed:
            return
        if on_loop:
            task = _TaskRun(self, choice)
            self._runs[choice] = task
            self.shared.runtime.start_task(partial(task.main, call))
            return
        thread = _ThreadRun(self, choice, call)
        self._runs[choice] = thread
        if not self.shared.pool.submit(thread.work):
            self.shared.runtime.wake_soon(partial(self.say, choice, (_overloaded(),)))

    def say(self, choice: int, items: Sequence[Item]) -> None:
        """Hand what a choice says to the sink."""
        said = self.relay(choice, items)
        if said:
            self.shared.sink.deliver([(self.stream, said)], self.shared.runtime.now())

    def relay(self, choice: int, items: Sequence[Item]) -> Sequence[Item]:
        """Make what one choice says a part of what the stream says."""
        if self.closed:
            return ()
        if self._weave is None:
            return items
        said = self._weave.take(choice, items)
        if self._weave.ended:
            self._close()
        return said

    def _close(self) -> None:
        self.closed = True
        runs, self._runs = self._runs, {}
        for run in runs.values():
            run.stop()


class _ThreadSink:
    """Stands before the sink: gives threads' items to their streams, and tells the runs that they have arrived."""

    __slots__ = ("_sink",)

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def deliver(self, batch: Batch, now: int) -> None:
        """Take a batch whose handles are runs."""
        moved = [(run, items) for run, items in batch if isinstance(run, _ThreadRun)]
        said: dict[StreamHandle, list[Item]] = {}
        for run, items in moved:
            said.setdefault(run.job.stream, []).extend(run.job.relay(run.choice, items))
        batch = [entry for entry in said.items() if entry[1]]
        if batch:
            self._sink.deliver(batch, now)
        for run, items in moved:
            run.arrived(len(items))


class _ThreadRun:
    """A choice whose items are pulled in a thread."""

    __slots__ = ("_ahead", "_call", "_gate", "choice", "job", "work")

    def __init__(self, job: _Job, choice: int, call: _Call) -> None:
        self.job = job
        self.choice = choice
        self.work: Work = self._main
        self._call = call
        self._ahead = 0
        self._gate = threading.Condition(threading.Lock())

    def wake(self) -> None:
        with self._gate:
            self._gate.notify()

    def stop(self) -> None:
        self.job.shared.pool.withdraw(self.work)
        self.wake()

    def arrived(self, count: int) -> None:
        """Know that the loop has taken items, on the loop's thread."""
        with self._gate:
            self._ahead -= count
            self._gate.notify()

    def _main(self) -> None:
        if self.job.closed:
            return
        try:
            produced = self._call()
            if isinstance(produced, AsyncIterable) or inspect.isawaitable(produced):
                self._hand_to_loop(cast("object", produced))
            else:
                self._pull(produced)
        except BaseException as error:  # noqa: BLE001  # SystemExit must not end a thread of the pool and hang a stream
            self._put(_failure(error, self.job.shared.name))

    def _hand_to_loop(self, produced: object) -> None:
        begin = partial(self.job.begin, self.choice, lambda: produced, on_loop=True)
        self.job.shared.runtime.wake_soon(begin)

    def _pull(self, produced: object) -> None:
        iterator = iter(_pieces(produced))
        try:
            while self._may_pull():
                item = next(iterator, _EXHAUSTED)
                if item is _EXHAUSTED:
                    self._put(StreamEnd())
                    return
                checked = _check(item)
                self._put(checked)
                if isinstance(checked, TERMINALS):
                    return
        finally:
            _close_here(iterator, self.job.shared.name)

    def _may_pull(self) -> bool:
        """Wait until one more item may be pulled; False once nobody wants it."""
        job = self.job
        with self._gate:
            while not job.closed and (job.blocked or self._ahead >= READ_AHEAD):
                self._gate.wait()
            self._ahead += 1
        return not job.closed

    def _put(self, item: Item) -> None:
        if not self.job.closed:
            self.job.shared.mailbox.put(self, (item,))


class _TaskRun:
    """A choice whose items are pulled in a task on the loop."""

    __slots__ = ("_resumed", "_scope", "choice", "job")

    def __init__(self, job: _Job, choice: int) -> None:
        self.job = job
        self.choice = choice
        self._scope: anyio.CancelScope | None = None
        self._resumed: anyio.Event | None = None

    def wake(self) -> None:
        if self._resumed is not None and not self.job.blocked:
            self._resumed.set()

    def stop(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    async def main(self, call: _Call) -> None:
        """Make the call and say what comes of it. Raises nothing but the cancellation of the task itself."""
        if self.job.closed:
            return
        try:
            with anyio.CancelScope() as self._scope:
                await self._drive(call)
        except Exception as error:  # noqa: BLE001  # _failure logs it
            self._say(_failure(error, self.job.shared.name))
        except BaseException:
            self._say(_stopped())  # cancelled, and not by us: else the stream would have no end
            raise
        finally:
            self._scope = None

    async def _drive(self, call: _Call) -> None:
        produced = call()
        if inspect.isawaitable(produced):
            produced = await produced
        if isinstance(produced, AsyncIterable):
            await self._pull(aiter(cast("AsyncIterable[object]", produced)))
        elif isinstance(produced, _ITEMS):
            self.job.say(self.choice, _whole(cast("Item", produced)))
        else:
            self.job.begin(self.choice, lambda: produced, on_loop=False)

    async def _pull(self, iterator: AsyncIterator[object]) -> None:
        job, pulled = self.job, 0
        try:
            await self._unblocked()
            async for item in iterator:
                checked = _check(item)
                self._say(checked)
                if isinstance(checked, TERMINALS):
                    return
                pulled += 1
                if not pulled % ITEMS_PER_TURN:
                    await anyio.lowlevel.checkpoint()
                if job.blocked:
                    await self._unblocked()
            self._say(StreamEnd())
        finally:
            await self._close(iterator)

    async def _unblocked(self) -> None:
        while self.job.blocked:
            self._resumed = anyio.Event()
            await self._resumed.wait()

    def _say(self, item: Item) -> None:
        if not self.job.closed:
            self.job.say(self.choice, (item,))

    async def _close(self, iterator: AsyncIterator[object]) -> None:
        """Run the generator's `finally` blocks, also while this task is cancelled."""
        aclose = getattr(iterator, "aclose", None)
        if aclose is None:
            return
        shared = self.job.shared
        with anyio.move_on_after(shared.close_limit_seconds, shield=True) as limit:
            try:
                await aclose()
            except Exception:
                _logger.exception("%s failed while it was closed", shared.name)
        if limit.cancelled_caught:
            _logger.warning("%s was still closing after %s seconds", shared.name, shared.close_limit_seconds)


class LoadError(Exception):
    """What was named as a backend cannot be used as one; the message says why."""


def load(target: str, *, model: str = "") -> Backend:
    """Find a backend by name, such as `myfile:generate`.

    The current directory can be imported from. A class is instantiated. What has `attach` and `start` is a backend
    already; anything else that can be called becomes a `GeneratorBackend`.

    Args:
        target: `module:attribute`; the attribute may be dotted.
        model: the model's name for a GeneratorBackend; the callable's own by default.

    Raises:
        LoadError: there is no such module or attribute, or it cannot be called as it wants to be. An exception that the
            module itself raises passes through.
    """
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise LoadError(f"{target!r} is not of the form module:attribute")
    found = _look_up(_import(module_name), path)
    if isinstance(found, type):
        found = _instantiate(cast("type[object]", found))
    if hasattr(found, "attach") and hasattr(found, "start"):
        return cast("Backend", found)
    if not callable(found):
        raise LoadError(f"{target} is a {type(found).__name__}, which cannot be called")
    try:
        return GeneratorBackend(found, model=model)
    except TypeError as error:
        raise LoadError(f"{target}: {error}") from error


def _import(name: str) -> object:
    directory = os.getcwd()
    if directory not in sys.path and "" not in sys.path:
        sys.path.insert(0, directory)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise LoadError(f"there is no module {error.name} in {directory} or on sys.path") from error


def _look_up(found: object, path: str) -> object:
    for name in path.split("."):
        if not hasattr(found, name):
            raise LoadError(f"{name_of(found)} has no attribute {name}")
        found = getattr(found, name)
    return found


def _instantiate(found: type[object]) -> object:
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise LoadError(f"the class {found.__name__} wants arguments: {error}") from error
    return found()


def _is_async(function: Callable[..., object]) -> bool:
    """Whether a call returns at once and leaves the work to the loop; a call of anything else may block."""
    candidates = (function, cast("Callable[..., object]", type(function).__call__))
    return any(inspect.isasyncgenfunction(one) or inspect.iscoroutinefunction(one) for one in candidates)


def _split(request: GenerationRequest) -> list[GenerationRequest]:
    """Make a request for each choice."""
    seed = request.seed
    seeds = [None if seed is None else seed + choice for choice in range(request.n)]
    return [msgspec.structs.replace(request, n=1, seed=seed) for seed in seeds]


def _pieces(produced: object) -> Iterable[object]:
    if isinstance(produced, _ITEMS):
        return _whole(cast("Item", produced))
    if isinstance(produced, Iterable):
        return cast("Iterable[object]", produced)
    raise _WrongTypeError("returned", produced)


def _whole(item: Item) -> tuple[Item, ...]:
    """Make the run of a callable that returned its answer whole."""
    return (item,) if isinstance(item, TERMINALS) else (item, StreamEnd())


def _check(item: object) -> Item:
    """Let items through, and nothing else."""
    if type(item) in _ITEM_TYPES or isinstance(item, _ITEMS):
        return cast("Item", item)
    raise _WrongTypeError("yielded", item)


class _WrongTypeError(Exception):
    """The callable made something that is no item; the message names the type, never the value."""

    def __init__(self, verb: str, value: object) -> None:
        super().__init__(f"The backend {verb} a value of type {type(value).__name__}, not str, bytes or an event.")


def _failure(error: BaseException, name: str) -> StreamError:
    """Word an exception for the client, and log it in full. Its own text may hold what no client may read."""
    if isinstance(error, RequestRefused):
        return error.error
    _logger.error("%s failed", name, exc_info=error)
    if isinstance(error, _WrongTypeError):
        return StreamError(ErrorKind.SERVER, str(error))
    return StreamError(ErrorKind.SERVER, f"The backend failed with {type(error).__name__}.", retryable=True)


def _stopped() -> StreamError:
    return StreamError(ErrorKind.SERVER, "The backend's task was stopped.", retryable=True)


def _overloaded() -> StreamError:
    return StreamError(ErrorKind.OVERLOADED, "Too many requests wait for the backend.", retryable=True)


def _close_here(iterator: Iterator[object], name: str) -> None:
    """Run a sync generator's `finally` blocks, in the thread that ran the rest of it."""
    close = getattr(iterator, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception:
        _logger.exception("%s failed while it was closed", name)
