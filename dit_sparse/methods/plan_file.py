"""Calibrated plans on disk: safetensors with packed masks and a header that says what they are for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_sparse.block_mask import PackedBlockMask
from dit_sparse.reorder import AXIS_ORDERS, axis_order, axis_orders_per_head
from dit_sparse.types import AttentionPlan, TokenGrid, TokenOrder

FORMAT = "dit-sparse-plan"
VERSION = 1


@dataclass(frozen=True)
class PlanFile:
    """One calibration: per layer the axis order of each head and the blocks it keeps.

    Args:
        path: the safetensors file.
        grid, block: what it was calibrated for; text of any length fits.
        num_layers: how many layers it has.
        notes: whatever else was stored, such as the model's name.
    """

    path: Path
    grid: TokenGrid
    block: int
    num_layers: int
    notes: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PlanFile:
        """Read the header of `path`.

        Raises:
            ValueError: no such file, no plan file, a damaged one, or one of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"plan_file must be an existing file, got {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"plan_file must be in the format {FORMAT!r}, got {str(path)!r} in another")
            header = json.loads(metadata["header"])
            if header["version"] != VERSION:
                raise ValueError(f"plan_file must have version {VERSION}, got version {header['version']!r}")
            return cls(path, TokenGrid(**header["grid"]), header["block"], header["num_layers"], header["notes"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"plan_file {str(path)!r} is damaged: {error}; calibrate again") from error

    def check(self, grid: TokenGrid) -> None:
        """Raise ValueError unless this plan is for `grid`; the text may be of another length, as all of it is kept."""
        same_side = grid.text_first == self.grid.text_first or not (grid.text_len and self.grid.text_len)
        if grid.shape != self.grid.shape or not same_side:
            raise ValueError(f"plan_file {str(self.path)!r} is for the grid {self.grid}, got {grid}; calibrate for it")

    def plan(self, grid: TokenGrid, layer: int, heads: int, device: torch.device) -> AttentionPlan:
        """The plan of one layer, on `device`.

        Raises:
            ValueError: another grid, a layer or a number of heads that the file does not have, or damaged tensors.
        """
        self.check(grid)
        if layer >= self.num_layers:
            raise ValueError(f"plan_file {str(self.path)!r} has {self.num_layers} layers, got layer {layer}")
        try:
            with safe_open(self.path, framework="pt") as file:
                axes, bits = (file.get_tensor(f"layer.{layer}.{name}") for name in ("axes", "blocks"))
        except SafetensorError as error:
            raise ValueError(f"plan_file {str(self.path)!r} is damaged: {error}; calibrate again") from error
        if axes.shape != (heads,) or int(axes.max()) >= len(AXIS_ORDERS):
            raise ValueError(f"plan_file {str(self.path)!r} must have {heads} heads, got axes {tuple(axes.shape)}")
        names = [AXIS_ORDERS[i] for i in axes.tolist()]
        own = axis_orders_per_head(self.grid, names, self.block, device=device)
        want = (heads, own.num_blocks, -(-own.num_blocks // 8))
        if bits.shape != want:
            raise ValueError(f"plan_file {str(self.path)!r} must have blocks {want}, got {tuple(bits.shape)}")
        mask = PackedBlockMask(bits[None].to(device), None, own.offsets, own.offsets).unpack()
        if grid == self.grid:
            return AttentionPlan(own, own, mask)
        order = axis_orders_per_head(grid, names, self.block, device=device)
        return AttentionPlan.from_kept(order, self._with_other_text(mask.kept_blocks, grid))

    def _with_other_text(self, kept: Tensor, grid: TokenGrid) -> Tensor:
        """The video's blocks of `kept` `[1, H, M, M]` with as many text blocks, all kept, as `grid` has."""
        video = -(-grid.video_len // self.block)
        old, new = (-(-g.text_len // self.block) if g.text_first else 0 for g in (self.grid, grid))
        blocks = video + -(-grid.text_len // self.block)
        result = torch.ones(*kept.shape[:2], blocks, blocks, dtype=torch.bool, device=kept.device)
        inside = slice(old, old + video)
        result[..., new : new + video, new : new + video] = kept[..., inside, inside]
        return result

    @staticmethod
    def save(
        path: str | os.PathLike[str],
        plans: Mapping[int, AttentionPlan],
        grid: TokenGrid,
        block: int,
        notes: Mapping[str, Any],
    ) -> None:
        """Write `plans` by layer, all of them on axis orders, to `path` through a temporary name.

        Raises:
            ValueError: layers are missing, or a plan whose order is none of the six axis orders.
        """
        if sorted(plans) != list(range(len(plans))) or not plans:
            raise ValueError(f"plans must cover layers 0 to n-1, got {sorted(plans)}")
        tensors: dict[str, Tensor] = {}
        for layer, plan in plans.items():
            tensors[f"layer.{layer}.axes"] = torch.tensor(_axes_of(plan.q_order, grid, block), dtype=torch.uint8)
            tensors[f"layer.{layer}.blocks"] = plan.block_mask.pack().full_bits[0].cpu().contiguous()
        header = {
            "version": VERSION,
            "grid": vars(grid),
            "block": block,
            "num_layers": len(plans),
            "notes": dict(notes),
        }
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        save_file(tensors, temporary, metadata={"format": FORMAT, "header": json.dumps(header)})
        os.replace(temporary, path)


def _axes_of(order: TokenOrder, grid: TokenGrid, block: int) -> list[int]:
    """Which of the six axis orders each head of `order` is."""
    known = torch.cat([axis_order(grid, axes, block, device=order.index.device).index[0] for axes in AXIS_ORDERS])
    same = (order.index[0, :, None] == known[None]).all(-1)
    if not bool(same.any(1).all()):
        raise ValueError("plans must be on axis orders, got a head with another order")
    return same.int().argmax(1).tolist()
