"""3-D convolutions of a VAE's decoder through oneDNN on a CPU, however small the video.

For one sample torch takes oneDNN only where channels x frames x rows are more than 20,480. Below that it copies out
every patch for a matrix product, which takes several times as long.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["OneDnn"]


class OneDnn:
    """Lets the 3-D convolutions of a module run through oneDNN while it computes; equal up to rounding.

    Convolutions that somebody else has changed stay as they are.

    Args:
        wanted: asked at every call of the module. A copy of the module asks a copy of it, one that was pickled nobody.
    """

    def __init__(self, wanted: Callable[[], bool] | None = None) -> None:
        self._wanted = wanted
        self._handles: tuple[RemovableHandle, ...] = ()

    def install(self, module: torch.nn.Module) -> None:
        after = module.register_forward_hook(self._after, always_call=True)
        self._handles = (module.register_forward_pre_hook(self._before), after)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return OneDnn, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> OneDnn:
        memo[id(self)] = twin = OneDnn(copy.deepcopy(self._wanted, memo))
        twin._handles = copy.deepcopy(self._handles, memo)
        return twin

    def _before(self, module: torch.nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or self._wanted is None or not self._wanted():
            return
        for conv in _convolutions(module):
            if "_conv_forward" not in conv.__dict__ and type(conv)._conv_forward is torch.nn.Conv3d._conv_forward:
                conv._conv_forward = functools.partial(_convolve, conv)  # type: ignore[method-assign]

    def _after(self, module: torch.nn.Module, *_: Any) -> None:
        for conv in _convolutions(module):
            own = conv.__dict__.get("_conv_forward")
            if isinstance(own, functools.partial) and own.func is _convolve:
                del conv._conv_forward


def _convolutions(module: torch.nn.Module) -> list[torch.nn.Conv3d]:
    return [own for own in module.modules() if isinstance(own, torch.nn.Conv3d)]


def _convolve(conv: torch.nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.Conv3d._conv_forward`; the caller's own `forward` has padded `x` in its way."""
    padding = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros" or not _takes(x, weight):
        return torch.nn.Conv3d._conv_forward(conv, x, weight, bias)
    return torch.mkldnn_convolution(x, weight, bias, padding, conv.stride, conv.dilation, conv.groups)


def _takes(x: Tensor, weight: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return False
    batched = x.ndim == 5 and x.numel() > 0 and weight[0, 0].numel() > 1  # a kernel of one token copies no patches
    return batched and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _has_onednn()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
