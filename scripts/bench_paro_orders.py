"""Do the axis orders that PAROAttention's metrics choose gather attention better than the raster order?

Orders are chosen on some prompts and judged on another: at equal density, the share of attention mass that the heaviest
blocks under an order hold (recall), per layer and head of the demo model, the mean over steps and guidance branches.

python scripts/bench_paro_orders.py --out docs/benchmarks/paro_orders.json
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from dit_sparse import Paro, load_pipeline
from dit_sparse.bench.report import environment, write_report
from dit_sparse.calibrate.observers import OrderSearch
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.masks import best_orders, heaviest_blocks
from dit_sparse.methods.paro import mass_under
from dit_sparse.pipelines import observe
from dit_sparse.reorder import AXIS_ORDERS, axis_order

PROMPTS = (
    "A big red ball moving left on a gray background.",
    "A small blue square moving up on a black background.",
)
UNSEEN = "A large red cross moving left on a navy background."


class RecallWatch:
    """Recall of every layer, head and order at each of the `densities`, over the calls of every `stride`-th step."""

    def __init__(self, block: int, densities: list[float], stride: int) -> None:
        self.block, self.densities, self.stride = block, densities, stride
        self.calls: dict[int, list[torch.Tensor]] = defaultdict(list)

    def __call__(self, site: Any, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> None:
        if site.step % self.stride:
            return
        by_order = []
        for axes in AXIS_ORDERS:
            order = axis_order(site.grid, axes, self.block)
            mass = mass_under(order, q, k, lse)
            total = mass.sum((-1, -2))
            kept = [heaviest_blocks(mass, density, order.offsets, site.grid) for density in self.densities]
            by_order.append(torch.stack([((mass * mask).sum((-1, -2)) / total)[0] for mask in kept], -1))
        self.calls[site.layer].append(torch.stack(by_order, 1))

    def recall(self) -> torch.Tensor:
        """`[L, H, 6, densities]` means over the calls."""
        return torch.stack([torch.stack(self.calls[layer]).mean(0) for layer in sorted(self.calls)])


def compare(recall: torch.Tensor, chosen: torch.Tensor) -> dict[str, Any]:
    """How the orders `chosen` `[L, H]` do against raster and against the best, from `recall` `[L, H, 6]`."""
    own = recall.gather(-1, chosen[..., None])[..., 0]
    raster, best = recall[..., 0], recall.amax(-1)
    return {
        "beats_raster": float((own > raster).double().mean()),
        "is_raster": float((chosen == 0).double().mean()),
        "loses_to_raster": float((own < raster).double().mean()),
        "is_best_of_six": float((own == best).double().mean()),
        "raster_is_best_of_six": float((raster == best).double().mean()),
        "recall": float(own.mean()),
        "recall_raster": float(raster.mean()),
        "recall_best_of_six": float(best.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stride", type=int, default=4, help="recall is taken at every n-th step")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument(
        "--densities", type=lambda text: [float(x) for x in text.split(",")], default=[0.5, 0.25, 0.125]
    )
    parser.add_argument("--alphas", type=lambda text: [float(x) for x in text.split(",")], default=[1.0, 0.5, 0.0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pipe = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    arguments = {**demo_defaults, "num_inference_steps": options.steps, "output_type": "latent"}
    search = OrderSearch(Paro(block=options.block))
    with observe(pipe, search):
        for prompt in PROMPTS:
            pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments)
    watch = RecallWatch(options.block, options.densities, options.stride)
    with observe(pipe, watch):
        pipe(UNSEEN, generator=torch.Generator().manual_seed(1), **arguments)
    recall, metrics = watch.recall(), torch.stack(search.metrics()["transformer"])
    report: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "settings": {**vars(options), "out": options.out.name, "prompts": PROMPTS, "unseen": UNSEEN},
        "heads": recall.shape[0] * recall.shape[1],
        "results": [],
        "orders": {},
    }
    for alpha in options.alphas:
        chosen = best_orders(metrics, alpha)
        report["orders"][f"{alpha:g}"] = [[AXIS_ORDERS[n] for n in layer] for layer in chosen.tolist()]
        for place, density in enumerate(options.densities):
            row = {"alpha": alpha, "density": density, **compare(recall[..., place], chosen)}
            report["results"].append(row)
            print({name: round(value, 3) for name, value in row.items()})
    write_report(report, options.out)


if __name__ == "__main__":
    main()
