"""What the launchers of the Hopper kernels share: tensors as TMA copies them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.triton_launch import triton_unavailable

__all__ = ["aligned", "descriptor", "hopper_unavailable", "is_aligned", "multiprocessors", "tile_layout"]

_ALIGNMENT = 16


def hopper_unavailable(device: torch.device) -> str | None:
    """What is missing to run the Hopper kernels on `device`, and what to use instead; `None` when nothing is."""
    if device.type != "cuda":
        return "it runs on NVIDIA GPUs of compute capability 9.0 only; use 'triton' or, on a CPU, 'gather'"
    missing = triton_unavailable(device)
    if missing is not None:
        return missing
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"it needs compute capability 9.0 (H100, H200), this GPU has {major}.{minor}; use 'triton'"
    if not _has_gluon():
        return "this triton has no Gluon as of 3.6; pip install -U 'triton>=3.6', or use 'triton'"
    return None


@functools.cache
def _has_gluon() -> bool:
    try:
        from triton.experimental.gluon.language.nvidia.hopper import tma
    except ImportError:
        return False
    return hasattr(tma, "async_load") or hasattr(tma, "async_copy_global_to_shared")


def descriptor(x: Tensor, rows: int, channels: int) -> Any:
    """TMA descriptor over `[B, H, N, D]` that copies `rows` tokens of one head."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # A dimension of one element may have any stride in torch; TMA wants a multiple of 16 bytes.
    strides = [stride if size > 1 else _ALIGNMENT for size, stride in zip(x.shape, x.stride(), strict=True)][:-1]
    box = [1, 1, rows, channels]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], box, tile_layout(tuple(box), x.dtype))


@functools.cache
def tile_layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a tile of 16-bit numbers lies in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def is_aligned(x: Tensor) -> bool:
    """Whether TMA can address `x`: 16-byte steps between rows, none of them 0."""
    steps = [stride * x.element_size() for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % _ALIGNMENT == 0 and all(s > 0 and s % _ALIGNMENT == 0 for s in steps)


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it that TMA can address."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
