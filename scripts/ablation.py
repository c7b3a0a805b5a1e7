"""What each part of least-error attention is worth: videos with one part at a time replaced, on the demo model.

    python scripts/ablation.py --out ablation.json              # meant for a GPU; options as of bench_fidelity.py
    python scripts/ablation.py --table --out ablation.json      # the table of an earlier run, in Markdown

The report is one of `bench_fidelity.py`, which also merges reports of single prompts (`--merge`).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from bench_fidelity import Case, open_bench, parse
from diffusers import UniPCMultistepScheduler
from fidelity_tables import print_report, read_report
from rich.console import Console
from torch import Tensor

from dit_sparse import AdaSpa, LeastError, Schedule
from dit_sparse.course import plan_steps
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.kernels import Probes, block_mass, dense_attention, output_errors, remainder_errors
from dit_sparse.masks import best_blocks, select_density
from dit_sparse.methods.lea import Orders
from dit_sparse.pipelines.steps import StepCounter
from dit_sparse.types import Method, Scope, Site, TokenGrid

DENSITIES = (0.125, 0.0625)
EVERY_DENSITY = (0.25, *DENSITIES)


@dataclass(frozen=True)
class ByMass(LeastError):
    """Blocks by their true attention mass."""

    name: ClassVar[str] = "lea by mass"

    def errors(self, q: Tensor, k: Tensor, v: Tensor, orders: Orders, probes: Probes | None) -> Tensor:
        lse = dense_attention(q, k, v, return_lse=True)[1]
        return block_mass(q, k, lse, orders[0].offsets, orders[1].offsets, scale=q.shape[-1] ** -0.5)


@dataclass(frozen=True)
class ByMeanQuery(LeastError):
    """Blocks by SVG-EAR's bound, from the mean query of a block."""

    name: ClassVar[str] = "lea by mean query"

    def errors(self, q: Tensor, k: Tensor, v: Tensor, orders: Orders, probes: Probes | None) -> Tensor:
        return remainder_errors(q, k, v, *orders).exp() * orders[0].block_sizes[..., None].float()


@dataclass(frozen=True)
class ByEveryQuery(LeastError):
    """Blocks by the same error on all queries: as good as the choice can be."""

    name: ClassVar[str] = "lea by every query"

    def errors(self, q: Tensor, k: Tensor, v: Tensor, orders: Orders, probes: Probes | None) -> Tensor:
        return output_errors(q, k, v, *orders, rows=orders[0].geometry.largest)


@dataclass(frozen=True)
class ByHead(LeastError):
    """The same budget for every head."""

    name: ClassVar[str] = "lea by head"

    def choose(self, errors: Tensor, density: float, orders: Orders, grid: TokenGrid) -> Tensor:
        heads = errors.flatten(0, 1)[:, None]
        return best_blocks(heads, density, orders[0].offsets, orders[1].offsets, grid).view_as(errors)


@dataclass(frozen=True)
class ByRow(LeastError):
    """The same number of blocks in every row."""

    name: ClassVar[str] = "lea by row"

    def choose(self, errors: Tensor, density: float, orders: Orders, grid: TokenGrid) -> Tensor:
        return select_density(errors, density, *orders, grid)


@dataclass(frozen=True)
class ByBranch(LeastError):
    """A plan for each guidance branch."""

    name: ClassVar[str] = "lea by branch"
    scope: ClassVar[Scope] = "call"


def by_noise(density: float) -> tuple[float, float]:
    """`noise_densities`, the first four times the second, that come to `density` over a run of the demo model."""
    scheduler = UniPCMultistepScheduler.from_pretrained(demo_model_path(), subfolder="scheduler")
    steps, counter = int(demo_defaults["num_inference_steps"]), StepCounter()
    counter.watch(scheduler)
    scheduler.set_timesteps(steps)
    schedule = Schedule(LeastError(), warmup=0, noise_densities=(1.0, 0.25))
    plans = sorted(plan_steps(schedule, steps))
    mean = 0.0
    for step, after in pairwise([*plans, steps]):
        counter.step = step
        site = Site(TokenGrid(1, 1, 1), step=step, num_steps=steps, sigma=counter.sigma)
        mean += schedule.method_for(site).density * (after - step) / steps  # type: ignore[attr-defined]
    return density / mean, density / mean / 4


def cases() -> list[Case]:
    """The method at each density, and every variant at the smaller ones."""

    def case(label: str, method: Method, **options: object) -> Case:
        schedule = replace(Schedule(method, warmup=0), **options)  # type: ignore[arg-type]
        return Case(f"{label}; {method.density:g}", schedule)  # type: ignore[attr-defined]

    found = [case("as it is", LeastError(density)) for density in EVERY_DENSITY]
    for density in DENSITIES:
        found += [
            case("chosen by true attention mass", ByMass(density)),
            case("by SVG-EAR's bound from the mean query", ByMeanQuery(density)),
            case("by the error on every query", ByEveryQuery(density)),
            case("8 queries a block", LeastError(density, rows=8)),
            case("one tile a query block", LeastError(density, query_tiles=1, rows=8)),
            case("four tiles a query block", LeastError(density, query_tiles=4)),
            case("one budget a head", ByHead(density)),
            case("one budget a row", ByRow(density)),
            case("remainder `none`", LeastError(density), remainder="none"),
            case("remainder `mean`", LeastError(density), remainder="mean"),
            case("remainder `mass`", LeastError(density), remainder="mass"),
            case("the same density in every step", LeastError(density, early=1)),
            case("`early` 8", LeastError(density, early=8)),
            case("density by log-SNR", LeastError(density), noise_densities=by_noise(density)),
            case("a plan for each branch", ByBranch(density)),
            case("tiles of 1x8x8", LeastError(density, tile=(1, 8, 8))),
            case("tiles of 2x4x8", LeastError(density, tile=(2, 4, 8))),
            case("in raster order, two rows of a frame", LeastError(density, tile=(1, 2, 32))),
            case("AdaSpa with remainder `value`", AdaSpa(density), remainder="value"),
        ]
    return found


def table(report: dict) -> str:
    """Rows of variants, columns of densities: median PSNR and the range over prompts."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in report["videos"]:
        variant, _, density = row["label"].rpartition("; ")
        if variant:
            values.setdefault(variant, {}).setdefault(density, []).append(row["psnr"])
    columns = [f"{density:g}" for density in EVERY_DENSITY]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for variant, own in values.items():
        cells = [
            f"{statistics.median(own[c]):.1f} ({min(own[c]):.1f} to {max(own[c]):.1f})" if c in own else ""
            for c in columns
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse([*(sys.argv[1:] if arguments is None else arguments), "--methods", ""])
    if not options.table:
        bench = open_bench(options)
        bench.videos(cases(), options.prompts)
        print_report(bench.report, Console(width=150))
        if bench.report["failed"]:
            raise SystemExit(1)
    sys.stdout.write(table(read_report(options.out)))


if __name__ == "__main__":
    main()
