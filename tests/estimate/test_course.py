"""What an estimate takes a run to do, step by step, against runs of tiny pipelines and plans as they lie in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_sparse import (
    AdaSpa,
    LeastError,
    LoSA,
    Paro,
    PbsAttention,
    Pisa,
    Schedule,
    Site,
    SparseVideoGen2,
    TokenGrid,
    sparsify,
    statistics,
)
from dit_sparse.estimate import ModelShape, Run, estimate, find_machine
from dit_sparse.kernels import block_sparse
from dit_sparse.pipelines import session_of
from dit_sparse.types import Method
from tests.pipelines.tiny import tiny_wan
from tests.pipelines.tiny_families import COGVIDEOX_TEXT, tiny_cogvideox

LEA = LeastError(density=0.3, tile=(1, 4, 4), rows=4)


def estimated(shape: ModelShape, schedule: Schedule, steps: int) -> Run:
    """Of 3x8x12 tokens, and text."""
    schedule = replace(schedule, never_slower=False)
    return Run(shape, 9, 8, 12, steps, schedule, find_machine("h200"))


WAN = ModelShape(2, 2, 12, 0, 0, 12, (4, 1, 1), cross=16, branches=2, batched=False)
COGVIDEOX = ModelShape(2, 2, 16, 0, 0, 12, (4, 1, 1), text=COGVIDEOX_TEXT, branches=2)


def planned(pipe, steps: int, **options) -> dict[int, int]:
    """How often each step of a run planned."""
    size = {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16}
    pipe("a red ball", num_inference_steps=steps, output_type="latent", **size, **options)
    found: dict[int, int] = {}
    for record in statistics(pipe).records:
        if record.planning is not None:
            found[record.step] = found.get(record.step, 0) + 1
    return found


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(LEA, warmup=0),
        Schedule(LEA, warmup=0.2, refresh=(4, 7)),
        Schedule(AdaSpa(density=0.5, block=16), warmup=0.2),
        Schedule(AdaSpa(density=0.5, block=16), warmup=0, ramp=(0.6, 0.5, 0.4)),
        Schedule(LEA, warmup=0, refresh=(5,)),
        Schedule(LEA, warmup=0, refresh=()),
        Schedule(LEA, warmup=0, ramp=(0.7, 0.4)),
    ],
    ids=["lea", "lea after dense steps", "adaspa", "adaspa without warm-up", "another search", "no refresh", "ramp"],
)
def test_steps_and_branches_that_plan_are_those_of_a_run(schedule: Schedule) -> None:
    run = estimated(WAN, schedule, 10)
    pipe = sparsify(tiny_wan(fine=True), schedule)
    found = planned(pipe, 10)
    assert found == {
        step: WAN.layers * run.planning_forwards for step, (kind, _) in enumerate(run.course) if kind == "search"
    }
    records = statistics(pipe).records
    dense = {record.step for record in records if record.density is None}
    assert dense == {step for step, (kind, _) in enumerate(run.course) if kind == "dense"}
    for step, (kind, density) in enumerate(run.course):
        if kind != "dense":
            own = [float(record.density.mean()) for record in records if record.step == step]
            assert own == pytest.approx([density] * len(own), abs=0.03)


def test_one_batch_of_both_branches_plans_once_a_layer() -> None:
    schedule = Schedule(LEA, warmup=0.2)
    found = planned(sparsify(tiny_cogvideox(), schedule), 10)
    course = estimated(COGVIDEOX, schedule, 10).course
    assert found == {step: COGVIDEOX.layers for step, (kind, _) in enumerate(course) if kind == "search"}


@pytest.mark.parametrize("method", [LEA, AdaSpa(density=0.5, block=16)], ids=["lea", "adaspa"])
def test_a_second_transformer_plans_for_itself(method) -> None:
    """At the middle of the run, in an estimate; where its scheduler says, in a run."""
    from diffusers import WanPipeline

    first, second = tiny_wan(fine=True, seed=0), tiny_wan(fine=True, seed=1)
    parts = {**first.components, "transformer_2": second.transformer}
    pipe = WanPipeline(**parts, boundary_ratio=0.7)
    pipe.set_progress_bar_config(disable=True)
    schedule = Schedule(method, warmup=0.2, refresh=())
    run = estimated(replace(WAN, transformers=2), schedule, 10)
    found = planned(sparsify(pipe, schedule), 10)
    kinds = [kind for kind, _ in run.course]
    assert len(found) == kinds.count("search") == 2
    assert set(found.values()) == {WAN.layers * run.planning_forwards}
    dense = {record.step for record in statistics(pipe).records if record.density is None}
    assert len(dense) == kinds.count("dense") == (3 if method.uses_lse else 2)
    # Both keep their plans to the end of the run.
    alone = estimate(replace(run, shape=WAN)).memory["plans"]
    assert estimate(run).memory["plans"] == 2 * alone > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_memory_of_plans_is_what_they_take(batch: int) -> None:
    grid, method = TokenGrid(8, 16, 32), LeastError(density=0.25)
    shape = ModelShape(1, 2, 16, 0, 0, 12, (2, 1, 1), branches=batch)
    memory = estimate(Run(shape, 15, 16, 32, 10, Schedule(method, never_slower=False), find_machine("h200"))).memory
    q, k, v = torch.randn(3, batch, 2, grid.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    site = Site(grid, num_steps=10, step=9, branches=batch)
    plan = method.plan(q, k, v, site, None)
    assert memory["plans"] == plan.pack().block_mask.full_bits.nbytes
    errors = method.errors(q, k, v, (plan.q_order, plan.kv_order), None)
    assert memory["search"] == 2 * errors.nbytes + plan.block_mask.kept_blocks.nbytes


@pytest.mark.parametrize("packed_from", [1, 1000])
@pytest.mark.parametrize(
    "method",
    [
        Paro(density=0.5, block=16),
        SparseVideoGen2(density=0.5, q_tokens=32, k_tokens=16),
        PbsAttention(density=0.5, block=16, segment=64),
    ],
    ids=lambda method: method.name,
)
def test_memory_of_plans_is_what_a_session_holds(method: Method, packed_from: int, monkeypatch) -> None:
    """Masks, and orders of heads, packed and not."""
    monkeypatch.setattr("dit_sparse.token_order.PACKED_FROM", packed_from)
    monkeypatch.setattr("dit_sparse.estimate.predict.PACKED_FROM", packed_from)
    monkeypatch.setattr("dit_sparse.pipelines.session._at_rest", lambda plan: plan.pack())
    schedule = Schedule(method, warmup=0.2)
    pipe = sparsify(tiny_wan(fine=True), schedule)
    planned(pipe, 5)
    held = 0.0
    for previous in session_of(pipe).previous.values():
        mask = previous.plan.unpack().block_mask
        held += mask.kept_blocks.numel() / 8  # bits; whole bytes a row
        orders = {previous.plan.packed_q_order, previous.plan.packed_kv_order}
        tensors = [x for order in orders for x in (order.index, getattr(order, "inverse", None))]
        tensors = [x for x in tensors if x is not None and x.shape[1] > 1]
        held += sum(x.nbytes for x in tensors)
        assert previous.lse is None
    assert estimate(estimated(WAN, schedule, 5)).memory["plans"] == held


def test_row_sums_alone_are_held_before_the_plan() -> None:
    """Of `losa`, which has no order of its own, and whose row sums are larger than its masks."""
    run = estimated(WAN, Schedule(LoSA(density=0.5, block=16), warmup=0.2), 5)
    assert estimate(run).memory["plans"] == 2 * 2 * 2 * 4 * 288
    again = replace(run, schedule=replace(run.schedule, refresh=(0.6,)))
    assert estimate(again).memory["plans"] == 2 * 2 * 2 * (4 * 288 + 18 * 18 / 8)


def test_a_remainders_matrices_fit_in_half_a_gibibyte() -> None:
    run = estimated(WAN, Schedule(Pisa(density=0.3, block=16), warmup=0), 4)
    # 18 blocks of queries and of keys, 2 heads, matrices of 12 x 12 in bfloat16.
    assert estimate(run).memory["remainder"] == 2 * 2 * 18 * 12 * 12 * 2
    large = replace(run, shape=replace(WAN, heads=1000, dim=128))
    assert estimate(large).memory["remainder"] == block_sparse._TERMS_BYTES == 2**29
    assert estimate(replace(run, schedule=replace(run.schedule, remainder="mean"))).memory["remainder"] == 0


def test_a_run_without_a_sparse_step() -> None:
    run = estimated(WAN, Schedule(LEA, warmup=0.9), 4)
    assert run.sparse_densities == ()
    assert run.share == 1
    assert estimate(run).memory["plans"] == 0


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("steps", 10**20), ("frames", 10**400), ("height", 10**6), ("width", -8)]
)
def test_sizes_beyond_reason_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be from 1 to"):
        replace(estimated(WAN, Schedule(LEA), 4), **{name: value})


def test_densities_by_step_and_layer_are_the_schedules() -> None:
    ramp = estimated(WAN, Schedule(AdaSpa(density=0.5), warmup=0.2, ramp=(0.5, 0.2)), 10)
    assert [density for _, density in ramp.course] == [1.0] * 2 + [0.5] * 4 + [0.2] * 4
    assert ramp.share == pytest.approx(0.35)
    layers = estimated(WAN, Schedule(AdaSpa(), warmup=0.2, layer_densities=(0.1, 0.3)), 10)
    assert layers.share == pytest.approx(0.2)
    lea = estimated(WAN, Schedule(LEA, warmup=0.2), 10)
    assert lea.share == pytest.approx(0.3 / 1.6)
    assert estimated(WAN, Schedule(LEA, warmup=0), 10).share == pytest.approx(0.3)
    noise = Schedule(AdaSpa(), noise_densities=(0.5, 0.1))
    with pytest.raises(ValueError, match="say with --density what to expect"):
        estimated(WAN, noise, 10)
    assert Run(WAN, 9, 8, 12, 10, noise, find_machine("h200"), density=0.3).share == pytest.approx(0.3)
