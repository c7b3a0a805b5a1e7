"""Steps are counted from any diffusers scheduler, also one that is replaced."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
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
            x = scheduler.step(x, t, x)[0]
        assert not counter.inside_run
    counter.release()
    assert "step" not in vars(scheduler)
    assert "set_timesteps" not in vars(scheduler)


def test_two_counters_of_one_scheduler() -> None:
    """Two pipelines may share a scheduler, and one of them may be unsparsified."""
    scheduler, first, second = FlowMatchEulerDiscreteScheduler(), StepCounter(), StepCounter()
    first.watch(scheduler)
    second.watch(scheduler)
    scheduler.set_timesteps(3)
    first.release()
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    assert (first.step, second.step) == (0, 1)
    second.release()
    assert not vars(scheduler).keys() & {"step", "set_timesteps"}


def test_somebody_elses_wrapper_stays() -> None:
    scheduler, counter = FlowMatchEulerDiscreteScheduler(), StepCounter()
    counter.watch(scheduler)
    telling, calls = scheduler.step, []
    scheduler.step = lambda *args, **kwargs: (calls.append(1), telling(*args, **kwargs))[1]
    counter.release()
    scheduler.set_timesteps(3)
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    assert calls == [1]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_of_a_scheduler_is_one_of_its_own(twin_of) -> None:
    scheduler, counter = FlowMatchEulerDiscreteScheduler(), StepCounter()
    counter.watch(scheduler)
    scheduler.set_timesteps(4)
    twin = twin_of(scheduler)
    twin.step(torch.zeros(1), twin.timesteps[0], torch.zeros(1))
    assert (counter.step, scheduler.step_index, twin.step_index) == (0, None, 1)
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    assert (counter.step, twin.step_index) == (1, 1)


def test_sigma_is_the_schedulers() -> None:
    scheduler, counter = FlowMatchEulerDiscreteScheduler(), StepCounter()
    counter.watch(scheduler)
    scheduler.set_timesteps(4)
    assert counter.sigma == pytest.approx(float(scheduler.sigmas[0]))
    counter.step = 3
    assert counter.sigma == pytest.approx(float(scheduler.sigmas[3]))


@pytest.mark.parametrize(
    "scheduler",
    [CogVideoXDDIMScheduler(), DDIMScheduler(), EulerDiscreteScheduler(), UniPCMultistepScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_sigma_is_the_share_of_noise_whatever_the_mixture(scheduler) -> None:
    """`add_noise` says what a scheduler mixes: the ratio of noise to signal is that of sigma to 1 - sigma."""
    counter = StepCounter()
    counter.watch(scheduler)
    scheduler.set_timesteps(5)
    one, none = torch.ones(1), torch.zeros(1)
    for step in range(5):
        counter.step = step
        timestep = scheduler.timesteps[step : step + 1]
        noise, signal = (float(scheduler.add_noise(*mixed, timestep)) for mixed in ((none, one), (one, none)))
        assert counter.sigma == pytest.approx(noise / (noise + signal), rel=1e-3)


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
