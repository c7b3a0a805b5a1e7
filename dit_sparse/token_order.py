"""Token orders: a permutation of the sequence, cut into blocks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.head_shard import select_heads

__all__ = ["PACKED_FROM", "BlockGeometry", "PackedOrder", "TokenOrder"]

PACKED_FROM = 65_536
"""Tokens from which on an order packs. Remaking it takes 0.1 ms on an H100 at 75,600 of them, and attention 66."""


class BlockGeometry(NamedTuple):
    """What a kernel's launcher needs to know of an order's blocks on the host.

    Args:
        largest: tokens in the largest block.
        run_start, run_end: the longest run of blocks that have this size in every batch and head.
    """

    largest: int
    run_start: int
    run_end: int

    @classmethod
    def of(cls, offsets: Tensor) -> BlockGeometry:
        """Geometry of the blocks that `offsets` `[B|1, H|1, M+1]` bound; reads them back from the device."""
        sizes = offsets.diff(dim=-1).flatten(0, 1).cpu()
        largest = int(sizes.max())
        even = (sizes == largest).all(0).tolist()
        best = start = end = 0
        for i, is_even in enumerate(even):
            start = start if is_even else i + 1
            if i + 1 - start > best:
                best, end = i + 1 - start, i + 1
        return cls(largest, end - best, end)


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A permutation of the sequence cut into blocks, shared or per batch and head; blocks may be uneven.

    Args:
        index: `[B|1, H|1, N]` int64; position `i` of the order holds token `index[..., i]`.
        inverse: `[B|1, H|1, N]` int64; token `t` stands at position `inverse[..., t]`.
        offsets: `[B|1, H|1, M+1]` int32; block `m` covers positions `offsets[m]` to `offsets[m+1]`.
        is_identity: the order is known to leave every token where it is, so nothing need be moved.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """

    index: Tensor
    inverse: Tensor
    offsets: Tensor
    is_identity: bool = False

    def __post_init__(self) -> None:
        if self.index.ndim != 3 or self.index.dtype != torch.int64:
            raise ValueError(f"index must be int64 [B|1, H|1, N], got {self.index.dtype} {tuple(self.index.shape)}")
        if self.inverse.shape != self.index.shape:
            raise ValueError(
                f"inverse must have index's shape {tuple(self.index.shape)}, got {tuple(self.inverse.shape)}"
            )
        if self.offsets.ndim != 3 or self.offsets.dtype != torch.int32:
            raise ValueError(
                f"offsets must be int32 [B|1, H|1, M+1], got {self.offsets.dtype} {tuple(self.offsets.shape)}"
            )

    @classmethod
    def from_index(cls, index: Tensor, offsets: Tensor, *, is_identity: bool = False) -> TokenOrder:
        """Order from `index` (`[N]` or `[B|1, H|1, N]`) and block `offsets` (`[M+1]` or `[B|1, H|1, M+1]`).

        Raises:
            ValueError: an `index` on the CPU that is no permutation; on a GPU that would have to be waited for.
        """
        index = index.to(torch.int64).reshape(index.shape if index.ndim == 3 else (1, 1, -1))
        offsets = offsets.to(torch.int32).reshape(offsets.shape if offsets.ndim == 3 else (1, 1, -1))
        positions = torch.arange(index.shape[-1], device=index.device).expand_as(index)
        if index.device.type == "cpu" and not is_identity and not torch.equal(index.sort(-1).values, positions):
            raise ValueError(
                f"index must hold each token from 0 to {index.shape[-1] - 1} once, got {index[0, 0, :8].tolist()}"
                f"{'...' if index.shape[-1] > 8 else ''}"
            )
        inverse = torch.empty_like(index).scatter_(-1, index, positions)
        return cls(index, inverse, offsets, is_identity)

    @property
    def num_tokens(self) -> int:
        return self.index.shape[-1]

    @property
    def num_blocks(self) -> int:
        return self.offsets.shape[-1] - 1

    @property
    def block_sizes(self) -> Tensor:
        """`[B|1, H|1, M]` int32 tokens a block."""
        return self.offsets.diff(dim=-1)

    @cached_property
    def geometry(self) -> BlockGeometry:
        """The blocks' sizes in short; read back from the device once an order.

        Raises:
            ValueError: `offsets` that do not rise from 0 to the number of tokens; kernels would read beyond them.
        """
        bounds = self.offsets.flatten(0, 1).cpu()
        if (bounds[:, 0] != 0).any() or (bounds[:, -1] != self.num_tokens).any() or (bounds.diff(dim=-1) < 0).any():
            raise ValueError(
                f"offsets must rise from 0 to the {self.num_tokens} tokens, got {bounds[0].tolist()[:8]}"
                f"{'...' if bounds.shape[1] > 8 else ''}, the last of them {int(bounds[0, -1])}"
            )
        return BlockGeometry.of(bounds[None])

    def count_blocks(self, start: int, stop: int) -> int:
        """Blocks with tokens from position `start` to `stop`, where they are most; reads them back from the device."""
        bounds = self.offsets.flatten(0, 1).cpu()
        first, end = bounds[:, :-1], bounds[:, 1:]
        return int(((first < stop) & (end > start) & (end > first)).sum(-1).max())

    def permute(self, x: Tensor) -> Tensor:
        """`x` `[B, H, N, ...]` with its tokens moved into this order."""
        return x if self.is_identity else _gather_tokens(x, self.index)

    def restore(self, x: Tensor) -> Tensor:
        """`x` `[B, H, N, ...]` in this order moved back to the sequence's own; exact inverse of `permute`."""
        return x if self.is_identity else _gather_tokens(x, self.inverse)

    def with_tokens(self, index: Tensor, inverse: Tensor) -> TokenOrder:
        """Another permutation, `index` and `inverse` `[B|1, H|1, N]`, in the same blocks, whose sizes stay known."""
        order = TokenOrder(index, inverse, self.offsets)
        order.__dict__["geometry"] = self.geometry  # reading it back again would wait for the device
        return order

    def pack(self) -> TokenOrder | PackedOrder:
        """This order at rest: itself, or the same packed one every time if heads or batches differ and it is long."""
        return self if self.index.shape[:2] == (1, 1) or self.num_tokens < PACKED_FROM else self._packed

    def unpack(self) -> TokenOrder:
        """This order, which is not at rest."""
        return self

    @cached_property
    def _packed(self) -> PackedOrder:
        return PackedOrder(self)

    @property
    def lasting(self) -> TokenOrder | PackedOrder:
        """What stays the same object while a plan of this order rests: what is packed of it, or else itself."""
        return self.__dict__.get("_packed", self)

    def of_heads(self, heads: tuple[int, ...]) -> TokenOrder:
        """This order for `heads` alone; itself where it is the same for all."""
        if self.index.shape[1] == 1 and self.offsets.shape[1] == 1:
            return self
        index, inverse = (select_heads(x, heads) for x in (self.index, self.inverse))
        if self.offsets.shape[1] == 1:
            return self.with_tokens(index, inverse)
        return TokenOrder(index, inverse, select_heads(self.offsets, heads))

    def to(self, device: torch.device | str) -> TokenOrder:
        """The same order on another device."""
        moved = TokenOrder(self.index.to(device), self.inverse.to(device), self.offsets.to(device), self.is_identity)
        moved.__dict__["geometry"] = self.geometry  # known already, and reading it back there would wait
        return moved


class PackedOrder:
    """An order at rest, of 4 bytes a token in place of 16: the inverse is made anew when it is used.

    Args:
        order: it is given back as long as others hold it, and an equal one afterwards.

    Attributes:
        index: `[B|1, H|1, N]` int32, as in `TokenOrder`.
        offsets: its own.
    """

    def __init__(self, order: TokenOrder) -> None:
        self.index = order.index.to(torch.int32)
        self.offsets = order.offsets
        self._is_identity = order.is_identity
        self._geometry = order.geometry
        self._known = weakref.ref(order)

    def unpack(self) -> TokenOrder:
        """The order itself; whoever unpacks it while another does gets the same object."""
        order = self._known()
        if order is None:
            # Tensors made in inference mode could not be used where gradients are recorded.
            with torch.inference_mode(False):
                order = TokenOrder.from_index(self.index, self.offsets, is_identity=self._is_identity)
            order.__dict__.update(geometry=self._geometry, _packed=self)  # reading the first back would wait
            self._known = weakref.ref(order)
        return order


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    if index.shape[:2] == (1, 1):
        return x.index_select(2, index[0, 0])
    index = index.reshape(index.shape + (1,) * (x.ndim - 3)).expand(*x.shape[:2], -1, *x.shape[3:])
    return x.gather(2, index)
