"""The best blocks of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.score_tiles import ScoreBackend, device_of, use_triton
from dit_sparse.kernels.triton_launch import broadcast_strides, padded

__all__ = ["keep_best", "keep_ranks", "takes_kernel"]

# One program holds a row in registers.
_LARGEST_ROW = 16384


@torch.no_grad()
def keep_best(scores: Tensor, counts: Tensor, *, backend: ScoreBackend = "auto") -> Tensor:
    """Keep as many of the best blocks of every row as its head is allowed; among equal scores the earlier block wins.

    Args:
        scores: `[B, H, Mq, Mk]`, higher is better.
        counts: `[B|1, H|1]` int64 blocks a row; numbers below 1 count as 1, above `Mk` as `Mk`. Never read on the host.
        backend: "triton" finds the last kept score bit by bit on NVIDIA GPUs, "torch" sorts; "auto" takes the former
            for CUDA tensors of float32, float16 or bfloat16 and rows of up to 16,384 blocks.

    Returns:
        `[B, H, Mq, Mk]` bool.

    Raises:
        ValueError: an unknown backend, or scores that the one asked for does not take.
        BackendUnavailableError: the backend cannot run here.
    """
    if takes_kernel(scores, backend):
        return _by_triton(scores, counts)
    best_first = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    return keep_ranks(best_first, ranks < counts.clamp(min=1)[..., None, None])


def keep_ranks(best_first: Tensor, wanted: Tensor) -> Tensor:
    """`[B, H, Mq, Mk]` bool: the blocks at the `wanted` places of each row of `best_first`."""
    kept = torch.zeros(best_first.shape, dtype=torch.bool, device=best_first.device)
    return kept.scatter_(-1, best_first, wanted.expand(best_first.shape))


def takes_kernel(scores: Tensor, backend: ScoreBackend) -> bool:
    """Whether `keep_best` runs its Triton kernel on these scores; raises as it does."""
    row = scores[..., :1]  # channels are no limit here
    if scores.shape[-1] <= _LARGEST_ROW:
        return use_triton(backend, row)
    if backend == "triton":
        raise ValueError(f"scores must have at most {_LARGEST_ROW} key blocks, got {scores.shape[-1]}; use 'torch'")
    return use_triton("torch" if backend == "auto" else backend, row)


def _by_triton(scores: Tensor, counts: Tensor) -> Tensor:
    from dit_sparse.kernels.score_kernels import keep_best_kernel

    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    block = padded(scores.shape[-1])
    with device_of(scores):
        keep_best_kernel[scores.shape[2], scores.shape[1], scores.shape[0]](
            scores, counts, kept.view(torch.uint8), *scores.stride(), *broadcast_strides(counts), *kept.stride()[:3],
            scores.shape[-1], BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return kept
