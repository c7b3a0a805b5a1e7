"""Building blocks of masks: block scores, selections, and neighborhoods on the grid and on its tiles."""

from dit_sparse.masks.heaviest import (
    best_blocks,
    blocks_above,
    heaviest_blocks,
    heaviest_share,
    mass_threshold,
    spread_ties,
    with_other_text,
)
from dit_sparse.masks.neighborhood import NeighborhoodPredicate, neighborhood_predicate
from dit_sparse.masks.order_metrics import best_orders, metrics_by_order, order_metrics
from dit_sparse.masks.peak import block_extremes, block_maxima, block_sums, block_tokens, peak_logits
from dit_sparse.masks.probe import mask_rows, masked_errors, probe_rows
from dit_sparse.masks.score import pooled_scores, sampled_peaks, sampled_weights, self_similarity, sink_and_nearness
from dit_sparse.masks.select import (
    Ranking,
    among_text,
    blocks_a_row,
    blocks_for_share,
    density_to_blocks,
    fill_budget,
    keep_text,
    select_density,
    share_out,
    text_blocks,
    threshold,
    top_k,
    top_p,
    without_text,
)
from dit_sparse.masks.suggest import Setting, suggest_settings
from dit_sparse.masks.tile_windows import tile_window, tile_window_density
from dit_sparse.masks.tiling import TileCost, TileCounts, best_tile, count_tiles, tile_pairs

__all__ = [
    "NeighborhoodPredicate",
    "Ranking",
    "Setting",
    "TileCost",
    "TileCounts",
    "among_text",
    "best_blocks",
    "best_orders",
    "best_tile",
    "block_extremes",
    "block_maxima",
    "block_sums",
    "block_tokens",
    "blocks_a_row",
    "blocks_above",
    "blocks_for_share",
    "count_tiles",
    "density_to_blocks",
    "fill_budget",
    "heaviest_blocks",
    "heaviest_share",
    "keep_text",
    "mask_rows",
    "masked_errors",
    "mass_threshold",
    "metrics_by_order",
    "neighborhood_predicate",
    "order_metrics",
    "peak_logits",
    "pooled_scores",
    "probe_rows",
    "sampled_peaks",
    "sampled_weights",
    "select_density",
    "self_similarity",
    "share_out",
    "sink_and_nearness",
    "spread_ties",
    "suggest_settings",
    "text_blocks",
    "threshold",
    "tile_pairs",
    "tile_window",
    "tile_window_density",
    "top_k",
    "top_p",
    "with_other_text",
    "without_text",
]
