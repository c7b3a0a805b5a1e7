"""Building blocks of masks: block scores, selections, and neighborhoods on the grid."""

from dit_sparse.masks.neighborhood import (
    NeighborhoodPredicate,
    neighborhood_blocks,
    neighborhood_predicate,
)
from dit_sparse.masks.score import pooled_scores
from dit_sparse.masks.select import Ranking, density_to_blocks, keep_text, select_density, threshold, top_k, top_p

__all__ = [
    "NeighborhoodPredicate",
    "Ranking",
    "density_to_blocks",
    "keep_text",
    "neighborhood_blocks",
    "neighborhood_predicate",
    "pooled_scores",
    "select_density",
    "threshold",
    "top_k",
    "top_p",
]
