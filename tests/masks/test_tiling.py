"""What a neighborhood is on tiles: counted block by block from the literal token mask."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.masks import TileCost, best_tile, count_tiles, neighborhood_predicate, tile_pairs
from dit_sparse.masks.tiling import tiles_for
from dit_sparse.reorder import tile_order
from dit_sparse.types import TokenGrid
from tests.masks.test_neighborhood import mask_by_loops, settings_of_a_neighborhood

tiles = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def blocks_by_loops(grid, order, mask):
    """Pairs seen in every pair of blocks of `order`, from the token mask `[N, N]`."""
    bounds, tokens = order.offsets[0, 0].tolist(), order.index[0, 0]
    blocks = [tokens[bounds[i] : bounds[i + 1]] for i in range(order.num_blocks)]
    return torch.tensor([[int(mask[q][:, k].sum()) for k in blocks] for q in blocks])


@settings(max_examples=150, deadline=None)
@given(settings_of_a_neighborhood(), tiles)
def test_counts_are_those_of_the_token_mask(setting, tile):
    grid, *rest = setting
    predicate, order = neighborhood_predicate(*setting), tile_order(grid, tile)
    mask = mask_by_loops(grid, *rest)
    want = blocks_by_loops(grid, order, mask)
    got = tile_pairs(predicate, tile, order)
    assert torch.equal(got, want.double()[None, None])
    sizes = order.block_sizes[0, 0]
    counts = count_tiles(predicate, tile)
    assert counts.total == order.num_blocks**2
    assert counts.visited == int((want > 0).sum())
    assert counts.cut == int(((want > 0) & (want < sizes[:, None] * sizes[None, :])).sum())
    assert counts.pairs == int(mask.sum())
    assert counts.density == pytest.approx(mask.double().mean().item())


def test_blocked_attention_on_whole_tiles_cuts_none():
    mask = neighborhood_predicate(TokenGrid(4, 8, 8), (2, 4, 4), stride=(2, 4, 4))
    counts = count_tiles(mask, (2, 4, 4))
    assert (counts.total, counts.visited, counts.cut) == (64, 8, 0)
    assert counts.ideal_speedup == counts.tile_speedup == 8


def test_a_window_of_the_whole_grid_is_dense():
    grid = TokenGrid(3, 4, 5, text_len=2)
    counts = count_tiles(neighborhood_predicate(grid, grid.shape), (2, 2, 2))
    assert counts.visited == counts.total
    assert (counts.cut, counts.density) == (0, 1.0)


def test_nattens_case_of_hunyuan_video_is_perfectly_block_sparse():
    """Window 18x24x24 and stride 16x8x8 of 30x48x80 tokens keep 9% and cut no tile of 2x8x8 (arXiv 2504.16922)."""
    mask = neighborhood_predicate(TokenGrid(30, 48, 80), (18, 24, 24), (16, 8, 8))
    counts = count_tiles(mask, (2, 8, 8))
    assert (counts.visited, counts.cut, counts.total) == (72_900, 0, 810_000)
    assert counts.ideal_speedup == pytest.approx(counts.tile_speedup) == pytest.approx(100 / 9)
    assert best_tile(mask) == (2, 8, 8)


def test_a_sliding_window_visits_far_more_than_it_sees():
    grid = TokenGrid(30, 48, 80)
    sliding = count_tiles(neighborhood_predicate(grid, (18, 24, 24)), (2, 8, 8))
    assert sliding.density == pytest.approx(0.09)
    assert sliding.tile_speedup < 0.6 * sliding.ideal_speedup


def test_the_expected_speedup_is_time_by_area():
    mask = neighborhood_predicate(TokenGrid(2, 16, 16), (2, 8, 8))
    counts = count_tiles(mask, (2, 4, 8))
    cost = TileCost(block_64=1.5, cut=2.0)
    time_of_tiles = (counts.visited + counts.cut) * 64**2 * 1.5
    assert counts.expected_speedup(cost) == pytest.approx(512**2 / time_of_tiles)
    assert counts.expected_speedup(cost, exact=False) == pytest.approx(512**2 / (counts.visited * 64**2 * 1.5))


def test_small_tiles_are_padded_to_a_block():
    counts = count_tiles(neighborhood_predicate(TokenGrid(2, 16, 16), (2, 8, 8), (2, 8, 8)), (1, 8, 6))
    want = pytest.approx(512**2 / (counts.visited * 64**2))
    assert counts.expected_speedup(TileCost(block_64=1.0), exact=False) == want


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    [((21, 30, 52), (9, 16, 24), 1), ((21, 45, 80), (11, 25, 40), (4, 5, 8)), ((1, 256, 256), (1, 80, 80), 1)],
)
def test_the_best_tile_is_best_of_all_and_found_at_once(shape, window, stride):
    mask = neighborhood_predicate(TokenGrid(*shape), window, stride)
    start = time.perf_counter()
    best = count_tiles(mask, best_tile(mask)).expected_speedup()
    assert time.perf_counter() - start < 5
    assert best == pytest.approx(max(count_tiles(mask, tile).expected_speedup() for tile in tiles_for(shape)))
    assert best >= count_tiles(mask, (min(2, shape[0]), 8, 8)).expected_speedup()


def test_a_grid_smaller_than_a_block_is_one_tile():
    assert best_tile(neighborhood_predicate(TokenGrid(1, 3, 4), (1, 2, 2))) == (1, 3, 4)


def test_a_long_sequence_makes_nothing_of_its_square():
    mask = neighborhood_predicate(TokenGrid(1, 1, 30_000), (1, 1, 2048), (1, 1, 128))
    counts = count_tiles(mask, (1, 1, 128))
    assert counts.density == pytest.approx(2048 / 30_000)
