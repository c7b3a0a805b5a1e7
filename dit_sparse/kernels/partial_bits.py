"""Partial blocks as packed bits: what their predicate keeps, evaluated once a plan, in the form GPU kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.block_mask import pack_words
from dit_sparse.types import AttentionPlan

__all__ = ["partial_bits"]

_BITS_BYTES = 2 << 30
_CHUNK_PAIRS = 1 << 26


def partial_bits(plan: AttentionPlan, batch: int, heads: int) -> Tensor | None:
    """What the predicate keeps of every partial block, 32 keys a word; `None` for a plan that has no such blocks.

    Made when first asked for and kept with the plan. It reads how many there are back from the device.

    Args:
        plan: the plan; its predicate may tell batches and heads apart.
        batch, heads: of the call.

    Returns:
        `[B|1, H|1, Mq, L, largest query block, words]` int32, entry `l` of a row being its `l`-th partial block.

    Raises:
        ValueError: the bits would not fit in 2 GiB.
    """
    if plan.block_mask.partial_counts is None:
        return None
    key = "partial_bits", batch, heads
    if key not in plan.derived:
        plan.derived[key] = _pack(plan, batch, heads)
    return plan.derived[key]


def _pack(plan: AttentionPlan, batch: int, heads: int) -> Tensor | None:
    mask = plan.block_mask
    assert mask.partial_counts is not None
    assert mask.partial_indices is not None
    width = int(mask.partial_counts.max())
    if width == 0:
        return None
    q_block, k_block = plan.q_order.geometry.largest, plan.kv_order.geometry.largest
    if getattr(mask.predicate, "uniform", False):
        tensors = (mask.partial_indices, mask.q_offsets, mask.k_offsets, plan.q_order.index, plan.kv_order.index)
        batch, heads = (max(x.shape[dim] for x in tensors) for dim in (0, 1))
    words = -(-k_block // 32)
    size = batch * heads * mask.num_q_blocks * width * q_block * words * 4
    if size > _BITS_BYTES:
        raise ValueError(
            f"partial blocks must fit in {_BITS_BYTES >> 20} MiB of packed bits on this backend, got {size >> 20} MiB; "
            "use 'flex', or a method that rounds to blocks"
        )
    bits = torch.empty(batch, heads, mask.num_q_blocks, width, q_block, words, dtype=torch.int32, device=mask.device)
    rows = max(1, _CHUNK_PAIRS // (width * q_block * words * 32))
    for b in range(batch):
        for h in range(heads):
            for start in range(0, mask.num_q_blocks, rows):
                part = slice(start, start + rows)
                bits[b, h, part] = _pack_rows(plan, b, h, part, width, q_block, words)
    return bits


def _pack_rows(plan: AttentionPlan, b: int, h: int, part: slice, width: int, q_block: int, words: int) -> Tensor:
    """`[rows, L, q_block, words]` int32 of some query blocks of one head."""
    mask = plan.block_mask
    assert mask.predicate is not None
    assert mask.partial_indices is not None
    device = mask.device
    q_bounds, k_bounds = _at(mask.q_offsets, b, h), _at(mask.k_offsets, b, h)
    blocks = _at(mask.partial_indices, b, h)[part, :width].long().clamp(0, mask.num_k_blocks - 1)
    q_token = _tokens(_at(plan.q_order.index, b, h), q_bounds[:-1][part], q_block)
    k_token = _tokens(_at(plan.kv_order.index, b, h), k_bounds[blocks], words * 32)
    batch, head = (torch.tensor(value, device=device) for value in (b, h))
    allowed = mask.predicate(batch, head, q_token[:, None, :, None], k_token[:, :, None, :])
    return pack_words(allowed.expand(*blocks.shape, q_block, words * 32))


def _tokens(index: Tensor, starts: Tensor, length: int) -> Tensor:
    """`[..., length]` tokens at the positions from `starts` on; past the end the last one, which a mask hides."""
    positions = starts[..., None].long() + torch.arange(length, device=index.device)
    return index[positions.clamp(max=index.shape[0] - 1)]


def _at(x: Tensor, b: int, h: int) -> Tensor:
    return x[b % x.shape[0], h % x.shape[1]]
