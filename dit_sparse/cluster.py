"""Calls spread over the workers of a Ray cluster: one item at a time to whoever is free, lost workers replaced."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

__all__ = ["ActorPool", "NoWorkers", "WorkerLost", "connect", "map_over_actors", "portable"]

_REACH_SECONDS = 30
_START_SECONDS = 300
_CORES_A_WORKER = 4
_OBJECT_STORE_BYTES = 128 * 2**20
"""What workers return is small, and Ray's own default takes a third of the memory."""


class WorkerLost(RuntimeError):
    """Every worker that was given an item died of it."""


class NoWorkers(RuntimeError):
    """No worker can be started, or each dies while it starts."""


def connect(address: str = "auto") -> bool:
    """Connect to a Ray cluster.

    Args:
        address: "host:port" of a running cluster; "local" starts one on this machine, which ends with this process;
            "auto" takes the running one (`RAY_ADDRESS`, or found on this machine) or starts one.

    Returns:
        Whether this call connected, so that `ray.shutdown()` is the caller's to do; a process that is connected
        already stays so.

    Raises:
        ValueError: no ray, or no cluster at `address`.
    """
    # Ray reads it when it starts; nothing is sent home unless somebody asked for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'dit-sparse[ray]'") from None
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address not in ("auto", "local"):
        _reach(address)
    try:
        if address != "local":
            ray.init(address=address, **quiet)
            return True
    except ConnectionError:
        if address != "auto":
            raise ValueError(f"--ray {address}: no Ray cluster answers there") from None
    except RuntimeError as error:  # another version of Ray or Python there
        raise ValueError(f"--ray {address}: {error}") from None
    ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    return True


class ActorPool:
    """Actors that each hold an object of `make(device)`, on a cluster that `connect` has connected to.

    Args:
        make: called once in every worker; it must pickle, as must all that goes to its object and comes back.
        device: "cpu"; "cuda" gives every worker a GPU of its own; "auto" does where the cluster has any.
        workers: how many; `None` is one for every GPU, or for every four cores where GPUs are not used.
        retries: how often an item is tried again whose worker died, and a worker that died before it had an item.

    Attributes:
        device: "cpu" or "cuda".
        workers: how many at most.

    Raises:
        ValueError: a device that the cluster does not have, or more workers than it has GPUs.
    """

    def __init__(
        self, make: Callable[[str], Any], *, device: str = "auto", workers: int | None = None, retries: int = 2
    ) -> None:
        import ray

        have = ray.cluster_resources()
        self.device = _device(device, have)
        self.workers, resources = _shares(self.device, workers, have)
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
        self, method: str, items: Sequence[tuple[Any, ...]], lost: Callable[[int, int], None] = lambda *_: None
    ) -> Iterator[tuple[int, Any]]:
        """Call `method` with each of `items`, tuples of arguments, and give `(index, result)` as they get ready.

        Args:
            lost: told the item's index and the number of tries so far, when a worker died and the item is tried again.

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
            done, answer = self._next()
            if done is None:
                continue
            tries[done] += 1
            if answer is None and tries[done] <= self._retries:
                queue.appendleft(done)
                lost(done, tries[done])
                continue
            missing -= 1
            yield done, WorkerLost(f"{tries[done]} workers died of it") if answer is None else answer.value

    def close(self) -> None:
        """End all workers."""
        import ray

        for actor in {*self._idle, *(actor for actor, _ in self._running.values())}:
            ray.kill(actor)
        self._idle, self._running = [], {}

    def _start(self) -> None:
        actor = self._remote.remote()
        self._running[actor.start.remote(self._make, os.getcwd())] = (actor, None)

    def _next(self) -> tuple[int | None, _Answer | None]:
        """The item that a worker is done with, and its answer, `None` where it died; no item where it has started."""
        import ray

        working = any(index is not None for _, index in self._running.values())
        ready, _ = ray.wait(list(self._running), timeout=None if working else _START_SECONDS)
        if not ready:
            raise NoWorkers(f"no worker could start in {_START_SECONDS} s; free are {ray.available_resources()}")
        actor, index = self._running.pop(ready[0])
        try:
            answer: _Answer | None = ray.get(ready[0])
        except ray.exceptions.RayActorError:
            answer = None
        if answer is not None and (index is not None or answer.value is None):
            self._idle.append(actor)
        else:
            # One that is only out of reach must not go on beside its replacement.
            ray.kill(actor)
        if index is None:
            self._count_start(answer)
        return index, answer

    def _count_start(self, answer: _Answer | None) -> None:
        if answer is None:
            self._early_deaths += 1
            if self._early_deaths > self._retries:
                raise NoWorkers(f"{self._early_deaths} workers died while they started (out of memory?)")
        elif answer.value is None:
            self._early_deaths, self._any_started = 0, True
        elif self._any_started and self.workers > 1:
            self.workers -= 1
            warnings.warn(f"a worker could not start and is left out: {answer.value}", stacklevel=3)
        else:
            raise answer.value


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


def _reach(address: str) -> None:
    """Make sure that a cluster answers at `address`; by itself Ray tries for minutes.

    Raises:
        ValueError: none does.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"--ray must be auto, local or HOST:PORT of a cluster, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
        answered = subprocess.run(command, capture_output=True, timeout=_REACH_SECONDS, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        answered = False
    if not answered:
        raise ValueError(f"--ray {address}: no Ray cluster answers there (`ray start --head` starts one)")


def _device(device: str, have: Mapping[str, float]) -> str:
    gpus = have.get("GPU", 0)
    if device == "auto":
        return "cuda" if gpus >= 1 else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda with --ray, which chooses the GPU; got {device!r}")
    if device == "cuda" and gpus < 1:
        raise ValueError("--device cuda: the Ray cluster has no GPU; use --device cpu, or add nodes with GPUs")
    return device


def _shares(device: str, workers: int | None, have: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """How many workers, and what Ray gives each of them."""
    cores, gpus = have.get("CPU", 0), int(have.get("GPU", 0))
    if workers is not None and workers < 1:
        raise ValueError(f"--ray-workers must be at least 1, got {workers}")
    if device == "cuda":
        if workers is not None and workers > gpus:
            raise ValueError(f"--ray-workers must be at most {gpus}, the GPUs of the cluster, got {workers}")
        return workers or gpus, {"num_gpus": 1, "num_cpus": min(1, cores / gpus)}
    workers = workers or max(1, int(cores / _CORES_A_WORKER))
    share = cores / workers
    # Ray takes fractions below one core and whole numbers above; it sets the worker's threads by it.
    return workers, {"num_cpus": int(share) if share >= 1 else int(share * 1000) / 1000}
