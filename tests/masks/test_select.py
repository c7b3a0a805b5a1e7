"""Selections against loops over rows, and the densities that they reach."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.masks import (
    Ranking,
    among_text,
    blocks_a_row,
    blocks_for_share,
    density_to_blocks,
    keep_text,
    select_density,
    share_out,
    threshold,
    top_k,
    top_p,
    without_text,
)
from dit_sparse.reorder import raster_order, tile_order
from dit_sparse.types import AttentionPlan, TokenGrid, TokenOrder

# Few distinct values, so that ties are common.
values = st.integers(0, 4).map(float)


@st.composite
def score_maps(draw):
    b, h, rows, columns = (draw(st.integers(1, n)) for n in (2, 3, 4, 9))
    flat = draw(st.lists(values, min_size=b * h * rows * columns, max_size=b * h * rows * columns))
    return torch.tensor(flat).reshape(b, h, rows, columns)


def rows_of(scores, kept):
    for scores_row, kept_row in zip(scores.flatten(0, 2).tolist(), kept.flatten(0, 2).tolist(), strict=True):
        yield scores_row, {j for j, keep in enumerate(kept_row) if keep}


def best_first(row):
    return sorted(range(len(row)), key=lambda j: (-row[j], j))


@settings(deadline=None)
@given(score_maps(), st.integers(1, 12))
def test_top_k_keeps_the_best_and_the_earlier_of_equals(scores, k):
    for row, kept in rows_of(scores, top_k(scores, k)):
        assert kept == set(best_first(row)[:k])


def test_top_k_takes_one_number_per_head():
    scores = torch.rand(2, 3, 4, 8)
    assert top_k(scores, torch.tensor([[1, 3, 20]])).sum(-1).unique(dim=2).squeeze(2).tolist() == [[1, 3, 8]] * 2
    assert top_k(scores, torch.tensor([[0], [2]])).sum(-1)[:, 0, 0].tolist() == [1, 2]


@settings(deadline=None)
@given(score_maps(), st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]), st.integers(1, 10))
def test_top_p_keeps_the_smallest_set_that_reaches_the_share(scores, p, min_kept):
    for row, kept in rows_of(scores, top_p(scores, p, min_kept)):
        needed = 0
        while sum(sorted(row, reverse=True)[:needed]) < p * sum(row):
            needed += 1
        assert kept == set(best_first(row)[: max(needed, min_kept)])


def test_top_p_takes_one_share_per_head():
    scores = torch.full((1, 2, 3, 10), 0.1)
    assert top_p(scores, torch.tensor([[0.25, 0.95]])).sum(-1)[0, :, 0].tolist() == [3, 10]


@settings(deadline=None)
@given(score_maps(), st.sampled_from([-1.0, 0.0, 2.0, 3.0, 9.0]))
def test_threshold_keeps_what_reaches_it_and_the_best_of_each_row(scores, value):
    for row, kept in rows_of(scores, threshold(scores, value)):
        assert kept == {j for j, score in enumerate(row) if score >= value} | {best_first(row)[0]}


def test_threshold_takes_one_value_per_head_and_compares_in_the_scores_precision():
    scores = torch.full((1, 2, 1, 3), 0.7)
    assert threshold(scores, 0.7).all()
    assert threshold(scores, torch.tensor([[0.5, 0.9]])).sum(-1).tolist() == [[[3], [1]]]


@pytest.mark.parametrize("text_first", [False, True])
def test_text_blocks_are_kept_as_queries_and_as_keys(text_first):
    grid = TokenGrid(1, 2, 6, text_len=5, text_first=text_first)
    order = raster_order(grid, 4)
    kept = keep_text(torch.zeros(1, 1, 5, 5, dtype=torch.bool), grid, order.offsets, order.offsets)
    text = {0, 1} if text_first else {3, 4}
    for i in range(5):
        for j in range(5):
            assert kept[0, 0, i, j] == (i in text or j in text)


def test_without_text_nothing_is_added():
    grid = TokenGrid(1, 2, 6)
    offsets = raster_order(grid, 4).offsets
    assert not keep_text(torch.zeros(1, 1, 3, 3, dtype=torch.bool), grid, offsets, offsets).any()


def nearest_density(scores, density, order, grid):
    """The density nearest to `density` that equally many video key blocks a row can give, by trying all numbers."""
    bounds = order.offsets[0, 0].tolist()
    text = range(grid.text_start, grid.text_start + grid.text_len)
    is_text = [start in text for start in bounds[:-1]]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    reachable = []
    for number in range(1, is_text.count(False) + 1):
        pairs = 0
        for i, row in enumerate(scores.tolist()):
            ranked = [j for j in best_first(row) if not is_text[j]]
            kept = {j for j in range(len(row)) if is_text[i] or is_text[j]} | set(ranked[:number])
            pairs += sizes[i] * sum(sizes[j] for j in kept)
        reachable.append(pairs / grid.num_tokens**2)
    return min(reachable, key=lambda reached: abs(reached - density))


sides = st.integers(1, 5)


@settings(deadline=None)
@given(
    st.builds(TokenGrid, sides, sides, sides, st.integers(0, 8), st.booleans()),
    st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.8, 1.0]),
    st.integers(0, 1000),
)
def test_density_is_as_near_as_whole_blocks_allow(grid, density, seed):
    order = tile_order(grid, (2, 2, 3))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 2, order.num_blocks, order.num_blocks, generator=generator)
    kept = select_density(scores, density, order, order, grid)
    got = AttentionPlan.from_kept(order, kept).density
    for b in range(2):
        for h in range(2):
            want = nearest_density(scores[b, h], density, order, grid)
            assert abs(got[b, h].item() - density) == pytest.approx(abs(want - density), abs=1e-9)
    assert kept.any(-1).all()


def test_rows_keep_equally_many_video_blocks():
    grid = TokenGrid(4, 4, 4, text_len=6, text_first=True)
    order = raster_order(grid, 8)
    kept = select_density(torch.rand(1, 2, 9, 9), 0.4, order, order, grid)
    assert kept[:, :, 1:, 1:].sum(-1).unique().numel() == 1
    assert kept[:, :, 0].all()
    assert kept[..., 0].all()


def test_density_one_keeps_everything():
    grid = TokenGrid(3, 4, 5, text_len=6)
    order = tile_order(grid, (2, 2, 2))
    blocks = order.num_blocks
    assert select_density(torch.rand(1, 1, blocks, blocks), 1.0, order, order, grid).all()


def test_heads_may_have_densities_of_their_own():
    grid = TokenGrid(4, 8, 8)
    order = raster_order(grid, 16)
    kept = select_density(torch.rand(2, 2, 16, 16), torch.tensor([[0.25, 0.5]]), order, order, grid)
    assert kept.sum(-1).unique(dim=2).squeeze(2).tolist() == [[4, 8]] * 2
    blocks = density_to_blocks(torch.rand(2, 2, 16, 16), torch.tensor([[0.25], [1.0]]), order, order, grid)
    assert blocks.tolist() == [[4, 4], [16, 16]]


def test_text_that_exceeds_the_density_leaves_one_video_block():
    grid = TokenGrid(1, 4, 4, text_len=40)
    order = raster_order(grid, 4)
    assert density_to_blocks(torch.rand(1, 1, 14, 14), 0.05, order, order, grid).tolist() == [[1]]


def test_uneven_blocks_per_head_are_counted_in_tokens():
    grid = TokenGrid(1, 1, 10)
    order = TokenOrder.from_index(torch.arange(10).expand(1, 2, 10), torch.tensor([[[0, 1, 2, 10], [0, 8, 9, 10]]]))
    scores = torch.tensor([[[3.0, 2.0, 1.0]] * 3] * 2)[None]
    assert density_to_blocks(scores, 0.2, order, order, grid).tolist() == [[2, 1]]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_densities_outside_the_unit_interval_are_refused(density):
    grid = TokenGrid(1, 4, 4)
    order = raster_order(grid, 4)
    scores = torch.rand(1, 2, 4, 4)
    for bad in (density, torch.tensor([[0.5, density]])):
        with pytest.raises(ValueError, match="density must be above 0 and at most 1"):
            select_density(scores, bad, order, order, grid)


def test_other_bad_arguments_are_named():
    scores = torch.rand(1, 2, 4, 4)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_k(scores, 0)
    with pytest.raises(ValueError, match="p must be above 0"):
        top_p(scores, 0.0)
    with pytest.raises(ValueError, match="min_kept must be at least 1"):
        top_p(scores, 0.5, min_kept=0)
    with pytest.raises(ValueError, match=r"k must be a number or one per head, \[1\|1, 2\|1\], got \(3,\)"):
        top_k(scores, torch.tensor([1, 2, 3]))


def text_blocks(grid, offsets):
    start, end = offsets[..., :-1], offsets[..., 1:]
    return (start < grid.text_start + grid.text_len) & (end > grid.text_start) & (start < end)


def reached_by_sorting(scores, q_order, kv_order, grid):
    """`[B, H, Mk]` density with 1 to `Mk` blocks a row: the sizes of the chosen blocks summed up in sorted order."""
    q_sizes, k_sizes = (
        order.offsets.diff(dim=-1).double().masked_fill(text_blocks(grid, order.offsets), 0.0)
        for order in (q_order, kv_order)
    )
    ranked = scores.masked_fill(text_blocks(grid, kv_order.offsets)[..., None, :], float("-inf"))
    best_first = ranked.argsort(dim=-1, descending=True, stable=True)
    chosen = k_sizes[..., None, :].expand(scores.shape).gather(-1, best_first).cumsum(-1)
    pairs = torch.einsum("bhq,bhqk->bhk", q_sizes.expand(scores.shape[:3]), chosen)
    return (pairs + grid.num_tokens**2 - grid.video_len**2) / grid.num_tokens**2


@settings(deadline=None, max_examples=200)
@given(
    st.builds(TokenGrid, sides, sides, sides, st.integers(0, 8), st.booleans()),
    st.sampled_from(["raster", "tiles", "heads"]),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.8, 1.0]),
)
def test_counting_ranks_equals_sorting(grid, kind, block, seed, density):
    """Exactly, ties and blocks without any score included, so that no choice ever depends on the way."""
    order = tile_order(grid, (2, 2, 3)) if kind == "tiles" else raster_order(grid, block)
    if kind == "heads":  # every head has bounds of its own; some blocks are empty
        tokens = grid.num_tokens
        draw = torch.Generator().manual_seed(seed)
        inner = torch.randint(tokens + 1, (1, 2, 4), generator=draw).sort(-1).values
        bounds = torch.cat([torch.zeros(1, 2, 1), inner, torch.full((1, 2, 1), tokens)], -1).int()
        order = TokenOrder.from_index(torch.arange(tokens).expand(1, 2, tokens), bounds)
    draw = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 1.0, 1.0, 2.0, 0.5, float("-inf")])
    shape = (2, 2, order.num_blocks, order.num_blocks)
    scores = values[torch.randint(len(values), shape, generator=draw)]
    want = reached_by_sorting(scores, order, order, grid)
    assert torch.equal(Ranking(scores, order, order, grid)._reached, want)
    blocks = (want - density).abs().argmin(dim=-1) + 1
    assert torch.equal(density_to_blocks(scores, density, order, order, grid), blocks)
    ranked = scores.masked_fill(text_blocks(grid, order.offsets)[..., None, :], float("-inf"))
    kept = keep_text(top_k(ranked, blocks), grid, order.offsets, order.offsets)
    assert torch.equal(select_density(scores, density, order, order, grid), kept)


def test_one_ranking_serves_several_densities():
    grid = TokenGrid(3, 4, 5, text_len=6)
    order = raster_order(grid, 8)
    scores = torch.rand(1, 2, order.num_blocks, order.num_blocks)
    ranking = Ranking(scores, order, order, grid)
    for density in (0.3, torch.tensor([[0.2, 0.7]]), 1.0):
        assert torch.equal(ranking.select(density), select_density(scores, density, order, order, grid))


def test_top_p_keeps_at_most_what_it_may() -> None:
    scores = torch.rand(2, 2, 5, 9)
    free, bound = top_p(scores, 0.9), top_p(scores, 0.9, 2, 4)
    assert torch.equal(bound, free & top_k(scores, 4))
    with pytest.raises(ValueError, match="max_kept must be at least min_kept, 3, got 2"):
        top_p(scores, 0.9, 3, 2)


def test_text_takes_no_share() -> None:
    grid = TokenGrid(1, 4, 4, text_len=6, text_first=True)
    order = raster_order(grid, 4)
    scores = torch.rand(1, 1, 6, 6)
    got = without_text(scores, grid, order.offsets)
    assert torch.equal(got[..., 2:], scores[..., 2:])
    assert not got[..., :2].any()


@pytest.mark.parametrize("first", [False, True])
def test_a_map_of_the_video_lies_among_text(first: bool) -> None:
    got = among_text(torch.ones(2, 2), TokenGrid(1, 2, 4, text_len=7, text_first=first), 4, fill=5)
    want = torch.full((4, 4), 5.0)
    inside = slice(2, 4) if first else slice(0, 2)
    want[inside, inside] = 1
    assert torch.equal(got, want)


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.7, 1.0])
def test_blocks_a_row(text: int, density: float) -> None:
    """The number that `density_to_blocks` finds for even blocks."""
    grid = TokenGrid(2, 4, 8, text)
    order = raster_order(grid, 8)
    scores = torch.rand(1, 1, order.num_blocks, order.num_blocks)
    assert blocks_a_row(grid, density, 8) == int(density_to_blocks(scores, density, order, order, grid))


@pytest.mark.parametrize("p", [0.1, 0.45, 0.85, 1.0])
def test_blocks_for_share(p: float) -> None:
    scores = torch.tensor([0.5, 0.1, 0.25, 0.15, 0.0]).expand(1, 1, 2, 5)
    want = {0.1: 1, 0.45: 1, 0.85: 3, 1.0: 4}[p]
    assert blocks_for_share(scores, p).tolist() == [[[want, want]]]
    assert blocks_for_share(torch.zeros(1, 1, 1, 3), p).tolist() == [[[1]]]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
def test_shares_have_the_mean_and_none_exceeds_one(density: float) -> None:
    needs = torch.tensor([[0.9, 0.3, 0.05, 0.02], [0.1, 0.1, 0.1, 0.1]])
    shares = share_out(needs, density)
    assert shares.mean(1).tolist() == pytest.approx([density, density])
    assert shares.max() <= 1
    free = shares[0] < 1
    ratio = shares[0][free] / needs[0][free]
    assert ratio.tolist() == pytest.approx([float(ratio[0])] * len(ratio)) if len(ratio) else density == 1
