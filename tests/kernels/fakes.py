"""Stand-ins for attention packages that cannot be installed here: their documented interface, in plain torch.

They check what is passed to them and compute in float64 what the package would, slips included: a call that the package
computes wrongly without a word comes out wrong here too.
"""

from __future__ import annotations

import math
import sys
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Float64 output and natural-log row sums of `[..., N, D]`."""
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~keep, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v.double(), scores.logsumexp(-1)


def install_fa3(monkeypatch: pytest.MonkeyPatch) -> None:
    """`flash_attn_func` after fa3_fwd_interface.py of the fa3-fwd 0.0.3 wheel: `[B, N, H, D]`, bfloat16 only."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        assert softmax_scale is not None
        assert softmax_scale > 0
        assert not causal
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = attend(q, k, v, torch.tensor(True), softmax_scale)
        out = out.bfloat16().transpose(1, 2)
        return (out, lse.float()) if return_attn_probs else out

    module = types.ModuleType("fa3_fwd_interface")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)


class BlockSparseTensorsTorch(NamedTuple):
    """The fields of flash_attn/cute/block_sparsity.py, fa4-v4.0.0.beta27, in their order."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def install_fa4(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], *, any_key_multiple: bool) -> None:
    """`flash_attn_func` after flash_attn/cute/interface.py and block_sparse_utils.py, fa4-v4.0.0.beta27.

    The checks are those of `normalize_block_sparse_config`. As `consume_block_sparse_loads` does, the blocks of a row
    are taken from the end of its list, and only the first one taken hides the keys past the sequence's end; blocks in
    the mask lists are attended whole without a `mask_mod`.

    Args:
        tile: queries (of all stages) and keys of the kernel's tile; a block is a multiple of it in queries.
        any_key_multiple: whether a block may be a multiple in keys too, as on Blackwell.
    """

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        block_sparse_tensors: BlockSparseTensorsTorch | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert softmax_scale is not None
        assert softmax_scale > 0
        assert q.dtype in (torch.float16, torch.bfloat16)
        sparse = block_sparse_tensors
        assert sparse is not None
        assert sparse.block_size is not None
        block_q, block_k = sparse.block_size
        assert block_q % tile[0] == 0
        assert block_k % tile[1] == 0
        assert any_key_multiple or block_k == tile[1]
        batch, n_q, heads, _ = q.shape
        n_k = k.shape[1]
        rows, columns = -(-n_q // block_q), -(-n_k // block_k)
        keep = torch.zeros(batch, heads, n_q, columns * block_k, dtype=torch.bool)
        lists = ((sparse.mask_block_cnt, sparse.mask_block_idx), (sparse.full_block_cnt, sparse.full_block_idx))
        for counts, indices in lists:
            assert counts is not None
            assert indices is not None
            assert counts.dtype == indices.dtype == torch.int32
            assert counts.is_contiguous()
            assert indices.is_contiguous()
            assert all(size in (1, want) for size, want in zip(counts.shape, (batch, heads), strict=False))
            assert counts.shape[2] == rows
            assert indices.shape[:3] == counts.shape
            assert indices.shape[3] <= columns
            _fill(keep, counts, indices, sparse.block_size, n_k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, columns * block_k - n_k)) for x in (k, v))
        out, lse = attend(q, k, v, keep, softmax_scale)
        return out.to(q.dtype).transpose(1, 2), lse.float() if return_lse else None

    package, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    sparsity = types.ModuleType("flash_attn.cute.block_sparsity")
    cute.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch  # type: ignore[attr-defined]
    for module in (package, cute, sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def _fill(keep: Tensor, counts: Tensor, indices: Tensor, block_size: tuple[int, int], n_k: int) -> None:
    block_q, block_k = block_size
    for b in range(keep.shape[0]):
        for h in range(keep.shape[1]):
            row_counts, row_indices = (x[b % x.shape[0], h % x.shape[1]] for x in (counts, indices))
            for row, count in enumerate(row_counts.tolist()):
                for taken, column in enumerate(reversed(row_indices[row, :count].tolist())):
                    end = (column + 1) * block_k
                    stop = min(end, n_k) if taken == 0 else end
                    keep[b, h, row * block_q : (row + 1) * block_q, column * block_k : stop] = True


class VariableBlockSparseAttentionWrapper:
    """After flashinfer/sparse.py, flashinfer 0.6.18: `[H, N, D]`, base-2 row sums, and only bfloat16 or float16.

    Rows that keep nothing come out as NaN with row sums of -5e4, the infinity of older versions: nobody may rely on
    them.
    """

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        self._plan: tuple[Tensor, float, torch.dtype] | None = None

    def plan(
        self,
        block_mask_map: Tensor,
        block_row_sz: Tensor,
        block_col_sz: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        sm_scale: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        assert block_mask_map.dtype == torch.bool
        assert block_row_sz.dtype == block_col_sz.dtype == torch.int32
        assert num_kv_heads == block_mask_map.shape[0] == block_row_sz.shape[0] == block_col_sz.shape[0]
        assert block_mask_map.shape[1:] == (block_row_sz.shape[1], block_col_sz.shape[1])
        assert num_qo_heads == num_kv_heads
        assert head_dim in (64, 128, 256)
        assert block_mask_map.any()
        assert sm_scale is not None
        assert sm_scale > 0
        assert q_data_type == kv_data_type
        keep = [
            kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            for kept, rows, columns in zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
        ]
        self._plan = torch.stack(keep), sm_scale, q_data_type

    def run(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool = False) -> Any:
        assert self._plan is not None
        keep, scale, dtype = self._plan
        assert q.dtype == k.dtype == v.dtype == dtype
        assert keep.shape == (*q.shape[:2], k.shape[1])
        out, lse = attend(q, k, v, keep, scale)
        empty = lse.isneginf()
        out = out.masked_fill(empty[..., None], math.nan).to(q.dtype)
        lse = (lse / math.log(2)).masked_fill(empty, -5e4).float()
        return (out, lse) if return_lse else out


def install_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flashinfer")
    module.VariableBlockSparseAttentionWrapper = VariableBlockSparseAttentionWrapper  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
