"""One of several orders for every head, chosen by the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.types import TokenOrder


def choose_order(orders: Sequence[TokenOrder], choice: Tensor) -> TokenOrder:
    """Order in which each head has the one of `orders` that `choice` names. Nothing waits for the device.

    Args:
        orders: orders that all heads share, cut in the same blocks.
        choice: `[B|1, H|1]` int64 numbers of orders.

    Returns:
        Order with `index` `[B|1, H|1, N]` int64 and the blocks of the first.

    Raises:
        ValueError: no order, or orders that heads do not share.
    """
    if not orders or any(order.index.shape[:2] != (1, 1) for order in orders):
        raise ValueError(
            f"orders must be at least one, each [1, 1, N], got {[tuple(order.index.shape) for order in orders]}"
        )
    index, inverse = (torch.cat([getattr(order, name)[0] for order in orders])[choice] for name in ("index", "inverse"))
    return orders[0].with_tokens(index, inverse)
