"""Predicts what sparse attention takes against dense attention: a sum of four terms with measured coefficients."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dit_sparse.cost.table import DeviceCosts, KernelCosts
from dit_sparse.types import Remainder


@dataclass(frozen=True)
class Call:
    """One sparse attention call, as far as its cost goes.

    Args:
        tokens, heads, dim: of q; heads are those of the whole batch.
        density: share of the query-key pairs in blocks that are kept whole.
        partial: share in blocks that a predicate cuts, whole blocks counted.
        block: tokens a block, the mean.
        backend: which kernel runs.
        remainder: of its plan.
        moved: whether tokens are moved into another order, and back.
        method: who plans.
        plans: plans a call; 0.1 where one plan serves ten calls.
    """

    tokens: int
    heads: int
    dim: int
    density: float
    block: float
    backend: str
    method: str
    plans: float
    partial: float = 0.0
    remainder: Remainder = "none"
    moved: bool = False


def predict(call: Call, costs: DeviceCosts) -> float:
    """Time of `call` over that of dense attention, its share of planning counted.

    With t the time of dense attention, `4 heads tokens^2 dim / flops`:

        (call + move x tokens heads dim) / t + kernel(block) (density + partial x cut)
            + remainder x 64 / block + plans x plan(method, tokens)

    `move` counts only where tokens are moved, and `partial x cut` is the share in blocks that are cut, weighed.

    Raises:
        ValueError: a backend that `costs` does not have.
    """
    if call.backend not in costs.backends:
        raise ValueError(f"backend must be one of {', '.join(costs.backends)}, got {call.backend!r}")
    own = costs.backends[call.backend]
    threads = torch.get_num_threads() / costs.threads if costs.threads else 1.0
    dense = 4 * call.heads * call.tokens**2 * call.dim / (costs.flops * threads)
    fixed = own.call + (own.move * call.tokens * call.heads * call.dim if call.moved else 0.0)
    work = at_block(own.kernel, call.block) * (call.density + own.partial * call.partial)
    remainder = _remainder(call.remainder, own, costs) * 64 / call.block
    return fixed / dense + work + remainder + call.plans * costs.plan(call.method, call.tokens)


def _remainder(name: Remainder, own: KernelCosts, costs: DeviceCosts) -> float:
    """What `own` has of it, or else what it costs the dearest other backend."""
    others = [kernel.remainder.get(name, 0.0) for kernel in costs.backends.values()]
    return own.remainder.get(name, max(others))


def at_block(kernel: Mapping[int, float], block: float) -> float:
    """`kernel` at `block` tokens: straight lines between the sizes it has, the last one's beyond, and below the first
    as much more as the block is smaller."""
    sizes = sorted(kernel)
    if block <= sizes[0]:
        return kernel[sizes[0]] * sizes[0] / block
    for low, high in itertools.pairwise(sizes):
        if block <= high:
            share = (block - low) / (high - low)
            return kernel[low] * (1 - share) + kernel[high] * share
    return kernel[sizes[-1]]
