"""Probe rows against attention computed one query at a time."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.masks import mask_rows, masked_errors, probe_rows, spread_ties
from dit_sparse.reorder import axis_order, choose_order, raster_order
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


def test_ties_are_spread_over_the_rows() -> None:
    scores = torch.randint(0, 3, (50, 4)).float()
    spread = spread_ties(scores)
    assert spread[scores == 2].min() > spread[scores == 1].max()
    assert spread.min() >= 0
    best = torch.zeros(50, 1)
    chosen = spread_ties(best)[:, 0].argsort(descending=True)[:10].sort().values
    assert chosen.diff().max() <= 9, "a fifth of the rows, none far from the next"


def test_each_head_has_the_order_it_chose() -> None:
    orders = raster_order(GRID, 4), axis_order(GRID, "HWF", 4)
    choice = torch.tensor([[0, 1, 1], [1, 0, 1]])
    got = choose_order(orders, choice)
    for b in range(2):
        for h in range(3):
            want = orders[int(choice[b, h])]
            assert torch.equal(got.index[b, h], want.index[0, 0])
            assert torch.equal(got.inverse[b, h], want.inverse[0, 0])
    assert got.geometry == orders[0].geometry
    x = torch.randn(2, 3, 37, 2)
    assert torch.equal(got.restore(got.permute(x)), x)


def test_orders_of_single_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"orders must be at least one, each \[1, 1, N\]"):
        choose_order([], torch.zeros(1, 1, dtype=torch.int64))
