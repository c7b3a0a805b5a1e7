"""Plans of a file on a device, with the next layer's mask on its way while this layer computes.

Source: PAROAttention (arXiv 2506.16054) prefetches its masks so; two of them are on the device at a time.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from dit_sparse.block_mask import PackedBlockMask
from dit_sparse.masks import with_other_text
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.reorder import axes_once, block_tokens, choose_order
from dit_sparse.types import AttentionPlan, PackedOrder, TokenGrid, TokenOrder

Place = tuple[str, int, int]
"""Transformer, layer and slot of a mask."""


@dataclass(frozen=True)
class _Arriving:
    """A mask on its way to the device, the event after its copy, and the pinned source that must last until then."""

    bits: Tensor
    done: torch.cuda.Event | None = None
    source: Tensor | None = None


class PlanReader:
    """Reads the plans of one file for one device.

    Layers with the same choice of orders share one order, so that what kernels find out about it is found out once. An
    order lasts as long as a plan in use or at rest has it.

    Args:
        file: the plan file.
        device: where the plans are wanted.
    """

    def __init__(self, file: PlanFile, device: torch.device) -> None:
        self.file = file
        self.device = device
        self._orders: weakref.WeakValueDictionary[tuple[TokenGrid, tuple[str, ...]], TokenOrder | PackedOrder] = (
            weakref.WeakValueDictionary()
        )
        self._axes: dict[tuple[str, int], tuple[str, ...]] = {}
        self._ahead: dict[Place, _Arriving] = {}
        self._lock = Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def plan(self, model: str, layer: int, slot: int, grid: TokenGrid | None = None) -> AttentionPlan:
        """The plan of one layer; the mask that is wanted next begins to arrive.

        Args:
            model, layer, slot: whose, and which of its masks.
            grid: the file's, but for the length of the text; `None` is the file's own.

        Raises:
            ValueError: the layer's data are damaged.
        """
        own, grid = self.file.header.grid, grid or self.file.header.grid
        order = self._order(model, layer, own)
        with self._lock:
            arriving = self._ahead.pop((model, layer, slot), None) or self._fetch((model, layer, slot))
            following = self._following(model, layer, slot)
            self._ahead = {} if following is None else {following: self._fetch(following)}
        packed = PackedBlockMask(self._arrived(arriving)[None], None, order.offsets, order.offsets)
        if grid == own:
            return AttentionPlan(order, order, packed.unpack())
        kept = with_other_text(packed.unpack().kept_blocks, own, grid, block_tokens(self.file.header.block), True)
        return AttentionPlan.from_kept(self._order(model, layer, grid), kept)

    def _following(self, model: str, layer: int, slot: int) -> Place | None:
        """The next layer with the same slot, or the first layer with the next slot."""
        plans = self.file.plans_of(model)
        if layer + 1 < plans.layers:
            return model, layer + 1, slot
        return (model, 0, slot + 1) if slot + 1 < len(plans.starts) else None

    def _fetch(self, place: Place) -> _Arriving:
        bits = self.file.bits(*place)
        if self._stream is None:
            return _Arriving(bits.to(self.device))
        source = bits.pin_memory()
        with torch.cuda.stream(self._stream):
            copy = source.to(self.device, non_blocking=True)
            return _Arriving(copy, self._stream.record_event(), source)

    def _arrived(self, arriving: _Arriving) -> Tensor:
        if arriving.done is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arriving.done)
            # The allocator must not hand the memory out while this stream still reads it.
            arriving.bits.record_stream(current)
        return arriving.bits

    def _order(self, model: str, layer: int, grid: TokenGrid) -> TokenOrder:
        if (model, layer) not in self._axes:
            self._axes[model, layer] = self.file.axes(model, layer)
        axes = self._axes[model, layer]
        known = self._orders.get((grid, axes))
        if known is not None:
            return known.unpack()
        orders = {name: axes_once(grid, name, self.file.header.block, self.device) for name in axes}
        if len(orders) == 1:
            return orders[axes[0]]
        numbers = {name: number for number, name in enumerate(orders)}
        # Tensors made in inference mode could not be used where gradients are recorded.
        with torch.inference_mode(False):
            choice = torch.tensor([[numbers[name] for name in axes]], device=self.device)
            order = choose_order(list(orders.values()), choice)
        self._orders[grid, axes] = order.pack()
        return order


@lru_cache(maxsize=2)
def reader_of(file: PlanFile, device: torch.device) -> PlanReader:
    """The reader of `file` for `device`; the last two are kept, each with the one mask that it has read ahead."""
    return PlanReader(file, device)
