"""Time the CPU kernels against torch's dense SDPA: ratio to dense, and to density x dense ("ideal").

    python scripts/bench_cpu.py                  # the table, about three minutes on two cores
    python scripts/bench_cpu.py --quick          # the demo model's shape only
    python scripts/bench_cpu.py --flex --out cpu.json
    python scripts/bench_cpu.py --quick --remainder mean value mass  # what each costs over none, in the same turns

Masks are random a head and keep equally many blocks a row. Each result is compared with the reference backend before it
is timed. Dense and sparse calls take turns, and the medians are reported, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_sparse.bench.report import commit
from dit_sparse.kernels import block_mass, dense_attention, get_backend, output_errors, refusal
from dit_sparse.kernels.reference import mask_rows
from dit_sparse.types import REMAINDERS, AttentionPlan, Remainder, TokenOrder

DENSITIES = (1.0, 0.5, 0.25, 0.125, 0.0625)
SEARCHED = 8  # queries a key block that output_errors looks at, an eighth of 64


@dataclass(frozen=True)
class Case:
    """One shape; `block` tokens to a key block, and `times` as many to a query block."""

    tokens: int
    dim: int
    heads: int
    dtype: str
    block: int
    times: int = 1


DEMO = Case(6144, 64, 3, "float32", 64)
CASES = (
    DEMO,
    Case(6144, 64, 3, "float32", 64, 2),
    Case(6144, 64, 3, "float32", 128),
    Case(8192, 128, 1, "float32", 64),
    Case(8192, 128, 1, "float32", 128),
    Case(6144, 64, 3, "bfloat16", 64),
    Case(6144, 64, 3, "float16", 64),
)


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds, medians. `ideal_ratio` is over density x dense, empty for searches."""

    case: Case
    kernel: str
    remainder: str
    density: float
    time_ms: float
    dense_ms: float
    dense_ratio: float
    ideal_ratio: float | None


def even_order(tokens: int, block: int) -> TokenOrder:
    offsets = torch.tensor([*range(0, tokens, block), tokens])
    return TokenOrder.from_index(torch.arange(tokens), offsets, is_identity=True)


def random_plan(case: Case, density: float) -> AttentionPlan:
    """Plan with random blocks a head, equally many in every row."""
    q_order, kv_order = orders(case)
    scores = torch.rand(1, case.heads, q_order.num_blocks, kv_order.num_blocks)
    top = scores.topk(max(1, round(density * kv_order.num_blocks)), -1).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True)
    return AttentionPlan.from_kept(q_order, kept, kv_order=kv_order)


def orders(case: Case) -> tuple[TokenOrder, TokenOrder]:
    """Of queries and of keys."""
    return even_order(case.tokens, case.block * case.times), even_order(case.tokens, case.block)


def interleaved_medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def check(name: str, plan: AttentionPlan, inputs: tuple[Tensor, Tensor, Tensor], scale: float) -> None:
    """Compare backend `name` with the reference in float64; also its warm-up.

    Raises:
        RuntimeError: its error is more than twice that of torch's masked SDPA, which has no remainder, plus
            two units in the last place.
    """
    q, k, v = inputs
    out = get_backend(name).forward(*inputs, plan, scale=scale, return_lse=False)[0]
    want, of_kept = (
        get_backend("reference").forward(q.double(), k.double(), v.double(), p, scale=scale, return_lse=False)[0]
        for p in (plan, plan.with_remainder("none"))
    )
    mask = mask_rows(plan, q.shape[0], q.shape[1], 0, q.shape[2])
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    error = (out - want).abs().max()
    # Not `error > ...`, which is false for NaN.
    if not error <= 2 * (plain - of_kept).abs().max() + 2 * torch.finfo(q.dtype).eps * want.abs().max():
        raise RuntimeError(f"{name} with remainder {plan.remainder!r} differs from the reference by {float(error):.2e}")


def measure(case: Case, backends: list[str], remainders: list[Remainder], rounds: int) -> list[Row]:
    """All rows of one case, every kernel and density in turn with dense SDPA."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    q, k, v = (torch.randn(1, case.heads, case.tokens, case.dim).to(dtype) for _ in range(3))
    scale = case.dim**-0.5
    both = q_order, kv_order = orders(case)
    lse = dense_attention(q, k, v, return_lse=True)[1]
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: dense_attention(q, k, v),
        "block_mass": lambda: block_mass(q, k, lse, q_order.offsets, kv_order.offsets, scale=scale),
        "output_errors": lambda: output_errors(q, k, v, *both, rows=SEARCHED * case.times, scale=scale),
    }
    plans: dict[str, AttentionPlan] = {}
    for density in DENSITIES:
        drawn = random_plan(case, density)
        for name in backends:
            for plan in [drawn, *(drawn.with_remainder(remainder) for remainder in remainders)]:
                if refusal(get_backend(name), q, k, v, plan) is not None:
                    continue
                check(name, plan, (q, k, v), scale)
                label = f"{name} {density} {plan.remainder}"
                plans[label] = plan
                calls[label] = partial(get_backend(name).forward, q, k, v, plan, scale=scale, return_lse=False)
    medians = interleaved_medians(calls, rounds)
    dense = medians.pop("dense")
    rows = []
    for label, seconds in medians.items():
        plan = plans.get(label)
        density = 1.0 if plan is None else float(plan.density.mean())
        ideal = None if plan is None else seconds / dense / density
        remainder = "" if plan is None else plan.remainder
        rows.append(Row(case, label.split()[0], remainder, density, seconds * 1e3, dense * 1e3, seconds / dense, ideal))
    return rows


def table(rows: list[Row]) -> Table:
    out = Table(title="time / dense SDPA, and / (density x dense SDPA)")
    for column in (
        "tokens",
        "dim",
        "heads",
        "dtype",
        "block",
        "times",
        "kernel",
        "remainder",
        "density",
        "ms",
        "dense ms",
        "x dense",
        "x ideal",
    ):
        out.add_column(column, justify="right")
    for row in rows:
        ideal = "" if row.ideal_ratio is None else f"{row.ideal_ratio:.2f}"
        numbers = (f"{row.density:.3f}", f"{row.time_ms:.1f}", f"{row.dense_ms:.1f}", f"{row.dense_ratio:.3f}", ideal)
        out.add_row(*(str(value) for value in asdict(row.case).values()), row.kernel, row.remainder, *numbers)
    return out


def environment() -> dict[str, object]:
    """Where the numbers come from."""
    return {
        "device": "cpu",
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo model's shape only")
    parser.add_argument("--flex", action="store_true", help="time compiled FlexAttention too; compiles once a shape")
    parser.add_argument("--remainder", nargs="+", choices=REMAINDERS[1:], default=["value"], help="beside none")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each kernel")
    parser.add_argument("--out", type=Path, help="write the rows and the environment to this JSON file")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    backends = ["gather", "flex"] if options.flex else ["gather"]
    cases = CASES[:1] if options.quick else CASES
    rows = [row for case in cases for row in measure(case, backends, options.remainder, options.rounds)]
    Console(width=120).print(table(rows))
    if options.out is not None:
        report = {"environment": environment(), "rounds": options.rounds, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
