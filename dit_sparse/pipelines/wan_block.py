"""Wan's transformer block with what stands between its matrix products fused; the products stay upstream's.

On a CPU, after self-attention that was sparse, the padding of prompts is merged as well. diffusers pads them with zeros
to 512 tokens and masks none, so most text tokens are alike, and n equal keys with equal values attend as one whose
score has ln n added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor

from dit_sparse.kernels import add_gated, gelu_tanh_, layer_norm
from dit_sparse.pipelines.adapter import SparseProcessor, uses_default_backend
from dit_sparse.pipelines.norm_rotate import is_watched

_OFF = "_dit_sparse_unfused"
_ALIKE = "_dit_sparse_alike"  # how many tokens end a prompt alike; set for a forward on a CPU
_FFN_TOKENS = 1024
_TEXT_UNIT = 16  # keys: a row of scores then fills whole vectors
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
    forget_text((block,))


def merge_text(blocks: Iterable[WanTransformerBlock], text: Tensor) -> None:
    """Let fused blocks merge the tokens at the end of the prompt `text` `[B, L, C]` that are alike, on a CPU."""
    if text.device.type == "cpu" and not (torch.is_grad_enabled() and text.requires_grad):
        alike = alike_at_end(text)
        for block in blocks:
            setattr(block, _ALIKE, alike)


def forget_text(blocks: Iterable[WanTransformerBlock]) -> None:
    """Undo `merge_text`."""
    for block in blocks:
        block.__dict__.pop(_ALIKE, None)


def alike_at_end(text: Tensor) -> int:
    """How many tokens at the end of `text` `[B, L, C]` equal the last one, in the sample that has fewest."""
    others = (text != text[:, -1:]).any(-1).any(0).nonzero()
    return text.shape[1] - (int(others[-1]) + 1 if len(others) else 0)


def merged(text: Tensor, alike: int) -> tuple[Tensor, Tensor | None]:
    """`text` `[B, L, C]` without most of the last `alike` tokens, and the mask to add to scores, `[1, 1, 1, kept]`.

    The last token that is kept stands for those that are not; without any there is no mask.
    """
    length = text.shape[1]
    kept = min(length, -(-(length - alike + 1) // _TEXT_UNIT) * _TEXT_UNIT)
    if kept == length:
        return text, None
    mask = text.new_zeros(1, 1, 1, kept, dtype=torch.promote_types(text.dtype, torch.float32))
    mask[..., -1] = math.log(length - kept + 1)
    return text[:, :kept], mask


def fused_forward(
    block: WanTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Tensor:
    """The forward of `WanTransformerBlock`, on tokens `[B, N, C]`; arguments and result as there."""
    if not _applies(block, hidden_states, temb):
        return _upstream_forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
    x = _normed(block.norm1, hidden_states, scale, shift)
    hidden_states = add_gated(hidden_states, block.attn1(x, None, None, rotary_emb), gate)
    x = _normed(block.norm2, hidden_states) if isinstance(block.norm2, FP32LayerNorm) else hidden_states
    text, mask, rounds = encoder_hidden_states, None, _may_round(block)
    if rounds and _takes_mask(block.attn2):
        text, mask = merged(text, block.__dict__[_ALIKE])
    hidden_states = hidden_states + block.attn2(x, text, mask, None)
    x = _normed(block.norm3, hidden_states, ffn_scale, ffn_shift)
    return add_gated(hidden_states, feed_forward(block.ffn, x) if rounds else block.ffn(x), ffn_gate)


def _normed(norm: FP32LayerNorm, x: Tensor, *modulation: Tensor) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps, *modulation)


def feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    """`ffn` of tokens `[B, N, C]`, of so many at a time that their hidden channels stay in a CPU's cache."""
    if not _is_plain(ffn, x):
        return ffn(x)
    up, down = ffn.net[0].proj, ffn.net[2]
    out = torch.empty_like(x)
    for part, own in zip(x.split(_FFN_TOKENS, 1), out.split(_FFN_TOKENS, 1), strict=True):
        own.copy_(down(gelu_tanh_(up(part))))
    return out


def _is_plain(ffn: FeedForward, x: Tensor) -> bool:
    """Whether `ffn` is two linear layers around GELU by tanh, and nobody watches it or wants gradients."""
    act = ffn.net[0]
    layers = type(ffn) is FeedForward and len(ffn.net) == 3 and type(act) is GELU and act.approximate == "tanh"
    if not layers or torch.is_grad_enabled() or ffn.training or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 and not any(map(is_watched, (ffn, *ffn.net, act.proj)))


def _may_round(block: WanTransformerBlock) -> bool:
    """Whether what follows self-attention on a CPU need not be upstream's bit for bit, as that was sparse."""
    processor = block.attn1.processor
    if _ALIKE not in block.__dict__ or not isinstance(processor, SparseProcessor):
        return False
    return processor.session.statistics.latest_was_sparse(processor.layer)


def _takes_mask(attn: WanAttention) -> bool:
    """Whether cross-attention takes a mask: upstream's own, to text alone, by torch's SDPA."""
    return type(attn.processor) is WanAttnProcessor and attn.add_k_proj is None and uses_default_backend(attn.processor)


def _applies(block: WanTransformerBlock, hidden_states: Tensor, temb: Tensor) -> bool:
    """Whether the fused forward computes what upstream's does, and faster: eager, one timestep a sample.

    On a CPU only where prompts may be merged; it is upstream's bit for bit until self-attention was sparse.
    """
    wanted = hidden_states.is_cuda or _ALIKE in block.__dict__
    if torch.compiler.is_compiling() or not wanted or temb.ndim != 3:
        return False
    norms = [block.norm1, block.norm3] + ([] if type(block.norm2) is torch.nn.Identity else [block.norm2])
    return _OFF not in block.__dict__ and all(type(norm) is FP32LayerNorm and not is_watched(norm) for norm in norms)
