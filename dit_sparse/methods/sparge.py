"""SpargeAttn: blocks by the products of their means, where the means can be trusted.

Source: Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference",
arXiv 2502.18137.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels import pooled_blocks
from dit_sparse.masks import keep_text, select_density, self_similarity, top_p, without_text
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_budget, check_share
from dit_sparse.reorder import curve_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site


@dataclass(frozen=True)
class SpargeAttention(AnyGrid):
    """The first of the two stages: the smallest set of key blocks that reaches `top_p` of a row (algorithm 1).

    Tokens follow a space-filling curve, so that those of a block are alike. Keys are taken less their mean. A block is
    self-similar where the mean cosine of its tokens exceeds `similarity`. Rows are the softmax of the products of block
    means over the self-similar key blocks; all other key blocks are kept, as are all blocks of other query blocks, and
    text as queries and as keys.

    The control is `top_p`; the density that it comes to is in the statistics. With `density` every query block keeps
    equally many key blocks instead, those of largest products of means, so that it is met: `similarity` has no part.

    Differs from the paper: the second stage, which skips products with values whose weights are far below the running
    maximum, is left to the schedule (`skip_factor`, by whole query blocks); nothing is quantised; the block that
    crosses `top_p` is kept; the thresholds are one for all heads, where the paper searches them for each.

    Raises:
        ValueError: a share outside (0, 1], or a block below 1.
    """

    top_p: float = field(default=0.98, metadata={"help": "share of its attention that a query block keeps"})
    similarity: float = field(
        default=0.6, metadata={"help": "least mean cosine inside a block for its mean to stand for it"}
    )
    density: float | None = field(
        default=None, metadata={"help": "share of query-key pairs computed, in place of top_p; none: top_p decides"}
    )
    block_q: int = field(default=128, metadata={"help": "tokens a query block"})
    block_k: int = field(default=64, metadata={"help": "tokens a key block"})

    name: ClassVar[str] = "sparge"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "SpargeAttn (arXiv 2502.18137), algorithm 1"
    described: ClassVar[Description] = Description(
        order="space-filling curve, query blocks of 128, key blocks of 64",
        score="softmax of the products of block means, of blocks whose tokens are alike",
        selection="top-p of a row, and all blocks whose tokens are unlike; or the best of a row by density; text kept",
        differs="only the first of two stages; nothing is quantised; one threshold for all heads",
    )
    control: ClassVar[str] = "top_p"
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP

    def __post_init__(self) -> None:
        check_budget(self.density)
        check_share("top_p", self.top_p)
        check_share("similarity", self.similarity)
        check_block("block_q", self.block_q)
        check_block("block_k", self.block_k)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the block means of `q, k` `[B, H, N, D]`."""
        grid = site.grid
        q_order, kv_order = (curve_once(grid, block, q.device) for block in (self.block_q, self.block_k))
        q, k = q_order.permute(q), kv_order.permute(k).float()
        k = k - k.mean(2, keepdim=True)
        q_means, k_means = (pooled_blocks(x, o.offsets).float() for x, o in ((q, q_order), (k, kv_order)))
        logits = q.shape[-1] ** -0.5 * (q_means @ k_means.transpose(-1, -2))
        if self.density is not None:
            kept = select_density(logits, self.density, q_order, kv_order, grid)
        else:
            q_alike = (self_similarity(q, q_order) > self.similarity)[..., :, None]
            k_alike = (self_similarity(k, kv_order) > self.similarity)[..., None, :]
            # Without any block that is alike a row would be NaN.
            shares = logits.masked_fill(~k_alike, float("-inf")).softmax(-1).nan_to_num(0.0)
            kept = top_p(without_text(shares, grid, kv_order.offsets), self.top_p) | ~k_alike | ~q_alike
            kept = keep_text(kept, grid, q_order.offsets, kv_order.offsets)
        return AttentionPlan(q_order, kv_order, BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets))
