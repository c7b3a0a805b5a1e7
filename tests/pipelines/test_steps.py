"""Steps are counted from any diffusers scheduler, also one that is replaced."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dit_sparse import AdaSpa, sparsify, statistics, unsparsify
from dit_sparse.pipelines.steps import StepCounter


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DPMSolverMultistepScheduler(),
        CogVideoXDDIMScheduler(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_steps_of_a_scheduler(scheduler) -> None:
    counter = StepCounter()
    counter.watch(scheduler)
    counter.watch(scheduler)
    assert not counter.inside_run
    for run in (1, 2):
        scheduler.set_timesteps(6)
        x = torch.randn(1, 4, 2, 4, 4)
        for step, t in enumerate(scheduler.timesteps):
            assert (counter.run, counter.step, counter.num_steps) == (run, step, 6)
            extra = (
                {"old_pred_original_sample": None}
                if "old_pred_original_sample" in scheduler.step.__code__.co_varnames
                else {}
            )
            x = scheduler.step(x, t, x, **extra)[0]
        assert not counter.inside_run
    counter.release()
    assert "step" not in vars(scheduler)
    assert "set_timesteps" not in vars(scheduler)


def test_sigma_is_the_schedulers() -> None:
    scheduler, counter = FlowMatchEulerDiscreteScheduler(), StepCounter()
    counter.watch(scheduler)
    scheduler.set_timesteps(4)
    assert counter.sigma == pytest.approx(float(scheduler.sigmas[0]))
    counter.step = 3
    assert counter.sigma == pytest.approx(float(scheduler.sigmas[3]))


def test_a_replaced_scheduler_is_followed(pipe, render) -> None:
    sparsify(pipe, AdaSpa(density=0.5, block=16))
    render(pipe)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    render(pipe, steps=6)
    found = statistics(pipe)
    assert sorted({record.step for record in found.records}) == list(range(6))
    assert found.sparse_density < 1
    assert set(found.dense_calls) == {"warm-up"}
    replaced = pipe.scheduler
    unsparsify(pipe)
    assert "step" not in vars(replaced)
