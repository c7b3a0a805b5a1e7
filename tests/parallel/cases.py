"""What ranks run; imported once by the server that they are forked from."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig
from diffusers.models._modeling_parallel import ParallelConfig

from dit_sparse import (
    AdaSpa,
    Dense,
    Neighborhood,
    Paro,
    Schedule,
    parallelize,
    save_plan,
    sparsify,
    statistics,
    unsparsify,
)
from dit_sparse.generate import Request, prepare, run
from dit_sparse.generate import render as render_module
from dit_sparse.generate.ranks import Leader, become_rank, follow, join
from dit_sparse.generate.render import LocalExecutor
from dit_sparse.head_shard import HeadShard
from dit_sparse.pipelines import observe, session_of
from dit_sparse.pipelines.context_parallel import _on_any_device
from tests.pipelines.families import FAMILIES
from tests.pipelines.tiny import tiny_wan
from tests.pipelines.tiny_families import tiny_cogvideox, tiny_flux, tiny_hunyuan_video, tiny_ltx_video

MAKERS = {
    "wan": lambda **options: tiny_wan(fine=True, **options),
    "cogvideox": tiny_cogvideox,
    "hunyuan_video": tiny_hunyuan_video,
    "flux": tiny_flux,
    "ltx_video": tiny_ltx_video,
}
TIMEOUT = 20.0


@dataclass
class Rendered:
    """What a run gave.

    Args:
        latents: as the pipeline returns them.
        densities: of every call, all heads; -1 where it was dense.
        moves: how often heads were spread anew.
    """

    latents: torch.Tensor
    densities: list[list[float]]
    moves: int = 0


def render(
    family: str,
    method: Any,
    ulysses: int = 1,
    ring: int = 1,
    *,
    heads: int = 4,
    steps: int = 3,
    first: str = "sparsify",
    prompt: str | list[str] = "a red ball",
    parallel: dict[str, Any] | None = None,
    **options: Any,
) -> Rendered:
    """One run of a tiny pipeline, over as many ranks as asked; where there are more, each group makes a copy."""
    own = next(f for f in FAMILIES if f.name == family)
    pipe = MAKERS[family](heads=heads)
    schedule = method if isinstance(method, Schedule) else Schedule(method, warmup=0.3)

    def spread() -> None:
        if ulysses * ring > 1:
            parallelize(
                pipe, ulysses=ulysses, ring=ring, mesh=_mesh(ulysses, ring), timeout=TIMEOUT, **(parallel or {})
            )

    if first == "parallelize":
        spread()
    sparsify(pipe, schedule)
    if first == "sparsify":
        spread()
    with torch.no_grad():
        latents = own.run(pipe, prompt, steps=steps, **options)
    calls = statistics(pipe).records
    densities = [[-1.0] if call.density is None else call.density.mean(0).tolist() for call in calls]
    return Rendered(latents, densities, sum(context.moves for context in session_of(pipe).contexts))


def render_with_diffusers_own_plan(family: str, method: Any) -> Rendered:
    """A run over two ranks for which diffusers' own method was called, and not `parallelize`."""
    own = next(f for f in FAMILIES if f.name == family)
    pipe = MAKERS[family](heads=4)
    sparsify(pipe, Schedule(method, warmup=0.3))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2, mesh=_mesh(2, 1)))
    with _on_any_device(pipe.transformer):
        pipe.transformer.enable_parallelism(config=config)
    with torch.no_grad():
        latents = own.run(pipe, "a red ball", steps=3)
    return Rendered(
        latents, [call.density.mean(0).tolist() for call in statistics(pipe).records if call.density is not None]
    )


def render_with_a_dear_half(schedule: Schedule, balance: bool = True) -> Rendered:
    """A run over two ranks in which the densities that ranks tell each other are said to be 4, 4, 1 and 1."""
    told = HeadShard.gather

    def gather(shard: HeadShard, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64 and x.ndim == 2:
            return torch.tensor([[4.0, 4.0, 1.0, 1.0]], dtype=x.dtype).expand(x.shape[0], -1)
        return told(shard, x)

    HeadShard.gather = gather
    try:
        return render("wan", schedule, 2, 1, steps=5, parallel={"balance": balance})
    finally:
        HeadShard.gather = told


def render_unlike(what: str) -> Any:
    """A run over two ranks, of which the second is given something else."""
    odd = dist.get_rank() % 2
    method, options = Neighborhood(density=0.25 if what == "density" and odd else 0.5, tile=(1, 4, 4)), {}
    if what == "plan file":
        path = Path(tempfile.gettempdir()) / f"dit_sparse_test_{os.getpid()}"
        path.write_text(str(odd))
        method = Pretender(str(path))
    options |= {"seed": odd} if what == "seed" else {}
    options |= {"width": 32 if odd else 48} if what == "size" else {}
    return render("wan", method, 2, 1, steps=3 + odd if what == "steps" else 3, **options)


def render_with_fate(fate: str) -> Any:
    """A run over two ranks, in which the second dies or sleeps in the second step."""
    pipe = tiny_wan(fine=True)
    sparsify(pipe, Schedule(AdaSpa(density=0.5, block=16), warmup=0.3))
    parallelize(pipe, ulysses=2, timeout=4.0)

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and dist.get_rank() == 1:
            if fate == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(8)
        return tensors

    wan = next(f for f in FAMILIES if f.name == "wan")
    return wan.run(pipe, callback_on_step_end=callback)


def render_with_first_block_cache() -> Any:
    """A run over two ranks under a cache that looks at the tokens it has."""
    pipe = tiny_wan(fine=True, heads=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    sparsify(pipe, Dense())
    parallelize(pipe, ulysses=2, mesh=_mesh(2, 1), timeout=TIMEOUT)
    return FAMILIES[0].run(pipe)


def render_unsparsified(family: str) -> Any:
    """A run over two ranks after sparse attention was taken off."""
    pipe = MAKERS[family](heads=4)
    sparsify(pipe, Dense())
    parallelize(pipe, ulysses=2, mesh=_mesh(2, 1), timeout=TIMEOUT)
    unsparsify(pipe)
    own = next(f for f in FAMILIES if f.name == family)
    with torch.no_grad():
        return own.run(pipe, steps=3)


def save_plan_of_ranks() -> Any:
    """Save the plan of a run over two ranks."""
    pipe = tiny_wan(fine=True)
    sparsify(pipe, Paro(density=0.5, block=16))
    parallelize(pipe, ulysses=2, mesh=_mesh(2, 1), timeout=TIMEOUT)
    FAMILIES[0].run(pipe)
    save_plan(pipe, os.devnull)


def observe_ranks() -> Any:
    """Observe a pipeline on two ranks."""
    pipe = parallelize(tiny_wan(fine=True), ulysses=2, mesh=_mesh(2, 1), timeout=TIMEOUT)
    with observe(pipe, lambda *_: None):
        FAMILIES[0].run(pipe)


def generate(request: Request, poison: str = "", rank: int | None = None) -> dict[str, int] | None:
    """`generate --parallel` on ranks that are there already.

    Args:
        request: what to make.
        poison: a prompt that cannot be rendered, on all ranks or on `rank` alone.
    """
    own = dist.get_rank()
    become_rank(own, dist.get_world_size())
    together = join(request)
    arguments = render_module._arguments

    def poisoned(pipe: Any, settings: Any, clip: Any) -> dict[str, Any]:
        if clip.prompt == poison and rank in (None, own):
            raise RuntimeError("poisoned")
        return arguments(pipe, settings, clip)

    render_module._arguments = poisoned
    try:
        if own > 0:
            follow(request, together)
            return None
        leader = Leader(request, together)
        outcome = run(prepare(request, LocalExecutor(request, leader)))
        leader.stop()
        return {"made": len(outcome.lines), "failed": len(outcome.failures)}
    finally:
        render_module._arguments = arguments


@dataclass(frozen=True)
class Pretender(Dense):
    """A method with a file."""

    plan_file: str = ""


_meshes: dict[tuple[int, int], Any] = {}


def _mesh(ulysses: int, ring: int) -> Any:
    """A mesh over all ranks, with as many copies of ring x ulysses as there is room for."""
    if (ulysses, ring) not in _meshes:
        copies = dist.get_world_size() // (ulysses * ring)
        names = ("copies", "ring", "ulysses")
        _meshes[ulysses, ring] = dist.device_mesh.init_device_mesh("cpu", (copies, ring, ulysses), mesh_dim_names=names)
    return _meshes[ulysses, ring]
