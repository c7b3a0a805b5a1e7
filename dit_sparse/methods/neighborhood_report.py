"""What a neighborhood costs on a grid, by counting tiles: the analytical simulator of arXiv 2504.16922, section 3."""

from __future__ import annotations

from typing import Any

from dit_sparse.masks import TileCounts, best_tile, count_tiles, suggest_settings
from dit_sparse.methods.neighborhood import Neighborhood
from dit_sparse.types import TokenGrid

__all__ = ["neighborhood_report"]


def neighborhood_report(method: Neighborhood, grid: TokenGrid, density: float | None = None) -> dict[str, Any]:
    """Tiles, densities and speed-ups of `method` on `grid`, ready for JSON; needs no GPU and makes no mask.

    Args:
        method: its tile is reported beside the best one.
        grid: the layout of the sequence.
        density: also list the best settings near this share of the query-key pairs.

    Returns:
        The setting; `density` and `ideal_speedup` of the mask; `tile` and `best_tile`, each with its counts,
        `tile_speedup` (if visited tiles took equal time) and `expected_speedup` (by the cost model, over the fastest
        dense attention, without the permutation); and `suggestions`, best first.

    Raises:
        ValueError: a setting that does not fit `grid`, or a density outside (0, 1].
    """
    mask = method.predicate(grid)
    counts = count_tiles(mask, method.tile_for(grid))
    best = count_tiles(mask, best_tile(mask, method.exact))
    suggestions = [] if density is None else suggest_settings(grid, density)
    return {
        "grid": list(grid.shape),
        "text": grid.text_len,
        "tokens": grid.num_tokens,
        "window": list(mask.window),
        "stride": list(mask.stride),
        "dilation": list(mask.dilation),
        "causal": list(mask.causal),
        "exact": method.exact,
        "density": counts.density,
        "ideal_speedup": counts.ideal_speedup,
        "tile": _of_tile(counts, method.exact),
        "best_tile": _of_tile(best, method.exact),
        "suggestions": [
            {"window": list(s.window), "stride": list(s.stride), "density": s.counts.density}
            | _of_tile(s.counts, exact=True)
            for s in suggestions
        ],
    }


def _of_tile(counts: TileCounts, exact: bool) -> dict[str, Any]:
    return {
        "tile": list(counts.tile),
        "tiles": counts.total,
        "visited": counts.visited,
        "partial": counts.cut,
        "computed_density": counts.computed_density,
        "tile_speedup": counts.tile_speedup,
        "expected_speedup": counts.expected_speedup(exact=exact),
    }
