"""Dense attention kernels to compare with: torch's, and FlashAttention-3 where it is installed."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.bench.timing import Call
from dit_sparse.kernels.flash_attention_3 import fa3_attention, fa3_refuses, fa3_unavailable

Inputs = list[tuple[Tensor, Tensor, Tensor]]

_TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "cpu": SDPBackend.FLASH_ATTENTION}


def dense_calls(sets: Inputs) -> dict[str, Call]:
    """Every dense kernel that runs here, by name; FA3 gets its own layout, so that no copy is timed."""
    device = sets[0][0].device
    calls: dict[str, Call] = {name: functools.partial(_torch, sets, _TORCH[name]) for name in _names(device)}
    if fa3_unavailable(device) is None and fa3_refuses(*sets[0]) is None:
        calls["fa3"] = functools.partial(
            _fa3, [(_tokens_first(q), _tokens_first(k), _tokens_first(v)) for q, k, v in sets]
        )
    return calls


def _names(device: torch.device) -> tuple[str, ...]:
    return ("cudnn", "flash") if device.type == "cuda" else ("cpu",)


def _torch(sets: Inputs, backend: SDPBackend, number: int) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*sets[number % len(sets)])


def _fa3(sets: Inputs, number: int) -> Tensor:
    q, k, v = sets[number % len(sets)]
    return fa3_attention(q, k, v, scale=q.shape[-1] ** -0.5)[0]


def _tokens_first(x: Tensor) -> Tensor:
    """The same `[B, H, N, D]` tensor with a token's heads beside each other in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
