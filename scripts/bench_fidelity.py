"""How near the videos of each method are to dense ones, on the demo model with fixed seeds.

    python scripts/bench_fidelity.py --out fidelity.json              # everything; meant for a GPU
    python scripts/bench_fidelity.py --quick --out quick.json         # one prompt, four steps, one density
    python scripts/bench_fidelity.py --table --out fidelity.json      # the tables of an earlier run
    python scripts/bench_fidelity.py --prompts 3-4 --out part-2.json  # two prompts, of a run spread over processes
    python scripts/bench_fidelity.py --merge part-*.json --out fidelity.json
    python scripts/bench_fidelity.py --seer gates.safetensors --out fidelity.json  # with gates of scripts/train_gate.py

Every method is rendered at each density and at its own default, and compared with plain diffusers: same prompt, seed,
device and dtype, frames in memory. `paro` also runs from a plan file, calibrated on a prompt of its own. Beside the
methods stand the floors that a PSNR is worth nothing without: another seed of the same prompt, random blocks at the
same density, and dense attention by another kernel (torch's math kernel in plain diffusers; ours). For AdaSpa, the
search with cached row sums is compared with a full one.

The report is written after every video, under a temporary name first. The same command goes on where it stopped. The
dense video of an unfinished prompt is rendered again for that; should it differ by a bit, so is the rest of its prompt.
A case that fails is reported, the others go on, and the exit status is 1; the same command tries it again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from fidelity_tables import merge_reports, print_report, read_report
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_sparse
from dit_sparse import AdaSpa, Dense, Paro, Schedule, SeerAttention, load_pipeline
from dit_sparse.bench.report import environment, write_report
from dit_sparse.calibrate import Calibration
from dit_sparse.calibrate.observers import MassSums, OrderSearch
from dit_sparse.calibrate.run import write_calibration
from dit_sparse.calibrate.store import MassStore
from dit_sparse.compare.cases import density_label
from dit_sparse.compare.render import Stage, interrupt_after
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.eval.agreement import SearchAgreement
from dit_sparse.eval.fidelity import compare
from dit_sparse.eval.floors import RandomBlocks
from dit_sparse.generate.prompts import read_prompts
from dit_sparse.methods import METHODS, find_method
from dit_sparse.methods.parameters import accepts_density, with_density
from dit_sparse.pipelines import Observer, observe
from dit_sparse.types import Method

PROMPTS = Path(__file__).parent / "fidelity_prompts.txt"
CALIBRATION = "A big red ball moving left on a gray background."
WARMUP = 0.2
SEED = 0


@dataclass(frozen=True)
class Case:
    """One row of the table: what is rendered, and compared with plain diffusers.

    Args:
        label: its name in the table.
        schedule: what the pipeline is sparsified with; `None` leaves it as diffusers has it.
        seed: of the noise.
        math: whether dense attention runs on torch's math kernel.
    """

    label: str
    schedule: Schedule | None = None
    seed: int = SEED
    math: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """What tells this case from others, ready for JSON."""
        found = {} if self.schedule is None else self.schedule.to_config()
        for name in ("plan_file", "weights"):
            if found.get(name):
                found[name] = Path(found[name]).name
        return found | {"seed": self.seed} | ({"kernel": "math"} if self.math else {})


DENSE = Case("dense")


def method_cases(methods: Sequence[Method], densities: Sequence[float]) -> list[Case]:
    """Each method at each density and at its own default, which is marked where it is one of them."""
    cases = []
    for method in methods:
        default = Schedule(method, never_slower=False)
        at = [with_density(default.method, d) for d in densities] if accepts_density(default.method) else []
        schedules = [_warmed_up(method) for method in at]
        if default not in schedules:
            schedules.append(default)
        cases += [Case(f"{density_label(s.method)}{' (default)' if s == default else ''}", s) for s in schedules]
    return cases


def extra_cases(configs: Sequence[str]) -> list[Case]:
    """Any other settings: configs in JSON, as `Schedule.from_config` reads them.

    Raises:
        ValueError: no JSON, or a config that is not allowed.
    """
    return [Case(text, replace(Schedule.from_config(json.loads(text)), never_slower=False)) for text in configs]


def plan_cases(densities: Sequence[float], folder: Path) -> list[Case]:
    """`paro` from a plan file of each density."""
    methods = [Paro(density=d, plan_file=str(folder / f"paro-{d:g}.safetensors")) for d in densities]
    return [Case(f"paro, plan file {m.density:g}", _warmed_up(m)) for m in methods]


def floor_cases(densities: Sequence[float]) -> list[Case]:
    """What a PSNR has to be compared with."""
    return [
        Case("another seed", seed=SEED + 1),
        Case("dense, torch's math kernel", math=True),
        Case("dense, ours", Schedule(Dense(), warmup=0)),
        *(Case(f"random blocks {d:g}", _warmed_up(RandomBlocks(d))) for d in densities),
    ]


def _warmed_up(method: Method) -> Schedule:
    """A layer that ran dense because that is as fast would have nothing to measure."""
    return Schedule(method, warmup=WARMUP, never_slower=False)


class Bench:
    """Renders what the report still lacks, and writes it after every video.

    Args:
        pipe: the demo model, plain.
        arguments: of its call.
        report: as far as it is there.
        out: where it is written.
    """

    def __init__(self, pipe: Any, arguments: dict[str, Any], report: dict[str, Any], out: Path) -> None:
        self.pipe, self.arguments, self.report, self.out = pipe, arguments, report, out
        self.stage = Stage(pipe, arguments)

    def videos(self, cases: Sequence[Case], prompts: Sequence[str]) -> None:
        """Render and compare every case of every prompt."""
        missing = [case for case in cases if not all(self._row(case, prompt) for prompt in prompts)]
        try:
            self._calibrate(missing)
        except Exception as error:  # noqa: BLE001  # the cases that need a plan file will say that there is none
            self._failed("calibration", error)
        for number, prompt in enumerate(prompts, 1):
            if all(self._row(case, prompt) for case in cases):
                continue
            dense, row = self._render(DENSE, prompt)
            digest = hashlib.sha256(dense.tobytes()).hexdigest()
            rows = [r for r in self.report["videos"] if r["prompt"] != prompt or r["reference"] == digest]
            self.report["videos"] = rows
            for case in (DENSE, *cases):
                if self._row(case, prompt) or case.label in self.report["failed"]:
                    continue
                try:
                    frames, row = (dense, row) if case is DENSE else self._render(case, prompt)
                except Exception as error:  # noqa: BLE001  # no case's failure may lose what the others found
                    self._failed(case.label, error)
                    continue
                fidelity = compare(*(torch.from_numpy(x).to(self.pipe.device) for x in (frames, dense)))
                row |= {"psnr": None if fidelity.identical else fidelity.psnr, "ssim": fidelity.ssim}
                row |= {"identical": fidelity.identical, "reference": digest}
                rows.append(row)
                write_report(self.report, self.out)
                psnr = "same" if fidelity.identical else f"{fidelity.psnr:.2f} dB"
                print(f"prompt {number} of {len(prompts)}: {case.label}: {psnr}, {row['seconds']:.2f} s", flush=True)

    def _failed(self, label: str, error: Exception) -> None:
        self.report["failed"][label] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        write_report(self.report, self.out)
        traceback.print_exception(error)

    def _row(self, case: Case, prompt: str) -> dict[str, Any] | None:
        config = case.config
        return next((r for r in self.report["videos"] if r["prompt"] == prompt and r["config"] == config), None)

    def _render(self, case: Case, prompt: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames `[T, H, W, 3]` float32 in [0, 1], and what the run did."""
        row: dict[str, Any] = {"label": case.label, "config": case.config, "prompt": prompt}
        # A case is what it says it is, also where dense attention would be as fast.
        schedule = None if case.schedule is None else replace(case.schedule, never_slower=False)
        with sdpa_kernel(SDPBackend.MATH) if case.math else contextlib.nullcontext():
            rendering = self.stage.render(schedule, prompt, case.seed)
        row["seconds"] = rendering.seconds
        if case.schedule is not None:
            kept = ("density", "sparse_density", "dense_calls", "backends")
            row |= {name: rendering.statistics[name] for name in kept}
        return rendering.frames, row

    def _calibrate(self, cases: Sequence[Case]) -> None:
        """Make the plan files that `cases` lack, of all densities from one calibration."""
        methods = [case.schedule.method for case in cases if case.schedule is not None]
        wanted = [method for method in methods if isinstance(method, Paro) and method.plan_file is not None]
        lacking = [method for method in wanted if not Path(method.plan_file).exists()]
        if not lacking:
            return
        folder, start = Path(lacking[0].plan_file).parent, time.perf_counter()
        folder.mkdir(exist_ok=True)
        search = OrderSearch(lacking[0])
        with observe(self.pipe, search):
            self.stage.call(CALIBRATION, SEED, output_type="latent")
        axes, starts = search.axes(), Calibration().starts(search.num_steps)
        with tempfile.TemporaryDirectory(dir=folder) as own, MassStore(Path(own), 1) as store:
            with observe(self.pipe, MassSums(store, axes, lacking[0].cut, starts, search.grid)):
                self.stage.call(CALIBRATION, SEED, output_type="latent")
            for method in lacking:
                calibration = Calibration(Paro(density=method.density))
                write_calibration(method.plan_file, calibration, search, store, axes, "demo", [CALIBRATION])
        self.report["calibration_seconds"] = time.perf_counter() - start

    def searches(self, prompts: Sequence[str]) -> None:
        """Compare AdaSpa's cached searches with full ones in a dense run of each prompt, up to the last search."""
        steps = self.arguments["num_inference_steps"]
        for number, prompt in enumerate(prompts, 1):
            if any(row["prompt"] == prompt for row in self.report["searches"]):
                continue
            methods = [AdaSpa(density=0.25), AdaSpa(density=0.25, head_adaptive=False)]
            watches = [SearchAgreement(Schedule(method, warmup=WARMUP)) for method in methods]
            schedule = watches[0].schedule
            last = max(schedule.warmup_steps(steps), *schedule.refresh_steps(steps))
            try:
                with observe(self.pipe, each_of(watches)):
                    self.stage.call(prompt, SEED, output_type="latent", callback_on_step_end=interrupt_after(last))
            except Exception as error:  # noqa: BLE001  # as above
                self._failed("searches", error)
                return
            for method, watch in zip(methods, watches, strict=True):
                row = {"prompt": prompt, "head_adaptive": method.head_adaptive}
                self.report["searches"].append(row | watch.to_dict())
            write_report(self.report, self.out)
            print(f"prompt {number} of {len(prompts)}: searches compared", flush=True)


def each_of(observers: Sequence[Observer]) -> Observer:
    """An observer that shows every call to each of `observers`."""

    def watch(*call: Any) -> None:
        for observer in observers:
            observer(*call)

    return watch


def open_report(out: Path, where: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The report at `out`, or a new one.

    Raises:
        ValueError: no report, or the one there comes from another device, version, commit or setting.
    """
    if not out.exists():
        return {"environment": where, "settings": settings, "videos": [], "searches": [], "failed": {}}
    report = read_report(out)
    for part, now in (("environment", where), ("settings", settings)):
        for name, value in now.items():
            if report[part].get(name) != value:
                raise ValueError(
                    f"--out {out} was made with {name} {report[part].get(name)!r}, got {value!r}: give another --out"
                )
    return report | {"failed": {}}


def prompts_of(text: str, known: Sequence[str]) -> Sequence[str]:
    """Those of `known` that "3" (the first three) or "3-4" (the third and fourth) means.

    Raises:
        ValueError: neither, or there are not so many.
    """
    first, _, last = text.rpartition("-")
    if not (last.isdecimal() and (first or "1").isdecimal() and 1 <= int(first or 1) <= int(last) <= len(known)):
        raise ValueError(f"--prompts must be a number or a range such as 3-4, from 1 to {len(known)}, got {text!r}")
    return known[int(first or 1) - 1 : int(last)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # seer cannot run without gates, and there are none to begin with.
    every = ",".join(name for name in METHODS if name not in ("dense", "seer"))
    parser.add_argument("--methods", default=every, help=f"names with commas between them; by default {every}")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="JSON", help='more settings: {"method": "neighborhood", "window": 8}'
    )
    parser.add_argument(
        "--searches", action=argparse.BooleanOptionalAction, help="compare AdaSpa's searches; by default with adaspa"
    )
    parser.add_argument("--floors", action=argparse.BooleanOptionalAction, default=True, help="render the floors too")
    parser.add_argument("--densities", help="numbers with commas between them; by default 0.5,0.25,0.125")
    parser.add_argument("--prompts", help=f"of {PROMPTS.name} only the first of this number, or 3-4; by default all")
    parser.add_argument("--steps", type=int, help=f"by default {demo_defaults['num_inference_steps']}")
    parser.add_argument("--size", default="29x96x128", help="frames, height, width; the model knows no other")
    parser.add_argument("--quick", action="store_true", help="one prompt, four steps, density 0.25")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--commit", help="recorded where there is no checkout to ask")
    parser.add_argument("--seer", type=Path, help="gates for seer, which is left out without")
    parser.add_argument("--table", action="store_true", help="print the tables of --out and render nothing")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="PART", help="make --out of these; renders nothing")
    parser.add_argument("--out", type=Path, required=True, help="the report, JSON")
    options = parser.parse_args(arguments)
    known = read_prompts(PROMPTS)
    densities = options.densities or ("0.25" if options.quick else "0.5,0.25,0.125")
    try:
        options.methods = [name for name in options.methods.split(",") if name]
        options.also = extra_cases(options.also)
        for name in options.methods:
            find_method(name)
        options.densities = [RandomBlocks(float(density)).density for density in densities.split(",")]
        options.size = tuple(map(int, options.size.split("x")))
        if len(options.size) != 3:
            raise ValueError(f"--size must be frames, height and width such as 29x96x128, got {options.size}")
        options.prompts = prompts_of(options.prompts or ("1" if options.quick else str(len(known))), known)
    except ValueError as error:
        parser.error(str(error))
    options.steps = options.steps or (4 if options.quick else int(demo_defaults["num_inference_steps"]))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=150)
    if options.table or options.merge:
        try:
            if options.merge:
                write_report(merge_reports(options.merge), options.out)
            print_report(read_report(options.out), console)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        return
    bench = open_bench(options)
    methods = [find_method(name)() for name in options.methods]
    methods += [] if options.seer is None else [SeerAttention(weights=str(options.seer))]
    cases = method_cases(methods, options.densities)
    if "paro" in options.methods:
        cases += plan_cases(options.densities, options.out.with_name(f"{options.out.name}.plans"))
    floors = floor_cases(options.densities) if options.floors else []
    bench.videos([*cases, *options.also, *floors], options.prompts)
    if "adaspa" in options.methods if options.searches is None else options.searches:
        bench.searches(options.prompts)
    print_report(bench.report, console)
    if bench.report["failed"]:
        raise SystemExit(1)


def open_bench(options: argparse.Namespace) -> Bench:
    """The demo model and the report that `options` name."""
    frames, height, width = options.size
    settings = {
        "steps": options.steps,
        "size": list(options.size),
        "dtype": options.dtype,
        "seed": SEED,
        "warmup": WARMUP,
    }
    where = environment(torch.device(options.device))
    where |= {"dit-sparse": dit_sparse.__version__, "diffusers": diffusers.__version__}
    where["commit"] = options.commit or where["commit"]
    try:
        report = open_report(options.out, where, settings)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    pipe = load_pipeline(demo_model_path(), dtype=getattr(torch, options.dtype), device=options.device)
    pipe.set_progress_bar_config(disable=True)
    call = {
        **demo_defaults,
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": options.steps,
    }
    return Bench(pipe, call, report, options.out)


if __name__ == "__main__":
    main()
