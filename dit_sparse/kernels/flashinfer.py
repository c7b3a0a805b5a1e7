"""Backend "flashinfer": FlashInfer's attention over blocks of any size, a pattern a head. For comparison.

Follows `VariableBlockSparseAttentionWrapper` in `flashinfer/sparse.py` of flashinfer-ai/flashinfer 0.6.18, whose
arguments are those of 0.6.0. It takes one sequence `[H, N, D]` with a pattern for every head, so batches go in as
heads. Its row sums are base-2 logarithms. It compiles its kernels when first used, unless flashinfer-jit-cache has
them.

Its plan lists every kept key of every query block in int32: at 40 heads, 75,600 tokens, blocks of 128 and density 0.2
that is 1.4 GB a plan.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels.flash_attention_3 import positive_scale
from dit_sparse.types import AttentionPlan

__all__ = ["FlashInferBackend"]

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 << 20
_LONGEST_INDEX = (1 << 31) - 1


@dataclass(frozen=True)
class _Facts:
    """What the host knows of a plan.

    Args:
        partial: how many blocks are partial.
        keys: kept keys summed over the query blocks, of the mask's own batches and heads.
        leading: how many batches and heads those are.
    """

    partial: int
    keys: int
    leading: int


@dataclass(frozen=True)
class _Planned:
    """A planned wrapper, and the query rows that keep nothing: `[B * H, Nq]` bool, or `None` where there are none."""

    wrapper: Any
    empty: Tensor | None


_facts: weakref.WeakKeyDictionary[AttentionPlan, _Facts] = weakref.WeakKeyDictionary()
# By plan, then by what else a wrapper is planned for.
_planned: weakref.WeakKeyDictionary[AttentionPlan, dict[tuple[Any, ...], _Planned]] = weakref.WeakKeyDictionary()


class FlashInferBackend:
    """FlashInfer's `VariableBlockSparseAttentionWrapper`, planned once a plan. Never chosen by "auto"."""

    name = "flashinfer"

    def unavailable(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("flashinfer") is None:
            return "FlashInfer is not installed; pip install 'dit-sparse[flashinfer]'"
        if device.type != "cuda":
            return "FlashInfer runs on CUDA only; use 'gather' on a CPU"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or higher, this GPU has {major}.{minor}; use 'flex'"
        return None

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        if q.dtype not in _DTYPES:
            return f"dtype must be float16 or bfloat16, got {q.dtype}"
        if q.shape[-1] not in _HEAD_DIMS or q.shape[-1] != v.shape[-1]:
            return f"head_dim must be 64, 128 or 256 for q, k and v, got {q.shape[-1]} and {v.shape[-1]}; use 'triton'"
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "it has no backward; use torch.no_grad() or 'reference'"
        facts = _read(plan)
        if facts.partial:
            return f"blocks must be kept whole or not at all, got {facts.partial} partial ones; use 'triton' or 'flex'"
        if not facts.keys:
            return "the plan must keep at least one block, got none; use 'triton'"
        keys = facts.keys * q.shape[0] * q.shape[1] // facts.leading
        if keys > _LONGEST_INDEX:
            return (
                f"the kept keys of all query blocks must number at most {_LONGEST_INDEX}, got {keys}; use larger "
                "query blocks, fewer heads a call, or 'triton'"
            )
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, scale = positive_scale(q, scale)
        planned = _plan(plan, q, scale)
        got = planned.wrapper.run(*(x.flatten(0, 1) for x in (q, k, v)), return_lse=return_lse)
        out, lse = got if return_lse else (got, None)
        if planned.empty is not None:
            # What comes out for such rows has changed between FlashInfer's versions.
            out = out.masked_fill(planned.empty[..., None], 0.0)
            lse = None if lse is None else lse.masked_fill(planned.empty, -math.inf)
        lse = None if lse is None else (lse * math.log(2)).unflatten(0, q.shape[:2])
        return out.unflatten(0, q.shape[:2]), lse


def _read(plan: AttentionPlan) -> _Facts:
    """Read a plan's facts back from the device, once."""
    if plan not in _facts:
        mask = plan.block_mask
        partial = 0 if mask.partial_counts is None else int(mask.partial_counts.sum())
        keys = mask.full_blocks * mask.k_offsets.diff(dim=-1)[..., None, :]
        _facts[plan] = _Facts(partial, int(keys.sum()), keys.shape[0] * keys.shape[1])
    return _facts[plan]


def _plan(plan: AttentionPlan, q: Tensor, scale: float) -> _Planned:
    """The wrapper for `plan` and the shape, dtype, scale and stream of the call."""
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
    known, key = _planned.setdefault(plan, {}), (q.shape[:2], q.shape[-1], q.dtype, scale, stream)
    if key not in known:
        known[key] = _plan_wrapper(plan, q, scale, stream)
    return known[key]


def _plan_wrapper(plan: AttentionPlan, q: Tensor, scale: float, stream: int) -> _Planned:
    import flashinfer

    mask, heads = plan.block_mask, q.shape[0] * q.shape[1]
    kept, q_sizes, k_sizes, q_block = (
        x.expand(*q.shape[:2], *x.shape[2:]).flatten(0, 1)
        for x in (
            mask.full_blocks,
            mask.q_offsets.diff(dim=-1),
            mask.k_offsets.diff(dim=-1),
            BlockMask.block_of(mask.q_offsets),
        )
    )
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(_workspace(q.device, stream))
    wrapper.plan(
        kept, q_sizes, k_sizes, num_qo_heads=heads, num_kv_heads=heads, head_dim=q.shape[-1], sm_scale=scale,
        q_data_type=q.dtype, kv_data_type=q.dtype,
    )  # fmt: skip
    empty = ((kept * k_sizes[:, None]).sum(-1) == 0).gather(1, q_block)
    return _Planned(wrapper, empty if bool(empty.any()) else None)


@functools.cache
def _workspace(device: torch.device, stream: int) -> Tensor:
    """FlashInfer's scratch memory; one a stream, on which calls follow each other, serves all wrappers."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
