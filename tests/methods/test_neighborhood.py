"""The neighborhood method: its plan is the definition's mask, and its defaults fit any grid."""

from dataclasses import fields
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse import Schedule, sparse_attention
from dit_sparse.masks import best_tile, count_tiles
from dit_sparse.methods.neighborhood import Neighborhood
from dit_sparse.types import Method, Site, TokenGrid
from tests.masks.test_neighborhood import mask_by_loops

sides = st.integers(1, 24)
grids = st.builds(TokenGrid, sides, sides, sides, st.integers(0, 20), st.booleans())


def plan_of(method, grid):
    q = torch.zeros(1, 1, grid.num_tokens, 4)
    return method.plan(q, q, q, Site(grid), None)


@pytest.mark.parametrize(
    ("method", "grid"),
    [
        (Neighborhood(window=3, tile=(1, 2, 2)), TokenGrid(3, 5, 7, text_len=4)),
        (Neighborhood(window=(2, 4, 3), stride=(1, 4, 2), tile=(2, 2, 4)), TokenGrid(3, 5, 7, 4, text_first=True)),
        (Neighborhood(window=(1, 2, 3), stride=(1, 2, 1), dilation=(2, 2, 2), tile=2), TokenGrid(3, 5, 7)),
        (Neighborhood(window=3, stride=2, causal=(True, False, True), tile=2), TokenGrid(3, 5, 7, text_len=3)),
        (Neighborhood(window=(1, 3, 4), causal=True), TokenGrid(1, 9, 11)),
        (Neighborhood(window=(1, 1, 20), stride=(1, 1, 4), dilation=(1, 1, 2)), TokenGrid(1, 1, 90, text_len=5)),
        (Neighborhood(window=(2, 5, 5)), TokenGrid(4, 9, 10, text_len=7)),
    ],
)
def test_the_plan_is_the_mask_of_the_definition(method, grid):
    plan = plan_of(method, grid)
    want = mask_by_loops(grid, method.window, method.stride_for(grid), method.dilation, method.causal)
    assert torch.equal(plan.token_mask()[0, 0], want)
    assert plan.density.item() == want.double().mean().item()


def test_rounded_to_blocks_it_keeps_whole_every_block_that_the_window_touches():
    grid = TokenGrid(3, 8, 9, text_len=4)
    exact, rounded = (plan_of(Neighborhood(window=3, tile=(1, 4, 4), exact=e), grid) for e in (True, False))
    assert rounded.block_mask.partial_counts is None
    assert torch.equal(rounded.block_mask.kept_blocks, exact.block_mask.kept_blocks)
    assert torch.equal(rounded.token_mask() | exact.token_mask(), rounded.token_mask())
    assert rounded.density > exact.density


def test_without_a_tile_the_cost_model_chooses_it():
    grid = TokenGrid(8, 16, 16)
    sliding, blocked = Neighborhood(window=(4, 8, 8)), Neighborhood(window=(4, 8, 8), stride=(4, 8, 8))
    assert sliding.tile_for(grid) == best_tile(sliding.predicate(grid))
    assert plan_of(blocked, grid).block_mask.partial_counts is None
    assert Neighborhood(window=(4, 8, 8), tile=(1, 4, 4)).tile_for(grid) == (1, 4, 4)


def test_the_order_is_one_object_for_all_calls():
    method, grid = Neighborhood(window=(2, 4, 4)), TokenGrid(4, 8, 8)
    order = method.shared_order(grid, torch.device("cpu"))
    assert plan_of(method, grid).q_order is order


def test_a_full_window_equals_dense_attention():
    grid = TokenGrid(3, 4, 5, text_len=3)
    q, k, v = torch.randn(3, 1, 2, grid.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    plan = Neighborhood(window=grid.shape).plan(q, k, v, Site(grid), None)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sparse_attention(q, k, v, plan), want, rtol=1e-5, atol=1e-5)
    assert plan.density == 1


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_dense_attention_under_the_definitions_mask(causal):
    grid = TokenGrid(3, 6, 5, text_len=3)
    q, k, v = torch.randn(3, 1, 2, grid.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    plan = Neighborhood(window=3, stride=2, causal=causal).plan(q, k, v, Site(grid), None)
    mask = mask_by_loops(grid, (3, 3, 3), (2, 2, 2), (1, 1, 1), (causal,) * 3)
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    torch.testing.assert_close(sparse_attention(q, k, v, plan).double(), want, rtol=1e-5, atol=1e-5)


def test_a_plan_without_partial_blocks_needs_no_predicate():
    plan = plan_of(Neighborhood(window=(2, 4, 4), stride=(2, 4, 4), tile=(2, 4, 4)), TokenGrid(4, 8, 8, text_len=5))
    assert plan.block_mask.partial_counts is None
    assert plan.block_mask.predicate is None


def test_it_follows_the_protocol():
    assert isinstance(Neighborhood(), Method)
    assert Neighborhood.scope == "grid"
    assert all(field.metadata["help"] for field in fields(Neighborhood))


def test_one_number_stands_for_all_axes():
    assert Neighborhood(window=4, stride=2) == Neighborhood(window=(4, 4, 4), stride=[2, 2, 2])
    assert hash(Neighborhood(window=4)) == hash(Neighborhood(window=(4, 4, 4)))


@settings(max_examples=200, deadline=None)
@given(grids, st.sampled_from([0.05, 0.125, 0.25, 0.5, 1.0]), st.sampled_from([1, (1, 2, 2), (1, 4, 4)]))
def test_the_window_made_from_the_density_fits_any_grid(grid, density, stride):
    method = Neighborhood(density=density, stride=stride)
    window = method.window_for(grid)
    assert all(min(t, n) <= w <= n for w, t, n in zip(window, (2, 8, 8), grid.shape, strict=True))
    if all(n >= s for n, s in zip(grid.shape, method.stride, strict=True)):
        method.check(grid)


@pytest.mark.parametrize("shape", [(21, 30, 52), (21, 45, 80), (1, 64, 64), (13, 30, 45), (33, 45, 80)])
@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_on_real_grids_the_window_meets_the_density(shape, density):
    window = Neighborhood(density=density, stride=1).window_for(TokenGrid(*shape))
    assert prod(window) / prod(shape) == pytest.approx(density, rel=0.03)


def test_an_axis_no_longer_than_its_tile_is_covered_whole():
    assert Neighborhood(density=0.25, stride=1).window_for(TokenGrid(8, 6, 8)) == (2, 6, 8)
    assert Neighborhood(density=0.25, stride=1).window_for(TokenGrid(1, 64, 64)) == (1, 32, 32)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("shape", [(8, 24, 32), (1, 32, 64)])
def test_a_density_alone_makes_a_window_that_cuts_no_tile(shape, density):
    method, grid = Neighborhood(density=density), TokenGrid(*shape)
    counts = count_tiles(method.predicate(grid), method.tile_for(grid))
    assert counts.cut == 0
    assert prod(method.window_for(grid)) / grid.video_len == pytest.approx(density, rel=0.11)
    assert counts.expected_speedup() >= 0.8 / density
    sliding = Neighborhood(density=density, stride=1)
    assert count_tiles(sliding.predicate(grid), sliding.tile_for(grid)).expected_speedup() < counts.expected_speedup()


@settings(max_examples=20, deadline=None)
@given(grids, st.sampled_from([0.125, 0.25, 0.5]))
def test_a_density_alone_fits_any_grid(grid, density):
    method = Neighborhood(density=density)
    method.check(grid)
    window = method.window_for(grid)
    assert all(min(t, n) <= w <= n for w, t, n in zip(window, (2, 8, 8), grid.shape, strict=True))


@pytest.mark.parametrize(
    "parameters", [{"stride": 1}, {"tile": (2, 8, 8)}, {"dilation": (1, 2, 1)}, {"causal": (True, False, False)}]
)
def test_what_is_given_leaves_the_stride_at_one(parameters):
    grid = TokenGrid(8, 24, 32)
    assert Neighborhood(density=0.25, **parameters).stride_for(grid) == (1, 1, 1)
    assert Neighborhood(window=(2, 4, 4)).stride_for(grid) == (1, 1, 1)
    assert Neighborhood(density=0.25).stride_for(grid) != (1, 1, 1)


def test_a_config_of_version_two_keeps_its_stride():
    config = {"method": "neighborhood", "version": 2, "density": 0.25, "stride": [1, 1, 1]}
    assert Schedule.from_config(config).method == Neighborhood(density=0.25, stride=(1, 1, 1))
    schedule = Schedule(Neighborhood())
    assert Schedule.from_config(schedule.to_config()) == schedule


def test_density_one_is_the_whole_grid():
    grid = TokenGrid(5, 9, 20, text_len=3)
    assert Neighborhood(density=1.0).window_for(grid) == grid.shape
    assert plan_of(Neighborhood(density=1.0), grid).density == 1.0


def test_a_window_given_is_used_whatever_the_density():
    assert Neighborhood(window=(1, 2, 3), density=0.9).window_for(TokenGrid(8, 8, 8)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"tile": (2, 8)}, "tile must be a whole number of at least 1, or three of them"),
        ({"dilation": (1, -1, 1)}, "dilation must be a whole number"),
        ({"causal": (True, False)}, "causal must be true or false, or three"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"density": 1.1}, "density must be above 0 and at most 1"),
    ],
)
def test_bad_parameters_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"window": (9, 4, 4)},
            r"along frames must be at most the grid's 8, got 9 \* 1 = 9: use a window of at",
        ),
        ({"window": (4, 4, 4), "dilation": (1, 1, 3)}, "along width must be at most the grid's 8"),
        ({"window": (4, 4, 4), "stride": (1, 5, 1)}, "stride along height must be at most the window's 4, got 5"),
        ({"stride": (1, 1, 9)}, "stride along width must be at most the window's 8, got 9"),
        ({"dilation": (1, 9, 1)}, "dilation along height must be at most the grid's 6"),
    ],
)
def test_check_names_what_does_not_fit_the_grid(arguments, message):
    grid = TokenGrid(8, 6, 8)
    with pytest.raises(ValueError, match=message):
        Neighborhood(**arguments).check(grid)
    with pytest.raises(ValueError, match=message):
        plan_of(Neighborhood(**arguments), grid)
