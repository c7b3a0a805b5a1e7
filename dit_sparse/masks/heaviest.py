"""Static masks of the heaviest blocks: a budget for each head, or one threshold for any number of them.

Every row keeps at least its heaviest block, and text blocks are always kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dit_sparse.kernels.best_within import best_within
from dit_sparse.kernels.keep_best import keep_ranks
from dit_sparse.masks.select import keep_text, text_blocks
from dit_sparse.types import TokenGrid

_HALF = 1 << 16


def heaviest_blocks(mass: Tensor, density: float, offsets: Tensor, grid: TokenGrid) -> Tensor:
    """The blocks of largest mass per head, whatever their row, up to `density` of all pairs.

    Args:
        mass: `[B, H, M, M]` float32 block masses, none negative; among equal ones the earlier block wins.
        density: share of the query-key pairs of each head, text included.
        offsets: `[1, 1, M+1]` int32 bounds of the blocks.
        grid: the layout of the sequence.

    Returns:
        `[B, H, M, M]` bool.

    Source: PAROAttention (arXiv 2506.16054), section 4.2.
    """
    forced = forced_blocks(mass, offsets, offsets, grid)
    area = block_areas(offsets, offsets).expand_as(mass)
    budget = density * grid.num_tokens**2 - (area * forced).sum((-1, -2))
    ranked = mass.masked_fill(forced, -1).flatten(2).argsort(dim=-1, descending=True, stable=True)
    spent = (area * ~forced).flatten(2).gather(-1, ranked).cumsum(-1)
    within = spent <= budget[..., None]
    return torch.zeros_like(within).scatter_(-1, ranked, within).view_as(forced) | forced


def heaviest_share(scores: Tensor, forced: Tensor, sizes: Tensor, share: float) -> Tensor:
    """The smallest set of largest scores of each head that with `forced` makes up `share` of their sum, and `forced`.

    Args:
        scores: `[B, H, Mq, Mk]`, none negative.
        forced: `[Mq, Mk]` bool.
        sizes: `[1, 1, Mq]` queries a block, each of which counts with the block's score.
        share: of the sum over a head.

    Returns:
        `[B, H, Mq, Mk]` bool.

    Source: the selection over a whole head of VMoBA (arXiv 2506.23858).
    """
    counted = (scores.double() * sizes[..., None]).flatten(2)
    missing = share * counted.sum(-1, keepdim=True) - (counted * forced.flatten()).sum(-1, keepdim=True)
    ranked = scores.masked_fill(forced, -1.0).flatten(2).argsort(dim=-1, descending=True, stable=True)
    sums = (counted * ~forced.flatten()).gather(-1, ranked).cumsum(-1)
    needed = torch.nn.functional.pad(sums[..., :-1], (1, 0)) < missing
    return keep_ranks(ranked, needed).view_as(scores) | forced


def spread_ties(scores: Tensor) -> Tensor:
    """Scores `[Mq, Mk]` in the same order without ties between rows: a budget that ends in one is spread evenly.

    Reads the scores back from the device: for masks that are made once a grid.

    Returns:
        `[Mq, Mk]` float32, at least 0: the rank of each score's value, and a fraction that differs from row to row.
    """
    ranks = scores.unique(return_inverse=True)[1]
    # Multiples of the golden ratio: any run of them fills the unit interval evenly.
    fraction = torch.arange(len(scores), device=scores.device, dtype=torch.float64) * 0.6180339887498949 % 1
    return (ranks + fraction[:, None] / 2).float()


def best_blocks(mass: Tensor, density: float, q_offsets: Tensor, k_offsets: Tensor, grid: TokenGrid) -> Tensor:
    """The blocks of largest mass a query-key pair, of all heads together, up to `density` of the pairs of all heads.

    No other blocks hold more mass for as many pairs, save for what is left of the budget: less than a block.

    Args:
        mass: `[B, H, Mq, Mk]` float32 block masses.
        density: share of the query-key pairs, text included, as a mean over heads.
        q_offsets, k_offsets: `[1, 1, M+1]` int32 bounds of the blocks.
        grid: the layout of the sequence.

    Returns:
        `[B, H, Mq, Mk]` bool.
    """
    q_sizes, k_sizes = (offsets.diff(dim=-1)[0, 0] for offsets in (q_offsets, k_offsets))
    q_text, k_text = (text_blocks(grid, offsets)[0, 0] for offsets in (q_offsets, k_offsets))
    return best_within(mass, density * mass.shape[1] * grid.num_tokens**2, q_text, k_text, q_sizes, k_sizes)


def blocks_within(errors: Tensor, most: Tensor, q_offsets: Tensor, k_offsets: Tensor, grid: TokenGrid) -> Tensor:
    """The fewest blocks, of all heads together, without which the errors of the others add up to at most `most`.

    Blocks of the largest error a query-key pair come first, as in `best_blocks`; where blocks are uneven, fewer pairs
    may be left out than could be, by less than a block. How many are kept stays on the device.

    Args:
        errors: `[B, H, Mq, Mk]` float32, what each block adds to the error if it is not kept; none negative.
        most: `[B]` of each sample.
        q_offsets, k_offsets: `[1, 1, M+1]` int32 bounds of the blocks.
        grid: the layout of the sequence.

    Returns:
        `[B, H, Mq, Mk]` bool.
    """
    forced = forced_blocks(errors, q_offsets, k_offsets, grid)
    worth = (
        (errors / block_areas(q_offsets, k_offsets).to(errors.dtype).clamp(min=1)).masked_fill(forced, -1).flatten(1)
    )
    least_first = worth.argsort(dim=-1, stable=True)
    # Summed from the smallest on, so that none is lost among larger ones.
    left = errors.masked_fill(forced, 0).flatten(1).double().gather(-1, least_first).cumsum(-1)
    needed = ~(left <= most[:, None])  # what is no number is kept
    return torch.zeros_like(needed).scatter_(-1, least_first, needed).view_as(forced) | forced


def blocks_above(mass: Tensor, threshold: float, offsets: Tensor, grid: TokenGrid) -> Tensor:
    """The blocks of at least `threshold` mass, `[1, H, M, M]` bool; arguments as in `heaviest_blocks`."""
    return (mass >= threshold) | forced_blocks(mass, offsets, offsets, grid)


def mass_threshold(masses: Callable[[], Iterable[Tensor]], density: float, offsets: Tensor, grid: TokenGrid) -> float:
    """The threshold with which `blocks_above` keeps at most `density` of the pairs of all heads together.

    Exact, and only one of the masses is looked at at a time: a radix search over the bits of float32 in two passes.

    Args:
        masses: called twice; goes through the masses `[1, H, M, M]` float32, none negative.
        density, offsets, grid: as in `heaviest_blocks`.

    Returns:
        The least threshold that keeps within the budget; infinite where text and the heaviest block of each row spend
        it already.
    """
    high, pairs = torch.zeros(_HALF, dtype=torch.float64), 0.0
    area = block_areas(offsets, offsets)
    for mass in masses():
        free = ~forced_blocks(mass, offsets, offsets, grid)
        pairs += mass.shape[1] * grid.num_tokens**2 * density - float((area * ~free).sum())
        high += _histogram(_bits(mass)[free] >> 16, area.expand_as(mass)[free])
    if pairs < 0:
        return float("inf")
    first, pairs = _crossing(high, pairs)
    if first < 0:
        return 0.0
    low = torch.zeros(_HALF, dtype=torch.float64)
    for mass in masses():
        bits = _bits(mass)
        inside = ~forced_blocks(mass, offsets, offsets, grid) & (bits >> 16 == first)
        low += _histogram(bits[inside] & (_HALF - 1), area.expand_as(mass)[inside])
    second, _ = _crossing(low, pairs)
    return float(torch.tensor((first << 16) + second + 1, dtype=torch.int32).view(torch.float32))


def forced_blocks(mass: Tensor, q_offsets: Tensor, k_offsets: Tensor, grid: TokenGrid) -> Tensor:
    """Text blocks and the heaviest block of each row, `[B, H, Mq, Mk]` bool."""
    best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    return keep_text(best, grid, q_offsets, k_offsets)


def block_areas(q_offsets: Tensor, k_offsets: Tensor) -> Tensor:
    """`[1, 1, Mq, Mk]` float64 query-key pairs of each block."""
    q_sizes, k_sizes = (offsets.diff(dim=-1).double() for offsets in (q_offsets, k_offsets))
    return q_sizes[..., :, None] * k_sizes[..., None, :]


def with_other_text(blocks: Tensor, old: TokenGrid, new: TokenGrid, block: int, fill: bool | float) -> Tensor:
    """The video's part of a block map of grid `old`, with as many text blocks as grid `new` has.

    Args:
        blocks: `[1, H, M, M]` of any type, in blocks of `block` tokens.
        old, new: grids that differ in the text alone.
        block: tokens a block.
        fill: the value of all text blocks.
    """
    video = -(-old.video_len // block)
    was, place = (-(-grid.text_len // block) if grid.text_first else 0 for grid in (old, new))
    size = video + -(-new.text_len // block)
    result = torch.full((*blocks.shape[:2], size, size), fill, dtype=blocks.dtype, device=blocks.device)
    inside = slice(was, was + video)
    result[..., place : place + video, place : place + video] = blocks[..., inside, inside]
    return result


def _bits(mass: Tensor) -> Tensor:
    """The bit patterns of floats that are not negative, which rise with them; adding 0 turns -0 into 0."""
    return (mass + 0.0).view(torch.int32)


def _histogram(bins: Tensor, weights: Tensor) -> Tensor:
    return torch.bincount(bins, weights, minlength=_HALF).cpu()


def _crossing(histogram: Tensor, budget: float) -> tuple[int, float]:
    """The first bin from above that does not fit the budget, -1 if all do, and what is left above it."""
    from_above = histogram.flip(0).cumsum(0)
    beyond = (from_above > budget).nonzero()
    if not len(beyond):
        return -1, budget
    place = int(beyond[0, 0])
    return _HALF - 1 - place, budget - (float(from_above[place - 1]) if place else 0.0)
