"""Runs that leave the scheduler's first steps out, as image-to-image and video-to-video do with a strength below 1."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXVideoToVideoPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)
from PIL import Image
from torch import Tensor

from dit_sparse import Pisa, Schedule, Site, SparseCogVideoXPipeline, sparsify, statistics
from dit_sparse.pipelines import session_of
from dit_sparse.pipelines.steps import StepCounter
from tests.pipelines.families import FAMILIES
from tests.pipelines.tiny_families import tiny_cogvideox

PIPELINES = {"wan": WanVideoToVideoPipeline, "cogvideox": CogVideoXVideoToVideoPipeline, "flux": FluxImg2ImgPipeline}
METHOD = Pisa(block=16)  # a new plan at every step


def of_family(name: str, dense: Any = None) -> Any:
    """With the parts of a text-to-video pipeline."""
    parts = (dense or next(family for family in FAMILIES if family.name == name).make()).components
    names = inspect.signature(PIPELINES[name]).parameters
    return PIPELINES[name](**{part: parts[part] for part in names if part in parts})


def run(pipe: Any, strength: float, steps: int = 8, **options: Any) -> Tensor:
    images = [Image.new("RGB", (48, 32), (200, 30, 20 * n)) for n in range(9)]
    is_image = isinstance(pipe, FluxImg2ImgPipeline)
    options |= {"image": images[0]} if is_image else {"video": images}
    if isinstance(pipe, CogVideoXVideoToVideoPipeline):  # its tiny VAE encodes other sizes than it decodes
        options["video"] = None
        options["latents"] = torch.randn(1, 3, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        prompt="a red ball",
        height=32,
        width=48,
        strength=strength,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=16,
        output_type="latent",
        **options,
    )
    return out.images if is_image else out.frames


def sites_of(session: Any, call: Callable[[], Tensor]) -> list[Site]:
    """Where the first plan of every sparse step is made."""
    sites: dict[int, Site] = {}
    session.on_plan = lambda site, plan: sites.setdefault(site.step, site)
    call()
    return list(sites.values())


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (1.0, 8), (0.125, 1)])
def test_steps_are_those_that_run(name: str, strength: float, steps: int) -> None:
    pipe = sparsify(of_family(name), Schedule(METHOD, warmup=0))
    session = session_of(pipe)
    sites = sites_of(session, lambda: run(pipe, strength))
    assert [(site.step, site.num_steps) for site in sites] == [(step, steps) for step in range(steps)]
    counter = StepCounter()
    counter._begin(pipe.scheduler)
    for site in sites:
        counter.step = 8 - steps + site.step
        assert site.sigma == counter.sigma
    assert not session.steps.inside_run


def test_the_warm_up_is_a_share_of_the_steps_that_run() -> None:
    pipe = sparsify(of_family("flux"), Schedule(METHOD, warmup=0.25))
    run(pipe, 0.5)
    assert {record.step for record in statistics(pipe).records if record.density is None} == {0}


def test_a_pipeline_of_the_same_parts_counts_its_own_steps() -> None:
    """It is not the one that was sparsified, so nobody but its scheduler and its forwards can be asked."""
    text = SparseCogVideoXPipeline.from_pipe(tiny_cogvideox(), sparse=METHOD)
    session, video = session_of(text), of_family("cogvideox", text)
    family = next(family for family in FAMILIES if family.name == "cogvideox")
    calls = {2: lambda: run(video, 0.5, 4), 4: lambda: family.run(text)}
    for steps in (2, 4, 2):
        sites = sites_of(session, calls[steps])
        # The first is the warm-up.
        assert [(site.step, site.num_steps) for site in sites] == [(step, steps) for step in range(1, steps)]
        assert not session.steps.inside_run


@pytest.mark.parametrize("order", [1, 2])
def test_a_loop_may_begin_anywhere(order: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler() if order == 1 else FlowMatchHeunDiscreteScheduler()
    counter = StepCounter()
    counter.watch(scheduler)
    for first in (0, 2):
        scheduler.set_timesteps(5)
        timesteps = scheduler.timesteps[first * order :]
        counter.begin_at(timesteps[0].expand(2) * torch.tensor([0.0, 1.0]))  # tokens that are given have none
        assert (counter.step, counter.num_steps) == (0, len(timesteps))
        for timestep in timesteps:
            assert counter.inside_run
            scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        assert not counter.inside_run


@pytest.mark.parametrize("timestep", [None, torch.tensor([123.4])], ids=str)
def test_a_timestep_that_nobody_knows_leaves_no_step_out(timestep: Tensor | None) -> None:
    scheduler, counter = FlowMatchEulerDiscreteScheduler(), StepCounter()
    counter.watch(scheduler)
    scheduler.set_timesteps(5)
    counter.begin_at(timestep)
    assert counter.num_steps == 5
    counter.release()
    counter.begin_at(torch.tensor([500.0]))
    assert counter.num_steps == 5


def test_the_schedulers_word_comes_first() -> None:
    scheduler, counter = FlowMatchEulerDiscreteScheduler(), StepCounter()
    counter.watch(scheduler)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    counter.begin_at(scheduler.timesteps[:1] / 1000)
    assert (counter.num_steps, counter.sigma) == (2, float(scheduler.sigmas[3]))
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)
    counter.begin_at(scheduler.timesteps[2:3])
    assert counter.num_steps == 5


def test_a_scheduler_replaced_in_such_a_run_goes_on() -> None:
    old, new, counter = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(), StepCounter()
    counter.watch(old)
    for scheduler in (old, new):
        scheduler.set_timesteps(8)
    counter.begin_at(old.timesteps[4])
    old.step(torch.zeros(1), old.timesteps[4], torch.zeros(1))
    runs = counter.run
    counter.watch(new)
    counter.adopt(new, new.timesteps[5])
    assert (counter.run, counter.step, counter.num_steps) == (runs, 1, 4)
    assert counter.sigma == float(new.sigmas[5])
    other = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    other.set_timesteps(9)
    counter.watch(other)
    counter.adopt(other, old.timesteps[5])
    assert (counter.run, counter.step, counter.num_steps) == (runs + 1, 0, 9)
