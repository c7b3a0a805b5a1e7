"""The gather backend against float64 dense attention under the plan's own mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.kernels import dense_attention, gather, gather_rows, get_backend
from dit_sparse.types import REMAINDERS, AttentionPlan, BlockMask, Remainder, TokenOrder
from tests.kernels import cases

GATHER = get_backend("gather")


def run(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float = 0.3) -> tuple[Tensor, Tensor | None]:
    return GATHER.forward(q, k, v, plan, scale=scale, return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 112, 128, 256])
def test_every_dtype_and_head_dim(dtype: torch.dtype, dim: int) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2)
    q, k, v = cases.inputs(plan, 1, 2, dim, dtype)
    cases.assert_as_good_as_torch(run(q, k, v, plan, dim**-0.5), q, k, v, cases.position_mask(plan), dim**-0.5)


@pytest.mark.parametrize("bounds", [cases.EVEN, cases.RAGGED, cases.TEXT, cases.UNEVEN], ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_masks_and_orders_per_batch_and_head(bounds: list[int], batch: int, heads: int) -> None:
    plan = cases.random_plan(bounds, batch=batch, heads=heads)
    q, k, v = cases.inputs(plan, 2, 3, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_offsets_that_differ_between_heads() -> None:
    order = cases.random_order([[0, 10, 50, 90], [0, 45, 45, 90]], 1, 2)
    kept = torch.rand(1, 2, 3, 3, generator=cases.generator()) < 0.5
    plan = AttentionPlan.from_kept(order, kept)
    q, k, v = cases.inputs(plan, 2, 2, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_different_query_and_key_lengths_and_blocks() -> None:
    q_order = cases.random_order([cases.RAGGED], 1, 1)
    kv_order = cases.random_order([cases.UNEVEN], 1, 1)
    kept = torch.rand(1, 1, q_order.num_blocks, kv_order.num_blocks, generator=cases.generator()) < 0.5
    plan = AttentionPlan(q_order, kv_order, BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets))
    q, k, v = cases.inputs(plan, 1, 2, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_rows_that_keep_nothing() -> None:
    kept = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    kept[..., 1, 2] = kept[..., 4, 0] = True
    plan = cases.keeping(kept, cases.RAGGED)
    q, k, v = cases.inputs(plan, 1, 2, 16)
    out, lse = run(q, k, v, plan)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)
    assert lse is not None
    assert lse[:, :, :16].isneginf().all()


def test_a_plan_that_keeps_nothing() -> None:
    plan = cases.keeping(torch.zeros(1, 1, 6, 6, dtype=torch.bool), cases.RAGGED)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    out, lse = run(q, k, v, plan)
    assert lse is not None
    assert not out.any()
    assert lse.isneginf().all()


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **kw: new_empty(*a, **kw).fill_(float("nan")))
    for bounds in (cases.EVEN, cases.TEXT, cases.UNEVEN):
        plan = cases.random_plan(bounds, heads=2, density=0.3)
        q, k, v = cases.inputs(plan, 1, 2, 16)
        out, lse = run(q, k, v, plan)
        assert lse is not None
        assert not out.isnan().any()
        assert not lse.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial_blocks_see_tokens_in_the_sequences_own_order(dtype: torch.dtype) -> None:
    order = cases.random_order([cases.RAGGED], 2, 2)
    draw = cases.generator()
    kept, partial = (torch.rand(2, 2, 6, 6, generator=draw) < share for share in (0.6, 0.5))

    def predicate(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        return (q_token - k_token + head * 7 + batch * 3) % 4 == 0

    plan = AttentionPlan.from_kept(order, kept, partial=partial, predicate=predicate)
    q, k, v = cases.inputs(plan, 2, 2, 16, dtype)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_a_predicate_that_empties_single_rows() -> None:
    kept = torch.eye(6, dtype=torch.bool)[None, None]
    plan = cases.keeping(kept, cases.RAGGED, partial=kept, predicate=lambda b, h, i, j: (i % 5 != 0) & (j <= i))
    q, k, v = cases.inputs(plan, 1, 1, 16)
    out, lse = run(q, k, v, plan)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)
    assert lse is not None
    assert lse[..., ::5].isneginf().all()


def test_strided_views_need_no_copy_by_the_caller() -> None:
    plan = cases.random_plan(cases.TEXT, heads=2)
    q, k, v = cases.inputs(plan, 2, 2, 16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(run(*strided, plan)[0], run(q, k, v, plan)[0])


def test_density_one_is_as_good_as_sdpa() -> None:
    plan = cases.keeping(torch.ones(1, 1, 6, 6, dtype=torch.bool), cases.RAGGED)
    q, k, v = cases.inputs(plan, 2, 2, 32)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_density_one_of_many_rows_is_sdpa_bit_for_bit() -> None:
    plan = cases.keeping(torch.ones(1, 1, 4, 4, dtype=torch.bool), [0, 64, 128, 192, 250])
    q, k, v = cases.inputs(plan, 2, 2, 32)
    assert torch.equal(run(q, k, v, plan)[0], F.scaled_dot_product_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("bounds", [[0, 64, 128, 192, 256], [0, 128, 256, 384, 500], [0, 200, 400, 590]], ids=str)
def test_flash_and_matmul_agree(bounds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = cases.inputs(cases.random_plan(bounds, heads=2), 1, 2, 40)
    results = []
    for found in (True, False):
        monkeypatch.setattr(gather, "has_flash_cpu", lambda dtype, found=found: found)
        plan = cases.random_plan(bounds, heads=2)
        results.append(run(q, k, v, plan))
        cases.assert_as_good_as_torch(results[-1], q, k, v, cases.position_mask(plan), 0.3)


def test_query_blocks_that_share_their_keys_are_stacked() -> None:
    kept = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    kept[..., ::2, :2], kept[..., 1::2, 3] = True, True
    plan = cases.keeping(kept, cases.EVEN)
    batches = gather_rows.prepared(plan, 16, 2).batches[0][0]
    assert sorted(batch.q_units.shape[1] for batch in batches) == [3, 3]
    q, k, v = cases.inputs(plan, 1, 1, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_preparation_lasts_as_long_as_the_plan() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    run(q, k, v, plan)
    assert plan in gather_rows._known
    before = len(gather_rows._known)
    del plan
    assert len(gather_rows._known) == before - 1


def test_refuses_what_it_cannot_compute() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    assert GATHER.refuses(q, k, v, plan) is None
    assert "float16" in str(GATHER.refuses(q, k.half(), v, plan))
    assert "no backward" in str(GATHER.refuses(q.requires_grad_(), k, v, plan))
    assert "CPU only" in str(GATHER.unavailable(torch.device("cuda")))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_plans(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    sizes = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any))
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    shared = data.draw(st.booleans())
    plan = cases.random_plan(bounds, batch=1, heads=1 if shared else 2, density=data.draw(st.floats(0, 1)), seed=seed)
    plan = plan.with_remainder(data.draw(st.sampled_from(REMAINDERS)))
    q, k, v = cases.inputs(plan, 2, 2, 16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


def test_inference_mode_leaves_nothing_behind() -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2, seed=11)
    q, k, v = cases.inputs(plan, 1, 2, 40)
    with torch.inference_mode():
        first = get_backend("gather").forward(q, k, v, plan, scale=0.3, return_lse=True)
    again = get_backend("gather").forward(q, k, v, plan, scale=0.3, return_lse=True)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("whole", [True, False])
def test_nan_goes_in_and_comes_out(whole: bool) -> None:
    kept = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    partial = kept.clone()
    partial[..., 0] = not whole
    plan = cases.keeping(kept, cases.RAGGED, partial=partial, predicate=lambda b, h, i, j: (i + j) % 3 == 0)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    q[..., 5, 0] = float("nan")
    out, lse = get_backend("gather").forward(q, k, v, plan, scale=0.3, return_lse=True)
    assert out[..., 5, :].isnan().all()
    assert lse is not None
    assert lse[..., 5].isnan().all()
    assert not out[..., 6:, :].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("remainder", ["mean", "value", "mass"])
def test_remainders_of_every_plan(remainder: Remainder, dtype: torch.dtype) -> None:
    for plan in cases.remainder_plans().values():
        plan = plan.with_remainder(remainder)
        q, k, v = cases.inputs(plan, 2, 2, 40, dtype)
        cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


def test_heads_with_remainders_of_their_own() -> None:
    plan = cases.own_remainders()
    q, k, v = cases.inputs(plan, 2, 2, 40)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


def test_a_remainder_of_query_blocks_wide_enough_for_the_flash_operator() -> None:
    bounds = [0, 200, 400, 590]
    plan = cases.keeping(torch.eye(3, dtype=torch.bool)[None, None], bounds, remainder="value")
    q, k, v = cases.inputs(plan, 1, 2, 40)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan, 0.1), q, k, v, plan, 0.1)


def test_rows_with_a_remainder_are_not_stacked() -> None:
    """They hold all their scores at once: stacked, a head that keeps everything would hold N x N."""
    kept = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    kept[..., 1, 2] = False
    plan = cases.keeping(kept, cases.EVEN, remainder="value")
    batches = gather_rows.prepared(plan, 16, 1).batches[0][0]
    assert all(batch.q_units.shape[1] == 1 for batch in batches)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


def test_rows_of_unlike_length_run_together_where_there_is_a_remainder() -> None:
    kept = torch.rand(1, 2, 3, 6, generator=cases.generator()) < 0.5
    kept[0, 0, 0], kept[0, 0, 1] = True, False
    keys = TokenOrder.from_index(torch.arange(96), torch.tensor(cases.EVEN), is_identity=True)
    queries = TokenOrder.from_index(torch.arange(96), torch.tensor(cases.EVEN[::2]), is_identity=True)
    plan = AttentionPlan.from_kept(queries, kept, kv_order=keys, remainder="value")
    (batch,) = gather_rows.prepared(plan, 16, torch.get_num_threads()).batches[0][0]
    assert len(batch.groups) == 1
    assert batch.filling.sum(-1).tolist()[::2] == [0, 96]
    q, k, v = cases.inputs(plan, 1, 2, 16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


@pytest.mark.parametrize("remainder", ["none", "value"])
def test_the_output_lies_as_the_queries_do(remainder: Remainder) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2).with_remainder(remainder)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in cases.inputs(plan, 2, 2, 16))
    out, lse = run(q, k, v, plan)
    assert out.stride() == q.stride()
    cases.assert_plan_as_good_as_torch((out, lse), q, k, v, plan, 0.3)


def test_a_remainder_needs_no_row_sums_from_the_caller() -> None:
    plan = cases.random_plan(cases.RAGGED).with_remainder("mean")
    q, k, v = cases.inputs(plan, 1, 1, 16)
    out, lse = GATHER.forward(q, k, v, plan, scale=0.3, return_lse=False)
    assert lse is None
    assert torch.equal(out, run(q, k, v, plan)[0])


def test_rows_without_a_key_or_a_remainder_are_empty() -> None:
    plan, (q, k, v) = cases.nothing_left("value")
    out, lse = run(q, k, v, plan)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)
    assert lse is not None
    assert lse[..., 64:80].isneginf().all()
    assert lse[..., 50].isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_need_not_be_neighbours(dtype: torch.dtype) -> None:
    """torch's flash operator takes it for granted, and reads elsewhere without a word."""
    order = TokenOrder.from_index(torch.arange(1024), torch.arange(0, 1025, 256))
    plan = AttentionPlan.from_kept(order, ~torch.eye(4, dtype=torch.bool)[None, None])
    draw = cases.generator()
    wide = torch.randn(3, 1, 2, 1024, 128, generator=draw).to(dtype)
    turned = torch.randn(3, 1, 2, 64, 1024, generator=draw).to(dtype).transpose(-1, -2)
    for q, k, v in (wide[..., ::2], turned):
        assert q.stride(-1) != 1
        got, lse = GATHER.forward(q, k, v, plan, scale=0.3, return_lse=True)
        want, want_lse = get_backend("reference").forward(q, k, v, plan, scale=0.3, return_lse=True)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=64 * unit)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-3)
        out, row_sums = dense_attention(q, k, v, scale=0.3, return_lse=True)
        again, sums_again = dense_attention(*(x.contiguous() for x in (q, k, v)), scale=0.3, return_lse=True)
        assert torch.equal(out, again)
        assert torch.equal(row_sums, sums_again)
