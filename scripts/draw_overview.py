"""Draws the README's picture: frames of one video, dense and sparse, and block masks of three layers.

python scripts/draw_overview.py --out docs/images/overview.png
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np
import torch

from dit_sparse import AdaSpa, Schedule, load_pipeline, sparsify, statistics, unsparsify
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.eval.fidelity import compare
from dit_sparse.pipelines import session_of

MARGIN, LABEL, BACKGROUND, INK = 12, 24, 255, (40, 40, 40)


def render(pipe, prompt: str, seed: int) -> np.ndarray:
    """Frames `[T, H, W, 3]` float32 in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    frames = pipe(prompt, **demo_defaults, generator=generator, output_type="np").frames
    return np.asarray(frames[0], dtype=np.float32)


def labelled(image: np.ndarray, text: str) -> np.ndarray:
    """`image` `[H, W, 3]` uint8 with a line of text above it."""
    bar = np.full((LABEL, image.shape[1], 3), BACKGROUND, np.uint8)
    cv2.putText(bar, text, (0, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)
    return np.concatenate([bar, image])


def film(frames: np.ndarray, count: int = 6) -> np.ndarray:
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    return (np.concatenate(list(chosen), axis=1) * 255).round().astype(np.uint8)


def mask_picture(kept: torch.Tensor, size: int) -> np.ndarray:
    """Block mask `[Mq, Mk]` bool as a square picture, kept blocks dark."""
    gray = np.where(kept.numpy(), 60, 235).astype(np.uint8)
    return cv2.cvtColor(cv2.resize(gray, (size, size), interpolation=cv2.INTER_NEAREST), cv2.COLOR_GRAY2RGB)


def joined(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    """Pictures side by side (`axis` 1) or below each other (`axis` 0), with margins, filled up to the largest."""
    across = 1 - axis
    size = max(picture.shape[across] for picture in pictures)
    parts = []
    for picture in pictures:
        padding = [(0, 0)] * 3
        padding[across] = (0, size - picture.shape[across])
        padding[axis] = (0, MARGIN)
        parts.append(np.pad(picture, padding, constant_values=BACKGROUND))
    return np.concatenate(parts, axis=axis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="A large red cross moving left on a navy background.")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pipe = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)
    dense = render(pipe, options.prompt, options.seed)
    other_seed = compare(render(pipe, options.prompt, options.seed + 1), dense)
    sparse = render(
        sparsify(pipe, Schedule(AdaSpa(density=options.density), never_slower=False)), options.prompt, options.seed
    )
    fidelity = compare(sparse, dense)
    found = statistics(pipe)
    plans = {key[2]: p.plan for key, p in session_of(pipe).previous.items() if key[3] == "cond"}
    layers = [0, len(plans) // 2, len(plans) - 1]
    unsparsify(pipe)
    films = [
        labelled(film(dense), f"dense: {options.prompt}"),
        labelled(film(sparse), f"AdaSpa, density {options.density:g}: PSNR {fidelity.psnr:.1f} dB against dense"),
    ]
    masks = [
        labelled(
            mask_picture(plans[layer].block_mask.kept_blocks[0, head], 192), f"kept blocks: layer {layer}, head {head}"
        )
        for layer in layers
        for head in (0,)
    ]
    picture = np.pad(
        joined([*films, joined(masks, 1)], 0), ((MARGIN, 0), (MARGIN, 0), (0, 0)), constant_values=BACKGROUND
    )
    temporary = options.out.with_name(f"{options.out.stem}.{os.getpid()}.tmp.png")
    cv2.imwrite(str(temporary), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    os.replace(temporary, options.out)
    figures = {"psnr": fidelity.psnr, "ssim": fidelity.ssim, "other_seed_psnr": other_seed.psnr}
    print(json.dumps(figures | {"sparse_density": found.sparse_density}))


if __name__ == "__main__":
    main()
