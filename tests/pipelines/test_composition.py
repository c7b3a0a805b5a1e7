"""What happens around a run: callbacks, schedulers, other pipelines, copies, errors, folders."""

from __future__ import annotations

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from dit_sparse import Neighborhood, Schedule, sparsify, statistics, unsparsify
from dit_sparse.pipelines import NotSparseError, session_of
from dit_sparse.pipelines.families import adapter_for
from tests.pipelines.composed import ALL_DENSE, HALF, half_run, is_close
from tests.pipelines.families import FAMILIES, KINDS, METHODS, Family
from tests.pipelines.tiny_families import widened

REPLACED = "transformer was replaced in a sparse pipeline, so its attention is dense; sparsify it again"
STRANGER = "by a pipeline whose scheduler is not followed, so its attention is dense; sparsify that pipeline"


def sparse(family: Family) -> Any:
    return sparsify(family.make(), HALF)


def test_a_callback_sees_every_step_and_may_change_the_latents(family) -> None:
    def fade(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return {"latents": tensors["latents"] * 0.9}

    seen: list[int] = []
    want = family.run(family.make(), callback_on_step_end=fade)
    assert torch.equal(family.run(sparsify(family.make(), ALL_DENSE), callback_on_step_end=fade), want)
    pipe = sparse(family)
    faded = family.run(pipe, callback_on_step_end=fade)
    assert seen == [0, 1, 2, 3] * 3
    assert {record.step for record in statistics(pipe).records} == {0, 1, 2, 3}
    assert not torch.equal(faded, half_run(family))


def test_a_callback_may_interrupt(family) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step == 1
        return tensors

    want = half_run(family)
    plain = family.run(family.make(), callback_on_step_end=interrupt)
    assert torch.equal(family.run(sparsify(family.make(), ALL_DENSE), callback_on_step_end=interrupt), plain)
    pipe = sparse(family)
    family.run(pipe, "a big blue square", seed=1, callback_on_step_end=interrupt)
    assert {record.step for record in statistics(pipe).records} == {0, 1}
    assert torch.equal(family.run(pipe), want), "the next run is not the first's"
    assert {record.step for record in statistics(pipe).records} == {0, 1, 2, 3}


def test_a_scheduler_of_another_class_between_two_runs(family) -> None:
    def other() -> Any:
        if family.name == "cogvideox":
            return CogVideoXDPMScheduler()
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)

    def replaced(method: Any) -> Any:
        pipe = family.make()
        pipe.scheduler = other()
        return pipe if method is None else sparsify(pipe, method)

    assert torch.equal(family.run(replaced(ALL_DENSE)), family.run(replaced(None)))
    want = family.run(replaced(HALF))
    pipe = sparse(family)
    first = family.run(pipe)
    before, pipe.scheduler = pipe.scheduler, other()
    got = family.run(pipe)
    assert torch.equal(got, want)
    assert not torch.equal(got, first)
    assert statistics(pipe).sparse_density < 0.6
    assert not vars(before).keys() & {"step", "set_timesteps"}, "the old one is still listened to"


def test_a_scheduler_replaced_in_the_middle_of_a_run(family) -> None:
    """By one in the same state: the run goes on where it was, with the plans that it has."""

    def replace(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return tensors

    want_pipe, pipe = sparse(family), sparse(family)
    want = family.run(want_pipe)
    assert torch.equal(family.run(pipe, callback_on_step_end=replace), want)
    got, expected = statistics(pipe), statistics(want_pipe)
    assert [(r.step, r.reason) for r in got.records] == [(r.step, r.reason) for r in expected.records]
    assert torch.equal(family.run(pipe), want)


def test_two_pipelines_in_turn_and_interleaved(family) -> None:
    first, second = sparse(family), sparsify(family.make(), METHODS[0])
    want, second_want = family.run(first), family.run(second, "a big blue square", seed=1)
    want_calls = statistics(first).calls
    assert torch.equal(family.run(first), want)
    others: list[Tensor] = []

    def run_the_other(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        others.append(family.run(second, "a big blue square", seed=1))
        return tensors

    assert torch.equal(family.run(first, callback_on_step_end=run_the_other), want)
    assert len(others) == 4
    assert all(torch.equal(other, second_want) for other in others)
    assert statistics(first).calls == want_calls


def test_pipelines_in_threads(family) -> None:
    pipes = [sparsify(family.make(), method) for method in METHODS[:4]]
    wants = [family.run(pipe) for pipe in pipes]
    with ThreadPoolExecutor(len(pipes)) as threads:
        gots = list(threads.map(family.run, pipes))
    assert all(torch.equal(got, want) for got, want in zip(gots, wants, strict=True))


def test_two_pipelines_with_one_scheduler(family) -> None:
    first, second = family.make(), family.make()
    want, dense = half_run(family), family.dense()
    second.scheduler = first.scheduler
    sparsify(first, METHODS[0])
    sparsify(second, HALF)
    family.run(first)
    assert torch.equal(family.run(second), want)
    unsparsify(first)
    assert torch.equal(family.run(second), want), "the second lost its scheduler"
    assert torch.equal(family.run(first), dense)
    unsparsify(second)
    assert torch.equal(family.run(second), dense)


def test_two_pipelines_with_one_transformer(family) -> None:
    """Both are sparse while they share the scheduler too; one with a scheduler of its own wants `sparsify` itself."""
    pipe = sparse(family)
    want = family.run(pipe)
    twin = type(pipe)(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(family.run(twin), want)
    assert statistics(twin) is statistics(pipe)
    calls = statistics(pipe).calls
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    with pytest.raises(NotSparseError, match=STRANGER):
        family.run(twin)
    sparsify(pipe, HALF, strict=False)
    with pytest.warns(UserWarning, match=STRANGER):
        family.run(twin)
    assert statistics(twin).dense_calls["outside a run"] == calls
    assert torch.equal(family.run(sparsify(twin, HALF)), want)


@pytest.mark.parametrize("method", [METHODS[0], HALF], ids=lambda m: m.name)
def test_a_deep_copy_is_a_sparse_pipeline_of_its_own(family, method) -> None:
    pipe = sparsify(family.make(), method)
    want = family.run(pipe)
    twin = copy.deepcopy(pipe)
    assert session_of(twin) is not session_of(pipe)
    for parameter in pipe.transformer.parameters():
        parameter.data.zero_()
    family.run(pipe, steps=2)
    calls = statistics(pipe).calls
    assert torch.equal(family.run(twin), want), "the copy runs on the weights of the original"
    assert statistics(twin).sparse_density < 0.7
    assert statistics(pipe).calls == calls
    dense = family.run(unsparsify(twin))
    assert torch.equal(dense, family.dense())
    assert session_of(pipe) is not None


def test_a_copy_of_the_transformer_alone_wants_sparsify_in_its_new_pipeline(family) -> None:
    pipe = sparse(family)
    want = family.run(pipe)
    other = family.make()
    other.transformer = copy.deepcopy(pipe.transformer)
    with pytest.raises(NotSparseError, match=STRANGER):
        family.run(other)
    assert torch.equal(family.run(sparsify(other, HALF)), want)


def test_a_transformer_that_was_replaced_wants_sparsify_again(family) -> None:
    pipe = sparse(family)
    want, dense = family.run(pipe), family.dense()
    pipe.transformer = family.make().transformer
    with pytest.raises(NotSparseError, match=REPLACED):
        family.run(pipe)
    assert torch.equal(family.run(sparsify(pipe, HALF)), want)
    pipe.transformer = family.make().transformer
    assert torch.equal(family.run(unsparsify(pipe)), dense), "the session outlived unsparsify"
    sparsify(pipe, HALF, strict=False)
    pipe.transformer = family.make().transformer
    with pytest.warns(UserWarning, match=REPLACED):
        assert torch.equal(family.run(pipe), dense)


def test_another_pipeline_may_drive_the_scheduler_of_a_sparse_one(family) -> None:
    """Its steps go by without a forward of the sparse transformer, which nobody has replaced."""
    pipe, other = sparse(family), family.make()
    want, dense = family.run(pipe), family.dense()
    other.scheduler = pipe.scheduler
    assert torch.equal(family.run(other), dense)
    assert torch.equal(family.run(pipe), want)


def test_a_sparse_transformer_is_not_pickled(family) -> None:
    pipe = sparse(family)
    with pytest.raises(ValueError, match="cannot be pickled, got one; unsparsify it first"):
        pickle.dumps(pipe.transformer)
    pickle.dumps(unsparsify(pipe).transformer)


@pytest.mark.parametrize("method", [METHODS[0], HALF], ids=lambda m: m.name)
@pytest.mark.parametrize("where", ["block", "scheduler", "callback"])
def test_an_exception_inside_a_step_leaves_the_next_run_right(family, where: str, method, monkeypatch) -> None:
    pipe = sparsify(family.make(), method)
    want = family.run(pipe)
    count = statistics(pipe).calls
    calls: list[int] = []

    def fails_the_third_time(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return args[-1] if where == "callback" else original(*args, **kwargs)

    options: dict[str, Any] = {}
    if where == "callback":
        options["callback_on_step_end"] = lambda pipe, step, timestep, tensors: fails_the_third_time(tensors)
    else:
        last = list(adapter_for(pipe).attention_modules(pipe.transformer).values())[-1]
        owner, name = (last, "forward") if where == "block" else (pipe.scheduler, "step")
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, fails_the_third_time)
    with pytest.raises(KeyboardInterrupt):
        family.run(pipe, "a big blue square", seed=1, **options)
    assert torch.equal(family.run(pipe), want)
    assert statistics(pipe).calls == count


def test_what_is_saved_while_sparse_is_the_dense_pipeline(family, tmp_path) -> None:
    pipe = family.make()
    want = family.run(pipe)
    sparsify(pipe, Schedule(HALF, warmup=0.5))
    half = family.run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert session_of(loaded) is None
    assert torch.equal(family.run(loaded), want)
    assert torch.equal(family.run(sparsify(loaded, Schedule(HALF, warmup=0.5))), half)


def test_flux_under_a_controlnet() -> None:
    """Its residuals stand in the sequence's own order, and so stay the tokens; the ControlNet itself runs dense."""
    (flux,) = (family for family in FAMILIES if family.name == "flux")
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))

    def make() -> FluxControlNetPipeline:
        plain = flux.make()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            own = set(inspect.signature(FluxControlNetModel.__init__).parameters)
            config = {name: value for name, value in plain.transformer.config.items() if name in own}
            controlnet = widened(FluxControlNetModel(**config))
        pipe = FluxControlNetPipeline(**plain.components, controlnet=controlnet)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    want = flux.run(make(), control_image=image)
    assert not is_close(want, flux.dense())
    assert torch.equal(flux.run(sparsify(make(), ALL_DENSE), control_image=image), want)
    every_key = Schedule(Neighborhood(density=1, tile=(1, 4, 4)), warmup=0)
    assert is_close(flux.run(sparsify(make(), every_key), control_image=image), want)
    for method in KINDS:
        pipe = sparsify(make(), method)
        assert not is_close(flux.run(pipe, control_image=image), want)
        assert set(statistics(pipe).dense_calls) == {"warm-up"}
        assert statistics(pipe).calls == 4 * 2


def test_an_unknown_family_is_refused_by_name() -> None:
    pipe = FAMILIES[0].make()
    for transformer, message in (
        (torch.nn.Linear(1, 1), "model family of Linear is not supported, got WanPipeline; supported: Wan .*, FLUX"),
        (None, "pipeline must have a transformer, got WanPipeline; supported: Wan "),
    ):
        pipe.transformer = transformer
        with pytest.raises(ValueError, match=message):
            sparsify(pipe, HALF)


def test_parallelism_is_refused_before_the_run(family) -> None:
    pipe = family.make()
    pipe.transformer._parallel_config = object()
    with pytest.raises(ValueError, match="parallelism must be off with sparse attention, got object"):
        sparsify(pipe, HALF)
    pipe.transformer._parallel_config = None
    sparsify(pipe, HALF)
    pipe.transformer._parallel_config = object()
    with pytest.raises(ValueError, match="parallelism must be off with sparse attention, got object"):
        family.run(pipe)
    assert statistics(pipe).calls == 0
