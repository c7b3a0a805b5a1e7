"""K-means against Lloyd's algorithm token by token, and the orders made of its clusters."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.reorder import cluster_order, kmeans, spread_tokens
from dit_sparse.types import TokenGrid


def lloyd(x: list[list[float]], centroids: list[list[float]], iterations: int) -> list[int]:
    """One head's labels, in plain Python."""
    labels: list[int] = []
    for turn in range(iterations):
        labels = []
        for token in x:
            distances = [sum((a - b) ** 2 for a, b in zip(token, c, strict=True)) for c in centroids]
            labels.append(distances.index(min(distances)))
        if turn < iterations - 1:
            for number in range(len(centroids)):
                members = [token for token, label in zip(x, labels, strict=True) if label == number]
                if members:
                    centroids[number] = [sum(column) / len(members) for column in zip(*members, strict=True)]
    return labels


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_equals_lloyds_algorithm(iterations: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 40, 3, generator=generator)
    start = torch.randn(2, 2, 6, 3, generator=generator)
    start[0, 0, 5] = 99.0  # nobody's
    got = kmeans(x, start, iterations)
    for b in range(2):
        for h in range(2):
            want = lloyd(x[b, h].double().tolist(), start[b, h].double().tolist(), iterations)
            assert got[b, h].tolist() == want
    assert 5 not in got[0, 0]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 50, 4)
    want = kmeans(x, spread_tokens(x, 5), 3)
    monkeypatch.setattr("dit_sparse.reorder.clusters._CHUNK_SCORES", 35)
    assert torch.equal(kmeans(x, spread_tokens(x, 5), 3), want)


def test_no_iteration_is_refused() -> None:
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        kmeans(x, x, 0)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_starts_are_tokens_at_equal_distances(count: int) -> None:
    places = spread_tokens(torch.arange(10.0).view(1, 1, 10, 1), count).flatten()
    assert len(set(places.tolist())) == count
    assert count == 1 or places.diff().max() - places.diff().min() <= 1


@pytest.mark.parametrize("grid", [TokenGrid(2, 3, 4), TokenGrid(2, 3, 4, 5, True), TokenGrid(2, 3, 4, 5)], ids=str)
def test_every_block_is_a_cluster_and_empty_ones_stay(grid: TokenGrid) -> None:
    labels = torch.randint(0, 5, (2, 2, 24), generator=torch.Generator().manual_seed(0))
    labels[labels == 3] = 2
    order = cluster_order(labels, 5, grid, 4)
    first = 2 if grid.text_first else 0
    assert order.num_blocks == 5 + (2 if grid.text_len else 0)
    for b in range(2):
        for h in range(2):
            bounds = order.offsets[b, h].tolist()
            for cluster in range(5):
                start, end = bounds[first + cluster : first + cluster + 2]
                tokens = [t - grid.video_start for t in order.index[b, h, start:end].tolist()]
                assert tokens == [t for t in range(24) if labels[b, h, t] == cluster]
