"""Block masses and block means against float64 loops over blocks."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import block_mass, dense_attention, pooled_blocks, sample_rows, sampled_block_mass
from dit_sparse.types import BlockGeometry, TokenOrder
from tests.kernels import cases

BOUNDS = [cases.EVEN, cases.RAGGED, cases.TEXT, cases.UNEVEN]
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs triton, and its interpreter, which is off on a GPU machine",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def offsets(*bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)[None]


def by_loops(pairs: Tensor, q_bounds: list[int], k_bounds: list[int]) -> Tensor:
    rows = [
        torch.stack([pairs[..., a:b, c:d].sum((-1, -2)) for c, d in pairwise(k_bounds)], -1)
        for a, b in pairwise(q_bounds)
    ]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_equals_a_loop_over_blocks(
    bounds: list[int], dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[block_mass.__module__], "_CHUNK_SCORES", chunk)
    plan = cases.keeping(torch.ones(1, 1, len(bounds) - 1, len(bounds) - 1, dtype=torch.bool), bounds)
    q, k, _ = cases.inputs(plan, 2, 2, 32, dtype)
    scores = q.double() @ k.double().transpose(-1, -2) * 0.3
    # Any row sums will do, not only the softmax's own.
    lse = scores.logsumexp(-1) + torch.rand(scores.shape[:-1], generator=cases.generator())
    want = by_loops((scores - lse[..., None]).exp(), bounds, bounds)
    plain = (q.float() @ k.float().transpose(-1, -2) * 0.3 - lse.float()[..., None]).exp()
    got = block_mass(q, k, lse.float(), offsets(bounds), offsets(bounds), scale=0.3)
    floor = 4 * torch.finfo(torch.float32).eps * want.max()
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 2 * (by_loops(plain, bounds, bounds) - want).abs().max() + floor


def test_offsets_per_head_and_different_lengths() -> None:
    heads = [[0, 10, 50, 90], [0, 45, 45, 90]]
    draw = cases.generator()
    q, k = (torch.randn(2, 2, n, 16, generator=draw) for n in (90, 96))
    scores = q.double() @ k.double().transpose(-1, -2) * 0.3
    got = block_mass(q, k, scores.logsumexp(-1).float(), offsets(*heads), offsets(cases.EVEN), scale=0.3)
    want = torch.stack([by_loops(scores.softmax(-1)[:, h], heads[h], cases.EVEN) for h in range(2)], 1)
    assert (got - want).abs().max() <= 1e2 * torch.finfo(torch.float32).eps * want.max()


def test_rows_sum_to_the_number_of_queries() -> None:
    q, k, v = cases.inputs(cases.full_plan(91), 1, 2, 16)
    lse = dense_attention(q, k, v, return_lse=True)[1]
    mass = block_mass(q, k, lse, offsets(cases.RAGGED), offsets(cases.RAGGED), scale=16**-0.5)
    sizes = torch.tensor(cases.RAGGED).diff().float().expand(1, 2, -1)
    torch.testing.assert_close(mass.sum(-1), sizes)


def test_rows_that_kept_nothing_have_no_mass() -> None:
    q, k, _ = cases.inputs(cases.full_plan(96), 1, 1, 16)
    lse = torch.full((1, 1, 96), float("-inf"))
    assert not block_mass(q, k, lse, offsets(cases.EVEN), offsets(cases.EVEN), scale=0.3).any()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (100 * x for x in cases.inputs(cases.full_plan(96), 1, 1, 16))
    lse = dense_attention(q, k, v, scale=0.3, return_lse=True)[1]
    mass = block_mass(q, k, lse, offsets(cases.EVEN), offsets(cases.EVEN), scale=0.3)
    # Row sums near 1e5 have steps of 1/128 in float32, and the mass is as exact as they are.
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 1, 6), 16.0), rtol=1 / 64, atol=0)


def test_names_what_does_not_fit() -> None:
    q = torch.zeros(1, 1, 96, 16)
    with pytest.raises(ValueError, match="q and k must agree"):
        block_mass(q, q[..., :8], q[..., 0], offsets(cases.EVEN), offsets(cases.EVEN), scale=1.0)
    with pytest.raises(ValueError, match=r"lse must be \(1, 1, 96\)"):
        block_mass(q, q, q[..., :5, 0], offsets(cases.EVEN), offsets(cases.EVEN), scale=1.0)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_interpreter)])
def test_pooled_blocks_are_means(bounds: list[int], dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel does not take float64")
    x = torch.randn(2, bounds[-1], 3, 24, generator=cases.generator()).to(dtype).transpose(1, 2)
    got = pooled_blocks(x, offsets(bounds), backend=backend)
    pieces = [x.double()[:, :, a:b] for a, b in pairwise(bounds)]
    want = torch.stack([p.mean(2) if p.shape[2] else p.sum(2) for p in pieces], 2)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got - want).abs().max() <= 8 * torch.finfo(got.dtype).eps * x.double().abs().max()


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 100])
def test_sampled_rows_are_spread_over_every_block(stride: int) -> None:
    bounds = [0, 1, 3, 10, 26, 31]
    rows, got = sample_rows(torch.tensor([[bounds]], dtype=torch.int32), stride)
    found = [rows[a:b].tolist() for a, b in pairwise(got[0, 0])]
    for (start, end), taken in zip(pairwise(bounds), found, strict=True):
        assert taken == list(range(start + min(stride // 2, end - start - 1), end, stride))


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_interpreter)])
def test_pooled_blocks_per_head(backend: str) -> None:
    heads = [[0, 10, 50, 90], [0, 45, 45, 90]]
    x = torch.randn(2, 2, 90, 8, generator=cases.generator())
    got = pooled_blocks(x, offsets(*heads), backend=backend)
    for h, bounds in enumerate(heads):
        torch.testing.assert_close(got[:, h : h + 1], pooled_blocks(x[:, h : h + 1], offsets(bounds)))


def test_pooled_blocks_name_what_does_not_fit() -> None:
    x = torch.zeros(1, 1, 96, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x must be \[B, H, N, D\]"):
        pooled_blocks(x[0], offsets(cases.EVEN))
    with pytest.raises(ValueError, match="rise from 0 to the 96 tokens"):
        pooled_blocks(x, offsets([0, 50, 40, 96]))
    with pytest.raises(ValueError, match=r"offsets must be int32 \[1\|1, 1\|1, M\+1\]"):
        pooled_blocks(x, offsets(cases.EVEN).long())


# Blocks as large as a tile of the interpreter's, half, a quarter and twice as large, and with text before and behind.
TILED = [
    [*range(0, 129, 32)],
    [*range(0, 96, 8), 91],
    [0, 3, *range(11, 90, 8), 90, 94],
    [0, 7, 71, 135, 150],
    [0, 5, 10, 15],
]


@needs_interpreter
@pytest.mark.parametrize(
    ("bounds", "dtype"),
    [
        *((bounds, torch.bfloat16) for bounds in (*BOUNDS, *TILED)),
        *((cases.RAGGED, dtype) for dtype in (torch.float32, torch.float16)),
    ],
    ids=str,
)
def test_triton_says_the_same(bounds: list[int], dtype: torch.dtype) -> None:
    draw = cases.generator()
    for q_bounds, k_bounds in ((bounds, [0, 40, 80, 96, 130]), (cases.RAGGED, bounds)):
        q, k = (torch.randn(1, 2, n, 24, generator=draw).to(dtype) for n in (q_bounds[-1], k_bounds[-1]))
        lse = (q.double() @ k.double().transpose(-1, -2) * 0.3).logsumexp(-1).float()
        lse[:, :, 3] = float("-inf")
        arguments = (q, k, lse, offsets(q_bounds), offsets(k_bounds))
        want = block_mass(*arguments, scale=0.3, backend="torch")
        got = block_mass(*arguments, scale=0.3, backend="triton")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_interpreter
def test_triton_takes_offsets_per_head_and_given_sizes() -> None:
    q_offsets, k_offsets = offsets([0, 10, 50, 90], [0, 45, 45, 90]), offsets([0, 16, 32, 96], [0, 16, 48, 96])
    q, k = (torch.randn(2, n, 2, 16, generator=cases.generator()).transpose(1, 2) for n in (90, 96))
    lse = (q @ k.transpose(-1, -2) * 0.3).logsumexp(-1)
    sizes = {"q_blocks": BlockGeometry.of(q_offsets), "k_blocks": BlockGeometry.of(k_offsets)}
    want = block_mass(q, k, lse, q_offsets, k_offsets, scale=0.3, backend="torch")
    got = block_mass(q, k, lse, q_offsets, k_offsets, scale=0.3, backend="triton", **sizes)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_sampled_mass_is_that_of_the_sampled_rows(backend: str, stride: int) -> None:
    order = TokenOrder.from_index(torch.arange(97), torch.tensor(cases.TEXT), is_identity=True)
    q, k = torch.randn(2, 2, 2, 97, 16, generator=cases.generator())
    scores = q.double() @ k.double().transpose(-1, -2) * 0.3
    rows, bounds = sample_rows(order.offsets, stride)
    want = by_loops(scores.softmax(-1)[:, :, rows], bounds[0, 0].tolist(), cases.TEXT)
    lse = scores.logsumexp(-1).float()
    got = sampled_block_mass(q, k, lse, order, order, stride=stride, scale=0.3, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_sampled_mass_names_what_does_not_fit() -> None:
    order = TokenOrder.from_index(torch.arange(90), offsets([0, 10, 90], [0, 45, 90]))
    q = torch.zeros(1, 2, 90, 8)
    with pytest.raises(ValueError, match=r"offsets must be \[1, 1, M\+1\] to sample rows, got \(1, 2, 3\)"):
        sampled_block_mass(q, q, q[..., 0], order, order, stride=4, scale=1.0)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        sample_rows(offsets(cases.EVEN), 0)


def test_the_default_dtype_plays_no_part() -> None:
    q, k = torch.randn(2, 1, 1, 96, 16, generator=cases.generator())
    lse = (q @ k.transpose(-1, -2)).logsumexp(-1)
    want = block_mass(q, k, lse, offsets(cases.EVEN), offsets(cases.EVEN), scale=1.0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        got = block_mass(q, k, lse, offsets(cases.EVEN), offsets(cases.EVEN), scale=1.0)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (cases.RAGGED, "k_offsets must rise from 0 to the 96 tokens"),
        ([0, 50, 40, 96], "k_offsets must rise"),
        ([1, 96], "k_offsets must rise"),
    ],
)
def test_offsets_that_do_not_cut_the_tokens_are_refused(bad: list[int], message: str) -> None:
    q = torch.randn(1, 1, 96, 16)
    with pytest.raises(ValueError, match=message):
        block_mass(q, q, q[..., 0], offsets(cases.EVEN), offsets(bad), scale=1.0)


def test_backends_that_cannot_take_a_call_say_so() -> None:
    q = torch.randn(1, 1, 96, 16)
    with pytest.raises(ValueError, match="'auto', 'torch' or 'triton', got 'fast'"):
        block_mass(q, q, torch.zeros(1, 1, 96), offsets(cases.EVEN), offsets(cases.EVEN), scale=1.0, backend="fast")


@needs_interpreter
def test_triton_refuses_float64() -> None:
    q = torch.randn(1, 1, 96, 16, dtype=torch.float64)
    arguments = (q, q, torch.zeros(1, 1, 96), offsets(cases.EVEN), offsets(cases.EVEN))
    with pytest.raises(ValueError, match=r"got torch.float64; use 'torch'"):
        block_mass(*arguments, scale=1.0, backend="triton")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bounds", [*BOUNDS, [*range(0, 1000, 64), 1000], [*range(0, 1000, 128), 1000]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 72, 128, 256])
def test_on_a_gpu_triton_says_the_same(bounds: list[int], dtype: torch.dtype, dim: int) -> None:
    q, k = (torch.randn(2, bounds[-1], 3, dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(2))
    cut = offsets(bounds).cuda()
    lse = (q.double() @ k.double().transpose(-1, -2) * dim**-0.5).logsumexp(-1).float()
    arguments = (q, k, lse, cut, cut)
    want = block_mass(*(x.cpu() for x in arguments), scale=dim**-0.5)
    got = block_mass(*arguments, scale=dim**-0.5)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled_blocks(q, cut).cpu(), pooled_blocks(q.cpu(), cut.cpu()), rtol=1e-5, atol=1e-5)
