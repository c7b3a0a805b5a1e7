"""After their first call on a grid, methods plan without waiting for the device."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dit_sparse import (
    AdaSpa,
    AnchorAttention,
    Blade,
    DfsAttention,
    Dhsa,
    DraftAttention,
    LeastError,
    LServe,
    Lvsa,
    MInference,
    PbsAttention,
    Pisa,
    ProxyAttention,
    RadialAttention,
    Sale,
    SeerAttention,
    Site,
    SkipSoftmax,
    SlidingTile,
    SolAttention,
    SpargeAttention,
    SparseVideoGen,
    TokenGrid,
    VMoBA,
    XAttention,
)
from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels import block_mass, triton_mass
from dit_sparse.masks import select_density, top_k, top_p
from dit_sparse.methods.gate_file import Gate, write_gates
from dit_sparse.reorder import raster_order
from dit_sparse.types import AttentionPlan, Method, Previous
from tests.kernels.test_block_mass import needs_gpu, needs_interpreter

# Operators whose answer, or the shape of whose answer, must come back from the device.
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique2",
    "bincount",
    "repeat_interleave",
}


class NoWaiting(TorchDispatchMode):
    """Fails at an operator that would wait for a GPU if its tensors lay there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        kwargs = kwargs or {}
        assert name not in WAITING, f"{name} waits for the device"
        assert not (name == "_to_copy" and kwargs.get("device") is not None), "a copy between devices"
        if name in ("index", "index_put", "index_put_"):
            masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} by a bool mask waits for the device"
        return func(*args, **kwargs)


def test_the_guard_sees_what_waits() -> None:
    x = torch.arange(4)
    for waits in (lambda: int(x[0]), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool(x.sum() > 1)):
        with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
            waits()


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block mass goes to the Triton kernel, whose interpreter is left alone, and offsets are not looked at."""
    launch = triton_mass.block_mass

    def unwatched(*args: Any) -> Tensor:
        with _disable_current_modes():
            return launch(*args)

    monkeypatch.setattr(triton_mass, "block_mass", unwatched)
    for name in ("use_triton", "check_offsets"):
        monkeypatch.setattr(sys.modules[block_mass.__module__], name, lambda *_: True)


@needs_interpreter
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("row_stride", [1, 4])
def test_the_second_search_on_a_grid_reads_nothing_back(text: int, row_stride: int) -> None:
    torch.manual_seed(0)
    site = Site(TokenGrid(2, 5, 7, text_len=text))
    q, k = torch.randn(2, 1, 4, site.grid.num_tokens, 16)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    method = AdaSpa(density=0.4, block=16, row_stride=row_stride)
    want = method.plan(q, k, k, site, Previous(lse=lse))
    with NoWaiting():
        got = method.plan(q, k, k, site, Previous(lse=lse))
    assert torch.equal(got.block_mask.kept_blocks, want.block_mask.kept_blocks)


LANGUAGE_MODEL_METHODS = [
    MInference(0.4, block=16),
    PbsAttention(0.4, block=16, segment=32),
    PbsAttention(None, block=16, segment=32),
    ProxyAttention(0.4, block=16),
    ProxyAttention(None, block=16),
    AnchorAttention(0.4, block=16, segment=32),
    AnchorAttention(None, block=16, segment=32),
    LServe(0.4, block=16),
    Dhsa(0.4, tile=(1, 4, 4)),
    Sale(0.4, block=16),
    Sale(None, block=16),
]


METHODS_OF_2026 = [
    Pisa(0.4, block=16),
    Pisa(0.4, block=16, covariance=True),
    SolAttention(block=16),
    SolAttention(density=0.4, block=16),
    DfsAttention(0.4, block=16, tokens=4),
    Lvsa(block=16),
    SkipSoftmax(block=16),
    LeastError(0.4, tile=(1, 4, 4), rows=4),
    LeastError(error=0.2, tile=(1, 4, 4), rows=4),
]


@pytest.mark.parametrize("method", [*LANGUAGE_MODEL_METHODS, *METHODS_OF_2026], ids=str)
@pytest.mark.parametrize("text", [0, 5])
def test_the_second_plan_on_a_grid_reads_nothing_back(method: Method, text: int) -> None:
    torch.manual_seed(0)
    site = Site(TokenGrid(2, 5, 7, text_len=text))
    q, k = torch.randn(2, 2, 4, site.grid.num_tokens, 16)
    want = method.plan(q, k, k, site, None)
    with NoWaiting():
        got = method.plan(q, k, k, site, None)
    assert torch.equal(got.block_mask.kept_blocks, want.block_mask.kept_blocks)
    assert torch.equal(got.kv_order.index, want.kv_order.index)


def test_a_gate_reads_nothing_back(tmp_path) -> None:
    path, site = str(tmp_path / "gates.safetensors"), Site(TokenGrid(2, 5, 7, text_len=5))
    write_gates(path, {("transformer", 0): Gate(torch.randn(4, 16, 8), torch.randn(4, 48, 8))}, 16)
    method, q = SeerAttention(path, 0.4), torch.randn(1, 4, site.grid.num_tokens, 16)
    method.plan(q, q, q, site, None)
    with NoWaiting():
        method.plan(q, q, q, site, None)


def test_selections_and_masks_read_nothing_back() -> None:
    grid = TokenGrid(2, 5, 7, text_len=5)
    order = raster_order(grid, 16)
    scores = torch.rand(1, 2, order.num_blocks, order.num_blocks)
    AttentionPlan.from_kept(order, select_density(scores, 0.3, order, order, grid))  # reads the order's sizes, once
    with NoWaiting():
        kept = select_density(scores, 0.3, order, order, grid)
        top_k(scores, 2)
        top_p(scores, 0.9)
        BlockMask.from_bool(kept, order.offsets, order.offsets)
        AttentionPlan.from_kept(order, kept)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("row_stride", [1, 4])
def test_on_a_gpu_the_second_search_never_waits(row_stride: int) -> None:
    site = Site(TokenGrid(5, 16, 20, text_len=70))
    q, k = torch.randn(2, 1, 4, site.grid.num_tokens, 128, device="cuda", dtype=torch.bfloat16)
    method = AdaSpa(density=0.3, row_stride=row_stride)
    want = method.plan(q, k, k, site, None)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = method.plan(q, k, k, site, None)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(got.block_mask.kept_blocks, want.block_mask.kept_blocks)


VIDEO_METHODS = [
    SparseVideoGen(),
    RadialAttention(),
    SlidingTile(),
    XAttention(),
    XAttention(density=0.3),
    DraftAttention(),
    SpargeAttention(),
    SpargeAttention(density=0.3),
    VMoBA(),
    VMoBA(density=0.3),
    Blade(),
    Blade(density=0.3),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "method",
    [*LANGUAGE_MODEL_METHODS, *METHODS_OF_2026, *VIDEO_METHODS],
    ids=lambda m: f"{m.name} {getattr(m, 'density', None)}",
)
def test_on_a_gpu_no_second_plan_waits(method: Method) -> None:
    site = Site(TokenGrid(5, 16, 20, text_len=70), layer=1, num_layers=3)
    q, k, v = torch.randn(3, 2, 4, site.grid.num_tokens, 128, device="cuda", dtype=torch.bfloat16)
    want = method.plan(q, k, v, site, None)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = method.plan(q, k, v, site, None)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(got.block_mask.kept_blocks, want.block_mask.kept_blocks)
