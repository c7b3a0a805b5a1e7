"""Norm and rotary embedding of queries and keys: what diffusers computes, in one pass on a GPU."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from dit_sparse.kernels import norm_rope

RotaryEmbedding = tuple[Tensor, Tensor]


def norm_and_rotate(x: Tensor, norm: torch.nn.Module | None, rotary_emb: RotaryEmbedding | None) -> Tensor:
    """`x` `[B, N, H, D]`, each head normed and rotated by tables `[N, D]`.

    Bit for bit what diffusers computes, and on a GPU, if nothing hooks the norm, equal up to rounding.
    """
    if x.is_cuda and isinstance(norm, (torch.nn.RMSNorm, RMSNorm)) and norm.eps is not None and _is_plain(norm):
        return norm_rope(x, norm.weight, norm.eps, *(rotary_emb or (None, None)))
    x = x if norm is None else norm(x)
    return x if rotary_emb is None else apply_rotary_emb(x, rotary_emb, sequence_dim=1)


def for_longer(rotary_emb: RotaryEmbedding | None, tokens: int) -> RotaryEmbedding | None:
    """Tables `[N, D]` for `tokens` more tokens at the end, which are not rotated."""
    if rotary_emb is None:
        return None
    cos, sin = rotary_emb
    pad = torch.nn.functional.pad
    return pad(cos, (0, 0, 0, tokens), value=1.0), pad(sin, (0, 0, 0, tokens))


def is_watched(module: torch.nn.Module) -> bool:
    """Whether hooks of torch, accelerate or diffusers stand around `module`, which only its own call runs."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def _is_plain(norm: torch.nn.RMSNorm | RMSNorm) -> bool:
    """Whether `norm` is just an RMS norm with a weight, and nobody watches it."""
    has_weight_alone = norm.weight is not None and getattr(norm, "bias", None) is None
    return has_weight_alone and type(norm) in (torch.nn.RMSNorm, RMSNorm) and not is_watched(norm)
