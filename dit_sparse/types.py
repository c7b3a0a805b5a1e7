"""The types that carry the design: where a call is, how its tokens are ordered, which blocks it keeps.

Tensors are `q, k, v, out` in `[B, H, N, D]`; `Mq`, `Mk` count query and key blocks; `True` means attend.
A leading dimension written `B|1` or `H|1` is either full or 1, and 1 means shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask, PackedBlockMask, TokenPredicate

__all__ = [
    "AttentionPlan",
    "BlockGeometry",
    "BlockMask",
    "Method",
    "PackedPlan",
    "Previous",
    "Scope",
    "Site",
    "TokenGrid",
    "TokenOrder",
    "TokenPredicate",
]


@dataclass(frozen=True)
class TokenGrid:
    """How a joint sequence is laid out: a video grid in raster order, with text before, after or not at all.

    Args:
        frames, height, width: the video grid in tokens (after patching), each at least 1.
        text_len: number of text tokens in the same sequence; 0 where text goes through cross-attention.
        text_first: whether the text comes before the video.

    Raises:
        ValueError: a size below 1, or a negative `text_len`.
    """

    frames: int
    height: int
    width: int
    text_len: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.text_len < 0:
            raise ValueError(f"text_len must be 0 or more, got {self.text_len}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width) in tokens."""
        return self.frames, self.height, self.width

    @property
    def video_len(self) -> int:
        return self.frames * self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.video_len + self.text_len

    @property
    def video_start(self) -> int:
        """Position of the first video token."""
        return self.text_len if self.text_first else 0

    @property
    def text_start(self) -> int:
        """Position of the first text token; meaningless without text."""
        return 0 if self.text_first else self.video_len

    def __str__(self) -> str:
        text = "" if not self.text_len else f" + {self.text_len} text {'first' if self.text_first else 'last'}"
        return f"{self.frames}x{self.height}x{self.width}{text}"


@dataclass(frozen=True)
class Site:
    """Where in a run one attention call is; it replaces every global counter.

    Args:
        grid: the layout of the sequence.
        layer, num_layers: index of the transformer block, and how many there are.
        step, num_steps: index of the denoising step, and how many the scheduler makes.
        sigma: noise level of the step, where the scheduler has one.
        branch: which guidance branch this forward is: "cond", "uncond" or both in one batch, "cond_uncond".
        model: which transformer of the pipeline, for pipelines with two.
        in_order: the tokens stand in the method's `shared_order` already, and so does the LSE of earlier calls.
    """

    grid: TokenGrid
    layer: int = 0
    num_layers: int = 1
    step: int = 0
    num_steps: int = 1
    sigma: float | None = None
    branch: str = "cond"
    model: str = "transformer"
    in_order: bool = False


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
        """Order from `index` (`[N]` or `[B|1, H|1, N]`) and block `offsets` (`[M+1]` or `[B|1, H|1, M+1]`)."""
        index = index.to(torch.int64).reshape(index.shape if index.ndim == 3 else (1, 1, -1))
        offsets = offsets.to(torch.int32).reshape(offsets.shape if offsets.ndim == 3 else (1, 1, -1))
        positions = torch.arange(index.shape[-1], device=index.device).expand_as(index)
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

    def to(self, device: torch.device | str) -> TokenOrder:
        """The same order on another device."""
        moved = TokenOrder(self.index.to(device), self.inverse.to(device), self.offsets.to(device), self.is_identity)
        moved.__dict__["geometry"] = self.geometry  # known already, and reading it back there would wait
        return moved


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    if index.shape[:2] == (1, 1):
        return x.index_select(2, index[0, 0])
    index = index.reshape(index.shape + (1,) * (x.ndim - 3)).expand(*x.shape[:2], -1, *x.shape[3:])
    return x.gather(2, index)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All that a kernel sees of a method: two token orders and the blocks kept between them.

    Args:
        q_order, kv_order: orders of the query and of the key/value tokens.
        block_mask: which key blocks each query block keeps; its offsets are those of the orders.

    Attributes:
        derived: what kernels have made of this plan, to be made once; it goes when the plan goes.

    Raises:
        ValueError: the mask's block counts are not the orders'.
    """

    q_order: TokenOrder
    kv_order: TokenOrder
    block_mask: BlockMask
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        got = (self.block_mask.num_q_blocks, self.block_mask.num_k_blocks)
        want = (self.q_order.num_blocks, self.kv_order.num_blocks)
        if got != want:
            raise ValueError(f"block_mask must have the orders' {want[0]} x {want[1]} blocks, got {got[0]} x {got[1]}")
        for order in (self.q_order, self.kv_order):
            order.geometry  # noqa: B018  # read once here, so that no later call waits for the device

    @classmethod
    def from_kept(cls, order: TokenOrder, kept: Tensor, **mask_options: Any) -> AttentionPlan:
        """Plan with one `order` for queries and keys, keeping the blocks `kept` `[B|1, H|1, Mq, Mk]` (bool)."""
        return cls(order, order, BlockMask.from_bool(kept, order.offsets, order.offsets, **mask_options))

    @cached_property
    def density(self) -> Tensor:
        """`[B|1, H|1]` float64 share of query-key pairs kept, exact in tokens."""
        return self.block_mask.density(self.q_order.index, self.kv_order.index)

    def pack(self) -> PackedPlan:
        """This plan at rest; how many pairs it keeps is counted first, so that nobody need do it again."""
        pairs = self.block_mask.count_pairs(self.q_order.index, self.kv_order.index)
        return PackedPlan(self.q_order, self.kv_order, replace(self.block_mask, kept_pairs=pairs).pack())

    def unpack(self) -> AttentionPlan:
        """This plan, which is not at rest."""
        return self

    def token_mask(self) -> Tensor:
        """`[B|1, H|1, N, N]` bool mask over tokens in the sequence's own order. For tests: it is N x N."""
        mask = self.block_mask.to_bool(self.q_order.index, self.kv_order.index)
        b = max(mask.shape[0], self.q_order.index.shape[0], self.kv_order.index.shape[0])
        h = max(mask.shape[1], self.q_order.index.shape[1], self.kv_order.index.shape[1])
        rows, columns = mask.shape[-2:]
        mask = mask.expand(b, h, -1, -1)
        mask = mask.gather(2, self.q_order.inverse.expand(b, h, -1)[..., None].expand(-1, -1, -1, columns))
        return mask.gather(3, self.kv_order.inverse.expand(b, h, -1)[..., None, :].expand(-1, -1, rows, -1))

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The same plan on another device."""
        q_order = self.q_order.to(device)
        kv_order = q_order if self.kv_order is self.q_order else self.kv_order.to(device)
        return AttentionPlan(q_order, kv_order, self.block_mask.to(device))


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """A plan at rest: its block mask takes one bit a block, and is expanded when used.

    At Wan-14B's 720p a mask of blocks of 64 is 7 MB so, and 223 MB as lists.
    """

    q_order: TokenOrder
    kv_order: TokenOrder
    block_mask: PackedBlockMask

    def unpack(self) -> AttentionPlan:
        """The plan itself, equal to the one that was packed."""
        return AttentionPlan(self.q_order, self.kv_order, self.block_mask.unpack())


@dataclass(frozen=True, eq=False)
class Previous:
    """What a method is given of the last time it was asked at the same site.

    Args:
        plan: the plan in use so far, if any, perhaps at rest: `plan.unpack()` is the plan itself in either case.
        lse: `[B, H, N]` float32 natural-log row sums of the last dense attention here, if it was kept.
        step: the step that `plan` or `lse` comes from.
    """

    plan: AttentionPlan | PackedPlan | None = None
    lse: Tensor | None = None
    step: int = 0


Scope = Literal["grid", "layer", "call"]


@runtime_checkable
class Method(Protocol):
    """A published method: it turns one attention call into a plan, and keeps no state of its own.

    A method is a frozen dataclass whose fields are its parameters.

    Attributes:
        name: its name in configs and on the command line.
        version: of its parameters, written into configs.
        paper: what it follows, with the arXiv id.
        scope: what a plan depends on: the "grid" alone, the "layer" too, or the data of the "call".
        uses_lse: whether `plan` can use the LSE of a dense attention.
        refresh: shares of the run at which a "layer" or "call" plan is made anew, unless the schedule says otherwise.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    paper: ClassVar[str]

    @property
    def scope(self) -> Scope: ...

    @property
    def refresh(self) -> tuple[float, ...]: ...

    @property
    def uses_lse(self) -> bool: ...

    def check(self, grid: TokenGrid) -> None:
        """Whether the parameters fit `grid`; called before a run, so that nothing fails in its middle.

        Raises:
            ValueError: a parameter that does not fit.
        """
        ...

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder | None:
        """The order that all heads, layers and steps on `grid` share, always the same object; `None` without one.

        A pipeline may put its tokens into it once a forward instead of once a call. Then `site.in_order` is set, and
        plans must use this order for queries and keys.
        """
        ...

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k, v` `[B, H, N, D]` at `site`.

        Raises:
            ValueError: a parameter that does not fit the site's grid.
        """
        ...
