"""Building blocks of masks: block scores, selections, and neighborhoods on the grid."""

from dit_sparse.masks.heaviest import blocks_above, heaviest_blocks, mass_threshold, with_other_text
from dit_sparse.masks.neighborhood import (
    NeighborhoodPredicate,
    neighborhood_blocks,
    neighborhood_predicate,
)
from dit_sparse.masks.order_metrics import best_orders, metrics_by_order, order_metrics
from dit_sparse.masks.score import pooled_scores
from dit_sparse.masks.select import Ranking, density_to_blocks, keep_text, select_density, threshold, top_k, top_p

__all__ = [
    "NeighborhoodPredicate",
    "Ranking",
    "best_orders",
    "blocks_above",
    "density_to_blocks",
    "heaviest_blocks",
    "keep_text",
    "mass_threshold",
    "metrics_by_order",
    "neighborhood_blocks",
    "neighborhood_predicate",
    "order_metrics",
    "pooled_scores",
    "select_density",
    "threshold",
    "top_k",
    "top_p",
    "with_other_text",
]
