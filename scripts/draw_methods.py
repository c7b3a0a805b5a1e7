"""Draws the pictures of docs/methods: what each method sees of the demo model's attention, and what it keeps.

python scripts/draw_methods.py --out docs/images
python scripts/draw_methods.py --methods adaspa --out docs/images
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dit_sparse import AdaSpa, AttentionPlan, Neighborhood, Paro, Schedule, Site, load_pipeline
from dit_sparse.calibrate.draw import below, beside, labelled, mask_picture, save_picture
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.masks import best_orders, heaviest_blocks
from dit_sparse.methods.paro import mass_under
from dit_sparse.pipelines import observe
from dit_sparse.reorder import AXIS_ORDERS, axis_order
from dit_sparse.types import Previous

DENSITY = 0.25
SIZE = 230
PIXELS = 3
OUTLINE = (204, 51, 17)


@dataclass(frozen=True)
class Call:
    """One layer's `q, k` `[1, H, N, D]` and row LSE at the step that is drawn, and the last LSE of the warm-up."""

    site: Site
    q: Tensor
    k: Tensor
    lse: Tensor
    old_lse: Tensor

    def weights(self, head: int) -> Tensor:
        """The attention map `[N, N]` of one head."""
        scores = self.q[0, head].float() @ self.k[0, head].float().mT * self.q.shape[-1] ** -0.5
        return scores.sub_(self.lse[0, head, :, None]).exp_()


class Watch:
    """Keeps the calls of one step, conditional branch alone."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.calls: dict[int, Call] = {}
        self._old: dict[int, Tensor] = {}

    def __call__(self, site: Site, q: Tensor, k: Tensor, lse: Tensor) -> None:
        if site.branch != "cond":
            return
        if site.step == Schedule(AdaSpa()).warmup_steps(site.num_steps) - 1:
            self._old[site.layer] = lse.clone()
        elif site.step == self.step:
            self.calls[site.layer] = Call(site, q.clone(), k.clone(), lse.clone(), self._old[site.layer])


def mass_picture(mass: Tensor) -> Image.Image:
    """Block masses `[M, M]`; the root of the mass, so that what is faint can be seen."""
    return mask_picture((mass / mass.quantile(0.995)).sqrt(), SIZE)


def recall_of(mass: Tensor, kept: Tensor) -> Tensor:
    """`[H]` share of the mass `[1, H, M, M]` in the blocks kept."""
    return ((mass * kept).sum((-1, -2)) / mass.sum((-1, -2)))[0]


def row(pictures: list[Image.Image], texts: list[str]) -> Image.Image:
    return beside([labelled(picture, text) for picture, text in zip(pictures, texts, strict=True)])


def draw_paro(calls: Mapping[int, Call]) -> Image.Image:
    """The three heads that gain most: block masses in raster order and in the chosen one, and the mask."""
    method, found = Paro(density=DENSITY), []
    for layer, call in calls.items():
        grid = call.site.grid
        orders = [axis_order(grid, axes, method.block) for axes in AXIS_ORDERS]
        masses = [mass_under(order, call.q, call.k, call.lse) for order in orders]
        kept = [heaviest_blocks(mass, method.density, orders[0].offsets, grid) for mass in masses]
        recall = [recall_of(*pair) for pair in zip(masses, kept, strict=True)]
        chosen = best_orders(method.metrics(call.q, call.k, call.lse, grid), method.alpha).tolist()
        for head, best in enumerate(chosen):
            before, after = float(recall[0][head]), float(recall[best][head])
            print(f"paro: layer {layer} head {head}: {AXIS_ORDERS[best]}, recall {after - before:+.3f} over raster")
            pictures = [mass_picture(masses[0][0, head]), mass_picture(masses[best][0, head])]
            pictures.append(mask_picture(kept[best][0, head], SIZE))
            texts = [f"layer {layer}, head {head}: FHW, recall {before:.2f}"]
            texts += [f"{AXIS_ORDERS[best]}, recall {after:.2f}", f"kept, density {method.density:g}"]
            found.append((after - before, row(pictures, texts)))
    found.sort(key=lambda entry: -entry[0])
    return below([picture for _, picture in found[:3]])


def draw_adaspa(calls: Mapping[int, Call]) -> Image.Image:
    """The heads of the layer in which budgets differ and recall differs most: block masses, and the mask."""
    method, found = AdaSpa(density=DENSITY), []
    for layer, call in calls.items():
        plan = method.plan(call.q, call.k, call.k, call.site, Previous(None, call.old_lse))
        kept, mass = plan.block_mask.kept_blocks, mass_under(plan.q_order, call.q, call.k, call.lse)
        densities, recall = plan.density[0].tolist(), recall_of(mass, kept)
        print(f"adaspa: layer {layer}: densities {densities}, recall {recall.tolist()}")
        rows = [
            row(
                [mass_picture(mass[0, head]), mask_picture(kept[0, head], SIZE)],
                [f"layer {layer}, head {head}: mass", f"kept, density {density:.3f}, recall {recall[head]:.2f}"],
            )
            for head, density in enumerate(densities)
        ]
        found.append((max(densities) - min(densities), float(recall.max() - recall.min()), below(rows)))
    return max(found, key=lambda entry: entry[:2])[-1]


def draw_neighborhood(calls: Mapping[int, Call]) -> Image.Image:
    """The heads of which the window holds most and least: one query's attention with its window, and block masses."""
    method, first, found = Neighborhood(density=DENSITY, stride=1), calls[0], []
    plan = method.plan(first.q, first.k, first.k, first.site, None)
    mask = plan.token_mask()[0, 0]
    for layer, call in calls.items():
        for head in range(call.q.shape[1]):
            weights = call.weights(head)
            recall = float((weights * mask).sum() / weights.sum())
            print(f"neighborhood: layer {layer} head {head}: recall {recall:.3f}")
            found.append((recall, layer, head))
    ends = [max(found), min(found)]
    strips = [query_strip(calls[layer], head, recall, method) for recall, layer, head in ends]
    squares, texts = [], []
    for _, layer, head in ends:
        squares.append(
            mass_picture(mass_under(plan.q_order, calls[layer].q, calls[layer].k, calls[layer].lse)[0, head])
        )
        texts.append(f"layer {layer}, head {head}: mass by tiles")
    return below([*strips, row([*squares, block_shares(plan)], [*texts, "share of the pairs kept, by tiles"])])


def query_strip(call: Call, head: int, recall: float, method: Neighborhood) -> Image.Image:
    """What the middle query attends to, a picture a frame, with its window."""
    grid = call.site.grid
    place = [length // 2 for length in grid.shape]
    query = (place[0] * grid.height + place[1]) * grid.width + place[2]
    weights = call.weights(head)[query].view(grid.shape)
    gray = (235 - 190 * (weights / weights.flatten().quantile(0.995)).clamp(0, 1).sqrt()).round()
    bounds = []
    for axis, at in zip(method.predicate(grid).axes, place, strict=True):
        _, start, end = axis.bounds(torch.tensor(at))
        bounds.append((int(start), int(end)))
    pictures = []
    for frame, pixels in enumerate(gray.numpy().astype(np.uint8)):
        size = grid.width * PIXELS, grid.height * PIXELS
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).convert("RGB")
        if bounds[0][0] <= frame < bounds[0][1]:
            (top, bottom), (left, right) = bounds[1:]
            box = left * PIXELS, top * PIXELS, right * PIXELS - 1, bottom * PIXELS - 1
            ImageDraw.Draw(picture).rectangle(box, outline=OUTLINE)
        pictures.append(picture)
    text = (
        f"layer {call.site.layer}, head {head}: where the middle query looks, frame by frame; windows hold {recall:.2f}"
    )
    return labelled(beside(pictures, gap=4), text)


def block_shares(plan: AttentionPlan) -> Image.Image:
    """The share of each block's query-key pairs that the plan keeps."""
    mask, offsets = plan.block_mask.to_bool(plan.q_order.index, plan.kv_order.index)[0, 0], plan.q_order.offsets[0, 0]
    sums = torch.nn.functional.pad(mask.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    sizes = offsets.diff().double()
    return mask_picture(sums[offsets.long()][:, offsets.long()].diff(dim=0).diff(dim=1) / sizes[:, None] / sizes, SIZE)


DRAWERS = {"paro": draw_paro, "adaspa": draw_adaspa, "neighborhood": draw_neighborhood}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", default="A large red cross moving left on a navy background.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--methods", nargs="+", choices=DRAWERS, default=list(DRAWERS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    options = parser.parse_args()
    pipe = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    watch = Watch(options.steps // 2)
    arguments: dict[str, Any] = {**demo_defaults, "num_inference_steps": options.steps, "output_type": "latent"}
    with observe(pipe, watch):
        pipe(options.prompt, generator=torch.Generator().manual_seed(0), **arguments)
    for name in options.methods:
        save_picture(DRAWERS[name](watch.calls), options.out / f"{name}.png")


if __name__ == "__main__":
    main()
