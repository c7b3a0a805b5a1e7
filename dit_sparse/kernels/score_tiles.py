"""What the launchers of the score kernels share: which path runs, and how blocks are laid out in tiles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit_sparse.kernels.backend import BackendUnavailableError
from dit_sparse.kernels.triton_launch import interpreted, padded, triton_unavailable
from dit_sparse.types import BlockGeometry

__all__ = ["ScoreBackend", "Tiles", "channels", "check_offsets", "device_of", "tiles", "use_triton"]

ScoreBackend = Literal["auto", "torch", "triton"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_DIM = 256


@dataclass(frozen=True)
class Tiles:
    """How blocks lie in a kernel's tiles.

    Args:
        block_m, block_n: slots of a tile of queries and of keys.
        group, k_group: whole blocks in such a tile, or 1 where a block may take several tiles.
        q_tiles, k_tiles: tiles of the largest block.
        run: groups of key blocks, from the first to before the last, that fill their tiles and need no mask.
        launch: how many warps and stages Triton takes.
    """

    block_m: int
    block_n: int
    group: int
    k_group: int
    q_tiles: int
    k_tiles: int
    run: tuple[int, int]
    launch: dict[str, int]


def use_triton(backend: ScoreBackend, *inputs: Tensor) -> bool:
    """Whether the Triton kernel computes this call; "auto" takes it for CUDA tensors that it can compute.

    Raises:
        ValueError: an unknown backend, or inputs that the one asked for does not take.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    device = inputs[0].device
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False
    missing, refused = triton_unavailable(device), _refuses(*inputs)
    if backend == "auto":
        return missing is None and refused is None
    if missing is not None:
        raise BackendUnavailableError(f"backend 'triton' is not available on {device}: {missing}")
    if refused is not None:
        raise ValueError(f"backend 'triton' does not take this call: {refused}; use 'torch'")
    return True


def _refuses(*inputs: Tensor) -> str | None:
    for x in inputs:
        if x.dtype not in _DTYPES:
            return f"dtype must be float32, float16 or bfloat16, got {x.dtype}"
    if inputs[0].shape[-1] > _LARGEST_DIM:
        return f"head_dim must be at most {_LARGEST_DIM}, got {inputs[0].shape[-1]}"
    return None


def check_offsets(name: str, offsets: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `offsets` are bounds of blocks of `x` `[B, H, N, D]`; their values only on the CPU."""
    batch, heads, tokens = x.shape[:3]
    shape = tuple(offsets.shape)
    fits = offsets.ndim == 3 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] >= 2
    if not fits or offsets.dtype != torch.int32:
        raise ValueError(f"{name} must be int32 [{batch}|1, {heads}|1, M+1], got {offsets.dtype} {shape}")
    if offsets.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like its tokens, got {offsets.device}: move them there")
    if offsets.device.type != "cpu":
        return  # looking at offsets on another device would wait for it
    bounds = offsets.numpy()
    if (bounds[..., 0] != 0).any() or (bounds[..., -1] != tokens).any() or (np.diff(bounds) < 0).any():
        raise ValueError(f"{name} must rise from 0 to the {tokens} tokens, got {bounds[0, 0].tolist()[:8]}...")


def tiles(q: Tensor, q_blocks: BlockGeometry, k_blocks: BlockGeometry, stride: int = 1) -> Tiles:
    """Tiles for blocks of these sizes, `stride` tokens a slot, and queries `[B, H, N, D]`.

    With 128 registers two programs of 128 x 128 fit a multiprocessor of Hopper, so that the product of one hides the
    exp2 of the other, which takes equally long.
    """
    if interpreted():
        block_m, block_n, launch = 32, 32, {"num_stages": 1}
    elif q.dtype == torch.float32:
        block_m, block_n, launch = 32, 32, {"num_warps": 4, "num_stages": 2}
    elif q.shape[-1] > 128:
        block_m, block_n, launch = 64, 64, {"num_warps": 4, "num_stages": 2}
    elif torch.cuda.get_device_capability(q.device)[0] == 8:
        # Ampere and Ada have 100 to 164 KB of shared memory a multiprocessor.
        block_m, block_n, launch = 128, 64, {"num_warps": 8, "num_stages": 2}
    else:
        block_m, block_n, launch = 128, 128, {"num_warps": 8, "num_stages": 2}
    q_slots, k_slots = -(-q_blocks.largest // stride), -(-k_blocks.largest // stride)
    group, q_tiles = _layout(q_slots, block_m)
    k_group, k_tiles = _layout(k_slots, block_n)
    run = (0, 0)
    if k_blocks.largest == block_n * k_tiles // k_group:
        start, end = -(-k_blocks.run_start // k_group), k_blocks.run_end // k_group
        run = (start, end) if start < end else run
    return Tiles(block_m, block_n, group, k_group, q_tiles, k_tiles, run, launch)


def _layout(largest: int, slots: int) -> tuple[int, int]:
    """Whole blocks in a tile of `slots`, and tiles in a block."""
    if largest > slots:
        return 1, -(-largest // slots)
    return slots // (1 << max(0, largest - 1).bit_length()), 1


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of `x` the one that Triton launches on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def channels(x: Tensor) -> dict[str, int]:
    """The kernels' constants for the last dimension of `x`."""
    return {"D": x.shape[-1], "BLOCK_D": padded(x.shape[-1])}
