"""What the launcher of the search on Hopper decides; its kernel is in test_output_error.py, which needs the GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dit_sparse.kernels.hopper_search import _places, _span, hopper_takes
from dit_sparse.types import TokenOrder


def test_key_blocks_are_visited_from_the_largest_on() -> None:
    bounds = [0, 64, 96, 96, 160, 200, 233, 234]
    order = TokenOrder.from_index(torch.arange(234), torch.tensor(bounds))
    places = _places(order)
    numbers, starts, sizes = places.table.tolist()
    assert numbers == [0, 3, 4, 5, 1, 6, 2]  # among equals the earlier first
    assert [(bounds[n], bounds[n + 1] - bounds[n]) for n in numbers] == list(zip(starts, sizes, strict=True))
    assert all(a >= b for a, b in pairwise(sizes))
    assert (places.whole, places.wide) == (2, 4)
    assert _places(order) is places


@pytest.mark.parametrize(("blocks", "programs"), [(616, 468), (1320, 664), (1320, 3320), (572, 432), (3, 1)])
def test_thread_blocks_come_out_even(blocks: int, programs: int) -> None:
    span = _span(blocks, programs, 132)
    spans = -(-blocks // span)
    rounds = -(-programs * spans // 132)
    # Work of the whole over what the multiprocessors could have done meanwhile.
    assert programs * blocks / (rounds * 132 * span) >= (0.9 if programs >= 132 else programs / 132 / spans)
    assert (spans - 1) * span < blocks <= spans * span


def test_other_devices_have_another_kernel() -> None:
    order = TokenOrder.from_index(torch.arange(128), torch.tensor([0, 64, 128]))
    x = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16)
    assert not hopper_takes(x, x, order)
