"""Neighborhood masks on the video grid: per axis a window, a stride, a dilation, and causal or not.

The definition is that of Generalized Neighborhood Attention (arXiv 2504.16922) as NATTEN computes it
(`csrc/include/natten/cuda/reference/mask.hpp` and `src/natten/backends/flex.py` in SHI-Labs/NATTEN). Along one axis:

- tokens whose coordinates are equal modulo the dilation form a group, and see only each other;
- inside a group, every `stride` queries share the window of their leader, the middle one (of an even number the right
  one), or the group's last where it ends sooner;
- the window holds `window` keys around the leader, one more to the left where `window` is even, and is moved inwards
  at the borders, so that it never shrinks;
- on a causal axis the leader is the last of the queries, the window's `window` keys end with it, and each query sees
  those of them that are not after itself: windows are cut at the start of the axis, and shorter within a stride.

A key is seen where it is seen along all three axes. Text sees everything and is seen by everything. An axis of one
token takes no part, so images are grids of one frame and sequences are grids of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.types import TokenGrid

Axes = tuple[int, int, int]
Flags = tuple[bool, bool, bool]

_AXIS_NAMES = ("frames", "height", "width")


@dataclass(frozen=True)
class AxisWindow:
    """The neighborhood along one axis.

    Args:
        length: of the axis, in tokens.
        window, stride, dilation: in tokens of one dilation group, in queries, in tokens.
        causal: whether a query sees nothing after itself.
    """

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    def bounds(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The group of each coordinate `query` (int64, any shape), and the window's first place and end in it."""
        group, place = query % self.dilation, query // self.dilation
        group_length = (self.length - 1 - group) // self.dilation + 1
        ahead = self.stride - 1 if self.causal else self.stride // 2
        leader = torch.minimum(place // self.stride * self.stride + ahead, group_length - 1)
        if self.causal:
            return group, (leader - self.window + 1).clamp(min=0), place + 1
        start = torch.minimum((leader - self.window // 2).clamp(min=0), group_length - self.window)
        return group, start, start + self.window

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether coordinate `query` sees coordinate `key`, of the shape that they broadcast to."""
        group, start, end = self.bounds(query)
        place = key // self.dilation
        return (key % self.dilation == group) & (place >= start) & (place < end)


@dataclass(frozen=True)
class NeighborhoodPredicate:
    """Whether a query token sees a key token; made by `neighborhood_predicate`, which checks the arguments.

    Args:
        grid: the layout of the sequence.
        window, stride, dilation, causal: along frames, height and width.
    """

    grid: TokenGrid
    window: Axes
    stride: Axes
    dilation: Axes
    causal: Flags

    uniform: ClassVar[bool] = True

    def __call__(self, batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        """Bool, of the shape that `q_token` and `k_token` (int64 token numbers, on any device) broadcast to."""
        q_video, k_video = q_token - self.grid.video_start, k_token - self.grid.video_start
        video_len = self.grid.video_len
        text = (q_video < 0) | (q_video >= video_len) | (k_video < 0) | (k_video >= video_len)
        q_coordinates, k_coordinates = _coordinates(self.grid, q_video), _coordinates(self.grid, k_video)
        f, h, w = (axis.sees(q, k) for axis, q, k in zip(self.axes, q_coordinates, k_coordinates, strict=True))
        return text | (f & h & w)

    @property
    def axes(self) -> tuple[AxisWindow, AxisWindow, AxisWindow]:
        """The neighborhood along frames, height and width."""
        f, h, w = map(AxisWindow, self.grid.shape, self.window, self.stride, self.dilation, self.causal)
        return f, h, w


def neighborhood_predicate(
    grid: TokenGrid,
    window: int | Axes,
    stride: int | Axes = 1,
    dilation: int | Axes = 1,
    causal: bool | Flags = False,
) -> NeighborhoodPredicate:
    """Token predicate of a neighborhood mask.

    Args:
        grid: the layout of the sequence.
        window: keys that a query sees along frames, height and width; one number stands for all three.
        stride: queries that share a window, per axis; 1 is a sliding window, `window` is blocked attention.
        dilation: distance between the keys of a window, per axis.
        causal: whether a query sees nothing after itself, per axis.

    Returns:
        Predicate for `BlockMask`, comparable and hashable.

    Raises:
        ValueError: a size below 1, a stride larger than its window, or `window * dilation` larger than the grid. An
            axis of one token fits any size.

    Source: Generalized Neighborhood Attention (arXiv 2504.16922).
    """
    values = zip(
        grid.shape,
        per_axis("window", window),
        per_axis("stride", stride),
        per_axis("dilation", dilation),
        flag_per_axis("causal", causal),
        strict=True,
    )
    axes = [AxisWindow(1, 1, 1, 1, False) if value[0] == 1 else AxisWindow(*value) for value in values]
    for name, axis in zip(_AXIS_NAMES, axes, strict=True):
        _check_axis(name, axis)
    w, s, d, c = zip(*((axis.window, axis.stride, axis.dilation, axis.causal) for axis in axes), strict=True)
    return NeighborhoodPredicate(grid, w, s, d, c)


def per_axis(name: str, value: int | Sequence[int]) -> Axes:
    """One size per axis from a number for all three or a sequence of three.

    Raises:
        ValueError: not one or three whole numbers of at least 1.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    if len(values) != 3 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
        raise ValueError(
            f"{name} must be a whole number of at least 1, or three of them (frames, height, width), got {value}"
        )
    return values[0], values[1], values[2]


def flag_per_axis(name: str, value: bool | Sequence[bool]) -> Flags:
    """One flag per axis from one for all three or a sequence of three.

    Raises:
        ValueError: not one or three bools.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    if len(values) != 3 or not all(isinstance(v, bool) for v in values):
        raise ValueError(f"{name} must be true or false, or three of them (frames, height, width), got {value}")
    return values[0], values[1], values[2]


def _check_axis(name: str, axis: AxisWindow) -> None:
    length, window, dilation = axis.length, axis.window, axis.dilation
    if dilation > length:
        raise ValueError(f"dilation along {name} must be at most the grid's {length}, got {dilation}: use 1 there")
    if window * dilation > length:
        raise ValueError(
            f"window * dilation along {name} must be at most the grid's {length}, got {window} * {dilation} = "
            f"{window * dilation}: use a window of at most {length // dilation} there"
        )
    if axis.stride > window:
        raise ValueError(
            f"stride along {name} must be at most the window's {window}, got {axis.stride}: "
            "a larger one would leave keys that nobody sees"
        )


def _coordinates(grid: TokenGrid, video_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rest = video_token // grid.width
    return rest // grid.height, rest % grid.height, video_token % grid.width
