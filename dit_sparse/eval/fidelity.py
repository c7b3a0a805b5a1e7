"""Paired metrics between a sparse and a dense clip: PSNR and SSIM in torch alone, and LPIPS where its weights are.

Compare frames in memory or from a lossless file, never from a lossy one (`eval.frames` reads them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CONVENTION",
    "CONVENTIONS",
    "PSNR_CAP",
    "Convention",
    "Fidelity",
    "compare",
    "find_convention",
    "frame_pairs",
    "psnr",
    "ssim",
]

Frames = Tensor | np.ndarray

PSNR_CAP = 100.0
"""PSNR in dB of a frame that is identical, in a clip that is not: FastVideo's convention."""

_WINDOW = 11
_SIGMA = 1.5


@dataclass(frozen=True)
class Convention:
    """How the figures of a pair of clips are defined. All are means over frames of colours in [0, 1].

    Args:
        name: such as "svg".
        window: the weights of SSIM's 11x11 window: "gaussian" with sigma 1.5, or "uniform".
        padding: whether SSIM counts only windows that lie wholly "inside" the frame, or all, with "zeros" around it.
        cap: most that one frame's PSNR counts, in dB; infinite means that one identical frame makes the mean infinite.
        lpips: the network of LPIPS.
        lpips_rescaled: whether colours are brought to [-1, 1] for LPIPS, as it expects them.
        source: who reports figures so.
    """

    name: str
    window: Literal["gaussian", "uniform"]
    padding: Literal["inside", "zeros"]
    cap: float
    lpips: Literal["alex", "vgg"]
    lpips_rescaled: bool
    source: str

    def __str__(self) -> str:
        window = f"11x11 {'Gaussian, sigma 1.5' if self.window == 'gaussian' else 'uniform'}"
        padding = "no padding" if self.padding == "inside" else "zero padding"
        cap = "no cap" if math.isinf(self.cap) else f"{self.cap:g} dB cap"
        return f"range [0,1]; PSNR: mean over frames, {cap}; SSIM: {window}, {padding}"

    @property
    def lpips_text(self) -> str:
        """How LPIPS is defined."""
        network = {"alex": "AlexNet", "vgg": "VGG-16"}[self.lpips]
        return f"LPIPS: {network}, colours in {'[-1,1]' if self.lpips_rescaled else '[0,1]'}"


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("skimage", "gaussian", "inside", PSNR_CAP, "alex", True, "scikit-image, and Wang et al. 2004"),
        Convention("svg", "uniform", "zeros", math.inf, "vgg", False, "Sparse VideoGen's svg/utils/metric.py"),
        Convention(
            "fastvideo", "gaussian", "zeros", PSNR_CAP, "alex", True, "FastVideo's fastvideo/eval/metrics/common"
        ),
    )
}
"""By name. "skimage" is the default here: SSIM as its authors and scikit-image have it."""

DEFAULT = CONVENTIONS["skimage"]
CONVENTION = str(DEFAULT)


def find_convention(name: str) -> Convention:
    """The convention called `name`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {name!r}")
    return CONVENTIONS[name]


@dataclass(frozen=True)
class Fidelity:
    """How near a clip is to another.

    Args:
        psnr: in dB; infinite for identical clips.
        ssim: 1 for identical clips.
        identical: every value is equal.
        frames: number of frames.
        convention: how the figures are defined.
        identical_frames: number of frames of which every value is equal.
        lpips: 0 for identical clips; `None` where it was not asked for.
    """

    psnr: float
    ssim: float
    identical: bool
    frames: int
    convention: str = CONVENTION
    identical_frames: int = 0
    lpips: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON, which has no infinity: an infinite `psnr` is `None`, and `identical` says why."""
        return vars(self) | {"psnr": None if math.isinf(self.psnr) else self.psnr}


def compare(a: Frames, b: Frames, *, convention: Convention = DEFAULT, lpips: bool = False) -> Fidelity:
    """PSNR and SSIM of the clips `a` and `b`, `[T, H, W, 3]` uint8 or float in [0, 1].

    Args:
        convention: one of `CONVENTIONS`.
        lpips: LPIPS too, whose weights have to be there (`eval.lpips`).

    Raises:
        ValueError: as `psnr` and `ssim`.
        FileNotFoundError: weights of LPIPS are missing; the message names them.
    """
    value, text, distance = psnr(a, b, cap=convention.cap), str(convention), None
    if lpips:
        from dit_sparse.eval.lpips import lpips as measure

        distance = measure(a, b, network=convention.lpips, rescaled=convention.lpips_rescaled)
        text += f"; {convention.lpips_text}"
    same = sum(bool(torch.equal(x, y)) for x, y in frame_pairs(a, b))
    return Fidelity(value, ssim(a, b, convention=convention), same == len(a), len(a), text, same, distance)


def psnr(a: Frames, b: Frames, *, over: Literal["frames", "clip"] = "frames", cap: float = PSNR_CAP) -> float:
    """Peak signal-to-noise ratio in dB of the clips `a` and `b`, `[T, H, W, 3]` uint8 or float in [0, 1].

    Args:
        over: "frames" is the mean of every frame's PSNR, each at most `cap` (as SVG and FastVideo report it);
            "clip" takes the mean squared error over the clip.
        cap: in dB, of a frame's; a clip that is identical as a whole gives infinity all the same.

    Raises:
        ValueError: shapes that differ or are no clips, values outside [0, 1] or not finite.
    """
    if over not in ("frames", "clip"):
        raise ValueError(f"over must be 'frames' or 'clip', got {over!r}")
    errors = [(x - y).square().mean().item() for x, y in frame_pairs(a, b)]
    if not any(errors):
        return math.inf
    if over == "clip":
        return -10 * math.log10(sum(errors) / len(errors))
    values = [min(-10 * math.log10(error), cap) if error else cap for error in errors]
    return sum(values) / len(values)


def ssim(a: Frames, b: Frames, *, convention: Convention = DEFAULT) -> float:
    """Structural similarity of the clips `a` and `b`, `[T, H, W, 3]` uint8 or float in [0, 1], mean over frames.

    Per channel, with the window and padding of `convention`; by default an 11x11 Gaussian window with sigma 1.5, where
    it lies wholly inside the frame.

    Raises:
        ValueError: as `psnr`, and frames smaller than the window.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, equation 13.
    """
    if min(a.shape[1:3], default=_WINDOW) < _WINDOW:
        raise ValueError(f"frames must be at least {_WINDOW}x{_WINDOW} for SSIM, got {a.shape[1]}x{a.shape[2]}")
    values = [_frame_ssim(x, y, convention) for x, y in frame_pairs(a, b)]
    return sum(values) / len(values)


def _frame_ssim(x: Tensor, y: Tensor, convention: Convention) -> float:
    c1, c2 = 0.01**2, 0.03**2
    x, y = x.permute(2, 0, 1), y.permute(2, 0, 1)
    mean_x, mean_y, xx, yy, xy = _window_means(torch.stack([x, y, x * x, y * y, x * y]), convention)
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast_structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * contrast_structure).mean().item()


def _window_means(images: Tensor, convention: Convention) -> Tensor:
    """Weighted means of `images` `[S, 3, H, W]` over windows; without padding, `_WINDOW - 1` rows and columns fewer."""
    offsets = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    if convention.window == "uniform":
        weights = torch.ones_like(weights)
    weights = (weights / weights.sum()).view(1, 1, -1, 1)
    around = 0 if convention.padding == "inside" else _WINDOW // 2
    flat = images.flatten(0, 1).unsqueeze(1)
    rows = F.conv2d(flat, weights, padding=(around, 0))
    return F.conv2d(rows, weights.mT, padding=(0, around)).squeeze(1).unflatten(0, images.shape[:2])


def frame_pairs(a: Frames, b: Frames) -> Iterator[tuple[Tensor, Tensor]]:
    """The frames of both clips in turn, `[H, W, 3]` float64 in [0, 1].

    Raises:
        ValueError: shapes that differ or are no clips, values outside [0, 1] or not finite.
    """
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
