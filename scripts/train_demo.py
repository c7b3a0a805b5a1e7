"""Train the demo model: a small Wan text-to-video model of procedurally rendered, captioned clips.

    python scripts/train_demo.py --checkpoint checkpoint --out model          # one GPU, one go
    python scripts/train_demo.py --checkpoint checkpoint --seconds 550 --until 0.5   # part of it; run again to go on
    python scripts/train_demo.py --checkpoint checkpoint --out model --export-only
    python scripts/train_demo.py --checkpoint fresh --out better --start-from model  # go on from an exported model
    python scripts/train_demo.py --checkpoint checkpoint --out model --smoke  # a minute on a CPU, to see that it runs

Three stages: the VAE, then transformer and text encoder on half-size frames, then both on the full grid. A call resumes
from the checkpoint folder when it finds one there. `--until` says how far the full-grid stage has come when this call
ends, as a fraction of the whole run; the learning rate follows that fraction, whatever the number of calls.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5Config, UMT5EncoderModel

from dit_sparse.demo.clips import ClipSpec, caption, render_clips, sample_clip, vocabulary
from dit_sparse.demo.tokenizer import SPECIAL_TOKENS, make_tokenizer

log = logging.getLogger("train_demo")

LATENT_CHANNELS = 8
TEXT_DIM = 128
PIPELINE_TEXT_LENGTH = 512  # WanPipeline's default max_sequence_length: cross-attention sees the zero padding too
CAPTION_TOKENS = 40
FLOW_SHIFT = 3.0
SHARD_BYTES = 15 * 2**20
TEST_SEED = 2**40  # clips from here on are never trained on


@dataclass
class Progress:
    """What a run has done so far; it is saved with the checkpoint and copied beside the exported model."""

    layers: int
    clips_drawn: int = 0
    vae_steps: int = 0
    vae_seconds: float = 0.0
    vae_batch: int = 0
    vae_psnr: float = 0.0
    coarse_steps: int = 0
    coarse_seconds: float = 0.0
    coarse_batch: int = 0
    full_steps: int = 0
    full_seconds: float = 0.0
    full_batch: int = 0
    full_fraction: float = 0.0
    loss: float = 0.0
    latents_mean: list[float] = field(default_factory=list)
    latents_std: list[float] = field(default_factory=list)
    device: str = ""
    torch: str = ""

    def draw(self, count: int) -> list[ClipSpec]:
        """Return the next `count` training clips; no clip is drawn twice in a run."""
        specs = [sample_clip(self.clips_drawn + i) for i in range(count)]
        self.clips_drawn += count
        return specs


@dataclass(frozen=True)
class Size:
    """Frames and pixels of a clip."""

    frames: int
    height: int
    width: int

    def half(self) -> Size:
        return Size(self.frames, self.height // 2, self.width // 2)


class Deadline:
    """A span of wall-clock time that starts when it is made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = max(seconds, 1e-3)
        self.start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def fraction(self) -> float:
        return min(1.0, self.elapsed / self.seconds)

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed


# The VAE ------------------------------------------------------------------------------------------------------------


def make_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """Return Wan's VAE at 0.7M parameters, 4x in time, height and width."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        scale_factor_spatial=4,
        latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=std or [1.0] * LATENT_CHANNELS,
    )


def encode_whole(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Return `vae._encode(video)`, computed over all frames at once.

    The VAE is causal and works through four frames at a time with a cache of the last ones, one small kernel after
    the other. Over the whole clip the same sums take an eighth of the launches.
    """
    encoder = vae.encoder
    x = encoder.conv_in(video)
    for block in encoder.down_blocks:
        shortcut = block.avg_shortcut(x)
        for resnet in block.resnets:
            x = resnet(x)
        if block.downsampler is not None:
            x = _per_frame(block.downsampler.resample, x)
            if block.downsampler.mode == "downsample3d":
                x = torch.cat([x[:, :, :1], block.downsampler.time_conv(x)], dim=2)
        x = x + shortcut
    x = encoder.mid_block(x)
    return vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x))))


def decode_whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return `vae._decode(latents)` over all frames at once, and without its clamp, which would stop gradients."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        shortcut = block.avg_shortcut(x, first_chunk=True) if block.avg_shortcut is not None else None
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsampler is not None:
            if block.upsampler.mode == "upsample3d" and x.shape[2] > 1:
                # The first frame stays one frame; every later one becomes two.
                pairs = block.upsampler.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
                x = torch.cat([x[:, :, :1], torch.stack(pairs.unbind(1), dim=3).flatten(2, 3)], dim=2)
            x = _per_frame(block.upsampler.resample, x)
        if shortcut is not None:
            x = x + shortcut
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def _per_frame(module: nn.Module, x: Tensor) -> Tensor:
    frames = x.shape[2]
    return module(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)


def vae_losses(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training loss and the mean squared error of one batch `[B, 3, T, H, W]`."""
    with autocast(video.device):
        moments = encode_whole(vae, video)
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 6)
    latents = mean + torch.randn_like(mean) * torch.exp(log_variance / 2)
    with autocast(video.device):
        decoded = decode_whole(vae, latents)
    squared = F.mse_loss(decoded.float(), video)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return 4 * squared + F.l1_loss(decoded.float(), video) + 1e-4 * divergence, squared.detach()


def train_vae(vae: AutoencoderKLWan, progress: Progress, size: Size, batch: int, seconds: float) -> None:
    """Train the VAE on full-length clips; at shorter ones colours drift later in the clip."""
    device = vae.device
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] -= 4
    layout = fastest_layout(vae, progress, size, batch)
    peak = 1.5e-3
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0, fused=device.type == "cuda"
    )
    deadline = Deadline(seconds)
    step = 0
    while deadline.left > 0:
        rate = peak * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * deadline.fraction)))
        set_rate(optimizer, rate)
        video = render_clips(progress.draw(batch), size.frames, size.height, size.width, device)
        loss, squared = vae_losses(vae, video.contiguous(memory_format=layout))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 1:
            # Reading a number waits for the device, so that the clock and the queue do not drift apart.
            log.info(
                "vae step %d  psnr %.2f dB  rate %.1e  %.3f s/step",
                step,
                psnr(squared.item()),
                rate,
                deadline.elapsed / step,
            )
    vae.to(memory_format=torch.contiguous_format)
    progress.vae_steps, progress.vae_batch = step, batch
    progress.vae_seconds = round(deadline.elapsed, 1)
    progress.vae_psnr = round(vae_test_psnr(vae, size), 2)
    log.info("vae done: %d steps, %.2f dB on unseen clips", step, progress.vae_psnr)


def fastest_layout(vae: AutoencoderKLWan, progress: Progress, size: Size, batch: int) -> torch.memory_format:
    """Put the convolutions into the memory layout that trains faster here, and return it."""
    if vae.device.type != "cuda":
        return torch.contiguous_format
    seconds = {}
    layouts = (torch.contiguous_format, torch.channels_last_3d)
    for layout in layouts:
        convert_layout(vae, layout)
        for attempt in range(5):
            if attempt == 2:
                torch.cuda.synchronize()
                start = time.monotonic()
            video = render_clips(progress.draw(batch), size.frames, size.height, size.width, vae.device)
            vae_losses(vae, video.contiguous(memory_format=layout))[0].backward()
        torch.cuda.synchronize()
        seconds[layout] = (time.monotonic() - start) / 3
        vae.zero_grad(set_to_none=True)
    best = min(layouts, key=seconds.__getitem__)
    convert_layout(vae, best)
    log.info("vae seconds per step by layout: %s", seconds)
    return best


def convert_layout(vae: AutoencoderKLWan, layout: torch.memory_format) -> None:
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)


@torch.no_grad()
def vae_test_psnr(vae: AutoencoderKLWan, size: Size, clips: int = 32) -> float:
    """Return the PSNR of unseen clips after a round trip through the VAE as the pipeline runs it, in chunks."""
    errors = []
    for start in range(0, clips, 8):
        specs = [sample_clip(TEST_SEED + start + i) for i in range(8)]
        video = render_clips(specs, size.frames, size.height, size.width, vae.device)
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        errors.append(F.mse_loss(decoded, video).item())
    return psnr(sum(errors) / len(errors))


def psnr(squared_error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of values in -1..1."""
    return 10 * math.log10(4 / max(squared_error, 1e-10))


@dataclass
class LatentPool:
    """Encoded clips, kept on the device: normalised latents `[clips, 8, T, H, W]` and their descriptions."""

    latents: Tensor
    specs: list[ClipSpec]


@torch.no_grad()
def encode_pool(vae: AutoencoderKLWan, progress: Progress, size: Size, clips: int, batch: int = 64) -> LatentPool:
    """Render and encode fresh clips; the first pool of a run also fixes the latents' mean and deviation."""
    watch = Deadline(1)
    parts, specs = [], []
    for start in range(0, clips, batch):
        drawn = progress.draw(min(batch, clips - start))
        video = render_clips(drawn, size.frames, size.height, size.width, vae.device)
        with autocast(vae.device):
            moments = encode_whole(vae, video)
        parts.append(moments[:, :LATENT_CHANNELS].half())
        specs += drawn
        if start % (batch * 8) == 0:
            wait(vae.device)
    latents = torch.cat(parts)
    if not progress.latents_mean:
        sample = latents[:2000].float()
        progress.latents_mean = [round(value, 5) for value in sample.mean((0, 2, 3, 4)).tolist()]
        progress.latents_std = [round(value, 5) for value in sample.std((0, 2, 3, 4)).tolist()]
    mean, std = (
        torch.tensor(values, device=vae.device).half().view(1, -1, 1, 1, 1)
        for values in (progress.latents_mean, progress.latents_std)
    )
    latents = latents.sub_(mean).div_(std)
    wait(vae.device)
    log.info("encoded %d clips of %s in %.1f s", clips, tuple(latents.shape[1:]), watch.elapsed)
    return LatentPool(latents, specs)


# The transformer and its text encoder -----------------------------------------------------------------------------


class Denoiser(nn.Module):
    """WanTransformer3DModel with the UMT5 encoder that is trained beside it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.text = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(vocabulary()) + len(SPECIAL_TOKENS),
                d_model=TEXT_DIM,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=3,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=128,
            ffn_dim=768,
            num_layers=layers,
        )
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the text embedding `[B, 512, 128]` exactly as WanPipeline makes it: zero beyond the last token."""
        hidden = self.text(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
        return F.pad(hidden, (0, 0, 0, PIPELINE_TEXT_LENGTH - ids.shape[1]))

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.transformer(noisy, timestep, self.embed(ids, mask), return_dict=False)[0]


class Captioner:
    """Turns clips into token ids: fresh wording every time, some captions empty, some with unknown words."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.tokenizer = make_tokenizer(vocabulary())
        self.rng = np.random.default_rng(seed)
        self.device = device

    def __call__(self, specs: list[ClipSpec]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, int64 `[B, CAPTION_TOKENS]`."""
        texts = ["" if self.rng.random() < 0.1 else caption(spec, self.rng) for spec in specs]
        batch = [self._with_unknown_words(ids) for ids in self.tokenizer(texts).input_ids]
        ids = torch.zeros(len(batch), CAPTION_TOKENS, dtype=torch.long)
        for row, tokens in zip(ids, batch, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        ids = ids.to(self.device, non_blocking=True)
        return ids, (ids != 0).long()

    def _with_unknown_words(self, ids: list[int]) -> list[int]:
        """Put one to three `<unk>` into one of ten captions, so that a word the model does not know is harmless."""
        if len(ids) > 1 and self.rng.random() < 0.1:
            for _ in range(int(self.rng.integers(1, 4))):
                ids.insert(int(self.rng.integers(len(ids))), SPECIAL_TOKENS.index("<unk>"))
        return ids


class Trainer:
    """The denoiser, its moving average and its two optimizers."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.progress = progress
        self.device = device
        self.net = Denoiser(progress.layers).to(device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        named = dict(self.net.named_parameters())
        self.matrices = {n: p for n, p in named.items() if n.startswith("transformer.blocks") and p.ndim == 2}
        self.others = {n: p for n, p in named.items() if n not in self.matrices}
        self.muon = torch.optim.Muon(
            self.matrices.values(), lr=2e-3, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(
            self.others.values(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0, fused=device.type == "cuda"
        )
        self.captioner = Captioner(progress.clips_drawn, device)
        self.order = np.random.default_rng(progress.clips_drawn + 1)

    @property
    def steps(self) -> int:
        return self.progress.coarse_steps + self.progress.full_steps

    def run(self, pool: LatentPool, batch: int, seconds: float, schedule: Callable[[float], float]) -> int:
        """Train for `seconds`; `schedule` maps the span's fraction to a factor of the learning rates.

        Returns:
            The number of steps taken.
        """
        deadline = Deadline(seconds)
        losses: list[Tensor] = []
        parameters = list(self.net.parameters())
        averages = list(self.ema.parameters())
        first = self.steps
        taken = 0
        while deadline.left > 0:
            # A short warm-up after every start: the optimizers' resumed state is rounded.
            warm_up = min(1.0, (first + taken + 1) / 100, (taken + 1) / 30)
            rate = warm_up * schedule(deadline.fraction)
            set_rate(self.muon, 2e-3 * rate)
            set_rate(self.adamw, 1.5e-3 * rate)
            losses.append(self.step(pool, batch))
            taken += 1
            decay = min(0.998, (first + taken) / (first + taken + 9))
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - decay)
            if taken in (1, 5, 20) or taken % 50 == 0:
                self.progress.loss = round(torch.stack(losses).mean().item(), 5)
                losses.clear()
                log.info(
                    "step %d  loss %.4f  rate x%.3f  %.3f s/step",
                    first + taken,
                    self.progress.loss,
                    rate,
                    deadline.elapsed / taken,
                )
        wait(self.device)
        return taken

    def step(self, pool: LatentPool, batch: int) -> Tensor:
        """Take one optimizer step on the flow-matching loss, and return that loss."""
        chosen = self.order.integers(0, len(pool.specs), batch)
        clean = pool.latents[torch.from_numpy(chosen).to(self.device, non_blocking=True)].float()
        ids, mask = self.captioner([pool.specs[i] for i in chosen])
        # Stratified over the batch: every step sees all noise levels.
        uniform = (torch.arange(batch, device=self.device) + torch.rand(batch, device=self.device)) / batch
        sigma = FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)
        noise = torch.randn_like(clean)
        level = sigma.view(-1, 1, 1, 1, 1)
        with autocast(self.device), attention_backends(self.device):
            predicted = self.net((1 - level) * clean + level * noise, sigma * 1000, ids, mask)
        loss = F.mse_loss(predicted.float(), noise - clean)
        self.muon.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.muon.step()
        self.adamw.step()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs; what is only an average or a momentum is kept in 16 bits."""
        tensors = {f"net.{n}": p.detach().float() for n, p in self.net.named_parameters()}
        tensors |= {f"ema.{n}": p.half() for n, p in self.ema.named_parameters()}
        for name, parameter in self.matrices.items():
            if state := self.muon.state.get(parameter):
                tensors[f"muon.{name}"] = state["momentum_buffer"].bfloat16()
        for name, parameter in self.others.items():
            if state := self.adamw.state.get(parameter):
                tensors[f"adamw.first.{name}"] = state["exp_avg"].bfloat16()
                tensors[f"adamw.second.{name}"] = state["exp_avg_sq"].bfloat16()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for prefix, module in (("net", self.net), ("ema", self.ema)):
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"{prefix}.{name}"])
        for name, parameter in self.matrices.items():
            if f"muon.{name}" in tensors:
                momentum = tensors[f"muon.{name}"].to(parameter)
                self.muon.state[parameter] = {"momentum_buffer": momentum}
        for name, parameter in self.others.items():
            if f"adamw.first.{name}" in tensors:
                self.adamw.state[parameter] = {
                    "step": torch.tensor(float(self.steps), device=self.device),
                    "exp_avg": tensors[f"adamw.first.{name}"].to(parameter),
                    "exp_avg_sq": tensors[f"adamw.second.{name}"].to(parameter),
                }


def full_grid_schedule(start: float, until: float) -> Callable[[float], float]:
    """Return the learning-rate factor over one call: constant, then linear to nearly 0 over the run's last 65%."""

    def factor(fraction: float) -> float:
        done = start + (until - start) * fraction
        return 0.01 + 0.99 * min(1.0, (1 - done) / 0.65)

    return factor


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast(device: torch.device) -> AbstractContextManager:
    """Compute in bfloat16 on a GPU; on a CPU it gains nothing."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def attention_backends(device: torch.device) -> AbstractContextManager:
    """Prefer cuDNN's attention, the fastest of PyTorch's on Hopper."""
    if device.type != "cuda":
        return nullcontext()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Checkpoint and export --------------------------------------------------------------------------------------------


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
    """Write the run's state; the old checkpoint goes only when the new one is complete."""
    tensors = {f"vae.{n}": t.float() for n, t in vae.state_dict().items()}
    if trainer is not None:
        tensors |= trainer.state()
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for i, part in enumerate(shards(tensors)):
        save_file(part, fresh / f"state-{i:02d}.safetensors")
    (fresh / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    log.info("saved %s, full grid at %.3f", folder, progress.full_fraction)


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


# The command line -------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the run's state, resumed if present")
    parser.add_argument("--out", type=Path, help="write the model here, in diffusers' format, when the call ends")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1600, help="wall-clock seconds of this call")
    parser.add_argument("--vae-seconds", type=float, default=320)
    parser.add_argument("--coarse-seconds", type=float, default=75)
    parser.add_argument("--until", type=float, default=1.0, help="fraction of the full-grid stage done after this call")
    parser.add_argument("--clips", type=int, default=32_000, help="clips encoded for each stage of this call")
    parser.add_argument("--batch", type=int, default=64, help="clips a step at the full grid; four times that before")
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--start-from", type=Path, help="an exported model to go on from, where no checkpoint is")
    parser.add_argument("--export-only", action="store_true", help="write --out from the checkpoint, without training")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on tiny clips for a few seconds")
    options = parser.parse_args(arguments)
    if options.export_only and options.out is None:
        parser.error("--export-only needs --out")
    if options.smoke:
        smoke = {"vae_seconds": 2, "coarse_seconds": 2, "seconds": 40, "clips": 16, "batch": 2, "vae_batch": 2}
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
    if (options.checkpoint / "progress.json").is_file():
        progress, tensors = load_checkpoint(options.checkpoint)
        log.info("resumed at %s", asdict(progress))
    elif options.start_from is not None:
        progress = Progress(**json.loads((options.start_from / "training.json").read_text()))
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

    if progress.vae_steps == 0:
        train_vae(vae, progress, size, options.vae_batch, options.vae_seconds)
        save_checkpoint(options.checkpoint, progress, vae, None)
    vae.eval().requires_grad_(False)
    pool = encode_pool(vae, progress, size, options.clips)

    if progress.coarse_steps == 0:
        coarse_pool = encode_pool(vae, progress, size.half(), options.clips)
        taken = trainer.run(coarse_pool, 4 * options.batch, options.coarse_seconds, lambda fraction: 1.0)
        progress.coarse_steps, progress.coarse_batch = taken, 4 * options.batch
        progress.coarse_seconds = options.coarse_seconds
        del coarse_pool

    if device.type == "cuda":
        trainer.net.transformer.compile_repeated_blocks(dynamic=False)
    seconds = call.left - 8 if not options.smoke else 2  # saving takes a few seconds
    start = progress.full_fraction
    if seconds > 0 and options.until > start:
        taken = trainer.run(pool, options.batch, seconds, full_grid_schedule(start, options.until))
        progress.full_steps += taken
        progress.full_batch = options.batch
        progress.full_seconds = round(progress.full_seconds + seconds, 1)
        progress.full_fraction = options.until
    save_checkpoint(options.checkpoint, progress, vae, trainer)
    if options.out is not None:
        export(options.out, progress, vae, trainer)


if __name__ == "__main__":
    main()
