"""Time what stands around self-attention in the demo model on a CPU: by diffusers, and as sparse runs compute it.

    python scripts/bench_around.py [--rounds 9] [--out around.json]
    OMP_NUM_THREADS=1 python scripts/bench_around.py --runs 3  # whole runs, by the processor time that they take

Both take turns, and medians are reported, in milliseconds of one call; their results must agree to 1e-4 of the largest.
Whole runs are timed by the clock of the process, which a busy machine disturbs little; threads that wait count as well,
so there must be one alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_cpu import environment, interleaved_medians
from diffusers import WanPipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_sparse import preset, sparsify, unsparsify
from dit_sparse.bench.report import write_report
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.eval import compare
from dit_sparse.pipelines import wan_block
from dit_sparse.pipelines.conv3d import OneDnn

PROMPT = "A big red ball moving left on a gray background."
GRID = (8, 24, 32)  # latent frames, rows and columns of the demo model's video
_TOLERANCE = 1e-4

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


@dataclass(frozen=True)
class Part:
    """Milliseconds of one call; `calls` that a run of the demo model's default has."""

    name: str
    calls: int
    diffusers_ms: float
    ours_ms: float


def pairs(pipe: Any) -> dict[str, tuple[int, Pair]]:
    """Calls in a run, and both ways to compute each part."""
    block = pipe.transformer.blocks[0]
    text, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)
    alike = wan_block.alike_at_end(text)
    text = pipe.transformer.condition_embedder.text_embedder(text)
    hidden = torch.randn(1, GRID[0] * GRID[1] * GRID[2], block.norm2.normalized_shape[0])
    latents = torch.randn(1, pipe.vae.config.z_dim, *GRID)
    # Two forwards a step, as guidance needs.
    calls = 2 * int(demo_defaults["num_inference_steps"]) * len(pipe.transformer.blocks)

    def cross_attend(whole: bool) -> Tensor:
        kept, mask = (text, None) if whole else wan_block.merged(text, alike)
        return block.attn2(hidden, kept, mask, None)

    def decode(fast: bool) -> Tensor:
        wanted[0] = fast
        return pipe.vae.decode(latents).sample

    wanted = [False]
    OneDnn(lambda: wanted[0]).install(pipe.vae.decoder)
    return {
        "cross-attention": (calls, (partial(cross_attend, True), partial(cross_attend, False))),
        "feed-forward": (calls, (partial(block.ffn, hidden), partial(wan_block.feed_forward, block.ffn, hidden))),
        "VAE decoder": (1, (partial(decode, False), partial(decode, True))),
    }


def load() -> Any:
    """The demo model."""
    pipe = WanPipeline.from_pretrained(demo_model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def measure(rounds: int) -> list[Part]:
    """Time all parts.

    Raises:
        RuntimeError: both ways differ by more than rounding.
    """
    torch.manual_seed(0)
    pipe = load()
    parts = []
    for name, (calls, (theirs, ours)) in pairs(pipe).items():
        want = theirs()
        if not (ours() - want).abs().max() <= _TOLERANCE * want.abs().max():
            raise RuntimeError(f"{name} differs from diffusers' by more than rounding")
        seconds = interleaved_medians({"diffusers": theirs, "ours": ours}, rounds)
        parts.append(Part(name, calls, seconds["diffusers"] * 1e3, seconds["ours"] * 1e3))
    return parts


@dataclass(frozen=True)
class Run:
    """Processor seconds of whole runs with one seed, and fidelity against dense."""

    seed: int
    dense_s: float
    sparse_s: float
    psnr: float


def measure_run(pipe: Any, seed: int) -> Run:
    """Plain diffusers and the demo's preset."""

    def render() -> tuple[float, Any]:
        start = time.process_time()
        frames = pipe(PROMPT, generator=torch.Generator().manual_seed(seed), output_type="np", **demo_defaults).frames
        return time.process_time() - start, frames[0]

    dense_s, dense = render()
    sparsify(pipe, preset("demo"))
    sparse_s, sparse = render()
    unsparsify(pipe)
    return Run(seed, dense_s, sparse_s, float(compare(sparse.clip(0, 1), dense.clip(0, 1)).psnr))


def table(parts: list[Part]) -> Table:
    out = Table(title="milliseconds a call, and seconds that a run saves")
    for column in ("part", "calls a run", "diffusers", "ours", "saves, s"):
        out.add_column(column, justify="right")
    for part in parts:
        saved = part.calls * (part.diffusers_ms - part.ours_ms) / 1e3
        out.add_row(part.name, str(part.calls), f"{part.diffusers_ms:.1f}", f"{part.ours_ms:.1f}", f"{saved:.1f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="calls of each, in turns")
    parser.add_argument("--runs", type=int, default=0, help="whole runs in place of parts, with as many seeds")
    parser.add_argument("--out", type=Path, help="where to write a report in JSON")
    args = parser.parse_args()
    if args.runs and torch.get_num_threads() > 1:
        parser.error(f"--runs needs a single thread, got {torch.get_num_threads()}; set OMP_NUM_THREADS=1")
    if args.runs:
        pipe = load()
        runs = []
        for seed in range(args.runs):
            runs.append(run := measure_run(pipe, seed))
            times = f"{run.sparse_s:.1f} s / {run.dense_s:.1f} s, {run.dense_s / run.sparse_s:.2f}x"
            print(f"seed {seed}: {times}, {run.psnr:.2f} dB", flush=True)
        report = environment() | {"runs": [asdict(run) for run in runs]}
    else:
        parts = measure(args.rounds)
        Console().print(table(parts))
        report = environment() | {"parts": [asdict(part) for part in parts]}
    if args.out is not None:
        write_report(report, args.out)


if __name__ == "__main__":
    main()
