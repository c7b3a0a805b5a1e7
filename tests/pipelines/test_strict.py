"""A layer that was to be sparse never runs dense unseen: an error, or where that is allowed a count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_sparse import (
    AdaSpa,
    Dense,
    LeastError,
    Lvsa,
    Neighborhood,
    Schedule,
    SkipSoftmax,
    SolAttention,
    XAttention,
    sparsify,
    statistics,
)
from dit_sparse.pipelines import NotSparseError, session_of

HALF = AdaSpa(density=0.5, block=16)
FORWARD = (torch.zeros(1, 8, 2, 4, 6), torch.tensor([500]), torch.zeros(1, 5, 32))


def test_a_call_outside_a_run_is_an_error_that_says_what_to_do(pipe, render) -> None:
    want = render(sparsify(pipe, HALF))
    message = r"layer 0 would run dense: .* outside of a pipeline's run.*; call the pipeline .*strict=False"
    with pytest.raises(NotSparseError, match=message):
        pipe.transformer(*FORWARD)
    assert torch.equal(render(pipe), want), "the next run is right"


@pytest.mark.parametrize("schedule", [Schedule(HALF, dense_layers=(0, -1)), Dense()], ids=["dense layers", "dense"])
def test_what_is_dense_anyway_may_be_called_anywhere(pipe, schedule) -> None:
    sparsify(pipe, schedule)
    pipe.transformer(*FORWARD)


@pytest.mark.parametrize("block", [16, 512], ids=["every block kept", "one block"])
def test_a_plan_of_every_block_is_an_error_where_less_was_asked_for(pipe, render, monkeypatch, block) -> None:
    """Such as that of a video that is one block."""
    if block == 16:
        monkeypatch.setattr(AdaSpa, "plan", Dense.plan)
    method = AdaSpa(density=0.5, block=block)
    sparsify(pipe, method)
    message = r"layer 0 would run dense: 'adaspa' at density 0.5 keeps every block of 288 tokens; make the blocks"
    with pytest.raises(NotSparseError, match=message):
        render(pipe)
    assert {record.step for record in statistics(pipe).records} == {0}, "at the first such call"
    render(sparsify(pipe, method, strict=False))
    assert statistics(pipe).sparse_density in (None, 1)
    render(sparsify(pipe, AdaSpa(density=1.0, block=block)))


def test_a_density_that_varies_may_reach_one(pipe, render, monkeypatch) -> None:
    """A step that needs every block by the method's own word is no surprise."""
    method = Schedule(LeastError(density=0.7, tile=(1, 4, 4), rows=4), warmup=0)
    monkeypatch.setattr(LeastError, "density_at", lambda self, site: 1.0)
    render(sparsify(pipe, method))
    assert {record.reason for record in statistics(pipe).records} == {"every block kept"}
    steps = iter((1.0, 0.7))  # of the plan, and of the check that follows it
    monkeypatch.setattr(LeastError, "density_at", lambda self, site: next(steps))
    sparsify(pipe, replace(method, never_slower=False))
    with pytest.raises(NotSparseError, match=r"'lea' at density 0.7 keeps every block"):
        render(pipe)


@pytest.mark.parametrize("method", [AdaSpa(density=0.5, block=1000), XAttention(block=1000)], ids=lambda m: m.name)
def test_blocks_of_text_are_not_counted(family, method) -> None:
    """All of the video in one block is every block kept, whatever the text is cut into and whatever decides."""
    pipe = sparsify(family.make(), Schedule(method, warmup=0, never_slower=False))
    with pytest.raises(NotSparseError, match=rf"layer 0 would run dense: '{method.name}'.* keeps every block"):
        family.run(pipe, steps=2)
    assert not statistics(pipe).was_ever_sparse, "at the first such call"
    family.run(sparsify(pipe, Schedule(method, warmup=0, never_slower=False), strict=False), steps=2)
    run = statistics(pipe)
    assert run.dense_calls.keys() <= {"every block kept", "search"}
    assert sum(run.dense_calls.values()) == run.calls


ALL_KEPT = {
    "share": Lvsa(share=1.0, block=16),
    "threshold": SolAttention(tau=-99, block=16),
    "error": LeastError(error=1e-6, tile=(1, 4, 4), rows=4),
    "nothing skipped": SkipSoftmax(scale_factor=1e-9, block=16),
    "window": Neighborhood(window=(3, 8, 12), tile=(1, 4, 4)),
}


@pytest.mark.parametrize("method", ALL_KEPT.values(), ids=ALL_KEPT)
def test_a_run_that_kept_every_block_is_an_error_at_its_end(pipe, render, method) -> None:
    schedule = Schedule(method, dense_layers=(1,), never_slower=False)
    sparsify(pipe, schedule)
    with pytest.raises(NotSparseError, match=rf"layer 0 of transformer ran dense: '{method.name}' kept every block"):
        render(pipe)
    assert statistics(pipe).dense_calls == {"every block kept": 8, "warm-up": 2, "layer": 10}
    assert torch.equal(render(sparsify(pipe, schedule, strict=False)), render(sparsify(pipe, schedule, strict=False)))
    assert statistics(pipe).dense_calls == {"every block kept": 8, "warm-up": 2, "layer": 10}
    assert statistics(pipe).density == 1


def test_a_single_layer_that_kept_every_block_is_a_warning(pipe, render) -> None:
    schedule = Schedule(SolAttention(block=16), warmup=0, layer_thresholds=(-99.0, 1.0))
    sparsify(pipe, schedule)
    with pytest.warns(UserWarning, match="layer 0 of transformer ran dense: 'solattn' kept every block in each"):
        render(pipe)
    assert statistics(pipe).dense_calls["every block kept"] > 0
    assert statistics(pipe).sparse_density < 1


def test_a_call_that_kept_every_block_is_counted_and_no_error(pipe, render, monkeypatch) -> None:
    """What a threshold keeps depends on the data; the layer was sparse all the same."""
    plan, steps = SolAttention.plan, []

    def once_all(self, q, k, v, site, previous):
        steps.append(site.step)
        return plan(replace(self, tau=-99.0) if site.step == 1 else self, q, k, v, site, previous)

    monkeypatch.setattr(SolAttention, "plan", once_all)
    schedule = Schedule(SolAttention(tau=0.0, block=16), refresh=(2,), never_slower=False)
    render(sparsify(pipe, schedule))
    run = statistics(pipe)
    assert set(steps) == {1, 2}
    assert run.dense_calls == {"warm-up": 4, "every block kept": 4}
    assert run.sparse_density < 1
    assert run.receipts()["transformer"]["dense"]["every block kept"] == [2, 2]


def test_a_run_that_is_broken_off_is_counted_too(pipe, render) -> None:
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return tensors

    sparsify(pipe, Schedule(ALL_KEPT["share"], never_slower=False))
    render(pipe, callback_on_step_end=stop)
    assert statistics(pipe).dense_calls == {"warm-up": 4, "every block kept": 8}


def test_where_strictness_is_said(pipe) -> None:
    """In the schedule, in its config, or to sparsify, which comes last."""
    for schedule, given, want in (
        (HALF, None, True),
        (HALF, False, False),
        (Schedule(HALF, strict=False), None, False),
        (Schedule(HALF, strict=False), True, True),
        (Schedule.from_config({"method": "adaspa", "strict": False}), None, False),
    ):
        assert session_of(sparsify(pipe, schedule, strict=given)).schedule.strict is want


def test_receipts_account_for_every_call(pipe, render) -> None:
    render(sparsify(pipe, Schedule(HALF, dense_layers=(0,))))
    run = statistics(pipe)
    (model,) = run.receipts()
    found = run.receipts()[model]
    assert found["layer"] == [0, 1]
    assert found["calls"] == [10, 10]
    assert found["dense"] == {"layer": [10, 0], "warm-up": [0, 2]}
    assert found["density"][0] == 1
    # AdaSpa keeps whole blocks, 9 of 18 a row.
    assert found["density"][1] == pytest.approx((2 + 8 * 0.5) / 10, abs=1e-4)
