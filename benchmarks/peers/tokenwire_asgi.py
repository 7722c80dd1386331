"""Our own application under an ASGI server: the mock backend, stepped like the peers."""

from __future__ import annotations

import os

from tokenwire.adapters.asgi import app as make_app
from tokenwire.backends.mock import MockBackend

__all__ = ["app"]

_STEP_NS = int(os.environ["TOKENWIRE_BENCH_STEP_NS"])

app = make_app(MockBackend(ttft_ns=_STEP_NS, itl_ns=_STEP_NS, jitter=0.0, seed=7))
