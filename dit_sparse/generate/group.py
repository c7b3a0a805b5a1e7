"""Ranks that live as long as the process that started them, such as a worker of Ray, and do what it asks for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from dit_sparse.cluster import WorkerLost, portable
from dit_sparse.generate.ranks import Leader, become_rank, follow, join
from dit_sparse.generate.render import Renderer
from dit_sparse.generate.request import Degrees, Request
from dit_sparse.lost_ranks import RankLostError

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["RankGroup"]

_GRACE = 1.0
"""Seconds until a rank that has closed its pipe has ended, too."""


class RankGroup:
    """The ranks of `request`, each a process of this machine with a GPU of its own, or on the CPU.

    The first GPUs that this process sees are theirs, and its threads are divided among them. They end with this
    process, however that ends.

    Args:
        request: with `parallel`, and "cpu" or "cuda" as its device.
        make: called in rank 0 with its renderer, which the others follow; what it returns takes the calls. It must
            pickle, as must all that goes there and comes back.

    Raises:
        WorkerLost: a rank died, or failed where others did not.
        Exception: what `make` raised.
    """

    def __init__(self, request: Request, make: Callable[[Renderer], Any]) -> None:
        assert request.parallel is not None
        count = Degrees.of(request.parallel).ranks
        # A forked process could not use CUDA.
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_run_rank, args=(rank, count, theirs, request, make), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
        self._sentinels = [process.sentinel for process in self._processes]
        for _, theirs in pairs:
            theirs.close()
        try:
            port = self._answer()
            for pipe in self._pipes[1:]:
                _send(pipe, _Answer(port))
            self._answer()
        except BaseException:
            self.stop()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """What `method` of rank 0's object returns; what it raises is raised here.

        Raises:
            WorkerLost: as above; the other ranks are then ended.
        """
        _send(self._pipes[0], (method, arguments))
        return self._answer()

    def stop(self) -> None:
        """End all ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _answer(self) -> Any:
        """What rank 0 sends, or what any rank has failed with."""
        ready = wait([*self._pipes, *self._sentinels])
        answer: Any = None
        # A rank that is gone without a word has a pipe that is ready and empty, or will have one soon.
        with suppress(EOFError, OSError, StopIteration):
            answer = next(pipe for pipe in self._pipes if pipe in ready).recv()
        if answer is None or isinstance(answer, RankLostError):
            reason = self._killed() or str(answer or "a rank has ended")
            self.stop()
            raise WorkerLost(reason)
        if isinstance(answer, Exception):
            raise answer
        return answer.value

    def _killed(self) -> str | None:
        """Which rank was killed and how, if one was."""
        ended = wait(self._sentinels, _GRACE)
        for rank, process in enumerate(self._processes):
            if process.sentinel in ended:
                process.join()
                if process.exitcode is not None and process.exitcode < 0:
                    return f"rank {rank} was killed by {signal.Signals(-process.exitcode).name}"
        return None


@dataclass(frozen=True)
class _Answer:
    value: Any


def _send(pipe: Connection, what: Any) -> None:
    # That nobody is there to take it shows when an answer is awaited.
    with suppress(OSError):
        pipe.send(what)


def _run_rank(rank: int, count: int, pipe: Connection, request: Request, make: Callable[[Renderer], Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _serve(rank, count, pipe, request, make)
    except Exception as error:  # noqa: BLE001  # whatever it is, the group fails with it
        pipe.send(portable(error))


def _serve(rank: int, count: int, pipe: Connection, request: Request, make: Callable[[Renderer], Any]) -> None:
    import torch

    become_rank(rank, count)
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    together = join(request, _meeting_place(rank, pipe))
    if rank > 0:
        follow(request, together)
        return
    served = make(Leader(request, together))
    pipe.send(_Answer(None))
    while True:
        method, arguments = pipe.recv()
        try:
            pipe.send(_Answer(getattr(served, method)(*arguments)))
        except RankLostError:
            raise
        except Exception as error:  # noqa: BLE001  # it is the caller's
            pipe.send(portable(error))


def _meeting_place(rank: int, pipe: Connection) -> Store:
    """Rank 0's store, at a port that the system chooses while it is opened, so that no two groups have the same."""
    from torch.distributed import TCPStore

    if rank > 0:
        return TCPStore("127.0.0.1", pipe.recv().value, is_master=False)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(_Answer(store.port))
    return store


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # Whatever this rank is in the middle of, nobody wants it any more.
    os._exit(1)
