"""`sparsify` and `unsparsify`: sparse attention in a diffusers pipeline, in place, and back."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from dit_sparse.cost import tables
from dit_sparse.kernels import check_remainder, check_routing, check_skips
from dit_sparse.methods import Paro
from dit_sparse.methods.plan_file import axes_of, write_plans
from dit_sparse.methods.plan_header import ModelPlans, PlanHeader, one_line
from dit_sparse.pipelines.adapter import FamilyAdapter
from dit_sparse.pipelines.context_parallel import check_spread
from dit_sparse.pipelines.conv3d import OneDnn
from dit_sparse.pipelines.families import adapter_for
from dit_sparse.pipelines.hooks import CallRecorder, SiteHook, reset_caches
from dit_sparse.pipelines.installed import INSTALLED, transformers_of
from dit_sparse.pipelines.session import Session
from dit_sparse.pipelines.statistics import RunStatistics
from dit_sparse.pipelines.strict import ALLOW, NotSparseError, demands
from dit_sparse.pipelines.upstream import changes, message
from dit_sparse.schedule import Schedule
from dit_sparse.types import Method, TokenGrid

Pipeline = TypeVar("Pipeline")


class _Installed:
    """What `sparsify` left on a transformer: its session, and how to take it off."""

    def __init__(self, session: Session, hook: SiteHook | CallRecorder, decoding: OneDnn | None = None) -> None:
        self.session = session
        self.hook = hook
        self.decoding = decoding


def sparsify(
    pipe: Pipeline, method: Method | Schedule, *, backend: str = "auto", strict: bool | None = None
) -> Pipeline:
    """Switch sparse attention on in `pipe`, in place; what was on before is replaced.

    The attention belongs to the transformers: other pipelines that share them become sparse too.

    Args:
        pipe: any diffusers pipeline of a supported family.
        method: a method, which gets the default schedule, or a schedule.
        backend: kernel backend of the sparse calls, as in `sparse_attention`.
        strict: whether a call that was to be sparse and would run dense, for a reason that is not in the schedule, ends
            the run with a `NotSparseError`; `None` leaves it to the schedule, which says yes by default.

    Returns:
        `pipe`.

    Warns:
        UserWarning: not strict, and the installed diffusers is not the one the family's adapter was written for; it
            runs dense.

    Raises:
        ValueError: an unsupported family, a dense layer that the model does not have, a foreign attention processor,
            tensor parallelism, a backend without the schedule's remainder or without the skipping or the routing that
            it asks for, or a table of costs that cannot be read.
        NotSparseError: strict, and the installed diffusers is not the one the family's adapter was written for.
    """
    schedule = Schedule.of(method)
    if strict is not None:
        schedule = replace(schedule, strict=strict)
    check_remainder(backend, schedule.planned_remainder)
    if schedule.skips:
        check_skips(backend)
    if schedule.routes:
        check_routing(backend, schedule.planned_remainder)
    tables()
    return install(pipe, Session(schedule, backend))


def install(pipe: Pipeline, session: Session) -> Pipeline:
    """Hand the self-attention of `pipe` to `session`, in place; otherwise as `sparsify`."""
    adapter = adapter_for(pipe)
    for transformer in transformers_of(pipe).values():
        session.schedule.check_layers(adapter.num_layers(transformer))
    changed = _changes(adapter, session.schedule)
    unsparsify(pipe)
    if changed:
        warnings.warn(f"{message(adapter, changed)}; attention runs dense", stacklevel=3)
    decoding = OneDnn(functools.partial(_ran_sparse, session))
    for model, transformer in transformers_of(pipe).items():
        if changed:
            recorder = CallRecorder(adapter.attention_modules(transformer), model, session)
            setattr(transformer, INSTALLED, _Installed(session, recorder))
            continue
        try:
            originals = adapter.install(transformer, model, session)
        except ValueError:
            # An earlier transformer must not stay sparse alone.
            unsparsify(pipe)
            raise
        adapter.fuse(transformer)
        hook = SiteHook(transformer, model, session, adapter, originals)
        reset_caches(transformer)
        setattr(transformer, INSTALLED, _Installed(session, hook, decoding))
    # The encoder stays torch's, as it works before it is known whether a run is sparse.
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    if not changed and isinstance(decoder, torch.nn.Module):
        decoding.install(decoder)
    session.watch(pipe)
    setattr(pipe, INSTALLED, session)
    return pipe


def unsparsify(pipe: Pipeline) -> Pipeline:
    """Undo `sparsify`: the pipeline computes bit for bit what it did before. Does nothing on a dense pipeline."""
    for transformer in transformers_of(pipe).values():
        installed = getattr(transformer, INSTALLED, None)
        if installed is None:
            continue
        adapter_for(pipe).unfuse(transformer)
        installed.hook.remove(transformer)
        reset_caches(transformer)
        installed.session.steps.release()
        delattr(transformer, INSTALLED)
        if installed.decoding is not None:
            installed.decoding.remove()
    # Its transformer may have been replaced, and then says nothing of the session.
    session = vars(pipe).pop(INSTALLED, None)
    if session is not None:
        session.steps.release()
    return pipe


def _ran_sparse(session: Session) -> bool:
    return session.statistics.was_ever_sparse


def session_of(pipe: Any) -> Session | None:
    """The session of a sparsified pipeline, or `None`."""
    for transformer in transformers_of(pipe).values():
        installed = getattr(transformer, INSTALLED, None)
        if installed is not None:
            return installed.session
    return None


def statistics(pipe: Any) -> RunStatistics:
    """What the latest run of a sparsified pipeline did, or the one under way so far; on a GPU it waits for that.

    Raises:
        ValueError: the pipeline is not sparsified.
    """
    found = _session(pipe).statistics
    found.settle()  # a run that was interrupted has not
    return found


def token_grid(pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
    """The token grid of a video of `height` x `width` pixels and `frames` frames.

    Raises:
        ValueError: an unsupported family, or a size that its VAE or patches cannot take.
    """
    return adapter_for(pipe).token_grid(pipe, height, width, frames)


def check(pipe: Any, method: Method | Schedule, height: int, width: int, frames: int) -> None:
    """Whether `pipe` can make a video of this size with `method`; for programs that want to know before they start.

    Raises:
        ValueError: a size that the model cannot take, a parameter that does not fit it, or blocks routed in the kernel
            on a device that lacks it.
        NotSparseError: as `sparsify`.
    """
    adapter, grid = adapter_for(pipe), token_grid(pipe, height, width, frames)
    schedule = Schedule.of(method)
    for transformer in transformers_of(pipe).values():
        schedule.check(grid, adapter.num_layers(transformer))
        check_spread(transformer, schedule)
    if schedule.routes:
        check_routing("auto", schedule.planned_remainder, pipe._execution_device)
    _changes(adapter, schedule)
    tables()  # read before a run, so that none fails in its middle


def _changes(adapter: FamilyAdapter, schedule: Schedule) -> list[str]:
    """What in diffusers is no longer as `adapter` was written for; an error where `schedule` is strict."""
    changed = changes(adapter)
    if changed and demands(schedule):
        raise NotSparseError(f"{message(adapter, changed)}, {ALLOW}")
    return changed


def save_plan(pipe: Any, path: str | os.PathLike[str], *, model: str = "", prompts: Sequence[str] = ()) -> None:
    """Write the orders and masks that `Paro()` found in the latest run, for `Paro(plan_file=path)`.

    The plans of the conditional branch are taken, of one prompt where prompts of unlike length were given together.
    `calibrate` makes a better file: of any number of prompts, with a mask for each of the first steps.

    Args:
        pipe: a pipeline that is sparsified with Paro and has run.
        path: the file.
        model, prompts: stored with the plans, for people.

    Raises:
        ValueError: the pipeline is not sparsified with Paro, has not run yet, or lies on several ranks.
    """
    session = _session(pipe)
    if session.contexts:
        raise ValueError(
            "pipeline must be on one rank to save a plan, got context parallelism: a rank has its own heads"
        )
    method = session.schedule.method
    if not isinstance(method, Paro):
        raise ValueError(f"pipeline must be sparsified with Paro to save a plan, got {method.name!r}")
    if method.plan_file is not None:
        raise ValueError(f"plan_file must be None to save a plan, got {method.plan_file!r}; copy that file")
    found = {key: previous.plan.unpack() for key, previous in session.previous.items() if previous.plan is not None}
    if not found:
        raise ValueError("pipeline must have run before its plan is saved, got no plan yet; call it first")
    grid, branch = (next(iter(found))[place] for place in (0, 3))
    plans = {key[1:3]: plan for key, plan in found.items() if (key[0], key[3]) == (grid, branch)}
    models = {name: sorted(layer for own, layer in plans if own == name) for name, _ in plans}
    if any(layers != list(range(len(layers))) for layers in models.values()):
        raise ValueError(f"a plan needs every layer, got {models}; run without dense_layers")
    axes = {n: [axes_of(plans[n, layer].q_order, grid, method.cut) for layer in own] for n, own in models.items()}
    bits = {n: [plans[n, layer].block_mask.pack().full_bits.cpu() for layer in own] for n, own in models.items()}
    header = PlanHeader(
        grid,
        method.cut,
        {name: ModelPlans(len(layers), len(layers[0])) for name, layers in axes.items()},
        method.density,
        one_line(model),
        tuple(map(one_line, prompts)),
        session.steps.num_steps,
        made_by=version("dit-sparse"),
    )
    write_plans(path, header, axes, bits)


def _session(pipe: Any) -> Session:
    session = session_of(pipe)
    if session is None:
        raise ValueError(f"pipeline must be sparsified, got a dense {type(pipe).__name__}; call sparsify(pipe, method)")
    return session
