"""Processes that work as ranks of torch.distributed on the CPU; started once for many cases."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import FORKSERVER

TIMEOUT = 20.0
"""Seconds that a collective may take."""


class Ranks:
    """`count` ranks that run functions together.

    Args:
        count: processes.
        timeout: seconds that a collective may take.
    """

    def __init__(self, count: int, timeout: float = TIMEOUT) -> None:
        folder = tempfile.TemporaryDirectory()
        self._folder = folder
        pairs = [FORKSERVER.Pipe() for _ in range(count)]
        self.processes = [
            FORKSERVER.Process(target=_serve, args=(rank, count, str(Path(folder.name) / "store"), theirs, timeout))
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        self._pipes = [ours for ours, _ in pairs]
        for _, theirs in pairs:
            theirs.close()

    def run(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> list[Any]:
        """What `function` returns on each rank; an exception is returned, and so is the code of a rank that died."""
        for pipe in self._pipes:
            pipe.send((function, args, options))
        return [self._result(pipe, process) for pipe, process in zip(self._pipes, self.processes, strict=True)]

    def _result(self, pipe: Connection, process: Any) -> Any:
        if not wait([pipe, process.sentinel], timeout=120):
            raise TimeoutError(f"{process.name} gave no answer: it hangs")
        try:
            return pipe.recv()
        except EOFError:
            process.join(10)
            return process.exitcode

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, count: int, store: str, pipe: Connection, timeout: float) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    wait = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=wait)
    while True:
        try:
            function, args, options = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            result = function(*args, **options)
        except Exception as error:  # noqa: BLE001  # whatever it is, the test wants to see it
            error.__notes__ = [traceback.format_exc()]
            result = error
        pipe.send(result)
