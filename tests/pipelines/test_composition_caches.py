"""Caches of diffusers that skip blocks or attention at some steps, beside sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor

from dit_sparse import LeastError, Neighborhood, Schedule, sparsify, statistics, unsparsify
from dit_sparse.course import plan_steps, step_densities
from dit_sparse.pipelines.families import adapter_for
from tests.pipelines.composed import ALL_DENSE, EVERY_BLOCK, HALF, composed, count_calls, is_close
from tests.pipelines.families import FAMILIES, KINDS, METHODS, Family

STEPS = 6

ATTENTION = r"(single_)?(transformer_)?blocks\.\d+\.attn1?"

CACHES: dict[str, Callable[[Any], Any]] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=1.0),
    "PAB": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=[ATTENTION], taylor_factors_dtype=torch.float32
    ),
    "MagCache": lambda pipe: MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=0.1, max_skip_steps=1, retention_ratio=0.3
    ),
    "SeaCache": lambda pipe: SeaCacheConfig(threshold=10.0),
}

PAIRS = [(family, cache) for family in FAMILIES for cache in CACHES if cache != "SeaCache" or family.name == "wan"]
"""SeaCache knows no other of these families."""


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def pair(request: pytest.FixtureRequest) -> tuple[Family, str]:
    return request.param


@pytest.fixture
def family(pair: tuple[Family, str]) -> Family:
    return pair[0]


@pytest.fixture
def enable(pair: tuple[Family, str]) -> Callable[[Any], None]:
    return lambda pipe: pipe.transformer.enable_cache(CACHES[pair[1]](pipe))


def run(family: Family, pipe: Any, **options: Any) -> Tensor:
    return family.run(pipe, steps=STEPS, **options)


_calls: dict[str, int] = {}


def calls_without_a_cache(family: Family) -> int:
    if family.name not in _calls:
        pipe = family.make()
        _calls[family.name] = count_calls(pipe, lambda: run(family, pipe))
    return _calls[family.name]


@pytest.mark.parametrize("cache_first", [True, False], ids=["cache_first", "sparse_first"])
def test_a_cache_skips_what_it_skips_without_us(family, enable, cache_first: bool) -> None:
    plain = composed(family, enable, None)
    results: list[Tensor] = []
    calls = count_calls(plain, lambda: results.append(run(family, plain)))
    assert 0 < calls < calls_without_a_cache(family), "the cache skipped nothing"
    (want,) = results

    pipe = composed(family, enable, ALL_DENSE, compose_first=cache_first)
    assert torch.equal(run(family, pipe), want)
    assert statistics(pipe).calls == calls

    sparsify(pipe, EVERY_BLOCK)
    assert is_close(run(family, pipe), want)
    assert statistics(pipe).calls == calls

    sparsify(pipe, HALF)
    assert not is_close(run(family, pipe), want)
    assert set(statistics(pipe).dense_calls) <= {"warm-up", "search"}
    assert statistics(pipe).sparse_density == pytest.approx(0.5, abs=0.1)

    unsparsify(pipe)
    assert torch.equal(run(family, pipe), want)
    pipe.transformer.disable_cache()
    assert torch.equal(run(family, pipe), family.dense(steps=STEPS))


@pytest.mark.parametrize("ramp", [None, (0.9, 0.3) * 3], ids=["one_order", "two_orders"])
def test_what_a_cache_keeps_stays_in_place(family, enable, ramp, monkeypatch) -> None:
    """Neighborhood takes its tile, and so the order of the tokens, from the density, which a ramp changes."""
    schedule = Schedule(Neighborhood(density=0.3), warmup=0, ramp=ramp)
    pipe = composed(family, enable, schedule)
    got = run(family, pipe)
    monkeypatch.setattr(type(adapter_for(pipe)), "takes_order", lambda *_: False)
    assert is_close(got, run(family, composed(family, enable, schedule)))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0].name == "hunyuan_video"], ids=lambda pair: pair[1])
def test_what_a_cache_keeps_of_one_branch_fits_the_other(family, enable) -> None:
    """PAB hands attention of one branch to the other; here the prompts of one alone are of unlike lengths."""
    prompts, method = ["a red ball", "a blue square moving left"], Neighborhood(density=1, tile=(1, 4, 4))
    want = family.run(composed(family, enable, None), prompts, steps=STEPS, **family.guided)
    pipe = composed(family, enable, Schedule(method, warmup=0))
    assert is_close(family.run(pipe, prompts, steps=STEPS, **family.guided), want)


@pytest.mark.parametrize(
    "pair", [pair for pair in PAIRS if pair[0].name == "wan" and pair[1] == "TaylorSeer"], ids=lambda pair: pair[1]
)
@pytest.mark.parametrize("method", [LeastError(density=0.25, tile=(1, 4, 4), rows=4), HALF], ids=["lea", "adaspa"])
def test_a_plan_due_at_a_step_that_a_cache_skips_is_made_at_the_next_call(family, enable, method) -> None:
    schedule = Schedule(method, warmup=0, refresh=(4, 7), never_slower=False)
    pipe = composed(family, enable, schedule)
    family.run(pipe, steps=10)
    records = [record for record in statistics(pipe).records if record.layer == 1]
    ran = {record.step for record in records}
    planned = {record.step for record in records if record.planning is not None}
    due = plan_steps(schedule, 10)
    assert {4, 7} & (due - ran), "the cache skipped no step that plans"
    assert planned == {min(step for step in ran if step >= at) for at in due}
    # With the density of its own step, though lea's falls at a step that is no refresh.
    densities = step_densities(schedule, 10, planned)
    for record in records:
        assert record.density is None or float(record.density.mean()) == pytest.approx(densities[record.step], abs=0.03)


def test_a_cache_forgets_what_it_kept_under_another_attention(family, enable) -> None:
    def fails(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    want = run(family, composed(family, enable, METHODS[0]))
    pipe = composed(family, enable, None)
    dense = run(family, pipe)
    for switch, expected in ((lambda: sparsify(pipe, METHODS[0]), want), (lambda: unsparsify(pipe), dense)):
        with pytest.raises(KeyboardInterrupt):
            run(family, pipe, callback_on_step_end=fails)
        switch()
        assert torch.equal(run(family, pipe), expected)


def faster(pipe: Any, **options: Any) -> FasterCacheConfig:
    return FasterCacheConfig(
        current_timestep_callback=lambda: pipe.current_timestep, attention_weight_callback=lambda _: 0.3, **options
    )


HALVED = {
    "tensor_format": "BFCHW",
    "spatial_attention_timestep_skip_range": (-1, -1),
    "unconditional_batch_skip_range": 2,
    "unconditional_batch_timestep_skip_range": (-1, 2000),
}
"""Every second step runs the conditional half of the batch alone."""

DISTILLED = {
    "tensor_format": "BCHW",
    "is_guidance_distilled": True,
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 990),
    "unconditional_batch_timestep_skip_range": (-1, -1),
}
"""Every second step takes attention from the two before; the first step lies outside, or there would be none."""


@pytest.mark.parametrize(
    ("name", "options"), [("cogvideox", HALVED), ("flux", DISTILLED), ("hunyuan_video", DISTILLED)]
)
def test_faster_cache(name: str, options: dict[str, Any]) -> None:
    family = next(family for family in FAMILIES if family.name == name)

    def enable(pipe: Any) -> None:
        pipe.transformer.enable_cache(faster(pipe, **options))

    want = run(family, composed(family, enable, None))
    assert not torch.equal(want, family.dense(steps=STEPS)), "the cache skipped nothing"
    for first in (True, False):
        assert torch.equal(run(family, composed(family, enable, ALL_DENSE, compose_first=first)), want)
        assert is_close(run(family, composed(family, enable, EVERY_BLOCK, compose_first=first)), want)
    for number, method in enumerate(KINDS):
        pipe = composed(family, enable, method, compose_first=number % 2 == 0)
        assert torch.isfinite(run(family, pipe)).all()
        assert set(statistics(pipe).dense_calls) <= {"warm-up", "search"}
        assert 0.2 < statistics(pipe).sparse_density < 0.7
