"""The neighborhood method: its plan is the definition's mask, and its defaults fit any grid."""

from dataclasses import fields
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    ],
)
def test_the_plan_is_the_mask_of_the_definition(method, grid):
    plan = plan_of(method, grid)
    want = mask_by_loops(grid, method.window, method.stride, method.dilation)
    assert torch.equal(plan.token_mask()[0, 0], want)
    assert plan.density.item() == want.double().mean().item()


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
    assert all(min(t, n) <= w <= n for w, t, n in zip(window, method.tile, grid.shape, strict=True))
    if all(n >= s for n, s in zip(grid.shape, method.stride, strict=True)):
        method.check(grid)


@pytest.mark.parametrize("shape", [(21, 30, 52), (21, 45, 80), (1, 64, 64), (13, 30, 45), (33, 45, 80)])
@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_on_real_grids_the_window_meets_the_density(shape, density):
    window = Neighborhood(density=density).window_for(TokenGrid(*shape))
    assert prod(window) / prod(shape) == pytest.approx(density, rel=0.03)


def test_an_axis_no_longer_than_its_tile_is_covered_whole():
    assert Neighborhood(density=0.25).window_for(TokenGrid(8, 6, 8)) == (2, 6, 8)
    assert Neighborhood(density=0.25).window_for(TokenGrid(1, 64, 64)) == (1, 32, 32)


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
