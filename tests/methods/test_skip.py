"""Skip-softmax: the plan, the threshold by length, and what a schedule makes of it on top of other methods."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import AdaSpa, Pisa, Schedule, Site, SkipSoftmax, TokenGrid
from dit_sparse.types import AttentionPlan

GRID = TokenGrid(2, 5, 7, text_len=5)


def plan_of(method: SkipSoftmax, grid: TokenGrid = GRID) -> AttentionPlan:
    q = torch.zeros(1, 2, grid.num_tokens, 16)
    return method.plan(q, q, q, Site(grid), None)


def test_keeps_every_block_and_sets_a_threshold_by_length() -> None:
    plan = plan_of(SkipSoftmax(scale_factor=15.0, block=16))
    assert plan.block_mask.is_full
    assert not plan.is_dense
    assert plan.skip_threshold == 15 / 75
    assert plan_of(SkipSoftmax(scale_factor=15.0), TokenGrid(4, 5, 7, text_len=10)).skip_threshold == 15 / 150
    assert plan_of(SkipSoftmax(scale_factor=300.0)).skip_threshold == 1
    assert plan_of(SkipSoftmax(scale_factor=0)).is_dense


def test_an_order_by_tiles_is_shared() -> None:
    method = SkipSoftmax(tile=(1, 4, 4))
    plan = plan_of(method)
    assert plan.q_order is method.shared_order(GRID, torch.device("cpu"))
    assert SkipSoftmax().shared_order(GRID, torch.device("cpu")) is None


def test_a_schedule_skips_on_top_of_any_method() -> None:
    q, k = torch.randn(2, 1, 2, GRID.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(Pisa(0.5, block=16), remainder="none", skip_factor=15.0)
    plan = schedule.finish(schedule.method.plan(q, k, k, Site(GRID), None))
    assert plan.skip_threshold == 15 / 75
    assert not plan.block_mask.is_full
    assert schedule.skips
    assert not Schedule(AdaSpa()).skips


def test_a_schedule_comes_before_the_methods_own() -> None:
    for factor, threshold in ((None, 0.2), (30.0, 0.4), (0, 0.0)):
        schedule = Schedule(SkipSoftmax(scale_factor=15.0), skip_factor=factor)
        assert schedule.finish(plan_of(schedule.method)).skip_threshold == threshold
        assert schedule.skips == bool(threshold)


def test_every_layer_may_have_its_own_factor() -> None:
    schedule = Schedule(SkipSoftmax(), layer_thresholds=(15.0, 30.0))
    sites = [Site(GRID, layer, 2) for layer in range(2)]
    assert len({schedule.key(site) for site in sites}) == 2, "layers do not share a plan"
    plans = [plan_of(schedule.method_for(site)) for site in sites]  # type: ignore[arg-type]
    assert [plan.skip_threshold for plan in plans] == [0.2, 0.4]


def test_configs_round_trip() -> None:
    for schedule in (Schedule(SkipSoftmax(50.0, tile=(1, 4, 4))), Schedule(AdaSpa(), skip_factor=50.0)):
        assert Schedule.from_config(schedule.to_config()) == schedule


@pytest.mark.parametrize("factor", [-1, float("inf"), float("nan"), True, "9"])
def test_a_bad_factor_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="scale_factor must be a number from 0, where nothing is skipped, on, got"):
        SkipSoftmax(scale_factor=factor)
    with pytest.raises(ValueError, match="skip_factor must be a number from 0"):
        Schedule(AdaSpa(), skip_factor=factor)


@pytest.mark.parametrize(("method", "remainder"), [(SkipSoftmax(), "mean"), (AdaSpa(), "value"), (Pisa(), "method")])
def test_a_remainder_where_blocks_are_skipped_is_refused(method, remainder) -> None:
    factor = None if method.name == "skip" else 9.0
    with pytest.raises(ValueError, match="remainder must be 'none' where blocks are skipped, got"):
        Schedule(method, remainder=remainder, skip_factor=factor)
    Schedule(method, remainder=remainder, skip_factor=0)
