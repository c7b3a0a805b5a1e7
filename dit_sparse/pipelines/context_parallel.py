"""diffusers' context parallelism: switched on for every family, and read by the hook on a transformer's forward."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from torch.utils.weak import WeakIdKeyDictionary

from dit_sparse.parallel import ContextParallel, Mesh, SequenceSplit
from dit_sparse.parallel.ring import check_remainder
from dit_sparse.pipelines.adapter import FamilyAdapter, SparseProcessor, context_config
from dit_sparse.pipelines.families import adapter_for
from dit_sparse.pipelines.installed import transformers_of
from dit_sparse.pipelines.layout import Layout
from dit_sparse.pipelines.loading import unloaded_transformers
from dit_sparse.schedule import Schedule

__all__ = ["check_spread", "check_unloaded", "context_of", "cut_anyhow", "cut_as_before", "parallelize"]

Pipeline = TypeVar("Pipeline")

TIMEOUT = 300.0
"""Seconds to wait for a rank, unless `parallelize` says otherwise."""

_meshes: WeakIdKeyDictionary = WeakIdKeyDictionary()


def parallelize(
    pipe: Pipeline, *, ulysses: int = 1, ring: int = 1, timeout: float = TIMEOUT, mesh: Any = None, balance: bool = True
) -> Pipeline:
    """Spread each video of `pipe` over the ranks of torch.distributed, in place; before or after `sparsify`.

    Every rank calls this, and then `pipe` with the same arguments and seed; every rank gets the whole result. It is
    diffusers' `enable_parallelism`, with plans for the families for which diffusers has none, and on a CPU too.

    Args:
        pipe: any diffusers pipeline of a supported family, on this rank's device.
        ulysses: ranks that exchange heads for tokens, at most the model's heads.
        ring: ranks round which keys and values go.
        timeout: seconds after which a rank that does not answer counts as lost. That of `init_process_group` holds for
            what runs on the device.
        mesh: a DeviceMesh with the dimensions "ring" and "ulysses", where the ranks do more than this.
        balance: whether heads of unequal density are spread anew over ranks.

    Returns:
        `pipe`.

    Raises:
        ValueError: torch.distributed is not initialised or has other ranks, the pipeline is parallel already, more
            Ulysses ranks than heads, or a model that cannot be spread.
    """
    if min(ulysses, ring) < 1 or ulysses * ring < 2:
        raise ValueError(f"ulysses and ring must be at least 1 and together at least 2 ranks, got {ulysses} and {ring}")
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed must be initialised, got no process group; start with torchrun and call "
            "torch.distributed.init_process_group()"
        )
    if mesh is None and dist.get_world_size() != ulysses * ring:
        raise ValueError(f"ulysses x ring must be the {dist.get_world_size()} ranks there are, got {ulysses} x {ring}")
    adapter = adapter_for(pipe)
    for model, transformer in transformers_of(pipe).items():
        if getattr(transformer, "_parallel_config", None) is not None:
            raise ValueError(f"{model} must not be parallel yet, got a parallel one")
        adapter.check_parallel(transformer, ulysses)
    spread: Any
    for spread in transformers_of(pipe).values():
        config = ParallelConfig(
            context_parallel_config=ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring, mesh=mesh)
        )
        with _on_any_device(spread):
            spread.enable_parallelism(config=config, cp_plan=adapter.context_parallel_plan)
        _meshes[config] = _mesh_of(config.context_parallel_config, timeout), balance
        if adapter.context_parallel_plan is not None:
            _keep_whole(adapter, spread)
            spread.register_forward_pre_hook(functools.partial(_check_processors, adapter))
    return pipe


@contextmanager
def _on_any_device(transformer: Any) -> Iterator[None]:
    """diffusers looks for an accelerator; where there is none the ranks share the CPU."""
    if torch.accelerator.is_available():
        yield
        return
    transformer._resolve_parallel_config = functools.partial(_resolve_on_cpu, transformer)
    try:
        yield
    finally:
        del transformer._resolve_parallel_config


def _resolve_on_cpu(transformer: Any, config: ParallelConfig) -> ParallelConfig:
    own = config.context_parallel_config
    names = own.mesh_dim_names
    mesh = own.mesh or dist.device_mesh.init_device_mesh("cpu", own.mesh_shape, mesh_dim_names=names)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    transformer._parallel_config = config
    return config


def _mesh_of(config: ContextParallelConfig, timeout: float = TIMEOUT) -> Mesh:
    meshes = (config._flattened_mesh, config._ulysses_mesh, config._ring_mesh)
    group, ulysses, ring = (mesh.get_group() for mesh in meshes)
    return Mesh(group, ulysses, ring, timeout)


def _keep_whole(adapter: FamilyAdapter, transformer: Any) -> None:
    """Attention other than that of the video, such as to a text that every rank has, is nobody else's."""
    spread = set(map(id, adapter.attention_modules(transformer).values()))
    for module in transformer.modules():
        if id(module) not in spread and getattr(getattr(module, "processor", None), "_parallel_config", None):
            module.processor._parallel_config = None


def _check_processors(adapter: FamilyAdapter, transformer: Any, args: tuple[Any, ...]) -> None:
    """diffusers' own processors of these families would attend to this rank's tokens alone."""
    for path, module in adapter.attention_modules(transformer).items():
        if not isinstance(module.processor, SparseProcessor):
            raise ValueError(
                f"{path}.processor must be dit_sparse's under context parallelism, got "
                f"{type(module.processor).__name__}; sparsify(pipe, Dense()) for dense attention"
            )


def context_of(transformer: Any, adapter: FamilyAdapter, known: ContextParallel | None) -> ContextParallel | None:
    """What runs the attention of a transformer whose sequence lies on several ranks; `None` where it does not.

    Args:
        transformer, adapter: the model and its family.
        known: what was returned for it before, which is returned again while its configuration is the same.

    Raises:
        ValueError: tensor parallelism, or a model or cache that cannot be spread.
    """
    own = context_config(transformer)
    if own is None:
        return None
    config = transformer._parallel_config
    if config not in _meshes:
        adapter.check_parallel(transformer, own.ulysses_degree)
        _meshes[config] = _mesh_of(own), True
    mesh, balance = _meshes[config]
    _check_cache(transformer)
    return known if known is not None and known.mesh is mesh else ContextParallel(mesh, balance)


def check_spread(transformer: Any, schedule: Schedule) -> None:
    """Whether `schedule` can be followed on the ranks that share a sequence of `transformer`; where none do, it can.

    Raises:
        ValueError: a refresh by drift, blocks routed in the kernel, or in a ring a remainder, skipped blocks, or a plan
            of the data with more ranks than heads.
    """
    own = context_config(transformer)
    if own is not None:
        _check_degrees(transformer, schedule, own.ulysses_degree, own.ring_degree)


def check_unloaded(model: str | os.PathLike[str], schedule: Schedule, *, ulysses: int = 1, ring: int = 1) -> None:
    """What `parallelize` and `check_spread` will say of the ranks and `schedule`, as far as the model's configs tell.

    Args:
        model: as `load_pipeline` takes it; of a hub id what is in the cache is read.
        schedule: what `sparsify` will be given.
        ulysses, ring: as in `parallelize`.

    Raises:
        ValueError: what they would raise.
    """
    for transformer in unloaded_transformers(model):
        transformer.adapter.check_parallel(transformer, ulysses)
        _check_degrees(transformer, schedule, ulysses, ring)


def _check_degrees(transformer: Any, schedule: Schedule, ulysses: int, ring: int) -> None:
    if schedule.drift is not None:
        raise ValueError(
            f"drift must be none on several ranks, got {schedule.drift}: each would go by its own heads; use refresh"
        )
    if schedule.routes:
        raise ValueError("in_kernel must be False on several ranks, got True: plans are told to all of them first")
    if ring == 1:
        return
    check_remainder(schedule.planned_remainder)
    if schedule.skips:
        raise ValueError(
            f"skip_factor must be 0 in a ring, got blocks skipped by {schedule.method.name!r} or the schedule: whole "
            "blocks are skipped, and each rank sees parts of them; use ulysses"
        )
    heads, ranks = transformer.config.num_attention_heads, ulysses * ring
    if ranks > heads and schedule.method.scope != "grid":
        raise ValueError(
            f"ulysses x ring must be at most the model's {heads} heads for {schedule.method.name}, got {ranks} ranks: "
            "in a ring each plans for heads of its own; methods that plan by the grid alone (neighborhood) take more"
        )


def _check_cache(transformer: Any) -> None:
    cache = type(getattr(transformer, "_cache_config", None)).__name__
    if cache in ("FirstBlockCacheConfig", "SeaCacheConfig"):
        raise ValueError(
            f"cache must decide alike on all ranks, got {cache}, which looks at a rank's own tokens; disable_cache()"
        )


def cut_anyhow(transformer: Any, layout: Layout) -> bool:
    """Let diffusers cut tokens that do not divide by the ranks; for one forward, after which `cut_as_before` is due.

    Returns:
        Whether it did so before.
    """
    own = transformer._parallel_config.context_parallel_config
    before = own.ulysses_anything
    # Read by diffusers' splitting hooks at every forward. It promises this for one kind of parallelism at a time, on
    # account of its own attention, which does not run here.
    own.ulysses_anything = before or not SequenceSplit(layout.grid, own.ulysses_degree * own.ring_degree).is_even
    return before


def cut_as_before(transformer: Any, before: bool) -> None:
    """Undo `cut_anyhow`, which returned `before`."""
    transformer._parallel_config.context_parallel_config.ulysses_anything = before
