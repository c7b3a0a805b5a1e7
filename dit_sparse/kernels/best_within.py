"""The blocks of most worth a query-key pair that a budget of pairs pays for, of all heads together."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.score_tiles import ScoreBackend, use_triton
from dit_sparse.kernels.triton_launch import interpreted, on_device_of, padded

__all__ = ["best_within"]

_PASSES = 8
_ROWS = 8  # of a program that counts
_LARGEST_ROW = 16384  # one program holds a row in registers


@torch.no_grad()
def best_within(
    mass: Tensor,
    budget: float,
    q_text: Tensor,
    k_text: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    *,
    backend: ScoreBackend = "auto",
) -> Tensor:
    """The blocks of largest mass a pair until `budget` pairs a batch are spent, text and each row's heaviest first.

    Args:
        mass: `[B, H, Mq, Mk]` float32, none negative; among equal worth the earlier block wins.
        budget: query-key pairs of all heads together. What is kept whatever its worth may spend more.
        q_text, k_text: `[Mq]` and `[Mk]` bool, blocks that are kept with everything.
        q_sizes, k_sizes: `[Mq]` and `[Mk]` int32 tokens a block.
        backend: "triton" is a radix search for NVIDIA GPUs, "torch" sorts anywhere; "auto" takes the former for CUDA
            tensors of rows of up to 16,384 blocks.

    Returns:
        `[B, H, Mq, Mk]` bool. Nothing waits for the device.

    Raises:
        ValueError: an unknown backend, or mass that the one asked for does not take.
        BackendUnavailableError: the backend cannot run here.
    """
    takes = mass.dtype == torch.float32 and mass.shape[-1] <= _LARGEST_ROW
    if backend == "triton" and not takes:
        raise ValueError(
            f"mass must be float32 with at most {_LARGEST_ROW} key blocks, got {mass.dtype} with {mass.shape[-1]}; "
            "use 'torch'"
        )
    # Channels are no limit here.
    if use_triton("torch" if backend == "auto" and not takes else backend, mass[..., :1]):
        return _by_triton(mass, budget, q_text, k_text, q_sizes, k_sizes)
    return _by_sort(mass, budget, q_text, k_text, q_sizes, k_sizes)


def _by_sort(mass: Tensor, budget: float, q_text: Tensor, k_text: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    area = q_sizes[:, None].long() * k_sizes
    forced = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    forced = forced | q_text[:, None] | k_text
    left = budget - (area * forced).sum((-1, -2, -3)).double()
    # An empty block has no mass, and no pair to divide by.
    worth = (mass / area.clamp(min=1)).masked_fill(forced, -1).flatten(1)
    ranked = worth.argsort(dim=-1, descending=True, stable=True)
    spent = (area * ~forced).flatten(1).gather(-1, ranked).cumsum(-1)
    within = spent <= left[..., None]
    return torch.zeros_like(within).scatter_(-1, ranked, within).view_as(forced) | forced


def _by_triton(mass: Tensor, budget: float, q_text: Tensor, k_text: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    import triton

    from dit_sparse.kernels.best_within_kernels import count_kernel, keep_kernel, keys_kernel, ties_kernel

    mass = mass.contiguous()
    batch, heads, q_blocks, k_blocks = mass.shape
    rows, block = heads * q_blocks, padded(k_blocks)
    warps = {"num_warps": min(16, max(1, block // 256))}
    sizes = q_sizes.contiguous(), k_sizes.contiguous()
    keys = torch.empty_like(mass, dtype=torch.int32)
    free, ties = (torch.empty(batch, rows, dtype=torch.int64, device=mass.device) for _ in range(2))
    counts = torch.zeros(batch, _PASSES, 16, dtype=torch.int64, device=mass.device)
    kept = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    with on_device_of(mass):
        text = (x.contiguous().view(torch.uint8) for x in (q_text, k_text))
        keys_kernel[(batch * rows,)](mass, *text, *sizes, keys, free, q_blocks, k_blocks, BLOCK=block, **warps)
        budgets = budget - free.sum(-1).double()
        given = (keys, *sizes, counts, budgets)
        tile = 16 if interpreted() else 256
        for number in range(_PASSES):
            count_kernel[triton.cdiv(rows, _ROWS), batch](
                *given, rows, q_blocks, k_blocks, PASS=number, PASSES=_PASSES, ROWS=_ROWS, BLOCK=tile, num_warps=4
            )  # fmt: skip
        shape = dict(PASSES=_PASSES, BLOCK=block, **warps)
        ties_kernel[rows, batch](*given, ties, rows, q_blocks, k_blocks, **shape)
        before = ties.cumsum(-1) - ties
        keep_kernel[rows, batch](*given, before, kept.view(torch.uint8), rows, q_blocks, k_blocks, **shape)
    return kept
