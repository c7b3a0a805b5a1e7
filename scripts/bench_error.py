"""How the error that `lea` reckons with compares with the error that its plans make, on the demo model.

    python scripts/bench_error.py --out docs/error.json
    python scripts/bench_error.py --table --out docs/error.json    # the table of an earlier run, in Markdown

The model runs dense, and at some steps every layer's attention is planned with each threshold as `error`. Reckoned is
the root of the summed squared errors of the blocks that the plan does not keep, by the search, over the norm of the
output; beside it stands the relative error of the output with each remainder, over all heads of the layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_sparse import LeastError, Site, load_pipeline, sparse_attention
from dit_sparse.bench.report import environment, write_report
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.kernels import attend_rows, dense_attention, output_errors
from dit_sparse.pipelines import observe_values

PROMPTS = ("A large red cross moving left on a navy background.", "A big red ball moving left on a gray background.")
THRESHOLDS = (0.005, 0.01, 0.02, 0.04, 0.08)
SHARES = (0.0, 0.2, 0.5, 0.9)


@dataclass(frozen=True)
class Row:
    """One call at one threshold: errors over the norm of the output, as reckoned and with two remainders."""

    prompt: int
    step: int
    layer: int
    threshold: float
    density: float
    reckoned: float
    mean: float
    value: float


class Errors:
    """An observer, for `observe_values`, of the conditional branch at the steps `at`."""

    def __init__(self, at: set[int]) -> None:
        self.at, self.prompt = at, 0
        self.rows: list[Row] = []

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        if site.step in self.at and site.branch != "uncond":
            self.rows += [self._measure(site, q, k, v, threshold) for threshold in THRESHOLDS]

    def _measure(self, site: Site, q: Tensor, k: Tensor, v: Tensor, threshold: float) -> Row:
        method = LeastError(error=threshold, early=1)
        plan = method.plan(q, k, v, site, None)
        dense = dense_attention(q, k, v)
        errors = {
            kind: float((sparse_attention(q, k, v, plan.with_remainder(kind)) - dense).norm() / dense.norm())
            for kind in ("mean", "value")
        }
        own_q, (own_k, own_v) = plan.q_order.permute(q), (plan.kv_order.permute(x) for x in (k, v))
        probes = attend_rows(own_q, own_k, own_v, plan.q_order, method.rows)
        by_block = output_errors(own_q, own_k, own_v, plan.q_order, plan.kv_order, rows=method.rows, probes=probes)
        left = (by_block * ~plan.block_mask.kept_blocks).sum() / probes.squares(plan.q_order).sum()
        density = float(plan.density.mean())
        return Row(self.prompt, site.step, site.layer, threshold, density, float(left.sqrt()), **errors)


def measure(steps: int) -> list[Row]:
    """Both prompts, dense."""
    pipe: Any = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    errors = Errors({round(share * steps) for share in SHARES})
    arguments = {**demo_defaults, "num_inference_steps": steps, "output_type": "latent"}
    for number, prompt in enumerate(PROMPTS):
        errors.prompt = number
        with observe_values(pipe, errors), torch.inference_mode():
            pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments)
    return errors.rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many times the reckoned error the true one is, by layer and threshold; and what comes with a threshold.

    Plans that keep every block leave nothing to compare.
    """
    rows = [row for row in rows if row["reckoned"]]
    lines = [f"| | {' | '.join(f'{t:g}' for t in THRESHOLDS)} |", "|---" * (1 + len(THRESHOLDS)) + "|"]

    def line(text: str, value: Callable[[Mapping[str, Any]], float], layer: int | None = None) -> None:
        own = [row for row in rows if layer in (None, row["layer"])]
        cells = (_span([value(row) for row in own if row["threshold"] == t]) for t in THRESHOLDS)
        lines.append(f"| {text} | {' | '.join(cells)} |")

    for layer in sorted({row["layer"] for row in rows}):
        line(f"layer {layer}", lambda row: row["value"] / row["reckoned"], layer)
    line("all layers", lambda row: row["value"] / row["reckoned"])
    line("with `mean`", lambda row: row["mean"] / row["reckoned"])
    line("error", lambda row: row["value"])
    line("density", lambda row: row["density"])
    return "\n".join(lines)


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the table of the report at --out")
    options = parser.parse_args()
    if not options.table:
        rows = [asdict(row) for row in measure(options.steps)]
        rows = [{name: round(x, 5) if isinstance(x, float) else x for name, x in row.items()} for row in rows]
        found = {"environment": environment(torch.device("cpu")), "steps": options.steps, "prompts": PROMPTS}
        write_report({**found, "rows": rows}, options.out)
    print(table(json.loads(options.out.read_text(encoding="utf-8"))["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
