"""What holds for every registered method on any grid: no query without a key, text kept, no input changed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dit_sparse import Schedule, Site, TokenGrid, sparse_attention
from dit_sparse.methods import METHODS, find_method
from dit_sparse.methods.gate_file import Gate, write_gates
from dit_sparse.methods.parameters import (
    accepts_density,
    head_orders,
    overridden,
    threshold_name,
    with_density,
    with_threshold,
)
from dit_sparse.types import Method

HEADS, DIM = 3, 16
GRIDS = [
    TokenGrid(1, 1, 1),
    TokenGrid(1, 1, 1, 20),
    TokenGrid(3, 5, 7),
    TokenGrid(1, 9, 13, 17, True),
    TokenGrid(4, 8, 8, 3),
]
WITH_DENSITY = [name for name, cls in METHODS.items() if accepts_density(cls())]
WITH_THRESHOLD = [name for name in WITH_DENSITY if threshold_name(METHODS[name]()) not in (None, "error")]
SMALL = {"block": 16, "segment": 32, "tile": (1, 4, 4)}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, tmp_path: Path) -> Method:
    """Small blocks, and gates where a method needs them."""
    cls = find_method(request.param)
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    options: dict[str, Any] = {name: value for name, value in SMALL.items() if name in names}
    if request.param == "seer":
        options["weights"] = str(tmp_path / "gates.safetensors")
        gate = Gate(torch.randn(HEADS, DIM, 8), torch.randn(HEADS, 3 * DIM, 8))
        write_gates(options["weights"], {("transformer", 0): gate}, 16)
    return cls(**options)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_grid(method: Method, grid: TokenGrid, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Views as a pipeline gives them: heads are the third dimension in memory.
    q, k, v = torch.randn(3, 2, grid.num_tokens, HEADS, DIM, generator=generator).to(dtype).transpose(2, 3)
    before = [x.clone() for x in (q, k, v)]
    method.check(grid)
    with torch.inference_mode():
        plan = method.plan(q, k, v, Site(grid), None)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    mask = plan.token_mask()
    assert plan.remainder == Schedule(method).planned_remainder
    assert mask.any(-1).all(), "a query keeps no key"
    text = slice(grid.text_start, grid.text_start + grid.text_len)
    assert mask[..., text, :].all()
    assert mask[..., :, text].all()
    again = method.plan(q, k, v, Site(grid), None)
    assert torch.equal(mask, again.token_mask())
    assert bool(plan.skip_threshold) == Schedule(method).skips
    out = sparse_attention(q, k, v, plan.with_remainder("none").with_skip(0.0))
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    low = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    floor = 4 * torch.finfo(dtype).eps * want.abs().max()
    assert (out - want).abs().max() <= 2 * (low - want).abs().max() + floor


def test_orders_of_heads_are_as_many_as_it_says(method: Method) -> None:
    q, k, v = torch.randn(3, 1, HEADS, GRIDS[-1].num_tokens, DIM, generator=torch.Generator().manual_seed(0))
    plan = method.plan(q, k, v, Site(GRIDS[-1]), None)
    own = {order for order in (plan.q_order, plan.kv_order) if order.index.shape[1] > 1}
    assert len(own) == head_orders(method)


@pytest.mark.parametrize("method", WITH_DENSITY, indirect=True)
@pytest.mark.parametrize("grid", GRIDS[2:], ids=str)
def test_density_one_keeps_everything(method: Method, grid: TokenGrid) -> None:
    q = torch.randn(2, HEADS, grid.num_tokens, DIM, generator=torch.Generator().manual_seed(0))
    assert with_density(method, 1.0).plan(q, q, q, Site(grid), None).token_mask().all()


@pytest.mark.parametrize("method", WITH_DENSITY, indirect=True)
@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_density_is_met_as_a_mean_over_heads(method: Method, density: float) -> None:
    grid = TokenGrid(6, 16, 20)
    q, k = torch.randn(2, 1, HEADS, grid.num_tokens, DIM, generator=torch.Generator().manual_seed(0))
    plan = with_density(method, density).plan(2 * q, k, k, Site(grid), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


@pytest.mark.parametrize("method", WITH_THRESHOLD, indirect=True)
def test_a_threshold_beside_a_density_has_an_effect_unless_it_is_said_to_be_overridden(method: Method) -> None:
    grid = TokenGrid(2, 8, 16)
    q, k, v = torch.randn(3, 1, HEADS, grid.num_tokens, DIM, generator=torch.Generator().manual_seed(0))
    q *= torch.tensor([0.1, 1.0, 4.0])[:, None, None]  # heads that need unlike shares
    at = with_density(method, 0.4)
    low, high = (with_threshold(at, value).plan(q, k, v, Site(grid), None).token_mask() for value in (0.3, 0.9))
    assert torch.equal(low, high) == (threshold_name(method) in overridden(at))
