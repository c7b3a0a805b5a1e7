"""A calibration found in one run serves the next ones from a file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_sparse import AdaSpa, Paro, Schedule, save_plan, sparsify, statistics
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.pipelines import check, session_of
from dit_sparse.pipelines import session as session_module

PARO = Paro(density=0.5, block=16)


@pytest.mark.parametrize("tile", [None, (1, 2, 8)], ids=["runs", "tiles"])
def test_a_saved_plan_is_the_conditional_branchs(pipe, render, tmp_path, tile) -> None:
    render(sparsify(pipe, replace(PARO, tile=tile)))
    found = {key[2]: previous.plan for key, previous in session_of(pipe).previous.items() if key[3] == "cond"}
    save_plan(pipe, tmp_path / "plan.safetensors", model="tiny", prompts=["a red ball"])
    header = PlanFile.open(tmp_path / "plan.safetensors").header
    assert (header.model, header.prompts, header.steps, header.metrics) == ("tiny", ("a red ball",), 5, {})
    render(sparsify(pipe, Paro(plan_file=str(tmp_path / "plan.safetensors"))))
    used = session_of(pipe).previous
    assert len(used) == 2  # the branches share a layer's plan
    for key, previous in used.items():
        assert torch.equal(previous.plan.token_mask(), found[key[2]].token_mask())
    assert statistics(pipe).sparse_density == pytest.approx(0.5, abs=0.05)
    render(sparsify(pipe, Schedule(Paro(plan_file=str(tmp_path / "plan.safetensors")), warmup=0)))
    assert statistics(pipe).dense_calls == {}


def test_a_plan_at_rest_is_saved_as_well(pipe, render, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(session_module, "_at_rest", lambda plan: plan.pack())
    render(sparsify(pipe, PARO))
    save_plan(pipe, tmp_path / "plan.safetensors")
    render(sparsify(pipe, Schedule(Paro(plan_file=str(tmp_path / "plan.safetensors")), warmup=0)))
    assert statistics(pipe).sparse_density == pytest.approx(0.5, abs=0.05)


def test_a_plan_for_another_size_is_refused_before_the_run(pipe, render, tmp_path) -> None:
    render(sparsify(pipe, PARO))
    save_plan(pipe, tmp_path / "plan.safetensors")
    method = Paro(plan_file=str(tmp_path / "plan.safetensors"))
    check(pipe, method, 32, 48, 9)
    with pytest.raises(ValueError, match="is for the grid 3x8x12, got 3x8x16"):
        check(pipe, method, 32, 64, 9)


def test_only_a_paro_run_has_a_plan_to_save(pipe, render, tmp_path) -> None:
    with pytest.raises(ValueError, match="must be sparsified"):
        save_plan(pipe, tmp_path / "plan")
    with pytest.raises(ValueError, match="with Paro to save a plan, got 'adaspa'"):
        save_plan(sparsify(pipe, AdaSpa()), tmp_path / "plan")
    with pytest.raises(ValueError, match="must have run"):
        save_plan(sparsify(pipe, PARO), tmp_path / "plan")
    render(sparsify(pipe, Schedule(PARO, dense_layers=(0,))))
    with pytest.raises(ValueError, match=r"needs every layer, got \{'transformer': \[1\]\}"):
        save_plan(pipe, tmp_path / "plan")
    assert not list(tmp_path.iterdir())


def test_a_file_cannot_be_saved_from_a_file(pipe, render, tmp_path) -> None:
    render(sparsify(pipe, PARO))
    save_plan(pipe, tmp_path / "plan")
    render(sparsify(pipe, Paro(plan_file=str(tmp_path / "plan"))))
    with pytest.raises(ValueError, match="plan_file must be None to save a plan"):
        save_plan(pipe, tmp_path / "again")
