"""Backend "fa4": FlashAttention-4, its CuTe DSL kernels for Hopper and Blackwell, under a block mask. For comparison.

Follows `flash_attn_func` in `flash_attn/cute/interface.py` of Dao-AILab/flash-attention, fa4-v4.0.0.beta27; betas from
11 on take its arguments. Tensors are `[B, N, H, D]`, the row sums `[B, H, N]` float32 in natural log. A row without a
block gives zeros and -inf. The kernel attends to all of a block, so partial blocks are refused.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.flash_attention_3 import positive_scale
from dit_sparse.types import AttentionPlan

__all__ = ["FlashAttention4Backend"]

_DTYPES = (torch.float16, torch.bfloat16)
# 8.x ignores a block mask, 12.x asserts that there is none.
_MAJORS = (9, 10, 11)


@dataclass(frozen=True)
class _Converted:
    """A plan's mask in FlashAttention-4's own blocks.

    Args:
        lists: the fields of `BlockSparseTensorsTorch`.
        in_part: how many blocks are kept only in part, over the mask's own batches and heads.
    """

    lists: dict[str, Any]
    in_part: int


# By plan, then by block size, which depends on the GPU and the head size.
_converted: weakref.WeakKeyDictionary[AttentionPlan, dict[tuple[int, int], _Converted]] = weakref.WeakKeyDictionary()


class FlashAttention4Backend:
    """FlashAttention-4 through `BlockMask.to_fa4`; the mask converted once a plan. Never chosen by "auto"."""

    name = "fa4"

    def unavailable(self, device: torch.device) -> str | None:
        call, _, error = _interface()
        if call is None:
            return f"flash_attn.cute cannot be imported ({error}); pip install 'dit-sparse[fa4]'"
        if "block_sparse_tensors" not in inspect.signature(call).parameters:
            return "FlashAttention-4 is older than 4.0.0b11; pip install -U 'dit-sparse[fa4]'"
        if device.type != "cuda":
            return "FlashAttention-4 runs on CUDA only; use 'gather' on a CPU"
        if _major(device) not in _MAJORS:
            major, minor = torch.cuda.get_device_capability(device)
            return f"its block masks need compute capability 9, 10 or 11, this GPU has {major}.{minor}; use 'triton'"
        return None

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        if q.dtype not in _DTYPES:
            return f"dtype must be float16 or bfloat16, got {q.dtype}"
        dim, largest = q.shape[-1], 256 if _major(q.device) == 9 else 128
        if dim != v.shape[-1] or dim % 8 or not 8 <= dim <= largest:
            return (
                f"head_dim must be one multiple of 8 up to {largest} for q, k and v on this GPU, got {dim} and "
                f"{v.shape[-1]}; use 'triton'"
            )
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "it has no backward here; use torch.no_grad() or 'reference'"
        block_q, block_k = _block_size(q)
        in_part = _convert(plan, (block_q, block_k)).in_part
        if in_part:
            return (
                f"its blocks are {block_q} queries x {block_k} keys here and must be kept whole or not at all, got "
                f"{in_part} kept in part (partial blocks, or bounds off its own); use a plan in its blocks or 'triton'"
            )
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        call, block_sparse_tensors, _ = _interface()
        assert call is not None
        assert block_sparse_tensors is not None
        lists = block_sparse_tensors(**_convert(plan, _block_size(q)).lists)
        q, scale = positive_scale(q, scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = call(q, k, v, softmax_scale=scale, block_sparse_tensors=lists, return_lse=return_lse)
        return out.transpose(1, 2), lse if return_lse else None


@functools.cache
def _interface() -> tuple[Callable[..., Any] | None, Callable[..., Any] | None, str]:
    """`flash_attn_func` and `BlockSparseTensorsTorch`, or why they cannot be imported."""
    try:
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    # A CUTLASS DSL of another version than FlashAttention-4 wants fails in any of these ways.
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return None, None, str(error)
    return flash_attn_func, BlockSparseTensorsTorch, ""


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _block_size(q: Tensor) -> tuple[int, int]:
    """The (query, key) blocks that the kernel takes: its tiles, after `_get_fwd_config` in interface.py."""
    if _major(q.device) == 9:
        return 128, 128 if q.shape[-1] <= 128 else 112 if q.shape[-1] <= 192 else 80
    # Blackwell's kernel takes two tiles of queries at a time as soon as there are two.
    return 256 if q.shape[2] > 128 else 128, 128


def _convert(plan: AttentionPlan, block_size: tuple[int, int]) -> _Converted:
    known = _converted.setdefault(plan, {})
    if block_size not in known:
        lists = plan.block_mask.to_fa4(block_size)
        known[block_size] = _Converted(lists, int(lists["mask_block_cnt"].sum()))
    return known[block_size]
