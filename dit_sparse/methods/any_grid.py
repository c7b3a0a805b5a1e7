"""What most methods answer alike: they fit every grid, and have no order that all heads, layers and steps share."""

from __future__ import annotations

import torch

from dit_sparse.types import TokenGrid, TokenOrder


class AnyGrid:
    """The base of such a method, which overrides what it answers otherwise; see `Method`."""

    def check(self, grid: TokenGrid) -> None:
        """Fits every grid."""

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder | None:
        """None: blocks are cut from the sequence as it is, or heads have orders of their own."""
        return None
