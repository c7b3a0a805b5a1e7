"""Wan: the processor equals upstream's, sparse equals dense under the plan's mask, branches and steps stay apart."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from dit_sparse import (
    AdaSpa,
    Dense,
    Neighborhood,
    Paro,
    Pisa,
    Schedule,
    TokenGrid,
    sparsify,
    statistics,
    unsparsify,
)
from dit_sparse.attention import sparse_attention
from dit_sparse.pipelines import NotSparseError, check, session_of, token_grid
from dit_sparse.pipelines import session as session_module
from dit_sparse.pipelines.adapter import uses_default_backend
from dit_sparse.pipelines.layout import Layout
from dit_sparse.pipelines.session import Session
from dit_sparse.pipelines.wan import SparseWanAttnProcessor, WanAdapter
from dit_sparse.reorder import tile_order
from dit_sparse.types import PackedPlan

METHODS = [
    Neighborhood(window=(1, 5, 7), tile=(1, 4, 4)),
    AdaSpa(density=0.5, block=16),
    Paro(density=0.5, block=16),
]


def test_the_processors_signature_is_upstreams() -> None:
    """`WanAttention.forward` passes its arguments by position."""
    ours, theirs = (list(inspect.signature(c.__call__).parameters) for c in (SparseWanAttnProcessor, WanAttnProcessor))
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_dense_call_equals_upstreams_bit_for_bit(pipe, dtype: torch.dtype, fused: bool) -> None:
    transformer = pipe.transformer.to(dtype)
    attn = transformer.blocks[0].attn1
    if fused:
        attn.fuse_projections()
    hidden = torch.randn(2, 3 * 8 * 12, attn.inner_dim, dtype=dtype)
    rotary = transformer.rope(torch.empty(2, 8, 3, 8, 12))
    want = attn(hidden, None, None, rotary)
    attn.processor = SparseWanAttnProcessor(Session(Schedule(AdaSpa(), strict=False)), 0, 1, attn.processor)
    assert torch.equal(attn(hidden, None, None, rotary), want)
    assert torch.equal(attn(hidden, None, None, None), WanAttnProcessor()(attn, hidden))


def test_what_is_no_method_or_backend_is_refused_before_the_run(pipe) -> None:
    with pytest.raises(ValueError, match=r"method must be a method such as .*, got the class AdaSpa: call it"):
        sparsify(pipe, AdaSpa)
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*, got None"):
        sparsify(pipe, AdaSpa(), backend=None)
    with pytest.raises(ValueError, match="pipeline must be sparsified, got a dense WanPipeline"):
        statistics(pipe)


@pytest.mark.parametrize("schedule", [Dense(), Schedule(Dense(), warmup=0), Schedule(AdaSpa(), warmup=1)], ids=str)
def test_dense_runs_equal_upstreams(pipe, render, schedule) -> None:
    want = render(pipe)
    assert torch.equal(render(sparsify(pipe, schedule)), want)


@pytest.mark.parametrize(
    "method", [AdaSpa(density=1, block=16), Paro(density=1, block=16), Neighborhood(window=(3, 8, 12))]
)
def test_density_one_is_dense_up_to_rounding(pipe, render, method) -> None:
    want = render(pipe)
    got = render(sparsify(pipe, Schedule(method, warmup=0), strict=False))
    assert statistics(pipe).density == 1
    assert set(statistics(pipe).backends) <= {"gather", "dense"}, "dense attention computed what was to be compared"
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("batch", [1, 2])
def test_sparse_equals_dense_attention_under_the_plans_own_mask(pipe, render, method, batch, monkeypatch) -> None:
    """The same run with every sparse call replaced by fp64 attention under the plan's token mask."""
    prompts = ["a red ball", "a blue square"][:batch]
    got = render(sparsify(pipe, method), prompts)
    dense = render(unsparsify(pipe), prompts)

    def oracle(q: Tensor, k: Tensor, v: Tensor, plan, *, in_order: bool, **_) -> Tensor:
        orders = plan.q_order.index, plan.kv_order.index
        mask = plan.block_mask.to_bool(*orders) if in_order else plan.token_mask()
        return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask).to(q.dtype)

    monkeypatch.setattr("dit_sparse.attention.sparse_attention", oracle)
    want = render(sparsify(pipe, method), prompts)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert (got - dense).abs().max() > 1e-3 * want.abs().max(), "sparsity changed nothing"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("at_rest", [False, True])
def test_every_method_has_a_remainder(pipe, render, method, at_rest, monkeypatch) -> None:
    """A run with it equals one in which the reference computes every call, and it changes the latents."""
    if at_rest:
        monkeypatch.setattr("dit_sparse.pipelines.session._at_rest", lambda plan: plan.pack())
    without = render(sparsify(pipe, method))
    got = render(sparsify(pipe, Schedule(method, remainder="value")))
    want = render(sparsify(pipe, Schedule(method, remainder="value"), backend="reference"))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert (got - without).abs().max() > 1e-3 * want.abs().max()


def test_a_backend_without_the_remainder_is_refused_before_the_run(pipe) -> None:
    with pytest.raises(ValueError, match="backend 'flex' cannot be used: it has no remainder 'mean'; use 'reference'"):
        sparsify(pipe, Schedule(AdaSpa(), remainder="mean"), backend="flex")
    assert session_of(pipe) is None
    assert session_of(sparsify(pipe, Schedule(AdaSpa(), remainder="none"), backend="flex")) is not None
    with pytest.raises(ValueError, match="backend 'flex' cannot be used: it has no remainder 'value'"):
        sparsify(pipe, Pisa(), backend="flex")
    assert session_of(sparsify(pipe, Schedule(Pisa(), remainder="none"), backend="flex")) is not None


def test_a_shared_order_is_taken_once_a_forward(pipe, render, monkeypatch) -> None:
    """Tokens stand in tile order through all blocks, no call moves them, and the pictures stay the same."""
    method, calls = Neighborhood(window=(1, 5, 7), tile=(1, 4, 4)), []
    attend = sparse_attention

    def spy(*tensors, in_order: bool, **options) -> Tensor:
        calls.append(in_order)
        return attend(*tensors, in_order=in_order, **options)

    monkeypatch.setattr("dit_sparse.attention.sparse_attention", spy)
    got = render(sparsify(pipe, Schedule(method, dense_layers=(0,))))
    assert calls
    assert all(calls)
    monkeypatch.setattr(WanAdapter, "takes_order", lambda *_: False)
    calls.clear()
    want = render(sparsify(pipe, Schedule(method, dense_layers=(0,))))
    assert calls
    assert not any(calls)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_tokens_stay_where_they_are_outside_of_a_run_and_after_it(pipe, render) -> None:
    sparsify(pipe, Neighborhood(window=(1, 5, 7), tile=(1, 4, 4)))
    render(pipe)
    modules = pipe.transformer.patch_embedding, pipe.transformer.rope, pipe.transformer.proj_out
    assert not any(module._forward_hooks for module in modules)
    unsparsify(pipe)
    latents, text = torch.randn(1, 8, 3, 8, 12), torch.randn(1, 4, 32)
    want = pipe.transformer(latents, torch.tensor([500]), text)[0]
    sparsify(pipe, Neighborhood(window=(1, 5, 7), tile=(1, 4, 4)), strict=False)
    assert torch.equal(pipe.transformer(latents, torch.tensor([500]), text)[0], want)


def test_a_forward_that_fails_leaves_no_hook_behind(pipe, render, monkeypatch) -> None:
    def fail(*_) -> Tensor:
        raise RuntimeError("out of memory")

    def fail_once() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "attend", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                render(pipe)

    want = render(sparsify(pipe, Neighborhood(window=(1, 5, 7), tile=(1, 4, 4))))
    fail_once()
    assert torch.equal(render(pipe), want)
    fail_once()
    assert pipe.transformer.proj_out._forward_hooks
    unsparsify(pipe)
    assert not pipe.transformer.proj_out._forward_hooks


def test_a_timestep_a_token_leaves_the_order_alone(pipe) -> None:
    """Wan 2.2 TI2V: the modulation depends on the token's place as well."""
    adapter = WanAdapter()
    assert adapter.takes_order(pipe.transformer, {"timestep": torch.zeros(1)})
    assert not adapter.takes_order(pipe.transformer, {"timestep": torch.zeros(1, 288)})


def test_a_plan_of_another_order_than_the_tokens_is_refused(pipe, render, monkeypatch) -> None:
    other = Neighborhood(window=(1, 5, 7), tile=(1, 2, 2))
    monkeypatch.setattr(Neighborhood, "shared_order", lambda self, grid, device: tile_order(grid, (1, 2, 2)))
    with pytest.raises(ValueError, match="must use its shared_order"):
        render(sparsify(pipe, other))


def test_hooked_norms_are_called_as_modules(pipe) -> None:
    attn = pipe.transformer.blocks[0].attn1
    hidden, rotary = torch.randn(1, 288, attn.inner_dim), pipe.transformer.rope(torch.empty(1, 8, 3, 8, 12))
    want = attn(hidden, None, None, rotary)
    attn.processor = SparseWanAttnProcessor(Session(Schedule(AdaSpa(), strict=False)), 0, 1, attn.processor)
    seen = []
    attn.norm_q.register_forward_hook(lambda *_: seen.append("q"))
    assert torch.equal(attn(hidden, None, None, rotary), want)
    assert seen == ["q"]


def test_plans_at_rest_change_nothing(pipe, render, monkeypatch) -> None:
    want = render(sparsify(pipe, AdaSpa(density=0.5, block=16)))
    density = statistics(pipe).density
    monkeypatch.setattr(session_module, "_at_rest", lambda plan: plan.pack())
    assert torch.equal(render(sparsify(pipe, AdaSpa(density=0.5, block=16))), want)
    assert statistics(pipe).density == density
    assert all(isinstance(previous.plan, PackedPlan) for previous in session_of(pipe).previous.values())


@pytest.mark.parametrize(
    ("schedule", "read"),
    [
        (Schedule(Paro(density=0.5, block=16), warmup=0.4), [2]),
        (Schedule(AdaSpa(density=0.5, block=16), warmup=0.4, refresh=(0.6,)), [2, 3]),
    ],
    ids=["paro", "adaspa"],
)
def test_row_sums_are_kept_until_the_last_plan_that_reads_them(pipe, render, monkeypatch, schedule, read) -> None:
    found, method = [], type(schedule.method)
    plan = method.plan

    def spy(self, q, k, v, site, previous):
        assert previous.lse is not None
        found.append(site.step)
        return plan(self, q, k, v, site, previous)

    monkeypatch.setattr(method, "plan", spy)
    render(sparsify(pipe, schedule))
    assert sorted(set(found)) == read
    assert statistics(pipe).dense_calls == {"warm-up": 8}
    held = session_of(pipe).previous.values()
    assert len(held) == 4
    assert all(previous.plan is not None and previous.lse is None for previous in held)


def test_unsparsify_is_bit_identical(pipe, render) -> None:
    want = render(pipe)
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    sparse = render(sparsify(pipe, AdaSpa(density=0.3, block=16)))
    assert not torch.equal(sparse, want)
    unsparsify(pipe)
    assert torch.equal(render(pipe), want)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    assert session_of(pipe) is None
    assert "step" not in vars(pipe.scheduler)
    assert unsparsify(pipe) is pipe


def test_cross_attention_is_left_alone(pipe) -> None:
    before = [block.attn2.processor for block in pipe.transformer.blocks]
    sparsify(pipe, AdaSpa())
    assert [block.attn2.processor for block in pipe.transformer.blocks] == before


def test_branches_have_plans_of_their_own(pipe, render) -> None:
    render(sparsify(pipe, AdaSpa(density=0.5, block=16)))
    keys = session_of(pipe).previous.keys()
    assert {key[3] for key in keys} == {"cond", "uncond"}
    assert len(keys) == 2 * len(pipe.transformer.blocks)


def test_forwards_without_a_name_are_told_apart_by_their_number(pipe) -> None:
    """Pipelines without a cache context: the n-th forward of every step, the first one too, is one branch."""
    sparsify(pipe, AdaSpa())
    session = session_of(pipe)
    for _ in range(2):
        pipe.scheduler.set_timesteps(3)
        for step in range(3):
            session.steps.step = step
            names = []
            for _ in range(2):
                session.begin_forward(Layout(TokenGrid(3, 8, 12)), "transformer", None)
                names.append(session._forward.branch)
            assert names == ["forward 0", "forward 1"]


def test_without_guidance_there_is_one_branch(pipe, render) -> None:
    render(sparsify(pipe, AdaSpa(density=0.5, block=16)), guidance_scale=1.0)
    assert {key[3] for key in session_of(pipe).previous} == {"cond"}


def test_statistics_count_every_call(pipe, render) -> None:
    render(sparsify(pipe, Schedule(AdaSpa(density=0.5, block=16), warmup=0.2, dense_layers=(1,))), steps=10)
    found = statistics(pipe)
    layers = len(pipe.transformer.blocks)
    assert found.calls == 10 * 2 * layers
    assert found.dense_calls == {"warm-up": 2 * 2 * (layers - 1), "layer": 10 * 2}
    assert found.sparse_density == pytest.approx(0.5, abs=0.05)
    dense = sum(found.dense_calls.values())
    assert found.density == pytest.approx((dense + (found.calls - dense) * found.sparse_density) / found.calls)
    assert found.attention_seconds > 0
    assert found.plan_seconds > 0
    per_layer = found.to_dict()["layers"]
    assert [entry["layer"] for entry in per_layer] == list(range(layers))
    assert per_layer[1]["head_density"] is None
    assert len(per_layer[0]["head_density"]) == pipe.transformer.config.num_attention_heads


def test_a_new_run_starts_afresh(pipe, render) -> None:
    sparsify(pipe, AdaSpa(density=0.5, block=16))
    first = render(pipe)
    calls = statistics(pipe).calls
    assert torch.equal(render(pipe), first)
    assert statistics(pipe).calls == calls


def test_an_exception_inside_a_step_leaves_the_next_run_right(pipe, render) -> None:
    sparsify(pipe, AdaSpa(density=0.5, block=16))
    want = render(pipe)

    def fails(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render(pipe, callback_on_step_end=fails)
    assert torch.equal(render(pipe), want)


def test_two_pipelines_in_turn_do_not_interfere(pipe, render) -> None:
    from tests.pipelines.tiny import tiny_wan

    other = tiny_wan(fine=True, seed=1)
    want, other_want = render(sparsify(pipe, AdaSpa(density=0.5, block=16))), render(other)
    sparsify(other, Neighborhood(window=(1, 5, 7), tile=(1, 4, 4)))
    got = []

    def renders_the_other(inner, step, timestep, tensors):
        if step == 2:
            got.append(render(other))
        return tensors

    assert torch.equal(render(pipe, callback_on_step_end=renders_the_other), want)
    assert not torch.equal(got[0], other_want)
    assert torch.equal(render(unsparsify(other)), other_want)


def test_a_grid_that_is_no_multiple_of_the_block(pipe, render) -> None:
    sparsify(pipe, AdaSpa(density=0.4, block=64))
    out = render(pipe, height=48, width=48, num_frames=5)
    assert torch.isfinite(out).all()
    assert statistics(pipe).sparse_density < 0.7


def test_a_transformer_called_outside_a_run_is_dense(pipe) -> None:
    latents, text = torch.randn(1, 8, 2, 4, 6), torch.randn(1, 5, 32)
    arguments = {"timestep": torch.tensor([500]), "encoder_hidden_states": text, "return_dict": False}
    want = pipe.transformer(latents, **arguments)[0]
    sparsify(pipe, AdaSpa(), strict=False)
    assert torch.equal(pipe.transformer(latents, **arguments)[0], want)
    assert statistics(pipe).dense_calls == {"outside a run": len(pipe.transformer.blocks)}


def test_two_transformers_share_one_step_counter(render) -> None:
    """Wan 2.2: the second transformer takes over at a boundary."""
    from diffusers import WanPipeline

    from tests.pipelines.tiny import tiny_wan

    first, second = tiny_wan(fine=True, seed=0), tiny_wan(fine=True, seed=1)
    pipe = WanPipeline(
        **{**first.components, "transformer": first.transformer, "transformer_2": second.transformer},
        boundary_ratio=0.7,
    )
    pipe.set_progress_bar_config(disable=True)
    sparsify(pipe, Schedule(AdaSpa(density=0.5, block=16), warmup=0.2))
    render(pipe, steps=6)
    records = statistics(pipe).records
    assert {record.model for record in records} == {"transformer", "transformer_2"}
    assert sorted({record.step for record in records}) == list(range(6))
    firsts = [min(r.step for r in records if r.model == m) for m in ("transformer", "transformer_2")]
    assert firsts[0] == 0
    assert 0 < firsts[1] < 6
    pipe.transformer_2 = tiny_wan(fine=True, seed=1).transformer
    with pytest.raises(NotSparseError, match="transformer_2 was replaced in a sparse pipeline"):
        render(pipe, steps=6)
    assert {record.model for record in statistics(pipe).records} == {"transformer"}


def test_a_refused_second_transformer_leaves_the_first_dense() -> None:
    from diffusers import WanPipeline

    from tests.pipelines.tiny import tiny_wan

    first, second = tiny_wan(fine=True), tiny_wan(fine=True, seed=1)
    second.transformer.blocks[0].attn1.processor = type("Mine", (WanAttnProcessor,), {})()
    pipe = WanPipeline(**{**first.components, "transformer_2": second.transformer}, boundary_ratio=0.7)
    with pytest.raises(ValueError, match=r"transformer_2\.blocks\.0\.attn1"):
        sparsify(pipe, AdaSpa())
    assert session_of(pipe) is None
    assert all(type(block.attn1.processor) is WanAttnProcessor for block in pipe.transformer.blocks)


def test_foreign_processors_are_refused(pipe) -> None:
    block = pipe.transformer.blocks[1]
    block.attn1.processor = type("Mine", (WanAttnProcessor,), {})()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1\.processor must be diffusers' WanAttnProcessor, got Mine"):
        sparsify(pipe, AdaSpa())
    assert type(pipe.transformer.blocks[0].attn1.processor) is WanAttnProcessor


@pytest.mark.parametrize(
    ("height", "width", "frames", "message"),
    [
        (36, 48, 9, "height must be a multiple of 16, got 36; try 32"),
        (32, 50, 9, "width must be a multiple of 16, got 50; try 48"),
        (32, 48, 10, "frames must be 1 more than a multiple of 4, got 10; try 9"),
        (0, 48, 9, "height must be a multiple of 16, got 0; try 16"),
        (32, 48, 0, "frames must be 1 more than a multiple of 4, got 0; try 1"),
    ],
)
def test_sizes_that_do_not_fit(pipe, height: int, width: int, frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_grid(pipe, height, width, frames)


def test_a_dense_layer_that_is_not_there_is_refused(pipe, render) -> None:
    with pytest.raises(ValueError, match="dense_layers must be from -2 to 1, got 2"):
        sparsify(pipe, Schedule(AdaSpa(), dense_layers=(0, 2)))
    assert session_of(pipe) is None
    with pytest.raises(ValueError, match="window"):
        check(pipe, Neighborhood(window=9), 32, 48, 9)


def test_token_grid_is_what_the_run_sees(pipe, render) -> None:
    assert token_grid(pipe, 32, 48, 9) == TokenGrid(3, 8, 12)
    render(sparsify(pipe, AdaSpa(block=16)))
    assert {key[0] for key in session_of(pipe).previous} == {TokenGrid(3, 8, 12)}


def test_a_chosen_attention_backend_is_kept_in_dense_steps(pipe) -> None:
    """Only where nobody chose one may dense steps take the fastest kernel."""
    sparsify(pipe, AdaSpa())
    processor = pipe.transformer.blocks[0].attn1.processor
    assert uses_default_backend(processor)
    with attention_backend("_native_math"):
        assert not uses_default_backend(processor)
    processor._attention_backend = "_native_math"
    assert not uses_default_backend(processor)
