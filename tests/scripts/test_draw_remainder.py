"""What the error maps show is the error of the output."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import Mock

import draw_remainder
import numpy as np
import pytest
import torch
from draw_remainder import SIDE, Call, block_map, coloured, error_parts, relative_errors

from dit_sparse import AttentionPlan, Site, TokenGrid
from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels import dense_attention
from dit_sparse.reorder import tile_order
from dit_sparse.types import Remainder
from tests.methods.layouts import inputs

GRID = TokenGrid(3, 5, 6, text_len=5)


def call_and_plan(density: float) -> tuple[Call, AttentionPlan]:
    """Random blocks of uneven size, those of the queries others than those of the keys."""
    q, k, v = inputs(GRID, batch=1, scale=0.8)
    rows, columns = (tile_order(GRID, tile) for tile in ((2, 3, 4), (1, 2, 3)))
    shape = 1, q.shape[1], rows.num_blocks, columns.num_blocks
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    mask = BlockMask.from_bool(kept, rows.offsets, columns.offsets)
    return Call(Site(GRID), q, k, v, dense_attention(q, k, v)), AttentionPlan(rows, columns, mask)


@pytest.mark.parametrize(("remainder", "density"), [("none", 0.5), ("mean", 0.5), ("value", 0.5), ("value", 0.0)])
def test_the_parts_of_the_blocks_add_up_to_the_error(remainder: Remainder, density: float) -> None:
    call, plan = call_and_plan(density)
    plan = plan.with_remainder(remainder)
    error, lse = call.error(plan)
    for head in range(call.q.shape[1]):
        parts = torch.cat(list(error_parts(call, head, plan, lse)))
        want = plan.q_order.permute(error)[0, head]
        assert float((parts.sum(1) - want).norm() / want.norm()) < 1e-5
        size = call.out[0, head].norm()
        assert float(relative_errors(call, plan)[{"none": 0, "mean": 1, "value": 2}[remainder], head]) == pytest.approx(
            float(want.norm() / size), rel=1e-4
        )


def test_larger_errors_are_darker() -> None:
    picture = np.asarray(coloured(np.array([[1e-9, 1e-2, 0.3, 5.0]]), (4, 1)).convert("L"))[0].astype(int)
    assert (np.diff(picture) < 0).all()


def test_kept_blocks_have_no_error() -> None:
    call, plan = call_and_plan(1.1)
    colours = block_map(call, 0, plan).getcolors()
    assert colours is not None
    assert [count for count, _ in colours] == [SIDE * SIDE]


def test_the_folder_is_there_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "pictures"

    def load(path: Path) -> Mock:
        assert folder.is_dir()
        return Mock(device=torch.device("cpu"))

    loading = Mock(side_effect=load)
    monkeypatch.setattr(draw_remainder, "load_pipeline", loading)
    monkeypatch.setattr(draw_remainder, "calls_at", lambda *_: {0: call_and_plan(0.5)[0]})
    monkeypatch.setattr(sys, "argv", ["draw_remainder.py", "--out", str(folder), "--layer", "0", "--frame", "1"])
    draw_remainder.main()
    loading.assert_called_once()
    assert (folder / "remainder.png").stat().st_size > 1000
