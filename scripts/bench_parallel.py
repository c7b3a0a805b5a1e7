"""Time transformer forwards whose sequence lies on several GPUs, dense and sparse, and how well that scales.

    python scripts/bench_parallel.py --model wan-14b --layers 4 --meshes 1x1 2x1 1x2 --out parallel.json
    python scripts/bench_parallel.py --model tiny --device cpu --meshes 1x1 2x1 1x2 --steps 5

A mesh is ULYSSESxRING. Weights are random and `--layers` takes fewer transformer blocks, so only time means anything
here. Every rank drives the same denoising loop; a step takes as long as its slowest rank, and each kind of step gets
the median over its steps: dense, keeps LSE (dense, with the row sums), search (plans anew) and cached. Efficiency is
the time on one GPU over ranks x time. The error is that of the first loop's latents against one GPU, relative, which in
bfloat16 is rounding. The exchange is that of one layer alone, there and back. The ranks are started by this script.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from e2e_models import MODELS, Bare
from torch import Tensor

from dit_sparse.bench.report import environment
from dit_sparse.head_shard import HeadShard
from dit_sparse.methods import AdaSpa, Dense
from dit_sparse.parallel.balance import contiguous
from dit_sparse.parallel.exchange import Places, to_heads, to_tokens
from dit_sparse.pipelines import parallelize
from dit_sparse.pipelines.sparsify import session_of, sparsify
from dit_sparse.schedule import Schedule
from dit_sparse.types import Method

_TIMEOUT = 120.0


def work(rank: int, options: argparse.Namespace, mesh: tuple[int, int], port: int, results: Any) -> None:
    """One rank: times every method and hands what it found to `results`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_grad_enabled(False)
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    ranks = mesh[0] * mesh[1]
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=_TIMEOUT)
    )
    model = MODELS[options.model]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = Bare(model.build(options.layers, str(device), dtype))
    torch.manual_seed(1)
    # Drawn on the CPU, so that all ranks have the same.
    inputs = model.inputs(lambda *shape: torch.randn(*shape).to(device, dtype))
    if ranks > 1:
        parallelize(pipe, ulysses=mesh[0], ring=mesh[1], timeout=_TIMEOUT)
    methods: list[Method] = [Dense(), model.neighborhood, AdaSpa(density=options.density, block=options.block)]
    for method in methods:
        found, latents = measure(pipe, inputs, Schedule(method, never_slower=False), options, device)
        if rank == 0:
            results.put((method.name, found, latents))
    if mesh[0] > 1:
        found = exchange_seconds(pipe, inputs, device, dtype, options.rounds)
        if rank == 0:
            results.put(("exchange", found, None))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    pipe: Any, inputs: dict[str, Any], schedule: Schedule, options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], np.ndarray]:
    """Times of the kinds of step of `schedule`, and the latents of the first loop."""
    sparsify(pipe, schedule)
    session = session_of(pipe)
    assert session is not None
    seconds: dict[str, list[float]] = {}
    first: Tensor | None = None
    _free(device)
    for turn in range(options.rounds + 1):
        pipe.scheduler.set_timesteps(options.steps, device=device)
        latents = inputs["hidden_states"]
        for step in range(options.steps):
            timestep = pipe.scheduler.timesteps[step]
            before = len(session.statistics.records) if step else 0
            start = _together(device)
            with pipe.transformer.cache_context("cond"):
                velocity = pipe.transformer(
                    **inputs | {"hidden_states": latents}, timestep=timestep.expand(len(latents)), return_dict=False
                )[0]
            took = _together(device) - start
            latents = pipe.scheduler.step(velocity, timestep, latents)[0]
            # The first loop compiles kernels and fills the allocator.
            if turn:
                seconds.setdefault(_kind(session.statistics.records[before:], schedule, step, options), []).append(took)
        first = latents if first is None else first
    assert first is not None
    found: dict[str, Any] = {
        "method": schedule.to_config(),
        "kinds": {kind: {"seconds": statistics.median(own), "steps": len(own)} for kind, own in seconds.items()},
        "sparse_density": session.statistics.sparse_density,
        "backends": session.statistics.backends,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
    found["moves"] = sum(context.moves for context in session.contexts)
    return found, first.float().cpu().numpy()


def exchange_seconds(
    pipe: Any, inputs: dict[str, Any], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Seconds of one layer's exchange of heads for tokens and back, and what a rank sends in it."""
    config = pipe.transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    mesh = pipe.transformer._parallel_config.context_parallel_config
    group, ring = mesh._ulysses_mesh.get_group(), mesh.ring_degree
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = inputs["hidden_states"].shape[2:]
    tokens = 1
    for size, patch in zip(sizes, config.patch_size, strict=True):
        tokens *= size // patch
    tokens //= ring * ranks
    shard = HeadShard(contiguous(heads, ranks), rank, group)
    places = Places((tokens,) * ranks)
    q, k, v = (torch.randn(1, tokens, heads, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
    there, back = [], []
    for _ in range(rounds + 1):
        start = _together(device)
        whole = to_heads([q, k, v], shard, places)
        middle = _together(device)
        to_tokens(whole[0], shard, places)
        there.append(middle - start)
        back.append(_together(device) - middle)
    sent = q.numel() * q.element_size() * (ranks - 1) // ranks
    return {
        "there_seconds": statistics.median(there[1:]),
        "back_seconds": statistics.median(back[1:]),
        "there_bytes": 3 * sent,
        "back_bytes": sent,
    }


def _kind(records: Any, schedule: Schedule, step: int, options: argparse.Namespace) -> str:
    """What a step did, by its first attention call."""
    first = records[0]
    if first.density is None and first.reason == "warm-up":
        keeps = schedule.method.uses_lse and step == schedule.warmup_steps(options.steps) - 1
        return "keeps LSE" if keeps else "dense"
    return "cached" if first.planning is None else "search"


def _together(device: torch.device) -> float:
    """The time at which all ranks have done all they were asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return time.perf_counter()


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def run_mesh(options: argparse.Namespace, mesh: tuple[int, int]) -> dict[str, Any]:
    """What every method took on a mesh of its own processes.

    Raises:
        RuntimeError: a rank failed or died; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawned = multiprocessing.start_processes(
        work, (options, mesh, port, results), nprocs=mesh[0] * mesh[1], join=False, start_method="spawn"
    )
    found: dict[str, Any] = {}
    while not spawned.join(timeout=1):
        _drain(results, found)
    _drain(results, found)
    return found


def _drain(results: Any, found: dict[str, Any]) -> None:
    while not results.empty():
        name, own, latents = results.get()
        found[name] = own, latents


def report_of(mesh: tuple[int, int], found: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """What is written of one mesh; `alone` is what one device found."""
    entry: dict[str, Any] = {"ulysses": mesh[0], "ring": mesh[1], "methods": {}}
    for name, (own, latents) in found.items():
        if latents is None:
            entry[name] = own
            continue
        entry["methods"][name] = own
        if name in alone and mesh != (1, 1):
            base, wanted = alone[name]
            own["relative_error"] = float(np.linalg.norm(latents - wanted) / np.linalg.norm(wanted))
            for kind, times in own["kinds"].items():
                if kind in base["kinds"]:
                    times["efficiency"] = base["kinds"][kind]["seconds"] / (mesh[0] * mesh[1] * times["seconds"])
    return entry


def describe(entry: dict[str, Any]) -> str:
    """The figures of one mesh for people."""
    lines = [f"ulysses {entry['ulysses']}, ring {entry['ring']}"]
    for name, own in entry["methods"].items():
        kinds = []
        for kind, times in own["kinds"].items():
            efficiency = f" (efficiency {times['efficiency']:.2f})" if "efficiency" in times else ""
            kinds.append(f"{kind} {times['seconds']:.3f} s{efficiency}")
        error = f"; error {own['relative_error']:.1e}" if "relative_error" in own else ""
        lines.append(
            f"  {name}: {', '.join(kinds)}; density {own['sparse_density']}{error}; {own['moves']} moves of heads"
        )
    if "exchange" in entry:
        there, back = (entry["exchange"][name] * 1e3 for name in ("there_seconds", "back_seconds"))
        lines.append(f"  exchange of a layer: {there:.2f} ms there, {back:.2f} ms back")
    return "\n".join(lines)


def _mesh(text: str) -> tuple[int, int]:
    ulysses, _, ring = text.partition("x")
    return int(ulysses), int(ring)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=[name for name in MODELS if name.startswith(("wan", "tiny"))], default="wan-14b"
    )
    parser.add_argument("--layers", type=int, help="fewer transformer blocks than the model has")
    parser.add_argument("--meshes", type=_mesh, nargs="+", default=[(1, 1), (2, 1), (1, 2)], help="ULYSSESxRING each")
    parser.add_argument("--steps", type=int, default=10, help="of a loop; the first fifth is dense")
    parser.add_argument("--rounds", type=int, default=2, help="loops that are timed")
    parser.add_argument("--density", type=float, default=0.2, help="of AdaSpa")
    parser.add_argument("--block", type=int, default=128, help="of AdaSpa, tokens")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < max(a * b for a, b in options.meshes):
        parser.error(f"--meshes need as many GPUs as ranks, got {torch.cuda.device_count()}; --device cpu is a dry run")
    report: dict[str, Any] = {
        "environment": environment(torch.device(options.device)),
        "model": options.model,
        "layers": options.layers,
        "steps": options.steps,
        "meshes": [],
    }
    alone: dict[str, Any] = {}
    for mesh in options.meshes:
        found = run_mesh(options, mesh)
        alone = found if mesh == (1, 1) else alone
        entry = report_of(mesh, found, alone)
        report["meshes"].append(entry)
        print(describe(entry), flush=True)
        if options.out is not None:
            temporary = options.out.with_name(options.out.name + ".tmp")
            temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
            os.replace(temporary, options.out)


if __name__ == "__main__":
    main()
