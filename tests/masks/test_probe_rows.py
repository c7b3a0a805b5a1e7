"""Probe rows against attention computed one query at a time."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.masks import mask_rows, masked_errors, probe_rows
from dit_sparse.reorder import axis_order
from dit_sparse.types import TokenGrid

GRID = TokenGrid(2, 4, 4, text_len=5, text_first=True)
CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 7, 32, 1000])
def test_one_row_of_each_equal_stretch(count: int) -> None:
    rows = (probe_rows(GRID, count, CPU) - GRID.video_start).tolist()
    assert len(rows) == min(count, 32)
    for stretch, row in enumerate(rows):
        assert stretch * 32 // len(rows) <= row < (stretch + 1) * 32 // len(rows)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        probe_rows(GRID, 0, CPU)


def test_mask_rows_are_those_of_the_token_mask() -> None:
    order = axis_order(GRID, "HWF", 4)
    kept = torch.rand(order.num_blocks, order.num_blocks) < 0.5
    mask, offsets = torch.zeros(37, 37, dtype=torch.bool), order.offsets[0, 0].tolist()
    for i in range(order.num_blocks):
        for j in range(order.num_blocks):
            for query in order.index[0, 0, offsets[i] : offsets[i + 1]].tolist():
                for key in order.index[0, 0, offsets[j] : offsets[j + 1]].tolist():
                    mask[query, key] = kept[i, j]
    rows = probe_rows(GRID, 9, CPU)
    assert torch.equal(mask_rows(kept, order, rows), mask[rows])


def test_errors_are_those_of_single_queries() -> None:
    q, k, v = torch.randn(3, 2, 3, 37, 8)
    rows = probe_rows(GRID, 5, CPU)
    masks = (torch.rand(2, 5, 37) < 0.5).index_fill(-1, torch.tensor([0]), True)
    got = masked_errors(q, k, v, rows, masks)
    for s in range(2):
        for b in range(2):
            for h in range(3):
                error = 0.0
                for place, row in enumerate(rows.tolist()):
                    logits = k[b, h].double() @ q[b, h, row].double() / 8**0.5
                    part = logits.masked_fill(~masks[s, place], -torch.inf).softmax(0) - logits.softmax(0)
                    error += float((part @ v[b, h].double()).square().mean()) / 5
                assert float(got[s, b, h]) == pytest.approx(error, rel=1e-4)
