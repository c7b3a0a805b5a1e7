"""Train the demo model: a small Wan text-to-video model of procedurally rendered, captioned clips.

    python scripts/train_demo.py --checkpoint checkpoint --out model          # one GPU, one go
    python scripts/train_demo.py --checkpoint checkpoint --seconds 550 --until 0.5   # part of it; run again to go on
    python scripts/train_demo.py --checkpoint checkpoint --out model --export-only
    python scripts/train_demo.py --checkpoint fresh --out better --start-from model --vae-seconds 260  # go on from it
    python scripts/train_demo.py --checkpoint checkpoint --out model --smoke  # a minute on a CPU, to see that it runs

Three stages: the VAE, then transformer and text encoder on half-size frames, then both on the full grid, where every
other step sees only the openings of four times as many clips. A call resumes from the checkpoint folder when it finds
one there. `--until` says how far the full-grid stage has come when this call ends, as a fraction of the whole run; the
learning rate follows that fraction, whatever the number of calls.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from demo_training.checkpoint import (
    check_folder,
    export,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    start_from,
)
from demo_training.denoiser import Span, Trainer
from demo_training.run import Deadline, Progress, Size
from demo_training.vae import LatentPool, encode_pool, make_vae, train_vae
from torch import Tensor

log = logging.getLogger("train_demo")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the run's state, resumed if present")
    parser.add_argument("--out", type=Path, help="write the model here, in diffusers' format, when the call ends")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1600, help="wall-clock seconds of this call")
    parser.add_argument("--vae-seconds", type=float, help="320 for a new VAE, 0 for one that is trained already")
    parser.add_argument("--coarse-seconds", type=float, default=75)
    parser.add_argument("--until", type=float, default=1.0, help="fraction of the full-grid stage done after this call")
    parser.add_argument(
        "--openings-until", type=float, default=0.75, help="fraction after which steps see whole clips only"
    )
    parser.add_argument("--clips", type=int, default=32_000, help="clips encoded for each stage of this call")
    parser.add_argument("--batch", type=int, default=64, help="clips a step at the full grid; four times that before")
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--start-from", type=Path, help="an exported model to go on from, where no checkpoint is")
    parser.add_argument("--export-only", action="store_true", help="write --out from the checkpoint, without training")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on tiny clips for a few seconds")
    options = parser.parse_args(arguments)
    if options.export_only and options.out is None:
        parser.error("--export-only needs --out")
    if not 0 < options.until <= 1:
        parser.error(f"--until must be above 0 and at most 1, got {options.until}")
    if options.smoke:
        smoke = {"coarse_seconds": 2, "seconds": 40, "clips": 16, "batch": 2, "vae_batch": 2}
        vars(options).update(smoke, layers=2)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    call = Deadline(options.seconds)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)9.0f ms  %(message)s", stream=sys.stdout)
    device = torch.device(options.device)
    size = Size(13, 48, 64) if options.smoke else Size(29, 96, 128)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    tensors: dict[str, Tensor] = {}
    progress = Progress(layers=options.layers)
    check_folder(options.checkpoint)
    checkpoint = find_checkpoint(options.checkpoint)
    if options.export_only and checkpoint is None and options.start_from is None:
        raise SystemExit(f"--export-only needs a trained model: there is no checkpoint in {options.checkpoint}")
    if checkpoint is not None:
        progress, tensors = load_checkpoint(checkpoint)
        log.info("resumed at %s", asdict(progress))
    elif options.start_from is not None:
        record = options.start_from / "training.json"
        if not record.is_file():
            raise SystemExit(
                f"--start-from must be a model that this script wrote, got {options.start_from} without {record.name}"
            )
        progress = Progress(**json.loads(record.read_text()))
        progress.full_fraction = 0.0  # the learning rate starts over
    progress.device = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    progress.torch = torch.__version__
    torch.manual_seed(progress.clips_drawn)

    vae = make_vae().to(device)
    trainer = Trainer(progress, device)
    if tensors:
        vae.load_state_dict({n.removeprefix("vae."): t for n, t in tensors.items() if n.startswith("vae.")})
    elif options.start_from is not None:
        start_from(options.start_from, vae, trainer)
    if any(n.startswith("net.") for n in tensors):
        trainer.load_state(tensors)
    if options.export_only:
        export(options.out, progress, vae, trainer)
        return

    vae_seconds = options.vae_seconds
    if vae_seconds is None:
        vae_seconds = 0 if progress.vae_steps else 2 if options.smoke else 320
    if vae_seconds > 0:
        train_vae(vae, progress, size, options.vae_batch, vae_seconds)
    vae.eval().requires_grad_(False)

    if progress.coarse_steps == 0:
        pool = encode_pool(vae, progress, size.half(), options.clips)
        taken = trainer.run(pool, 4 * options.batch, options.coarse_seconds, lambda fraction: 1.0)
        progress.coarse_steps, progress.coarse_batch = taken, 4 * options.batch
        progress.coarse_seconds = options.coarse_seconds
    if options.until > progress.full_fraction:
        train_on_full_grid(trainer, encode_pool(vae, progress, size, options.clips), options, call)

    save_checkpoint(options.checkpoint, progress, vae, trainer)
    if options.out is not None:
        export(options.out, progress, vae, trainer)


def train_on_full_grid(trainer: Trainer, pool: LatentPool, options: argparse.Namespace, call: Deadline) -> None:
    """Spend what is left of this call on the last stage, but for the seconds that saving takes."""
    progress = trainer.progress
    if trainer.device.type == "cuda":
        trainer.net.transformer.compile_repeated_blocks(dynamic=False)
    seconds = 2 if options.smoke else call.left - 8
    if seconds <= 0:
        log.warning("no time left for the full grid: --seconds is %g", options.seconds)
        return
    span = Span(progress.full_fraction, options.until)
    before = progress.opening_steps
    taken = trainer.run(pool, options.batch, seconds, span.learning_rate, span.ends(options.openings_until))
    progress.full_steps += taken - (progress.opening_steps - before)
    progress.full_batch = options.batch
    progress.full_seconds = round(progress.full_seconds + seconds, 1)
    progress.full_fraction = options.until


if __name__ == "__main__":
    main()
