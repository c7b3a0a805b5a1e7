"""Draws the picture of docs/methods/paro.md: attention of the demo model in raster order and in the chosen one.

python scripts/draw_paro.py --out docs/images/paro.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dit_sparse import Paro, load_pipeline
from dit_sparse.calibrate.draw import below, beside, labelled, mask_picture, save_picture
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.masks import best_orders, heaviest_blocks
from dit_sparse.methods.paro import mass_under
from dit_sparse.pipelines import observe
from dit_sparse.reorder import AXIS_ORDERS, axis_order

METHOD = Paro(density=0.25)
SIZE = 230


class Watch:
    """Mass of every block of every layer and head under each order, and the chosen orders, at one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.heads: list[tuple[float, int, int, int, torch.Tensor]] = []

    def __call__(self, site: Any, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> None:
        if site.step != self.step or site.branch != "cond":
            return
        chosen = best_orders(METHOD.metrics(q, k, lse, site.grid), METHOD.alpha).tolist()
        orders = [axis_order(site.grid, axes, METHOD.block) for axes in AXIS_ORDERS]
        masses = [mass_under(order, q, k, lse) for order in orders]
        kept = [heaviest_blocks(mass, METHOD.density, orders[0].offsets, site.grid) for mass in masses]
        recall = [
            ((mass * mask).sum((-1, -2)) / mass.sum((-1, -2)))[0] for mass, mask in zip(masses, kept, strict=True)
        ]
        for head, best in enumerate(chosen):
            gain = float(recall[best][head] - recall[0][head])
            maps = torch.stack([masses[0][0, head], masses[best][0, head], kept[best][0, head].float()])
            shares = torch.tensor([recall[0][head], recall[best][head]])
            self.heads.append((gain, site.layer, head, best, torch.cat([maps.flatten(), shares])))


def row(layer: int, head: int, best: int, content: torch.Tensor) -> Image.Image:
    """One head: its block masses in raster order, in the chosen one, and the mask."""
    blocks = round(((len(content) - 2) / 3) ** 0.5)
    raster, own, kept = content[:-2].view(3, blocks, blocks)
    before, after = content[-2:].tolist()
    # The root of the mass, so that what is faint can be seen.
    pictures = [mask_picture((mass / mass.quantile(0.995)).sqrt(), SIZE) for mass in (raster, own)]
    texts = (
        f"layer {layer}, head {head}: FHW, recall {before:.2f}",
        f"{AXIS_ORDERS[best]}, recall {after:.2f}",
        f"kept, density {METHOD.density:g}",
    )
    return beside([labelled(p, t) for p, t in zip([*pictures, mask_picture(kept, SIZE)], texts, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", default="A large red cross moving left on a navy background.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pipe = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    watch = Watch(options.steps // 2)
    arguments = {**demo_defaults, "num_inference_steps": options.steps, "output_type": "latent"}
    with observe(pipe, watch):
        pipe(options.prompt, generator=torch.Generator().manual_seed(0), **arguments)
    by_gain = sorted(watch.heads, key=lambda entry: -entry[0])
    save_picture(below([row(*entry[1:]) for entry in by_gain[: options.heads]]), options.out)
    for gain, layer, head, best, _ in by_gain:
        print(f"layer {layer} head {head}: {AXIS_ORDERS[best]}, recall {gain:+.3f} over raster")


if __name__ == "__main__":
    main()
