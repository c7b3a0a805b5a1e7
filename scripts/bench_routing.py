"""Time and memory of Sol-Attn with its blocks planned first, by a map of scores, or found in the kernel as it attends.

    python scripts/bench_routing.py --out routing.json          # on a GPU

Random queries and keys whose blocks have means of their own, in the order of the tokens; a tau for each wanted density.
Every output is compared with float64 under its own plan before it is timed, and all kernels take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_sparse import SolAttention, sparse_attention
from dit_sparse.bench.report import environment, write_report
from dit_sparse.bench.shapes import SHAPES
from dit_sparse.bench.timing import Call, check, in_turns
from dit_sparse.kernels import Route, dense_attention, deviations, routed_attention, routed_plan
from dit_sparse.types import TokenGrid

BACKENDS = ("hopper", "triton")


@dataclass(frozen=True)
class Row:
    """One way to compute; `ms` counts its planning, `plan_ms` is the planning alone where there is one.

    `mib` is the most memory that a call took, its output counted.
    """

    shape: str
    block: int
    density: float
    way: str
    ms: float
    over_dense: float
    relative_error: float
    mib: float
    plan_ms: float | None = None


def inputs(name: str, block: int, device: torch.device) -> list[Tensor]:
    """q, k, v `[1, H, N, D]` in bfloat16."""
    shape = SHAPES[name]
    draw = torch.Generator(device).manual_seed(0)
    size = (1, shape.heads, shape.tokens, shape.dim)
    q, k, v = (torch.randn(size, device=device, generator=draw) for _ in range(3))
    for x in (q, k):
        means = torch.randn(1, shape.heads, -(-shape.tokens // block), shape.dim, device=device, generator=draw)
        x += 0.3 * means.repeat_interleave(block, 2)[:, :, : shape.tokens]
    return [x.bfloat16() for x in (q, k, v)]


def tau_for(q: Tensor, k: Tensor, route: Route, density: float) -> float:
    """The limit above which `density` of all blocks are, by a sample of them."""
    apart = deviations(q, k, route).flatten()
    sample = apart[torch.randint(0, len(apart), (1 << 22,), device=q.device)].sort().values
    return float(sample[-round(density * len(sample))])


def measure(name: str, block: int, densities: Sequence[float], device: torch.device, rounds: int) -> list[Row]:
    grid = TokenGrid(1, 1, SHAPES[name].tokens)  # along a line a Morton curve leaves the tokens where they are
    q, k, v = inputs(name, block, device)
    route = SolAttention(block=block, in_kernel=True).route(grid, device)
    assert route is not None
    taus = [tau_for(q, k, route, density) for density in densities]
    return [row for tau in taus for row in _measure(name, block, [q, k, v], replace(route, tau=tau), rounds)]


def _measure(name: str, block: int, tensors: list[Tensor], route: Route, rounds: int) -> list[Row]:
    q, k, v = tensors

    def planned(backend: str) -> Tensor:
        return sparse_attention(q, k, v, routed_plan(q, k, route), backend=backend, in_order=True)

    plan = routed_plan(q, k, route)
    routed, own = routed_attention(q, k, v, route)
    found = {"dense": (dense_attention(q, k, v), None), "routed": (routed, own)}
    found |= {backend: (planned(backend), plan) for backend in BACKENDS}
    errors = {way: check(out, q, k, v, by) for way, (out, by) in found.items()}
    kept = {way: 1.0 if by is None else float(by.density.mean()) for way, (_, by) in found.items()}
    del found
    calls: dict[str, Call] = {
        "dense": lambda _: dense_attention(q, k, v),
        "routed": lambda _: routed_attention(q, k, v, route),
        "plan": lambda _: routed_plan(q, k, route),
        "hopper": lambda _: planned("hopper"),
        "triton": lambda _: planned("triton"),
    }
    taken = {way: _memory(call) for way, call in calls.items()}
    times = in_turns(calls, rounds)
    return [
        Row(
            name, block, kept[way], way, times[way], times[way] / times["dense"], error, taken[way],
            times["plan"] if way in BACKENDS else None,
        )
        for way, error in errors.items()
    ]  # fmt: skip


def _memory(call: Call) -> float:
    """MiB that a call takes at most."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def table(rows: Sequence[Row]) -> Table:
    out = Table()
    for column in ("shape", "block", "density", "way", "ms", "of which the plan", "x dense", "MiB", "relative error"):
        out.add_column(column, justify="left" if column in ("shape", "way") else "right")
    for row in rows:
        planned = "" if row.plan_ms is None else f"{row.plan_ms:.2f}"
        numbers = f"{row.ms:.2f}", planned, f"{row.over_dense:.3f}", f"{row.mib:.0f}", f"{row.relative_error:.1e}"
        out.add_row(row.shape, str(row.block), f"{row.density:.3f}", row.way, *numbers)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="wan-1.3b,wan-14b,hunyuan", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--blocks", default="64,128", help="tokens a block")
    parser.add_argument("--densities", default="0.2,0.1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the rows and the environment to this JSON file")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    device = torch.device("cuda")
    rows = []
    for name in options.shapes.split(","):
        for block in map(int, options.blocks.split(",")):
            rows += measure(name, block, [float(d) for d in options.densities.split(",")], device, options.rounds)
            report = {"environment": environment(device), "rounds": options.rounds, "rows": [asdict(r) for r in rows]}
            if options.out is not None:
                write_report(report, options.out)
    Console(width=120).print(table(rows))


if __name__ == "__main__":
    main()
