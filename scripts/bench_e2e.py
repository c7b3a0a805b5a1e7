"""Time whole transformer forwards, dense against sparse, over a schedule with its dense warm-up counted.

    python scripts/bench_e2e.py --model wan-1.3b --complete --out e2e.json
    python scripts/bench_e2e.py --model wan-14b --layers 4 --compile --out e2e.json
    python scripts/bench_e2e.py --model tiny --device cpu --steps 10

Weights are random, from the public configurations, so only time means anything here, not the pictures: a mask costs the
same time whatever it keeps. `--layers` takes fewer transformer blocks where memory or time is short; all times are then
of that many. Dense steps of plain diffusers are timed with every dense kernel, and the steps of a sparse run by kind:
dense, dense that keeps the row sums, search, cached; each a median. From these a run is composed by asking the schedule
what each step does, and compared with a dense run under every kernel. `--complete` also runs whole denoising loops.
Where a density changes from step to step, a run composed so is not what runs: give `--complete`.
The ceiling is the sparse run with attention for free in its sparse steps. `--compile` compiles the transformer blocks,
for dense and sparse alike. Peak memory is that of a step, without the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from e2e_models import MODELS, Bare, Model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.bench.report import environment
from dit_sparse.kernels.flash_attention_3 import fa3_attention, fa3_refuses, fa3_unavailable
from dit_sparse.methods import AdaSpa
from dit_sparse.pipelines.sparsify import session_of, sparsify, unsparsify
from dit_sparse.schedule import Schedule
from dit_sparse.types import Method

_TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "cpu": SDPBackend.FLASH_ATTENTION}


def dense_kernels(device: torch.device) -> list[str]:
    """The dense attention kernels that run here."""
    if device.type == "cpu":
        return ["cpu"]
    return ["cudnn", "flash"] + (["fa3"] if fa3_unavailable(device) is None else [])


@contextlib.contextmanager
def dense_kernel(name: str) -> Iterator[None]:
    """Makes plain diffusers' attention run on one kernel alone; a call that it cannot compute is an error."""
    if name in _TORCH:
        with sdpa_kernel(_TORCH[name]):
            yield
        return
    plain = F.scaled_dot_product_attention

    @torch.compiler.disable
    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        refused = fa3_refuses(query, key, value) if attn_mask is None else "it takes no mask"
        if refused is not None:
            raise RuntimeError(f"FlashAttention-3: {refused}")
        return fa3_attention(query, key, value, scale=options.get("scale") or query.shape[-1] ** -0.5)[0]

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class Runner:
    """Drives a transformer as a pipeline would, one guidance branch."""

    def __init__(self, model: Model, layers: int | None, steps: int, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.pipe = Bare(model.build(layers, str(device), dtype))
        self.steps, self.device = steps, device
        self.inputs = model.inputs(lambda *shape: torch.randn(*shape, device=device, dtype=dtype))
        self.layers = sum(self.pipe.transformer.config[name] for name in model.layers)
        self.pipe.scheduler.set_timesteps(steps, device=device)

    def forward(self, step: int, latents: Tensor | None = None) -> Tensor:
        inputs = self.inputs if latents is None else self.inputs | {"hidden_states": latents}
        timestep = self.pipe.scheduler.timesteps[step].expand(len(inputs["hidden_states"]))
        transformer = self.pipe.transformer
        with transformer.cache_context("cond"):
            return transformer(**inputs, timestep=timestep, return_dict=False)[0]

    def compile(self) -> None:
        """Compile every transformer block; the first steps of each kind then take longer, and are not timed."""
        torch._dynamo.config.recompile_limit = 64
        for name, child in self.pipe.transformer.named_children():
            if isinstance(child, torch.nn.ModuleList) and name.endswith("blocks"):
                for block in child:
                    block.compile()

    def seconds(self, step: int, rounds: int) -> dict[str, float]:
        """Medians of a step and of the attention in it, and peak memory; the state before is restored every round."""
        session = session_of(self.pipe)
        before = {} if session is None else dict(session.previous)
        times, attention, peak = [], [], 0
        for _ in range(rounds + 1):
            if session is not None:
                session.steps.step = step
                session.previous.clear()
                session.previous.update(before)
            held = self._wait()
            start = time.perf_counter()
            self.forward(step)
            peak = self._wait(peak=True) - held
            times.append(time.perf_counter() - start)
            if session is not None:
                calls = session.statistics.records[-self.layers :]
                attention.append(sum(call.attention.seconds for call in calls))
        found = {"step": statistics.median(times[1:]), "peak_gib": peak / 2**30}
        return found | ({"attention": statistics.median(attention[1:])} if attention else {})

    def complete(self) -> float:
        """Seconds of a whole denoising loop."""
        latents = self.inputs["hidden_states"]
        self.pipe.scheduler.set_timesteps(self.steps, device=self.device)
        self._wait()
        start = time.perf_counter()
        for step in range(self.steps):
            velocity = self.forward(step, latents)
            latents = self.pipe.scheduler.step(velocity, self.pipe.scheduler.timesteps[step], latents)[0]
        self._wait()
        return time.perf_counter() - start

    def _wait(self, peak: bool = False) -> int:
        """Wait for the device; bytes of its memory in use, or the most since the last call."""
        if self.device.type == "cpu":
            return 0
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return used


def kinds_of_steps(schedule: Schedule, steps: int, uses_lse: bool) -> list[str]:
    """What every step of a run does: "dense", "keeps LSE", "search" or "cached"."""
    warmup, refresh = schedule.warmup_steps(steps), schedule.refresh_steps(steps)
    kinds = ["dense"] * warmup
    if uses_lse and warmup:
        kinds[-1] = "keeps LSE"
    for step in range(warmup, steps):
        anew = step == warmup or (step in refresh and schedule.method.scope != "grid")
        kinds.append("search" if anew else "cached")
    return kinds


def measure(runner: Runner, schedule: Schedule, rounds: int, complete: bool) -> dict[str, Any]:
    """Times of the kinds of step under `schedule`, and the run composed of them."""
    torch._dynamo.reset()
    sparsify(runner.pipe, schedule)
    runner.pipe.scheduler.set_timesteps(runner.steps, device=runner.device)
    kinds = kinds_of_steps(schedule, runner.steps, schedule.method.uses_lse)
    found: dict[str, Any] = {"method": schedule.to_config(), "kinds": {}}
    for kind in dict.fromkeys(kinds):
        found["kinds"][kind] = runner.seconds(kinds.index(kind), rounds) | {"steps": kinds.count(kind)}
    session = session_of(runner.pipe)
    assert session is not None
    found["backends"] = sorted({record.backend for record in session.statistics.records})
    found["density"] = float(session.statistics.records[-1].density.mean())  # type: ignore[union-attr]
    found["composed_seconds"] = sum(kind["step"] * kind["steps"] for kind in found["kinds"].values())
    # Attention for free in every step that is not dense.
    free = ("search", "cached")
    found["floor_seconds"] = sum(
        (kind["step"] - (kind["attention"] if name in free else 0)) * kind["steps"]
        for name, kind in found["kinds"].items()
    )
    if "search" in found["kinds"] and "cached" in found["kinds"]:
        planning = found["kinds"]["search"]["step"] - found["kinds"]["cached"]["step"]
        found["floor_seconds"] -= planning * found["kinds"]["search"]["steps"]
    if complete:
        found["complete_seconds"] = runner.complete()
    unsparsify(runner.pipe)
    return found


def measure_dense(runner: Runner, kernels: list[str], rounds: int, complete: bool) -> dict[str, Any]:
    """Times of plain diffusers with every dense kernel; the loop with the fastest."""
    found: dict[str, Any] = {"kernels": {}}
    for name in kernels:
        torch._dynamo.reset()  # a compiled block keeps the attention kernel that it was traced with
        try:
            with dense_kernel(name):
                found["kernels"][name] = runner.seconds(0, rounds)
        except RuntimeError as error:
            found.setdefault("cannot", {})[name] = str(error).splitlines()[0]
    if not found["kernels"]:
        # A mask that no kernel takes by name: what torch picks.
        found["kernels"]["default"] = runner.seconds(0, rounds)
    if complete:
        fastest = min(found["kernels"], key=lambda name: found["kernels"][name]["step"])
        with dense_kernel(fastest) if fastest != "default" else contextlib.nullcontext():
            found["complete_seconds"] = {fastest: runner.complete()}
    return found


def compare(found: dict[str, Any], dense: dict[str, Any], steps: int) -> None:
    """Add the speed-ups over a dense run with every kernel."""
    runs = {name: steps * kernel["step"] for name, kernel in dense["kernels"].items()}
    found["speedup"] = {name: seconds / found["composed_seconds"] for name, seconds in runs.items()}
    found["ceiling"] = {name: seconds / found["floor_seconds"] for name, seconds in runs.items()}
    if "complete_seconds" in found:
        found["complete_speedup"] = {
            name: seconds / found["complete_seconds"] for name, seconds in dense["complete_seconds"].items()
        }


def schedules(model: Model, options: argparse.Namespace) -> list[Schedule]:
    """All that is timed; nothing is left to the cost model, whose word is what this checks."""
    pairs = itertools.product(options.blocks, options.densities)
    methods: list[Method] = [AdaSpa(density=density, block=block) for block, density in pairs]
    methods += [] if options.no_neighborhood else [model.neighborhood]
    found = [Schedule(method) for method in methods]
    found += [Schedule.from_config(json.loads(text)) for text in options.also]
    return [replace(schedule, never_slower=False) for schedule in found]


def describe(method: Method, found: dict[str, Any]) -> str:
    name = f"{method.name}, blocks of {method.block}" if isinstance(method, AdaSpa) else method.name
    kinds = ", ".join(
        f"{kind} {times['step']:.3f} s" + (f" ({times['attention']:.3f} attention)" if "attention" in times else "")
        for kind, times in found["kinds"].items()
    )
    ratios = ", ".join(f"{found['speedup'][k]:.2f}x of at most {found['ceiling'][k]:.2f}x over {k}"
                       for k in found["speedup"])  # fmt: skip
    whole = "".join(f"; complete {ratio:.2f}x over {k}" for k, ratio in found.get("complete_speedup", {}).items())
    return f"{name}: {kinds}; composed {ratios}{whole}; {', '.join(found['backends'])}, density {found['density']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", default=["wan-1.3b"])
    parser.add_argument("--layers", type=int, help="fewer transformer blocks than the model has")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.2], help="of AdaSpa; none leaves it out")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128], help="of AdaSpa, tokens each")
    parser.add_argument("--no-neighborhood", action="store_true")
    parser.add_argument("--also", nargs="+", default=[], metavar="JSON", help="more settings, as --config takes them")
    parser.add_argument("--dense", nargs="+", choices=(*_TORCH, "fa3"), help="dense kernels; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--complete", action="store_true", help="also run whole denoising loops")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU; --model tiny --device cpu tries the script without one")
    device = torch.device(options.device)
    kernels = [name for name in dense_kernels(device) if not options.dense or name in options.dense]
    torch.set_grad_enabled(False)
    report: dict[str, Any] = {"environment": environment(device), "compiled": options.compile, "models": []}
    for name in options.model:
        model = MODELS[name]
        runner = Runner(model, options.layers, options.steps, device)
        if options.compile:
            runner.compile()
        dense = measure_dense(runner, kernels, options.rounds, options.complete)
        entry: dict[str, Any] = {"model": name, "layers": runner.layers, "dense": dense, "methods": []}
        report["models"].append(entry)
        print(f"{name}, {runner.layers} layers, dense step: "
              + ", ".join(f"{k} {times['step']:.3f} s" for k, times in dense["kernels"].items())
              + "".join(f"; {k} cannot: {why}" for k, why in dense.get("cannot", {}).items()), flush=True)  # fmt: skip
        for schedule in schedules(model, options):
            found = measure(runner, schedule, options.rounds, options.complete)
            compare(found, dense, options.steps)
            entry["methods"].append(found)
            print(f"  {describe(schedule.method, found)}", flush=True)
            if options.out is not None:
                _write(options.out, report)
        del runner


def _write(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
