"""Token orders: raster, the six axis orders, 3-D tiles, space-filling curves and clusters."""

from dit_sparse.reorder.axes import (
    AXIS_ORDERS,
    Block,
    axis_order,
    axis_orders_per_head,
    block_tokens,
    distinct_axis_orders,
    tile_along,
)
from dit_sparse.reorder.choose import choose_order
from dit_sparse.reorder.clusters import cluster_order, co_clusters, kmeans, spread_tokens
from dit_sparse.reorder.curve import curve_order
from dit_sparse.reorder.frames import frame_bounds, frame_order
from dit_sparse.reorder.grid import grid_order, raster_order
from dit_sparse.reorder.merge import merge_blocks
from dit_sparse.reorder.morton import morton_order
from dit_sparse.reorder.once import (
    axes_once,
    curve_once,
    frames_once,
    merged_once,
    morton_once,
    raster_once,
    tiles_once,
)
from dit_sparse.reorder.segments import sort_in_segments
from dit_sparse.reorder.tiles import tile_order

__all__ = [
    "AXIS_ORDERS",
    "Block",
    "axes_once",
    "axis_order",
    "axis_orders_per_head",
    "block_tokens",
    "choose_order",
    "cluster_order",
    "co_clusters",
    "curve_once",
    "curve_order",
    "distinct_axis_orders",
    "frame_bounds",
    "frame_order",
    "frames_once",
    "grid_order",
    "kmeans",
    "merge_blocks",
    "merged_once",
    "morton_once",
    "morton_order",
    "raster_once",
    "raster_order",
    "sort_in_segments",
    "spread_tokens",
    "tile_along",
    "tile_order",
    "tiles_once",
]
