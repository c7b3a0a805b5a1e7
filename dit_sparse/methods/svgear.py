"""SVG-EAR: clusters whose loss would be large are computed, the others are summed up by their means.

Source: Zhou et al., "SVG-EAR: Parameter-Free Linear Compensation for Sparse Video Generation via Error-aware Routing",
arXiv 2603.08982.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.kernels import remainder_errors
from dit_sparse.masks import fill_budget, keep_text, pooled_scores, select_density, text_blocks, top_k, top_p
from dit_sparse.methods.description import Description
from dit_sparse.methods.svg2 import SparseVideoGen2
from dit_sparse.types import Remainder, Site, TokenOrder


@dataclass(frozen=True)
class SvgEar(SparseVideoGen2):
    """The clusters of SVG2; of their pairs those whose means would be furthest from them, for the keys they cost.

    The error that leaving a key cluster to its mean would make is probed with the mean query of every query cluster on
    the real keys and values. A query cluster has the budget of keys that SVG2's `top_p` on products of means would
    spend, at least twice `min_kept`; it keeps the `min_kept` key clusters of largest products first, and fills up with
    those of the largest error a key. What is not kept is summed up by its means: the plan's remainder is "mean".

    The control is `top_p`; the density that it comes to is in the statistics. With `density` every query cluster keeps
    equally many key clusters instead, those of the largest error a key, so that it is met.

    Differs from the paper: as `SparseVideoGen2` does from its; and a pair whose keys lie too far apart for a mean
    leaves nothing, as every remainder here.

    Raises:
        ValueError: as `SparseVideoGen2`.
    """

    name: ClassVar[str] = "svgear"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "SVG-EAR (arXiv 2603.08982)"
    described: ClassVar[Description] = Description(
        order="k-means clusters of queries and of keys, uneven, per head",
        score="error that the means of a cluster would leave, probed with the mean query, a key",
        selection="as many keys a row as a top-p of products of means, or equally many by density; text kept; the rest "
        "as means",
        cached="the clusters of the last plan",
        differs="clusters as in svg2; keys that lie too far apart for a mean leave nothing",
    )
    own_remainder: ClassVar[Remainder] = "mean"

    def _kept(self, q: Tensor, k: Tensor, v: Tensor, q_order: TokenOrder, kv_order: TokenOrder, site: Site) -> Tensor:
        grid, sizes = site.grid, kv_order.block_sizes.clamp(min=1)
        scores = remainder_errors(q, k, v, q_order, kv_order) - sizes.log()[..., None, :]
        if self.density is not None:
            return select_density(scores, self.density, q_order, kv_order, grid)
        is_text = text_blocks(grid, kv_order.offsets)[..., None, :]
        shares = pooled_scores(q, k, q_order, kv_order).masked_fill(is_text, 0.0)
        least = self._least(site)
        spent = top_p(shares, self.top_p, 2 * least) & ~is_text
        budget = (spent * kv_order.block_sizes[..., None, :]).sum(-1)
        kept = fill_budget(
            top_k(shares, least), scores.masked_fill(is_text, float("-inf")), kv_order.block_sizes, budget
        )
        return keep_text(kept, grid, q_order.offsets, kv_order.offsets)
