"""When a method plans, reuses or leaves a call dense, and how a schedule is written down."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.methods import (
    METHODS,
    AdaSpa,
    Dense,
    LeastError,
    LoSA,
    Neighborhood,
    Paro,
    Pisa,
    SkipSoftmax,
    SolAttention,
    XAttention,
)
from dit_sparse.methods.parameters import density_at
from dit_sparse.schedule import Schedule
from dit_sparse.types import REMAINDERS, AttentionPlan, Previous, Site, TokenGrid, TokenOrder

GRID = TokenGrid(2, 4, 4)


def site(step: int = 0, num_steps: int = 20, layer: int = 0, branch: str = "cond", model: str = "transformer") -> Site:
    return Site(GRID, layer=layer, num_layers=4, step=step, num_steps=num_steps, branch=branch, model=model)


def some_plan() -> AttentionPlan:
    q = torch.randn(1, 1, 32, 16)
    return Dense().plan(q, q, q, site(), None)


@pytest.mark.parametrize(
    ("share", "steps", "expected"), [(0.2, 20, 4), (0.2, 15, 3), (0.2, 50, 10), (0.0, 9, 0), (0.1, 4, 1), (1.0, 3, 3)]
)
def test_warmup_steps(share: float, steps: int, expected: int) -> None:
    assert Schedule(AdaSpa(), warmup=share).warmup_steps(steps) == expected


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (AdaSpa, "the class AdaSpa: call it"),
        ("adaspa", "the text 'adaspa': methods.parse_method reads it"),
        ({"method": "adaspa"}, "the dict .*: Schedule.from_config reads a config"),
        (Schedule(AdaSpa()), "a schedule of 'adaspa': take it as it is"),
        (None, "None"),
    ],
    ids=["class", "text", "dict", "schedule", "None"],
)
def test_what_is_no_method_is_refused(given, got: str) -> None:
    with pytest.raises(ValueError, match=rf"method must be a method such as AdaSpa\(density=0.25\), got {got}"):
        Schedule(given)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_is_one(method) -> None:
    made = method()
    assert Schedule.of(made).method is made


def test_adaspa_searches_at_the_papers_steps() -> None:
    schedule = Schedule(AdaSpa())
    previous = None
    actions = {}
    for step in range(50):
        decision = schedule.decide(site(step, 50), previous)
        actions[step] = decision.action
        if decision.keep_lse:
            previous = Previous(None, torch.zeros(1), step)
        if decision.action == "plan":
            previous = Previous(some_plan(), torch.zeros(1), step)
    assert [step for step, action in actions.items() if action == "plan"] == [10, 30]
    assert all(actions[step] == "dense" for step in range(10))
    assert actions[11] == actions[49] == "reuse"


def test_a_refresh_is_made_at_the_first_call_from_its_step_on() -> None:
    """A cache may have skipped the layer at the step itself; AdaSpa's refresh of 20 steps is at 12."""
    for planned_at, step, action in (
        (4, 11, "reuse"),
        (4, 12, "plan"),
        (4, 15, "plan"),
        (12, 12, "reuse"),
        (13, 19, "reuse"),
    ):
        previous = Previous(some_plan(), torch.zeros(1), planned_at)
        assert Schedule(AdaSpa()).decide(site(step), previous).action == action


@pytest.mark.parametrize("method", [LeastError(), LeastError(error=0.05)], ids=["density", "error"])
def test_a_plan_does_not_outlast_its_density(method) -> None:
    """Of 20 steps lea's first four have another density, or threshold, than the others."""
    schedule = Schedule(method, warmup=0, refresh=())
    for planned_at, step, action in ((0, 3, "reuse"), (0, 4, "plan"), (2, 9, "plan"), (4, 19, "reuse")):
        assert schedule.decide(site(step), Previous(some_plan(), None, planned_at)).action == action
    even = Schedule(replace(method, early=1), warmup=0, refresh=())
    assert even.decide(site(19), Previous(some_plan(), None, 0)).action == "reuse"


def test_a_density_by_noise_is_that_of_its_plan() -> None:
    schedule = Schedule(Pisa(), refresh=(), noise_densities=(0.5, 0.1))
    later = replace(site(9), sigma=0.4)
    assert schedule.decide(later, Previous(some_plan(), None, 4)).action == "reuse"


def test_lse_is_kept_at_the_last_dense_step_alone() -> None:
    schedule = Schedule(AdaSpa())
    assert [schedule.decide(site(step), None).keep_lse for step in range(4)] == [False, False, False, True]


def test_without_warmup_the_search_comes_first() -> None:
    decision = Schedule(AdaSpa(), warmup=0).decide(site(0), None)
    assert (decision.action, decision.reason, decision.keep_lse) == ("dense", "search", True)
    after = Schedule(AdaSpa(), warmup=0).decide(site(1), Previous(None, torch.zeros(1), 0))
    assert after.action == "plan"


def test_a_static_method_never_plans_twice() -> None:
    schedule = Schedule(Neighborhood(window=2), refresh=(0.5,))
    assert schedule.decide(site(4), None).action == "plan"
    assert schedule.decide(site(10), Previous(some_plan(), None, 4)).action == "reuse"


def test_dense_layers_count_from_both_ends() -> None:
    schedule = Schedule(AdaSpa(), warmup=0, dense_layers=(0, -1))
    reasons = [schedule.decide(site(5, layer=layer), None).reason for layer in range(4)]
    assert reasons == ["layer", "search", "search", "layer"]


def test_branches_models_and_layers_share_no_data_plan() -> None:
    schedule = Schedule(AdaSpa())
    sites = [
        site(branch=b, layer=n, model=m)
        for b in ("cond", "uncond")
        for n in (0, 1)
        for m in ("transformer", "transformer_2")
    ]
    assert len({schedule.key(s) for s in sites}) == 8
    assert len({Schedule(Neighborhood(window=2)).key(s) for s in sites}) == 1


@pytest.mark.parametrize(
    "method", [Dense(), Neighborhood(window=(1, 2, 3)), Neighborhood(), AdaSpa(density=0.5), Paro(alpha=0.5)]
)
def test_config_round_trip(method: object) -> None:
    schedule = Schedule(method, warmup=0.3, dense_layers=(0, -1), refresh=(0.5, 0.75))  # type: ignore[arg-type]
    assert Schedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule


@given(
    density=st.floats(0.01, 1.0),
    warmup=st.floats(0, 1),
    layers=st.lists(st.integers(-40, 40), max_size=4),
    refresh=st.none() | st.lists(st.floats(0, 1), max_size=4),
)
def test_config_round_trip_of_any_schedule(
    density: float, warmup: float, layers: list[int], refresh: list[float] | None
) -> None:
    schedule = Schedule(AdaSpa(density=density), warmup, tuple(layers), None if refresh is None else tuple(refresh))
    assert Schedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "must be an object"),
        ({}, "must be an object"),
        ({"method": "adspa"}, "did you mean 'adaspa'"),
        ({"method": "adaspa", "densty": 0.5}, "did you mean 'density'"),
        ({"method": "adaspa", "density": "much"}, "density must be a number"),
        ({"method": "adaspa", "density": 0}, "density must be above 0"),
        ({"method": "adaspa", "density": 1.5}, "at most 1"),
        ({"method": "adaspa", "density": True}, "density must be a number"),
        ({"method": "adaspa", "version": 99}, "version 99"),
        ({"method": "adaspa", "warmup": 2}, "warmup must be from 0 to 1"),
        ({"method": "adaspa", "refresh": [1.5]}, "refresh must be shares below 1"),
        ({"method": "adaspa", "block": 0}, "block must be a whole number"),
        ({"method": "neighborhood", "window": [1, 2]}, "window must be"),
    ],
)
def test_bad_configs_are_refused(config: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_config(config)  # type: ignore[arg-type]


def test_lists_are_tuples_that_can_be_hashed() -> None:
    options = {"dense_layers": [0, -1], "refresh": [0.5], "ramp": [0.5, 0.2], "layer_densities": [0.5, 0.25]}
    given = Schedule(LeastError(tile=[1, 4, 4]), **options)  # type: ignore[arg-type]
    want = Schedule(LeastError(tile=(1, 4, 4)), **{name: tuple(value) for name, value in options.items()})
    assert given == want
    assert hash(given) == hash(want)
    assert hash(Schedule(Pisa(), noise_densities=[0.5, 0.1]))  # type: ignore[arg-type]
    assert Schedule(Pisa(), dense_layers=range(2)) == Schedule(Pisa(), dense_layers=(0, 1))  # type: ignore[arg-type]
    assert hash(Schedule(XAttention(), layer_thresholds=[0.9]))  # type: ignore[arg-type]


def test_every_method_is_hashable_and_has_the_protocols_attributes() -> None:
    for name, cls in METHODS.items():
        method = cls()
        assert hash(method) == hash(cls())
        assert method.name == name
        assert method.scope in ("grid", "layer", "sample", "call")
        assert "arXiv" in method.paper


def test_a_ramp_gives_equal_parts_of_the_sparse_steps_their_densities() -> None:
    schedule = Schedule(AdaSpa(), warmup=0.2, ramp=(0.5, 0.3, 0.2))
    densities = [schedule.method_at(step, 10).density for step in range(2, 10)]
    assert densities == [0.5, 0.5, 0.5, 0.3, 0.3, 0.3, 0.2, 0.2]
    assert schedule.method_at(3, 10) is schedule.method_at(2, 10)
    assert Schedule.from_config(schedule.to_config()) == schedule


def densities(schedule: Schedule, steps: int, **place: object) -> list[float | None]:
    """What the plan of each step keeps by the word of its method."""
    sites = [replace(site(step, steps), **place) for step in range(steps)]
    return [density_at(schedule.method_for(at), at) for at in sites]


def test_densities_of_a_schedule_replace_those_that_a_method_has_by_step() -> None:
    """By itself lea has four times the density in the first fifth."""
    ramp = Schedule(LeastError(), warmup=0, ramp=(0.5, 0.25))
    assert densities(ramp, 20) == pytest.approx([0.5] * 10 + [0.25] * 10)
    noise = Schedule(LeastError(), warmup=0, noise_densities=(0.5, 0.1))
    for sigma, density in ((1.0, 0.5), (0.5, 0.3), (0.0, 0.1)):
        assert densities(noise, 20, sigma=sigma) == pytest.approx([density] * 20)
    layers = Schedule(LeastError(), warmup=0, ramp=(0.4,), layer_densities=(0.1, 0.3))
    assert densities(layers, 20, layer=1) == pytest.approx([0.6] * 20)
    own = Schedule(LeastError(), warmup=0, layer_densities=(0.1, 0.3))
    assert densities(own, 20, layer=1) == pytest.approx(LeastError(density=0.3).step_densities(20))
    assert Schedule.from_config(ramp.to_config()) == ramp
    assert ramp.to_config()["early"] == 4


def test_a_part_of_a_ramp_begins_with_a_new_plan() -> None:
    schedule = Schedule(Paro(), warmup=0, ramp=(0.5, 0.2))
    grid = TokenGrid(2, 4, 4)
    lse = torch.zeros(1, 1, 32)
    order = TokenOrder.from_index(torch.arange(32), torch.tensor([0, 16, 32]))
    plan = AttentionPlan.from_kept(order, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    actions = [
        schedule.decide(Site(grid, step=step, num_steps=4), Previous(plan, lse, step - 1)).action for step in (1, 2, 3)
    ]
    assert actions == ["reuse", "plan", "reuse"]


def test_a_grid_method_has_a_plan_a_part() -> None:
    schedule = Schedule(Neighborhood(density=0.5), warmup=0, ramp=(0.5, 0.25))
    keys = [schedule.key(Site(TokenGrid(2, 4, 4), step=step, num_steps=4)) for step in range(4)]
    assert keys[0] == keys[1] != keys[2] == keys[3]


@pytest.mark.parametrize(
    ("ramp", "message"), [((), "at least one density"), ((0.5, 0), "ramp must be"), ((2,), "ramp")]
)
def test_bad_ramps_are_refused(ramp, message) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(AdaSpa(), ramp=ramp)


@pytest.mark.parametrize("method", [Dense(), Neighborhood(window=(1, 3, 3))], ids=str)
def test_a_ramp_needs_a_density_to_change(method) -> None:
    with pytest.raises(ValueError, match="density to change"):
        Schedule(method, ramp=(0.5, 0.2))


def test_refresh_takes_steps_and_shares() -> None:
    assert Schedule(AdaSpa(), refresh=(10, 0.5)).refresh_steps(50) == {10, 25}


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_a_remainder_is_set_for_any_method(remainder) -> None:
    """Also for one that nobody here has heard of: a schedule changes the plan, not the method."""
    planned = some_plan()
    assert Schedule(AdaSpa()).finish(planned) is planned
    assert Schedule(AdaSpa()).finish(planned.with_remainder("value")).remainder == "value"
    schedule = Schedule(AdaSpa(), remainder=remainder)
    assert schedule.finish(planned.with_remainder("mass")).remainder == remainder
    assert Schedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule


def test_a_remainder_and_skipping_take_each_others_place() -> None:
    planned = some_plan()
    skipping = Schedule(SkipSoftmax(), remainder="mean", skip_factor=0)
    assert not skipping.skips
    found = skipping.finish(planned.with_skip(0.1))
    assert (found.remainder, found.skip_threshold) == ("mean", 0)
    summing = Schedule(LeastError(), remainder="none", skip_factor=1)
    found = summing.finish(planned.with_remainder("value"))
    assert found.remainder == "none"
    assert found.skip_threshold > 0


def test_layers_may_skip_by_thresholds_alone() -> None:
    assert not Schedule(AdaSpa()).skips
    assert Schedule(SkipSoftmax(), layer_thresholds=(100.0, 0.0)).skips
    assert not Schedule(SkipSoftmax(), layer_thresholds=(0.0, 0.0)).skips


def test_configs_from_before_remainders_still_load() -> None:
    config = Schedule(AdaSpa()).to_config()
    assert config.pop("remainder") == "method"
    assert Schedule.from_config(config) == Schedule(AdaSpa())


def test_an_unknown_remainder_is_refused() -> None:
    with pytest.raises(ValueError, match="remainder must be one of method, none, mean, value, mass, got 'means'"):
        Schedule(AdaSpa(), remainder="means")
    with pytest.raises(ValueError, match="remainder must be one of method, none, mean, value, mass, got 3"):
        Schedule.from_config({"method": "adaspa", "remainder": 3})


def test_a_plan_is_kept_until_queries_and_keys_have_moved() -> None:
    schedule = Schedule(Pisa(), drift=0.1)
    assert schedule.refresh_steps(20) == frozenset(), "in place of the method's own steps"
    previous = Previous(some_plan(), None, 4)
    for drift, action in ((None, "reuse"), (0.0, "reuse"), (0.1, "reuse"), (0.11, "plan")):
        assert schedule.decide(site(9), replace(previous, drift=drift)).action == action
    both = Schedule(Pisa(), drift=0.1, refresh=(0.5,))
    assert both.decide(site(10), replace(previous, drift=0.0)).action == "plan"
    assert Schedule(Pisa()).decide(site(9), replace(previous, drift=5.0)).action == "plan", "PISA plans every step"
    assert Schedule(Pisa(), refresh=()).decide(site(9), replace(previous, drift=5.0)).action == "reuse"


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sigma", [0.001, 0.2, 0.5, 0.9, 0.999])
def test_density_follows_the_log_snr(sigma: float, slope: float) -> None:
    schedule = Schedule(Pisa(), noise_densities=(0.6, 0.1), noise_slope=slope)
    log_snr = math.log((1 - sigma) ** 2 / sigma**2)
    want = 0.1 + 0.5 * (1 - 1 / (1 + math.exp(-slope * log_snr)))
    assert schedule.method_for(replace(site(3), sigma=sigma)).density == pytest.approx(want)


def test_density_at_both_ends_of_the_noise() -> None:
    schedule = Schedule(Pisa(), noise_densities=(0.6, 0.1))
    assert [schedule.method_for(replace(site(3), sigma=sigma)).density for sigma in (1.0, 0.0)] == [0.6, 0.1]
    with pytest.raises(ValueError, match="need a scheduler with noise levels"):
        schedule.decide(site(0), None)
    assert schedule.decide(replace(site(0), sigma=1.0), None).reason == "warm-up"


def test_layers_have_densities_of_their_own() -> None:
    schedule = Schedule(AdaSpa(), layer_densities=(0.5, 0.1, 0.2, 0.4))
    assert [schedule.method_for(site(5, layer=n)).density for n in range(4)] == [0.5, 0.1, 0.2, 0.4]
    schedule.check_layers(4)
    with pytest.raises(ValueError, match="layer_densities must have one value for each of 5 layers, got 4"):
        schedule.check_layers(5)


def test_a_layers_density_shares_out_that_of_the_step() -> None:
    """Relative to the mean of the layers, 0.3, and never above 1."""
    ramped = Schedule(AdaSpa(), warmup=0, ramp=(0.6, 0.3), layer_densities=(0.6, 0.1, 0.2, 0.3))
    assert [ramped.method_for(site(0, layer=n)).density for n in range(4)] == pytest.approx([1.0, 0.2, 0.4, 0.6])
    assert [ramped.method_for(site(19, layer=n)).density for n in range(4)] == pytest.approx([0.6, 0.1, 0.2, 0.3])
    noisy = Schedule(Pisa(), noise_densities=(0.6, 0.1), layer_densities=(0.6, 0.1, 0.2, 0.3))
    assert noisy.method_for(replace(site(0, layer=1), sigma=1.0)).density == pytest.approx(0.2)


def test_layers_of_other_densities_share_no_static_plan() -> None:
    schedule = Schedule(Neighborhood(density=0.5), layer_densities=(0.5, 0.25, 0.5, 0.25))
    keys = [schedule.key(site(5, layer=n)) for n in range(4)]
    assert keys[0] == keys[2] != keys[1] == keys[3]


def test_layers_have_thresholds_of_their_own() -> None:
    schedule = Schedule(SolAttention(), layer_thresholds=(0.5, 1.0, 1.5, 2.0))
    assert [schedule.method_for(site(5, layer=n)).tau for n in range(4)] == [0.5, 1.0, 1.5, 2.0]
    retained = Schedule(LoSA(), layer_thresholds=(0.9, 0.99))
    assert retained.method_for(site(5, layer=1)).retained == 0.99
    with pytest.raises(ValueError, match="layer_thresholds must have one value for each of 3 layers, got 2"):
        retained.check_layers(3)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if getattr(cls(), "density", 0) is None])
def test_every_method_with_a_threshold_says_which(name: str) -> None:
    method = METHODS[name]()
    if hasattr(method, "control"):
        assert getattr(Schedule(method, layer_thresholds=(0.5,)).method_for(site(5)), method.control) == 0.5
    else:
        assert method.scope == "grid"


NEW_OPTIONS = [
    Schedule(Pisa(), drift=0.2),
    Schedule(AdaSpa(), noise_densities=(0.5, 0.1), noise_slope=2.0),
    Schedule(AdaSpa(), layer_densities=(0.5, 0.1)),
    Schedule(XAttention(), layer_thresholds=(0.9, 0.8)),
]


@pytest.mark.parametrize("schedule", NEW_OPTIONS, ids=str)
def test_config_round_trip_of_options_by_noise_layer_and_drift(schedule: Schedule) -> None:
    assert Schedule.from_config(json.loads(json.dumps(schedule.to_config()))) == schedule


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Pisa(), {"drift": -0.1}, "drift must be a number from 0 on"),
        (Pisa(), {"drift": math.nan}, "drift must be a number from 0 on"),
        (Neighborhood(), {"drift": 0.1}, "drift must be none for 'neighborhood'"),
        (Neighborhood(window=8), {"noise_densities": (0.5, 0.1)}, "noise_densities must have a density"),
        (Pisa(), {"noise_densities": (0.5, 0.0)}, "noise_densities must be above 0"),
        (Pisa(), {"noise_slope": 0}, "noise_slope must be a number above 0"),
        (Pisa(), {"noise_densities": (0.5, 0.1), "ramp": (0.5,)}, "ramp and noise_densities both"),
        (XAttention(), {"noise_densities": (0.5, 0.1)}, "noise_densities must have a density to change"),
        (XAttention(), {"layer_densities": (0.5,)}, "layer_densities must have a density to change"),
        (Pisa(), {"layer_densities": ()}, "layer_densities must hold at least one"),
        (Pisa(), {"layer_densities": (2.0,)}, "layer_densities must be above 0 and at most 1"),
        (Pisa(), {"layer_thresholds": (0.5,)}, "layer_thresholds must have a threshold to change"),
        (XAttention(density=0.5), {"layer_thresholds": (0.5,)}, "layer_thresholds must have a threshold"),
        (XAttention(), {"layer_thresholds": (2.0,)}, "top_p must be"),
        (Pisa(), {"noise_densities": (0.5,)}, "noise_densities must be two"),
        (Pisa(), {"dense_layers": (1.5,)}, "dense_layers must be whole numbers, negative ones from the end, got 1.5"),
        (Pisa(), {"dense_layers": ("a",)}, "dense_layers must be whole numbers"),
        (Pisa(), {"dense_layers": (True,)}, "dense_layers must be whole numbers"),
        (
            Pisa(),
            {"dense_layers": "01"},
            "dense_layers must be a list or a tuple of numbers, also where there is one, got '01'",
        ),
        (
            Pisa(),
            {"dense_layers": 3},
            "dense_layers must be a list or a tuple of numbers, also where there is one, got 3",
        ),
        (
            Pisa(),
            {"dense_layers": None},
            "dense_layers must be a list or a tuple of numbers, also where there is one, got None",
        ),
        (Pisa(), {"refresh": 0.5}, "refresh must be a list or a tuple"),
        (Pisa(), {"layer_densities": 0.5}, "layer_densities must be a list or a tuple"),
        (Pisa(), {"strict": "no"}, "strict must be True or False, got 'no'"),
        (Pisa(), {"never_slower": 0}, "never_slower must be True or False, got 0"),
    ],
)
def test_options_that_a_method_cannot_follow_are_refused(method, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(method, **options)
