"""PAROAttention: the order that gathers attention wins; plan files give each layer and step its mask."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_sparse import Paro, Site, TokenGrid
from dit_sparse.methods.plan_ahead import PlanReader
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.reorder import AXIS_ORDERS, axis_order, tile_order
from tests.methods import plans

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


@pytest.mark.parametrize("axis", range(3))
def test_each_head_turns_the_tile_along_the_axis_that_it_attends_to(axis: int) -> None:
    """Queries see one axis alone: the tile whose longest side lies along it has most blocks of nothing."""
    q, k = attends_along(axis)
    plan = Paro(density=0.25, tile=(1, 2, 4), sample_blocks=99).plan(q, k, k, Site(GRID), None)
    places = plan.q_order.index[0, 0].reshape(-1, 8)
    along = {0: places // 64, 1: places // 8 % 8, 2: places % 8}[axis]
    assert all(len(set(block)) == 4 for block in along.tolist())
    assert Paro(tile=(1, 2, 4)).query_block == 8


def test_a_cube_has_one_order_whatever_a_head_attends_to() -> None:
    q, k = (torch.cat(side, 1) for side in zip(*map(attends_along, range(3)), strict=True))
    plan = Paro(density=0.25, tile=(2, 2, 2)).plan(q, k, k, Site(GRID), None)
    want = tile_order(GRID, (2, 2, 2), even=True)
    assert torch.equal(plan.q_order.index, want.index.expand(1, 3, -1))
    with pytest.raises(ValueError, match="tile must be a whole number of tokens, at least 1"):
        Paro(tile=(2, 0, 2))
    with pytest.raises(ValueError, match="tile must be three sides"):
        Paro(tile=(2, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "grid", [GRID, TokenGrid(3, 5, 7), TokenGrid(2, 4, 4, 9, True), TokenGrid(2, 4, 4, 9)], ids=str
)
@pytest.mark.parametrize("density", [0.3, 0.6])
@pytest.mark.parametrize("tile", [None, (1, 2, 2)])
def test_density_text_and_rows(grid: TokenGrid, density: float, tile: tuple[int, int, int] | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, grid.num_tokens, 16)
    plan = Paro(density=density, block=4, tile=tile).plan(q, k, k, Site(grid), None)
    mask = plan.token_mask()
    text = slice(grid.text_start, grid.text_start + grid.text_len)
    assert mask[:, :, text].all()
    assert mask[:, :, :, text].all()
    assert mask.any(-1).all()
    floor = 1 - (grid.video_len / grid.num_tokens) ** 2
    assert float(plan.density.max()) <= max(density, floor + 0.25) + 0.05
    assert float(plan.density.min()) >= min(density, 1) - 0.1


@pytest.mark.parametrize("grid", [TokenGrid(1, 6, 9), TokenGrid(1, 6, 9, 5), TokenGrid(1, 6, 9, 5, True)], ids=str)
def test_an_image_is_walked_by_rows_or_by_columns(grid: TokenGrid) -> None:
    """One head attends along columns and one along rows; both find their order, with text and a ragged last block."""
    row, column = torch.arange(54) // 9, torch.arange(54) % 9
    heads = []
    for place in (column, row):
        video = 30 * torch.nn.functional.one_hot(place, 16).float()
        text = torch.zeros(grid.text_len, 16)
        heads.append(torch.cat([text, video] if grid.text_first else [video, text]))
    q = torch.stack(heads)[None]
    plan = Paro(density=0.4, block=6, sample_blocks=99).plan(q, q, q, Site(grid), None)
    for head, axes in enumerate(("FWH", "FHW")):
        assert torch.equal(plan.q_order.index[0, head], axis_order(grid, axes, 6).index[0, 0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.safetensors"


def site(layer: int = 0, step: int = 0, **changes: object) -> Site:
    return Site(**{"grid": plans.GRID, "layer": layer, "num_layers": 2, "step": step, "num_steps": 4} | changes)


@pytest.fixture
def q() -> Tensor:
    return torch.randn(1, 2, plans.GRID.num_tokens, 16)


def test_a_plan_file_gives_each_step_its_mask(path: Path, q: Tensor) -> None:
    masks = plans.write(path, starts=(0.0, 0.25, 0.5))
    method = Paro(plan_file=str(path))
    method.check(plans.GRID)
    assert (method.scope, method.refresh, method.uses_lse) == ("layer", (0.25, 0.5), False)
    for step, slot in enumerate((0, 1, 2, 2)):
        for layer in range(2):
            plan = method.plan(q, q, q, site(layer, step), None)
            assert torch.equal(plan.block_mask.kept_blocks[0], masks[layer][slot])
            for head, axes in enumerate(plans.AXES[layer]):
                assert torch.equal(plan.q_order.index[0, head], axis_order(plans.GRID, axes, 8).index[0, 0])


def test_a_plan_file_of_tiles(path: Path, q: Tensor) -> None:
    masks = plans.write(path, block=(1, 2, 4))
    plan = Paro(plan_file=str(path)).plan(q, q, q, site(1, 0), None)
    assert torch.equal(plan.block_mask.kept_blocks[0], masks[1][0])
    for head, axes in enumerate(plans.AXES[1]):
        assert torch.equal(plan.q_order.index[0, head], axis_order(plans.GRID, axes, (1, 2, 4)).index[0, 0])
    longer = replace(plans.GRID, text_len=11)
    plan = Paro(plan_file=str(path)).plan(q, q, q, site(1, 0, grid=longer), None)
    assert torch.equal(plan.q_order.index[0, 0], axis_order(longer, plans.AXES[1][0], (1, 2, 4)).index[0, 0])


def test_a_plan_file_of_version_1_still_serves(q: Tensor) -> None:
    method = Paro(plan_file=str(Path(__file__).parent / "data" / "plan_v1.safetensors"))
    assert (method.scope, method.refresh) == ("layer", ())
    assert torch.equal(
        method.plan(q, q, q, site(1, 0), None).token_mask(), method.plan(q, q, q, site(1, 3), None).token_mask()
    )


def test_the_next_layers_mask_is_read_ahead(path: Path, q: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = plans.write(path)
    file, read = PlanFile.open(path), []
    original = PlanFile.bits
    monkeypatch.setattr(PlanFile, "bits", lambda self, *place: read.append(place[1:]) or original(self, *place))
    reader = PlanReader(file, torch.device("cpu"))
    for layer, slot, want in [
        (0, 0, [(0, 0), (1, 0)]),
        (1, 0, [(0, 1)]),  # after the last layer, the first one's next mask
        (0, 1, [(1, 1)]),
        (1, 1, []),
        (0, 0, [(0, 0), (1, 0)]),  # the next run
    ]:
        read.clear()
        plan = reader.plan("transformer", layer, slot)
        assert torch.equal(plan.block_mask.kept_blocks[0], masks[layer][slot])
        assert read == want
    assert reader.plan("transformer", 0, 0).q_order is plan.q_order


def test_orders_of_a_plan_file_last_as_long_as_a_plan_has_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_sparse.token_order.PACKED_FROM", 1)
    plans.write(path)
    reader = PlanReader(PlanFile.open(path), torch.device("cpu"))
    plan = reader.plan("transformer", 0, 0)
    order = weakref.ref(plan.q_order)
    at_rest = plan.pack()
    del plan
    assert order() is None
    again = reader.plan("transformer", 0, 1).q_order
    assert again is at_rest.unpack().q_order
    for head, axes in enumerate(plans.AXES[0]):
        want = axis_order(plans.GRID, axes, PlanFile.open(path).header.block)
        assert torch.equal(again.index[0, head], want.index[0, 0])
        assert torch.equal(again.inverse[0, head], want.inverse[0, 0])
    del at_rest, again
    assert not reader._orders


def test_a_plan_for_something_else_is_refused(path: Path, q: Tensor) -> None:
    plans.write(path)
    method = Paro(plan_file=str(path))
    with pytest.raises(ValueError, match=r"is for the grid 2x3x5 \+ 4 text first, got 4x8x4"):
        method.check(TokenGrid(4, 8, 4))
    with pytest.raises(ValueError, match="is for the grid"):
        method.plan(q, q, q, site(grid=TokenGrid(4, 8, 4)), None)
    with pytest.raises(ValueError, match="is for 2 layers of 2 heads, got 3 of 2"):
        method.plan(q, q, q, site(num_layers=3), None)
    with pytest.raises(ValueError, match="is for 2 layers of 2 heads, got 2 of 1"):
        method.plan(q[:, :1], q[:, :1], q[:, :1], site(), None)
    with pytest.raises(ValueError, match="has plans of transformer, got 'transformer_2'"):
        method.plan(q, q, q, site(model="transformer_2"), None)
    with pytest.raises(ValueError, match="existing file"):
        Paro(plan_file="nowhere.safetensors").check(plans.GRID)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_masks_arrive_on_a_stream_of_their_own(path: Path) -> None:
    masks = plans.write(path, starts=(0.0, 0.25, 0.5))
    reader = PlanReader(PlanFile.open(path), torch.device("cuda", 0))
    for _ in range(3):
        for slot in range(3):
            for layer in range(2):
                plan = reader.plan("transformer", layer, slot)
                assert torch.equal(plan.block_mask.kept_blocks[0].cpu(), masks[layer][slot])
                assert all(arriving.done is not None for arriving in reader._ahead.values())


@pytest.mark.parametrize("text_first", [False, True])
def test_a_plan_file_fits_text_of_any_length(path: Path, text_first: bool) -> None:
    """The video's blocks stay, and all text is kept."""
    calibrated = replace(plans.GRID, text_len=11, text_first=text_first)
    plans.write(path, grid=calibrated)
    reader = PlanReader(PlanFile.open(path), torch.device("cpu"))
    known = reader.plan("transformer", 0, 0, calibrated).token_mask()
    for text_len in (0, 5, 11, 30):
        grid = replace(calibrated, text_len=text_len)
        mask = reader.plan("transformer", 0, 0, grid).token_mask()
        inside, was = (slice(g.video_start, g.video_start + g.video_len) for g in (grid, calibrated))
        assert torch.equal(mask[..., inside, inside], known[..., was, was])
        is_video = torch.zeros(grid.num_tokens, dtype=torch.bool)
        is_video[inside] = True
        if text_len != 11:
            assert mask[..., ~is_video, :].all()
            assert mask[..., ~is_video].all()
    with pytest.raises(ValueError, match="is for the grid"):
        PlanFile.open(path).check(replace(calibrated, text_first=not text_first))
