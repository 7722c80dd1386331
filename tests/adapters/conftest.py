"""Every async test runs on asyncio, on uvloop under it, and on trio."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from anyio.abc import TaskGroup
from tests.adapters.authorities import Certificates
from tests.adapters.dialing import OpenDialing, open_dialing
from tests.adapters.serving import Clock, Serving

from tokenwire.adapters.pump import Readiness
from tokenwire.adapters.server import LOOPS, ServerOptions
from tokenwire.backends.base import Backend

MakeReadiness = Callable[[TaskGroup], Readiness]


@pytest.fixture(params=sorted(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    """The name of each loop."""
    name: str = request.param
    return name


@pytest.fixture
def anyio_backend(loop: str) -> tuple[str, dict[str, Any]]:
    """The loop in anyio's words; its pytest plugin runs async tests with it."""
    return LOOPS[loop].backend, dict(LOOPS[loop].options)


@pytest.fixture
def make_readiness(loop: str) -> MakeReadiness:
    """Makes the running loop's own readiness in a task group."""
    make: MakeReadiness = importlib.import_module(f"tokenwire.adapters.{LOOPS[loop].module}").readiness
    return make


@pytest.fixture
def start(make_readiness: MakeReadiness, caplog: pytest.LogCaptureFixture) -> Callable[..., Serving]:
    """Makes servers for `async with`."""
    caplog.set_level(logging.INFO, "tokenwire")

    def serving(backend: Backend, options: ServerOptions | None = None, *, host: str = "127.0.0.1") -> Serving:
        return Serving(backend, options, make_readiness, Clock(), caplog, host)

    return serving


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Contexts for servers and clients of TLS."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def dialing(make_readiness: MakeReadiness, certificates: Certificates) -> OpenDialing:
    """Runs a dialer on each loop, for `async with`."""
    return partial(open_dialing, make_readiness, certificates.client)
