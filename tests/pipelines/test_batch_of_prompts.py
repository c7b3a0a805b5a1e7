"""Prompts of one batch get what they get alone, whether the batch holds their guidance branches as well or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit_sparse import LeastError, Schedule, Site, sparsify
from dit_sparse.pipelines import session_of
from dit_sparse.pipelines.follower import Follower
from dit_sparse.types import AttentionPlan
from tests.pipelines.composed import is_close
from tests.pipelines.families import FAMILIES
from tests.pipelines.test_composition_caches import HALVED, faster

PROMPTS = ["a red ball", "a big blue square moving left"]
SCHEDULE = Schedule(LeastError(density=0.25, tile=(1, 4, 4), rows=4), warmup=0, never_slower=False)


def render(
    name: str, prompts: list[str], seeds: list[int], halved: bool = False, **options: Any
) -> tuple[Tensor, set[int]]:
    """Latents, and how many guidance branches the calls that plan have."""
    family = next(family for family in FAMILIES if family.name == name)
    pipe, found = family.make(), set()

    def on_plan(site: Site, plan: AttentionPlan) -> None:
        found.add(site.branches)
        first, *others = plan.block_mask.kept_blocks.chunk(site.branches)
        assert all(torch.equal(first, other) for other in others)

    if halved:
        pipe.transformer.enable_cache(faster(pipe, **HALVED))
    session_of(sparsify(pipe, SCHEDULE)).on_plan = on_plan
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return family.run(pipe, prompts, steps=5, generator=generators, **options), found


CASES: dict[str, tuple[str, dict[str, Any], set[int]]] = {
    "cogvideox": ("cogvideox", {"guidance_scale": 1.0}, {1}),
    "cogvideox guided": ("cogvideox", {}, {2}),
    "cogvideox guided anew at every step": ("cogvideox", {"use_dynamic_cfg": True}, {2}),
    "cogvideox halved": ("cogvideox", {"halved": True}, {1, 2}),
    "ltx_video": ("ltx_video", {"guidance_scale": 1.0}, {1}),
    "ltx_video guided": ("ltx_video", {}, {2}),
    "wan guided": ("wan", {}, {1}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_prompt_gets_what_it_gets_alone(case: str) -> None:
    name, options, want = CASES[case]
    together, branches = render(name, PROMPTS, [0, 1], **options)
    assert branches == want
    for n, prompt in enumerate(PROMPTS):
        alone, branches = render(name, [prompt], [n], **options)
        assert branches == want
        assert is_close(together[n : n + 1], alone)


@pytest.mark.parametrize(("scale", "branches"), [(1.0, 1), (3.0, 2)])
def test_so_does_each_video_of_one_prompt(scale: float, branches: int) -> None:
    together, found = render("ltx_video", PROMPTS[:1], [0, 1], guidance_scale=scale, num_videos_per_prompt=2)
    assert found == {branches}
    for seed in range(2):
        assert is_close(together[seed : seed + 1], render("ltx_video", PROMPTS[:1], [seed], guidance_scale=scale)[0])


class Pipe:
    """What a follower asks of a pipeline."""

    def __init__(self, **attributes: Any) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("attributes", "want"),
    [
        ({}, 1),
        ({"guidance_scale": 3.0}, 2),
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_scale": None}, 1),
        ({"guidance_scale": 3.0, "do_classifier_free_guidance": False}, 1),
        ({"guidance_scale": 1.0, "do_classifier_free_guidance": True}, 2),
    ],
)
def test_guidance_is_what_the_pipeline_says_that_is_at_this_timestep(attributes: dict[str, Any], want: int) -> None:
    pipe, follower = Pipe(**attributes), Follower()
    follower.watch(pipe)
    for branch, at, found in (("cond_uncond", 0, want), ("cond", 0, 1), ("cond_uncond", 1, 1)):
        pipe.scheduler.set_timesteps(3)
        first = pipe.scheduler.timesteps[:1]
        # At another timestep it has not cleared what an earlier run left, and this forward is another pipeline's.
        pipe._current_timestep = pipe.scheduler.timesteps[at]
        assert follower.has_begun(branch, 4, first)
        assert not follower.has_begun(branch, 4, first)
        assert follower.branches(branch, 4) == found
        assert follower.branches(branch, 2) == 1
    pipe._current_timestep = None
    pipe.scheduler.set_timesteps(3)
    assert follower.has_begun("cond_uncond", 4, pipe.scheduler.timesteps[:1])
    assert follower.branches("cond_uncond", 4) == 1
