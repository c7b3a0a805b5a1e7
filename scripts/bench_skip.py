"""Time attention that skips blocks against dense attention, by the share that is skipped.

    python scripts/bench_skip.py                          # on a GPU; with --device cpu and --tokens 4096 on a CPU
    python scripts/bench_skip.py --out skip.json

Keys of some blocks, drawn at random, are moved so that their scores lie far below all others: a given share of the
blocks is skipped, and the output stays that of dense attention, with which it is compared before it is timed. All
kernels take turns. A skipped block saves half of its work at most: its scores are computed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import bench_cpu
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_sparse import SkipSoftmax, skipping_attention, sparse_attention
from dit_sparse.bench.report import environment
from dit_sparse.bench.timing import check, in_turns
from dit_sparse.kernels import dense_attention
from dit_sparse.types import AttentionPlan, Site, TokenGrid

HEADS, DIM = 12, 128
THRESHOLD, DEPTH = 1e-3, 20.0
"""Blocks whose weights are below THRESHOLD are skipped; moved keys have those of exp(-DEPTH)."""


@dataclass(frozen=True)
class Row:
    """One kernel; `skipped` is the share of the query-key pairs that it says it skipped."""

    kernel: str
    block: int
    skipped: float
    ms: float
    over_dense: float
    relative_error: float


def inputs(tokens: int, block: int, share: float, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v `[1, H, N, D]`; the keys of `share` of the blocks score low, those of the first one never."""
    draw = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, tokens, DIM, device=device, generator=draw)
    blocks = -(-tokens // block)
    low = torch.rand(blocks, device=device, generator=draw).argsort().argsort() < round(share * blocks)
    low[0] = False
    q[..., 0] = DIM**0.25
    k[..., 0] = -DEPTH * DIM**0.25 * low.repeat_interleave(block)[:tokens]
    return [x.to(dtype) for x in (q, k, v)]


def measure(
    tokens: int, blocks: Sequence[int], shares: Sequence[float], device: torch.device, rounds: int
) -> list[Row]:
    """Rows of dense attention, of the kernel without skipping, and of the one with it at each share."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for block in blocks:
        method = SkipSoftmax(scale_factor=THRESHOLD * tokens, block=block)
        plan = method.plan(torch.empty(0, device=device), *[torch.empty(0)] * 2, Site(TokenGrid(1, 1, tokens)), None)
        rows += _measure(plan, block, {share: inputs(tokens, block, share, device, dtype) for share in shares}, rounds)
    return rows


def _measure(plan: AttentionPlan, block: int, data: dict[float, list[Tensor]], rounds: int) -> list[Row]:
    first, unskipped = next(iter(data.values())), plan.with_skip(0.0)
    kernel = "triton" if first[0].is_cuda else "gather"
    calls = {
        "dense": lambda _: dense_attention(*first),
        kernel: lambda _: sparse_attention(*first, unskipped, backend=kernel),
    }
    pairs = HEADS * plan.q_order.num_tokens**2
    found = {name: (0.0, check(call(0), *first, None)) for name, call in calls.items()}
    for share, tensors in data.items():
        name = f"{kernel}, skipping {share:g}"
        out, skipped = skipping_attention(*tensors, plan)
        found[name] = (float(skipped.sum()) / pairs, check(out, *tensors, None))
        calls[name] = lambda _, tensors=tensors: skipping_attention(*tensors, plan)
    times = in_turns(calls, rounds)
    return [Row(name, block, *found[name][:1], ms, ms / times["dense"], found[name][1]) for name, ms in times.items()]


def table(rows: Sequence[Row]) -> Table:
    out = Table()
    for column in ("kernel", "block", "skipped", "ms", "x dense", "relative error"):
        out.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        numbers = f"{row.skipped:.3f}", f"{row.ms:.2f}", f"{row.over_dense:.2f}", f"{row.relative_error:.1e}"
        out.add_row(row.kernel, str(row.block), *numbers)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32760, help="by default those of Wan 1.3B at 480p")
    parser.add_argument("--blocks", default="64,128", help="tokens a block")
    parser.add_argument("--shares", default="0,0.5,0.75,0.9", help="of the key blocks whose scores are low")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the rows and the environment to this JSON file")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    blocks, shares = [int(b) for b in options.blocks.split(",")], [float(s) for s in options.shares.split(",")]
    rows = measure(options.tokens, blocks, shares, torch.device(options.device), options.rounds)
    Console(width=100).print(table(rows))
    if options.out is not None:
        shape = {"tokens": options.tokens, "heads": HEADS, "dim": DIM}
        where = environment(torch.device(options.device)) if options.device != "cpu" else bench_cpu.environment()
        report = {"environment": where, "shape": shape, "rounds": options.rounds}
        report["rows"] = [asdict(row) for row in rows]
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
