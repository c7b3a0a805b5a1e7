"""Draws the pictures of docs/remainder.md: where the output errs without a remainder, with means and with values.

python scripts/draw_remainder.py --out docs/images            # error maps of one head of the demo model's attention
python scripts/draw_remainder.py --out docs/images --videos   # frames of its videos and what differs, besides

The relative errors of all heads at the step that is drawn are printed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_sparse import AttentionPlan, LeastError, Schedule, Site, load_pipeline, sparse_attention
from dit_sparse.bench.report import environment
from dit_sparse.calibrate.draw import MARGIN, below, beside, labelled, save_picture
from dit_sparse.compare.render import Stage
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.eval.fidelity import psnr
from dit_sparse.kernels import dense_attention
from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.moments import block_moments
from dit_sparse.kernels.remainder import remainder_terms
from dit_sparse.pipelines import observe_values
from dit_sparse.types import Remainder

DRAWN: tuple[Remainder, ...] = ("none", "mean", "value")
SIDE = 288
DECADES = (-3, 0)
KEPT = (225, 229, 233)
FRAMES = (6, 22)
LOUDER = 5


@dataclass(frozen=True)
class Call:
    """`q, k, v` `[1, H, N, D]` of one layer, and what dense attention makes of them."""

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    def error(self, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """What is wrong with the output under `plan`, `[1, H, N, D]`, and the plan's row sums `[1, H, N]`."""
        out, lse = sparse_attention(self.q, self.k, self.v, plan, return_lse=True)
        return out - self.out, lse

    def size(self) -> Tensor:
        """`[H]` root mean square, over tokens, of the norm of the output."""
        return self.out[0].square().sum(-1).mean(-1).sqrt()


def error_parts(call: Call, head: int, plan: AttentionPlan, lse: Tensor) -> Iterator[Tensor]:
    """For each query block `[L, Mk, D]`: what each key block adds to the error of one head, in the plan's orders.

    Of a query with dense output o, a block that adds n and z to numerator and denominator, and as its remainder n' and
    z', adds ((n' - n) - (z' - z) o) / Z, Z being the plan's denominator. Summed over the blocks that is the error.

    Args:
        call: the layer.
        head: which of its heads.
        plan: whose orders are the same for all heads.
        lse: `[1, H, N]` the plan's row sums.
    """
    own, scale = slice(head, head + 1), call.q.shape[-1] ** -0.5
    q, out, sums = (plan.q_order.permute(x[:, own].float()) for x in (call.q, call.out, lse[..., None]))
    k, v = (plan.kv_order.permute(x[:, own].float()) for x in (call.k, call.v))
    rows, columns = (BlockLayout.of_head(order, 0, 0) for order in (plan.q_order, plan.kv_order))
    kept = plan.block_mask.kept_blocks.expand(1, call.q.shape[1], -1, -1)[:, own]
    keys, values = (columns.split(x)[0, 0] for x in (k, v))
    inside = torch.arange(columns.blocks.largest) < columns.sizes[0, 0, :, None]
    terms = products = None
    if plan.remainder != "none":
        terms = remainder_terms(q, k, v, rows, columns, kept, scale, plan.remainder)
        products = block_moments(k, columns, v, products=True).products
    of_blocks = zip(*(rows.split(x)[0, 0] for x in (q, out, sums)), rows.sizes[0, 0].tolist(), strict=True)
    for block, (*padded, size) in enumerate(of_blocks):
        own_q, own_out, own_sums = (x[:size] for x in padded)
        own_q = own_q * scale
        scores = torch.einsum("id,mld->iml", own_q, keys) - own_sums[..., None]
        weights = scores.masked_fill(~inside, -math.inf).exp()
        parts = weights.sum(-1)[..., None] * own_out[:, None] - torch.einsum("iml,mld->imd", weights, values)
        if terms is not None and products is not None:
            bias = terms.bias[0, 0, block]
            a = (own_q @ terms.keys[0, 0].T + bias - own_sums).exp()
            parts += a[..., None] * (terms.values[0, 0] - own_out[:, None])
            if terms.slopes is not None and bias.isfinite().any():
                share = (own_q.mean(0) @ terms.keys[0, 0].T + bias).softmax(-1)
                first_order = torch.einsum("id,mde->ime", own_q, products[0, 0].float())
                parts += a.sum(-1)[:, None, None] * share[:, None] * first_order
        yield parts * ~kept[0, 0, block, :, None]


def coloured(errors: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Relative errors as a picture on the scale of `colour_bar`."""
    low, high = DECADES
    place = (np.log10(errors.clip(10.0**low)) - low) / (high - low)
    gray = (255 * (1 - place.clip(0, 1))).round().astype(np.uint8)
    pixels = cv2.cvtColor(cv2.applyColorMap(gray, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def colour_bar(width: int) -> Image.Image:
    """The scale of `coloured`, with its decades under it."""
    low, high = DECADES
    bar = coloured(10 ** np.linspace(low, high, width)[None], (width, 12))
    ticks = Image.new("RGB", (width, 18), (255, 255, 255))
    pen = ImageDraw.Draw(ticks)
    for decade in range(low, high + 1):
        place = round((decade - low) / (high - low) * (width - 1))
        pen.line((place, 0, place, 3), (35, 35, 35))
        anchor = "la" if decade == low else "ra" if decade == high else "ma"
        pen.text((place, 4), f"{10.0**decade:g}", (35, 35, 35), ImageFont.load_default(12), anchor=anchor)
    return below([bar, ticks], gap=0)


def token_map(call: Call, head: int, plan: AttentionPlan, frame: int) -> Image.Image:
    """The error of each token of one frame, over the root mean square of the head's output."""
    grid, size = call.site.grid, float(call.size()[head])
    video = call.error(plan)[0][0, head, grid.video_start :][: grid.video_len].norm(dim=-1)
    return coloured((video.view(grid.shape)[frame] / size).numpy(), (SIDE, SIDE * grid.height // grid.width))


def block_map(call: Call, head: int, plan: AttentionPlan) -> Image.Image:
    """The root mean square, over the queries of a block, of what each key block adds to their error; kept ones gray."""
    parts = error_parts(call, head, plan, call.error(plan)[1])
    errors = torch.stack([part.square().sum(-1).mean(0).sqrt() for part in parts]) / call.size()[head]
    picture = coloured(errors.numpy(), (SIDE, SIDE))
    kept = plan.block_mask.kept_blocks.expand(1, call.q.shape[1], -1, -1)[0, head].numpy()
    picture.paste(KEPT, mask=Image.fromarray(kept).resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("L"))
    return picture


def draw_maps(call: Call, head: int, plan: AttentionPlan, frame: int) -> Image.Image:
    """A column for each remainder."""
    plans = [plan.with_remainder(kind) for kind in DRAWN]
    shares = relative_errors(call, plan)[:, head].tolist()
    texts = [f"{kind}: relative error {share:.3f}" for kind, share in zip(DRAWN, shares, strict=True)]
    tokens = [labelled(token_map(call, head, p, frame), text) for p, text in zip(plans, texts, strict=True)]
    blocks = beside([block_map(call, head, p) for p in plans])
    return below(
        [
            beside(tokens),
            labelled(blocks, "what each key block (across) adds to the error of each query block (down); gray: kept"),
            labelled(colour_bar(SIDE), "error over the root mean square of the output"),
        ],
        gap=MARGIN,
    )


def relative_errors(call: Call, plan: AttentionPlan) -> Tensor:
    """`[3, H]` relative error of each head under each of `DRAWN`."""
    found = [call.error(plan.with_remainder(kind))[0][0].square().sum(-1).mean(-1).sqrt() for kind in DRAWN]
    return torch.stack(found) / call.size()


def calls_at(pipe: Any, prompt: str, step: int, arguments: Mapping[str, Any]) -> dict[int, Call]:
    """The conditional branch's call of every layer at one step of a dense run."""
    calls: dict[int, Call] = {}

    def watch(site: Site, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        if site.branch != "uncond" and site.step == step:
            calls[site.layer] = Call(site, q.clone(), k.clone(), v.clone(), dense_attention(q, k, v))

    with observe_values(pipe, watch), torch.inference_mode():
        pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments)
    return calls


def draw_videos(pipe: Any, prompt: str, density: float, arguments: Mapping[str, Any]) -> Image.Image:
    """Frames of the dense video, and `LOUDER` times the difference of that with each remainder."""
    stage, method = Stage(pipe, arguments), LeastError(density)
    dense = stage.render(None, prompt, 0).frames.clip(0, 1)
    rows = [labelled(film(dense), "dense")]
    for kind in DRAWN:
        made = stage.render(Schedule(method, warmup=0, remainder=kind, never_slower=False), prompt, 0).frames.clip(0, 1)
        decibels = psnr(made, dense)
        print(json.dumps({"remainder": kind, "psnr": round(decibels, 2)}))
        strips = beside([film(made), film((LOUDER * np.abs(made - dense)).clip(0, 1))])
        rows.append(labelled(strips, f"{kind}: {decibels:.1f} dB; on the right {LOUDER} times what differs from dense"))
    return below(rows)


def film(frames: np.ndarray) -> Image.Image:
    """Some frames of `[T, H, W, 3]` in [0, 1], side by side."""
    chosen = (frames[list(FRAMES)] * 255).round().astype(np.uint8)
    return beside([Image.fromarray(frame) for frame in chosen], gap=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="A large red cross moving left on a navy background.")
    parser.add_argument("--density", type=float, default=0.125)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--frame", type=int, default=4, help="latent frame that is drawn")
    parser.add_argument("--videos", action="store_true", help="draw the videos too")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    options = parser.parse_args()
    # Before the minutes that the pictures take.
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    arguments = {**demo_defaults, "num_inference_steps": options.steps}
    calls = calls_at(pipe, options.prompt, options.steps // 2, arguments)
    method = LeastError(options.density, early=1)
    print(json.dumps({"settings": {**vars(options), "out": None}, "environment": environment(pipe.device)}))
    for layer, call in calls.items():
        plan = method.plan(call.q, call.k, call.v, call.site, None)
        errors = relative_errors(call, plan)
        for head, own in enumerate(errors.T.tolist()):
            print(json.dumps({"layer": layer, "head": head, **dict(zip(DRAWN, own, strict=True))}))
        if layer == options.layer:
            picture = draw_maps(call, options.head, plan, options.frame)
            save_picture(picture, options.out / "remainder.png")
    if options.videos:
        picture = draw_videos(pipe, options.prompt, options.density, arguments)
        save_picture(picture, options.out / "remainder-videos.png")


if __name__ == "__main__":
    main()
