"""`safe_remainder`: where a few keys hold a block's mass its mean says little, and no remainder may be worse than none.

Every case is tried at all densities and choices of blocks at once, each in a head of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dit_sparse import safe_remainder, safety, sparse_attention
from dit_sparse.kernels import remainder
from dit_sparse.types import REMAINDERS, AttentionPlan, Remainder, TokenOrder
from tests.kernels import cases

DENSITIES = (0.0625, 0.125, 0.25, 0.5, 0.75)
CHOICES = ("mass", "pooled", "random")
SEEDS = 2
NEEDLE = 64  # one key in so many
# Tokens, block, channels. In the first one all queries are tried, in the others some.
SHAPES = [(512, 32, 32), (2048, 64, 64), (2048, 32, 128), (2048, 128, 64)]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Draws:
    """Random numbers for one sequence, in float64."""

    tokens: int
    block: int
    dim: int
    generator: torch.Generator

    def randn(self, channels: int | None = None) -> Tensor:
        return torch.randn(self.tokens, channels or self.dim, generator=self.generator).double()

    def rand(self, channels: int | None = None) -> Tensor:
        return torch.rand(self.tokens, channels or self.dim, generator=self.generator).double()

    def signs(self) -> Tensor:
        return (self.rand(1) < 0.5).double() * 2 - 1

    def direction(self) -> Tensor:
        return self.randn()[:1]

    def centres(self) -> Tensor:
        """What the tokens of a block have in common."""
        return self.randn()[: self.tokens // self.block].repeat_interleave(self.block, 0)

    def rotated(self, x: Tensor) -> Tensor:
        """`x` after a rotary embedding of its positions."""
        half = self.dim // 2
        angle = torch.arange(self.tokens).double()[:, None] * 100.0 ** (-torch.arange(half).double() / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 1)


def heavy_elements(d: Draws) -> Inputs:
    """Keys of a Student distribution with two degrees of freedom."""
    return 1.5 * d.randn(), d.randn() / d.rand().sqrt(), d.randn()


def heavy_tokens(d: Draws) -> Inputs:
    """Keys and queries whose lengths have a Pareto tail."""
    return d.randn() * d.rand(1) ** -0.5, d.randn() * d.rand(1) ** -0.7, d.randn()


def needles(d: Draws) -> Inputs:
    """A key in 64 is forty times as long as the others."""
    k = 0.3 * d.randn()
    k[::NEEDLE] *= 40
    return d.randn(), k, d.randn()


def outlier_channels(d: Draws) -> Inputs:
    """Two channels of the keys are twenty times as large."""
    k = d.randn()
    k[:, :2] *= 20
    return d.randn(), k, d.randn()


def outlier_channels_of_both(d: Draws) -> Inputs:
    q, k = d.randn(), d.randn()
    q[:, :2] *= 8
    k[:, :2] *= 8
    return q, k, d.randn()


def outlier_channels_of_every_other_query(d: Draws) -> Inputs:
    """A mean over the block's queries stands neither for those that see the channels nor for those that do not."""
    q, k = d.randn(), d.randn()
    k[:, :2] *= 20
    q[::2, :2] *= 0.05
    return q, k, d.randn()


def clusters_with_outliers(d: Draws) -> Inputs:
    """Blocks of like keys and values, as neighbours in space are, and a long key here and there."""
    k = 1.5 * d.centres() + 0.5 * d.randn()
    k[5::61] *= 6
    return 1.5 * d.randn(), k, d.centres() + 0.5 * d.randn()


def sinks(d: Draws) -> Inputs:
    """A few keys that every query attends to, with small values."""
    towards = d.direction()
    k, v = d.centres() + 0.5 * d.randn(), d.randn()
    k[7::67] = 2.5 * towards
    v[7::67] *= 0.1
    return d.randn() + 0.5 * towards, k, v


def sinks_without_values(d: Draws) -> Inputs:
    towards = d.direction()
    k, v = d.centres() + 0.3 * d.randn(), d.randn()
    k[7::131], v[7::131] = 1.5 * towards, 0
    return 0.6 * d.randn() + towards, k, v


def along_directions(d: Draws, count: int, size: float, every: int = NEEDLE) -> Inputs:
    """A few keys lie far along directions in which the queries differ; random blocks sample such keys well."""
    q, k, v = d.randn(), 0.3 * d.randn(), d.randn()
    for i in range(count):
        towards, at = d.direction(), slice(8 * i, None, every)
        q = q + d.randn(1) * towards
        k[at], v[at] = size * towards, 3 * d.direction()
    return q, k, v


def along_one_direction(d: Draws) -> Inputs:
    return along_directions(d, 1, 3.0)


def along_two_directions(d: Draws) -> Inputs:
    return along_directions(d, 2, 3.0)


def along_four_directions(d: Draws) -> Inputs:
    return along_directions(d, 4, 3.0)


def a_little_along_one_direction(d: Draws) -> Inputs:
    return along_directions(d, 1, 1.2)


def along_one_direction_in_few_blocks(d: Draws) -> Inputs:
    return along_directions(d, 1, 3.0, 4 * d.block)


def an_eighth_along_one_direction(d: Draws) -> Inputs:
    towards, there = d.direction(), (d.rand(1) < 0.125).double()
    q = d.randn() + d.randn(1) * towards
    return q, 0.3 * d.randn() + 2 * there * towards, 0.5 * d.randn() + 3 * there * d.direction()


def pareto_along_one_direction(d: Draws) -> Inputs:
    towards, size = d.direction(), d.rand(1) ** -0.6
    k = 0.5 * d.randn() + 0.5 * size * d.signs() * towards
    return d.randn() + d.randn(1) * towards, k, d.randn() + size.clamp(max=4) * d.direction()


def clusters_and_needles_along_one_direction(d: Draws) -> Inputs:
    towards = d.direction()
    k, v = d.centres() + 0.4 * d.randn(), d.centres() + 0.4 * d.randn()
    k[::NEEDLE], v[::NEEDLE] = 2 * towards, 3 * d.direction()
    return d.centres() + 0.5 * d.randn() + d.randn(1) * towards, k, v


def queries_of_two_kinds(d: Draws) -> Inputs:
    """A query in 16 looks for the needles, the others for their clusters."""
    q, k, v = clusters(d)
    towards = d.direction()
    q[::16] += 1.5 * towards
    k[::NEEDLE], v[::NEEDLE] = 3 * towards, 3 * d.direction()
    return q, k, v


def query_blocks_of_two_kinds(d: Draws) -> Inputs:
    """Every other query block looks for the needles."""
    q, k, v = clusters(d)
    towards, there = d.direction(), (torch.arange(d.tokens) // d.block % 2)[:, None].double()
    k[::NEEDLE], v[::NEEDLE] = 3 * towards, 3 * d.direction()
    return q + there * d.randn(1) * towards, k, v


def two_modes(d: Draws) -> Inputs:
    towards, side = d.direction(), d.signs()
    return d.randn() + d.randn(1) * towards, 0.3 * d.randn() + side * towards, 0.5 * d.randn() + side * d.direction()


def two_modes_of_each_block(d: Draws) -> Inputs:
    side = d.signs()
    k = 0.5 * d.centres() + 0.3 * d.randn() + 1.5 * side * d.centres()
    return 1.5 * d.randn(), k, 0.5 * d.randn() + side * d.direction()


def needles_of_values(d: Draws) -> Inputs:
    v = d.randn()
    v[::NEEDLE] *= 40
    return d.randn(), d.randn(), v


def values_of_keys(d: Draws) -> Inputs:
    """All blocks alike, and values a linear map of the keys: all of the output is of first order."""
    k = d.randn()
    return d.randn(), k, k @ d.randn()[: d.dim] / d.dim**0.5


def rotated_needles(d: Draws) -> Inputs:
    """Channels that belong together, as rotary embeddings make them, and a longer key here and there."""
    common, k, v = d.direction(), 0.5 * d.randn(), d.randn()
    k += 0.8 * common
    k[::61] *= 5
    v[::61] = 2 * d.direction()
    return d.rotated(0.8 * common * d.randn(1) + 0.7 * d.randn()), d.rotated(k), v


def clusters(d: Draws) -> Inputs:
    """Blocks of like keys and values without outliers: what pooling is for."""
    return d.centres() + 0.5 * d.randn(), d.centres() + 0.4 * d.randn(), d.centres() + 0.4 * d.randn()


Make = Callable[[Draws], Inputs]
HEAVY: list[Make] = [
    heavy_elements,
    heavy_tokens,
    needles,
    outlier_channels,
    outlier_channels_of_both,
    outlier_channels_of_every_other_query,
    clusters_with_outliers,
    sinks,
    sinks_without_values,
    along_one_direction,
    along_two_directions,
    along_four_directions,
    a_little_along_one_direction,
    along_one_direction_in_few_blocks,
    an_eighth_along_one_direction,
    pareto_along_one_direction,
    clusters_and_needles_along_one_direction,
    queries_of_two_kinds,
    query_blocks_of_two_kinds,
    two_modes,
    two_modes_of_each_block,
    needles_of_values,
    values_of_keys,
    rotated_needles,
]


@dataclass(frozen=True)
class Case:
    """`q, k, v` `[seeds, heads, N, D]`, what is dense, and a plan that chooses otherwise for every head."""

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    plan: AttentionPlan

    def error(self, plan: AttentionPlan) -> Tensor:
        """`[seeds, heads]`, relative."""
        out = sparse_attention(self.q, self.k, self.v, plan)
        return (out - self.dense).flatten(2).norm(dim=2) / self.dense.flatten(2).norm(dim=2)


@functools.lru_cache(maxsize=2)
def drawn(make: Make, shape: tuple[int, int, int]) -> Case:
    tokens, block, dim = shape
    blocks = tokens // block
    inputs, denses, kept = [], [], []
    for seed in range(SEEDS):
        draws = Draws(tokens, block, dim, cases.generator(seed))
        q, k, v = make(draws)
        weights = (q @ k.T * dim**-0.5).softmax(-1)
        means = (x.view(blocks, block, dim).mean(1) for x in (q, k))
        scores = {
            "mass": weights.view(blocks, block, blocks, block).sum((1, 3)),
            "pooled": next(means) @ next(means).T,
            "random": torch.rand(blocks, blocks, generator=draws.generator).double(),
        }
        best = [scores[choice].argsort(1, descending=True).argsort(1) for choice in CHOICES]
        kept.append(torch.stack([rank < max(1, round(share * blocks)) for rank in best for share in DENSITIES]))
        inputs.append((q, k, v))
        denses.append(weights @ v)
    heads = len(CHOICES) * len(DENSITIES)
    q, k, v, dense = (torch.stack(x)[:, None].expand(-1, heads, -1, -1) for x in (*zip(*inputs, strict=True), denses))
    return Case(q, k, v, dense, cases.keeping(torch.stack(kept), [*range(0, tokens + 1, block)]))


def worst_ratio(make: Make, name: Remainder, shape: tuple[int, int, int] = SHAPES[0], *, tried: bool = True) -> float:
    """Error of a remainder over that of none, the largest of all choices and densities; errors count from 1e-3 on."""
    case = drawn(make, shape)
    plan = case.plan.with_remainder(name)
    if tried:
        plan = safe_remainder(case.q, case.k, case.v, plan)
    return float((case.error(plan) / case.error(case.plan).clamp(min=1e-3)).max())


@pytest.mark.parametrize("make", HEAVY, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", REMAINDERS[1:])
def test_no_remainder_is_worse_than_none(make: Make, name: Remainder) -> None:
    assert worst_ratio(make, name) <= 1.05
