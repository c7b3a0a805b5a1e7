"""Backend "flex": torch's FlexAttention, compiled, under the plan's block mask.

On CUDA it is what is left where our own kernels cannot compute a call; on CPU it is opt-in, because it needs a C++
compiler and cannot return the row sums.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.types import AttentionPlan

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

__all__ = ["FlexBackend"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST_BLOCK = 64
_LARGEST_BLOCK = 128

_masks: weakref.WeakKeyDictionary[AttentionPlan, FlexBlockMask] = weakref.WeakKeyDictionary()


class FlexBackend:
    """FlexAttention through `BlockMask.to_flex`; compiled once, the mask converted once a plan."""

    name = "flex"

    def unavailable(self, device: torch.device) -> str | None:
        if device.type == "cuda":
            return None if importlib.util.find_spec("triton") else "triton is missing; pip install 'dit-sparse[gpu]'"
        if device.type != "cpu":
            return "compiled FlexAttention runs on CPU and CUDA only"
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return "compiled FlexAttention needs a CPU with AVX2; use 'gather'"
        if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "g++", "clang++")):
            return "compiled FlexAttention needs a C++ compiler; install g++ or clang++, or use 'gather'"
        return None

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        if q.dtype not in _DTYPES:
            return f"dtype must be float32, float16 or bfloat16, got {q.dtype}"
        # FlexAttention's Triton template pads other sizes itself; tl.dot alone sets this lower bound.
        if q.device.type == "cuda" and min(q.shape[-1], v.shape[-1]) < 16:
            return f"head_dim must be at least 16 on CUDA, got {min(q.shape[-1], v.shape[-1])}"
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if q.device.type == "cpu" and learns:
            return "FlexAttention has no backward on CPU; use torch.no_grad() or 'reference'"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        if return_lse and q.device.type == "cpu":
            raise ValueError("return_lse must be False with 'flex' on CPU, got True; use 'gather' or 'reference'")
        if plan not in _masks:
            _masks[plan] = _convert(plan)
        mask = _masks[plan]
        options = _tile(mask.BLOCK_SIZE, q) if q.device.type == "cuda" else None
        call = functools.partial(_compiled(), q, k, v, block_mask=mask, scale=scale, kernel_options=options)
        if not return_lse:
            return call(), None
        from torch.nn.attention.flex_attention import AuxRequest

        out, aux = call(return_aux=AuxRequest(lse=True))
        return out, aux.lse


def _convert(plan: AttentionPlan) -> FlexBlockMask:
    size = _even(plan.block_mask.q_offsets), _even(plan.block_mask.k_offsets)
    return plan.block_mask.to_flex(plan.q_order.index, plan.kv_order.index, size)


def _tile(blocks: tuple[int, int], q: Tensor) -> dict[str, int] | None:
    """Options for a mask whose blocks are smaller than torch's own tiles, which it then refuses; else `None`.

    The tile of 64 x 64 in 4 warps and 3 stages was the fastest of those tried on an H200 at 64 and 128 channels.
    """
    if min(blocks) > _SMALLEST_BLOCK:
        return None
    keys = min(blocks[1], 64 if q.element_size() == 2 and q.shape[-1] <= 128 else 32)
    return {
        "BLOCK_M": min(blocks[0], 64),
        "BLOCK_N": keys,
        "num_warps": 4,
        "num_stages": 3 if q.shape[-1] <= 128 else 2,
    }


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # dynamic: torch cannot compile it for CPU with symbolic sizes. fullgraph: past the recompile limit torch raises,
    # instead of running uncompiled and dense.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _even(offsets: Tensor) -> int:
    """Flex block size: 64 where only that falls on the blocks' bounds, else 128."""
    inner = offsets[..., :-1]
    on_large, on_small = (bool((inner % size == 0).all()) for size in (_LARGEST_BLOCK, _SMALLEST_BLOCK))
    return _SMALLEST_BLOCK if on_small and not on_large else _LARGEST_BLOCK
