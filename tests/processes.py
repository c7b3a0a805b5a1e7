"""Which processes of this machine there are, as /proc tells, and how to start one that has imported everything."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

from dit_sparse.partials import owner

__all__ = ["FORKSERVER", "alive", "children", "left_by", "within"]

FORKSERVER = multiprocessing.get_context("forkserver")
"""Its server has imported everything when the first process is forked; starting Python takes seconds."""
FORKSERVER.set_forkserver_preload(["tests.parallel.cases"])


def children(parent: int) -> list[int]:
    """The processes that `parent` has started and that run, oldest first."""
    return sorted(pid for pid, (state, ppid) in _all().items() if ppid == parent and state != "Z")


def alive(pid: int) -> bool:
    """Whether a process runs."""
    return _all().get(pid, ("Z", 0))[0] != "Z"


def left_by(pid: int, name: str) -> str:
    """What a file `name` is called that the process `pid` of this machine has not finished."""
    return f".partial-{owner().split('-')[0]}-{pid}-0a1b2c-{name}"


def _all() -> dict[int, tuple[str, int]]:
    """State and parent by process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        found[int(stat.parent.name)] = (state, int(parent))
    return found


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    """Whether something happens in time."""
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
