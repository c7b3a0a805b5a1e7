"""Moments of blocks against a loop in float64, by torch and by the kernel."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.kernels import moments
from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.moments import Moments, block_moments, moments_by_triton
from tests.kernels import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def literal(x: torch.Tensor, v: torch.Tensor, layout: BlockLayout, centred: bool) -> Moments:
    batch, heads, _, dim = x.shape
    blocks = layout.offsets.shape[-1] - 1
    found = Moments(
        torch.zeros(batch, heads, blocks, dim).double(),
        torch.zeros(batch, heads, blocks, dim).double(),
        torch.zeros(batch, heads, blocks, v.shape[-1]).double(),
        torch.zeros(batch, heads, blocks, dim, v.shape[-1]).double(),
    )
    for b in range(batch):
        for h in range(heads):
            bounds = layout.offsets[b % layout.offsets.shape[0], h % layout.offsets.shape[1]].tolist()
            for j in range(blocks):
                tokens, values = (t[b, h, bounds[j] : bounds[j + 1]].double() for t in (x, v))
                if len(tokens):
                    mean = tokens.mean(0)
                    apart = tokens - mean if centred else tokens
                    parts = mean, (apart**2).mean(0), values.mean(0), apart.T @ values / len(tokens)
                    for place, part in zip(found[:4], parts, strict=True):
                        assert place is not None
                        place[b, h, j] = part
    return found


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", [cases.EVEN, cases.RAGGED, cases.UNEVEN], ids=str)
@pytest.mark.parametrize("dims", [(24, 40), (16, 200)])
def test_equals_a_loop(kernel: bool, dtype: torch.dtype, bounds: list[int], dims: tuple[int, int]) -> None:
    order = cases.random_order([bounds, [0, *bounds[2:], bounds[-1]]], 1, 2)
    layout = BlockLayout(order.offsets, order.geometry, order.num_tokens)
    draw = cases.generator()
    x, v = (torch.randn(2, order.num_tokens, 2, d, generator=draw).to(dtype).transpose(1, 2) for d in dims)
    if kernel:
        pytest.importorskip("triton", reason="triton is not installed")
        on_device = BlockLayout(order.offsets.to(DEVICE), order.geometry, order.num_tokens)
        got = moments_by_triton(x.to(DEVICE), on_device, v.to(DEVICE), products=True)
        queries = moments_by_triton(x.to(DEVICE), on_device, centred=False)
    else:
        got = block_moments(x, layout, v, products=True)
        queries = block_moments(x, layout, centred=False)
    want = literal(x, v, layout, True)
    assert got.products is not None
    assert got.products.dtype == dtype
    for name in ("mean", "square", "v_mean"):
        torch.testing.assert_close(getattr(got, name).cpu().double(), getattr(want, name), rtol=1e-5, atol=1e-6)
    unit = torch.finfo(dtype).eps
    blocks = order.num_blocks
    assert not got.products[:, :, blocks:].any()
    assert got.products.shape[2] == (-(-blocks // 8) * 8 if kernel else blocks)
    torch.testing.assert_close(got.products[:, :, :blocks].cpu().double(), want.products, rtol=2 * unit, atol=2 * unit)
    torch.testing.assert_close(queries.mean.cpu().double(), want.mean, rtol=1e-5, atol=1e-6)
    squares = literal(x, v, layout, False).square
    torch.testing.assert_close(queries.square.cpu().double(), squares, rtol=1e-5, atol=1e-6)
    assert queries.v_mean is None


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("largest", [64, 100, 256, 300, 512])
def test_tiles_of_products(monkeypatch: pytest.MonkeyPatch, hopper: bool, largest: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cpu":
        monkeypatch.setattr(moments, "_on_hopper", lambda _: hopper)
    elif hopper != (torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("for another GPU")
    order = cases.random_order([[*range(0, 5 * largest, largest), 5 * largest + 7 - largest]], 1, 1)
    layout = BlockLayout(order.offsets, order.geometry, order.num_tokens)
    x, v = (torch.randn(1, 1, layout.tokens, 128, generator=cases.generator(i)).bfloat16() + 1 for i in range(2))
    there = BlockLayout(layout.offsets.to(DEVICE), layout.blocks, layout.tokens)
    got = moments_by_triton(x.to(DEVICE), there, v.to(DEVICE), products=True)
    want = literal(x, v, layout, True)
    assert got.products is not None
    assert want.products is not None
    off = (got.products[:, :, : order.num_blocks].cpu().double() - want.products).norm() / want.products.norm()
    assert off < 2**-7, off
    torch.testing.assert_close(got.square.cpu().double(), want.square, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("bounds", [cases.EVEN, cases.UNEVEN, [0, 300, 301]], ids=str)
def test_rounded_means_are_the_means(kernel: bool, products: bool, bounds: list[int]) -> None:
    order = cases.random_order([bounds], 1, 1)
    layout = BlockLayout(order.offsets, order.geometry, order.num_tokens)
    x, v = (torch.randn(2, 2, layout.tokens, 24, generator=cases.generator(i)).bfloat16() for i in range(2))
    if kernel:
        pytest.importorskip("triton", reason="triton is not installed")
        there = BlockLayout(layout.offsets.to(DEVICE), layout.blocks, layout.tokens)
        got = moments_by_triton(x.to(DEVICE), there, v.to(DEVICE), products=products, rounded=True)
    else:
        got = block_moments(x, layout, v, products=products, rounded=True)
    want = literal(x, v, layout, True)
    assert got.rounded is not None
    assert got.v_rounded is not None
    assert got.v_rounded.dtype == got.rounded.dtype == torch.bfloat16
    torch.testing.assert_close(got.mean.cpu().double(), want.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.square.cpu().double(), want.square, rtol=1e-5, atol=1e-6)
    for mine, exact in ((got.rounded, want.mean), (got.v_rounded, want.v_mean)):
        assert exact is not None
        torch.testing.assert_close(mine.cpu().double(), exact, rtol=2**-7, atol=1e-6)  # interpreted, it is cut


@pytest.mark.parametrize("kernel", [False, True])
def test_products_beyond_float16_stay_finite(kernel: bool) -> None:
    order = cases.random_order([cases.EVEN], 1, 1)
    layout = BlockLayout(order.offsets, order.geometry, order.num_tokens)
    draw = torch.randn(1, 1, layout.tokens, 16, generator=cases.generator()).sign()
    x, v = (400 * draw).half(), (400 * draw.flip(-1)).half()
    x[:, :, :, 0] = v[:, :, :, 0] = float("nan")
    if kernel:
        pytest.importorskip("triton", reason="triton is not installed")
        there = BlockLayout(layout.offsets.to(DEVICE), layout.blocks, layout.tokens)
        products = moments_by_triton(x.to(DEVICE), there, v.to(DEVICE), products=True).products
    else:
        products = block_moments(x, layout, v, products=True).products
    assert products is not None
    assert (products[:, :, : order.num_blocks, 1:, 1:].abs() == 65504).any()
    assert products[:, :, : order.num_blocks, 1:, 1:].isfinite().all()
    assert products[:, :, : order.num_blocks, 0].isnan().all()  # what is no number is not hidden


def test_splitting_and_joining_undo_each_other() -> None:
    order = cases.random_order([cases.UNEVEN, [0, 60, 61, 80, 100, 121, 121]], 1, 2)
    layout = BlockLayout(order.offsets, order.geometry, order.num_tokens)
    x = torch.randn(2, 2, order.num_tokens, 3)
    parts = layout.split(x)
    assert parts.shape == (2, 2, 6, order.geometry.largest, 3)
    assert torch.equal(layout.join(parts), x)
    torch.testing.assert_close(parts.sum((2, 3)), x.sum(2))  # the padding is zeros
