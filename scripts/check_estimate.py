"""Compare what `dit-sparse estimate` predicts with what transformers and exchanges take here, and renew the page on it.

    python scripts/check_estimate.py --out docs/scaling.json   # on this CPU; also compares with docs/benchmarks.md
    python scripts/check_estimate.py --tables docs/scaling.md  # renew the page's tables

Two speeds of the machine, of dense attention and of linear layers with all the rest, are fitted to dense steps. What
sparse attention and planning take against dense attention is the cost model's, so steps that make plans and that reuse
them are predicted. CPU times are the processor's own on one thread, medians: a busy machine does not matter much.
The exchange is `all_to_all_single` over gloo between two processes of this machine: latency and speed are fitted to two
sizes, two others are predicted, and times are the least of all rounds, slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from diffusers import WanTransformer3DModel
from e2e_models import Bare

from dit_sparse.bench.report import environment, write_report
from dit_sparse.estimate import Machine, Mesh, ModelShape, Run, estimate
from dit_sparse.estimate.predict import step_parts
from dit_sparse.estimate.request import build_run
from dit_sparse.methods import AdaSpa
from dit_sparse.pipelines.sparsify import sparsify, unsparsify
from dit_sparse.schedule import Schedule

ROOT = Path(__file__).resolve().parents[1]
_TEXT = 64
_STEPS, _WARMUP = 5, 0.4
"""Two dense steps, one that makes plans and two that reuse them."""

_KINDS = ("dense", "search", "cached")
_EXCHANGES = (2**16, 2**20, 2**22, 2**24)
"""Bytes a rank sends to every other; the first and last are fitted."""

_ADASPA: dict[str, Any] = {"method": "adaspa", "density": 0.2}
# Steps in seconds: model, layers timed, options, dense / search / cached.
MEASURED = (
    ("wan2.1-14b", 8, _ADASPA | {"block": 128}, (1.983, 1.185, 0.896)),
    ("wan2.1-14b", 8, _ADASPA | {"block": 64}, (1.979, 1.283, 0.938)),
    ("wan2.1-14b", 4, {"method": "lea", "density": 0.16}, (0.992, 0.688, 0.423)),
    ("wan2.1-1.3b", 30, _ADASPA | {"block": 64}, (0.449, 0.318, 0.232)),
    ("hunyuanvideo", 6, _ADASPA | {"block": 128}, (1.886, 1.061, 0.728)),
    ("hunyuanvideo", 6, _ADASPA | {"block": 64}, (1.872, 1.165, 0.783)),
    ("cogvideox-5b", 6, _ADASPA | {"block": 64, "guided": True}, (0.230, 0.200, 0.166)),
    ("flux.1-dev", 6, _ADASPA | {"block": 128, "size": "2048x2048"}, (0.073, 0.078, 0.067)),
    ("flux.1-dev", 6, _ADASPA | {"block": 64, "size": "2048x2048"}, (0.076, 0.082, 0.066)),
)
"""On one H200, from the table "A whole model" of docs/benchmarks.md; fused norms for Wan only."""

FITTED = (MEASURED[0], MEASURED[3])
"""The rows whose dense steps gave the H200's coefficients."""

# Whole loops of 50 steps: model, layers timed, options, seconds of a plain step on FlashAttention-3 over the speed-up.
LOOPS = (
    ("wan2.1-14b", 4, _ADASPA | {"block": 128}, 50 * 1.106 / 1.94),
    ("wan2.1-14b", 4, {"method": "lea", "density": 0.16}, 50 * 1.106 / 2.01),
    ("wan2.1-14b", 4, {"method": "lea", "density": 0.125, "warmup": 0.0}, 50 * 1.106 / 2.33),
)
"""On one H200, from docs/methods/lea.md."""


@dataclass(frozen=True)
class Small:
    """A transformer of Wan's architecture that a CPU can run."""

    heads: int
    feed_forward: int
    frames: int
    height: int
    width: int
    dim: int = 64
    layers: int = 2

    def shape(self) -> ModelShape:
        """Its cost; a token is one patch of 2 x 2 latents."""
        products = 6 + 2 * self.feed_forward / (self.heads * self.dim)
        return ModelShape(self.layers, self.heads, self.dim, 0, 0, products, (2, 2, 2), cross=_TEXT)

    def build(self) -> torch.nn.Module:
        """With random weights."""
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.dim,
            ffn_dim=self.feed_forward,
            num_layers=self.layers,
            text_dim=_TEXT,
            freq_dim=64,
        ).eval()

    def latents(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return (self.frames - 1) // 2 + 1, self.height, self.width


SMALL = (Small(4, 1024, 7, 48, 64), Small(8, 1024, 7, 48, 48), Small(4, 4096, 7, 64, 64))
DENSITIES = (0.5, 0.25)
Measured = dict[tuple[Small, float], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    parser.add_argument("--tables", type=Path, metavar="PAGE", help="renew the tables of a page; measure nothing")
    options = parser.parse_args()
    if options.tables is not None:
        renew_tables(options.tables)
        return
    torch.set_num_threads(1)
    measured = {(small, density): measure(small, density, options.rounds) for small in SMALL for density in DENSITIES}
    report = {"environment": environment(torch.device("cpu")), **forwards(measured)}
    # Written twice: what is measured with patience outlives an exchange that fails.
    write_report(report, options.out)
    report["exchange"] = exchange_rows(options.rounds)
    write_report(report, options.out)
    for row in (*report["forwards"], *report["exchange"]):
        print(f"{row['predicted'] / row['measured']:.2f}", row)


def forwards(measured: Measured) -> dict[str, Any]:
    """The fitted speeds, and every step's seconds, predicted and measured."""
    speeds = fit_speeds(measured)
    rows = []
    for (small, density), seconds in measured.items():
        size = {"heads": small.heads, "feed_forward": small.feed_forward, "tokens": _run(small, density).tokens}
        for kind in _KINDS:
            predicted = float(np.dot(work(small, density, kind), 1 / np.array(speeds)))
            found = {"density": density, "kind": kind, "predicted": predicted, "measured": seconds[kind]}
            rows.append(size | found | {"fitted": kind == "dense"})
    return {"speeds": dict(zip(("attention", "linear"), speeds, strict=True)), "forwards": rows}


def work(small: Small, density: float, kind: str) -> tuple[float, float]:
    """Operations of dense attention that attention and planning take as long as, and those of linear layers."""
    run = _run(small, density)
    parts = step_parts(run, Mesh(1, 1), kind)  # type: ignore[arg-type]
    return (parts["attention"] + parts["planning"]) * run.machine.attention.flops, parts["linear"]


def fit_speeds(measured: Measured) -> tuple[float, float]:
    """Operations a second of attention and of linear layers, by least squares of dense steps in relative terms."""
    steps = [(work(small, density, "dense"), seconds["dense"]) for (small, density), seconds in measured.items()]
    equations = np.array([np.array(own) / seconds for own, seconds in steps])
    attention, linear = map(float, np.linalg.lstsq(equations, np.ones(len(steps)), rcond=None)[0])
    if min(attention, linear) <= 0:
        raise SystemExit("the times are too noisy for two speeds to be fitted; run it again")
    return 1 / attention, 1 / linear


def measure(small: Small, density: float, rounds: int) -> dict[str, float]:
    """Seconds of a step of each kind on one thread."""
    torch.set_grad_enabled(False)
    pipe = Bare(small.build())
    inputs = {"encoder_hidden_states": torch.randn(1, _TEXT, _TEXT), "return_dict": False}
    sparsify(pipe, _schedule(density))
    taken: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for turn in range(rounds + 1):
        pipe.scheduler.set_timesteps(_STEPS)
        latents = torch.randn(1, 16, *small.latents())
        for step, kind in enumerate(("dense", "keeps row sums", "search", "cached", "cached")):
            timestep = pipe.scheduler.timesteps[step]
            start = time.process_time()
            with pipe.transformer.cache_context("cond"):
                velocity = pipe.transformer(latents, timestep=timestep.expand(1), **inputs)[0]
            took = time.process_time() - start
            latents = pipe.scheduler.step(velocity, timestep, latents)[0]
            if turn and kind in taken:
                taken[kind].append(took)
    unsparsify(pipe)
    return {kind: statistics.median(own) for kind, own in taken.items()}


def _schedule(density: float) -> Schedule:
    return Schedule(AdaSpa(density=density, block=64), warmup=_WARMUP, refresh=(), never_slower=False)


def _run(small: Small, density: float) -> Run:
    machine = Machine("fitted here", "cpu", "gather", 4, 1.0, {"fused": 0.0, "plain": 0.0}, 2e10, 1, 1.0, 1.0, 0.0, 0.0)
    return Run(small.shape(), small.frames, small.height, small.width, _STEPS, _schedule(density), machine)


def exchange_rows(rounds: int, ranks: int = 2) -> list[dict[str, Any]]:
    """Seconds of exchanges between processes, predicted and measured."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(_exchange, (ranks, port, rounds, queue), nprocs=ranks)
    seconds = dict(zip(_EXCHANGES, queue.get(), strict=True))
    low, high = _EXCHANGES[0], _EXCHANGES[-1]
    slope = (seconds[high] - seconds[low]) / (high - low)
    latency = max(0.0, seconds[low] - slope * low)
    link = {"ranks": ranks, "latency": latency, "speed": (ranks - 1) / slope}
    return [
        link | {"bytes_to_each": size, "predicted": latency + slope * size, "measured": seconds[size]}
        for size in _EXCHANGES[1:-1]
    ]


def _exchange(rank: int, ranks: int, port: int, rounds: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    least = []
    for size in _EXCHANGES:
        given, got = torch.zeros(2, ranks * size, dtype=torch.uint8).unbind()
        taken = []
        for _ in range(4 * rounds):
            dist.barrier()
            start = time.perf_counter()
            dist.all_to_all_single(got, given)
            slowest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            taken.append(float(slowest))
        least.append(min(taken))
    if rank == 0:
        results.put(least)
    dist.barrier()
    dist.destroy_process_group()


def renew_tables(page: Path) -> None:
    """Put the tables as they are now in the place of those with the same heading in `page`."""
    lines = page.read_text("utf-8").splitlines()
    report = json.loads(page.with_name("scaling.json").read_text("utf-8"))
    tables = prediction_rows(), gpu_rows(), loop_rows(), two_gpu_rows(), forward_table(report), exchange_table(report)
    for table in tables:
        start = lines.index(table[0])
        end = next((at for at in range(start, len(lines)) if not lines[at].startswith("|")), len(lines))
        lines[start:end] = table
    page.write_text("\n".join(lines) + "\n")


def forward_table(report: dict[str, Any]) -> list[str]:
    """The table of predicted over measured steps on a CPU."""
    lines = ["| heads, feed-forward, tokens | density | dense | search | cached |", "|---|---|---|---|---|"]
    rows = report["forwards"]
    for start in range(0, len(rows), len(_KINDS)):
        first = rows[start]
        cells = [
            f"{row['predicted']:.2f} / {row['measured']:.2f} = {row['predicted'] / row['measured']:.2f}"
            + (" (fitted)" if row["fitted"] else "")
            for row in rows[start : start + len(_KINDS)]
        ]
        size = f"{first['heads']}, {first['feed_forward']}, {first['tokens']:,}"
        lines.append(f"| {size} | {first['density']} | {' | '.join(cells)} |")
    return lines


def exchange_table(report: dict[str, Any]) -> list[str]:
    """The table of predicted over measured exchanges between processes."""
    lines = ["| processes | to each other one | predicted, ms | measured, ms | ratio |", "|---|---|---|---|---|"]
    for row in report["exchange"]:
        predicted, measured = 1e3 * row["predicted"], 1e3 * row["measured"]
        size = f"{row['bytes_to_each'] // 2**20} MiB"
        lines.append(f"| {row['ranks']} | {size} | {predicted:.2f} | {measured:.2f} | {predicted / measured:.2f} |")
    return lines


def gpu_steps() -> Iterator[tuple[tuple[Any, ...], str, float, float]]:
    """Row of `MEASURED`, kind of step, seconds predicted and measured on one H200."""
    for row in MEASURED:
        model, layers, options, measured = row
        run = build_run(model, device="h200", **{"guided": False} | options)
        for kind, seconds in zip(_KINDS, measured, strict=True):
            parts = step_parts(run, Mesh(1, 1), kind)  # type: ignore[arg-type]
            yield row, kind, sum(parts.values()) * layers / run.shape.layers, seconds


def gpu_loops() -> Iterator[tuple[str, Run, float, float]]:
    """Model, run, and seconds of its loop predicted and measured, on one H200; Wan 1.3B's are of docs/frontier.json."""
    for model, layers, options, seconds in LOOPS:
        run = build_run(model, device="h200", guided=False, **options)
        yield model, run, estimate(run).seconds * layers / run.shape.layers, seconds
    report = json.loads((ROOT / "docs" / "frontier.json").read_text("utf-8"))
    device = "h100" if "H100" in report["environment"]["device"] else "h200"
    run = build_run("wan2.1-1.3b", device=device, guided=False, steps=report["steps"])
    for row in sorted(report["rows"], key=lambda row: (row["config"]["warmup"], row["config"].get("density") or 0.0)):
        schedule = Schedule.from_config(row["config"])
        if schedule.method.name == "lea" or (schedule.method == AdaSpa() and schedule.remainder == "method"):
            own = replace(run, schedule=replace(schedule, never_slower=False))
            yield "wan2.1-1.3b", own, estimate(own).seconds * report["layers"] / run.shape.layers, row["seconds"]


def two_gpu_steps() -> Iterator[tuple[Mesh, str, float, float]]:
    """Mesh, kind of step, seconds predicted and measured on one and two H100s, as docs/parallel.json has them."""
    report = json.loads((ROOT / "docs" / "parallel.json").read_text("utf-8"))
    run = build_run("wan2.1-14b", method="adaspa", density=0.2, block=128, device="h100", guided=False)
    for entry in report["meshes"]:
        mesh = Mesh(entry["ulysses"], entry["ring"])
        for kind in _KINDS:
            predicted = sum(step_parts(run, mesh, kind).values()) * report["layers"] / run.shape.layers  # type: ignore[arg-type]
            yield mesh, kind, predicted, entry["methods"]["adaspa"]["kinds"][kind]["seconds"]


def two_gpu_rows() -> list[str]:
    """The table of predicted over measured steps on one and two H100s."""
    lines = ["| mesh | dense | search | cached |", "|---|---|---|---|"]
    steps = list(two_gpu_steps())
    for start in range(0, len(steps), len(_KINDS)):
        row = steps[start : start + len(_KINDS)]
        cells = [f"{predicted:.3f} / {seconds:.3f} = {predicted / seconds:.2f}" for _, _, predicted, seconds in row]
        lines.append(f"| {row[0][0]} | {' | '.join(cells)} |")
    return lines


def gpu_rows() -> list[str]:
    """The table of predicted over measured steps on one H200."""
    lines = ["| model | method, block | dense | search | cached |", "|---|---|---|---|---|"]
    steps = list(gpu_steps())
    for start in range(0, len(steps), len(_KINDS)):
        row = steps[start][0]
        cells = [
            f"{predicted:.3f} / {measured:.3f} = {predicted / measured:.2f}"
            + (" (fitted)" if kind == "dense" and row in FITTED else "")
            for _, kind, predicted, measured in steps[start : start + len(_KINDS)]
        ]
        model, _, options, _ = row
        block = f", {options['block']}" if "block" in options else ""
        lines.append(f"| {model} | {options['method']}{block} | {' | '.join(cells)} |")
    return lines


def loop_rows() -> list[str]:
    """The table of predicted over measured loops on one H200."""
    lines = ["| model | method | density | dense steps | predicted / measured, s |", "|---|---|---|---|---|"]
    for model, run, predicted, measured in gpu_loops():
        method, dense = run.schedule.method, run.schedule.warmup_steps(run.steps)
        cells = [model, method.name, f"{method.density:g}", f"{dense} of {run.steps}"]  # type: ignore[attr-defined]
        lines.append(f"| {' | '.join(cells)} | {predicted:.3g} / {measured:.3g} = {predicted / measured:.2f} |")
    return lines


def prediction_rows(gpus: Sequence[int] = (1, 8, 16, 32, 64)) -> list[str]:
    """The table of predictions for H100s."""
    lines = [
        "| model | GPUs | mesh | dense, s | AdaSpa, s | over dense | exchange | if hidden, s | bottleneck |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in ("wan2.1-14b", "wan2.1-1.3b", "hunyuanvideo"):
        run = build_run(model, method="adaspa", density=0.2, block=128, device="h100")
        for count in gpus:
            found = estimate(run, count)
            cells = [
                *(model, str(count), str(found.mesh), f"{_dense(run, count):.1f}", f"{found.seconds:.1f}"),
                *(f"{_dense(run, count) / found.seconds:.2f}x", f"{found.parts['exchange'] / found.seconds:.0%}"),
                *(f"{found.hidden:.1f}", found.bottleneck),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _dense(run: Run, gpus: int) -> float:
    """Seconds of a dense run on the mesh that suits it."""
    from dit_sparse.methods import Dense

    return estimate(replace(run, schedule=Schedule(Dense()), density=None), gpus).seconds


if __name__ == "__main__":
    main()
