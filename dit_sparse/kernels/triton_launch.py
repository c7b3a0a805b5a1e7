"""What the launchers of Triton kernels share: whether they can run, and how tensors are handed to them."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

from dit_sparse.types import BlockGeometry

__all__ = [
    "broadcast_strides",
    "interpreted",
    "on_device_of",
    "padded",
    "plain_run",
    "rows_of",
    "takes_kernel",
    "triton_unavailable",
]


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_unavailable(device: torch.device) -> str | None:
    """What is missing to run Triton's kernels on `device`, and how to get it; `None` when nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is missing; pip install 'dit-sparse[gpu]'"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or higher, this GPU has {major}.{minor}; use 'flex'"
        return None
    if interpreted():
        return None
    return "it runs on CUDA only (elsewhere under TRITON_INTERPRET=1, which is slow); use 'gather' on a CPU"


def broadcast_strides(x: Tensor) -> tuple[int, int]:
    """Strides over batch and heads, 0 where one list serves all."""
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def takes_kernel(*tensors: Tensor | None) -> bool:
    """Whether a Triton kernel without a backward may compute with `tensors`: on a GPU, eager, no gradients wanted."""
    given = [x for x in tensors if x is not None]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return (
        given[0].is_cuda
        and not differentiable
        and not torch.compiler.is_compiling()
        and triton_unavailable(given[0].device) is None
    )


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which this makes that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows_of(x: Tensor) -> Tensor:
    """`x` contiguous in its last dimension, as kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def plain_run(blocks: BlockGeometry, tile: int) -> tuple[int, int]:
    """First and last of the even key blocks that fill their tiles, which need no mask; (0, 0) where none do."""
    return (blocks.run_start, blocks.run_end) if blocks.largest % tile == 0 else (0, 0)


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())
