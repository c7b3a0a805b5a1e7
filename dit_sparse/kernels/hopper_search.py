"""Launches the Hopper kernel that tells what a block's mean in place of its tokens would change."""

from __future__ import annotations

import functools
import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.hopper_launch import aligned, descriptor, hopper_unavailable, multiprocessors, tile_layout
from dit_sparse.types import TokenOrder

__all__ = ["hopper_takes", "search_on_hopper"]

_KEYS = 64  # keys of a tile
_ROWS = 128  # probes of a thread block
_STAGES = 4
_LARGEST_DIM = 128
_START = 8  # blocks that a thread block could do while it starts
_MOST_SPANS = 8


class _Places(NamedTuple):
    """Key blocks, the largest first, as their kernel visits them.

    Args:
        table: `[3, Mk]` int32 numbers, first positions and sizes.
        whole: how many have `_KEYS` tokens.
        wide: how many have more than half as many.
    """

    table: Tensor
    whole: int
    wide: int


def hopper_takes(k: Tensor, v: Tensor, kv_order: TokenOrder) -> bool:
    """Whether the Hopper kernel computes this call: the GPU, the dtype, the channels and the size of key blocks."""
    if hopper_unavailable(k.device) is not None:
        return False
    dim = k.shape[-1]
    fits = dim == v.shape[-1] and dim % 8 == 0 and dim <= _LARGEST_DIM
    return fits and k.dtype in (torch.float16, torch.bfloat16) and kv_order.geometry.largest <= _KEYS


def search_on_hopper(
    probes: tuple[Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    spread: Tensor,
    largest_spread: float,
    q_order: TokenOrder,
    kv_order: TokenOrder,
    rows: int,
    scale: float,
) -> Tensor:
    """Squared errors `[B, H, Mq, Mk]` float32, for what `hopper_takes`.

    Nothing waits for the device after the first call with an order.

    Args:
        probes: some queries of each block, `[B, H, Mq * rows, D]`, with their output and row sums; contiguous.
        k, v: `[B, H, N, D]` in the order's positions.
        spread: `[B, H, Mq, Mk]` float32, of the scores of a block.
        largest_spread: above it a block leaves no remainder.
        q_order, kv_order: orders whose blocks all heads share.
        rows: probes a query block.
        scale: of the scores.
    """
    from dit_sparse.kernels.hopper_search_kernels import search_kernel

    q, out, lse = probes
    batch, heads, _, dim = q.shape
    q_blocks, blocks = q_order.num_blocks, kv_order.num_blocks
    slots = 1 << (rows - 1).bit_length()
    parts = max(1, slots // 64)
    found = torch.empty(batch, heads, q_blocks * parts, blocks, dtype=torch.float32, device=k.device)
    programs = batch * heads * -(-q_blocks * slots // _ROWS)
    span = _span(blocks, programs, multiprocessors(k.device))
    places = _places(kv_order)
    box = (_KEYS, 64 if dim <= 64 else 128)
    with torch.cuda.device(k.device):
        search_kernel[(programs * -(-blocks // span),)](
            *(descriptor(aligned(x), *box) for x in (k, v)),
            q, out, lse, spread, found, q_order.offsets.contiguous(), places.table,
            *q.stride()[:2], *lse.stride()[:2], *spread.stride()[:3], *found.stride()[:3],
            heads, q_blocks, blocks, rows, span, places.whole, places.wide, dim, scale * math.log2(math.e),
            largest_spread, SLOTS=slots, D=box[1], BLOCK_N=_KEYS, STAGES=_STAGES, FLAT=tile_layout(box, k.dtype),
            PRODUCER_REGISTERS=24, CONSUMER_REGISTERS=240, num_warps=4,
        )  # fmt: skip
    return found if parts == 1 else found.unflatten(2, (q_blocks, parts)).sum(3)


@functools.cache
def _span(blocks: int, programs: int, multiprocessors: int) -> int:
    """Key blocks a thread block, so that the last round of thread blocks is as full as may be."""

    def cost(spans: int) -> int:
        return -(-programs * spans // multiprocessors) * (-(-blocks // spans) + _START)

    return -(-blocks // min(range(1, _MOST_SPANS + 1), key=cost))


_known: weakref.WeakKeyDictionary[TokenOrder, _Places] = weakref.WeakKeyDictionary()


def _places(order: TokenOrder) -> _Places:
    """The key blocks of an order, which last as long as it does: their sizes are read back from the device once."""
    if order not in _known:
        # Tensors made in inference mode could not be used where gradients are recorded.
        with torch.inference_mode(False):
            offsets = order.offsets[0, 0].cpu()
            sizes = offsets.diff()
            ranked = sizes.argsort(descending=True, stable=True)
            table = torch.stack([ranked.int(), offsets[ranked], sizes[ranked]]).to(order.offsets.device)
        _known[order] = _Places(table, int((sizes == _KEYS).sum()), int((sizes > _KEYS // 2).sum()))
    return _known[order]
