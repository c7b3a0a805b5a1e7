"""Time whole transformer forwards of Wan 2.1: dense against sparse, over a schedule with its dense warm-up counted.

    python scripts/bench_e2e.py --model wan-1.3b --complete --out e2e.json
    python scripts/bench_e2e.py --model wan-14b --layers 4 --out e2e.json
    python scripts/bench_e2e.py --model tiny --device cpu --steps 10

Weights are random, from the public configurations, so only time means anything here, not the pictures: a mask costs the
same time whatever it keeps. `--layers` takes fewer transformer blocks where memory or time is short; all times are then
of that many. Four kinds of step are timed, each a median: dense with every dense kernel, dense that keeps the LSE,
a step that searches, and a step with cached plans. From these a run is composed by asking the schedule what each step
does. `--complete` also runs one whole denoising loop of both kinds. The ceiling is the run with attention for free in
the sparse steps. CogVideoX, HunyuanVideo and FLUX have no adapter yet and are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from dit_sparse.bench.report import environment
from dit_sparse.methods import AdaSpa, Neighborhood
from dit_sparse.pipelines.sparsify import session_of, sparsify, unsparsify
from dit_sparse.schedule import Schedule
from dit_sparse.types import Method


@dataclass(frozen=True)
class Model:
    """A public configuration, the latent video it makes, and a neighborhood whose blocks are all full there."""

    config: dict[str, Any]
    latents: tuple[int, int, int]
    neighborhood: Neighborhood


def _wan(heads: int, ffn_dim: int, layers: int, dim: int = 128) -> dict[str, Any]:
    return {"num_attention_heads": heads, "attention_head_dim": dim, "ffn_dim": ffn_dim, "num_layers": layers}


MODELS = {
    "wan-1.3b": Model(
        _wan(12, 8960, 30), (21, 60, 104), Neighborhood(window=(9, 30, 28), stride=(3, 10, 4), tile=(3, 10, 4))
    ),
    "wan-14b": Model(
        _wan(40, 13824, 40), (21, 90, 160), Neighborhood(window=(15, 25, 40), stride=(3, 5, 8), tile=(3, 5, 8))
    ),
    "tiny": Model(
        _wan(2, 64, 2, dim=16), (3, 16, 16), Neighborhood(window=(3, 4, 4), stride=(1, 4, 4), tile=(1, 4, 4))
    ),
}
DENSE = {"cuda": ("_native_cudnn", "_native_flash"), "cpu": ("native",)}


def build(model: Model, layers: int | None, device: str, dtype: torch.dtype) -> WanPipeline:
    """A pipeline of a random transformer and a scheduler, and nothing else."""
    torch.manual_seed(0)
    config = model.config | ({} if layers is None else {"num_layers": layers})
    with torch.device(device):
        transformer = WanTransformer3DModel(**config).eval()
    keep = tuple(WanTransformer3DModel._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in keep):
            parameter.data = parameter.data.to(dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )  # fmt: skip


class Runner:
    """Drives the transformer as a pipeline would, one guidance branch."""

    def __init__(self, pipe: WanPipeline, model: Model, steps: int, device: str, dtype: torch.dtype) -> None:
        self.pipe, self.steps = pipe, steps
        channels = pipe.transformer.config.in_channels
        self.latents = torch.randn(1, channels, *model.latents, device=device, dtype=dtype)
        self.text = torch.randn(1, 512, pipe.transformer.config.text_dim, device=device, dtype=dtype)
        pipe.scheduler.set_timesteps(steps, device=device)

    def forward(self, step: int) -> torch.Tensor:
        timestep = self.pipe.scheduler.timesteps[step].expand(1)
        with self.pipe.transformer.cache_context("cond"):
            return self.pipe.transformer(
                hidden_states=self.latents, timestep=timestep, encoder_hidden_states=self.text, return_dict=False
            )[0]

    def seconds(self, step: int, rounds: int) -> tuple[float, float]:
        """Median seconds of a step, and of the attention in it; the state before it is restored for every round."""
        session = session_of(self.pipe)
        before = {} if session is None else dict(session.previous)
        times, attention = [], []
        for _ in range(rounds + 1):
            if session is not None:
                session.steps.step = step
                session.previous.clear()
                session.previous.update(before)
            _wait()
            start = time.perf_counter()
            self.forward(step)
            _wait()
            times.append(time.perf_counter() - start)
            if session is not None:
                calls = session.statistics.records[-self.pipe.transformer.config.num_layers :]
                attention.append(sum(call.attention.seconds for call in calls))
        return statistics.median(times[1:]), statistics.median(attention[1:] or [0.0])

    def complete(self) -> float:
        """Seconds of a whole denoising loop."""
        latents = self.latents
        self.pipe.scheduler.set_timesteps(self.steps, device=latents.device)
        _wait()
        start = time.perf_counter()
        for step in range(self.steps):
            velocity = self.forward(step)
            latents = self.pipe.scheduler.step(velocity, self.pipe.scheduler.timesteps[step], latents)[0]
        _wait()
        return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kinds_of_steps(schedule: Schedule, steps: int, uses_lse: bool) -> list[str]:
    """What every step of a run does: "dense", "keeps LSE", "search" or "cached"."""
    warmup, refresh = schedule.warmup_steps(steps), schedule.refresh_steps(steps)
    kinds = ["dense"] * warmup
    if uses_lse and warmup:
        kinds[-1] = "keeps LSE"
    for step in range(warmup, steps):
        anew = step == warmup or (step in refresh and schedule.method.scope == "call")
        kinds.append("search" if anew else "cached")
    return kinds


def measure(runner: Runner, method: Method, rounds: int, complete: bool) -> dict[str, Any]:
    """Times of the kinds of step under `method`, and the run composed of them."""
    schedule = Schedule(method)
    sparsify(runner.pipe, schedule)
    runner.pipe.scheduler.set_timesteps(runner.steps, device=runner.latents.device)
    kinds = kinds_of_steps(schedule, runner.steps, method.uses_lse)
    found: dict[str, Any] = {"method": schedule.to_config(), "step_seconds": {}, "attention_seconds": {}}
    for kind in dict.fromkeys(kinds):
        step = kinds.index(kind)
        found["step_seconds"][kind], found["attention_seconds"][kind] = runner.seconds(step, rounds)
    session = session_of(runner.pipe)
    assert session is not None
    found["backend"] = sorted({record.backend for record in session.statistics.records})
    found["density"] = float(session.statistics.records[-1].density.mean())  # type: ignore[union-attr]
    found["composed_seconds"] = sum(found["step_seconds"][kind] for kind in kinds)
    if complete:
        found["complete_seconds"] = runner.complete()
    found["steps"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    unsparsify(runner.pipe)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="wan-1.3b")
    parser.add_argument("--layers", type=int, help="fewer transformer blocks than the model has")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2], help="of AdaSpa")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--complete", action="store_true", help="also run whole denoising loops")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU; --model tiny --device cpu tries the script without one")
    torch.set_grad_enabled(False)
    model, dtype = MODELS[options.model], torch.bfloat16 if options.device == "cuda" else torch.float32
    pipe = build(model, options.layers, options.device, dtype)
    runner = Runner(pipe, model, options.steps, options.device, dtype)
    report: dict[str, Any] = {
        "environment": environment(torch.device(options.device)),
        "model": options.model,
        "layers": pipe.transformer.config.num_layers,
        "dense_step_seconds": {},
        "methods": [],
    }
    for backend in DENSE[options.device]:
        pipe.transformer.set_attention_backend(backend)
        report["dense_step_seconds"][backend], _ = runner.seconds(0, options.rounds)
    fastest = min(report["dense_step_seconds"], key=report["dense_step_seconds"].get)
    pipe.transformer.set_attention_backend(fastest)
    dense_run = options.steps * report["dense_step_seconds"][fastest]
    if options.complete:
        report["dense_complete_seconds"] = runner.complete()
    print(f"{options.model}, {report['layers']} layers, dense with {fastest}: {dense_run / options.steps:.3f} s a step")
    for method in (*(AdaSpa(density=d) for d in options.densities), model.neighborhood):
        found = measure(runner, method, options.rounds, options.complete)
        found["speedup_composed"] = dense_run / found["composed_seconds"]
        if options.complete:
            found["speedup_complete"] = report["dense_complete_seconds"] / found["complete_seconds"]
        steps = found["steps"]
        rest = report["dense_step_seconds"][fastest] - found["attention_seconds"]["dense"]
        sparse_steps = steps.get("search", 0) + steps.get("cached", 0)
        floor = sparse_steps * rest + (options.steps - sparse_steps) * report["dense_step_seconds"][fastest]
        found["ceiling"] = dense_run / floor
        report["methods"].append(found)
        print(f"{method.name}: " + ", ".join(f"{k} {v:.3f} s" for k, v in found["step_seconds"].items())
              + f"; composed {found['speedup_composed']:.2f}x of at most {found['ceiling']:.2f}x"
              + (f", complete {found['speedup_complete']:.2f}x" if options.complete else "")
              + f"; {', '.join(found['backend'])}, density {found['density']:.3f}", flush=True)  # fmt: skip
    if options.out is not None:
        temporary = options.out.with_name(options.out.name + ".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        os.replace(temporary, options.out)


if __name__ == "__main__":
    main()
