"""Sol-Attn with its blocks found in the kernel, in a run: the same blocks and the same video as planned first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse import Schedule, SkipSoftmax, SolAttention, sparsify, statistics
from dit_sparse.kernels import triton_routing
from dit_sparse.pipelines import check, session_of

PLANNED = Schedule(SolAttention(tau=0.5, block=32), warmup=0.4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTED = replace(PLANNED, method=SolAttention(tau=0.5, block=32, in_kernel=True))


def test_a_run_is_that_of_plans_made_first(pipe, render) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    pipe.to(DEVICE)
    dense = render(pipe, steps=4, guidance_scale=1.0)
    found, videos, runs = [], [], []
    for schedule, backend in ((PLANNED, "reference"), (ROUTED, "auto")):
        plans: list[tuple[int, int, Tensor]] = []
        session_of(sparsify(pipe, schedule, backend=backend)).on_plan = lambda site, plan, plans=plans: plans.append(
            (site.step, site.layer, plan.block_mask.kept_blocks)
        )
        videos.append(render(pipe, steps=4, guidance_scale=1.0))
        found.append(plans)
        runs.append(statistics(pipe))
    assert len(found[0]) == len(found[1]) > 0
    for first, second in zip(*found, strict=True):
        assert first[:2] == second[:2]
        assert torch.equal(first[2], second[2])
    assert (videos[1] - videos[0]).norm() < 1e-3 * (dense - videos[0]).norm()
    planned, routed = runs
    assert routed.sparse_density == planned.sparse_density
    assert routed.dense_calls == planned.dense_calls
    assert set(routed.backends) == {"triton", "dense"}


def test_plans_are_used_again_where_the_schedule_says_so(pipe, render) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    render(sparsify(pipe.to(DEVICE), replace(ROUTED, refresh=(0.4,))), guidance_scale=1.0)
    run = statistics(pipe)
    sparse = [record for record in run.records if record.density is not None]
    assert {record.step for record in sparse if record.planning is not None} == {2}
    assert {record.step for record in sparse} == {2, 3, 4}


@pytest.mark.parametrize(
    ("schedule", "backend", "message"),
    [
        (ROUTED, "gather", r"backend must be 'auto' or 'triton', got 'gather'; set in_kernel to False"),
        (replace(ROUTED, remainder="value"), "auto", r"remainder must be 'none' or 'mean', got 'value'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(pipe, schedule, backend, message) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(pipe, schedule, backend=backend)


def test_a_device_without_the_kernel_ends_the_run_at_its_first_step(pipe, render, monkeypatch) -> None:
    monkeypatch.setattr(triton_routing, "triton_unavailable", lambda device: "it runs on CUDA only")
    sparsify(pipe, ROUTED)
    with pytest.raises(ValueError, match="it runs on CUDA only; set in_kernel to False"):
        render(pipe)
    assert not statistics(pipe).records


def test_blocks_larger_than_a_tile_end_the_run_at_its_first_step(pipe, render) -> None:
    """Not after the warm-up."""
    pytest.importorskip("triton", reason="triton is not installed")
    sparsify(pipe.to(DEVICE), replace(ROUTED, method=replace(ROUTED.method, block=150)))
    with pytest.raises(ValueError, match=r"blocks must be at most \d+ tokens, one tile, got 150"):
        render(pipe)
    assert not statistics(pipe).records


def test_a_device_without_the_kernel_is_known_before_a_run(pipe, monkeypatch) -> None:
    check(pipe, PLANNED, 32, 48, 9)
    monkeypatch.setattr(triton_routing, "triton_unavailable", lambda device: f"not on {device}")
    check(pipe, PLANNED, 32, 48, 9)
    with pytest.raises(ValueError, match="not on cpu; set in_kernel to False"):
        check(pipe, ROUTED, 32, 48, 9)


def test_a_density_and_skipping_do_not_go_with_it() -> None:
    with pytest.raises(ValueError, match=r"density must be none with in_kernel, got 0.25"):
        SolAttention(density=0.25, in_kernel=True)
    with pytest.raises(ValueError, match="skip_factor must be 0 where blocks are routed in the kernel, got 5"):
        replace(ROUTED, remainder="none", skip_factor=5.0)
    assert not Schedule(SkipSoftmax()).routes
