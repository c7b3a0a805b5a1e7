"""The Triton backend against float64 dense attention: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse import sparse_attention
from dit_sparse.kernels import block_sparse, get_backend, moments, partial_bits
from dit_sparse.kernels import remainder as remainders
from dit_sparse.types import AttentionPlan, BlockMask, Remainder
from tests.kernels import cases

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = get_backend("triton")


def run(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    plan = plan.to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    assert TRITON.unavailable(q.device) is None
    assert TRITON.refuses(q, k, v, plan) is None
    out, lse = TRITON.forward(q, k, v, plan, scale=scale, return_lse=True)
    assert lse is not None
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("name", ["uneven", "partial", "own remainders"])
def test_without_row_sums_the_output_is_the_same(name: str) -> None:
    plan = (cases.remainder_plans() | {"own remainders": cases.own_remainders()})[name].to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in cases.inputs(plan, 2, 2, 16))
    out, lse = TRITON.forward(q, k, v, plan, scale=0.3, return_lse=False)
    assert lse is None
    assert torch.equal(out.cpu(), run(q, k, v, plan)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 40, 64, 96, 128, 256])
def test_every_dtype_and_head_dim(dtype: torch.dtype, dim: int) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2)
    q, k, v = cases.inputs(plan, 1, 2, dim, dtype)
    cases.assert_as_good_as_torch(run(q, k, v, plan, dim**-0.5), q, k, v, cases.position_mask(plan), dim**-0.5)


@pytest.mark.parametrize(
    ("bounds", "batch", "heads"),
    [
        *((bounds, 2, 3) for bounds in (cases.EVEN, cases.RAGGED, cases.TEXT, cases.UNEVEN)),
        *((cases.TEXT, *shared) for shared in ((1, 1), (1, 3), (2, 1))),
    ],
    ids=str,
)
def test_masks_and_orders_per_batch_and_head(bounds: list[int], batch: int, heads: int) -> None:
    plan = cases.random_plan(bounds, batch=batch, heads=heads)
    q, k, v = cases.inputs(plan, 2, 3, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("tokens", [256, 300])
def test_block_sizes_of_queries_and_keys_are_independent(blocks: tuple[int, int], tokens: int) -> None:
    orders = [cases.random_order([[*range(0, tokens, size), tokens]], 1, 1, seed=size) for size in blocks]
    kept = torch.rand(1, 1, *(order.num_blocks for order in orders), generator=cases.generator()) < 0.6
    plan = AttentionPlan(*orders, BlockMask.from_bool(kept, *(order.offsets for order in orders)))
    q, k, v = cases.inputs(plan, 1, 1, 32)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_offsets_that_differ_between_heads() -> None:
    order = cases.random_order([[0, 10, 50, 90], [0, 45, 45, 90]], 1, 2)
    kept = torch.rand(1, 2, 3, 3, generator=cases.generator()) < 0.5
    plan = AttentionPlan.from_kept(order, kept)
    q, k, v = cases.inputs(plan, 2, 2, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_rows_that_keep_nothing() -> None:
    kept = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    kept[..., 1, 2] = kept[..., 4, 0] = kept[..., 4, 5] = True
    plan = cases.keeping(kept, cases.RAGGED)
    q, k, v = cases.inputs(plan, 1, 2, 16)
    out, lse = run(q, k, v, plan)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)
    assert lse[:, :, :16].isneginf().all()


@pytest.mark.parametrize("uniform", [True, False])
def test_partial_blocks_see_tokens_in_the_sequences_own_order(uniform: bool) -> None:
    order = cases.random_order([cases.UNEVEN], 2, 2)
    draw = cases.generator()
    blocks = order.num_blocks
    kept, partial = (torch.rand(2, 2, blocks, blocks, generator=draw) < share for share in (0.6, 0.5))

    def predicate(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        number = 0 if uniform else head * 7 + batch * 3
        return (q_token - k_token + number) % 4 == 0

    predicate.uniform = uniform
    plan = AttentionPlan.from_kept(order, kept, partial=partial, predicate=predicate)
    q, k, v = cases.inputs(plan, 2, 2, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_a_predicate_that_empties_single_rows() -> None:
    kept = torch.eye(6, dtype=torch.bool)[None, None]
    plan = cases.keeping(kept, cases.RAGGED, partial=kept, predicate=lambda b, h, i, j: (i % 5 != 0) & (j <= i))
    q, k, v = cases.inputs(plan, 1, 1, 16)
    out, lse = run(q, k, v, plan)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)
    assert lse[..., ::5].isneginf().all()


def test_strided_inputs_and_a_value_size_of_its_own() -> None:
    plan = cases.random_plan(cases.TEXT, heads=2)
    q, k, v = cases.inputs(plan, 2, 2, 16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(run(*strided, plan)[0], run(q, k, v, plan)[0])
    assert torch.equal(run(q, k, v[..., :10], plan)[0], run(q, k, v, plan)[0][..., :10])


def test_a_negative_scale() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan, -0.4), q, k, v, cases.position_mask(plan), -0.4)


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))
    for bounds in (cases.EVEN, cases.TEXT, cases.UNEVEN):
        plan = cases.random_plan(bounds, heads=2, density=0.3)
        q, k, v = cases.inputs(plan, 1, 2, 16)
        out, lse = run(q, k, v, plan)
        assert not out.isnan().any()
        assert not lse.isnan().any()


def test_partial_blocks_too_large_to_pack_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_bits, "_BITS_BYTES", 100)
    kept = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    plan = cases.keeping(kept, cases.RAGGED, partial=kept, predicate=lambda b, h, i, j: j <= i)
    with pytest.raises(ValueError, match="packed bits"):
        run(*cases.inputs(plan, 1, 1, 16), plan)


def test_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    assert "float64" in str(TRITON.refuses(q.double(), k.double(), v.double(), plan))
    assert "at most 256" in str(TRITON.refuses(*(x.repeat(1, 1, 1, 17) for x in (q, k, v)), plan))
    assert "no backward" in str(TRITON.refuses(q.requires_grad_(), k, v, plan))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA only" in str(TRITON.unavailable(torch.device("cpu")))


@pytest.mark.parametrize("bounds", [cases.EVEN, cases.RAGGED, cases.UNEVEN], ids=str)
def test_a_scale_of_zero_weighs_all_kept_keys_alike(bounds: list[int]) -> None:
    plan = cases.random_plan(bounds)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan, 0.0), q, k, v, cases.position_mask(plan), 0.0)


def test_lists_without_room_keep_nothing() -> None:
    plan = cases.random_plan(cases.EVEN)
    mask = plan.block_mask
    empty = BlockMask(
        torch.zeros_like(mask.kv_counts), mask.kv_indices[..., :0].contiguous(), mask.q_offsets, mask.k_offsets
    )
    out, lse = run(*cases.inputs(plan, 1, 1, 16), AttentionPlan(plan.q_order, plan.kv_order, empty))
    assert not out.any()
    assert lse.isneginf().all()


@pytest.mark.parametrize("size", [40, 100, 128])
def test_partial_blocks_of_any_size(size: int) -> None:
    bounds = [*range(0, 256, size), 256]
    blocks = len(bounds) - 1
    kept = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
    plan = cases.keeping(kept, bounds, partial=kept, predicate=lambda b, h, i, j: (i + j) % 3 == 0)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    cases.assert_as_good_as_torch(run(q, k, v, plan), q, k, v, cases.position_mask(plan), 0.3)


def test_torchs_compiler_takes_a_call_as_one_graph() -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in cases.inputs(plan, 1, 2, 16))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q * 2, k, v, plan, backend="triton") + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q, k, v), attend(q, k, v), atol=1e-5)


@pytest.mark.parametrize(("remainder", "threshold"), [("none", 0.0), ("value", 0.0), ("none", 0.2)])
def test_the_operator_follows_torchs_rules(remainder: Remainder, threshold: float) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2).to(DEVICE)
    mask = plan.block_mask
    for strided in (False, True):
        q, k, v = (x.to(DEVICE) for x in cases.inputs(plan, 1, 2, 16))
        if strided:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        lists = mask.q_offsets, mask.k_offsets, mask.kv_counts, mask.kv_indices, None, None, None
        lists += (None if remainder == "none" else mask.kept_blocks, None)
        geometry = list(plan.q_order.geometry), list(plan.kv_order.geometry)
        torch.library.opcheck(
            torch.ops.dit_sparse.block_sparse.default,
            (q, k, v, *lists, *geometry, 0.3, remainder, threshold, True, "triton"),
        )


@pytest.mark.parametrize("name", list(cases.remainder_plans()))
def test_remainders_of_every_plan(name: str) -> None:
    plan = cases.remainder_plans()[name].with_remainder("value")
    q, k, v = cases.inputs(plan, 2, 2, 16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("remainder", ["mean", "value", "mass"])
def test_every_remainder_in_every_dtype(remainder: Remainder, dtype: torch.dtype) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2).with_remainder(remainder)
    q, k, v = cases.inputs(plan, 1, 2, 40, dtype)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


@pytest.mark.parametrize("remainder", ["mean", "value", "mass"])
def test_terms_that_kernels_make_as_on_a_gpu(remainder: Remainder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bias is compact: in float16 and without its base."""
    if not torch.cuda.is_available():  # there it is so anyway, and the oracle runs on the CPU
        for module in (moments, remainders):
            monkeypatch.setattr(module, "by_kernel", lambda *_: True)
    made = []
    launch = block_sparse._launchers["triton"]
    monkeypatch.setitem(block_sparse._launchers, "triton", lambda call: made.append(call.terms) or launch(call))
    plan = cases.random_plan(cases.RAGGED, heads=2).with_remainder(remainder)
    plan = replace(plan, head_remainders=torch.tensor([[3, 1]], dtype=torch.int8))
    q, k, v = cases.inputs(plan, 1, 2, 40, torch.bfloat16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)
    assert all(terms.bias.dtype == torch.float16 and terms.base > 1 for terms in made)


@pytest.mark.parametrize("remainder", ["mean", "value"])
def test_a_remainder_of_more_blocks_than_a_tile_holds(remainder: Remainder) -> None:
    """The tail's weights are rescaled when a later tile raises the maximum."""
    kept = torch.eye(50, dtype=torch.bool)[None, None]
    plan = cases.keeping(kept, [*range(0, 200, 4), 200], remainder=remainder)
    q, k, v = cases.inputs(plan, 1, 1, 24)
    k[..., 150:, :] += 0.3 * q[..., :50, :]
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


def test_heads_with_remainders_of_their_own() -> None:
    plan = cases.own_remainders()
    q, k, v = cases.inputs(plan, 2, 2, 16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


def test_heads_whose_terms_do_not_fit_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=3).with_remainder("value")
    plan = replace(plan, head_remainders=torch.tensor([[2, 0, 1]], dtype=torch.int8))
    q, k, v = cases.inputs(plan, 2, 3, 16)
    whole = run(q, k, v, plan)
    monkeypatch.setattr(block_sparse, "_TERMS_BYTES", 1 << 16)
    groups = []
    heads = block_sparse.Call.heads
    monkeypatch.setattr(block_sparse.Call, "heads", lambda *a: groups.append(a[1:]) or heads(*a))
    got = run(q, k, v, plan)
    assert len(set(groups)) > 1
    for one, other in zip(got, whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("remainder", ["mean", "value"])
def test_a_remainder_in_torchs_compiler_and_with_values_of_their_own_size(remainder: Remainder) -> None:
    plan = cases.random_plan(cases.RAGGED, heads=2).with_remainder(remainder).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in cases.inputs(plan, 1, 2, 16))
    v = v[..., :10]
    compiled = torch.compile(
        lambda q, k, v: sparse_attention(q, k, v, plan, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    want = sparse_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(compiled(q, k, v), want, rtol=1e-4, atol=1e-5)


def test_rows_without_a_key_or_a_remainder_are_empty() -> None:
    plan, (q, k, v) = cases.nothing_left("value")
    out, lse = run(q, k, v, plan)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)
    assert lse[..., 64:80].isneginf().all()
    assert lse[..., 50].isneginf().all()
