"""3-D convolutions of a VAE's decoder through oneDNN on a CPU, however small the video.

For one sample torch takes oneDNN only where channels x frames x rows are more than 20,480. Below that it copies out
every patch for a matrix product, which takes several times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_onednn", "by_torch"]


def by_onednn(module: Any, wanted: Callable[[], bool]) -> None:
    """Let the 3-D convolutions of `module` run through oneDNN where they can; equal up to rounding.

    Args:
        module: `None` has none.
        wanted: asked at every convolution whether it may.
    """
    for conv in _convolutions(module):
        conv._conv_forward = functools.partial(_convolve, conv, wanted)


def by_torch(module: Any) -> None:
    """Undo `by_onednn`."""
    for conv in _convolutions(module):
        conv.__dict__.pop("_conv_forward", None)


def _convolutions(module: Any) -> list[Any]:
    modules = module.modules() if isinstance(module, torch.nn.Module) else ()
    return [own for own in modules if isinstance(own, torch.nn.Conv3d)]


def _convolve(
    conv: torch.nn.Conv3d, wanted: Callable[[], bool], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`torch.nn.Conv3d._conv_forward`; the caller's own `forward` has padded `x` in its way."""
    padding = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros" or not _takes(x, weight) or not wanted():
        return torch.nn.Conv3d._conv_forward(conv, x, weight, bias)
    return torch.mkldnn_convolution(x, weight, bias, padding, conv.stride, conv.dilation, conv.groups)


def _takes(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    batched = x.ndim == 5 and x.numel() > 0 and weight[0, 0].numel() > 1  # a kernel of one token copies no patches
    return batched and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _has_onednn()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
