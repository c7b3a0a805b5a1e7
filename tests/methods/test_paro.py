"""PAROAttention: the order that gathers attention wins, masks keep the heaviest blocks, plan files come back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse import Paro, Site, TokenGrid
from dit_sparse.methods.paro import heaviest_blocks
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.reorder import AXIS_ORDERS, axis_order, raster_order

GRID = TokenGrid(4, 8, 8)


def attends_along(axis: int) -> tuple[Tensor, Tensor]:
    """`q, k` `[1, 1, N, 64]` whose queries see the keys that differ from them along `axis` alone."""
    f, h, w = torch.meshgrid(*(torch.arange(n) for n in GRID.shape), indexing="ij")
    rest = {0: h * 8 + w, 1: f * 8 + w, 2: f * 8 + h}[axis].flatten()
    code = torch.nn.functional.one_hot(rest, 64).float() * math.sqrt(12 * 8)
    return code[None, None], code[None, None]


@pytest.mark.parametrize(("axis", "fastest"), [(0, "F"), (1, "H"), (2, "W")])
def test_the_attended_axis_becomes_the_fastest(axis: int, fastest: str) -> None:
    q, k = attends_along(axis)
    plan = Paro(density=0.25, block=8, sample_blocks=99).plan(q, k, k, Site(GRID), None)
    found = [axes for axes in AXIS_ORDERS if torch.equal(axis_order(GRID, axes, 8).index, plan.q_order.index)]
    assert len(found) == 1
    assert found[0].endswith(fastest)


def test_heads_choose_for_themselves() -> None:
    pairs = [attends_along(axis) for axis in (2, 0)]
    q, k = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
    plan = Paro(block=8, sample_blocks=99).plan(q, k, k, Site(GRID), None)
    assert not torch.equal(plan.q_order.index[0, 0], plan.q_order.index[0, 1])


def literal_metrics(weights: Tensor, block: int, sigma: float, epsilon: float) -> tuple[float, float]:
    """M_quant and 1 - M_sparse of one attention map, entry by entry as the paper states them."""
    count, sparse, quant = 0, 0, 0.0
    for row in range(0, weights.shape[0], block):
        for column in range(0, weights.shape[1], block):
            entries = [float(weights[i, j]) for i in range(row, row + block) for j in range(column, column + block)]
            count += 1
            sparse += sum(entry < epsilon for entry in entries) >= sigma * len(entries)
            quant += max(abs(entry) for entry in entries) / (sum(abs(entry) for entry in entries) / len(entries))
    return quant / count, 1 - sparse / count


def test_the_metrics_are_the_papers() -> None:
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 1, 1, 64, 16)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    method = Paro(block=8, sample_blocks=8, sigma=0.5, epsilon=0.01)
    got = method._metrics(q, k, lse, TokenGrid(1, 8, 8))[0].tolist()
    weights = (q[0, 0] @ k[0, 0].T / 4).softmax(-1)
    assert got == pytest.approx(literal_metrics(weights, 8, 0.5, 0.01), rel=1e-4)


@pytest.mark.parametrize(
    "grid", [GRID, TokenGrid(3, 5, 7), TokenGrid(2, 4, 4, 9, True), TokenGrid(2, 4, 4, 9)], ids=str
)
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_density_text_and_rows(grid: TokenGrid, density: float) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, grid.num_tokens, 16)
    plan = Paro(density=density, block=4).plan(q, k, k, Site(grid), None)
    mask = plan.token_mask()
    text = slice(grid.text_start, grid.text_start + grid.text_len)
    assert mask[:, :, text].all()
    assert mask[:, :, :, text].all()
    assert mask.any(-1).all()
    floor = 1 - (grid.video_len / grid.num_tokens) ** 2
    assert float(plan.density.max()) <= max(density, floor + 0.25) + 0.05
    assert float(plan.density.min()) >= min(density, 1) - 0.1


def test_the_heaviest_blocks_are_kept() -> None:
    grid = TokenGrid(1, 8, 8)
    order = raster_order(grid, 8)
    mass = torch.rand(1, 2, 8, 8)
    kept = heaviest_blocks(mass, 0.5, order, grid)
    assert kept.sum((-1, -2)).tolist() == [[32, 32]]
    best = torch.zeros_like(kept).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    assert (kept | best).equal(kept)
    least_kept = mass.masked_fill(~kept | best, torch.inf).flatten(2).min(-1).values
    assert (mass.masked_fill(kept, -torch.inf).flatten(2).max(-1).values <= least_kept).all()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list]:
    torch.manual_seed(0)
    plans = []
    for _ in range(2):
        q, k = torch.randn(2, 1, 3, GRID.num_tokens, 16)
        plans.append(Paro(block=8).plan(q, k, k, Site(GRID), None))
    path = tmp_path / "plan.safetensors"
    PlanFile.save(path, dict(enumerate(plans)), GRID, 8, {"model": "tiny"})
    return path, plans


def test_a_plan_file_comes_back(saved) -> None:
    path, plans = saved
    q = torch.randn(1, 3, GRID.num_tokens, 16)
    method = Paro(plan_file=str(path))
    method.check(GRID)
    for layer, want in enumerate(plans):
        got = method.plan(q, q, q, Site(GRID, layer=layer, num_layers=2), None)
        assert torch.equal(got.token_mask(), want.token_mask())
    assert PlanFile.open(path).notes == {"model": "tiny"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_plan_for_something_else_is_refused(saved) -> None:
    method = Paro(plan_file=str(saved[0]))
    q = torch.randn(1, 3, GRID.num_tokens, 16)
    with pytest.raises(ValueError, match="is for the grid 4x8x8, got 4x8x4"):
        method.check(TokenGrid(4, 8, 4))
    with pytest.raises(ValueError, match="has 2 layers, got layer 2"):
        method.plan(q, q, q, Site(GRID, layer=2, num_layers=3), None)
    with pytest.raises(ValueError, match="must have 2 heads"):
        method.plan(q[:, :2], q[:, :2], q[:, :2], Site(GRID), None)
    with pytest.raises(ValueError, match="existing file"):
        Paro(plan_file="nowhere.safetensors").check(GRID)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_plan_file_is_refused_or_read_whole(data: st.DataObject) -> None:
    """Cut short or with a byte flipped: either a ValueError, or plans of the right shape."""
    content = bytearray(_plan_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.safetensors"
        path.write_bytes(content)
        try:
            plan = PlanFile.open(path).plan(GRID, 0, 3, torch.device("cpu"))
        except ValueError:
            return
        assert plan.q_order.num_tokens == GRID.num_tokens


_CACHE: list[bytes] = []


def _plan_bytes() -> bytes:
    if not _CACHE:
        import tempfile

        torch.manual_seed(0)
        q, k = torch.randn(2, 1, 3, GRID.num_tokens, 16)
        plan = Paro(block=8).plan(q, k, k, Site(GRID), None)
        with tempfile.TemporaryDirectory() as folder:
            PlanFile.save(Path(folder) / "p", {0: plan}, GRID, 8, {})
            _CACHE.append((Path(folder) / "p").read_bytes())
    return _CACHE[0]


@pytest.mark.parametrize("text_first", [False, True])
def test_a_plan_file_fits_text_of_any_length(tmp_path, text_first: bool) -> None:
    """The video's blocks stay, and all text is kept."""
    calibrated = replace(GRID, text_len=11, text_first=text_first)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 3, calibrated.num_tokens, 8)
    plan = Paro(density=0.4, block=8).plan(q, k, v, Site(calibrated), None)
    PlanFile.save(tmp_path / "p", {0: plan}, calibrated, 8, {})
    known = plan.token_mask()
    for text_len in (0, 5, 11, 30):
        grid = replace(GRID, text_len=text_len, text_first=text_first)
        mask = PlanFile.open(tmp_path / "p").plan(grid, 0, 3, torch.device("cpu")).token_mask()
        inside, was = (slice(g.video_start, g.video_start + g.video_len) for g in (grid, calibrated))
        assert torch.equal(mask[..., inside, inside], known[..., was, was])
        is_video = torch.zeros(grid.num_tokens, dtype=torch.bool)
        is_video[inside] = True
        assert mask[..., ~is_video, :].all()
        assert mask[..., ~is_video].all()
    with pytest.raises(ValueError, match="is for the grid"):
        PlanFile.open(tmp_path / "p").check(replace(calibrated, text_first=not text_first))
