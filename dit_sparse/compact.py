"""Index lists of bool rows: how many entries are kept, and which."""

from __future__ import annotations

import contextlib
import importlib.util

import torch
from torch import Tensor

__all__ = ["compact", "compact_by_sort", "compact_by_triton"]


def compact(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending indices of the True entries of the last dimension.

    Nothing here waits for the device. On NVIDIA GPUs with Triton one kernel does it, elsewhere a stable sort.

    Args:
        kept: `[..., M]` bool.

    Returns:
        counts `[...]` and indices `[..., M]`, int32 and contiguous. The entries past the count are the indices of the
        False entries, ascending too.
    """
    if kept.is_cuda and _triton_runs(kept.device):
        return compact_by_triton(kept)
    return compact_by_sort(kept)


def compact_by_sort(kept: Tensor) -> tuple[Tensor, Tensor]:
    """`compact` in plain torch, anywhere; the oracle of the kernel."""
    kept = kept.contiguous()  # on CUDA a sort keeps its input's strides
    indices = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), indices.to(torch.int32).contiguous()


def compact_by_triton(kept: Tensor) -> tuple[Tensor, Tensor]:
    """`compact` by the Triton kernel, on NVIDIA GPUs or under Triton's interpreter."""
    import triton

    from dit_sparse.compact_kernel import compact_kernel

    kept = kept.contiguous()
    counts = torch.empty(kept.shape[:-1], dtype=torch.int32, device=kept.device)
    indices = torch.empty(kept.shape, dtype=torch.int32, device=kept.device)
    if not indices.numel():
        return counts.zero_(), indices
    columns = kept.shape[-1]
    block = min(2048, triton.next_power_of_2(columns))
    # Triton launches on the current device.
    with torch.cuda.device(kept.device) if kept.is_cuda else contextlib.nullcontext():
        compact_kernel[(counts.numel(),)](kept.view(torch.uint8), counts, indices, columns, BLOCK=block, num_warps=4)
    return counts, indices


def _triton_runs(device: torch.device) -> bool:
    found = importlib.util.find_spec("triton") is not None
    return found and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
