"""Time block-sparse attention on a GPU: every backend, shape and density against the fastest dense attention.

    python scripts/bench_kernels.py --out kernels.json                  # everything; some minutes on one GPU
    python scripts/bench_kernels.py --shapes wan-1.3b flux --blocks 64  # a part of it

"Ideal" is density x the fastest dense kernel of the run. Masks are random a head with equally many blocks in every row,
which is the worst case for caches. Every result is compared with float64 attention on sampled rows before it is timed.
Times are medians by CUDA events; inputs rotate among copies that exceed the L2 cache together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.kernels import get_backend
from dit_sparse.types import AttentionPlan, TokenOrder

L2_BYTES = 64 << 20
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Shape:
    """One model's self-attention, batch 1."""

    heads: int
    dim: int
    tokens: int


SHAPES = {
    "wan-1.3b": Shape(12, 128, 21 * 30 * 52),
    "wan-14b": Shape(40, 128, 21 * 45 * 80),
    "hunyuan": Shape(24, 128, 33 * 45 * 80 + 256),
    "cogvideox-5b": Shape(48, 64, 13 * 30 * 45 + 226),
    "flux": Shape(24, 128, 64 * 64 + 512),
    "flux-2k": Shape(24, 128, 128 * 128 + 512),
}
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds. `ideal_ratio` is over density x the fastest dense kernel."""

    shape: str
    block: int
    kernel: str
    density: float
    time_ms: float
    tflops: float
    ideal_ratio: float
    error: float


def inputs(shape: Shape, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Copies of q, k, v `[1, H, N, D]` that are larger than the L2 cache together."""
    size = (1, shape.heads, shape.tokens, shape.dim)
    nbytes = 3 * shape.heads * shape.tokens * shape.dim * dtype.itemsize
    draw = [tuple(torch.randn(size, device="cuda", dtype=dtype) for _ in range(3))]
    while nbytes * len(draw) < 2 * L2_BYTES:
        draw.append(tuple(x.clone() for x in draw[0]))
    return draw


def random_plan(shape: Shape, block: int, density: float) -> AttentionPlan:
    """Plan with random blocks a head, equally many in every row."""
    offsets = torch.tensor([*range(0, shape.tokens, block), shape.tokens], device="cuda")
    order = TokenOrder.from_index(torch.arange(shape.tokens, device="cuda"), offsets, is_identity=True)
    blocks = order.num_blocks
    scores = torch.rand(1, shape.heads, blocks, blocks, device="cuda")
    top = scores.topk(max(1, round(density * blocks)), -1).indices
    return AttentionPlan.from_kept(order, torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True))


def relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None) -> float:
    """Relative error of some rows of every head against float64.

    Raises:
        RuntimeError: it is more than twice the error that rounding the inputs to their dtype explains.
    """
    rows = torch.randint(0, q.shape[2], (CHECKED_ROWS,), device=q.device)
    rows[0] = q.shape[2] - 1
    worst = 0.0
    for head in range(q.shape[1]):
        scores = q[0, head, rows].double() @ k[0, head].double().T * q.shape[-1] ** -0.5
        if plan is not None:
            mask = plan.block_mask
            blocks = mask.full_blocks[0, head][mask.block_of(mask.q_offsets)[0, 0][rows]]
            scores.masked_fill_(~blocks[:, mask.block_of(mask.k_offsets)[0, 0]], float("-inf"))
        want = scores.softmax(-1) @ v[0, head].double()
        worst = max(worst, float((out[0, head, rows] - want).norm() / want.norm()))
    if not worst < 2e-2:
        raise RuntimeError(f"relative error {worst:.1e} against float64, allowed is 2e-2")
    return worst


def median_ms(call: Callable[[Tensor, Tensor, Tensor], object], sets: list, rounds: int) -> float:
    """Median milliseconds of `call` by CUDA events, over rotating inputs."""
    for i in range(3):
        call(*sets[i % len(sets)])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for i, (start, stop) in enumerate(events):
        start.record()
        call(*sets[i % len(sets)])
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def measure(name: str, shape: Shape, blocks: list[int], densities: list[float], backends: list[str], rounds: int):
    """Rows of one shape, dense kernels first."""
    torch.manual_seed(0)
    sets = inputs(shape, torch.bfloat16)
    flops = 4 * shape.heads * shape.tokens**2 * shape.dim
    found: list[tuple[int, str, float, float, float]] = []
    for label, backend in DENSE.items():

        def dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        error = relative_error(dense(*sets[0]), *sets[0], None)
        found.append((0, label, 1.0, median_ms(dense, sets, rounds), error))
    fastest = min(time for _, _, _, time, _ in found)
    for block in blocks:
        for density in densities:
            plan = random_plan(shape, block, density)
            exact = float(plan.density.mean())
            for backend_name in backends:
                forward = get_backend(backend_name).forward

                def sparse(q: Tensor, k: Tensor, v: Tensor, forward=forward, plan=plan) -> Tensor:
                    return forward(q, k, v, plan, scale=q.shape[-1] ** -0.5, return_lse=False)[0]

                error = relative_error(sparse(*sets[0]), *sets[0], plan)
                found.append((block, backend_name, exact, median_ms(sparse, sets, rounds), error))
    return [
        Row(name, block, kernel, density, time, density * flops / time / 1e9, time / (density * fastest), error)
        for block, kernel, density, time, error in found
    ]


def table(rows: list[Row]) -> Table:
    out = Table(title="block-sparse attention, bfloat16, batch 1; x ideal = time / (density x fastest dense)")
    for column in ("shape", "block", "kernel", "density", "ms", "TFLOP/s", "x ideal", "error"):
        out.add_column(column, justify="right")
    for row in rows:
        numbers = (f"{row.density:.3f}", f"{row.time_ms:.3f}", f"{row.tflops:.0f}", f"{row.ideal_ratio:.2f}")
        out.add_row(row.shape, str(row.block or "dense"), row.kernel, *numbers, f"{row.error:.1e}")
    return out


def environment() -> dict[str, str | None]:
    """Where the numbers come from."""
    import triton

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
        "commit": git.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--blocks", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--backends", nargs="+", default=["triton", "flex"])
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each kernel")
    parser.add_argument("--out", type=Path, help="write the rows and the environment to this JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; scripts/bench_cpu.py times the CPU kernels")
    torch.set_grad_enabled(False)
    rows: list[Row] = []
    for name in options.shapes:
        rows += measure(name, SHAPES[name], options.blocks, options.densities, options.backends, options.rounds)
        if options.out is not None:
            # After every shape, so that a run cut short keeps what it has.
            report = {"environment": environment(), "rounds": options.rounds, "rows": [asdict(row) for row in rows]}
            options.out.write_text(json.dumps(report, indent=2) + "\n")
    Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()
