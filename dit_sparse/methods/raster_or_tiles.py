"""What methods answer alike whose blocks are runs of the raster order or, where a tile is given, 3-D tiles."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.parameters import check_block, check_tile, freeze_lists
from dit_sparse.reorder import raster_once, tiles_once
from dit_sparse.types import TokenGrid, TokenOrder


class RasterOrTiles(AnyGrid):
    """The base of such a method, a dataclass with the fields `block` and `tile`.

    Attributes:
        even_tiles: whether smaller tiles at the border are cut in full blocks, see `tile_order`.
    """

    block: int
    tile: tuple[int, int, int] | None
    even_tiles: ClassVar[bool] = False

    @property
    def query_block(self) -> int:
        """Tokens a query block."""
        return math.prod(self.tile) if self.tile else self.block

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder | None:
        """The order by tiles, where a tile is given."""
        return None if self.tile is None else tiles_once(grid, self.tile, device, self.even_tiles)

    def order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order by tiles, or raster."""
        return self.shared_order(grid, device) or raster_once(grid, self.block, device)

    def check_blocks(self) -> None:
        """Whether block and tile are sizes; a list becomes a tuple.

        Raises:
            ValueError: a block or a side of the tile below 1.
        """
        freeze_lists(self)
        check_block("block", self.block)
        check_tile(self.tile)
