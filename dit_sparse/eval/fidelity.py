"""Paired metrics between a sparse and a dense clip: PSNR and SSIM, in torch alone.

Compare frames in memory or from a lossless file, never from a lossy one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONVENTION", "PSNR_CAP", "Fidelity", "compare", "psnr", "ssim"]

Frames = Tensor | np.ndarray

PSNR_CAP = 100.0
"""PSNR in dB of a frame that is identical, in a clip that is not: FastVideo's convention."""

CONVENTION = "range [0,1]; PSNR: mean over frames, 100 dB cap; SSIM: 11x11 Gaussian, sigma 1.5, no padding"

_WINDOW = 11
_SIGMA = 1.5


@dataclass(frozen=True)
class Fidelity:
    """How near a clip is to another.

    Args:
        psnr: in dB; infinite for identical clips.
        ssim: 1 for identical clips.
        identical: every value is equal.
        frames: number of frames.
        convention: how the figures are defined.
    """

    psnr: float
    ssim: float
    identical: bool
    frames: int
    convention: str = CONVENTION


def compare(a: Frames, b: Frames) -> Fidelity:
    """PSNR and SSIM of the clips `a` and `b`, `[T, H, W, 3]` uint8 or float in [0, 1].

    Raises:
        ValueError: as `psnr` and `ssim`.
    """
    value = psnr(a, b)
    return Fidelity(psnr=value, ssim=ssim(a, b), identical=math.isinf(value), frames=len(a))


def psnr(a: Frames, b: Frames, *, over: Literal["frames", "clip"] = "frames") -> float:
    """Peak signal-to-noise ratio in dB of the clips `a` and `b`, `[T, H, W, 3]` uint8 or float in [0, 1].

    Args:
        over: "frames" is the mean of every frame's PSNR, each at most `PSNR_CAP` (as SVG and FastVideo report it);
            "clip" takes the mean squared error over the clip.

    Raises:
        ValueError: shapes that differ or are no clips, values outside [0, 1] or not finite.
    """
    if over not in ("frames", "clip"):
        raise ValueError(f"over must be 'frames' or 'clip', got {over!r}")
    errors = [(x - y).square().mean().item() for x, y in _pairs(a, b)]
    if not any(errors):
        return math.inf
    if over == "clip":
        return -10 * math.log10(sum(errors) / len(errors))
    values = [min(-10 * math.log10(error), PSNR_CAP) if error else PSNR_CAP for error in errors]
    return sum(values) / len(values)


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity of the clips `a` and `b`, `[T, H, W, 3]` uint8 or float in [0, 1], mean over frames.

    An 11x11 Gaussian window with sigma 1.5, per channel, where it lies wholly inside the frame.

    Raises:
        ValueError: as `psnr`, and frames smaller than the window.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, equation 13.
    """
    if min(a.shape[1:3], default=_WINDOW) < _WINDOW:
        raise ValueError(f"frames must be at least {_WINDOW}x{_WINDOW} for SSIM, got {a.shape[1]}x{a.shape[2]}")
    values = [_frame_ssim(x, y) for x, y in _pairs(a, b)]
    return sum(values) / len(values)


def _frame_ssim(x: Tensor, y: Tensor) -> float:
    c1, c2 = 0.01**2, 0.03**2
    x, y = x.permute(2, 0, 1), y.permute(2, 0, 1)
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast_structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * contrast_structure).mean().item()


def _blur(images: Tensor) -> Tensor:
    """Gaussian window over `images` `[S, 3, H, W]`, which lose `_WINDOW - 1` rows and columns."""
    offsets = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).view(1, 1, -1, 1)
    flat = images.flatten(0, 1).unsqueeze(1)
    return F.conv2d(F.conv2d(flat, weights), weights.mT).squeeze(1).unflatten(0, images.shape[:2])


def _pairs(a: Frames, b: Frames) -> Iterator[tuple[Tensor, Tensor]]:
    """The frames of both clips in turn, `[H, W, 3]` float64 in [0, 1]."""
    if tuple(a.shape) != tuple(b.shape):
        raise ValueError(f"clips must have one shape, got {list(a.shape)} and {list(b.shape)}")
    if a.ndim != 4 or a.shape[-1] != 3 or 0 in a.shape:
        raise ValueError(f"clips must be [T, H, W, 3], got {list(a.shape)}")
    for x, y in zip(a, b, strict=True):
        yield _unit(x), _unit(y)


def _unit(frame: Frames) -> Tensor:
    frame = torch.as_tensor(frame)
    if frame.dtype == torch.uint8:
        return frame.double() / 255
    if not frame.is_floating_point():
        raise ValueError(f"clips must be uint8 or float, got {frame.dtype}")
    frame = frame.double()
    if not (torch.isfinite(frame).all() and frame.min() >= 0 and frame.max() <= 1):
        raise ValueError("clips of floats must lie in [0, 1]")
    return frame
