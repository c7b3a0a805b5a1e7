"""Neighborhood masks against the definition of arXiv 2504.16922, token by token."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.masks import neighborhood_blocks, neighborhood_predicate
from dit_sparse.reorder import axis_order, axis_orders_per_head, curve_order, raster_order, tile_order
from dit_sparse.types import AttentionPlan, TokenGrid, TokenOrder


def window_of(i, length, window, stride, dilation):
    """The coordinates that coordinate `i` of an axis sees, by the definition's words."""
    group = [c for c in range(length) if c % dilation == i % dilation]
    place = group.index(i)
    stride_group = list(range(place - place % stride, place - place % stride + stride))
    leader = stride_group[len(stride_group) // 2]
    if leader >= len(group):
        leader = len(group) - 1
    window_places = list(range(leader - window // 2, leader - window // 2 + window))
    while window_places[0] < 0:
        window_places = [p + 1 for p in window_places]
    while window_places[-1] >= len(group):
        window_places = [p - 1 for p in window_places]
    return {group[p] for p in window_places}


def mask_by_loops(grid, window, stride, dilation):
    """`[N, N]` bool, token by token."""
    video = {}
    token = grid.video_start
    for f in range(grid.frames):
        for h in range(grid.height):
            for w in range(grid.width):
                video[token] = (f, h, w)
                token += 1
    mask = torch.zeros(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    for q in range(grid.num_tokens):
        seen = None
        if q in video:
            seen = [window_of(video[q][a], grid.shape[a], window[a], stride[a], dilation[a]) for a in range(3)]
        for k in range(grid.num_tokens):
            if seen is None or k not in video:
                mask[q, k] = True
            else:
                mask[q, k] = all(video[k][a] in seen[a] for a in range(3))
    return mask


@st.composite
def settings_of_a_neighborhood(draw):
    shape = tuple(draw(st.integers(1, top)) for top in (4, 6, 7))
    dilation = tuple(draw(st.integers(1, min(3, length))) for length in shape)
    window = tuple(draw(st.integers(1, length // d)) for length, d in zip(shape, dilation, strict=True))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    grid = TokenGrid(*shape, text_len=draw(st.integers(0, 5)), text_first=draw(st.booleans()))
    return grid, window, stride, dilation


def mixed_order(grid):
    """Text and video anywhere, in uneven blocks of which one is empty."""
    tokens = grid.num_tokens
    index = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    return TokenOrder.from_index(index, torch.tensor([0, 0, tokens // 2, tokens]))


def order_of(grid, kind):
    return {
        "tiles": lambda: tile_order(grid, (2, 3, 2)),
        "raster": lambda: raster_order(grid, 7),
        "axes": lambda: axis_order(grid, "WHF", 5),
        "curve": lambda: curve_order(grid, 6),
        "heads": lambda: axis_orders_per_head(grid, ["FHW", "HWF"], 6),
        "one block": lambda: raster_order(grid, 1000),
        "mixed": lambda: mixed_order(grid),
    }[kind]()


ORDERS = ("tiles", "raster", "axes", "curve", "heads", "one block", "mixed")


def predicate_on_all_tokens(predicate, tokens):
    zero = torch.zeros((), dtype=torch.int64)
    return predicate(zero, zero, torch.arange(tokens)[:, None], torch.arange(tokens)[None, :])


@settings(max_examples=120, deadline=None)
@given(settings_of_a_neighborhood())
def test_the_predicate_is_the_definition(setting):
    grid, window, stride, dilation = setting
    got = predicate_on_all_tokens(neighborhood_predicate(*setting), grid.num_tokens)
    assert torch.equal(got, mask_by_loops(grid, window, stride, dilation))


@settings(max_examples=120, deadline=None)
@given(settings_of_a_neighborhood(), st.sampled_from(ORDERS))
def test_blocks_are_classified_exactly(setting, kind):
    grid, window, stride, dilation = setting
    order = order_of(grid, kind)
    kept, partial = neighborhood_blocks(grid, order, window, stride, dilation)
    mask = mask_by_loops(grid, window, stride, dilation)
    heads = order.index.shape[1]
    assert kept.shape == partial.shape == (1, heads, order.num_blocks, order.num_blocks)
    bounds = order.offsets[0, 0].tolist()
    for head in range(heads):
        tokens = order.index[0, head]
        for i in range(order.num_blocks):
            for j in range(order.num_blocks):
                block = mask[tokens[bounds[i] : bounds[i + 1]]][:, tokens[bounds[j] : bounds[j + 1]]]
                assert kept[0, head, i, j] == block.any(), (head, i, j)
                assert partial[0, head, i, j] == (block.any() and not block.all()), (head, i, j)


@settings(max_examples=60, deadline=None)
@given(settings_of_a_neighborhood(), st.sampled_from(ORDERS))
def test_a_plan_of_blocks_and_predicate_is_the_mask(setting, kind):
    grid, window, stride, dilation = setting
    order = order_of(grid, kind)
    kept, partial = neighborhood_blocks(*setting[:1], order, *setting[1:])
    plan = AttentionPlan.from_kept(order, kept, partial=partial, predicate=neighborhood_predicate(*setting))
    want = mask_by_loops(grid, window, stride, dilation)
    assert torch.equal(plan.token_mask(), want.expand(1, order.index.shape[1], -1, -1))
    torch.testing.assert_close(plan.density, want.double().mean().expand(1, order.index.shape[1]))


@settings(max_examples=60, deadline=None)
@given(settings_of_a_neighborhood())
def test_windows_never_shrink(setting):
    grid, window, _, _ = setting
    seen = predicate_on_all_tokens(neighborhood_predicate(*setting), grid.num_tokens).sum(-1)
    video = seen[grid.video_start : grid.video_start + grid.video_len]
    assert (video == window[0] * window[1] * window[2] + grid.text_len).all()


def test_blocked_attention_on_whole_tiles_has_no_partial_block():
    grid = TokenGrid(4, 8, 8)
    kept, partial = neighborhood_blocks(grid, tile_order(grid, (2, 4, 4)), (2, 4, 4), stride=(2, 4, 4))
    assert not partial.any()
    assert torch.equal(kept[0, 0], torch.eye(8, dtype=torch.bool))


def test_a_window_of_the_whole_grid_is_dense():
    grid = TokenGrid(3, 4, 5, text_len=2)
    kept, partial = neighborhood_blocks(grid, tile_order(grid, (2, 2, 2)), grid.shape)
    assert kept.all()
    assert not partial.any()


@pytest.mark.parametrize("order_of_grid", [tile_order, lambda grid: raster_order(grid, 128)])
def test_real_grids_take_seconds_and_count_exactly(order_of_grid):
    grid = TokenGrid(21, 30, 52, text_len=256)
    order = order_of_grid(grid)
    start = time.perf_counter()
    kept, partial = neighborhood_blocks(grid, order, (9, 16, 24), stride=(1, 4, 4))
    assert time.perf_counter() - start < 20
    predicate = neighborhood_predicate(grid, (9, 16, 24), (1, 4, 4))
    zero = torch.zeros((), dtype=torch.int64)
    bounds = order.offsets[0, 0].tolist()
    generator = torch.Generator().manual_seed(0)
    for i, j in torch.randint(order.num_blocks, (40, 2), generator=generator).tolist():
        q, k = (order.index[0, 0, bounds[b] : bounds[b + 1]] for b in (i, j))
        block = predicate(zero, zero, q[:, None], k[None, :])
        assert kept[0, 0, i, j] == block.any()
        assert partial[0, 0, i, j] == (block.any() and not block.all())


def test_predicates_compare_by_their_settings():
    grid = TokenGrid(4, 6, 6)
    assert neighborhood_predicate(grid, 3) == neighborhood_predicate(grid, (3, 3, 3), 1, (1, 1, 1))
    assert hash(neighborhood_predicate(grid, 3)) == hash(neighborhood_predicate(grid, [3, 3, 3]))
    assert neighborhood_predicate(grid, 3) != neighborhood_predicate(grid, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (3, 7, 3)}, r"window \* dilation along height must be at most the grid's 6, got 7 \* 1 = 7"),
        ({"window": 2, "dilation": (1, 1, 4)}, r"along width must be at most the grid's 6, got 2 \* 4 = 8.*at most 1"),
        ({"window": 1, "dilation": (5, 1, 1)}, "dilation along frames must be at most the grid's 4, got 5"),
        ({"window": 2, "stride": (1, 3, 1)}, "stride along height must be at most the window's 2, got 3"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"window": (1, 2)}, "window must be a whole number of at least 1"),
        ({"window": (1, 2.5, 3)}, "window must be a whole number"),
        ({"window": 2, "stride": True}, "stride must be a whole number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_predicate(TokenGrid(4, 6, 6), **arguments)


def test_an_order_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="order must hold the 64 tokens"):
        neighborhood_blocks(TokenGrid(4, 4, 4), raster_order(TokenGrid(4, 4, 5), 8), 2)
