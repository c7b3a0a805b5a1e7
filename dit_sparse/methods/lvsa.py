"""LVSA: a window of frames, the first ones, and key frames that move on with every step.

Source: LVSA, arXiv 2605.31057.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import among_text, keep_text
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_count, check_share
from dit_sparse.reorder import frames_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid


@dataclass(frozen=True)
class Lvsa(AnyGrid):
    """Whole frames: the `first` ones and a few key frames for all queries, and the frames nearest to each query's own.

    Key frames lie evenly between the others and move on by one frame a step, so that each frame is one in its turn. All
    queries attend to about `share` of the frames: the nearest take 2 `window` + 1 of them, or half where that is less,
    and key frames the rest. A window passes over key frames, which all queries see anyhow. Text is kept as queries and
    as keys.

    The control is `share`, to whole frames: what it comes to is in the statistics.

    Differs from the paper: which attends to as many frames as the model was trained for, so that no video of that
    length or less is sparse; the window takes at most half of the share; key frames are as many as the share leaves, at
    every step, instead of every n-th frame; an image has rows for frames.

    Raises:
        ValueError: a share outside (0, 1], a window or number of first frames below 0, or a block below 1.
    """

    share: float = field(default=0.5, metadata={"help": "share of the frames that a query attends to"})
    window: int = field(default=3, metadata={"help": "frames before and after a query's own, at most"})
    first: int = field(default=1, metadata={"help": "frames at the start that all queries attend to"})
    block: int = field(default=64, metadata={"help": "most tokens a block; blocks share a frame equally"})

    name: ClassVar[str] = "lvsa"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "LVSA (arXiv 2605.31057)"
    described: ClassVar[Description] = Description(
        order="raster, blocks that share a frame equally",
        score="none",
        selection="whole frames: a window, the first, and key frames that move on every step; text kept",
        cached="the masks",
        differs="a share of the frames instead of the length that the model was trained for; rows of an image",
    )
    scope: ClassVar[Scope] = "call"  # of the step
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_count("window", self.window, 0)
        check_count("first", self.first, 0)
        check_block("block", self.block)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan that depends on the grid and the step of `site` alone."""
        grid = site.grid
        if grid.frames == 1:
            grid = replace(grid, frames=grid.height, height=1)
        near, keys = _budget(grid.frames, self.share, self.window, self.first)
        moved = site.step % (grid.frames - self.first) if keys else 0
        return _plan(grid, self.block, self.first, near, keys, moved, q.device)


def _budget(frames: int, share: float, window: int, first: int) -> tuple[int, int]:
    """How many nearest frames and how many key frames a query sees."""
    wanted = max(1, round(share * frames))
    near = min(2 * window + 1, max(1, wanted // 2))
    return near, max(0, min(wanted - near, frames) - first)


def _shared(frames: int, first: int, keys: int, moved: int) -> set[int]:
    """The frames that all queries see; as many of them at any `moved`."""
    others = frames - first
    return {*range(min(first, frames)), *(first + (moved + math.ceil(i * others / keys)) % others for i in range(keys))}


@lru_cache(maxsize=64)
def _plan(
    grid: TokenGrid, block: int, first: int, near: int, keys: int, moved: int, device: torch.device
) -> AttentionPlan:
    # Tensors made in inference mode could not be used where gradients are recorded.
    with torch.inference_mode(False):
        order = frames_once(grid, block, device)
        shared = _shared(grid.frames, first, keys, moved)
        others = [frame for frame in range(grid.frames) if frame not in shared]
        sees = torch.zeros(grid.frames, grid.frames, dtype=torch.bool)
        sees[:, sorted(shared)] = True
        for frame in range(grid.frames):
            # Of two frames equally far the earlier.
            sees[frame, sorted(others, key=lambda other: (abs(other - frame), other))[:near]] = True
        blocks = -(-grid.height * grid.width // block)
        video = sees.repeat_interleave(blocks, 0).repeat_interleave(blocks, 1).to(device)
        kept = among_text(video, grid, order.num_blocks)[None, None]
        return AttentionPlan.from_kept(order, keep_text(kept, grid, order.offsets, order.offsets))
