"""Runs a command pinned to a core and bound to its parent's life: `contain.py CORE COMMAND...` (CORE -1: not pinned).

Linux keeps both across execve, so the process that started this one holds the command's own pid.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__: list[str] = []

_PR_SET_PDEATHSIG = 1


def main(core: str, command: list[str]) -> None:
    """Becomes the command; does not return."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if int(core) >= 0:
        os.sched_setaffinity(0, {int(core)})
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
