"""Block scores: how much each query block is expected to attend to each key block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels import pooled_blocks
from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.moments import block_moments
from dit_sparse.masks.select import text_blocks
from dit_sparse.types import TokenGrid, TokenOrder

_CHUNK_SCORES = 1 << 22


def pooled_scores(
    q: Tensor, k: Tensor, q_order: TokenOrder, kv_order: TokenOrder, scale: float | None = None
) -> Tensor:
    """Share of attention that each key block is expected to get, from mean-pooled queries and keys.

    `softmax over j of (scale * mean(q of block i) . mean(k of block j) + ln B_j)`, where `B_j` is the size of block j:
    a block counts for as many tokens as it holds, so that uneven blocks compare.

    Args:
        q, k: `[B, H, N, D]`, in the orders' positions (already permuted).
        q_order, kv_order: the orders, of which only the blocks are used.
        scale: of the logits; `D ** -0.5` by default.

    Returns:
        `[B, H, Mq, Mk]` float32, each row summing to 1; empty key blocks get 0.

    Source: block means as in SpargeAttn (arXiv 2502.18137), weighted by block size as in SVG2 (arXiv 2505.18875).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_means = pooled_blocks(q, q_order.offsets).float()
    k_means = pooled_blocks(k, kv_order.offsets).float()
    logits = scale * (q_means @ k_means.transpose(-1, -2))
    sizes = kv_order.block_sizes[..., None, :]
    # The mean of an empty block may be anything; its log-size of -inf must win.
    logits = (logits + sizes.log()).masked_fill(sizes == 0, float("-inf"))
    return logits.softmax(dim=-1)


@torch.no_grad()
def sub_block_scores(
    q: Tensor, k: Tensor, q_order: TokenOrder, kv_order: TokenOrder, tokens: int, scale: float | None = None
) -> Tensor:
    """Attention that blocks get from each other, estimated among the means of small tiles of theirs.

    Blocks are cut in tiles of `tokens`, the last one shorter. The softmax over all key tiles, as in `pooled_scores`, is
    summed over the tiles of a key block, and averaged over those of a query block by their tokens.

    Args:
        q, k: `[B, H, N, D]`, in the orders' positions.
        q_order, kv_order: the orders, of which only the blocks are used.
        tokens: of a tile, at least 1.
        scale: of the logits; `D ** -0.5` by default.

    Returns:
        `[B, H, Mq, Mk]` float32, each row summing to 1; 0 for empty blocks.

    Raises:
        ValueError: tiles of no token.

    Source: DFSAttn (arXiv 2605.23445), hierarchical block scores.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    (q_means, q_sizes), (k_means, k_sizes) = (_tile_means(x, o, tokens) for x, o in ((q, q_order), (k, kv_order)))
    q_means, shares = q_means * scale, q_sizes / q_sizes.sum(-1, keepdim=True).clamp(min=1)
    # A tile without tokens must get nothing, whatever its mean.
    bias = k_sizes.log().flatten(2)[..., None, :]
    scores = torch.empty(*q.shape[:2], *q_sizes.shape[2:3], *k_sizes.shape[2:3], device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, own = k_means[b, h].flatten(0, 1).t(), bias[b % len(bias), h % bias.shape[1]]
            step = max(1, _CHUNK_SCORES // (q_means.shape[3] * keys.shape[1]))
            for first in range(0, q_means.shape[2], step):
                part = slice(first, first + step)
                weights = (q_means[b, h, part] @ keys + own).softmax(-1).unflatten(-1, k_sizes.shape[2:])
                by_tile = shares[b % len(shares), h % shares.shape[1], part, :, None]
                scores[b, h, part] = (weights.sum(-1) * by_tile).sum(1)
    return scores


def _tile_means(x: Tensor, order: TokenOrder, tokens: int) -> tuple[Tensor, Tensor]:
    """Means `[B, H, M, P, D]` and sizes `[B|1, H|1, M, P]` float32 of the tiles of every block, some of them empty."""
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}: 16 is usual")
    parts = -(-order.geometry.largest // tokens)
    place = tokens * torch.arange(parts, dtype=torch.int32, device=x.device)
    starts = (order.offsets[..., :-1, None] + place).minimum(order.offsets[..., 1:, None])
    offsets = torch.cat([starts.flatten(-2), order.offsets[..., -1:]], -1)
    means = pooled_blocks(x, offsets).float().unflatten(2, (-1, parts))
    return means, offsets.diff(dim=-1).float().unflatten(-1, (-1, parts))


def product_spread(k: Tensor, v: Tensor, order: TokenOrder) -> Tensor:
    """How far each block's first order is from that of all blocks, `[B, H, M]` float32.

    It is the Frobenius norm of `H_j - H`, where `H_j` is the sum over block j of `(k - mean(k))^T v` and `H` the mean
    of all `H_j`.

    Args:
        k: `[B, H, N, D]`, in the order's positions.
        v: `[B, H, N, DV]`, likewise.
        order: the order, of which only the blocks are used.

    Source: PISA (arXiv 2602.01077), equation 11.
    """
    found = torch.empty(*k.shape[:2], order.num_blocks, device=k.device)
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            layout = BlockLayout.of_head(order, b, h)
            means = block_moments(k[b : b + 1, h : h + 1], layout, v[b : b + 1, h : h + 1], products=True).products
            assert means is not None
            # On a GPU there are more of them than blocks.
            sums = means[0, 0, : order.num_blocks].float() * layout.sizes[0, 0, :, None, None]
            found[b, h] = torch.linalg.matrix_norm(sums - sums.mean(0))
    return found


def self_similarity(x: Tensor, order: TokenOrder) -> Tensor:
    """Mean cosine between every two tokens of a block, themselves included: how well their mean stands for them.

    Args:
        x: `[B, H, N, D]`, in the order's positions.
        order: the order, of which only the blocks are used.

    Returns:
        `[B, H, M]` float32, from 0 to 1; 0 for an empty block.

    Source: CosSim of SpargeAttn (arXiv 2502.18137).
    """
    # The mean of all products of unit vectors is the square of their mean.
    return pooled_blocks(F.normalize(x.float(), dim=-1), order.offsets).square().sum(-1)


@torch.no_grad()
def sampled_peaks(
    q: Tensor, k: Tensor, q_order: TokenOrder, kv_order: TokenOrder, samples: int, scale: float | None = None
) -> Tensor:
    """Largest attention weight in every block, among a few tokens of each block.

    `max over i, j of softmax over j of (scale * q_i . k_j)`, where i and j go through at most `samples` tokens at equal
    distances in each query and key block; the softmax is over all sampled keys. With `samples` of B tokens a block it
    costs the square of samples / B of all products, and never holds more than a few rows of them.

    Args:
        q, k: `[B, H, N, D]`, in the orders' positions.
        q_order, kv_order: orders whose blocks all heads share.
        samples: tokens a block, at least 1.
        scale: of the logits; `D ** -0.5` by default.

    Returns:
        `[B, H, Mq, Mk]` float32, from 0 to 1; 0 for empty blocks.

    Raises:
        ValueError: no samples, or orders whose blocks heads do not share.

    Source: the mask of adaptive block-sparse attention in Video-BLADE (arXiv 2508.10774).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows, row_is_new = _samples(q_order, samples)
    columns, column_is_new = _samples(kv_order, samples)
    keys = k.index_select(2, columns.flatten()).float().transpose(-1, -2)
    missing = ~column_is_new.flatten()
    peaks = torch.empty(*q.shape[:2], len(rows), len(columns), dtype=torch.float32, device=q.device)
    blocks = max(1, _CHUNK_SCORES // columns.numel() // samples)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for start in range(0, len(rows), blocks):
                part = rows[start : start + blocks]
                queries = q[b, h].index_select(0, part.flatten()).float() * scale
                weights = (queries @ keys[b, h]).masked_fill_(missing, float("-inf")).softmax(-1)
                peaks[b, h, start : start + blocks] = weights.view(*part.shape, *columns.shape).amax((1, 3))
    return peaks.masked_fill(~row_is_new.any(-1)[:, None], 0.0)


def _samples(order: TokenOrder, samples: int) -> tuple[Tensor, Tensor]:
    """Positions `[M, samples]` int64 at equal distances in each block, and where they are no repetition or void."""
    if order.offsets.shape[:2] != (1, 1):
        raise ValueError(f"offsets must be [1, 1, M+1] to sample tokens, got {tuple(order.offsets.shape)}: share them")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}: 32 is usual")
    place = torch.arange(samples, device=order.offsets.device)
    sizes = order.block_sizes[0, 0, :, None].long()
    # A block of fewer tokens has each of them several times; all but one are left out.
    within = (2 * place + 1) * sizes // (2 * samples)
    is_new = F.pad(within.diff(dim=-1) > 0, (1, 0), value=True) & (sizes > 0)
    return (order.offsets[0, 0, :-1, None].long() + within).clamp(max=order.num_tokens - 1), is_new


@torch.no_grad()
def sampled_weights(q: Tensor, k: Tensor, rows: Tensor, scale: float | None = None) -> Tensor:
    """Attention weights of a few queries, `[B, H, R, N]` float32, each row summing to 1.

    Args:
        q, k: `[B, H, N, D]`.
        rows: `[R]` int64 positions of the queries.
        scale: of the logits; `D ** -0.5` by default.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q.index_select(2, rows).float() * scale) @ k.float().transpose(-1, -2)).softmax(-1)


def sink_and_nearness(order: TokenOrder, grid: TokenGrid, sink: int) -> Tensor:
    """Static scores `[1, 1, M, M]` float32: the first `sink` video blocks above all, then blocks by nearness.

    Args:
        order: an order whose blocks all heads share.
        grid: the layout of the sequence.
        sink: blocks; 0 for none.
    """
    number = torch.arange(order.num_blocks, device=order.offsets.device)
    is_video = ~text_blocks(grid, order.offsets)[0, 0]
    is_sink = is_video & (is_video.cumsum(0) <= sink)
    nearness = order.num_blocks - (number[:, None] - number).abs()
    return nearness.masked_fill(is_sink, 2 * order.num_blocks)[None, None].float()
