"""Backend "reference": softmax(scale * q k^T, masked) v in plain torch under the plan's token mask, and its remainder.

The oracle of the other backends. Any device, dtype and block shape; float32 inside, float64 for float64 inputs. Query
rows are taken a few at a time, so that the N x N mask never exists whole. It has a backward, through autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels.remainder import add_remainder
from dit_sparse.kernels.skip import without_skipped
from dit_sparse.types import REMAINDERS, AttentionPlan

__all__ = ["ReferenceBackend", "mask_rows"]

_CHUNK_SCORES = 1 << 22


class ReferenceBackend:
    """Dense attention under the plan's own mask: slow, exact, accepts everything."""

    name = "reference"
    remainders = REMAINDERS

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        return None if q.dtype.is_floating_point else f"q must be floating point, got {q.dtype}"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.forward_counting(q, k, v, plan, scale=scale, return_lse=return_lse)[:2]

    def forward_counting(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        plan, skipped = without_skipped(q.to(compute), k.to(compute), plan, scale)
        keys, values = k.to(compute).transpose(-1, -2), v.to(compute)
        rows = max(1, _CHUNK_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
        outs, sums = [], []
        for start in range(0, q.shape[2], rows):
            stop = min(start + rows, q.shape[2])
            keep = mask_rows(plan, q.shape[0], q.shape[1], start, stop)
            scores = (q[:, :, start:stop].to(compute) @ keys * scale).masked_fill(~keep, float("-inf"))
            probs = scores.softmax(-1).masked_fill(~keep, 0.0)
            outs.append(probs @ values)
            sums.append(scores.logsumexp(-1))
        out, lse = torch.cat(outs, 2), torch.cat(sums, 2)
        if plan.remainder != "none":
            out, lse = add_remainder(q.to(compute), k.to(compute), v.to(compute), plan, scale, out, lse)
        return out.to(q.dtype), lse if return_lse else None, skipped


def mask_rows(plan: AttentionPlan, batch: int, heads: int, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the plan's token mask, `[B, H, stop - start, Nk]` bool in the orders' positions."""
    mask = plan.block_mask
    q_block = BlockMask.block_of(mask.q_offsets)[..., start:stop]
    k_block = BlockMask.block_of(mask.k_offsets)
    keep = _spread(mask.full_blocks, q_block, k_block, batch, heads)
    if mask.partial_blocks is None or mask.predicate is None:
        return keep
    b = torch.arange(batch, device=keep.device)[:, None, None, None]
    h = torch.arange(heads, device=keep.device)[None, :, None, None]
    q_token, k_token = plan.q_order.index[..., start:stop, None], plan.kv_order.index[..., None, :]
    allowed = mask.predicate(b, h, q_token, k_token)
    return keep | (_spread(mask.partial_blocks, q_block, k_block, batch, heads) & allowed)


def _spread(blocks: Tensor, q_block: Tensor, k_block: Tensor, batch: int, heads: int) -> Tensor:
    rows, columns = q_block.shape[-1], k_block.shape[-1]
    blocks = blocks.expand(batch, heads, -1, -1)
    blocks = blocks.gather(2, q_block.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, blocks.shape[-1]))
    return blocks.gather(3, k_block.expand(batch, heads, -1)[..., None, :].expand(-1, -1, rows, columns))
