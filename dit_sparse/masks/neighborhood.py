"""Neighborhood masks on the video grid: per axis a window, a stride and a dilation.

The definition is that of Generalized Neighborhood Attention (arXiv 2504.16922) as NATTEN computes it
(`csrc/include/natten/cuda/reference/mask.hpp` and `src/natten/backends/flex.py` in SHI-Labs/NATTEN). Along one axis:

- tokens whose coordinates are equal modulo the dilation form a group, and see only each other;
- inside a group, every `stride` queries share the window of their leader, the middle one (of an even number the right
  one), or the group's last where it ends sooner;
- the window holds `window` keys around the leader, one more to the left where `window` is even, and is moved inwards
  at the borders, so that it never shrinks.

A key is seen where it is seen along all three axes. Text sees everything and is seen by everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.types import TokenGrid, TokenOrder

Axes = tuple[int, int, int]

_AXIS_NAMES = ("frames", "height", "width")
# Elements of the largest intermediate tensor: 32 MB in float64.
_MAX_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class NeighborhoodPredicate:
    """Whether a query token sees a key token; made by `neighborhood_predicate`, which checks the arguments.

    Args:
        grid: the layout of the sequence.
        window, stride, dilation: along frames, height and width.
    """

    grid: TokenGrid
    window: Axes
    stride: Axes
    dilation: Axes

    uniform: ClassVar[bool] = True

    def __call__(self, batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        """Bool, of the shape that `q_token` and `k_token` (int64 token numbers, on any device) broadcast to."""
        q_video, k_video = q_token - self.grid.video_start, k_token - self.grid.video_start
        video_len = self.grid.video_len
        text = (q_video < 0) | (q_video >= video_len) | (k_video < 0) | (k_video >= video_len)
        q_coordinates, k_coordinates = _coordinates(self.grid, q_video), _coordinates(self.grid, k_video)
        f, h, w = (_sees(q_coordinates[axis], k_coordinates[axis], *self._along(axis)) for axis in range(3))
        return text | (f & h & w)

    def axis_masks(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Which coordinates see which along each axis: bool `[F, F]`, `[H, H]`, `[W, W]`, query first."""
        along = (torch.arange(length, device=device) for length in self.grid.shape)
        f, h, w = (_sees(i[:, None], i[None, :], *self._along(axis)) for axis, i in enumerate(along))
        return f, h, w

    def _along(self, axis: int) -> tuple[int, int, int, int]:
        return self.grid.shape[axis], self.window[axis], self.stride[axis], self.dilation[axis]


def neighborhood_predicate(
    grid: TokenGrid, window: int | Axes, stride: int | Axes = 1, dilation: int | Axes = 1
) -> NeighborhoodPredicate:
    """Token predicate of a neighborhood mask.

    Args:
        grid: the layout of the sequence.
        window: keys that a query sees along frames, height and width; one number stands for all three.
        stride: queries that share a window, per axis; 1 is a sliding window, `window` is blocked attention.
        dilation: distance between the keys of a window, per axis.

    Returns:
        Predicate for `BlockMask`, comparable and hashable.

    Raises:
        ValueError: a size below 1, a stride larger than its window, or `window * dilation` larger than the grid.

    Source: Generalized Neighborhood Attention (arXiv 2504.16922).
    Differs from the paper: no causal axes.
    """
    predicate = NeighborhoodPredicate(
        grid, per_axis("window", window), per_axis("stride", stride), per_axis("dilation", dilation)
    )
    for axis in range(3):
        _check_axis(_AXIS_NAMES[axis], *predicate._along(axis))
    return predicate


def neighborhood_pairs(
    grid: TokenGrid, order: TokenOrder, window: int | Axes, stride: int | Axes = 1, dilation: int | Axes = 1
) -> Tensor:
    """How many query-key pairs of each pair of blocks a neighborhood mask keeps; exact for any order.

    Args:
        grid: the layout of the sequence.
        order: the order of queries and keys.
        window, stride, dilation: as in `neighborhood_predicate`.

    Returns:
        `[B|1, H|1, M, M]` float64 with the order's leading dimensions, text counted as seeing and seen.

    Raises:
        ValueError: as in `neighborhood_predicate`, or an order for another number of tokens.

    Source: Generalized Neighborhood Attention (arXiv 2504.16922), the tiles that its simulator visits.
    """
    predicate = neighborhood_predicate(grid, window, stride, dilation)
    if order.num_tokens != grid.num_tokens:
        raise ValueError(
            f"order must hold the {grid.num_tokens} tokens of grid {grid}, got {order.num_tokens}: make it for that"
        )
    batch, heads = torch.broadcast_shapes(order.inverse.shape[:2], order.offsets.shape[:2])
    inverse = order.inverse.expand(batch, heads, -1).flatten(0, 1)
    offsets = order.offsets.expand(batch, heads, -1).flatten(0, 1)
    pairs = [_visible_pairs(predicate, *one_head) for one_head in zip(inverse, offsets, strict=True)]
    return torch.stack(pairs).unflatten(0, (batch, heads))


def neighborhood_blocks(
    grid: TokenGrid, order: TokenOrder, window: int | Axes, stride: int | Axes = 1, dilation: int | Axes = 1
) -> tuple[Tensor, Tensor]:
    """Which pairs of blocks a neighborhood mask keeps, and which of them only in part.

    Args, Raises: as in `neighborhood_pairs`.

    Returns:
        `kept` and `partial`, bool `[B|1, H|1, M, M]`: a block pair is kept where at least one query sees a key, and
        partial where not every query sees every key.
    """
    return blocks_of_pairs(neighborhood_pairs(grid, order, window, stride, dilation), order)


def blocks_of_pairs(pairs: Tensor, order: TokenOrder) -> tuple[Tensor, Tensor]:
    """`kept` and `partial`, as `neighborhood_blocks` returns them, from the counts of `neighborhood_pairs`."""
    sizes = order.block_sizes.double()
    kept = pairs > 0
    return kept, kept & (pairs < sizes[..., :, None] * sizes[..., None, :])


def per_axis(name: str, value: int | Sequence[int]) -> Axes:
    """One size per axis from a number for all three or a sequence of three.

    Raises:
        ValueError: not one or three whole numbers of at least 1.
    """
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(values) != 3 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
        raise ValueError(
            f"{name} must be a whole number of at least 1, or three of them (frames, height, width), got {value}"
        )
    return values[0], values[1], values[2]


def _check_axis(axis: str, length: int, window: int, stride: int, dilation: int) -> None:
    if dilation > length:
        raise ValueError(f"dilation along {axis} must be at most the grid's {length}, got {dilation}: use 1 there")
    if window * dilation > length:
        raise ValueError(
            f"window * dilation along {axis} must be at most the grid's {length}, got {window} * {dilation} = "
            f"{window * dilation}: use a window of at most {length // dilation} there"
        )
    if stride > window:
        raise ValueError(
            f"stride along {axis} must be at most the window's {window}, got {stride}: "
            "a larger one would leave keys that nobody sees"
        )


def _coordinates(grid: TokenGrid, video_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rest = video_token // grid.width
    return rest // grid.height, rest % grid.height, video_token % grid.width


def _sees(query: Tensor, key: Tensor, length: int, window: int, stride: int, dilation: int) -> Tensor:
    """Whether coordinate `query` sees coordinate `key` along one axis."""
    group = query % dilation
    group_length = (length - 1 - group) // dilation + 1
    leader = torch.minimum(query // dilation // stride * stride + stride // 2, group_length - 1)
    start = torch.minimum((leader - window // 2).clamp(min=0), group_length - window)
    place = key // dilation
    return (key % dilation == group) & (place >= start) & (place < start + window)


def _visible_pairs(predicate: NeighborhoodPredicate, inverse: Tensor, offsets: Tensor) -> Tensor:
    """`[M, M]` float64 number of query-key pairs seen in each pair of blocks of one head."""
    grid = predicate.grid
    blocks = offsets.shape[-1] - 1
    block_of = BlockMask.block_of(offsets[None, None])[0, 0][inverse]
    block_of = block_of[grid.video_start : grid.video_start + grid.video_len]
    video = torch.bincount(block_of, minlength=blocks).double()
    sizes = offsets.diff().double()
    pairs = sizes[:, None] * sizes[None, :] - video[:, None] * video[None, :]
    # float64 counts exactly and is left alone by autocast and TF32.
    masks = [mask.double() for mask in predicate.axis_masks(offsets.device)]
    step = max(1, _MAX_ELEMENTS // grid.video_len)
    for start in range(0, blocks, step):
        keys = torch.arange(start, min(start + step, blocks), device=offsets.device)
        seen = _seen_by_token(masks, block_of, keys, grid)
        pairs[:, start : start + step].index_add_(0, block_of, seen.flatten(1).T)
    return pairs


def _seen_by_token(masks: list[Tensor], block_of: Tensor, keys: Tensor, grid: TokenGrid) -> Tensor:
    """`[K, F, H, W]` float64: how many tokens of each key block the query at every place of the grid sees.

    The mask is a product of one mask per axis, so the sum over a block's tokens is three small matrix products.
    """
    seen = (block_of == keys[:, None]).double().reshape(-1, *grid.shape)
    for equation, mask in zip(("kfhw,vw->kfhv", "kfhw,vh->kfvw", "kfhw,vf->kvhw"), reversed(masks), strict=True):
        seen = torch.einsum(equation, seen, mask)
    return seen
