"""The types that carry the design: where a call is, how its tokens are ordered, which blocks it keeps.

Tensors are `q, k, v, out` in `[B, H, N, D]`; `Mq`, `Mk` count query and key blocks; `True` means attend.
A leading dimension written `B|1` or `H|1` is either full or 1, and 1 means shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask, PackedBlockMask, TokenPredicate
from dit_sparse.head_shard import HeadShard, select_heads
from dit_sparse.token_order import PACKED_FROM, BlockGeometry, PackedOrder, TokenOrder

__all__ = [
    "PACKED_FROM",
    "REMAINDERS",
    "AttentionPlan",
    "BlockGeometry",
    "BlockMask",
    "HeadShard",
    "Method",
    "PackedOrder",
    "PackedPlan",
    "Previous",
    "Remainder",
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
        sigma: noise level of the step, where the scheduler has one: the share of noise, from 0 to 1, as flow matching
            mixes it, `(1 - sigma) x + sigma noise`.
        branch: which guidance branch this forward is: "cond", "uncond" or, in families that put both into one batch,
            always "cond_uncond".
        model: which transformer of the pipeline, for pipelines with two.
        in_order: the tokens stand in the method's `shared_order` already, and so does the LSE of earlier calls.
        heads: which of the model's heads the call has, where they are spread over ranks; a method that compares heads
            gets those of the others from it. `None`: it has all.
        branches: how many guidance branches of each sample the batch has, all samples of one before those of the next;
            1 also where a "cond_uncond" forward has no guidance, or a cache leaves a branch out.
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
    heads: HeadShard | None = None
    branches: int = 1


Remainder = Literal["none", "mean", "value", "mass"]
REMAINDERS: tuple[Remainder, ...] = get_args(Remainder)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All that a kernel sees of a method: two token orders, the blocks kept between them, what the others leave.

    The remainder stands in for the key blocks that a query block does not keep. A block kept in part counts as kept:
    the keys that its predicate drops leave nothing. Let `B_j, k_j, v_j, var_j` be block j's size, mean key, mean value
    and variance of the keys in each channel, and `q_I, q2_I` the mean query and mean squared query of query block I.
    `m_Ij = scale^2 / 2 * sum over the channels of q2_I * var_j` is half the variance of the scores that the keys of j
    get, were the channels independent. U(I) are the blocks not kept, not empty, and with `m_Ij` at most 2: above that a
    few keys may hold a block's mass, of which its mean says little, and it leaves nothing.

    - "none": dropped.
    - "mean": every j in U(I) is one more key `k_j` with value `v_j` and weight `a_ij = B_j exp(scale q_i . k_j)`.
    - "value": as "mean", and the numerator gets `(sum over U(I) of a_ij) * scale * q_i C_I` too, the first order of the
      exponential. `C_I = sum over U(I) of w_Ij H_j`, where `H_j` is the mean over block j of `(k - k_j)^T v`, a matrix
      of channels x channels, and `w_I` the share of each `a_ij` for the query `q_I`.
    - "mass": as "value", with `a_ij` larger by `exp(min(m_Ij, ln B_j))`, the second order.

    A query of which every block is kept has no remainder; one that keeps nothing has the remainder alone. Row sums
    count the weights `a_ij`. With one-token blocks all but "none" equal dense attention. Heads may have a remainder of
    their own, further up in this list than `remainder`: `safe_remainder` gives it to those that would be worse off.

    With a `skip_threshold` some of the kept blocks are skipped while attention is computed: their scores are, but no
    weight, and their values are not read. A query block goes over its key blocks in turn, first those kept whole and
    then those kept in part, each by ascending index. Let `m_i` be the largest score that its query i has had so far,
    -inf at first, and `s_i` the largest that it has in the next block. Where `s_i < m_i + ln(skip_threshold)` for every
    query i of the block, the key block is skipped for all of them: it adds nothing to output and row sums. So whole
    blocks of the plan are skipped or not, whatever the tiles of a kernel. Scores of queries and keys that a predicate
    hides from each other are -inf. Source: BLASST (arXiv 2512.12087), algorithm 1.

    Args:
        q_order, kv_order: orders of the query and of the key/value tokens.
        block_mask: which key blocks each query block keeps; its offsets are those of the orders.
        remainder: "none", "mean", "value" or "mass".
        skip_threshold: from 0, where nothing is skipped, to 1; then `remainder` must be "none".
        head_remainders: `[B|1, H|1]` int8, each head's own remainder by its place in `REMAINDERS`, at most that of
            `remainder`; `None` where all heads have that one.

    Attributes:
        derived: what kernels have made of this plan, to be made once; it goes when the plan goes.

    Raises:
        ValueError: the mask's block counts are not the orders', an unknown remainder, a `skip_threshold` outside
            [0, 1], or one beside a remainder, or `head_remainders` that are not int8 `[B|1, H|1]`.
    """

    q_order: TokenOrder
    kv_order: TokenOrder
    block_mask: BlockMask
    remainder: Remainder = "none"
    skip_threshold: float = 0.0
    head_remainders: Tensor | None = None
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        got = (self.block_mask.num_q_blocks, self.block_mask.num_k_blocks)
        want = (self.q_order.num_blocks, self.kv_order.num_blocks)
        if got != want:
            raise ValueError(f"block_mask must have the orders' {want[0]} x {want[1]} blocks, got {got[0]} x {got[1]}")
        if self.remainder not in REMAINDERS:
            raise ValueError(f"remainder must be one of {', '.join(REMAINDERS)}, got {self.remainder!r}")
        if not 0 <= self.skip_threshold <= 1:
            raise ValueError(f"skip_threshold must be from 0 to 1, got {self.skip_threshold!r}")
        if self.skip_threshold and self.remainder != "none":
            raise ValueError(
                f"remainder must be 'none' where blocks are skipped, got {self.remainder!r} with skip_threshold "
                f"{self.skip_threshold:g}: a skipped block leaves nothing"
            )
        own = self.head_remainders
        if own is not None and (own.dtype != torch.int8 or own.ndim != 2):
            raise ValueError(f"head_remainders must be int8 [B|1, H|1], got {own.dtype} {tuple(own.shape)}")
        for order in (self.q_order, self.kv_order):
            order.geometry  # noqa: B018  # read once here, so that no later call waits for the device

    @classmethod
    def from_kept(
        cls,
        order: TokenOrder,
        kept: Tensor,
        *,
        kv_order: TokenOrder | None = None,
        remainder: Remainder = "none",
        **mask_options: Any,
    ) -> AttentionPlan:
        """Plan that keeps the blocks `kept` `[B|1, H|1, Mq, Mk]` (bool); one `order` serves both without `kv_order`."""
        kv_order = order if kv_order is None else kv_order
        mask = BlockMask.from_bool(kept, order.offsets, kv_order.offsets, **mask_options)
        return cls(order, kv_order, mask, remainder)

    def with_remainder(self, remainder: Remainder) -> AttentionPlan:
        """This plan with another remainder, for all heads."""
        if remainder == self.remainder and self.head_remainders is None:
            return self
        return replace(self, remainder=remainder, head_remainders=None)

    def with_skip(self, skip_threshold: float) -> AttentionPlan:
        """This plan with another `skip_threshold`."""
        return self if skip_threshold == self.skip_threshold else replace(self, skip_threshold=skip_threshold)

    @property
    def is_dense(self) -> bool:
        """Whether dense attention is known to compute the same: every block is kept, and none is skipped."""
        return self.block_mask.is_full and not self.skip_threshold

    @cached_property
    def density(self) -> Tensor:
        """`[B|1, H|1]` float64 share of query-key pairs kept, exact in tokens; skipped ones are kept ones here."""
        return self.block_mask.density(self.q_order.index, self.kv_order.index)

    def pack(self) -> PackedPlan:
        """This plan at rest; how many pairs it keeps is counted first, so that nobody need do it again."""
        pairs = self.block_mask.count_pairs(self.q_order.index, self.kv_order.index)
        mask = replace(self.block_mask, kept_pairs=pairs).pack()
        orders = self.q_order.pack(), self.kv_order.pack()
        return PackedPlan(*orders, mask, self.remainder, self.skip_threshold, self.head_remainders)

    def unpack(self) -> AttentionPlan:
        """This plan, which is not at rest."""
        return self

    def of_heads(self, heads: tuple[int, ...]) -> AttentionPlan:
        """What this plan says of `heads`; made once a plan, and the plan itself where it says the same of all."""
        if self.num_heads == 1:
            return self
        if ("heads", heads) not in self.derived:
            q_order = self.q_order.of_heads(heads)
            kv_order = q_order if self.kv_order is self.q_order else self.kv_order.of_heads(heads)
            own = None if self.head_remainders is None else select_heads(self.head_remainders, heads)
            self.derived["heads", heads] = AttentionPlan(
                q_order, kv_order, self.block_mask.of_heads(heads), self.remainder, self.skip_threshold, own
            )
        return self.derived["heads", heads]

    @property
    def num_heads(self) -> int:
        """Heads that the plan tells apart; 1 where it says the same of all."""
        return max(x.shape[1] for x in self._by_head)

    @property
    def num_batches(self) -> int:
        """Batches that the plan tells apart; 1 where it says the same of all."""
        return max(x.shape[0] for x in self._by_head)

    @property
    def _by_head(self) -> list[Tensor]:
        tensors = [self.q_order.index, self.kv_order.index, self.block_mask.kv_counts]
        return tensors if self.head_remainders is None else [*tensors, self.head_remainders]

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
        own = None if self.head_remainders is None else self.head_remainders.to(device)
        return AttentionPlan(q_order, kv_order, self.block_mask.to(device), self.remainder, self.skip_threshold, own)


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """A plan at rest: its block mask takes one bit a block, a long order of heads 4 bytes a token, until it is used.

    At Wan-14B's 720p a mask of blocks of 64 is 7 MB so, and 223 MB as lists; an order is 12 MB, and 48 MB in use.
    """

    packed_q_order: TokenOrder | PackedOrder
    packed_kv_order: TokenOrder | PackedOrder
    block_mask: PackedBlockMask
    remainder: Remainder = "none"
    skip_threshold: float = 0.0
    head_remainders: Tensor | None = None

    @property
    def q_order(self) -> TokenOrder:
        """The order of the query tokens."""
        return self.packed_q_order.unpack()

    @property
    def kv_order(self) -> TokenOrder:
        """The order of the key and value tokens."""
        return self.packed_kv_order.unpack()

    def unpack(self) -> AttentionPlan:
        """The plan itself, equal to the one that was packed."""
        mask = self.block_mask.unpack()
        return AttentionPlan(
            self.q_order, self.kv_order, mask, self.remainder, self.skip_threshold, self.head_remainders
        )


@dataclass(frozen=True, eq=False)
class Previous:
    """What a method is given of the last time it was asked at the same site.

    Args:
        plan: the plan in use so far, if any, perhaps at rest: `plan.unpack()` is the plan itself in either case.
        lse: `[B, H, N]` float32 natural-log row sums of the last dense attention here, if it was kept and as long as
            another plan may read them.
        step: the step that `plan` or `lse` comes from.
        drift: how far mean queries and keys had moved since `plan` when that was last looked at, if it is watched.
    """

    plan: AttentionPlan | PackedPlan | None = None
    lse: Tensor | None = None
    step: int = 0
    drift: float | None = None


Scope = Literal["grid", "layer", "sample", "call"]


@runtime_checkable
class Method(Protocol):
    """A published method: it turns one attention call into a plan, and keeps no state of its own.

    A method is a frozen dataclass whose fields are its parameters.

    Attributes:
        name: its name in configs and on the command line.
        version: of its parameters, written into configs.
        paper: what it follows, with the arXiv id.
        scope: what a plan depends on: the "grid" alone, the "layer" too, the data of the "call", or that of the
            "sample", whose guidance branches then share one plan.
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
