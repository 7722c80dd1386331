"""What the end-to-end tests stand on: a started server, conditions with deadlines, and a relay that cuts connections.

Nothing here sleeps for a fixed time in the hope that something has happened: `until` asks again and again, up to a deadline.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, cast
from urllib.parse import urlencode, urlsplit

__all__ = ["DONE", "HERE", "Relay", "Server", "curl", "data_of", "free_folder", "run_client", "text_of", "until"]

HERE: Final = Path(__file__).parent
DONE: Final = "[DONE]"

_PATIENCE_S: Final = 20.0
"""How long a condition may take on a busy machine. No test passes later for it: it ends as soon as the condition holds."""

_QUICK_S: Final = 5.0
"""How long a server without streams to wait for may take to end; less than the time that a drain is given."""

_GREETING: Final = re.compile(r"^tokenwire on (http://\S+) \|", re.MULTILINE)
_ENVIRONMENT: Final = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def until[T](condition: Callable[[], T], what: str, seconds: float = _PATIENCE_S) -> T:
    """Wait until a condition holds, and return what it returned.

    Raises:
        AssertionError: it did not within the time; the message says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)
