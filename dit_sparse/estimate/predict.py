"""The cost model of whole runs on one device or several: attention, planning, linear layers, exchanges, memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

from dit_sparse.cost import Call, predict
from dit_sparse.course import plan_steps, plans_after, plans_per_call, step_densities
from dit_sparse.estimate.machines import Machine
from dit_sparse.estimate.shapes import ModelShape
from dit_sparse.methods.parameters import block_of, check_share, head_orders, key_block_of
from dit_sparse.schedule import Schedule
from dit_sparse.types import PACKED_FROM

__all__ = ["Estimate", "Mesh", "Run", "estimate", "meshes"]

Kind = Literal["dense", "search", "cached"]
Step: TypeAlias = tuple[Kind, float]
"""Its kind and, as far as it is sparse, its density."""
PARTS = ("attention", "planning", "linear", "passes", "exchange")

_MOST_STEPS = 1000
_LARGEST_SIZE = 100_000  # pixels, or frames
_ACTIVATIONS = 8.5
"""Peak activations over the hidden state; 6.13 GiB were measured for Wan 14B's 0.72 (docs/benchmarks.md)."""

_LSE, _ORDER, _PACKED_ORDER = 4, 16, 4
"""Bytes of a token and head: its row sum, and its place in an order, which at rest is packed where it is long."""

_SEARCH_BYTES = 4 + 4 + 1
"""A pair of blocks, while a layer is planned: its score, what it is ranked by, and whether it is kept."""

_TERMS_BYTES = 512 << 20
"""Of the matrices of a remainder; heads go through in groups that fit, as in the launcher (`kernels.block_sparse`)."""


@dataclass(frozen=True)
class Mesh:
    """How many devices split the heads and how many the sequence."""

    ulysses: int
    ring: int

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        return f"ulysses={self.ulysses},ring={self.ring}"


@dataclass(frozen=True)
class Run:
    """What is run, and where.

    Args:
        shape, frames, height, width, steps: the model and its video.
        schedule: method and schedule.
        density: share of the query-key pairs that sparse steps compute, where the method does not say.
        machine: the device.
        guided: whether both guidance branches run.

    Raises:
        ValueError: a size that the model does not take, or no density.
    """

    shape: ModelShape
    frames: int
    height: int
    width: int
    steps: int
    schedule: Schedule
    machine: Machine
    density: float | None = None
    guided: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "frames", "height", "width"):
            most, got = _MOST_STEPS if name == "steps" else _LARGEST_SIZE, getattr(self, name)
            if not 1 <= got <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {got}")
        self.schedule.check_layers(self.shape.layers)
        if self.schedule.skips:
            raise ValueError(
                f"{self.schedule.method.name!r} cannot be estimated where blocks are skipped: nobody knows before how "
                "many; time a run, or set skip_factor to 0"
            )
        if self.density is not None:
            check_share("density", self.density)
        _ = self.tokens, self.densities

    @cached_property
    def tokens(self) -> int:
        """Of self-attention."""
        return self.shape.tokens(self.frames, self.height, self.width)

    @cached_property
    def densities(self) -> tuple[float, ...]:
        """Of each step, as far as it is sparse."""
        method = self.schedule.method
        if method.name == "dense":
            return (1.0,) * self.steps
        found = step_densities(self.schedule, self.steps, self._plans)
        if found is None:
            if self.density is None:
                raise ValueError(
                    f"{method.name} has no density that is known before a run: say with --density what to expect"
                )
            found = [self.density] * self.steps
        return tuple(found)

    @cached_property
    def sparse_densities(self) -> tuple[float, ...]:
        """Of the steps that are not dense, in their order."""
        return tuple(density for kind, density in self.course if kind != "dense")

    @cached_property
    def share(self) -> float:
        """The density of sparse steps, their mean; 1 where there is none."""
        return math.fsum(self.sparse_densities) / len(self.sparse_densities) if self.sparse_densities else 1.0

    @property
    def branches(self) -> int:
        """Forwards a step, in one batch or after one another."""
        return self.shape.branches if self.guided else 1

    @property
    def planning_forwards(self) -> int:
        """Forwards of a step that plan: branches one after the other may share the plan of the first."""
        return self.branches if self.shape.batched or self.schedule.method.scope == "call" else 1

    @cached_property
    def _first_steps(self) -> tuple[int, ...]:
        """Of each transformer: several are taken to have equal parts of the run."""
        return tuple(number * self.steps // self.shape.transformers for number in range(self.shape.transformers))

    @cached_property
    def _dense_steps(self) -> frozenset[int]:
        warmup = self.schedule.warmup_steps(self.steps)
        own = {first for first in self._first_steps if self.schedule.method.uses_lse and first >= warmup}
        return frozenset(own.union(range(warmup)))

    @cached_property
    def _plans(self) -> frozenset[int]:
        """Steps that plan from the data; each transformer does at its first sparse one."""
        if self.schedule.method.scope == "grid":
            return frozenset()
        firsts = (
            next((step for step in range(first, self.steps) if step not in self._dense_steps), self.steps)
            for first in self._first_steps
        )
        return plan_steps(self.schedule, self.steps).union(firsts) - self._dense_steps - {self.steps}

    @cached_property
    def course(self) -> tuple[Step, ...]:
        """Kind and density of every step: dense, with plans from the data, or with those of an earlier step."""
        if self.schedule.method.name == "dense":
            return (("dense", 1.0),) * self.steps
        return tuple(
            ("dense" if step in self._dense_steps else "search" if step in self._plans else "cached", density)
            for step, density in enumerate(self.densities)
        )


@dataclass(frozen=True)
class Estimate:
    """What a run takes on one mesh.

    Args:
        seconds: of all denoising steps.
        steps: number of steps and mean seconds of one, by kind.
        parts: seconds of the run by part; they add up to `seconds`.
        hidden: seconds of the run if every exchange went on behind other work.
        dense: seconds of a run that is dense throughout, on the same mesh.
        memory: bytes on each device, by what needs them.
        bottleneck: the largest part.
        sparse_pays: whether the cost model finds the calls of any step faster sparse than dense.
    """

    run: Run
    mesh: Mesh
    seconds: float
    steps: dict[Kind, tuple[int, float]]
    parts: dict[str, float]
    hidden: float
    dense: float
    memory: dict[str, float]
    bottleneck: str
    sparse_pays: bool

    @property
    def fits(self) -> bool:
        """Whether one device holds its share."""
        return sum(self.memory.values()) <= self.run.machine.memory

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        run, total = self.run, sum(self.memory.values())
        return {
            "tokens": run.tokens,
            "density": run.share,
            "config": run.schedule.to_config(),
            "gpus": self.mesh.size,
            "mesh": asdict(self.mesh),
            "seconds": self.seconds,
            "seconds_if_exchange_is_hidden": self.hidden,
            "dense_seconds": self.dense,
            "speedup": self.dense / self.seconds,
            "steps": {kind: {"count": count, "seconds": each} for kind, (count, each) in self.steps.items()},
            "parts": self.parts,
            "bottleneck": self.bottleneck,
            "sparse_pays": self.sparse_pays,
            "memory_bytes": self.memory | {"total": total, "device": run.machine.memory},
            "fits": self.fits,
            "machine": run.machine.source,
            "attention": run.machine.attention.source,
        }


def estimate(run: Run, gpus: int = 1) -> Estimate:
    """What `run` takes on `gpus` devices, on the mesh that takes the least time.

    Raises:
        ValueError: no device, or more than heads and sequence can be split over.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    found = [_on_mesh(run, mesh) for mesh in meshes(run, gpus)]
    return min(found, key=lambda one: one.seconds)


def meshes(run: Run, gpus: int) -> list[Mesh]:
    """All ways to split the heads and the sequence over `gpus` devices.

    Raises:
        ValueError: there is none.
    """
    ways = [Mesh(u, gpus // u) for u in range(1, min(gpus, run.shape.heads) + 1) if gpus % u == 0]
    ways = [mesh for mesh in ways if run.tokens >= gpus]
    if not ways:
        raise ValueError(f"gpus must be at most {run.tokens}, the tokens of the sequence, got {gpus}")
    return ways


def step_parts(run: Run, mesh: Mesh, kind: Kind, density: float | None = None) -> dict[str, float]:
    """Seconds of one step by part, at the `density` of the step or else the mean of sparse ones.

    With N tokens, H heads of D channels, d = H D, L layers, B branches, P = U R devices and the busiest device's share
    of the heads h = ceil(H / U) / H:

        attention  B L h/R (4 H N^2 D / flops) x [1, or the cost model's ratio for the layers that are sparse]
        planning   B' L h/R (4 H N^2 D / flops) x plan, in steps that make plans, by B' of the branches
        linear     B L (2 products N d^2 + 4 C d (N + d)) / (P linear), C tokens of cross-attention
        passes     B L stream S / P, S the bytes of the hidden state
        exchange   B L (4 S / (P U) to each of U - 1 devices + 2 S / P to each of R - 1 + merge R S / P if R > 1)
    """
    shape, machine = run.shape, run.machine
    calls = run.branches * shape.layers
    hidden_bytes = run.tokens * shape.hidden * machine.itemsize
    busiest = math.ceil(shape.heads / mesh.ulysses) / shape.heads / mesh.ring
    dense = 4 * run.tokens**2 * shape.hidden / machine.attention.flops * busiest
    # Queries and outputs of a cross-attention are counted among the products; keys and values are of text.
    cross = 4 * shape.cross * shape.hidden * (run.tokens + shape.hidden)
    linear = (2 * shape.products * run.tokens * shape.hidden**2 + cross) / (machine.linear * mesh.size)
    stream = machine.stream["fused" if shape.fused else "plain"]
    density = run.share if density is None else density
    sparse_layers = 0.0 if kind == "dense" else _sparse_share(run, density)
    ratio = _ratio(run, density)
    planning = machine.attention.plan(run.schedule.method.name, run.tokens) if kind == "search" else 0.0
    return {
        "attention": calls * dense * (1 - sparse_layers + sparse_layers * ratio),
        "planning": run.planning_forwards * shape.layers * dense * sparse_layers * planning,
        "linear": calls * linear,
        "passes": calls * stream * hidden_bytes / mesh.size,
        "exchange": calls * _exchange(hidden_bytes, mesh, machine),
    }


def _on_mesh(run: Run, mesh: Mesh) -> Estimate:
    counts = Counter(run.course)
    each = {step: step_parts(run, mesh, *step) for step in counts}
    parts = {part: sum(count * each[step][part] for step, count in counts.items()) for part in PARTS}
    seconds = sum(parts.values())
    return Estimate(
        run=run,
        mesh=mesh,
        seconds=seconds,
        steps={kind: _mean(counts, each, kind) for kind in get_args(Kind)},
        parts=parts,
        hidden=max(seconds - parts["exchange"], parts["exchange"]),
        dense=run.steps * sum(step_parts(run, mesh, "dense").values()),
        memory=_memory(run, mesh),
        bottleneck=max(parts, key=lambda part: parts[part]),
        sparse_pays=any(_pays(run, density) for density in set(run.sparse_densities)),
    )


def _mean(counts: Counter[Step], each: Mapping[Step, Mapping[str, float]], kind: Kind) -> tuple[int, float]:
    """How many steps of `kind` there are, and the mean seconds of one."""
    own = {step: count for step, count in counts.items() if step[0] == kind}
    total = sum(count * sum(each[step].values()) for step, count in own.items())
    return sum(own.values()), total / max(1, sum(own.values()))


def _sparse_share(run: Run, density: float) -> float:
    """Share of the layers that are sparse in a sparse step."""
    if run.schedule.method.name == "dense" or (run.schedule.never_slower and not _pays(run, density)):
        return 0.0
    layers = run.shape.layers
    return 1 - sum(run.schedule.is_dense_layer(layer, layers) for layer in range(layers)) / layers


def _pays(run: Run, density: float) -> bool:
    """Whether a layer runs sparse, as it is judged in a run: by its share of the planning too."""
    forwards = 1 if run.shape.batched else run.branches
    return _ratio(run, density, plans_per_call(run.schedule, run.steps, forwards)) <= 1


def _ratio(run: Run, density: float, plans: float = 0.0) -> float:
    """Time of a sparse call with `plans` plans a call over a dense one's, on one device."""
    method, shape, machine = run.schedule.method, run.shape, run.machine
    call = Call(
        tokens=run.tokens,
        heads=shape.heads * (run.branches if shape.batched else 1),
        dim=shape.dim,
        density=density,
        block=block_of(method),
        backend=machine.backend,
        method=method.name,
        plans=plans,
        remainder=run.schedule.planned_remainder,
    )
    return predict(call, machine.attention)


def _exchange(hidden_bytes: float, mesh: Mesh, machine: Machine) -> float:
    """Seconds of one layer's exchanges: q, k, v and the output for heads, then k and v around the ring."""
    share = hidden_bytes / mesh.size
    ulysses = _send(4 * share / mesh.ulysses, mesh.ulysses, 1, machine)
    # A ring's neighbours are as far apart as one group of heads is wide.
    ring = _send(2 * share, mesh.ring, mesh.ulysses, machine)
    merged = machine.merge * share * mesh.ring if mesh.ring > 1 else 0.0
    return ulysses + ring + merged + machine.latency * (2 * (mesh.ulysses > 1) + (mesh.ring > 1))


def _send(each: float, ranks: int, apart: int, machine: Machine) -> float:
    """Seconds for `each` bytes to every other of `ranks` devices that stand `apart` devices from one another."""
    near = min(ranks, max(1, machine.node // apart))
    return each * ((near - 1) / machine.link + (ranks - near) / machine.network)


def _plan_bytes(run: Run, pairs: float) -> float:
    """What a head of one plan takes at rest, with a mask over `pairs` of blocks, its orders, and row sums.

    Row sums that no later plan reads go when the plan comes.
    """
    method = run.schedule.method
    orders = head_orders(method) * (_PACKED_ORDER if run.tokens >= PACKED_FROM else _ORDER) * run.tokens
    plan = pairs / 8 + orders
    lse = _LSE * run.tokens if method.uses_lse else 0
    again = bool(run._plans) and plans_after(run.schedule, min(run._plans), run.steps)
    return plan + lse if again else max(plan, lse)


def _memory(run: Run, mesh: Mesh) -> dict[str, float]:
    """Bytes on one device; weights are on every one, and text encoders and VAE too unless they are offloaded.

    What a layer's search and remainder need may fit into what the rest of a forward has freed, and is counted on top.
    """
    shape, machine, method = run.shape, run.machine, run.schedule.method
    hidden_bytes = run.tokens * shape.hidden * machine.itemsize
    batch = run.branches if shape.batched else 1
    heads, rows, columns = shape.heads / mesh.size, run.tokens / block_of(method), run.tokens / key_block_of(method)
    plans = search = terms = 0.0
    if min(run.sparse_densities, default=1.0) < 1:
        if method.scope != "grid":
            masks = {"call": run.branches, "sample": batch, "layer": 1}[method.scope]
            plans = shape.transformers * masks * shape.layers * heads * _plan_bytes(run, rows * columns)
        if method.scope in ("call", "sample"):
            search = _SEARCH_BYTES * batch * shape.heads * rows * columns  # ranks may compare all heads
        if run.schedule.planned_remainder in ("value", "mass"):
            terms = min(_TERMS_BYTES, batch * heads * (rows + columns) * shape.dim**2 * machine.itemsize)
    return {
        "transformer": float(shape.weights * machine.itemsize),
        "text encoder and VAE": float(shape.companions * machine.itemsize),
        "activations": _ACTIVATIONS * batch * hidden_bytes / mesh.size,
        "plans": plans,
        "search": search,
        "remainder": terms,
    }
