"""Backend "triton": block-sparse attention by a Triton kernel, for NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import importlib.util
import math
import os
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.types import AttentionPlan

__all__ = ["TritonBackend"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_DIM = 256
_BITS_BYTES = 2 << 30
_CHUNK_PAIRS = 1 << 26


@dataclass(frozen=True)
class _Launch:
    """How the kernel is compiled: the tile of queries and of keys, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class _Prepared:
    """What the host knows of a plan: its largest blocks, and the packed bits of its partial blocks.

    Args:
        q_block, k_block: tokens in the largest query and key block.
        whole: leading key blocks that all have `k_block` tokens.
        bits: `[B|1, H|1, Mq, L, q_block, words]` int32, or `None` without partial blocks.
    """

    q_block: int
    k_block: int
    whole: int
    bits: Tensor | None


# By plan, then by batch and heads, which a predicate may depend on.
_prepared: weakref.WeakKeyDictionary[AttentionPlan, dict[tuple[int, int], _Prepared]] = weakref.WeakKeyDictionary()


class TritonBackend:
    """The portable GPU kernel: any blocks, any head size up to 256, partial blocks, row sums."""

    name = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        return triton_unavailable(device)

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        if q.dtype not in _DTYPES:
            return f"dtype must be float32, float16 or bfloat16, got {q.dtype}"
        if max(q.shape[-1], v.shape[-1]) > _LARGEST_DIM:
            return f"head_dim must be at most {_LARGEST_DIM}, got {max(q.shape[-1], v.shape[-1])}"
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "it has no backward; use torch.no_grad() or 'reference'"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        known = _prepared.setdefault(plan, {})
        if (q.shape[0], q.shape[1]) not in known:
            known[q.shape[0], q.shape[1]] = _prepare(plan, q.shape[0], q.shape[1])
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if scale < 0:
            q, scale = -q, -scale  # the kernel takes the maximum before it scales
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:-1] if return_lse else (0, 0, 0), dtype=torch.float32, device=q.device)
        _launch(q, k, v, out, lse, plan, known[q.shape[0], q.shape[1]], scale, return_lse)
        return out, lse if return_lse else None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_unavailable(device: torch.device) -> str | None:
    """What is missing to run Triton's kernels on `device`, and how to get it; `None` when nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is missing; pip install 'dit-sparse[gpu]'"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or higher, this GPU has {major}.{minor}; use 'flex'"
        return None
    if interpreted():
        return None
    return "it runs on CUDA only (elsewhere under TRITON_INTERPRET=1, which is slow); use 'gather' on a CPU"


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    prepared: _Prepared,
    scale: float,
    return_lse: bool,
) -> None:
    import triton

    from dit_sparse.kernels.triton_kernels import forward_kernel

    mask, bits = plan.block_mask, prepared.bits
    launch = _configuration(q, v, prepared)
    q_tiles = triton.cdiv(prepared.q_block, launch.block_m)
    k_tiles = triton.cdiv(prepared.k_block, launch.block_n)
    # A full list's tensors stand in for partial ones that are not there; the kernel does not read them.
    partial_counts = mask.kv_counts if mask.partial_counts is None else mask.partial_counts
    partial_indices = mask.kv_indices if mask.partial_indices is None else mask.partial_indices
    packed = mask.kv_counts[..., None, None, None] if bits is None else bits
    lists = [mask.q_offsets, mask.k_offsets, mask.kv_counts, mask.kv_indices, partial_counts, partial_indices, packed]
    lists = [x if x.stride(-1) == 1 else x.contiguous() for x in lists]
    q_offsets, k_offsets, counts, indices, partial_counts, partial_indices, packed = lists
    whole = prepared.whole if prepared.k_block % launch.block_n == 0 else 0
    forward_kernel[mask.num_q_blocks * q_tiles, q.shape[1], q.shape[0]](
        q, k, v, out, lse, *lists,
        *(stride for x in (q, k, v, out) for stride in x.stride()[:3]), *lse.stride()[:2],
        *broadcast_strides(q_offsets), *broadcast_strides(k_offsets), *broadcast_strides(counts),
        *broadcast_strides(indices), indices.stride(2),
        *broadcast_strides(partial_counts), *broadcast_strides(partial_indices), partial_indices.stride(2),
        *broadcast_strides(packed), *packed.stride()[2:4],
        packed.shape[-1], whole, scale * math.log2(math.e),
        D=q.shape[-1], DV=v.shape[-1], BLOCK_D=padded(q.shape[-1]), BLOCK_DV=padded(v.shape[-1]),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, Q_TILES=q_tiles, K_TILES=k_tiles,
        PARTIAL=bits is not None, RETURN_LSE=return_lse, UPCAST=interpreted(),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def broadcast_strides(x: Tensor) -> tuple[int, int]:
    """Strides over batch and heads, 0 where one list serves all."""
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _configuration(q: Tensor, v: Tensor, prepared: _Prepared) -> _Launch:
    """Tiles, warps and stages; those for 64- and 128-blocks at 64 and 128 channels were measured on an H200."""
    if interpreted():
        return _Launch(min(64, padded(prepared.q_block)), min(32, padded(prepared.k_block)), 4, 1)
    dim = max(padded(q.shape[-1]), padded(v.shape[-1]))
    block_m = 128 if prepared.q_block > 64 else 64 if prepared.q_block > 32 else 32
    block_n = 128 if prepared.k_block > 64 else 64 if prepared.k_block > 32 else 32
    if q.dtype == torch.float32:
        return _Launch(min(block_m, 64), min(block_n, 32), 4, 2)
    if dim > 128:
        return _Launch(min(block_m, 64), min(block_n, 64), 4, 2)
    if torch.cuda.get_device_capability(q.device)[0] == 8:
        # Ampere and Ada have 100 to 164 KB of shared memory a multiprocessor.
        return _Launch(block_m, min(block_n, 64), 8 if block_m == 128 else 4, 2)
    return _Launch(block_m, block_n, 8 if block_m == 128 else 4, 3)


def _prepare(plan: AttentionPlan, batch: int, heads: int) -> _Prepared:
    """Read the block sizes back from the device and pack the partial blocks; once a plan."""
    mask = plan.block_mask
    q_block = int(mask.q_offsets.diff(dim=-1).max())
    k_sizes = mask.k_offsets.diff(dim=-1).cpu()
    k_block = int(k_sizes.max())
    same = (k_sizes == k_block).flatten(0, 1).all(0)
    whole = int(same.int().cumprod(0).sum())
    has_partial = mask.partial_counts is not None and bool((mask.partial_counts > 0).any())
    return _Prepared(q_block, k_block, whole, _pack(plan, batch, heads, q_block, k_block) if has_partial else None)


def _pack(plan: AttentionPlan, batch: int, heads: int, q_block: int, k_block: int) -> Tensor:
    """`[B|1, H|1, Mq, L, q_block, words]` int32: what the predicate keeps of every partial block, 32 keys a word."""
    mask = plan.block_mask
    assert mask.partial_counts is not None
    assert mask.partial_indices is not None
    if getattr(mask.predicate, "uniform", False):
        tensors = (mask.partial_indices, mask.q_offsets, mask.k_offsets, plan.q_order.index, plan.kv_order.index)
        batch, heads = (max(x.shape[dim] for x in tensors) for dim in (0, 1))
    width, words = int(mask.partial_counts.max()), -(-k_block // 32)
    size = batch * heads * mask.num_q_blocks * width * q_block * words * 4
    if size > _BITS_BYTES:
        raise ValueError(
            f"partial blocks must fit in {_BITS_BYTES >> 20} MiB of packed bits with backend 'triton', got "
            f"{size >> 20} MiB; use 'flex', or a method that rounds to blocks"
        )
    shape = (batch, heads, mask.num_q_blocks, width, q_block, words)
    bits = torch.empty(shape, dtype=torch.int32, device=mask.device)
    rows = max(1, _CHUNK_PAIRS // (width * q_block * words * 32))
    for b in range(batch):
        for h in range(heads):
            for start in range(0, mask.num_q_blocks, rows):
                part = slice(start, start + rows)
                bits[b, h, part] = _pack_rows(plan, b, h, part, width, q_block, words)
    return bits


def _pack_rows(plan: AttentionPlan, b: int, h: int, part: slice, width: int, q_block: int, words: int) -> Tensor:
    """`[rows, L, q_block, words]` int32 of some query blocks of one head."""
    mask = plan.block_mask
    assert mask.predicate is not None
    assert mask.partial_indices is not None
    device = mask.device
    q_bounds, k_bounds = _at(mask.q_offsets, b, h), _at(mask.k_offsets, b, h)
    blocks = _at(mask.partial_indices, b, h)[part, :width].long().clamp(0, mask.num_k_blocks - 1)
    q_token = _tokens(_at(plan.q_order.index, b, h), q_bounds[:-1][part], q_block)
    k_token = _tokens(_at(plan.kv_order.index, b, h), k_bounds[blocks], words * 32)
    batch, head = (torch.tensor(value, device=device) for value in (b, h))
    allowed = mask.predicate(batch, head, q_token[:, None, :, None], k_token[:, :, None, :])
    allowed = allowed.expand(*blocks.shape, q_block, words * 32).unflatten(-1, (words, 32))
    weights = (1 << torch.arange(32, device=device)).to(torch.int64)
    packed = (allowed * weights).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def _tokens(index: Tensor, starts: Tensor, length: int) -> Tensor:
    """`[..., length]` tokens at the positions from `starts` on; past the end the last one, which a mask hides."""
    positions = starts[..., None].long() + torch.arange(length, device=index.device)
    return index[positions.clamp(max=index.shape[0] - 1)]


def _at(x: Tensor, b: int, h: int) -> Tensor:
    return x[b % x.shape[0], h % x.shape[1]]
