"""Dense attention: the fastest kernel there is, and torch's SDPA, FlashAttention-3 and xformers by name.

out = softmax(scale * q k^T) v over `[B, H, N, D]`. The row sums (LSE, natural log) come from the fused operators, which
compute them anyway; where none applies, from a chunked matmul.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.flash_attention_3 import fa3_attention, fa3_refuses, fa3_unavailable, positive_scale
from dit_sparse.kernels.hopper_backend import HopperBackend
from dit_sparse.types import AttentionPlan, BlockMask, TokenOrder

__all__ = ["Fa3Backend", "SdpaBackend", "XformersBackend", "dense_attention", "flash_cpu", "has_flash_cpu"]

_CHUNK_SCORES = 1 << 22
_BLOCK = 128  # tokens a block of a plan that keeps everything


@overload
def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = ...) -> Tensor: ...


@overload
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = ..., return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention by the fastest kernel that takes the call.

    On Hopper that is FlashAttention-3 where fa3-fwd is installed, else our own kernel with every block kept. Elsewhere,
    and where gradients are wanted, it is torch's SDPA, or with row sums the fused operator behind it.

    Args:
        q, k, v: `[B, H, N, D]` of one floating dtype.
        scale: factor of the scores; `D ** -0.5` when `None`.
        return_lse: whether the row sums are wanted too.

    Returns:
        Output `[B, H, N, D]`; with `return_lse` also the natural-log row sums `[B, H, N]`, float32 (float64 for
        float64).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = None if torch.compiler.is_compiling() or not q.is_cuda else _on_hopper(q, k, v, scale, return_lse)
    if found is not None:
        return found if return_lse else found[0]
    return _sdpa_with_lse(q, k, v, scale) if return_lse else F.scaled_dot_product_attention(q, k, v, scale=scale)


def _on_hopper(q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool) -> tuple[Tensor, Tensor] | None:
    """Output and row sums by FlashAttention-3 or our own kernel; `None` where neither takes the call."""
    if fa3_unavailable(q.device) is None and fa3_refuses(q, k, v) is None:
        return fa3_attention(q, k, v, scale=scale)
    own = HopperBackend()
    if own.unavailable(q.device) is not None:
        return None
    plan = _everything(q.shape[2], k.shape[2], q.device)
    if own.refuses(q, k, v, plan) is not None:
        return None
    return own.forward(q, k, v, plan, scale=scale, return_lse=return_lse)  # type: ignore[return-value]


@functools.lru_cache(maxsize=16)
def _everything(queries: int, keys: int, device: torch.device) -> AttentionPlan:
    """The plan that keeps all blocks, for a kernel that asks for one."""
    # Tensors made in inference mode could not be used where gradients are recorded.
    with torch.inference_mode(False):
        q_order, kv_order = _even_blocks(queries, device), _even_blocks(keys, device)
        return AttentionPlan(q_order, kv_order, BlockMask.full(q_order.offsets, kv_order.offsets))


def _even_blocks(tokens: int, device: torch.device) -> TokenOrder:
    offsets = torch.arange(0, tokens + _BLOCK, _BLOCK, device=device).clamp_(max=tokens)
    return TokenOrder.from_index(torch.arange(tokens, device=device), offsets, is_identity=True)


def _sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _plain_with_lse(q, k, v, scale)
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and has_flash_cpu(q.dtype):
        return flash_cpu(q, k, v, scale)
    if q.device.type == "cuda":
        return _cuda_with_lse(q, k, v, scale)
    return _plain_with_lse(q, k, v, scale)


@functools.cache
def has_flash_cpu(dtype: torch.dtype) -> bool:
    """Whether torch's private CPU flash operator exists here and takes `dtype`."""
    x = torch.zeros(1, 1, 2, 16, dtype=dtype)
    try:
        _, lse = flash_cpu(x, x, x, 1.0)
    except (AttributeError, RuntimeError):
        return False
    return lse.shape == (1, 1, 2)


def flash_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and natural-log row sums from torch's CPU flash operator; see `has_flash_cpu`."""
    # The operator takes neighbouring channels for granted and does not check.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out, lse


def _cuda_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # On Hopper FlashAttention-2 takes 1.7 times as long as cuDNN.
    if _cudnn_takes(q, k, v):
        return _cudnn_with_lse(q, k, v, scale)
    if _flash_cuda_takes(q, v):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return _plain_with_lse(q, k, v, scale)


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch would let cuDNN compute this call: hardware, dtype, sizes and the user's own settings."""
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def _cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, scale = positive_scale(q, scale)  # cuDNN gives NaN for a negative one where the sizes are ragged
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    # cuDNN keeps a last dimension of 1.
    return out, lse.reshape(q.shape[:-1])


def _flash_cuda_takes(q: Tensor, v: Tensor) -> bool:
    dim = q.shape[-1]
    return q.dtype in (torch.float16, torch.bfloat16) and dim == v.shape[-1] and dim <= 256 and dim % 8 == 0


def _plain_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = k.to(compute).transpose(-1, -2), v.to(compute)
    outs, sums = [], []
    for rows in q.split(max(1, _CHUNK_SCORES // (q.shape[0] * q.shape[1] * k.shape[2])), dim=2):
        scores = rows.to(compute) @ keys * scale
        outs.append((scores.softmax(-1) @ values).to(q.dtype))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _refuses_sparse(name: str, plan: AttentionPlan) -> str | None:
    if plan.block_mask.is_full:
        return None
    return f"{name} is dense, and the plan does not keep every block; use 'gather', 'flex' or 'reference'"


class SdpaBackend:
    """Torch's own dense attention, for plans that keep everything."""

    name = "sdpa"

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        return _refuses_sparse(self.name, plan)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        if return_lse:
            return _sdpa_with_lse(q, k, v, scale)
        return F.scaled_dot_product_attention(q, k, v, scale=scale), None


class XformersBackend:
    """Dense attention by xformers' memory-efficient operators, for plans that keep everything."""

    name = "xformers"

    def unavailable(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("xformers") is None:
            return "xformers is not installed; pip install 'dit-sparse[xformers]'"
        return None if device.type == "cuda" else "xformers' attention needs a CUDA device; use 'sdpa' here"

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        if q.dtype == torch.float64:
            return "dtype must be float32, float16 or bfloat16, got torch.float64"
        return _refuses_sparse(self.name, plan)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        from xformers import ops

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not return_lse:
            return ops.memory_efficient_attention(q, k, v, scale=scale).transpose(1, 2), None
        out, lse = ops.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
        # xformers pads the row sums to a multiple of its tile.
        return out.transpose(1, 2), lse[..., : q.shape[1]]


class Fa3Backend:
    """FlashAttention-3's dense attention, for plans that keep everything."""

    name = "fa3"

    def unavailable(self, device: torch.device) -> str | None:
        return fa3_unavailable(device)

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        return fa3_refuses(q, k, v) or _refuses_sparse(self.name, plan)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = fa3_attention(q, k, v, scale=scale)
        return out, lse if return_lse else None
