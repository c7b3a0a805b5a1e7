"""One request on several ranks that share each video: rank 0 runs it and writes, the others follow.

Rank 0 renders like any other process, but tells its followers what it is about to do; so what is left to do, names and
the manifest are decided in one place, and only rank 0 need see the folder.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from dit_sparse.generate import models
from dit_sparse.generate.listener import Listener
from dit_sparse.generate.render import Drawn, Failed, Renderer
from dit_sparse.generate.request import Clip, Degrees, Request, Settings
from dit_sparse.lost_ranks import RankLostError

if TYPE_CHECKING:
    from torch.distributed import Store

    from dit_sparse.parallel import Agreement

__all__ = ["Leader", "Ranks", "become_rank", "follow", "is_rank", "join", "launch"]

_PATIENCE = 3600.0
"""Seconds that a follower waits to be told what to do: rank 0 may be loading a model or writing a long video."""
_GRACE = 60.0
"""Seconds that a rank which failed waits for the others to fail too."""
_FAREWELL = 10.0
_UNLIKE = "rank {} failed and others did not, so they no longer fit together: {}"


def is_rank() -> bool:
    """Whether this process was started as one of several, by torchrun or by `launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def become_rank(rank: int, count: int) -> None:
    """Say in the environment that this process is `rank` of `count`, all of this machine."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}


def join(request: Request, store: Store | None = None) -> Ranks:
    """Join the ranks that render `request` together.

    Args:
        store: where they meet; `None` is what the environment says.

    Raises:
        ValueError: another number of ranks than the request asks for, or no GPU for this one.
        RankLostError: the others do not join.
    """
    import torch
    import torch.distributed as dist

    degrees = _degrees(request)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    if count != degrees.ranks:
        raise ValueError(f"--parallel {request.parallel} is for {degrees.ranks} ranks, got {count} from torchrun")
    on_gpu = models.resolve_device(request.device) != "cpu"
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ValueError(f"--parallel needs a GPU a rank, got rank {local} of {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    if not dist.is_initialized():
        backend, wait = "nccl" if on_gpu else "gloo", timedelta(seconds=degrees.timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=wait)
    return Ranks(degrees)


@dataclass(frozen=True)
class _Order:
    """What followers are told to do: the name of a method of `Renderer`, and what it is given."""

    name: str
    arguments: tuple[Any, ...] = ()


class Ranks:
    """The ranks of one request, and how they talk."""

    def __init__(self, degrees: Degrees) -> None:
        import torch.distributed as dist

        from dit_sparse.parallel import Agreement

        self.rank = dist.get_rank()
        everyone = range(dist.get_world_size())
        self._orders: Agreement = Agreement(everyone, _PATIENCE)
        # Ranks render in step, so one that fails waits no longer than this for others that do.
        self._results: Agreement = Agreement(everyone, min(degrees.timeout, _GRACE))

    def tell(self, order: _Order | None) -> _Order | None:
        """Rank 0's `order`, on every rank; `None` is the end."""
        return self._orders.gather("waiting for rank 0", order)[0]

    def leave(self) -> None:
        """Part from the others, who do so too."""
        import torch.distributed as dist

        dist.destroy_process_group()

    def compare(self, error: Exception | None, *, drawing: bool) -> None:
        """After an order: return if it went alike on all ranks, well or not.

        Args:
            error: what went wrong on this rank, if anything.
            drawing: whether ranks went in step; else, as when a model is loaded, some may take much longer.

        Raises:
            RankLostError: it failed on some ranks alone, or one does not answer.
        """
        if isinstance(error, RankLostError):
            raise error
        said = None if error is None else f"{type(error).__name__}: {error}"
        try:
            told = (self._results if drawing else self._orders).gather("comparing how it went", said)
        except RankLostError:
            if error is None:
                raise
            raise RankLostError(_UNLIKE.format(self.rank, said)) from error
        failed = {rank: text for rank, text in enumerate(told) if text is not None}
        if failed and len(failed) < len(told):
            raise RankLostError(_UNLIKE.format(*next(iter(failed.items()))))


class Leader(Renderer):
    """The renderer of rank 0: what it does, its followers do too.

    Raises:
        RankLostError: everywhere, where a rank died, or failed where others did not.
    """

    def __init__(self, request: Request, ranks: Ranks) -> None:
        super().__init__(request)
        self._ranks = ranks

    def load(self) -> None:
        """See `Renderer.load`."""
        self._together(_Order("load"), super().load)

    def defaults(self) -> dict[str, Any]:
        """See `Executor.defaults`."""
        defaults: dict[str, Any] = self._together(_Order("defaults"), super().defaults)
        return defaults

    def check(self, settings: Settings) -> None:
        """See `Executor.check`."""
        self._together(_Order("check", (settings,)), partial(super().check, settings))

    def draw(self, settings: Settings, clip: Clip, listener: Listener) -> Drawn | Failed:
        """See `Renderer.draw`."""
        self._ranks.tell(_Order("draw", (settings, clip)))
        drawn = super().draw(settings, clip, listener)
        self._ranks.compare(drawn.error if isinstance(drawn, Failed) else None, drawing=True)
        return drawn

    def _together(self, order: _Order, do: Callable[[], Any]) -> Any:
        self._ranks.tell(order)
        error: Exception | None = None
        try:
            return do()
        except Exception as caught:
            error = caught
            raise
        finally:
            self._ranks.compare(error, drawing=False)

    def stop(self) -> None:
        """Let the followers go."""
        self._ranks.tell(None)


def follow(request: Request, ranks: Ranks) -> None:
    """Do what rank 0 does until it ends; nothing is written.

    Raises:
        RankLostError: a rank died, or failed where others did not.
    """
    renderer = Renderer(request)
    while (order := ranks.tell(None)) is not None:
        error: Exception | None = None
        try:
            if order.name == "draw":
                settings, clip = order.arguments
                result = renderer.draw(settings, clip, Listener())
                error = result.error if isinstance(result, Failed) else None
            else:
                getattr(renderer, order.name)(*order.arguments)
        # What it is does not matter here: if it is the same on rank 0, that says it.
        except Exception as caught:  # noqa: BLE001
            error = caught
        ranks.compare(error, drawing=order.name == "draw")


def launch(request: Request, work: Callable[[Request], int]) -> int:
    """Start the ranks of `request` on this machine, each of which runs `work`; returns rank 0's exit code.

    When a rank dies the others are ended.

    Args:
        work: called with `request` in a process of its own, in which `is_rank()`; returns an exit code. It must pickle.

    Raises:
        ValueError: fewer GPUs than ranks, or a device with a number.
        RankLostError: a rank was killed.
    """
    import torch
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    count, device = _degrees(request).ranks, models.resolve_device(request.device)
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device must be auto, cpu or cuda with --parallel, which takes the first GPUs, got {device}"
        )
    if device == "cuda" and torch.cuda.device_count() < count:
        raise ValueError(
            f"--parallel {request.parallel} needs {count} GPUs, got {torch.cuda.device_count()}; or --device cpu"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawned = start_processes(_run_rank, (count, port, request, work), count, join=False, start_method="spawn")
    try:
        while not spawned.join():
            pass
    except KeyboardInterrupt:
        # From a terminal they were interrupted too, and put things in order.
        for process in spawned.processes:
            process.join(_FAREWELL)
            process.terminate()
        raise
    except ProcessExitedException as error:
        if error.signal_name is None:
            return int(error.exit_code)
        raise RankLostError(
            f"rank {error.error_index} was killed by {error.signal_name}; the others were ended, and the same command "
            "goes on from the last finished video"
        ) from None
    return 0


def _run_rank(rank: int, count: int, port: int, request: Request, work: Callable[[Request], int]) -> None:
    """One process of `launch`; its exit code tells how it went."""
    become_rank(rank, count)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.exit(work(request))


def _degrees(request: Request) -> Degrees:
    assert request.parallel is not None
    return Degrees.of(request.parallel)
