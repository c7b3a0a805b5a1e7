"""Cluster orders: tokens that are alike stand in one block, queries and keys apart or by what they attend to.

Source: SVG2 (arXiv 2505.18875), Lloyd's algorithm; SVOO (arXiv 2603.18636), co-clustering.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.reorder.grid import grid_order
from dit_sparse.types import TokenGrid, TokenOrder

_CHUNK_SCORES = 1 << 24


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Number of the cluster of every token after some iterations of Lloyd's algorithm.

    Each iteration gives every token to the nearest centroid, the first of equally near ones, and then moves centroids
    to the means of their tokens; one without tokens stays where it is. The last iteration only gives tokens away.

    Args:
        x: `[B, H, V, D]`.
        centroids: `[B, H, C, D]` to start from.
        iterations: at least 1.

    Returns:
        `[B, H, V]` int64 below C.

    Raises:
        ValueError: no iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    x, centroids = x.float(), centroids.float()
    for _ in range(iterations - 1):
        centroids = _means(x, _nearest(x, centroids), centroids)
    return _nearest(x, centroids)


def co_clusters(
    q: Tensor, k: Tensor, q_centroids: Tensor, k_centroids: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Numbers of the clusters of queries and of keys that attend alike, after some iterations by turns.

    A key's profile are its products with all query centroids; it goes to the key centroid whose profile has the largest
    cosine with it, the first of equal ones. Key centroids then move to the means of their keys, and the queries follow,
    by their products with the new key centroids. A centroid without tokens stays where it is.

    Args:
        q, k: `[B, H, V, D]`.
        q_centroids, k_centroids: `[B, H, Cq, D]` and `[B, H, Ck, D]` to start from.
        iterations: at least 1.

    Returns:
        Two `[B, H, V]` int64, below Cq and Ck.

    Raises:
        ValueError: no iteration.

    Source: SVOO (arXiv 2603.18636), bidirectional co-clustering.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    q, k, q_centroids, k_centroids = (x.float() for x in (q, k, q_centroids, k_centroids))
    for _ in range(iterations):
        k_labels = _most_alike(k, k_centroids, q_centroids)
        k_centroids = _means(k, k_labels, k_centroids)
        q_labels = _most_alike(q, q_centroids, k_centroids)
        q_centroids = _means(q, q_labels, q_centroids)
    return q_labels, k_labels


def _most_alike(x: Tensor, centroids: Tensor, others: Tensor) -> Tensor:
    """Number of the centroid whose profile over `others` is most like that of each token."""
    profiles = F.normalize(centroids @ others.transpose(-1, -2), dim=-1, eps=1e-8)
    # The length of a token's own profile plays no part, so profiles of tokens need not be made.
    directions = profiles @ others
    return _best(x, directions, torch.zeros_like(directions[..., 0]))


def spread_tokens(x: Tensor, count: int) -> Tensor:
    """`[B, H, C, D]`: `count` tokens of `x` `[B, H, V, D]` at equal distances, to start k-means from."""
    places = (2 * torch.arange(count, device=x.device) + 1) * x.shape[2] // (2 * count)
    return x.index_select(2, places)


def cluster_order(labels: Tensor, clusters: int, grid: TokenGrid, text_block: int) -> TokenOrder:
    """Order with one block for every cluster of video tokens, in raster order inside; clusters may be empty.

    Args:
        labels: `[B, H, V]` int64 below `clusters`.
        clusters: how many there are.
        grid: the layout of the sequence.
        text_block: tokens a block of text.

    Returns:
        Order with `index` `[B, H, N]` int64 and `offsets` `[B, H, M+1]` int32.
    """
    sizes = torch.zeros(*labels.shape[:2], clusters, dtype=torch.int32, device=labels.device)
    sizes.scatter_add_(-1, labels, torch.ones_like(labels, dtype=torch.int32))
    offsets = F.pad(sizes.cumsum(-1, dtype=torch.int32), (1, 0))
    return grid_order(grid, labels.argsort(dim=-1, stable=True), block_size=text_block, video_offsets=offsets)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    # The nearest centroid c is the one of largest x . c - |c|^2 / 2.
    return _best(x, centroids, centroids.square().sum(-1) / -2)


def _best(x: Tensor, directions: Tensor, bias: Tensor) -> Tensor:
    """`[B, H, V]` number of the direction of largest `x . direction + bias`, the first of equal ones."""
    labels = torch.empty(x.shape[:3], dtype=torch.int64, device=x.device)
    rows = max(1, _CHUNK_SCORES // directions.shape[2])
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for start in range(0, x.shape[2], rows):
                part = x[b, h, start : start + rows]
                scores = torch.addmm(bias[b, h], part, directions[b, h].t())
                torch.argmax(scores, -1, out=labels[b, h, start : start + rows])
    return labels


def _means(x: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    sums = torch.zeros_like(before).scatter_add_(2, labels[..., None].expand(x.shape), x)
    counts = torch.zeros(before.shape[:3], device=x.device).scatter_add_(2, labels, torch.ones_like(x[..., 0]))[
        ..., None
    ]
    return torch.where(counts > 0, sums / counts.clamp(min=1), before)
