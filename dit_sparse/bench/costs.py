"""Measures the coefficients of the cost model on a device: kernels, what comes beside them, and planning."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.bench.report import environment, write_report
from dit_sparse.bench.shapes import Shape, random_plan
from dit_sparse.cost import at_block, device_name, read_table, user_table
from dit_sparse.kernels import BACKENDS, dense_attention
from dit_sparse.methods import Neighborhood, all_methods
from dit_sparse.types import REMAINDERS, AttentionPlan, Method, Previous, Site, TokenGrid, TokenOrder

_BLOCKS = (64, 128)
_DENSITIES = (0.125, 0.5)
_DENSITY = 0.25
_ORACLES = ("dense", "seer")
"""Methods that are not timed: one plans nothing, the other needs a file."""

Inputs = tuple[Tensor, Tensor, Tensor]
Calls = dict[str, Callable[[], object]]
Row = tuple[int, float, float]
"""Block, density x seconds of dense attention, seconds measured."""


@dataclass(frozen=True)
class Sizes:
    """What is timed: heads, channels, and grids from the smallest to the largest."""

    heads: int
    dim: int
    grids: tuple[TokenGrid, ...]


CPU = Sizes(4, 64, (TokenGrid(4, 16, 16), TokenGrid(4, 16, 32), TokenGrid(4, 32, 32)))
GPU = Sizes(12, 128, (TokenGrid(4, 32, 32), TokenGrid(16, 32, 32), TokenGrid(32, 32, 32)))


def measure_for_user(device: torch.device | str) -> Path:
    """Measure `device`, and write it into the user's own table, which comes before the package's.

    Returns:
        The table's path.

    Raises:
        ValueError: there is a table that cannot be read.
    """
    device, path = torch.device(device), user_table()
    if path.exists():
        read_table(path)
    table = json.loads(path.read_text("utf-8")) if path.exists() else {}
    table[device_name(device)] = measure_costs(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(table, path)
    return path


def measure_costs(
    device: torch.device | str, *, rounds: int = 5, sizes: Sizes | None = None, methods: Sequence[str] | None = None
) -> dict[str, Any]:
    """The entry of `device` in a table of costs, ready for JSON.

    Everything of a size takes turns with dense attention, in float32 on a CPU and bfloat16 on a GPU, and the least
    times are compared: what another program takes of the machine only ever adds. Times are those of calls one after
    another, the host's share included.

    Args:
        device: where.
        rounds: turns.
        sizes: what is timed.
        methods: whose planning is timed; by default all.
    """
    device = torch.device(device)
    sizes = sizes or (GPU if device.type == "cuda" else CPU)
    with torch.no_grad():
        inputs = {grid: _inputs(sizes, grid, device) for grid in sizes.grids}
        backends = {name: _kernel(name, sizes, inputs, rounds) for name in _backends(device)}
        plans = _plans(inputs, rounds, methods)
        largest = sizes.grids[-1]
        dense = _seconds({"": functools.partial(dense_attention, *inputs[largest])}, device, rounds)[""]
    found = environment(device)
    threads = 0 if device.type == "cuda" else torch.get_num_threads()
    where = f"measured with torch {found['torch']} on {found['device']}" + (f", threads: {threads}" if threads else "")
    measured = {
        "flops": Shape(sizes.heads, sizes.dim, largest.num_tokens).flops / dense,
        "threads": threads,
        "backends": backends,
        "plans": plans,
        "other_plans": plans.get("adaspa", [0.3, 0.0]),
    }
    return {"source": where, "environment": found, **_short(measured)}


def _short(value: Any) -> Any:
    """`value` with its numbers to four digits."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _inputs(sizes: Sizes, grid: TokenGrid, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, sizes.heads, grid.num_tokens, sizes.dim, generator=generator).to(device, dtype)
    return q, k, v


def _backends(device: torch.device) -> list[str]:
    names = ("hopper", "triton") if device.type == "cuda" else ("gather",)
    return [name for name in names if BACKENDS[name].unavailable(device) is None]


def _seconds(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Least seconds of each call; all take turns, and on a GPU each turn is of ten calls one after another.

    On one CPU thread they are the processor's, which other programs take nothing of.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    repeat = 10 if device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            for _ in range(repeat):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first turn compiles and allocates
                times[name].append((clock() - start) / repeat)
    return {name: min(own) for name, own in times.items()}


def _kernel(name: str, sizes: Sizes, inputs: Mapping[TokenGrid, Inputs], rounds: int) -> dict[str, Any]:
    """`KernelCosts` of the backend `name`, as JSON."""
    rows: list[Row] = []
    for grid, qkv in inputs.items():
        shape = Shape(sizes.heads, sizes.dim, grid.num_tokens)
        drawn = itertools.product(_BLOCKS, _DENSITIES)
        plans = {f"{block} {share}": random_plan(shape, block, share, qkv[0].device) for block, share in drawn}
        times = _in_turns(name, qkv, plans, rounds)
        for label, plan in plans.items():
            rows.append((int(label.split()[0]), float(plan.density.mean()) * times["dense"], times[label]))
    call, kernel = _fit(rows)
    others = _others(name, shape, grid, qkv)
    times = _in_turns(name, qkv, others, rounds)
    cut = others["cut"].block_mask
    assert cut.partial_blocks is not None
    whole, partial = (float(blocks.double().mean()) for blocks in (cut.full_blocks, cut.partial_blocks))
    per_share = times["dense"] * at_block(kernel, shape.tokens / cut.num_q_blocks)
    return {
        "call": call,
        "kernel": {str(block): ratio for block, ratio in kernel.items()},
        "partial": max(1.0, ((times["cut"] - call) / per_share - whole) / partial),
        "move": max(0.0, (times["moved"] - times["none"]) / (shape.tokens * shape.heads * shape.dim)),
        "remainder": {
            own: max(0.0, (times[own] - times["none"]) / times["dense"]) for own in REMAINDERS if own in times
        },
    }


def _in_turns(name: str, qkv: Inputs, plans: Mapping[str, AttentionPlan], rounds: int) -> dict[str, float]:
    """Seconds of the backend `name` under each plan, and of "dense" attention."""
    calls: Calls = {
        label: functools.partial(sparse_attention, *qkv, plan, backend=name) for label, plan in plans.items()
    }
    calls["dense"] = functools.partial(dense_attention, *qkv)
    return _seconds(calls, qkv[0].device, rounds)


def _others(name: str, shape: Shape, grid: TokenGrid, qkv: Inputs) -> dict[str, AttentionPlan]:
    """Plans of blocks of 64: as they are, with each remainder, with tokens moved, and with blocks that are cut."""
    device = qkv[0].device
    plan = random_plan(shape, 64, _DENSITY, device)
    order = TokenOrder.from_index(torch.randperm(shape.tokens).to(device), plan.q_order.offsets)
    able = getattr(BACKENDS[name], "remainders", ("none",))
    found = {str(own): plan.with_remainder(own) for own in REMAINDERS if own in able}
    found["moved"] = AttentionPlan(order, order, plan.block_mask)
    # Its mask cuts blocks; what order its tokens stand in does not matter here.
    window = Neighborhood(density=_DENSITY, stride=(1, 1, 1)).plan(*qkv, Site(grid), None)
    identity = TokenOrder.from_index(
        torch.arange(shape.tokens, device=device), window.q_order.offsets, is_identity=True
    )
    found["cut"] = AttentionPlan(identity, identity, window.block_mask)
    return found


def _fit(rows: Sequence[Row]) -> tuple[float, dict[int, float]]:
    """The seconds of a call and the ratios by block that fit `time = call + ratio(block) ideal` best, relatively."""
    blocks = sorted({block for block, _, _ in rows})
    matrix = torch.tensor([[1.0, *(ideal * (b == block) for b in blocks)] for block, ideal, _ in rows]).double()
    measured = torch.tensor([seconds for *_, seconds in rows]).double()
    call, *ratios = torch.linalg.lstsq(matrix / measured[:, None], torch.ones_like(measured)).solution.tolist()
    if call < 0:
        ratios = [statistics.median(seconds / ideal for b, ideal, seconds in rows if b == block) for block in blocks]
    return max(0.0, call), dict(zip(blocks, ratios, strict=True))


def _plans(inputs: Mapping[TokenGrid, Inputs], rounds: int, names: Sequence[str] | None) -> dict[str, list[float]]:
    """`a` and `b` of each method: the time of a plan is `a + b / tokens` of dense attention's."""
    methods = {
        name: cls()
        for name, cls in all_methods().items()
        if name not in _ORACLES and cls.scope != "grid" and (names is None or name in names)
    }
    small, *_, large = inputs
    shares = [_plan_shares(methods, grid, inputs[grid], rounds) for grid in (small, large)]
    found = {}
    for name in methods:
        first, second = shares[0][name], shares[1][name]
        b = max(0.0, (first - second) / (1 / small.num_tokens - 1 / large.num_tokens))
        found[name] = [max(0.0, second - b / large.num_tokens), b]
    return found


def _plan_shares(methods: Mapping[str, Method], grid: TokenGrid, qkv: Inputs, rounds: int) -> dict[str, float]:
    device, site = qkv[0].device, Site(grid)
    previous = Previous(lse=dense_attention(*qkv, return_lse=True)[1])
    calls: Calls = {name: functools.partial(method.plan, *qkv, site, previous) for name, method in methods.items()}
    calls[""] = functools.partial(dense_attention, *qkv)
    times = _seconds(calls, device, rounds)
    return {name: times[name] / times[""] for name in methods}
