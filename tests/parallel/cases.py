"""What ranks run; imported once by the server that they are forked from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dit_sparse import Schedule, parallelize, sparsify, statistics
from dit_sparse.pipelines import session_of
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


_meshes: dict[tuple[int, int], Any] = {}


def _mesh(ulysses: int, ring: int) -> Any:
    """A mesh over all ranks, with as many copies of ring x ulysses as there is room for."""
    if (ulysses, ring) not in _meshes:
        copies = dist.get_world_size() // (ulysses * ring)
        names = ("copies", "ring", "ulysses")
        _meshes[ulysses, ring] = dist.device_mesh.init_device_mesh("cpu", (copies, ring, ulysses), mesh_dim_names=names)
    return _meshes[ulysses, ring]
