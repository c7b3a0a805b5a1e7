"""PAROAttention's two metrics, against loops written from the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.masks import best_orders, metrics_by_order, order_metrics
from dit_sparse.reorder import Block, axis_order, distinct_axis_orders
from dit_sparse.types import TokenGrid


def literal_metrics(weights: Tensor, block: int, sigma: float, epsilon: float) -> tuple[float, float]:
    """M_sparse and M_quant of one attention map, entry by entry as the paper states them."""
    count, sparse, quant = 0, 0, 0.0
    for row in range(0, weights.shape[0], block):
        for column in range(0, weights.shape[1], block):
            entries = [float(weights[i, j]) for i in range(row, row + block) for j in range(column, column + block)]
            count += 1
            sparse += sum(entry < epsilon for entry in entries) >= sigma * len(entries)
            quant += max(abs(entry) for entry in entries) / (sum(abs(entry) for entry in entries) / len(entries))
    return sparse / count, quant / count


def attention(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1), scores.logsumexp(-1)


@pytest.mark.parametrize("block", [8, (1, 2, 4)], ids=str)
@pytest.mark.parametrize(
    "grid", [TokenGrid(2, 4, 8), TokenGrid(2, 4, 8, 5), TokenGrid(2, 4, 8, 5, True), TokenGrid(1, 8, 8)], ids=str
)
def test_they_are_the_papers(grid: TokenGrid, block: Block) -> None:
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 1, 2, grid.num_tokens, 16)
    weights, lse = attention(q, k)
    options = {"block": block, "sigma": 0.5, "epsilon": 0.01, "sample_blocks": 8}
    orders = distinct_axis_orders(grid, block)
    got = metrics_by_order(q, k, lse, grid, orders, **options)
    assert got.shape == (2, len(orders), 2)
    video = slice(grid.video_start, grid.video_start + grid.video_len)
    for number, axes in enumerate(orders):
        index = axis_order(grid, axes, block).index[0, 0, video]
        for head in range(2):
            want = literal_metrics(weights[0, head][index][:, index], 8, 0.5, 0.01)
            assert got[head, number].tolist() == pytest.approx(want, rel=1e-4)


def test_a_ragged_end_and_other_query_blocks_stay_out() -> None:
    grid = TokenGrid(1, 7, 9)
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 1, 1, 63, 16)
    weights, lse = attention(q, k)
    got = order_metrics(q, k, lse, grid, block=8, sigma=0.5, epsilon=0.01, sample_blocks=2)
    rows = [literal_metrics(weights[0, 0, start : start + 8, :56], 8, 0.5, 0.01) for start in (0, 48)]
    assert got[0].tolist() == pytest.approx(torch.tensor(rows).mean(0).tolist(), rel=1e-4)


def test_heads_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("dit_sparse.masks.order_metrics")
    grid = TokenGrid(2, 4, 8)
    q, k = torch.randn(2, 2, 5, 64, 16)
    lse = attention(q, k)[1]
    whole = order_metrics(q, k, lse, grid, block=8)
    monkeypatch.setattr(module, "_CHUNK_SCORES", 2 * 2 * 8 * 64)
    assert torch.equal(order_metrics(q, k, lse, grid, block=8), whole)


def test_weights_that_underflow_do_no_harm() -> None:
    grid = TokenGrid(1, 4, 4)
    q = torch.eye(16)[None, None] * 200
    metrics = order_metrics(q, q, attention(q, q)[1], grid, block=4)
    assert metrics.isfinite().all()
    assert metrics[0, 0] == 0.75  # the diagonal blocks hold weights of 1 in 4 of 16 places


def test_the_best_order_weighs_both_metrics() -> None:
    metrics = torch.tensor([[[0.9, 8.0], [0.5, 2.0], [0.8, 8.0]]])
    assert best_orders(metrics, 1.0).tolist() == [0]
    assert best_orders(metrics, 0.0).tolist() == [1]
    shares = [(0.1 / 0.8, 8 / 18), (0.5 / 0.8, 2 / 18), (0.2 / 0.8, 8 / 18)]
    for alpha in (0.3, 0.5, 0.7):
        cost = [alpha * sparse + (1 - alpha) * quant for sparse, quant in shares]
        assert best_orders(metrics, alpha).tolist() == [cost.index(min(cost))]
