"""How the tests of composition compare a sparse pipeline with the plain one that the same was done to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dit_sparse import AdaSpa, Schedule, sparsify
from dit_sparse.pipelines.families import adapter_for
from dit_sparse.types import Method
from tests.pipelines.families import METHODS, Family

HALF = METHODS[1]
"""AdaSpa at density 0.5: its plans depend on the data, so that a wrong step or branch shows."""

ALL_DENSE = Schedule(HALF, dense_layers=(0, 1))
"""Every call goes through the session and runs the model's own attention."""

EVERY_BLOCK = Schedule(AdaSpa(density=1, block=16), warmup=0)
"""Every call after the search is planned, and keeps every block."""


def is_close(got: Tensor, want: Tensor) -> bool:
    """Whether two runs differ by the rounding of another attention kernel only."""
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


def composed(
    family: Family, compose: Callable[[Any], None], method: Method | Schedule | None, *, compose_first: bool = True
) -> Any:
    """A tiny pipeline with `method`, or dense for `None`, on which `compose` was called before or after `sparsify`."""
    pipe = family.make()
    if compose_first:
        compose(pipe)
    if method is not None:
        sparsify(pipe, method)
    if not compose_first:
        compose(pipe)
    return pipe


def half_run(family: Family) -> Tensor:
    """A run with `HALF`, the same for all tests."""
    if family.name not in _half:
        _half[family.name] = family.run(sparsify(family.make(), HALF))
    return _half[family.name].clone()


_half: dict[str, Tensor] = {}


def count_calls(pipe: Any, run: Callable[[], Tensor]) -> int:
    """Self-attention calls of a dense `pipe` during `run`, counted at the projection that only they use."""
    calls = []
    modules = adapter_for(pipe).attention_modules(pipe.transformer).values()
    hooks = [module.norm_q.register_forward_hook(lambda *_: calls.append(1)) for module in modules]
    run()
    for hook in hooks:
        hook.remove()
    return len(calls)
