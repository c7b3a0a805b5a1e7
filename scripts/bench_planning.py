"""Time one plan of every method against one dense attention of 8,192 tokens on the CPU.

    python scripts/bench_planning.py --out docs/planning.json   # then scripts/methods_table.py puts it into the docs
    python scripts/bench_planning.py --methods adaspa,svg       # some of them

Plans are made on random queries and keys with the methods' default parameters, and with the row LSE of a dense step for
methods that reuse one. Dense attention and all methods take turns, and medians are compared, so that a busy machine
slows all alike. A static method plans once a grid: its first plan is timed, everybody else's first plan only warms up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench_cpu import environment, interleaved_medians
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_sparse.kernels import dense_attention
from dit_sparse.methods import METHODS, SeerAttention, find_method
from dit_sparse.methods.gate_file import Gate, write_gates
from dit_sparse.types import Method, Previous, Site, TokenGrid

GRID, HEADS, DIM = TokenGrid(8, 32, 32), 4, 64


@dataclass(frozen=True)
class Row:
    """One method; times in milliseconds."""

    method: str
    static: bool
    plan_ms: float
    dense_ms: float
    share_of_dense: float
    density: float


def measure(names: Sequence[str], rounds: int, grid: TokenGrid = GRID) -> list[Row]:
    """One row a method, in the order of `names`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, grid.num_tokens, DIM, generator=generator)
    previous, site = Previous(lse=dense_attention(q, k, v, return_lse=True)[1]), Site(grid)
    with TemporaryDirectory() as folder:
        return _measure(q, k, v, previous, site, {name: make(name, Path(folder)) for name in names}, rounds)


def make(name: str, folder: Path) -> Method:
    """A method with its default parameters; `seer` has gates of random weights, written to `folder`."""
    if name != "seer":
        return find_method(name)()
    path, size = folder / "gates.safetensors", 64
    gate = Gate(torch.randn(HEADS, DIM, size), torch.randn(HEADS, 3 * DIM, size))
    write_gates(path, {("transformer", 0): gate}, 64)
    return SeerAttention(str(path))


def _measure(
    q: Tensor, k: Tensor, v: Tensor, previous: Previous, site: Site, methods: dict[str, Method], rounds: int
) -> list[Row]:
    first, densities = {}, {}
    for name, method in methods.items():
        start = time.perf_counter()
        plan = method.plan(q, k, v, site, previous)
        first[name] = time.perf_counter() - start
        densities[name] = float(plan.density.mean())
    calls: dict[str, Callable[[], object]] = {"": lambda: dense_attention(q, k, v)}
    for name, method in methods.items():
        if method.scope != "grid":
            calls[name] = lambda method=method: method.plan(q, k, v, site, previous)
    medians = interleaved_medians(calls, rounds)
    dense = medians.pop("")
    rows = []
    for name, method in methods.items():
        seconds = medians.get(name, first[name])
        static = method.scope == "grid"
        rows.append(Row(name, static, seconds * 1e3, dense * 1e3, seconds / dense, densities[name]))
    return rows


def table(rows: Sequence[Row]) -> Table:
    dense = statistics.median(row.dense_ms for row in rows)
    out = Table(title=f"one plan; one dense attention takes {dense:.0f} ms")
    for column in ("method", "planned", "density", "ms", "share of dense"):
        out.add_column(column, justify="left" if column in ("method", "planned") else "right")
    for row in rows:
        kind = "once a grid" if row.static else "by the data"
        out.add_row(row.method, kind, f"{row.density:.3f}", f"{row.plan_ms:.1f}", f"{row.share_of_dense:.1%}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, by default all")
    parser.add_argument("--rounds", type=int, default=5, help="timed plans of each method")
    parser.add_argument("--out", type=Path, help="write the rows and the environment to this JSON file")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = measure(options.methods.split(","), options.rounds)
    Console(width=100).print(table(rows))
    if options.out is not None:
        shape = {"grid": str(GRID), "tokens": GRID.num_tokens, "heads": HEADS, "dim": DIM, "dtype": "float32"}
        report = {"environment": environment(), "shape": shape, "rounds": options.rounds}
        report["rows"] = [asdict(row) for row in rows]
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
