"""How near sparse attention is to dense: its outputs, and the share of the attention weights that a plan keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels import block_mass
from dit_sparse.kernels.reference import mask_rows
from dit_sparse.types import AttentionPlan

__all__ = ["cosine_similarity", "mass_recall", "relative_l1"]

_CHUNK_SCORES = 1 << 24


def relative_l1(out: Tensor, reference: Tensor) -> float:
    """Sum of `|out - reference|` over the sum of `|reference|`; 0 for equal tensors.

    Args:
        out, reference: of one shape, such as attention outputs `[B, H, N, D]`; any float type, computed in float64.

    Raises:
        ValueError: shapes that differ, no element, values that are not finite, or a reference that is all zero.

    Source: SageAttention (arXiv 2410.02367) and SpargeAttention (arXiv 2502.18137) report it so.
    """
    out, reference = _pair(out, reference)
    return ((out - reference).abs().sum() / reference.abs().sum()).item()


def cosine_similarity(out: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between `out` and `reference`, each flattened into one vector; 1 for equal tensors.

    Args, Raises: as `relative_l1`; `out` must not be all zero either.

    Source: SageAttention (arXiv 2410.02367) reports it so.
    """
    out, reference = _pair(out, reference)
    if not out.any():
        raise ValueError("out is all zero: it has no direction")
    return torch.nn.functional.cosine_similarity(out.flatten(), reference.flatten(), dim=0).item()


def mass_recall(plan: AttentionPlan, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """`[B, H]` share of the attention weights of dense attention that the pairs kept by `plan` hold.

    Args:
        q, k: `[B, H, N, D]` in the sequence's own order.
        lse: `[B, H, N]` natural-log row sums of the dense attention of `q` and `k`, whose scale is 1 / sqrt(D).
    """
    q, lse = (plan.q_order.permute(x) for x in (q, lse))
    k, scale = plan.kv_order.permute(k), q.shape[-1] ** -0.5
    mask = plan.block_mask
    if mask.partial_blocks is None:
        mass = block_mass(q, k, lse, mask.q_offsets, mask.k_offsets, scale=scale)
        return (mass * mask.full_blocks).sum((-1, -2)) / q.shape[2]
    batch, heads = q.shape[:2]
    total = torch.zeros(batch, heads, device=q.device)
    rows = max(1, _CHUNK_SCORES // k.shape[2])
    for start in range(0, q.shape[2], rows):
        part = slice(start, min(start + rows, q.shape[2]))
        weights = (scale * q[:, :, part] @ k.transpose(-1, -2) - lse[:, :, part, None]).exp()
        total += (weights * mask_rows(plan, batch, heads, part.start, part.stop)).sum((-1, -2))
    return total / q.shape[2]


def _pair(out: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if out.shape != reference.shape or not out.numel():
        raise ValueError(
            f"out and reference must have one shape and an element, got {list(out.shape)} and {list(reference.shape)}"
        )
    out, reference = out.double(), reference.double()
    if not (out.isfinite().all() and reference.isfinite().all()):
        raise ValueError("out and reference must be finite, got NaN or infinity")
    if not reference.any():
        raise ValueError("reference is all zero: there is nothing to be relative to")
    return out, reference
