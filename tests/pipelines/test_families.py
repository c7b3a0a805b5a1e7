"""Every family: dense equals upstream, sparse equals dense under the plan's mask, and all goes back to what it was."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit_sparse import (
    AdaSpa,
    Dense,
    Neighborhood,
    Paro,
    Schedule,
    SeerAttention,
    Site,
    save_plan,
    sparsify,
    statistics,
    unsparsify,
)
from dit_sparse.attention import sparse_attention
from dit_sparse.kernels.skip import without_skipped
from dit_sparse.methods import METHODS as REGISTERED
from dit_sparse.methods.gate_file import Gate, write_gates
from dit_sparse.pipelines import observe, session_of, token_grid
from dit_sparse.pipelines.families import FAMILIES as ADAPTERS
from dit_sparse.pipelines.families import adapter_for
from tests.pipelines.families import FAMILIES, KINDS, METHODS, Family

pytestmark = pytest.mark.guard


@pytest.fixture
def pipe(family: Family) -> Any:
    return family.make()


def forward_of(pipe: Any, family: Family, **options: Any) -> dict[str, Any]:
    """The arguments of a transformer forward inside a run of `pipe`."""
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    family.run(pipe, steps=2, **options)
    handle.remove()
    return {**calls[0], "return_dict": False}


@pytest.mark.parametrize("processors", [a.processors for a in ADAPTERS.values()], ids=ADAPTERS)
def test_the_processors_signatures_are_upstreams(processors) -> None:
    """diffusers passes its arguments by position, or drops those whose names it does not find."""
    for upstream, ours in processors.items():
        names = [list(inspect.signature(cls.__call__).parameters) for cls in (ours, upstream)]
        assert names[0] == names[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_dense_calls_equal_upstreams_bit_for_bit(pipe, family, dtype: torch.dtype, fused: bool) -> None:
    arguments = forward_of(pipe, family)
    transformer = pipe.transformer.to(dtype)
    if fused:
        transformer.fuse_qkv_projections()
    cast = {name: x.to(dtype) if _is_data(name, x) else x for name, x in arguments.items()}
    with torch.no_grad():
        want = transformer(**cast)[0]
        sparsify(pipe, AdaSpa(), strict=False)
        got = transformer(**cast)[0]
    assert torch.equal(got, want)
    assert statistics(pipe).dense_calls == {"outside a run": statistics(pipe).calls}
    assert statistics(pipe).calls == adapter_for(pipe).num_layers(transformer)


def _is_data(name: str, x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and name not in ("timestep", "img_ids", "txt_ids")


def test_every_registered_method_is_tested_here() -> None:
    assert {method.name for method in METHODS} == set(REGISTERED) - {"dense", "seer"}


def test_gates_serve_every_family(pipe, family, tmp_path) -> None:
    """SeerAttention needs weights of the model's own shape."""
    shapes: dict[tuple[str, int], Gate] = {}
    generator = torch.Generator().manual_seed(0)

    def shape_gates(site: Site, q: Tensor, *_: Tensor) -> None:
        sizes = [(q.shape[1], n * q.shape[-1], 8) for n in (1, 3)]
        shapes[site.model, site.layer] = Gate(*(torch.randn(size, generator=generator) for size in sizes))

    with observe(pipe, shape_gates):
        dense = family.run(pipe)
    with pytest.raises(ValueError, match="weights must be a file of gates"):
        family.run(sparsify(pipe, SeerAttention()))
    write_gates(tmp_path / "gates.safetensors", shapes, 16)
    method = SeerAttention(str(tmp_path / "gates.safetensors"), density=0.5)
    got = family.run(sparsify(pipe, method))
    assert 0.3 < statistics(pipe).sparse_density < 0.7
    assert torch.isfinite(got).all()
    assert (got - dense).abs().max() > 1e-3 * dense.abs().max()


def test_dense_runs_equal_upstreams_bit_for_bit(pipe, family) -> None:
    want = family.run(pipe)
    assert torch.equal(family.run(sparsify(pipe, Schedule(AdaSpa(), dense_layers=(0, 1)))), want)
    assert set(statistics(pipe).dense_calls) == {"layer"}


@pytest.mark.parametrize(
    "method", [Dense(), AdaSpa(density=1, block=16), Paro(density=1, block=16), Neighborhood(density=1)], ids=str
)
def test_density_one_is_dense_up_to_rounding(pipe, family, method) -> None:
    """Padded prompts too: upstream masks them, here they are left out."""
    want = family.run(pipe, **family.guided)
    got = family.run(sparsify(pipe, Schedule(method, warmup=0)), **family.guided)
    assert statistics(pipe).density == 1
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


ONE_OF_A_LAYOUT = [family for family in FAMILIES if family.name in ("wan", "cogvideox", "hunyuan_video")]
"""No text among the tokens, text before the video, and text of unlike lengths after it."""


@pytest.mark.parametrize(
    ("family", "method", "batch"),
    [
        *((family, method, 2) for family in FAMILIES for method in KINDS),
        *((family, method, 1) for family in ONE_OF_A_LAYOUT for method in METHODS if method not in KINDS),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_sparse_equals_dense_attention_under_the_plans_own_mask(pipe, family, method, batch, monkeypatch) -> None:
    """The same run with every sparse call replaced by float64 attention under the plan's token mask."""
    method = Schedule(method, remainder="none")
    prompts = ["a red ball", "a blue square moving left"][:batch]
    got = family.run(sparsify(pipe, method), prompts, **family.guided)
    assert 0.3 < statistics(pipe).sparse_density < (0.95 if method.skips else 0.7)
    assert set(statistics(pipe).dense_calls) <= {"warm-up"}
    dense = family.dense(prompts, **family.guided)

    def oracle(q: Tensor, k: Tensor, v: Tensor, plan, *, in_order: bool, **_) -> Tensor:
        plan = without_skipped(q.double(), k.double(), plan, q.shape[-1] ** -0.5)[0]
        orders = plan.q_order.index, plan.kv_order.index
        mask = plan.block_mask.to_bool(*orders) if in_order else plan.token_mask()
        return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask).to(q.dtype)

    def counting(q: Tensor, k: Tensor, v: Tensor, plan, **options) -> tuple[Tensor, Tensor]:
        assert plan.q_order.is_identity, "what is skipped is found in the plan's order"
        return oracle(q, k, v, plan, **options), torch.zeros(*q.shape[:2], 1)

    monkeypatch.setattr("dit_sparse.attention.sparse_attention", oracle)
    monkeypatch.setattr("dit_sparse.attention.skipping_attention", counting)
    # The oracle counts no pair as skipped, which makes a plan of every block a dense one.
    want = family.run(sparsify(pipe, method, strict=False), prompts, **family.guided)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert (got - dense).abs().max() > 1e-3 * want.abs().max(), "sparsity changed nothing"


def test_a_shared_order_taken_once_a_forward_changes_nothing(pipe, family, monkeypatch) -> None:
    """Tokens stand in tile order through all blocks; the pictures are those of moving them at every call."""
    method, in_order = Schedule(METHODS[0], dense_layers=(0,)), []
    attend = sparse_attention

    def spy(*tensors, **options) -> Tensor:
        in_order.append(options["in_order"])
        return attend(*tensors, **options)

    monkeypatch.setattr("dit_sparse.attention.sparse_attention", spy)
    got = family.run(sparsify(pipe, method))
    assert in_order
    assert all(in_order)
    in_order.clear()
    monkeypatch.setattr(type(adapter_for(pipe)), "takes_order", lambda *_: False)
    want = family.run(sparsify(pipe, method))
    assert not any(in_order)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_unsparsify_is_bit_identical(pipe, family) -> None:
    want = family.run(pipe)
    processors = dict(pipe.transformer.attn_processors)
    for method in KINDS:
        assert not torch.equal(family.run(sparsify(pipe, method)), want)
    unsparsify(pipe)
    assert torch.equal(family.run(pipe), want)
    assert pipe.transformer.attn_processors == processors
    assert session_of(pipe) is None


def test_branches_never_share_a_plan(pipe, family) -> None:
    family.run(sparsify(pipe, AdaSpa(density=0.5, block=16)), "a big red square moving left", **family.guided)
    previous = session_of(pipe).previous
    layers = adapter_for(pipe).num_layers(pipe.transformer)
    assert {key[3] for key in previous} == family.branches
    assert len(previous) == layers * len(family.branches)
    if family.branches == {"cond_uncond"}:
        halves = [found.plan.block_mask.kept_blocks.unbind(0) for found in previous.values()]
        assert any(not torch.equal(cond, uncond) for cond, uncond in halves)


def test_the_run_sees_the_grid_that_token_grid_tells(pipe, family) -> None:
    family.run(sparsify(pipe, AdaSpa(density=0.5, block=16)))
    assert {key[0] for key in session_of(pipe).previous} == {family.grid}
    arguments = family.arguments
    told = token_grid(pipe, arguments["height"], arguments["width"], arguments.get("num_frames", 1))
    assert (told.shape, told.text_first) == (family.grid.shape, family.grid.text_first)
    assert told.text_len >= family.grid.text_len


def test_a_saved_plan_serves_another_prompt(pipe, family, tmp_path) -> None:
    """Of another length, where prompts are padded."""
    family.run(sparsify(pipe, Paro(density=0.5, block=16)))
    density = statistics(pipe).sparse_density
    save_plan(pipe, tmp_path / "plan.safetensors")
    method = Paro(plan_file=str(tmp_path / "plan.safetensors"))
    family.run(sparsify(pipe, Schedule(method, warmup=0)), "a big red square moving right")
    assert statistics(pipe).dense_calls == {}
    assert statistics(pipe).sparse_density == pytest.approx(density, abs=0.02)


class Bare:
    """What `sparsify` needs of a pipeline."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize("positional", [False, True])
def test_a_loop_of_ones_own_runs_sparse(pipe, family, positional: bool) -> None:
    """A bare object with a transformer and a scheduler, the transformer called by hand."""
    arguments = forward_of(pipe, family)
    bare = sparsify(Bare(pipe.transformer), Schedule(METHODS[0], warmup=0.5))
    bare.scheduler.set_timesteps(4)
    names = list(inspect.signature(type(bare.transformer).forward).parameters)[1:]
    first = [arguments.pop(name) for name in names[:2] if name in arguments] if positional else []
    for timestep in bare.scheduler.timesteps:
        with torch.no_grad(), bare.transformer.cache_context("cond"):
            out = bare.transformer(*first, **arguments)[0]
        assert torch.isfinite(out).all()
        bare.scheduler.step(out, timestep, torch.zeros_like(out))
    layers = adapter_for(bare).num_layers(bare.transformer)
    assert statistics(bare).calls == 4 * layers
    assert statistics(bare).dense_calls == {"warm-up": 2 * layers}


def test_a_replaced_processor_is_noticed_before_the_run(pipe, family) -> None:
    sparsify(pipe, AdaSpa())
    module = list(adapter_for(pipe).attention_modules(pipe.transformer).values())[-1]
    upstream = next(iter(adapter_for(pipe).processors))
    module.processor = upstream()
    with pytest.raises(ValueError, match=f"was replaced after sparsify, got {upstream.__name__}; unsparsify"):
        family.run(pipe)
