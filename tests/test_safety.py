"""`safe_remainder`: where a few keys hold a block's mass its mean says little, and no remainder may be worse than none.

Every case is tried at all densities and choices of blocks at once, each in a head of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse import safe_remainder, safety, sparse_attention
from dit_sparse.kernels import remainder
from dit_sparse.types import REMAINDERS, AttentionPlan, Remainder, TokenOrder
from tests.kernels import cases
from tests.kernels.test_remainder import literal

DENSITIES = (0.0625, 0.125, 0.25, 0.5, 0.75)
CHOICES = ("mass", "pooled", "random")
NEEDLE = 64  # one key in so many
# Tokens, block, channels: half of the queries are tried, or an eighth of them or less and not in all blocks.
SMALL = 512, 32, 32
LARGE = [(2048, 32, 128), (2048, 128, 64)]
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
    """`q, k, v` `[1, heads, N, D]`, what is dense, and a plan that chooses otherwise for every head."""

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    plan: AttentionPlan

    def error(self, plan: AttentionPlan) -> Tensor:
        """`[1, heads]`, relative."""
        out = sparse_attention(self.q, self.k, self.v, plan)
        return (out - self.dense).flatten(2).norm(dim=2) / self.dense.flatten(2).norm(dim=2)


@functools.lru_cache(maxsize=1)
def drawn(make: Make, shape: tuple[int, int, int]) -> Case:
    tokens, block, dim = shape
    blocks = tokens // block
    draws = Draws(tokens, block, dim, cases.generator())
    q, k, v = make(draws)
    weights = (q @ k.T * dim**-0.5).softmax(-1)
    means = (x.view(blocks, block, dim).mean(1) for x in (q, k))
    scores = {
        "mass": weights.view(blocks, block, blocks, block).sum((1, 3)),
        "pooled": next(means) @ next(means).T,
        "random": torch.rand(blocks, blocks, generator=draws.generator),
    }
    rank = [scores[choice].argsort(1, descending=True).argsort(1) for choice in CHOICES]
    kept = torch.stack([own < max(1, round(share * blocks)) for own in rank for share in DENSITIES])
    heads = [x.float().expand(1, len(kept), -1, -1) for x in (q, k, v, weights @ v)]
    return Case(*heads, cases.keeping(kept[None], [*range(0, tokens + 1, block)]))


def worst_ratio(make: Make, name: Remainder, shape: tuple[int, int, int] = SMALL, *, tried: bool = True) -> float:
    """Error of a remainder over that of none, the largest of all choices and densities; errors count from 1e-3 on."""
    case = drawn(make, shape)
    plan = case.plan.with_remainder(name)
    if tried:
        plan = safe_remainder(case.q, case.k, case.v, plan)
    return float((case.error(plan) / case.error(case.plan).clamp(min=1e-3)).max())


@pytest.mark.parametrize("make", HEAVY, ids=lambda make: make.__name__)
def test_no_remainder_is_worse_than_none(make: Make) -> None:
    assert max(worst_ratio(make, name) for name in REMAINDERS[1:]) <= 1.05


@pytest.mark.parametrize("make", HEAVY[: HEAVY.index(sinks) + 1], ids=lambda make: make.__name__)
def test_heavy_tails_and_outlier_channels_need_no_trial(make: Make) -> None:
    """As pipelines have it: the limit of the spread sees what is in single channels or keys."""
    assert max(worst_ratio(make, name, tried=False) for name in REMAINDERS[1:]) <= 1.05


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("make", [along_two_directions, query_blocks_of_two_kinds], ids=lambda make: make.__name__)
def test_a_few_queries_of_many_tell(make: Make, shape: tuple[int, int, int]) -> None:
    assert worst_ratio(make, "value", shape) <= 1.05


@pytest.mark.parametrize("name", REMAINDERS[1:])
def test_blocks_of_like_keys_are_pooled(name: Remainder) -> None:
    assert worst_ratio(clusters, name) < 0.6


def test_the_trial_and_the_limit_of_the_spread_are_what_makes_it_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst_ratio(along_one_direction, "value", tried=False) > 2
    monkeypatch.setattr(remainder, "LARGEST_SPREAD", 1e9)
    assert worst_ratio(heavy_tokens, "value", tried=False) > 5


def inputs_of_two_kinds(plan: AttentionPlan) -> Inputs:
    """q, k, v `[2, 2, N, 8]` in the sequence's order: blocks of like tokens in one head, needles in the other."""
    q, k, v = cases.inputs(plan, 2, 2, 8, torch.float64)
    blocks = plan.block_mask.block_of(plan.block_mask.k_offsets)[0, 0]
    centres, towards = torch.randn(2, 6, 8, generator=cases.generator()).double()[:, blocks], 2 * q[:, 1, :1]
    for x in (k, v):
        x[:, 0] = centres + 0.3 * x[:, 0]
        x[:, 1, ::9] = towards
    q[:, 1] += towards * v[:, 1, :, :1]
    return q, plan.kv_order.restore(k), plan.kv_order.restore(v)


def literal_errors(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, head: int) -> dict[str, list[float]]:
    """Squared error of every remainder on the queries tried of each block of one head; scores times 0.3."""
    bounds, index = plan.q_order.offsets[0, head].tolist(), plan.q_order.index[0, head]
    own, mask = slice(head, head + 1), plan.block_mask
    keys, values = (x[:, own, index] for x in (k, v))
    columns = TokenOrder.from_index(torch.arange(len(index)), plan.kv_order.offsets[0, head])
    errors: dict[str, list[float]] = {name: [] for name in REMAINDERS}
    for block, (start, stop) in enumerate(pairwise(bounds)):
        size = stop - start
        tokens = index[[start + size * (8 * n + 5 * n % 8) // 64 for n in range(8)]] if size else index[:0]
        rows = TokenOrder.from_index(torch.arange(len(tokens)), torch.tensor([0, len(tokens)]))
        kept, partial = (x[:, own, block : block + 1] for x in (mask.kept_blocks, mask.partial_blocks))
        tried = AttentionPlan.from_kept(
            rows, kept, kv_order=columns, partial=partial, predicate=functools.partial(by_token, head, tokens, index)
        )
        queries = q[:, own, tokens]
        dense = cases.oracle(queries, keys, values, torch.ones(len(tokens), len(index), dtype=torch.bool), 0.3)[0]
        for name in REMAINDERS:
            out = literal(queries, keys, values, tried.with_remainder(name), 0.3)[0]
            errors[name].append(size * float((out - dense).square().sum()))
    return errors


def literal_level(errors: dict[str, list[float]], name: Remainder) -> int:
    """Place in `REMAINDERS` of the highest remainder, up to `name`, whose gain stands out of the noise."""
    for level in range(REMAINDERS.index(name), 0, -1):
        pairs = zip(errors["none"], errors[REMAINDERS[level]], strict=True)
        gains = [safety.LARGEST_ERROR * none - own for none, own in pairs]
        mean = sum(gains) / len(gains)
        if sum(gains) >= safety.DEVIATIONS * math.sqrt(sum((gain - mean) ** 2 for gain in gains)):
            return level
    return 0


def by_token(head: int, q_tokens: Tensor, k_tokens: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return every_third(b, head, q_tokens[i], k_tokens[j])


def every_third(b, h, i, j):
    return (i + 2 * j + h) % 3 != 0


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("name", REMAINDERS[1:])
def test_equals_a_literal_trial(name: Remainder, in_order: bool) -> None:
    """Orders, uneven blocks and partial blocks by head."""
    order = cases.random_order([[0, 40, 72, 90, 90, 131, 160], [0, 3, 64, 80, 100, 150, 160]], 1, 2)
    kept = torch.rand(1, 2, 6, 6, generator=cases.generator(4)) < 0.4
    plan = AttentionPlan.from_kept(order, kept, partial=kept.roll(1, -1), predicate=every_third, remainder=name)
    q, k, v = inputs_of_two_kinds(plan)
    want = [literal_level(literal_errors(q, k, v, plan, head), name) for head in range(2)]
    if in_order:
        q, k, v = order.permute(q), order.permute(k), order.permute(v)
    found = safe_remainder(q, k, v, plan, scale=0.3, in_order=in_order).head_remainders
    assert found is not None
    assert found.tolist() == [want]
    assert sorted(want) == [0, REMAINDERS.index(name)]


def test_batches_that_a_plan_tells_apart_are_tried_apart() -> None:
    plan = cases.random_plan(cases.EVEN, batch=2, heads=2, density=0.3).with_remainder("value")
    q, k, v = inputs_of_two_kinds(cases.random_plan(cases.EVEN))
    order = TokenOrder.from_index(torch.arange(96), torch.tensor(cases.EVEN))
    for batch in (1, 2):
        kept = plan.block_mask.kept_blocks[:batch]
        found = safe_remainder(q, k, v, AttentionPlan.from_kept(order, kept, remainder="value")).head_remainders
        assert found is not None
        assert found.shape == (batch, 2)


def test_a_plan_without_a_remainder_or_a_gap_is_returned_as_it_is() -> None:
    for plan in (cases.random_plan(cases.EVEN), cases.full_plan(96).with_remainder("value")):
        q, k, v = cases.inputs(plan, 1, 1, 8)
        assert safe_remainder(q, k, v, plan) is plan


def test_what_does_not_fit_is_refused() -> None:
    order = TokenOrder.from_index(torch.arange(64), torch.arange(0, 65, 16))
    plan = AttentionPlan.from_kept(order, torch.eye(4, dtype=torch.bool)[None, None], remainder="value")
    q = torch.randn(1, 2, 64, 8)
    assert safe_remainder(q, q, q, plan).head_remainders is not None
    for given in ((q[:, :, :10], q, q), (q[..., :4], q, q), (q, q[:, :, :10], q[:, :, :10])):
        with pytest.raises(ValueError, match=r"q, k, v must agree|is for 64 tokens, got 10"):
            safe_remainder(*given, plan)
