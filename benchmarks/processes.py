"""What the kernel says of a process and all its descendants: CPU time and memory. Linux only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "cpu_ns", "memory", "process_tree"]

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes held by a process tree, from smaps_rollup (proc(5)).

    Attributes:
        rss: resident pages; a page shared by two processes of the tree counts twice.
        pss: resident pages, each divided by the number of its users.
        private: resident pages that nobody else uses.
    """

    rss: int
    pss: int
    private: int


def _parent(pid: int) -> int | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses, and may itself hold spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[1])


def process_tree(root: int) -> list[int]:
    """The process and its living descendants, the root first."""
    parents = {int(entry.name): _parent(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdecimal()}
    tree = [root]
    for pid in tree:
        tree.extend(child for child, parent in parents.items() if parent == pid)
    return tree


def cpu_ns(pids: list[int]) -> int:
    """The CPU time that the processes have used, user and system, in nanoseconds.

    Read from each process's CPU clock, whose id Linux makes from the pid (clock_getcpuclockid(3)). That is the
    scheduler's own count, with all threads, also those that have ended, and up to date for one that runs right now;
    /proc/PID/stat counts in steps of 10 ms, and schedstat is a file per thread that lags for running ones.

    Raises:
        OSError: a process of the list has ended.
    """
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids)


def _rollup(pid: int) -> dict[str, int]:
    lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def memory(pids: list[int]) -> Memory:
    """The memory of the processes, summed, in bytes."""
    rollups = [_rollup(pid) for pid in pids]
    return Memory(
        rss=sum(rollup["Rss"] for rollup in rollups),
        pss=sum(rollup["Pss"] for rollup in rollups),
        private=sum(rollup["Private_Clean"] + rollup["Private_Dirty"] for rollup in rollups),
    )
