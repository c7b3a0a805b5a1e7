"""One run at a time in a folder: two would both find the same videos unfinished, and make every one twice."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path

from filelock import FileLock, Timeout

from dit_sparse.generate.request import Request
from dit_sparse.generate.run import check_folder

__all__ = ["hold"]

_PATIENCE = 0.5
"""Seconds to wait for a run that is about to end."""


@contextmanager
def hold(request: Request) -> Iterator[None]:
    """Hold the folder of `request`, which is made, for the run in this process; ranks and workers of it need not.

    The system's own lock on a file goes when the process ends, however it ends. A folder in which nothing was made is
    taken away again. Runs whose clips are settled, as those of VBench are, hold these alone: shards share a folder.

    Raises:
        ValueError: another process holds it (it is named), or it cannot be made or locked.
    """
    check_folder(request.out)
    folder = request.out.absolute()  # the process may go elsewhere
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / f".dit-sparse{_part(request)}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The fall-back would be a file that a crash leaves, and the manifest needs the system's locks anyway.
        lock = FileLock(path, timeout=_PATIENCE, fallback_to_soft=False)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"--out {str(request.out)!r} is in use by {_holder(path)}, which makes videos there: wait for its end, or "
            "use another folder"
        ) from None
    except OSError as error:
        if made:  # else the file may be another's
            _take_away(path, made)
        raise ValueError(
            f"--out {str(request.out)!r} cannot be locked by {path.name!r}: {error.strerror or error}"
        ) from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        # While it is held, so that nobody else's is removed; who waits for it finds it gone and takes a new one.
        _take_away(path, made)
        lock.release()


def _take_away(path: Path, made: list[Path]) -> None:
    """Remove the lock's file, and of the folders that were `made` for it those that are empty."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        for empty in made:
            empty.rmdir()


def _part(request: Request) -> str:
    if not request.clips:
        return ""
    return "-" + hashlib.sha256(json.dumps([astuple(clip) for clip in request.clips]).encode()).hexdigest()[:12]


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        text = ""
    return text.strip() or "another process"
