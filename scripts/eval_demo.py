"""Measure the demo model: generate from 40 held-out prompts and let OpenCV read colour, shape and motion off the clips.

    python scripts/eval_demo.py --out eval.json --sheet sheet.png
    python scripts/eval_demo.py --device cpu --batch 1 --prompts 4

The prompts describe clips that training never shows (`dit_sparse.demo.clips.held_out_clips`); the judge
(`dit_sparse.demo.judge`) does not see them. The same judge also reads the rendered clips themselves, where what it gets
wrong is its own fault, and those clips after a round trip through the VAE. The model can stand above that by a clip:
its shapes are other ones, and where a shape is just recognised, chance decides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import cv2
import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLWan, WanPipeline

from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.demo.clips import ClipSpec, caption, held_out_clips, render_clips
from dit_sparse.demo.judge import Reading, read_clip

ASPECTS = ("colour", "shape", "motion", "background")
DIRECTIONS = ("left", "right", "up", "down")


def prompts_of(specs: list[ClipSpec]) -> list[str]:
    """Return a complete caption of each clip, in varied wording."""
    return [caption(spec, np.random.default_rng(spec.seed), complete=True) for spec in specs]


def expected(spec: ClipSpec) -> dict[str, str]:
    item = spec.objects[0]
    return {"colour": item.colour, "shape": item.shape, "motion": item.motion, "background": spec.background}


def verdicts(spec: ClipSpec, reading: Reading) -> dict[str, bool]:
    return {aspect: getattr(reading, aspect) == word for aspect, word in expected(spec).items()}


def totals(specs: list[ClipSpec], readings: list[Reading]) -> dict[str, int]:
    """Count right answers per aspect; `direction` is motion where the prompt names one of four directions."""
    right = [verdicts(spec, reading) for spec, reading in zip(specs, readings, strict=True)]
    counts = {"prompts": len(specs)} | {aspect: sum(r[aspect] for r in right) for aspect in ASPECTS}
    moving = [r["motion"] for s, r in zip(specs, right, strict=True) if s.objects[0].motion in DIRECTIONS]
    return counts | {"direction": sum(moving), "direction_prompts": len(moving)}


def ground_truth(specs: list[ClipSpec]) -> list[np.ndarray]:
    size = (demo_defaults["num_frames"], demo_defaults["height"], demo_defaults["width"])
    videos = render_clips(specs, *(int(length) for length in size))
    return list((videos.permute(0, 2, 3, 4, 1) * 127.5 + 127.5).round().byte().numpy())


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, clip: np.ndarray) -> np.ndarray:
    """Return a clip, uint8 `[T, H, W, 3]`, as the VAE gives it back."""
    video = torch.from_numpy(clip).to(vae.device, vae.dtype).permute(3, 0, 1, 2)[None] / 127.5 - 1
    decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample[0].clamp(-1, 1)
    return (decoded.permute(1, 2, 3, 0).float() * 127.5 + 127.5).round().byte().cpu().numpy()


def generate(pipe: WanPipeline, prompts: list[str], seed: int, batch: int) -> list[np.ndarray]:
    """Return one clip per prompt, uint8 `[T, H, W, 3]`; the noise depends on the prompt's place alone."""
    clips: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
        frames = pipe(part, **demo_defaults, generator=generators, output_type="np").frames
        clips += list((np.asarray(frames) * 255).round().astype(np.uint8))
        print(f"{len(clips)} of {len(prompts)} clips", file=sys.stderr)
    return clips


def contact_sheet(clips: list[np.ndarray], titles: list[str], columns: int = 2, shown: int = 6) -> np.ndarray:
    """Return an image `[H, W, 3]` with a row of frames per clip under its title."""
    tiles = []
    for clip, title in zip(clips, titles, strict=True):
        row = np.concatenate([clip[i] for i in np.linspace(0, len(clip) - 1, shown).round().astype(int)], axis=1)
        strip = np.full((16, row.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, title, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(np.concatenate([strip, row]))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def environment(device: torch.device, model: Path) -> dict[str, str | None]:
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    commit = None
    if git := shutil.which("git"):
        here = Path(__file__).parent
        answer = subprocess.run([git, "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True, cwd=here)
        commit = answer.stdout.strip() or None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "transformer_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder in diffusers' format; the bundled model by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=1, help="prompts per pipeline call")
    parser.add_argument("--prompts", type=int, default=len(held_out_clips()), help="only the first of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the clips here as PNG")
    options = parser.parse_args(arguments)
    model = options.model or demo_model_path()
    device = torch.device(options.device)

    specs = list(held_out_clips())[: options.prompts]
    prompts = prompts_of(specs)
    rendered = ground_truth(specs)
    judge = totals(specs, [read_clip(clip) for clip in rendered])

    pipe = WanPipeline.from_pretrained(model, dtype=getattr(torch, options.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    vae = totals(specs, [read_clip(round_trip(pipe.vae, clip)) for clip in rendered])
    start = time.perf_counter()
    clips = generate(pipe, prompts, options.seed, options.batch)
    seconds = time.perf_counter() - start
    readings = [read_clip(clip) for clip in clips]

    result = {
        "command": f"scripts/eval_demo.py --model {model.name} --batch {options.batch} --dtype {options.dtype}",
        **environment(device, model),
        "settings": {**demo_defaults, "dtype": options.dtype, "seed": options.seed, "batch": options.batch},
        "seconds": round(seconds, 1),
        "judge_on_ground_truth": judge,
        "judge_on_vae_round_trip": vae,
        "totals": totals(specs, readings),
        "clips": [
            {
                "prompt": prompt,
                "expected": expected(spec),
                "reading": asdict(reading) | {"shape_overlap": round(reading.shape_overlap, 3)},
                "right": verdicts(spec, reading),
            }
            for prompt, spec, reading in zip(prompts, specs, readings, strict=True)
        ],
    }
    for clip in result["clips"]:
        wrong = [f"{aspect}: {clip['reading'][aspect]}" for aspect in ASPECTS if not clip["right"][aspect]]
        print(f"{clip['prompt']:75s} {'; '.join(wrong) or 'right'}")
    print("judge on ground truth", judge)
    print("judge on the VAE's round trip", vae)
    print("model", result["totals"], f"{seconds:.1f} s")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.sheet:
        cv2.imwrite(str(options.sheet), cv2.cvtColor(contact_sheet(clips, prompts), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
