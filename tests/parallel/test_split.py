"""How a sequence is cut: what diffusers' splitting does, written down."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.parallel import SequenceSplit
from dit_sparse.parallel.exchange import Places
from dit_sparse.reorder import tile_order
from dit_sparse.types import TokenGrid


@given(st.integers(1, 40), st.integers(0, 40), st.booleans(), st.integers(1, 5))
def test_runs_are_those_of_tensor_split(video: int, text: int, text_first: bool, parts: int) -> None:
    grid = TokenGrid(1, 1, video, text, text_first)
    if video < parts or 0 < text < parts:
        with pytest.raises(ValueError, match="tokens must be at least the"):
            SequenceSplit(grid, parts)
        return
    split = SequenceSplit(grid, parts)
    sequence = torch.arange(grid.num_tokens)
    videos = sequence[grid.video_start : grid.video_start + video].tensor_split(parts)
    texts = sequence[grid.text_start : grid.text_start + text].tensor_split(parts)
    for part in range(parts):
        want = torch.cat([texts[part], videos[part]] if text_first else [videos[part], texts[part]])
        got = torch.cat([sequence[start:end] for start, end in split.runs(part)])
        assert torch.equal(got, want)
    assert split.is_even == (video % parts == 0 and text % parts == 0)


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_places_bring_tokens_into_order_and_back(text_first: bool, ordered: bool) -> None:
    grid = TokenGrid(2, 4, 5, 7, text_first)
    split = SequenceSplit(grid, 3)
    runs = [split.runs(part) for part in range(3)]
    order = tile_order(grid, (1, 2, 3)) if ordered else None
    places = Places.of(runs, torch.device("cpu"), order)
    through_ranks = torch.cat([torch.arange(start, end) for own in runs for start, end in own])
    want = torch.arange(grid.num_tokens) if order is None else order.index[0, 0]
    assert places.index is not None
    assert places.inverse is not None
    assert torch.equal(through_ranks[places.index], want)
    assert torch.equal(want[places.inverse], through_ranks)


def test_tokens_that_fall_into_place_are_not_moved() -> None:
    split = SequenceSplit(TokenGrid(2, 4, 5), 3)
    assert Places.of([split.runs(part) for part in range(3)], torch.device("cpu")).index is None
