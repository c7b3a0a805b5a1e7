"""A video on several ranks is the video of one process, and what cannot be says so on every rank."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_sparse import (
    AdaSpa,
    Dense,
    LeastError,
    LServe,
    Neighborhood,
    Oracle,
    Paro,
    ProxyAttention,
    Schedule,
    SkipSoftmax,
    SparseVideoGen2,
    XAttention,
    parallelize,
    save_plan,
    sparsify,
    unsparsify,
)
from dit_sparse.lost_ranks import RankLostError
from dit_sparse.pipelines.context_parallel import check_spread
from tests.parallel import cases
from tests.parallel.cases import Rendered, render
from tests.parallel.ranks import Ranks
from tests.pipelines.families import FAMILIES, KINDS

STATIC = Neighborhood(density=0.5, tile=(1, 4, 4))
DYNAMIC = XAttention(density=0.5, block=16)
CACHED = AdaSpa(density=0.5, block=16)
COMPARING = [
    LServe(block=16),
    ProxyAttention(block=16),
    Oracle(block=16, density=0.3),
    AdaSpa(density=0.5, block=16, recall=0.1),
]
FOUR = ("wan", "cogvideox", "hunyuan_video", "flux")
TOLERANCE = 1e-5
"""Of the largest latent, in float32: sums of products run in another order."""


@lru_cache
def alone(family: str, method: Any, **options: Any) -> Rendered:
    """The run of one process."""
    return render(family, method, **options)


def check(got: list[Any], want: Rendered) -> None:
    for result in got:
        if isinstance(result, Exception):
            raise result
        assert (result.latents - want.latents).abs().max() <= TOLERANCE * want.latents.abs().max()
        # What is the same for all heads is told once on one process.
        wanted = (call * (len(own) // len(call)) for own, call in zip(result.densities, want.densities, strict=True))
        assert result.densities == [pytest.approx(call) for call in wanted]


@pytest.mark.parametrize(
    ("family", "method", "ulysses", "ring"),
    [
        *((family, method, 2, 2) for family in FOUR for method in (STATIC, DYNAMIC, CACHED)),
        *((family, CACHED, 2, 1) for family in FOUR),
        *(("wan", method, 2, 1) for method in (STATIC, DYNAMIC)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_ranks_make_the_video_of_one_process(ranks: Ranks, family: str, method: Any, ulysses: int, ring: int) -> None:
    want = alone(family, method)
    assert min(density for call in want.densities for density in call if density > 0) < 0.9, "nothing was left out"
    check(ranks.run(render, family, method, ulysses, ring), want)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)])
def test_ltx_video_keeps_its_text_whole(ranks: Ranks, ulysses: int, ring: int) -> None:
    check(ranks.run(render, "ltx_video", CACHED, ulysses, ring, heads=2), alone("ltx_video", CACHED, heads=2))


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("method", [Dense(), STATIC, CACHED], ids=lambda m: m.name)
def test_every_mesh(ranks: Ranks, method: Any, ulysses: int, ring: int) -> None:
    check(ranks.run(render, "wan", method, ulysses, ring), alone("wan", method))


@pytest.mark.parametrize("method", COMPARING, ids=lambda m: m.name)
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (2, 2)])
def test_methods_that_compare_heads_see_all_of_them(ranks: Ranks, method: Any, ulysses: int, ring: int) -> None:
    check(ranks.run(render, "wan", method, ulysses, ring), alone("wan", method))


@pytest.mark.parametrize("method", KINDS, ids=lambda m: m.name)
def test_every_kind_of_method_plans_for_its_own_heads(ranks: Ranks, method: Any) -> None:
    check(ranks.run(render, "wan", method, 2, 1, steps=2), alone("wan", method, steps=2))


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)])
def test_orders_by_head_are_put_together(ranks: Ranks, ulysses: int, ring: int) -> None:
    method = SparseVideoGen2(density=0.5, q_tokens=32, k_tokens=16)
    check(ranks.run(render, "wan", method, ulysses, ring), alone("wan", method))


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)])
def test_prompts_of_unlike_length_in_one_batch(ranks: Ranks, ulysses: int, ring: int) -> None:
    prompts = ["a red ball", "a big blue square moving left on black"]
    for method in (CACHED, STATIC):
        want = render("hunyuan_video", method, prompt=prompts)
        check(ranks.run(render, "hunyuan_video", method, ulysses, ring, prompt=prompts), want)


def test_parallelize_comes_before_or_after_sparsify(ranks: Ranks) -> None:
    for family in ("wan", "cogvideox"):
        got = ranks.run(render, family, STATIC, 2, 1, first="parallelize")
        check(got, alone(family, STATIC))


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_diffusers_own_switch_works_where_it_has_a_plan(ranks: Ranks, family: str) -> None:
    want = alone(family, CACHED)
    for result in ranks.run(cases.render_with_diffusers_own_plan, family, CACHED):
        if isinstance(result, Exception):
            raise result
        assert (result.latents - want.latents).abs().max() <= TOLERANCE * want.latents.abs().max()
        assert result.densities == [pytest.approx(call) for call in want.densities if call != [-1.0]]


def test_heads_and_tokens_need_not_divide(ranks: Ranks) -> None:
    """Three heads over two ranks, and text, frames and rows that four ranks cannot share evenly."""
    check(ranks.run(render, "wan", CACHED, 2, 1, heads=3), alone("wan", CACHED, heads=3))
    odd = {"height": 24, "width": 40, "num_frames": 9}  # 3 x 6 x 10 tokens
    for method in (STATIC, CACHED):
        for ulysses, ring in ((4, 1), (2, 2)):
            want = alone("cogvideox", method, max_sequence_length=15, **odd)
            check(ranks.run(render, "cogvideox", method, ulysses, ring, max_sequence_length=15, **odd), want)


def test_more_ranks_than_heads_are_refused(ranks: Ranks) -> None:
    for result in ranks.run(render, "wan", STATIC, 4, 1, heads=3):
        assert isinstance(result, ValueError)
        assert "ulysses must be at most the model's 3 heads, got 4" in str(result)
    for result in ranks.run(render, "wan", CACHED, 1, 4, heads=3):
        assert isinstance(result, ValueError)
        assert "3 heads" in str(result)
    check(ranks.run(render, "wan", STATIC, 1, 4, heads=3), alone("wan", STATIC, heads=3))


@pytest.mark.parametrize(("method", "remainder"), [(XAttention(block=16), "none"), (CACHED, "mean")])
def test_heads_of_unequal_density_are_spread_anew(ranks: Ranks, method: Any, remainder: Any) -> None:
    """The first two of four heads keep more; with plans that are reused, those and row sums move along."""
    schedule = Schedule(method, warmup=0.2, refresh=(0.5,), remainder=remainder)
    want = render("wan", schedule, steps=5)
    got = ranks.run(cases.render_with_a_dear_half, schedule)
    fixed = ranks.run(cases.render_with_a_dear_half, schedule, balance=False)
    assert all(result.moves > 0 for result in got)
    assert all(result.moves == 0 for result in fixed)
    for result in (*got, *fixed):
        assert (result.latents - want.latents).abs().max() <= TOLERANCE * want.latents.abs().max()


def test_a_plan_file_is_shared_out_by_head(ranks: Ranks, tmp_path: Any) -> None:
    pipe = cases.MAKERS["wan"](heads=4)
    wan = FAMILIES[0]
    wan.run(sparsify(pipe, Paro(density=0.5, block=16)))
    save_plan(pipe, tmp_path / "plan.safetensors")
    method = Paro(plan_file=str(tmp_path / "plan.safetensors"))
    for ulysses, ring in ((2, 1), (2, 2)):
        check(ranks.run(render, "wan", method, ulysses, ring), alone("wan", method))


def test_ranks_that_differ_are_told_so(ranks: Ranks) -> None:
    for what, words in {
        "density": "config density: rank 0 0.5, rank 1 0.25",
        "seed": "latents: rank 0",
        "size": "grid: rank 0 '3x8x12', rank 1 '3x8x8'",
        "steps": "steps: rank 0 3, rank 1 4",
        "plan file": "file plan_file: rank 0",
    }.items():
        for result in ranks.run(cases.render_unlike, what)[:2]:
            assert isinstance(result, ValueError), result
            assert "all ranks must agree when beginning a forward" in str(result)
            assert words in str(result)
    check(ranks.run(render, "wan", STATIC, 2, 1), alone("wan", STATIC))  # and the ranks are none the worse for it


def test_a_rank_that_dies_or_sleeps_is_an_error_and_no_hang() -> None:
    for fate in ("dies", "sleeps"):
        two = Ranks(2, timeout=4.0)
        try:
            first, second = two.run(cases.render_with_fate, fate)
        finally:
            two.stop()
        assert isinstance(first, RankLostError)
        assert "a rank of the sequence-parallel group died or did not answer in time" in str(first)
        assert fate == "sleeps" or second == -9


def test_a_refresh_by_drift_is_refused(ranks: Ranks) -> None:
    for result in ranks.run(render, "wan", Schedule(CACHED, drift=0.1), 2, 1):
        assert isinstance(result, ValueError)
        assert "drift must be none on several ranks, got 0.1" in str(result)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(CACHED, remainder="mean"), "remainder must be 'none' in a ring, got 'mean'"),
        (Schedule(SkipSoftmax(1e6, block=16)), "skip_factor must be 0 in a ring, got blocks skipped by 'skip'"),
    ],
    ids=["remainder", "skip"],
)
def test_what_a_ring_cannot_do_is_refused(ranks: Ranks, schedule: Schedule, message: str) -> None:
    for result in ranks.run(render, "wan", schedule, 1, 2):
        assert isinstance(result, ValueError)
        assert message in str(result)
    check(ranks.run(render, "wan", schedule, 2, 1), render("wan", schedule))


def test_what_a_ring_cannot_do_is_found_before_a_run() -> None:
    def spread(ulysses: int, ring: int) -> Any:
        context = SimpleNamespace(ulysses_degree=ulysses, ring_degree=ring)
        return SimpleNamespace(
            config=SimpleNamespace(num_attention_heads=4),
            _parallel_config=SimpleNamespace(context_parallel_config=context),
        )

    with pytest.raises(ValueError, match="at most the model's 4 heads for adaspa, got 6 ranks: in a ring"):
        check_spread(spread(2, 3), Schedule(CACHED))
    with pytest.raises(ValueError, match="remainder must be 'none' in a ring, got 'value'"):
        check_spread(spread(1, 2), Schedule(LeastError()))
    with pytest.raises(ValueError, match="drift must be none on several ranks"):
        check_spread(spread(2, 1), Schedule(CACHED, drift=0.1))
    check_spread(spread(2, 3), Schedule(STATIC))
    check_spread(spread(2, 2), Schedule(CACHED))
    check_spread(spread(2, 1), Schedule(LeastError()))
    check_spread(SimpleNamespace(), Schedule(CACHED, drift=0.1))


def test_a_cache_that_ranks_would_decide_unlike_is_refused(ranks: Ranks) -> None:
    for result in ranks.run(cases.render_with_first_block_cache):
        assert isinstance(result, ValueError)
        assert "cache must decide alike on all ranks, got FirstBlockCacheConfig" in str(result)


def test_dense_attention_of_diffusers_itself_goes_on(ranks: Ranks) -> None:
    """Where diffusers can attend on several ranks; elsewhere its attention is refused."""
    pipe = unsparsify(cases.MAKERS["wan"](heads=4))
    want = FAMILIES[0].run(pipe, steps=3)
    for result in ranks.run(cases.render_unsparsified, "wan"):
        assert (result - want).abs().max() <= TOLERANCE * want.abs().max()
    for result in ranks.run(cases.render_unsparsified, "cogvideox"):
        assert isinstance(result, ValueError)
        assert "sparsify(pipe, Dense()) for dense attention" in str(result)


def test_what_needs_all_heads_on_one_rank_is_refused(ranks: Ranks) -> None:
    for result in ranks.run(cases.save_plan_of_ranks):
        assert isinstance(result, ValueError)
        assert "pipeline must be on one rank to save a plan" in str(result)
    for result in ranks.run(cases.observe_ranks):
        assert isinstance(result, ValueError)
        assert "pipeline must be on one rank to be observed" in str(result)


def test_parallelize_says_what_it_lacks() -> None:
    pipe = cases.MAKERS["wan"]()
    with pytest.raises(ValueError, match="together at least 2 ranks, got 1 and 1"):
        parallelize(pipe)
    with pytest.raises(ValueError, match="got no process group; start with torchrun"):
        parallelize(pipe, ulysses=2)
    assert torch.is_tensor(FAMILIES[0].run(pipe, steps=1))
