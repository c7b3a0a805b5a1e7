"""The kernel that weighs blocks' means against plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from dit_sparse.kernels import remainder
from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.moments import Moments, block_moments
from dit_sparse.types import Remainder
from tests.kernels import cases

pytest.importorskip("triton", reason="triton is not installed")

from dit_sparse.kernels.triton_terms import weigh_by_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.5
ORDER = cases.random_order([cases.UNEVEN, [0, *cases.UNEVEN[2:], cases.UNEVEN[-1]]], 1, 2)


def on_device(moments: Moments) -> Moments:
    return Moments(*(None if x is None else x.to(DEVICE) for x in moments))


@pytest.mark.parametrize("name", ["mean", "value", "mass"])
@pytest.mark.parametrize("own", [None, (3, 1), (2, 0)], ids=str)
@pytest.mark.parametrize(("dtype", "compact"), [(torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_equals_plain_torch(name: Remainder, dtype: torch.dtype, compact: bool, own: tuple[int, int] | None) -> None:
    layout = BlockLayout(ORDER.offsets, ORDER.geometry, ORDER.num_tokens)
    draw = cases.generator()
    q, k, v = (torch.randn(2, 2, ORDER.num_tokens, 24, generator=draw).to(dtype) for _ in range(3))
    queries, keys = block_moments(q, layout, centred=False), block_moments(k, layout, v, products=name != "mean")
    blocks = ORDER.num_blocks
    if keys.products is not None:  # as a GPU has them, with more than there are blocks
        keys = keys._replace(products=torch.nn.functional.pad(keys.products, (0, 0, 0, 0, 0, -blocks % 8)))
    kept = torch.rand(1, 2, blocks, blocks, generator=draw) < 0.3
    kept[:, :, 1] = True  # a row without a remainder

    levels = None if own is None else torch.tensor([own], dtype=torch.int8)
    bias = remainder._bias(queries, keys, layout, kept, SCALE, name, levels)
    assert bias.isfinite().any()
    assert (bias.isneginf() & ~kept).any()  # empty blocks, and those that spread too far
    there = BlockLayout(ORDER.offsets.to(DEVICE), ORDER.geometry, ORDER.num_tokens)
    base, kind = (math.log(ORDER.geometry.largest), torch.float16) if compact else (0.0, torch.float32)
    limit = remainder.LARGEST_SPREAD
    levels_there = None if levels is None else levels.to(DEVICE)
    given = on_device(queries), on_device(keys), there, kept.to(DEVICE), SCALE, name, levels_there
    got, weights = weigh_by_triton(*given, limit, base, kind)
    assert got.dtype == kind
    assert got.shape[-1] == 128
    assert got[..., blocks:].isneginf().all()
    torch.testing.assert_close(got[..., :blocks].cpu().float() + base, bias, rtol=0, atol=2e-3 if compact else 5e-5)
    if keys.products is None:
        assert weights is None
        return
    assert weights is not None
    want = remainder._weights(queries, keys, bias, SCALE, levels)
    assert weights.shape == want.shape
    assert not weights[:, :, 1].any()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(weights.cpu(), want, rtol=2 * unit, atol=unit)
