"""Plans, inputs and the float64 oracle that the kernel tests share."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.bench.plain import exact_terms, plain_attention
from dit_sparse.kernels import BACKENDS
from dit_sparse.types import AttentionPlan, BlockMask, Remainder, TokenOrder

EVEN = [0, 16, 32, 48, 64, 80, 96]
RAGGED = [0, 16, 32, 48, 64, 80, 91]
# Video blocks of 32 with a ragged last one, then 7 tokens of text in a block of their own.
TEXT = [0, 32, 64, 90, 97]
UNEVEN = [0, 1, 40, 40, 53, 120, 121]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_order(bounds: list[list[int]], batch: int, heads: int, seed: int = 0) -> TokenOrder:
    """A random order a head; `bounds` are the block bounds of each head, cycled."""
    draw = generator(seed)
    count = batch * heads
    index = torch.stack([torch.randperm(bounds[0][-1], generator=draw) for _ in range(count)])
    offsets = torch.tensor([bounds[i % len(bounds)] for i in range(count)], dtype=torch.int32)
    return TokenOrder.from_index(index.view(batch, heads, -1), offsets.view(batch, heads, -1))


def random_plan(
    bounds: list[int], *, batch: int = 1, heads: int = 1, density: float = 0.4, seed: int = 0
) -> AttentionPlan:
    order = random_order([bounds], batch, heads, seed)
    kept = torch.rand(batch, heads, order.num_blocks, order.num_blocks, generator=generator(seed + 1)) < density
    return AttentionPlan.from_kept(order, kept)


def keeping(kept: Tensor, bounds: list[int], **mask_options: object) -> AttentionPlan:
    """Plan in raster order that keeps the blocks `kept`."""
    order = TokenOrder.from_index(torch.arange(bounds[-1]), torch.tensor(bounds), is_identity=True)
    return AttentionPlan.from_kept(order, kept, **mask_options)


def inputs(plan: AttentionPlan, batch: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v `[B, H, N, D]` in the plan's orders."""
    draw = generator(dim)
    sizes = (plan.q_order.num_tokens, plan.kv_order.num_tokens, plan.kv_order.num_tokens)
    return [torch.randn(batch, heads, n, dim, generator=draw).to(dtype) for n in sizes]


def position_mask(plan: AttentionPlan) -> Tensor:
    """The plan's mask over positions of its orders."""
    return plan.block_mask.to_bool(plan.q_order.index, plan.kv_order.index)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Float64 output and row sums under `mask`; zeros and -inf for empty rows."""
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v.double(), scores.logsumexp(-1)


def assert_as_good_as_torch(
    got: tuple[Tensor, Tensor | None], q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> None:
    """Errors are at most twice those of torch in the inputs' dtype, plus two units in the last place.

    In float64 the oracle rounds as coarsely as what it judges, so there it is 64 units.
    """
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).nan_to_num(0.0)
    _judge(got, oracle(q, k, v, mask, scale), plain, plain_attention(q, k, v, mask, scale)[1])


def assert_plan_as_good_as_torch(
    got: tuple[Tensor, Tensor | None], q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float
) -> None:
    """As `assert_as_good_as_torch`, for a plan with a remainder; the oracle is the reference backend in float64."""
    want = BACKENDS["reference"].forward(q.double(), k.double(), v.double(), plan, scale=scale, return_lse=True)
    terms = exact_terms(q, k, v, plan, scale)
    blocks = plan.block_mask.block_of(plan.block_mask.q_offsets)
    _judge(got, want, *plain_attention(q, k, v, position_mask(plan), scale, terms, blocks))


def _judge(got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor], plain: Tensor, sums: Tensor) -> None:
    """Compare output and row sums with float64's; `plain` and `sums` are torch's in the inputs' dtype."""
    (out, lse), (want, want_lse), dtype = got, want, plain.dtype
    eps = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 1)
    assert out.dtype == dtype
    assert out.isfinite().all()
    allowed = 2 * (plain - want).abs().max() + 2 * eps * want.abs().max()
    assert (out - want).abs().max() <= allowed
    if lse is None:
        return
    empty = want_lse.isinf()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(lse.isneginf(), empty)
    assert not out[empty].any()
    error = (lse - want_lse)[~empty].abs()
    plain_error = (sums - want_lse)[~empty].abs()
    if error.numel():
        peak = want_lse[~empty].abs().max()
        units = 64 if dtype == torch.float64 else 2
        assert error.max() <= 2 * plain_error.max() + units * torch.finfo(lse.dtype).eps * (1 + peak)


def remainder_plans(batch: int = 2, heads: int = 2) -> dict[str, AttentionPlan]:
    """Plans that try a remainder: blocks of all kinds, one mask for all, partial blocks, bare and full rows."""
    plans = {
        name: random_plan(bounds, batch=batch, heads=heads)
        for name, bounds in (("even", EVEN), ("ragged", RAGGED), ("text", TEXT), ("uneven", UNEVEN))
    }
    plans["one mask"] = random_plan(RAGGED)
    rows = torch.rand(1, heads, 6, 6, generator=generator(5)) < 0.5
    rows[..., 1, :], rows[..., 4, :] = True, False
    plans["rows that keep all or nothing"] = keeping(rows, RAGGED)
    order = random_order([RAGGED], batch, heads)
    kept, partial = (torch.rand(batch, heads, 6, 6, generator=generator(6)) < 0.5 for _ in range(2))
    plans["partial"] = AttentionPlan.from_kept(
        order, kept, partial=partial & kept.roll(1, -1), predicate=lambda b, h, i, j: (i - j + 7 * h + 3 * b) % 4 == 0
    )
    return plans


def own_remainders() -> AttentionPlan:
    """A plan of two batches and two heads that have each remainder once."""
    plan = random_plan(RAGGED, batch=2, heads=2).with_remainder("mass")
    return replace(plan, head_remainders=torch.tensor([[0, 1], [2, 3]], dtype=torch.int8))


def nothing_left(remainder: Remainder) -> tuple[AttentionPlan, list[Tensor]]:
    """A plan and inputs with rows that keep nothing, some within partial blocks, and keys too wide to be pooled."""
    kept = torch.eye(6, dtype=torch.bool)[None, None].repeat(1, 2, 1, 1)
    kept[..., 4, :] = False
    partial = kept.clone()
    partial[..., :3, :] = False
    plan = keeping(kept, RAGGED, partial=partial, predicate=lambda b, h, i, j: (i % 5 != 0) & (j <= i))
    q, k, v = inputs(plan, 1, 2, 16)
    return plan.with_remainder(remainder), [q, 30 * k, v]


def full_plan(tokens: int, block: int = 16) -> AttentionPlan:
    order = TokenOrder.from_index(torch.arange(tokens), torch.tensor([*range(0, tokens, block), tokens]))
    return AttentionPlan(order, order, BlockMask.full(order.offsets, order.offsets))
