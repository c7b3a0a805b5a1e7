"""Calls spread over Ray actors: one item at a time to whoever is free, lost workers replaced."""

from __future__ import annotations

import os
import pickle
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from dit_sparse.cluster.connection import connect
from dit_sparse.cluster.shares import choose_device, shares

__all__ = ["ActorPool", "NoWorkers", "WorkerLost", "map_over_actors", "portable"]

_START_SECONDS = 300


class WorkerLost(RuntimeError):
    """A worker is gone, or was every time that it was given an item.

    An object that a worker holds raises it when it can do no more, for example because a process of its own has died:
    the worker is then replaced like one that died itself.
    """


class NoWorkers(RuntimeError):
    """No worker can be started, or each dies while it starts."""


class ActorPool:
    """Actors that each hold an object of `make(device)`, on a cluster that `connect` has connected to.

    Args:
        make: called once in every worker; it must pickle, as must all that goes to its object and comes back.
        device: "cpu"; "cuda" gives every worker GPUs of its own; "auto" does where the cluster has any.
        workers: how many; `None` is as many as have a GPU for each rank, or four cores where GPUs are not used.
        ranks: GPUs of a worker, all of one node, or how many share its cores.
        retries: how often an item is tried again whose worker died, and a worker that died before it had an item.

    Attributes:
        device: "cpu" or "cuda".
        workers: how many at most.

    Raises:
        ValueError: a device that the cluster does not have, or more workers than it has GPUs for.
    """

    def __init__(
        self,
        make: Callable[[str], Any],
        *,
        device: str = "auto",
        workers: int | None = None,
        ranks: int = 1,
        retries: int = 2,
    ) -> None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.device = choose_device(device, nodes)
        self.workers, resources = shares(self.device, workers, nodes, ranks)
        self._retries = retries
        self._make = partial(make, self.device)
        self._remote: Any = ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, **resources)
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int | None]] = {}
        self._early_deaths, self._any_started = 0, False

    def __enter__(self) -> ActorPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """What `method` of one worker's object returns; what it raises is raised here."""
        ((_, result),) = self.map(method, [arguments])
        if isinstance(result, Exception):
            raise result
        return result

    def map(
        self, method: str, items: Sequence[tuple[Any, ...]], lost: Callable[[int, int, str], None] = lambda *_: None
    ) -> Iterator[tuple[int, Any]]:
        """Call `method` with each of `items`, tuples of arguments, and give `(index, result)` as they get ready.

        Args:
            lost: told the item's index, how often it was tried and how its worker was lost, before it is tried again.

        Returns:
            Results are values, the exceptions that the calls raised, or `WorkerLost`.

        Raises:
            NoWorkers: there are none.
            Exception: what `make` raised in the first worker; later ones that cannot start are left out with a warning.
        """
        queue, tries = deque(range(len(items))), Counter[int]()
        missing = len(items)
        while missing:
            while len(self._idle) + len(self._running) < min(self.workers, missing):
                self._start()
            while queue and self._idle:
                index, actor = queue.popleft(), self._idle.pop()
                self._running[actor.call.remote(method, items[index])] = (actor, index)
            done, result = self._next()
            if done is None:
                continue
            tries[done] += 1
            if isinstance(result, WorkerLost):
                if tries[done] <= self._retries:
                    queue.appendleft(done)
                    lost(done, tries[done], str(result))
                    continue
                result = WorkerLost(f"{tries[done]} workers died of it: {result}")
            missing -= 1
            yield done, result

    def close(self) -> None:
        """End all workers."""
        import ray

        for actor in {*self._idle, *(actor for actor, _ in self._running.values())}:
            ray.kill(actor)
        self._idle, self._running = [], {}

    def _start(self) -> None:
        actor = self._remote.remote()
        self._running[actor.start.remote(self._make, os.getcwd())] = (actor, None)

    def _next(self) -> tuple[int | None, Any]:
        """The item that a worker is done with, and what came of it; no item where a worker has started."""
        import ray

        working = any(index is not None for _, index in self._running.values())
        ready, _ = ray.wait(list(self._running), timeout=None if working else _START_SECONDS)
        if not ready:
            raise NoWorkers(f"no worker could start in {_START_SECONDS} s; free are {ray.available_resources()}")
        actor, index = self._running.pop(ready[0])
        try:
            result = ray.get(ready[0]).value
        except ray.exceptions.RayActorError:
            result = WorkerLost("its process is gone")
        if isinstance(result, WorkerLost) or (index is None and result is not None):
            # One that is only out of reach must not go on beside its replacement.
            ray.kill(actor)
        else:
            self._idle.append(actor)
        if index is None:
            self._count_start(result)
        return index, result

    def _count_start(self, error: Exception | None) -> None:
        if error is None:
            self._early_deaths, self._any_started = 0, True
        elif isinstance(error, WorkerLost):
            self._early_deaths += 1
            if self._early_deaths > self._retries:
                raise NoWorkers(f"{self._early_deaths} workers died while they started (out of memory?): {error}")
        elif self._any_started and self.workers > 1:
            self.workers -= 1
            warnings.warn(f"a worker could not start and is left out: {error}", stacklevel=3)
        else:
            raise error


def map_over_actors(
    function: Callable[[Any], Any], items: Sequence[Any], *, address: str = "auto", **options: Any
) -> Iterator[tuple[int, Any]]:
    """`(index, function(item))` of all `items` as they get ready, over the cluster at `address`.

    Args:
        options: of `ActorPool`.

    Returns:
        As `ActorPool.map`.
    """
    import ray

    connected = connect(address)
    try:
        with ActorPool(_Caller(function), **options) as pool:
            yield from pool.map("call", [(item,) for item in items])
    finally:
        if connected:
            ray.shutdown()


def portable(error: Exception) -> Exception:
    """`error`, or a `RuntimeError` that says the same where it cannot go from one process to another."""
    try:
        pickle.loads(pickle.dumps(error))
    # An exception's own reconstruction can fail in any way.
    except Exception:  # noqa: BLE001
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Answer:
    """What a call gave; an exception is the value, so that it arrives as it was raised."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Actor:
    """Holds the worker's object; it is no more than a class until Ray makes an actor of it."""

    def start(self, make: Callable[[], Any], folder: str) -> _Answer:
        try:
            _enter(folder)
            self._object = make()
        except Exception as error:  # noqa: BLE001
            return _Answer(portable(error.with_traceback(None)))
        return _Answer(None)

    def call(self, method: str, arguments: tuple[Any, ...]) -> _Answer:
        try:
            return _Answer(getattr(self._object, method)(*arguments))
        except Exception as error:  # noqa: BLE001
            return _Answer(portable(error.with_traceback(None)))


class _Caller:
    """Makes objects whose `call` is a function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.call = function

    def __call__(self, device: str) -> _Caller:
        return self


def _enter(folder: str) -> None:
    """Make relative paths mean the same as in the process that started the worker."""
    try:
        os.chdir(folder)
    except OSError as error:
        reason = f"{folder} is not to be reached on {socket.gethostname()} ({error.strerror})"
        raise OSError(f"{reason}; all nodes must share the working directory") from None
