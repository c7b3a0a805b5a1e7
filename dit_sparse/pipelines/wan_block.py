"""Wan's transformer block with what stands between its matrix products fused; the products stay upstream's."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dit_sparse.kernels import add_gated, layer_norm
from dit_sparse.pipelines.norm_rotate import is_watched

_OFF = "_dit_sparse_unfused"
_upstream_forward = WanTransformerBlock.forward  # Dynamo does not trace it through the class


def fuse_block(block: WanTransformerBlock) -> None:
    """Give `block` the fused forward, unless something else, such as a cache, stands around its own already."""
    block.__dict__.pop(_OFF, None)
    if "forward" not in block.__dict__ and type(block) is WanTransformerBlock:
        block.forward = MethodType(fused_forward, block)


def unfuse_block(block: WanTransformerBlock) -> None:
    """Undo `fuse_block`. What has been put around the fused forward since then stays, and gets the block's own."""
    if getattr(block.__dict__.get("forward"), "__func__", None) is fused_forward:
        del block.forward
    elif "forward" in block.__dict__:
        setattr(block, _OFF, True)


def fused_forward(
    block: WanTransformerBlock,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
) -> torch.Tensor:
    """The forward of `WanTransformerBlock`, on tokens `[B, N, C]`; arguments and result as there."""
    if not _applies(block, hidden_states, temb):
        return _upstream_forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
    x = _normed(block.norm1, hidden_states, scale, shift)
    hidden_states = add_gated(hidden_states, block.attn1(x, None, None, rotary_emb), gate)
    x = _normed(block.norm2, hidden_states) if isinstance(block.norm2, FP32LayerNorm) else hidden_states
    hidden_states = hidden_states + block.attn2(x, encoder_hidden_states, None, None)
    x = _normed(block.norm3, hidden_states, ffn_scale, ffn_shift)
    return add_gated(hidden_states, block.ffn(x), ffn_gate)


def _normed(norm: FP32LayerNorm, x: torch.Tensor, *modulation: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps, *modulation)


def _applies(block: WanTransformerBlock, hidden_states: torch.Tensor, temb: torch.Tensor) -> bool:
    """Whether the fused forward computes what upstream's does, and faster: eager, on a GPU, one timestep a sample."""
    if torch.compiler.is_compiling() or not hidden_states.is_cuda or temb.ndim != 3:
        return False
    norms = [block.norm1, block.norm3] + ([] if type(block.norm2) is torch.nn.Identity else [block.norm2])
    return _OFF not in block.__dict__ and all(type(norm) is FP32LayerNorm and not is_watched(norm) for norm in norms)
