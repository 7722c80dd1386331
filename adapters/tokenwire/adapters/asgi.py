"""The whole bundled server as an ASGI application, to run under an ASGI server or to mount in somebody else's.

    app = tokenwire.adapters.asgi.app(generate)

It runs on asyncio and on trio, whichever it finds itself on. It starts with the server's lifespan where it gets one, and
with the first request where it does not: a mounted application gets none from most frameworks.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from importlib import resources
from typing import Any, TypedDict, Unpack, cast

import anyio

from tokenwire.backends.base import Backend, UsesNetwork
from tokenwire.backends.generators import GeneratorBackend, load
from tokenwire.core.actions import Record
from tokenwire.core.delivery import DeliveryOptions
from tokenwire.core.dispatch import Dispatcher
from tokenwire.core.guard import Guard
from tokenwire.core.ledger import Targets
from tokenwire.core.service import Service, ServiceOptions

from .asgi_carrier import Hall, serve
from .asgi_messages import Receive, Scope, Send
from .asgi_websocket import converse
from .dialer import dialer_on
from .loop_lag import watch_loop
from .runtime import Loop, LoopRuntime, RunningLoop, WorldFacts, log_record, report_failure, running_loop

__all__ = ["App", "Options", "app"]


class Options(TypedDict, total=False):
    """What `app` takes by keyword: the fields of `tokenwire.core.service.ServiceOptions`, each with its default there."""

    max_body_bytes: int
    max_running: int
    max_waiting: int
    max_prompts: int
    retry_after_ns: int
    guard: Guard
    delivery: DeliveryOptions
    page: bytes
    accounting: bool
    targets: Targets


def app(
    backend: Backend | Callable[..., object] | str,
    *,
    log: Callable[[Record], None] = log_record,
    **options: Unpack[Options],
) -> App:
    """Make the application.

    Args:
        backend: where events come from: a backend, any callable that makes text (see
            `tokenwire.backends.generators.GeneratorBackend`), or the name of either, such as "myfile:generate".
        log: takes each answered request's record; it must not raise.
        options: what may be asked and from where. By default only loopback names are answered to:
            `guard=Guard(allowed_hosts=None)` answers to all, where the server before it looks at hosts.

    Raises:
        TypeError: the backend is none of these.
        tokenwire.backends.generators.LoadError: there is nothing of that name.
    """
    if "page" not in options:
        options["page"] = resources.files("tokenwire.adapters").joinpath("page.html").read_bytes()
    return App(_backend(backend), ServiceOptions(**options), log=log)


def _backend(backend: Backend | Callable[..., object] | str) -> Backend:
    if isinstance(backend, str):
        return load(backend)
    if callable(backend) and not hasattr(backend, "attach"):
        return GeneratorBackend(backend)
    return cast("Backend", backend)


class App:
    """A backend and the service, as an ASGI application on one event loop.

    Args:
        backend: where events come from.
        options: what the operator set.
        find_loop: gives the loop that runs.
        log: takes each answered request's record; it must not raise.
    """

    def __init__(
        self,
        backend: Backend,
        options: ServiceOptions | None = None,
        *,
        find_loop: Callable[[], RunningLoop] = running_loop,
        log: Callable[[Record], None] = log_record,
    ) -> None:
        self.service = Service(models=backend.models, honours=backend.honours, facts=WorldFacts(), options=options)
        self._backend = backend
        self._find_loop = find_loop
        self._log = log
        self._running: RunningLoop | None = None
        self._tasks: _OwnTasks | None = None
        self._hall: Hall | None = None
        self._closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope: a lifespan, a request of HTTP, or a WebSocket."""
        kind = scope["type"]
        if kind == "http":
            await serve(self.start(), scope, receive, send)
        elif kind == "lifespan":
            await self._live(receive, send)
        elif kind == "websocket":
            await converse(self.start(), scope, receive, send)
        else:
            raise ValueError(f"there is no answer to a scope of type {kind!r}")

    def start(self) -> Hall:
        """Attach the backend to the running loop, unless that was done.

        Raises:
            RuntimeError: it was closed, or runs on another loop.
        """
        running = self._find_loop()
        if self._hall is None or self._closed:
            if self._closed:
                raise RuntimeError("this application was closed; make another")
            return self._attach(running)
        if running is not self._running:
            raise RuntimeError("this application runs on another event loop; make one for each")
        return self._hall

    async def aclose(self) -> None:
        """End every stream with an error that says why, let the backend go, and wait for its tasks. Idempotent.

        The end of a lifespan does it; without one it is up to whoever made the application.
        """
        hall, tasks = self._hall, self._tasks
        self.service.draining = True
        if self._closed or hall is None or tasks is None:
            self._closed = True
            return
        self._closed = True
        hall.dispatcher.shut_down(self.service.shutting_down(), hall.now())
        self._backend.close()
        await tasks.aclose()

    def _attach(self, running: RunningLoop) -> Hall:
        self._running = running
        self._tasks = tasks = _OwnTasks(running.loop)
        dispatcher = Dispatcher(
            self.service,
            self._backend,
            log=self._log,
            report=report_failure,
            yield_to_loop=lambda: running.loop.wake_soon(self._resume),
            clock=running.now,
        )
        watch_loop(self.service.accountant, running.timers.call_at, running.now)
        self._hall = hall = Hall(self.service, dispatcher, running.now, running.timers.call_at, running.loop.new_waiter)
        if isinstance(self._backend, UsesNetwork):
            self._backend.use_dialer(dialer_on(running))
        self._backend.attach(LoopRuntime(tasks, running.timers, running.now), dispatcher)
        return hall

    def _resume(self) -> None:
        if self._hall is not None:
            self._hall.dispatcher.resume(self._hall.now())

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            self.start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            raise
        await send({"type": "lifespan.startup.complete"})
        try:
            await receive()
        finally:
            with anyio.CancelScope(shield=True):
                await self.aclose()
        await send({"type": "lifespan.shutdown.complete"})


class _OwnTasks:
    """A loop whose tasks can be ended apart from those of others; a `tokenwire.adapters.runtime.Tasks`."""

    __slots__ = ("_loop", "_scopes", "wake_soon")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._scopes: dict[anyio.CancelScope, anyio.Event] = {}
        self.wake_soon = loop.wake_soon

    def start_task(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop.start_task(partial(self._run, main))

    async def aclose(self) -> None:
        """Cancel what runs, and wait for its end."""
        for scope in list(self._scopes):
            scope.cancel()
        for ended in list(self._scopes.values()):
            await ended.wait()

    async def _run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        ended = anyio.Event()
        with anyio.CancelScope() as scope:
            self._scopes[scope] = ended
            try:
                await main()
            finally:
                del self._scopes[scope]
                ended.set()
