"""Skipped blocks: every backend that has them against a literal loop in float64, and with each other."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from dit_sparse.attention import skipping_attention, sparse_attention
from dit_sparse.kernels import BACKENDS, check_skips, select, triton_skip
from dit_sparse.kernels.triton_skip import skip_configuration
from dit_sparse.types import AttentionPlan, BlockMask
from tests.kernels import cases

SCALE = 0.3
SKIPPING = ["reference", "gather", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(plan: AttentionPlan, batch: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v where whole blocks of keys score alike, some high and some low."""
    q, k, v = cases.inputs(plan, batch, heads, dim)
    block = plan.block_mask.block_of(plan.block_mask.k_offsets).expand(batch, heads, -1)
    level = 3 * torch.randn(batch, heads, plan.block_mask.num_k_blocks, generator=cases.generator(1)).gather(2, block)
    q, k = q / 2, k / 2
    q[..., 0], k[..., 0] = 3.0, level
    return [x.to(dtype) for x in (q, k, v)]


def visits(plan: AttentionPlan, b: int, h: int, i: int) -> list[int]:
    """Key blocks of a query block in turn: whole ones, then partial ones."""
    mask = plan.block_mask
    whole = mask.full_blocks[b % mask.full_blocks.shape[0], h % mask.full_blocks.shape[1], i]
    found = whole.nonzero()[:, 0].tolist()
    if mask.partial_blocks is not None:
        partial = mask.partial_blocks[b % mask.partial_blocks.shape[0], h % mask.partial_blocks.shape[1], i]
        found += partial.nonzero()[:, 0].tolist()
    return found


def bounds(offsets: Tensor, b: int, h: int, i: int) -> range:
    start, stop = offsets[b % offsets.shape[0], h % offsets.shape[1], i : i + 2].tolist()
    return range(start, stop)


def loop(q: Tensor, k: Tensor, plan: AttentionPlan, threshold: float) -> tuple[Tensor, Tensor, list[float]]:
    """The paper's algorithm, token by token in float64: pairs computed, pairs skipped a query block, and margins.

    A margin is how far the best of a block's rows is from its running maximum; below `ln(threshold)` it is skipped.
    """
    batch, heads = q.shape[:2]
    allowed = cases.position_mask(plan).expand(batch, heads, -1, -1)
    scores = (q.double() @ k.double().transpose(-1, -2) * SCALE).masked_fill(~allowed, -math.inf)
    computed, skipped, margins = torch.zeros_like(allowed), torch.zeros(batch, heads, plan.q_order.num_blocks), []
    for b in range(batch):
        for h in range(heads):
            for i in range(plan.q_order.num_blocks):
                rows = bounds(plan.block_mask.q_offsets, b, h, i)
                peaks = dict.fromkeys(rows, -math.inf)
                for j in visits(plan, b, h, i):
                    columns = bounds(plan.block_mask.k_offsets, b, h, j)
                    if not rows or not columns:
                        continue
                    block = (b, h, slice(rows.start, rows.stop), slice(columns.start, columns.stop))
                    largest = dict(zip(rows, scores[block].amax(-1).tolist(), strict=True))
                    needed = False
                    for row in rows:
                        needed |= not largest[row] < peaks[row] + (math.log(threshold) if threshold else -math.inf)
                    known = [largest[row] - peaks[row] for row in rows if not math.isinf(peaks[row])]
                    margins += [max(known)] if len(known) == len(rows) and not math.isinf(max(known)) else []
                    if needed:
                        computed[block] |= allowed[block]
                        peaks = {row: max(peaks[row], largest[row]) for row in rows}
                    else:
                        skipped[b, h, i] += int(allowed[block].sum())
    return computed, skipped.long(), margins


def clear_threshold(q: Tensor, k: Tensor, plan: AttentionPlan) -> float:
    """A threshold that skips about half of what can be, and that no block is near."""
    margins = sorted(m for m in loop(q, k, plan, 0.0)[2] if m < 0)
    middle = range(len(margins) // 4, 3 * len(margins) // 4)
    best = max(middle, key=lambda n: margins[n + 1] - margins[n])
    assert margins[best + 1] - margins[best] > 0.02
    return math.exp((margins[best] + margins[best + 1]) / 2)


def run(name: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    device = DEVICE if name == "triton" else "cpu"
    backend, plan, tensors = BACKENDS[name], plan.to(device), [x.to(device) for x in (q, k, v)]
    assert backend.refuses(*tensors, plan) is None
    out, lse, skipped = backend.forward_counting(*tensors, plan, scale=SCALE, return_lse=True)
    return out.cpu(), lse.cpu(), skipped.cpu()


def check(name: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    plan = plan.with_skip(clear_threshold(q, k, plan))
    computed, skipped, _ = loop(q, k, plan, plan.skip_threshold)
    assert 0 < int(skipped.sum()) < int(computed.sum())
    out, lse, counted = run(name, q, k, v, plan)
    assert torch.equal(counted.long(), skipped)
    cases.assert_as_good_as_torch((out, lse), q, k, v, computed, SCALE)


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("plan", ["even", "ragged", "text", "text first", "uneven", "one mask", "partial"])
def test_skips_what_a_loop_skips(name: str, plan: str) -> None:
    first = cases.random_plan([0, 7, 39, 71, 103, 130], batch=2, heads=2, density=0.8)
    made = (cases.remainder_plans() | {"text first": first})[plan]
    check(name, *inputs(made, 2, 2, 16), made)


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_full_plan_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    plan = cases.full_plan(91)
    check(name, *inputs(plan, 1, 2, 40, dtype), plan)


@pytest.mark.parametrize("name", SKIPPING)
def test_blocks_of_their_own_size_for_keys_and_a_value_size_of_its_own(name: str) -> None:
    q_order, kv_order = (cases.random_order([[*range(0, 97, size), 97]], 1, 2, seed=size) for size in (24, 10))
    plan = AttentionPlan(q_order, kv_order, BlockMask.full(q_order.offsets, kv_order.offsets))
    q, k, v = inputs(plan, 1, 2, 16)
    check(name, q, k, v[..., :10], plan)


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("plan", ["uneven", "partial"])
def test_without_row_sums_the_output_is_the_same(name: str, plan: str) -> None:
    made = cases.remainder_plans()[plan].with_skip(0.3)
    q, k, v = inputs(made, 2, 2, 16)
    out, _, skipped = run(name, q, k, v, made)
    on_device = [x.to(DEVICE if name == "triton" else "cpu") for x in (q, k, v)]
    plan_there = made.to(on_device[0].device)
    again = BACKENDS[name].forward(*on_device, plan_there, scale=SCALE, return_lse=False)[0]
    assert torch.equal(again.cpu(), out)
    assert skipped.any()


@pytest.mark.parametrize("name", SKIPPING)
def test_the_order_of_the_blocks_decides(name: str) -> None:
    """The best block last: nothing before it is far below the maximum so far. First: all others are skipped."""
    q = torch.ones(1, 1, 16, 16)
    k = torch.zeros(1, 1, 48, 16)
    q_order, kv_order = (cases.full_plan(tokens).q_order for tokens in (16, 48))
    plan = AttentionPlan(q_order, kv_order, BlockMask.full(q_order.offsets, kv_order.offsets), skip_threshold=0.01)
    v = torch.randn(1, 1, 48, 16, generator=cases.generator())
    for best, pairs in ((0, 2 * 256), (2, 0)):
        raised = k.clone()
        raised[:, :, best * 16 : best * 16 + 16] = 2.0
        assert int(run(name, q, raised, v, plan)[2]) == pairs


@pytest.mark.parametrize("name", SKIPPING)
def test_one_row_that_needs_a_block_is_enough(name: str) -> None:
    """Rows of a query block decide together, and rows that a ragged block does not have do not."""
    plan = cases.full_plan(26).with_skip(0.01)  # blocks of 16 and of 10
    q, k, v = torch.ones(1, 1, 26, 16), torch.zeros(1, 1, 26, 16), torch.ones(1, 1, 26, 16)
    k[:, :, :16] = 2.0
    assert run(name, q, k, v, plan)[2].flatten().tolist() == [16 * 10, 10 * 10]
    q[:, :, 3] = q[:, :, 20] = 0.0
    assert run(name, q, k, v, plan)[2].flatten().tolist() == [0, 0]


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(name: str, scale: float) -> None:
    plan = cases.full_plan(96).with_skip(0.5)
    q, k, v = (x.to(DEVICE if name == "triton" else "cpu") for x in inputs(plan, 1, 1, 16))
    plan = plan.to(q.device)
    got = BACKENDS[name].forward_counting(q, k, v, plan, scale=scale, return_lse=False)
    want = BACKENDS["reference"].forward_counting(-q, k, v, plan, scale=-scale, return_lse=False)
    torch.testing.assert_close(got[0], want[0])
    assert torch.equal(got[2].long(), want[2])
    assert bool(got[2].any()) == (scale != 0), "equal scores are never below the maximum"


@pytest.mark.parametrize("name", SKIPPING)
def test_a_threshold_of_zero_is_dense_attention_bit_for_bit(name: str) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2)
    q, k, v = (x.to(DEVICE if name == "triton" else "cpu") for x in cases.inputs(plan, 1, 2, 16))
    plan = plan.to(q.device)
    got, want = (sparse_attention(q, k, v, p, backend=name) for p in (plan.with_skip(0.3).with_skip(0.0), plan))
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", SKIPPING)
def test_rows_that_keep_nothing_and_nan(name: str) -> None:
    kept = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    kept[..., 2, :] = False
    plan = cases.keeping(kept, cases.RAGGED).with_skip(0.9)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    out, lse, skipped = run(name, q, k, v, plan)
    assert not out[:, :, 32:48].any()
    assert lse[:, :, 32:48].isneginf().all()
    assert skipped[..., 2] == 0
    q[:, :, 50] = float("nan")
    assert run(name, q, k, v, plan)[0][:, :, 50].isnan().all(), "a NaN is not skipped"


def test_the_reference_has_a_backward() -> None:
    plan = cases.full_plan(96).with_skip(0.5)
    q, k, v = (x.requires_grad_() for x in inputs(plan, 1, 1, 16))
    sparse_attention(q, k, v, plan, backend="reference").sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_skipping_attention_counts_in_the_sequences_own_order() -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2, density=0.9)
    q, k, v = (plan.q_order.restore(x) for x in inputs(plan, 1, 2, 16))
    plan = plan.with_skip(0.3)
    out, skipped = skipping_attention(q, k, v, plan)
    assert torch.equal(out, sparse_attention(q, k, v, plan))
    moved = [plan.q_order.permute(x) for x in (q, k, v)]
    in_order, again = skipping_attention(*moved, plan, in_order=True, backend="reference")
    torch.testing.assert_close(plan.q_order.restore(in_order), out)
    assert torch.equal(again, skipped)
    assert skipped.sum() > 0
    with pytest.raises(ValueError, match="plan must have a skip_threshold above 0, got 0"):
        skipping_attention(q, k, v, plan.with_skip(0.0))


@pytest.mark.parametrize("packed", [False, True])
def test_a_plan_at_rest_on_another_device_or_of_some_heads_skips_as_much(packed: bool) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=3).with_skip(0.25)
    plan = plan.pack().unpack() if packed else plan.to("cpu")
    assert plan.skip_threshold == plan.of_heads((0, 2)).skip_threshold == 0.25


def test_a_plan_that_skips_is_not_dense_and_goes_to_a_backend_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    full = cases.full_plan(96)
    q, k, v = cases.inputs(full, 1, 1, 16)
    assert full.is_dense
    plan = full.with_skip(0.1)
    assert not plan.is_dense
    assert select("auto", q, k, v, plan).name == "gather"
    for name in BACKENDS.keys() - set(SKIPPING):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda device: None, raising=False)
        with pytest.raises(ValueError, match=f"'{name}' cannot compute this call: it skips no blocks; use 'reference'"):
            select(name, q, k, v, plan)
        with pytest.raises(ValueError, match=f"backend '{name}' cannot be used: it skips no blocks"):
            check_skips(name)
    for name in ("auto", *SKIPPING):
        check_skips(name)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_bad_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="skip_threshold must be from 0 to 1, got"):
        cases.full_plan(96).with_skip(threshold)


def test_a_remainder_beside_it_is_refused() -> None:
    with pytest.raises(ValueError, match="remainder must be 'none' where blocks are skipped, got 'mean'"):
        cases.random_plan(cases.EVEN).with_remainder("mean").with_skip(0.1)


def test_blocks_larger_than_a_tile_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    plan = cases.full_plan(300, 150).with_skip(0.1)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    assert "at most 128 tokens, one tile, got 150" in str(BACKENDS["triton"].refuses(q, k, v, plan))
    assert BACKENDS["triton"].refuses(q, k, v, plan.with_skip(0.0)) is None
    monkeypatch.setattr(triton_skip, "_configuration", lambda *_: None)
    small = cases.full_plan(96).with_skip(0.1)
    assert "16 x 16 tokens, 16 channels" in str(BACKENDS["triton"].refuses(*cases.inputs(small, 1, 1, 16), small))


def test_tiles_that_fit() -> None:
    assert skip_configuration(128, 128, 128, 128, 2, 232448).num_stages == 3
    assert skip_configuration(128, 128, 128, 128, 2, 166912).num_stages == 2
    assert skip_configuration(128, 128, 128, 128, 2, 101376) is None
    assert skip_configuration(64, 64, 128, 128, 2, 101376)[:3] == (64, 64, 4)
    assert skip_configuration(50, 20, 64, 64, 4, 101376)[:2] == (64, 32)


def test_torchs_compiler_takes_a_call_as_one_graph() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    plan = cases.random_plan(cases.RAGGED, heads=2).with_skip(0.3)
    q, k, v = (plan.q_order.restore(x).to(DEVICE) for x in inputs(plan, 1, 2, 16))
    plan = plan.to(DEVICE)
    compiled = torch.compile(
        lambda q, k, v: skipping_attention(q, k, v, plan, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(q, k, v), skipping_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(got[1].long(), want[1])
    assert want[1].any()


def test_many_random_cases_agree() -> None:
    """Reference and gather, whose scores are summed in another order, on plans of all kinds."""
    draw = random.Random(0)
    for seed in range(30):
        edges = sorted({0, *draw.sample(range(1, 100), draw.randint(1, 9)), 100})
        plan = cases.random_plan(edges, heads=2, density=draw.uniform(0.2, 1.0), seed=seed)
        plan = plan.with_skip(draw.uniform(0.05, 1.0))
        q, k, v = (x.double() for x in inputs(plan, 1, 2, 8))
        got, want = (
            BACKENDS[name].forward_counting(q, k, v, plan, scale=SCALE, return_lse=True) for name in SKIPPING[:2]
        )
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)
