"""The error that means leave, against loops over probes, blocks and tokens in float64."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import remainder_errors
from dit_sparse.kernels.remainder_error import divide_blocks
from dit_sparse.types import TokenOrder
from tests.kernels import cases
from tests.kernels.test_block_mass import needs_gpu, needs_interpreter

BOUNDS = [cases.EVEN, cases.RAGGED, cases.TEXT, cases.UNEVEN]


def order_of(*heads: list[int]) -> TokenOrder:
    offsets = torch.tensor(heads, dtype=torch.int32)[None]
    return TokenOrder.from_index(torch.arange(heads[0][-1]).expand(1, len(heads), -1), offsets)


def by_loops(q: Tensor, k: Tensor, v: Tensor, q_bounds: list[int], k_bounds: list[int], probes: int, scale: float):
    """Squared errors of one head, `q, k, v` `[N, D]`, in their dtype."""
    errors = torch.zeros(len(q_bounds) - 1, len(k_bounds) - 1, dtype=q.dtype)
    for i, (first, last) in enumerate(pairwise(q_bounds)):
        cuts = [first + (last - first) * p // probes for p in range(probes + 1)]
        for a, b in pairwise(cuts):
            if a == b:
                continue
            probe = q[a:b].mean(0)
            weights = (scale * (k @ probe)).softmax(0)
            total = (scale * (k @ probe)).logsumexp(0)
            for j, (c, d) in enumerate(pairwise(k_bounds)):
                if c == d:
                    continue
                of_mean = (scale * (k[c:d].mean(0) @ probe) - total).exp() * v[c:d].mean(0)
                for t in range(c, d):
                    errors[i, j] += (weights[t] * v[t] - of_mean).square().sum() * (b - a) / (last - first)
    return errors


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype", "probes"),
    [
        ("torch", torch.float32, 1),
        ("torch", torch.bfloat16, 3),
        ("torch", torch.float64, 3),
        pytest.param("triton", torch.float32, 3, marks=needs_interpreter),
        pytest.param("triton", torch.bfloat16, 1, marks=needs_interpreter),
    ],
    ids=str,
)
def test_equals_a_loop_over_tokens(
    bounds: list[int], backend: str, dtype: torch.dtype, probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[remainder_errors.__module__]
    monkeypatch.setattr(module, "_CHUNK_SCORES", 300)
    monkeypatch.setattr(module, "_SPAN", 4)
    q, k, v = (x[0, 0] for x in cases.inputs(cases.full_plan(bounds[-1]), 1, 1, 24, dtype))
    want = by_loops(q.double(), k.double(), v.double(), bounds, bounds, probes, 0.3)
    plain = by_loops(q.float(), k.float(), v.float(), bounds, bounds, probes, 0.3).double()
    found = remainder_errors(
        *(x[None, None] for x in (q, k, v)), order_of(bounds), order_of(bounds), probes=probes, scale=0.3,
        backend=backend,
    )[0, 0]  # fmt: skip
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Terms as large as all weights and values together are subtracted, and probes have the keys' type in the kernel.
    eps = torch.finfo(dtype if backend == "triton" else found.dtype).eps
    rows = want.amax(-1, keepdim=True)
    assert ((found.exp() - want).abs() <= 2 * (plain - want).abs() + 16 * eps * rows).all()
    assert torch.equal(found.argmax(-1), want.argmax(-1))


def test_heads_have_blocks_of_their_own() -> None:
    heads, draw = [[0, 10, 50, 90], [0, 45, 45, 90]], cases.generator()
    q, k, v = torch.randn(3, 2, 2, 90, 16, generator=draw, dtype=torch.float64)
    found = remainder_errors(q, k, v, order_of(heads[1], heads[0]), order_of(*heads)).exp()
    for b in range(2):
        for h in range(2):
            want = by_loops(q[b, h], k[b, h], v[b, h], heads[1 - h], heads[h], 1, 0.25)
            torch.testing.assert_close(found[b, h], want)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_equal_tokens_leave_nothing_and_one_outlier_much(backend: str) -> None:
    """A mean stands for equal tokens; the block with one key that holds the mass must come first."""
    q, k, v = torch.zeros(3, 1, 1, 64, 16)
    q[..., 0], k[..., 0, 40, 0] = 4.0, 8.0
    v[..., 0, 40, 1] = 1.0
    order = order_of(list(range(0, 65, 16)))
    found = remainder_errors(q, k, v, order, order, backend=backend)[0, 0]
    assert (found.argmax(-1) == 2).all()
    assert found[:, [0, 1, 3]].isneginf().all()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (100 * x for x in cases.inputs(cases.full_plan(96), 1, 1, 16))
    found = remainder_errors(q, k, v, order_of(cases.EVEN), order_of(cases.EVEN))
    assert not found.isnan().any()
    assert not found.isposinf().any()
    assert found.amax(-1).isfinite().all()


def test_blocks_are_divided_evenly() -> None:
    offsets = torch.tensor([[[0, 10, 10, 11, 16]]], dtype=torch.int32)
    assert divide_blocks(offsets, 3)[0, 0].tolist() == [0, 3, 6, 10, 10, 10, 10, 10, 10, 11, 12, 14, 16]
    assert torch.equal(divide_blocks(offsets, 1), offsets)


def test_names_what_does_not_fit() -> None:
    q, order = torch.zeros(1, 1, 96, 16), order_of(cases.EVEN)
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        remainder_errors(q, q, q, order, order, probes=0)
    with pytest.raises(ValueError, match="q, k, v must agree"):
        remainder_errors(q, q, q[:, :, :5], order, order)
    with pytest.raises(ValueError, match="backend must be"):
        remainder_errors(q, q, q, order, order, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bounds", [*BOUNDS, list(range(0, 4097, 64))], ids=lambda b: f"{len(b)} bounds")
@pytest.mark.parametrize("dim", [64, 128, 80])
def test_on_a_gpu_the_kernel_agrees_with_torch(bounds: list[int], dim: int) -> None:
    order = order_of(bounds).to("cuda")
    q, k, v = torch.randn(3, 2, 3, bounds[-1], dim, device="cuda", dtype=torch.bfloat16)
    want = remainder_errors(q.double(), k.double(), v.double(), order, order, probes=2, backend="torch").exp()
    found = remainder_errors(q, k, v, order, order, probes=2, backend="triton").double().exp()
    assert (found - want).abs().max() <= 0.05 * want.max()
