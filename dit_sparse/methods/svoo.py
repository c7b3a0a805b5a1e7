"""SVOO: queries and keys clustered by how they attend to each other, with a floor for each layer.

Source: "Training-Free Sparse Attention for Fast Video Generation via Offline Layer-Wise Sparsity Profiling and Online
Bidirectional Co-Clustering", arXiv 2603.18636.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_count, check_list, check_share, freeze_lists
from dit_sparse.methods.svg2 import SparseVideoGen2, cluster_count, orders_of, video_of
from dit_sparse.reorder import co_clusters
from dit_sparse.types import Previous, Site, TokenOrder


@dataclass(frozen=True)
class Svoo(SparseVideoGen2):
    """Co-clusters; of their pairs the smallest set that reaches `top_p`, and no fewer than the layer's floor.

    Queries and keys are clustered by turns: keys by their products with the query centroids, queries by those with the
    key centroids. A pair scores as in SVG2. Each query cluster keeps key clusters up to `top_p`, at least a share of
    them that is the layer's own, from `floors`, which are profiled offline: how many keys hold most of the attention of
    the layer, within bounds (`scripts/profile_floors.py`). Clusters are made anew each `recluster` of the run; in
    between the pairs alone are chosen anew.

    The control is `top_p`; the density that it comes to is in the statistics. With `density` every query cluster keeps
    equally many key clusters instead, so that it is met.

    Differs from the paper: there are as many clusters as make a mean size (256 and 1024 there); they start from tokens
    at equal distances, later from the last ones, instead of from random tokens; one floor a layer for all heads.

    Raises:
        ValueError: as `SparseVideoGen2`, or a floor outside (0, 1].
    """

    first_iterations: int = field(default=2, metadata={"help": "rounds of co-clustering at the first plan of a run"})
    iterations: int = field(default=2, metadata={"help": "rounds whenever clusters are made anew"})
    floors: tuple[float, ...] | None = field(
        default=None, metadata={"help": "least share of the key clusters kept, for each layer; none: min_kept for all"}
    )
    recluster: float = field(default=0.4, metadata={"help": "share of the run after which clusters are made anew"})

    name: ClassVar[str] = "svoo"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "SVOO (arXiv 2603.18636)"
    described: ClassVar[Description] = Description(
        order="co-clusters of queries and keys by their products with each other's, uneven, per head",
        score="softmax of the products of cluster means, weighted by size",
        selection="top-p of a row and no fewer than a layer's floor, or equally many a row by density; text kept",
        cached="the clusters",
        differs="clusters of a mean size, started from tokens at equal distances; one floor a layer",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze_lists(self)
        check_share("recluster", self.recluster)
        if self.floors is not None:
            check_list("floors", self.floors)
            check_count("the number of floors", len(self.floors))
            for floor in self.floors:
                check_share("floors", floor)

    def _orders(self, q: Tensor, k: Tensor, site: Site, previous: Previous | None) -> tuple[TokenOrder, TokenOrder]:
        plan = None if previous is None else previous.plan
        if (
            plan is not None
            and previous is not None
            and self._period(previous.step, site) == self._period(site.step, site)
        ):
            return plan.q_order, plan.kv_order
        (q_start, q_count), (k_start, k_count) = self._starts(q, k, site.grid, plan)
        iterations = self.first_iterations if plan is None else self.iterations
        q_labels, k_labels = co_clusters(video_of(q, site.grid), video_of(k, site.grid), q_start, k_start, iterations)
        return orders_of(q_labels, q_count, k_labels, k_count, site.grid)

    def _period(self, step: int, site: Site) -> int:
        return int(step / site.num_steps / self.recluster)

    def _least(self, site: Site) -> int:
        if self.floors is None:
            return super()._least(site)
        if len(self.floors) != site.num_layers:
            raise ValueError(f"floors must have one for each of {site.num_layers} layers, got {len(self.floors)}")
        return max(1, int(self.floors[site.layer] * cluster_count(site.grid, self.k_tokens)))
