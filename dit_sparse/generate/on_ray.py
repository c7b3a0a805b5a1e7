"""Renders the videos of a request on the workers of a Ray cluster."""

from __future__ import annotations

import secrets
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from dit_sparse.cluster import ActorPool, WorkerLost, connect, portable
from dit_sparse.generate.group import RankGroup
from dit_sparse.generate.listener import Listener
from dit_sparse.generate.render import Failed, Rendered, Renderer, partial_name
from dit_sparse.generate.request import Clip, Degrees, Request, Settings
from dit_sparse.partials import owner_of, partial_path, remove_own_partials

__all__ = ["RayExecutor"]


class RayExecutor:
    """An `Executor` whose workers each load the model once; a context manager, which ends them.

    With `request.parallel` a worker is that many ranks of one node, each of which loads the model.
    The workers write the videos, so all nodes must share the working directory and the output folder.

    Args:
        address: of the cluster, as `connect` takes it.
        workers, retries: as `ActorPool` takes them.

    Raises:
        ValueError: no ray, no such cluster, or devices that it does not have.
    """

    def __init__(self, request: Request, address: str = "auto", workers: int | None = None, retries: int = 2) -> None:
        self._folder = request.out
        self._connected = connect(address)
        try:
            ranks = 1 if request.parallel is None else Degrees.of(request.parallel).ranks
            make = partial(_start_worker if ranks == 1 else _Group, _Worker, request)
            self._pool = ActorPool(make, device=request.device, workers=workers, ranks=ranks, retries=retries)
        except BaseException:
            self._disconnect()
            raise
        self.device = self._pool.device
        self.workers = self._pool.workers

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.close()
        self._disconnect()
        remove_own_partials(self._folder)

    def defaults(self) -> dict[str, Any]:
        """See `Executor.defaults`."""
        return self._pool.call("defaults")

    def check(self, settings: Settings) -> None:
        """See `Executor.check`."""
        self._pool.call("check", settings)

    def render(self, settings: Settings, clips: Sequence[Clip], listener: Listener) -> Iterator[Rendered | Failed]:
        """See `Executor.render`."""
        # Whoever does not see this file writes to a folder of its own.
        sign = partial_path(self._folder / "shared")
        sign.touch()

        def again(index: int, tries: int, how: str) -> None:
            text = f"a worker died while it made {clips[index].stem} (try {tries}: {how}); another takes over"
            warnings.warn(text, stacklevel=2)

        items = [(settings, clip, sign) for clip in clips]
        for index, result in self._pool.map("render", items, again):
            if isinstance(result, WorkerLost):
                yield Failed(clips[index], result)
                continue
            if isinstance(result, Exception):
                raise result
            rendered, texts = result
            for text in texts:
                warnings.warn(text, stacklevel=2)
            yield rendered

    def _disconnect(self) -> None:
        import ray

        if self._connected:
            ray.shutdown()


class _Worker:
    """What an actor, or rank 0 of its group, holds."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.defaults = renderer.defaults
        self.check = renderer.check
        # A node without the model is found out now, not by every prompt that it gets.
        renderer.load()

    def render(self, settings: Settings, clip: Clip, sign: Path) -> tuple[Rendered | Failed, list[str]]:
        """The rendered clip, and the warnings for users that it gave."""
        if not sign.exists():
            raise OSError(f"{socket.gethostname()} does not share the folder; all nodes must see the same one")
        # A worker that is taken for dead may still write, so each try has a name of its own.
        writer = f"{owner_of(sign)}-{secrets.token_hex(4)}"
        target = partial_path(sign.parent / partial_name(settings, clip), writer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            result = self._renderer.render(settings, clip, target, Listener())
        if isinstance(result, Failed):
            result = Failed(clip, portable(result.error))
        return result, [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def _start_worker(kind: type[_Worker], request: Request, device: str) -> _Worker:
    return kind(Renderer(replace(request, device=device)))


class _Group:
    """What an actor of several ranks holds; it calls the worker of rank 0."""

    def __init__(self, kind: type[_Worker], request: Request, device: str) -> None:
        call = RankGroup(replace(request, device=device), kind).call
        self.defaults = partial(call, "defaults")
        self.check = partial(call, "check")
        self.render = partial(call, "render")
