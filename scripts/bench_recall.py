"""How much of the demo model's attention each method's blocks hold, at equal densities, against random blocks.

    python scripts/bench_recall.py --out recall.json                       # every method that needs no file
    python scripts/bench_recall.py --methods adaspa,svg --densities 0.25
    python scripts/bench_recall.py --methods proxy,proxy:groups=3          # a parameter, or more with + between them
    python scripts/bench_recall.py --seer gates.safetensors                # with the gates of scripts/train_gate.py
    python scripts/bench_recall.py --merge old.json new.json --out recall.json  # a method of both is the later one's

The model runs dense, and some of its attention calls are kept with their row LSE. Every method plans for each of them,
as if it were its first plan after the warm-up, and the mass of the kept blocks is summed exactly: the share of the
attention weights that they hold. Methods that can go by a threshold of their own are measured so too; those that take
no density are left out, and so is `lea`, whose density differs from step to step. The figure says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_cpu import environment
from merged_reports import merged_environment
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_sparse import SeerAttention, Site, load_pipeline
from dit_sparse.bench.report import write_report
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.eval.attention import mass_recall
from dit_sparse.eval.floors import RandomBlocks
from dit_sparse.methods import METHODS, parse_method
from dit_sparse.methods.parameters import accepts_density, with_density, without_density
from dit_sparse.pipelines import observe_values
from dit_sparse.types import Method, Previous

PROMPT = "A big red ball moving left on a gray background."
RANDOM = "random blocks"


@dataclass(frozen=True)
class Call:
    """One dense attention call of the demo model; `q, k, v` `[B, H, N, D]`, `lse` `[B, H, N]`."""

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Row:
    """One method at one density, or by its threshold; means over calls and heads, and the worst call and head."""

    method: str
    density: float | None
    achieved: float
    recall: float
    worst: float


def capture(steps: int, shares: Sequence[float], layers: int) -> list[Call]:
    """Calls of every `layers`-th layer at those shares of a run of `steps`, of the conditional branch."""
    pipe: Any = load_pipeline(str(demo_model_path()))
    pipe.set_progress_bar_config(disable=True)
    at, calls = {round(share * steps) for share in shares}, []

    def watch(site: Site, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        if site.step in at and site.branch == "cond" and site.layer % layers == layers // 2:
            calls.append(Call(site, q.clone(), k.clone(), v.clone(), lse.clone()))

    arguments = {**demo_defaults, "num_inference_steps": steps}
    with torch.no_grad(), observe_values(pipe, watch):
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments)
    return calls


def measure(label: str, method: Method, density: float | None, calls: Sequence[Call]) -> Row:
    """One row: `method` plans for every call."""
    found, densities = [], []
    for call in calls:
        plan = method.plan(call.q, call.k, call.v, call.site, Previous(lse=call.lse))
        found.append(mass_recall(plan, call.q, call.k, call.lse))
        densities.append(plan.density.mean())
    recalls = torch.cat([part.flatten() for part in found])
    achieved = float(torch.stack(densities).mean())
    return Row(label, density, achieved, float(recalls.mean()), float(recalls.min()))


def methods_for(texts: Sequence[str], seer: str | None) -> dict[str, Method]:
    """The methods that accept a density, by the texts that name them, as `parse_method` reads them.

    Raises:
        ValueError: an unknown method or parameter, or a bad value.
    """
    made = {}
    for text in texts:
        method = parse_method(text)
        if hasattr(method, "density_at"):
            continue
        if isinstance(method, SeerAttention):
            if seer is None:
                continue
            method = replace(method, weights=seer)
        made[text] = method
    return {text: method for text, method in made.items() if accepts_density(method)}


def table(rows: Sequence[Row]) -> Table:
    out = Table(title="share of the attention mass in the kept blocks (worst head)")
    densities = sorted({row.density for row in rows if row.density is not None}, reverse=True)
    out.add_column("method")
    for density in densities:
        out.add_column(f"density {density:g}", justify="right")
    out.add_column("by threshold", justify="right")
    last = densities[-1]
    for first in sorted((row for row in rows if row.density == last), key=lambda row: -row.recall):
        own = {row.density: row for row in rows if row.method == first.method}
        cells = [f"{own[d].recall:.3f} ({own[d].worst:.3f})" for d in densities]
        free = own.get(None)
        out.add_row(first.method, *cells, f"{free.recall:.3f} at {free.achieved:.3f}" if free else "")
    return out


def merge_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of several over the same calls; a method that several have is that of the last.

    Raises:
        ValueError: reports of other calls, machines or versions.
    """
    names = [f"report {number}" for number in range(1, len(reports) + 1)]
    where, rows = merged_environment(reports, names, ("calls", "steps")), {}
    for report in reports:
        methods = {row["method"] for row in report["rows"]}
        kept = {key: row for key, row in rows.items() if key[0] not in methods}
        rows = kept | {(row["method"], row["density"]): row for row in report["rows"]}
    return {**reports[0], "environment": where, "rows": list(rows.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="by default all, with their defaults")
    parser.add_argument("--densities", default="0.5,0.25,0.125")
    parser.add_argument("--seer", help="gates for seer, which is left out without")
    parser.add_argument("--steps", type=int, default=demo_defaults["num_inference_steps"], help="denoising steps")
    parser.add_argument("--shares", default="0.25,0.75", help="shares of the run at which calls are kept")
    parser.add_argument("--layers", type=int, default=4, help="every n-th layer is looked at")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="PART", help="make --out of these; measures nothing")
    parser.add_argument("--out", type=Path, help="write the rows and the environment to this JSON file")
    options = parser.parse_args()
    if options.merge:
        if options.out is None:
            parser.error("--merge needs --out")
        try:
            report = merge_reports([json.loads(part.read_text("utf-8")) for part in options.merge])
        except ValueError as error:
            parser.error(str(error))
        write_report(report, options.out)
        return
    torch.set_grad_enabled(False)
    calls = capture(options.steps, [float(share) for share in options.shares.split(",")], options.layers)
    methods = methods_for(options.methods.split(","), options.seer)
    rows, worse = [], []
    for density in (float(text) for text in options.densities.split(",")):
        floor = measure(RANDOM, RandomBlocks(density), density, calls)
        rows.append(floor)
        for label, method in methods.items():
            row = measure(label, with_density(method, density), density, calls)
            rows.append(row)
            if row.recall < floor.recall:
                worse.append(f"{label} at {density:g} recalls less than random blocks")
            if not math.isclose(row.achieved, density, rel_tol=0.1):
                worse.append(f"{label} at {density:g} keeps {row.achieved:.3f}")
    for label, method in methods.items():
        free = without_density(method)
        if free is not None:
            rows.append(measure(label, free, None, calls))
    console = Console(width=100)
    console.print(table(rows))
    for line in worse:
        console.print(line, style="red")
    if options.out is not None:
        report = {"environment": environment(), "calls": [str(call.site) for call in calls], "steps": options.steps}
        options.out.write_text(json.dumps(report | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
