"""The demo model's VAE: its shape, its training, and clips encoded for the denoiser."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from demo_training.run import LATENT_CHANNELS, TEST_SEED, Deadline, Progress, Size, autocast, set_rate, wait
from dit_sparse.demo.clips import ClipSpec, render_clips, sample_clip

log = logging.getLogger("train_demo")


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
    """Train the VAE, or go on with it, on full-length clips; at shorter ones colours drift later in the clip."""
    device = vae.device
    peak = 1e-3
    if progress.vae_steps == 0:
        peak = 1.5e-3
        with torch.no_grad():
            vae.quant_conv.bias[LATENT_CHANNELS:] -= 4
    layout = fastest_layout(vae, progress, size, batch)
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
    progress.vae_steps += step
    progress.vae_seconds = round(progress.vae_seconds + deadline.elapsed, 1)
    progress.vae_batch = batch
    progress.latents_mean, progress.latents_std = [], []  # the encoder is another one now
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

    def openings(self, frames: int) -> LatentPool:
        """Return the same clips cut after their first latent frames; the causal VAE encodes those as if alone."""
        return LatentPool(self.latents[:, :, :frames], self.specs)


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
