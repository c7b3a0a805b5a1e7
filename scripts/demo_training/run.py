"""What all stages share: a run's progress, sizes, the clock, and how a device computes."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.demo.clips import ClipSpec, sample_clip

LATENT_CHANNELS = 8
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
    opening_steps: int = 0
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
