"""What `safe_remainder` changes on the demo model's attention, and what trying costs.

python scripts/bench_safety.py --out safety.json

Every layer of a dense run at some steps, the blocks that AdaSpa and lea choose: errors of each head's output without a
remainder, with it, and with it where the trial lets it be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_sparse import AdaSpa, AttentionPlan, LeastError, Site, load_pipeline, safe_remainder, sparse_attention
from dit_sparse.bench.report import environment, write_report
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.kernels import dense_attention
from dit_sparse.pipelines import observe_values
from dit_sparse.types import REMAINDERS

METHODS: dict[str, Callable[[float], Any]] = {
    "adaspa, 64 in raster order": lambda density: AdaSpa(density, block=64),
    "adaspa, tiles of 2x8x4": lambda density: AdaSpa(density, tile=(2, 8, 4)),
    "lea": lambda density: LeastError(density, early=1),
}


class Trials:
    """Looks at the calls of a dense run; `heads` has `(none, with it, tried)` errors by method and remainder."""

    def __init__(self, steps: list[int], densities: list[float]) -> None:
        self.steps, self.densities = steps, densities
        self.heads: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def watch(self, site: Site, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        if site.branch == "uncond" or site.step not in self.steps:
            return
        dense = self._timed("dense", lambda: dense_attention(q, k, v))
        for name, make in METHODS.items():
            for density in self.densities:
                plan = make(density).plan(q, k, v, site, None).with_remainder("none")
                without = self._errors(q, k, v, plan, dense)
                for remainder in REMAINDERS[1:]:
                    own = plan.with_remainder(remainder)
                    tried = self._timed(remainder, lambda own=own: safe_remainder(q, k, v, own))  # type: ignore[misc]
                    found = (without, self._errors(q, k, v, own, dense), self._errors(q, k, v, tried, dense))
                    self.heads[name, remainder] += list(zip(*(x.tolist() for x in found), strict=True))

    def _errors(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dense: Tensor) -> Tensor:
        """`[B * H]`, relative."""
        apart = sparse_attention(q, k, v, plan) - dense
        return (apart.float().flatten(2).norm(dim=2) / dense.float().flatten(2).norm(dim=2)).flatten()

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def rows(self) -> list[dict[str, Any]]:
        """A row for each method and remainder; `change` is the tried error over the untried one."""
        rows = []
        for (method, remainder), heads in self.heads.items():
            none, untried, tried = zip(*heads, strict=True)
            change = sorted(b / a for a, b in zip(untried, tried, strict=True))
            rows.append(
                {
                    "method": method,
                    "remainder": remainder,
                    "heads": len(heads),
                    "median error": [statistics.median(x) for x in (none, untried, tried)],
                    "mean error": [statistics.mean(x) for x in (none, untried, tried)],
                    "largest error": [max(x) for x in (none, untried, tried)],
                    "largest over none": [max(b / a for a, b in zip(none, x, strict=True)) for x in (untried, tried)],
                    "change": [change[0], statistics.median(change), change[len(change) * 9 // 10], change[-1]],
                    "heads that change": sum(abs(c - 1) > 1e-3 for c in change) / len(change),
                }
            )
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="A large red cross moving left on a navy background.")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 8], help="of ten")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.0625, 0.125, 0.25])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pipe = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    trials = Trials(options.steps, options.densities)
    with observe_values(pipe, trials.watch), torch.inference_mode():
        arguments = {**demo_defaults, "num_inference_steps": 10}
        pipe(options.prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments)
    found = {
        "settings": {**vars(options), "out": None},
        "environment": environment(pipe.device),
        "milliseconds": {name: 1e3 * statistics.median(x) for name, x in trials.seconds.items()},
        "rows": trials.rows(),
    }
    write_report(found, options.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
