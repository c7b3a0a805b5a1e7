"""A run's state on disk, and the trained model as a folder that plain WanPipeline opens."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo_training.denoiser import FLOW_SHIFT, PIPELINE_TEXT_LENGTH, Trainer
from demo_training.run import Progress
from demo_training.vae import make_vae
from dit_sparse.demo.clips import vocabulary
from dit_sparse.demo.tokenizer import make_tokenizer

log = logging.getLogger("train_demo")

SHARD_BYTES = 15 * 2**20


def shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Cut a state into parts of at most `SHARD_BYTES`."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    yield part


def save_checkpoint(folder: Path, progress: Progress, vae: AutoencoderKLWan, trainer: Trainer | None) -> None:
    """Write the run's state; the old checkpoint goes only when the new one stands in its place.

    Raises:
        FileExistsError: `folder` holds something that is no checkpoint.
    """
    check_folder(folder)
    tensors = {f"vae.{n}": t.float() for n, t in vae.state_dict().items()}
    if trainer is not None:
        tensors |= trainer.state()
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for i, part in enumerate(shards(tensors)):
        save_file(part, fresh / f"state-{i:02d}.safetensors")
    (fresh / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    log.info("saved %s, full grid at %.3f", folder, progress.full_fraction)


def check_folder(folder: Path) -> None:
    """Raise FileExistsError for a folder that holds something other than a checkpoint: saving would replace it."""
    if folder.exists() and not is_checkpoint(folder) and any(folder.iterdir()):
        raise FileExistsError(
            f"--checkpoint must be a checkpoint or a new folder, got {folder}, which holds other files"
        )


def is_checkpoint(folder: Path) -> bool:
    return (folder / "progress.json").is_file()


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in `folder`, or the complete one that a crash while saving left beside it; `None` without any."""
    beside = (folder, folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old"))
    return next((path for path in beside if is_checkpoint(path)), None)


def load_checkpoint(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        tensors |= load_file(path)
    return progress, tensors


def start_from(folder: Path, vae: AutoencoderKLWan, trainer: Trainer) -> None:
    """Load the weights of an exported model; the optimizers start afresh."""
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    vae.load_state_dict(pipe.vae.state_dict())
    for module in (trainer.net, trainer.ema):
        module.text.load_state_dict(pipe.text_encoder.state_dict())
        module.transformer.load_state_dict(pipe.transformer.state_dict())


def export(folder: Path, progress: Progress, vae: AutoencoderKLWan, trainer: Trainer) -> None:
    """Write the moving average and the VAE in half precision as a folder that plain WanPipeline opens."""
    final = make_vae(progress.latents_mean, progress.latents_std)
    final.load_state_dict(vae.state_dict())
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    ema = copy.deepcopy(trainer.ema).cpu()
    WanPipeline(
        tokenizer=make_tokenizer(vocabulary(), PIPELINE_TEXT_LENGTH),
        text_encoder=ema.text.half(),
        vae=final.half(),
        scheduler=scheduler,
        transformer=ema.transformer.half(),
    ).save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / "training.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
    log.info("wrote %s", folder)
