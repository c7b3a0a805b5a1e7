"""The Hopper backend: what it refuses anywhere, and against float64 on a GPU of compute capability 9.0.

Gluon has no interpreter, so without such a GPU only test_compiled.py sees its kernel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import get_backend, select
from dit_sparse.kernels.backend import BackendUnavailableError
from dit_sparse.kernels.hopper_backend import _plain_run
from dit_sparse.kernels.hopper_launch import aligned, is_aligned
from dit_sparse.types import AttentionPlan, BlockGeometry, BlockMask, Remainder
from tests.kernels import cases

HOPPER = get_backend("hopper")
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HAS_HOPPER, reason="no NVIDIA GPU of compute capability 9.0")


def run(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    plan = plan.to("cuda")
    q, k, v = (x.to("cuda") for x in (q, k, v))
    assert HOPPER.unavailable(q.device) is None
    assert HOPPER.refuses(q, k, v, plan) is None
    out, lse = HOPPER.forward(q, k, v, plan, scale=scale, return_lse=True)
    assert lse is not None
    assert torch.equal(HOPPER.forward(q, k, v, plan, scale=scale, return_lse=False)[0], out)
    return out.cpu(), lse.cpu()


def even(tokens: int, size: int) -> list[int]:
    return [*range(0, tokens, size), tokens]


def test_says_what_it_cannot_do() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    half = [x.half() for x in (q, k, v)]
    assert HOPPER.refuses(*half, plan) is None
    assert "float32" in str(HOPPER.refuses(q, k, v, plan))
    assert "multiple of 8" in str(HOPPER.refuses(*(x[..., :10] for x in half), plan))
    assert "at most 128" in str(HOPPER.refuses(*(x.repeat(1, 1, 1, 9) for x in half), plan))
    assert "the same for values" in str(HOPPER.refuses(half[0], half[1], half[2][..., :8], plan))
    assert "no backward" in str(HOPPER.refuses(half[0].requires_grad_(), *half[1:], plan))


def test_large_uneven_blocks_go_to_another_kernel() -> None:
    plan = cases.random_plan([0, 200, 300, 320, 400])
    half = [x.half() for x in cases.inputs(plan, 1, 1, 16)]
    assert "must be even" in str(HOPPER.refuses(*half, plan))
    assert HOPPER.refuses(*half, cases.random_plan(even(400, 200))) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_is_not_there_on_a_cpu() -> None:
    plan = cases.random_plan(cases.EVEN)
    half = [x.half() for x in cases.inputs(plan, 1, 1, 16)]
    with pytest.raises(BackendUnavailableError, match="use 'triton' or, on a CPU, 'gather'"):
        select("hopper", *half, plan)


def test_only_blocks_that_fill_their_tiles_go_unmasked() -> None:
    assert _plain_run(BlockGeometry(128, 2, 9), 128) == (2, 9)
    assert _plain_run(BlockGeometry(256, 0, 3), 128) == (0, 3)
    assert _plain_run(BlockGeometry(100, 0, 9), 128) == (0, 0)


def test_tensors_that_tma_cannot_address_are_copied() -> None:
    x = torch.randn(2, 50, 3, 16, dtype=torch.float16)
    assert is_aligned(x.transpose(1, 2))
    assert not is_aligned(x[..., 1:9])
    assert not is_aligned(x[:, :, :1].expand(-1, -1, 3, -1))
    for odd in (x[..., 1:9], x[:, :, :1].expand(-1, -1, 3, -1)):
        assert is_aligned(aligned(odd))
        assert torch.equal(aligned(odd), odd)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 40, 64, 96, 128])
@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64), (128, 128), (100, 256)], ids=str)
def test_every_dtype_head_dim_and_block_size(dtype: torch.dtype, dim: int, blocks: tuple[int, int]) -> None:
    orders = [cases.random_order([even(700, size)], 1, 2, seed=size) for size in blocks]
    kept = torch.rand(1, 2, *(order.num_blocks for order in orders), generator=cases.generator()) < 0.5
    plan = AttentionPlan(*orders, BlockMask.from_bool(kept, *(order.offsets for order in orders)))
    q, k, v = cases.inputs(plan, 2, 2, dim, dtype)
    cases.assert_as_good_as_torch(run(q, k, v, plan, dim**-0.5), q, k, v, cases.position_mask(plan), dim**-0.5)


@on_hopper
@pytest.mark.gpu
def test_partial_blocks_empty_rows_and_text() -> None:
    bounds = [0, 77, *range(141, 717, 64), 740]
    blocks = len(bounds) - 1
    kept = torch.rand(1, 2, blocks, blocks, generator=cases.generator()) < 0.4
    kept[:, :, 3] = False
    partial = torch.rand(1, 2, blocks, blocks, generator=cases.generator(1)) < 0.5
    plan = cases.keeping(kept, bounds, partial=partial, predicate=lambda b, h, i, j: (i + 2 * j + h) % 5 < 2)
    q, k, v = cases.inputs(plan, 1, 2, 128, torch.bfloat16)
    out, lse = run(q, k, v, plan)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)
    assert lse[:, :, bounds[3] : bounds[4]].isneginf().all()


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("name", list(cases.remainder_plans()))
def test_remainders_of_every_plan(name: str) -> None:
    plan = cases.remainder_plans()[name].with_remainder("value")
    q, k, v = cases.inputs(plan, 2, 2, 16, torch.bfloat16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("remainder", "dim", "dtype"),
    [
        ("mean", 128, torch.bfloat16),
        ("value", 128, torch.bfloat16),
        ("mass", 128, torch.bfloat16),
        ("value", 64, torch.bfloat16),
        ("value", 40, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128), (256, 256)], ids=str)
def test_every_remainder_of_every_block_size(
    remainder: Remainder, blocks: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    orders = [cases.random_order([even(5 * max(blocks) + 30, size)], 1, 2, seed=size) for size in blocks]
    kept = torch.rand(1, 2, *(order.num_blocks for order in orders), generator=cases.generator()) < 0.3
    mask = BlockMask.from_bool(kept, *(order.offsets for order in orders))
    plan = AttentionPlan(*orders, mask, remainder)
    q, k, v = cases.inputs(plan, 1, 2, dim, dtype)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan, dim**-0.5), q, k, v, plan, dim**-0.5)


@on_hopper
@pytest.mark.gpu
def test_more_means_than_a_tile_holds() -> None:
    plan = cases.random_plan(even(4800, 32), heads=2).with_remainder("value")
    q, k, v = cases.inputs(plan, 1, 2, 64, torch.bfloat16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan, 0.125), q, k, v, plan, 0.125)


@on_hopper
@pytest.mark.gpu
def test_heads_with_remainders_of_their_own() -> None:
    plan = cases.own_remainders()
    q, k, v = cases.inputs(plan, 2, 2, 16, torch.bfloat16)
    cases.assert_plan_as_good_as_torch(run(q, k, v, plan), q, k, v, plan, 0.3)


@on_hopper
@pytest.mark.gpu
def test_a_step_with_a_cached_plan_is_captured_in_a_graph() -> None:
    plan = cases.random_plan(even(700, 64), heads=2).to("cuda")
    q, k, v = (x.to("cuda") for x in cases.inputs(plan, 1, 2, 64, torch.bfloat16))
    for backend in (HOPPER, get_backend("triton")):
        want = backend.forward(q, k, v, plan, scale=0.125, return_lse=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = backend.forward(q, k, v, plan, scale=0.125, return_lse=True)
        for x in got:
            x.fill_(float("nan"))
        graph.replay()
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)


@on_hopper
@pytest.mark.gpu
def test_compiles_as_one_graph() -> None:
    from dit_sparse import sparse_attention

    plan = cases.random_plan(even(700, 64), heads=2).to("cuda")
    q, k, v = (x.to("cuda") for x in cases.inputs(plan, 1, 2, 64, torch.bfloat16))
    attend = lambda q, k, v: sparse_attention(q * 2, k, v, plan, backend="hopper") + 1  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True)
    assert torch.allclose(compiled(q, k, v), attend(q, k, v), atol=2e-2)
