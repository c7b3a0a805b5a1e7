"""Block masks in the count-and-index form that FlexAttention and FlashAttention-4 share.

Per query block: how many key blocks are kept and which, in ascending order. Full blocks attend everywhere; partial
blocks are refined token by token by a predicate. Blocks may be uneven; their bounds are the offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.compact import compact
from dit_sparse.head_shard import select_heads

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

TokenPredicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which key blocks each query block keeps.

    Args:
        kv_counts: `[B|1, H|1, Mq]` int32 number of full key blocks of a query block.
        kv_indices: `[B|1, H|1, Mq, L]` int32, the first `kv_counts` of them valid and ascending.
        q_offsets, k_offsets: `[B|1, H|1, M+1]` int32 bounds of the blocks, in the orders' positions.
        partial_counts, partial_indices: the same for blocks that `predicate` refines; `None` without any.
        predicate: `(batch, head, q_token, k_token) -> bool`, on broadcastable int64 tensors of token numbers in
            the sequence's own order. One that ignores batch and head may say so by an attribute `uniform` that is true.
        is_full: every block is known to be kept whole, so dense attention computes the same.
        kept_pairs: `[B|1, H|1]` float64 number of query-key pairs kept, where the maker of the mask knows it; counting
            the pairs of partial blocks is slow.

    Raises:
        ValueError: shapes or dtypes that do not fit, or partial blocks without a predicate.
    """

    kv_counts: Tensor
    kv_indices: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    partial_counts: Tensor | None = None
    partial_indices: Tensor | None = None
    predicate: TokenPredicate | None = None
    is_full: bool = False
    kept_pairs: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("kv_counts", "kv_indices", "q_offsets", "k_offsets", "partial_counts", "partial_indices"):
            value = getattr(self, name)
            if value is not None and value.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {value.dtype}")
        if self.kv_counts.ndim != 3 or self.kv_counts.shape[-1] != self.num_q_blocks:
            raise ValueError(f"kv_counts must be [B|1, H|1, {self.num_q_blocks}], got {tuple(self.kv_counts.shape)}")
        if self.kv_indices.shape[:-1] != self.kv_counts.shape:
            raise ValueError(
                f"kv_indices must be {tuple(self.kv_counts.shape)} + (L,), got {tuple(self.kv_indices.shape)}"
            )
        if (self.partial_counts is None) != (self.partial_indices is None):
            raise ValueError("partial_counts and partial_indices must be given together, got one of them")
        if self.partial_counts is not None and self.predicate is None:
            raise ValueError("partial blocks need a predicate, got None")

    @classmethod
    def from_bool(
        cls,
        kept: Tensor,
        q_offsets: Tensor,
        k_offsets: Tensor,
        *,
        partial: Tensor | None = None,
        predicate: TokenPredicate | None = None,
        kept_pairs: Tensor | None = None,
    ) -> BlockMask:
        """Mask that keeps the blocks `kept` `[B|1, H|1, Mq, Mk]` (bool), those also in `partial` by `predicate`.

        The index lists are `Mk` wide, so that no count has to come back from the device.
        """
        if kept.dtype != torch.bool or kept.ndim != 4:
            raise ValueError(f"kept must be bool [B|1, H|1, Mq, Mk], got {kept.dtype} {tuple(kept.shape)}")
        if kept.shape[-1] != k_offsets.shape[-1] - 1:
            raise ValueError(f"kept must have k_offsets' {k_offsets.shape[-1] - 1} key blocks, got {kept.shape[-1]}")
        full = kept if partial is None else kept & ~partial
        counts, indices = compact(full)
        partial_counts, partial_indices = (None, None) if partial is None else compact(kept & partial)
        mask = cls(
            counts, indices, q_offsets, k_offsets, partial_counts, partial_indices, predicate, kept_pairs=kept_pairs
        )
        mask.__dict__["full_blocks"] = full  # known already; making it of the lists takes a scatter
        return mask

    @classmethod
    def full(cls, q_offsets: Tensor, k_offsets: Tensor) -> BlockMask:
        """Mask that keeps every block whole."""
        shape = (1, 1, q_offsets.shape[-1] - 1, k_offsets.shape[-1] - 1)
        kept = torch.ones(shape, dtype=torch.bool, device=q_offsets.device)
        return replace(cls.from_bool(kept, q_offsets, k_offsets), is_full=True)

    @property
    def num_q_blocks(self) -> int:
        return self.q_offsets.shape[-1] - 1

    @property
    def num_k_blocks(self) -> int:
        return self.k_offsets.shape[-1] - 1

    @property
    def device(self) -> torch.device:
        return self.kv_counts.device

    @cached_property
    def full_blocks(self) -> Tensor:
        """`[B|1, H|1, Mq, Mk]` bool: blocks kept whole."""
        return _expand(self.kv_counts, self.kv_indices, self.num_k_blocks)

    @cached_property
    def partial_blocks(self) -> Tensor | None:
        """`[B|1, H|1, Mq, Mk]` bool: blocks refined by the predicate, or `None`."""
        if self.partial_counts is None or self.partial_indices is None:
            return None
        return _expand(self.partial_counts, self.partial_indices, self.num_k_blocks)

    @property
    def kept_blocks(self) -> Tensor:
        """`[B|1, H|1, Mq, Mk]` bool: blocks visited, whole or in part."""
        return self.full_blocks if self.partial_blocks is None else self.full_blocks | self.partial_blocks

    def to_bool(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        """Mask over tokens, `[B|1, H|1, Nq, Nk]` bool in the orders' positions.

        Args:
            q_index, k_index: `[B|1, H|1, N]` token at each position, for the predicate.
        """
        q_block, k_block = self.block_of(self.q_offsets), self.block_of(self.k_offsets)
        mask = _spread(self.full_blocks, q_block, k_block)
        if self.partial_blocks is not None and self.predicate is not None:
            allowed = _evaluate(self.predicate, self.partial_blocks, q_index, k_index)
            mask = mask | (_spread(self.partial_blocks, q_block, k_block) & allowed)
        return mask

    def density(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        """`[B|1, H|1]` float64 share of query-key pairs kept; arguments as in `to_bool`."""
        return self.count_pairs(q_index, k_index) / (q_index.shape[-1] * k_index.shape[-1])

    def count_pairs(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        """`[B|1, H|1]` float64 number of query-key pairs kept; arguments as in `to_bool`."""
        if self.kept_pairs is not None:
            return self.kept_pairs
        q_sizes, k_sizes = self.q_offsets.diff(dim=-1).double(), self.k_offsets.diff(dim=-1).double()
        # Sums of tokens in a row stay below 2^24, so float32 is exact and the block map need not be copied to float64.
        rows = (self.full_blocks.float() @ k_sizes.float()[..., None])[..., 0]
        kept = (rows.double() * q_sizes).sum(-1)
        if self.partial_blocks is not None and self.predicate is not None:
            kept = kept + self._partial_pairs(q_index, k_index)
        return kept

    def _partial_pairs(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        """`[B|1, H|1]` float64 pairs kept inside partial blocks, one row of blocks at a time."""
        assert self.partial_blocks is not None
        assert self.predicate is not None
        k_block = self.block_of(self.k_offsets)
        q_block = self.block_of(self.q_offsets)
        pairs = torch.zeros((), dtype=torch.float64, device=self.device)
        rows = max(1, (1 << 24) // k_index.shape[-1])
        for start in range(0, q_index.shape[-1], rows):
            inside = _spread(self.partial_blocks, q_block[..., start : start + rows], k_block)
            allowed = _evaluate(self.predicate, self.partial_blocks, q_index[..., start : start + rows], k_index)
            pairs = pairs + (inside & allowed).sum((-1, -2), dtype=torch.float64)
        return pairs

    @staticmethod
    def block_of(offsets: Tensor) -> Tensor:
        """`[B|1, H|1, N]` int64 block number of every position under `offsets`."""
        n = int(offsets[0, 0, -1])
        positions = torch.arange(n, device=offsets.device, dtype=torch.int32).expand(*offsets.shape[:2], n)
        return torch.searchsorted(offsets[..., 1:].contiguous(), positions.contiguous(), right=True)

    def to_flex(self, q_index: Tensor, k_index: Tensor, block_size: tuple[int, int] = (128, 128)) -> FlexBlockMask:
        """This mask for `torch.nn.attention.flex_attention`, on tokens in the orders' positions.

        FlexAttention's blocks are even. Where they do not fall on this mask's blocks, a flex block that is kept only
        in part becomes a partial one and is refined by a lookup, so the result is exact for any offsets.

        Args:
            q_index, k_index: as in `to_bool`.
            block_size: flex's (query, key) block sizes.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        q_block, k_block = self.block_of(self.q_offsets), self.block_of(self.k_offsets)
        n_q, n_k = q_block.shape[-1], k_block.shape[-1]
        full, partial, predicate = self.full_blocks, self.partial_blocks, self.predicate
        is_full, in_part = self._even_blocks(q_block, k_block, block_size)
        full_counts, full_indices = compact(is_full)
        part_counts, part_indices = compact(in_part)

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            qb, kb = _at(q_block, b, h, i), _at(k_block, b, h, j)
            keep = full[b % full.shape[0], h % full.shape[1], qb, kb]
            if partial is None or predicate is None:
                return keep
            inside = partial[b % partial.shape[0], h % partial.shape[1], qb, kb]
            return keep | (inside & predicate(b, h, _at(q_index, b, h, i), _at(k_index, b, h, j)))

        return FlexBlockMask.from_kv_blocks(
            part_counts, part_indices, full_counts, full_indices, block_size, mask_mod, seq_lengths=(n_q, n_k)
        )

    def _even_blocks(self, q_block: Tensor, k_block: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Bool maps `[B|1, H|1, ceil(Nq/block_q), ceil(Nk/block_k)]` of even blocks: kept whole, kept in part."""
        q_cover = _coverage(q_block, self.num_q_blocks, block_size[0])
        k_cover = _coverage(k_block, self.num_k_blocks, block_size[1])
        area = q_cover.sum(-1)[..., :, None] * k_cover.sum(-1)[..., None, :]
        whole = torch.einsum("bhfq,bhqk,bhgk->bhfg", *_same_batch(q_cover, self.full_blocks.float(), k_cover))
        touched = torch.einsum("bhfq,bhqk,bhgk->bhfg", *_same_batch(q_cover, self.kept_blocks.float(), k_cover))
        is_full = whole == area
        return is_full, (touched > 0) & ~is_full

    def to_fa4(self, block_size: tuple[int, int]) -> dict[str, Any]:
        """This mask for FlashAttention-4: the fields of its `BlockSparseTensorsTorch`, by name.

        Follows `flash_attn/cute/block_sparsity.py` of Dao-AILab/flash-attention, fa4-v4.0.0.beta27. FlashAttention-4's
        blocks are even, as FlexAttention's are. A block kept only in part, because it is a partial one or because this
        mask's bounds cut it, is in the mask lists; FlashAttention-4 attends to all of it unless it is given a
        `mask_mod` of its own.

        Args:
            block_size: FlashAttention-4's (query, key) block sizes.

        Returns:
            `full_block_cnt` `[B|1, H|1, ceil(Nq/block_q)]` and `full_block_idx` `[.., ceil(Nk/block_k)]`, int32 and
            ascending, for blocks kept whole; `mask_block_cnt` and `mask_block_idx` for those kept in part; and
            `block_size`.
        """
        q_block, k_block = self.block_of(self.q_offsets), self.block_of(self.k_offsets)
        is_full, in_part = self._even_blocks(q_block, k_block, block_size)
        full_counts, full_indices = compact(is_full)
        part_counts, part_indices = compact(in_part)
        return {
            "mask_block_cnt": part_counts,
            "mask_block_idx": part_indices,
            "full_block_cnt": full_counts,
            "full_block_idx": full_indices,
            "block_size": block_size,
        }

    def to_bsr(self) -> tuple[Tensor, Tensor]:
        """Kept blocks in block-sparse-row form, the heads of all batches stacked as rows.

        Returns:
            `indptr` `[B' * H' * Mq + 1]` and `indices` `[nnz]`, int32, B' and H' being the mask's own leading sizes;
            partial blocks count as kept, as in FlashInfer's block-sparse interface.
        """
        kept = self.kept_blocks.flatten(0, 2)
        indptr = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=self.device)
        indptr[1:] = kept.sum(-1).cumsum(0)
        return indptr, kept.nonzero()[:, 1].to(torch.int32)

    def of_heads(self, heads: tuple[int, ...]) -> BlockMask:
        """This mask for `heads` alone."""
        names = ("kv_counts", "kv_indices", "q_offsets", "k_offsets", "partial_counts", "partial_indices", "kept_pairs")
        tensors = {name: x for name in names if (x := getattr(self, name)) is not None}
        own: dict[str, Any] = {name: select_heads(x, heads) for name, x in tensors.items()}
        if (predicate := self.predicate) is not None and not getattr(predicate, "uniform", False):
            numbers = torch.tensor(heads, device=self.device)
            own["predicate"] = lambda b, h, i, j: predicate(b, numbers[h], i, j)
        return replace(self, **own)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device; the predicate must work there too."""
        return replace(
            self,
            kv_counts=self.kv_counts.to(device),
            kv_indices=self.kv_indices.to(device),
            q_offsets=self.q_offsets.to(device),
            k_offsets=self.k_offsets.to(device),
            partial_counts=None if self.partial_counts is None else self.partial_counts.to(device),
            partial_indices=None if self.partial_indices is None else self.partial_indices.to(device),
            kept_pairs=None if self.kept_pairs is None else self.kept_pairs.to(device),
        )

    def pack(self) -> PackedBlockMask:
        """This mask at rest: one bit a block."""
        partial = None if self.partial_blocks is None else pack_bits(self.partial_blocks)
        bounds = self.q_offsets, self.k_offsets
        return PackedBlockMask(
            pack_bits(self.full_blocks), partial, *bounds, self.predicate, self.is_full, self.kept_pairs
        )


@dataclass(frozen=True, eq=False)
class PackedBlockMask:
    """A block mask at rest: one bit a block, expanded when used.

    Args:
        full_bits, partial_bits: `[B|1, H|1, Mq, ceil(Mk/8)]` uint8, lowest bit first.
        q_offsets, k_offsets, predicate, is_full, kept_pairs: as in `BlockMask`.
    """

    full_bits: Tensor
    partial_bits: Tensor | None
    q_offsets: Tensor
    k_offsets: Tensor
    predicate: TokenPredicate | None = None
    is_full: bool = False
    kept_pairs: Tensor | None = None

    def unpack(self) -> BlockMask:
        """The mask itself, equal to the one that was packed."""
        blocks = self.k_offsets.shape[-1] - 1
        full = unpack_bits(self.full_bits, blocks)
        if self.partial_bits is None:
            mask = BlockMask.from_bool(full, self.q_offsets, self.k_offsets, kept_pairs=self.kept_pairs)
            return replace(mask, is_full=True) if self.is_full else mask
        partial = unpack_bits(self.partial_bits, blocks)
        return BlockMask.from_bool(
            full | partial,
            self.q_offsets,
            self.k_offsets,
            partial=partial,
            predicate=self.predicate,
            kept_pairs=self.kept_pairs,
        )


def _expand(counts: Tensor, indices: Tensor, num_blocks: int) -> Tensor:
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    kept = torch.zeros(*counts.shape, num_blocks + 1, dtype=torch.bool, device=counts.device)
    # Entries past the count go to a spare column, so that no valid entry is overwritten.
    return kept.scatter_(-1, torch.where(valid, indices, num_blocks).long(), True)[..., :num_blocks]


def _same_batch(*tensors: Tensor) -> list[Tensor]:
    """`tensors` with their first two dimensions expanded to the largest of each."""
    b, h = (max(t.shape[i] for t in tensors) for i in (0, 1))
    return [t.expand(b, h, *t.shape[2:]) for t in tensors]


def _spread(blocks: Tensor, q_block: Tensor, k_block: Tensor) -> Tensor:
    """Block map `[.., Mq, Mk]` spread to tokens `[.., Nq, Nk]`."""
    blocks, q_block, k_block = _same_batch(blocks, q_block, k_block)
    rows = blocks.gather(2, q_block[..., None].expand(-1, -1, -1, blocks.shape[-1]))
    return rows.gather(3, k_block[..., None, :].expand(-1, -1, q_block.shape[-1], -1))


def _evaluate(predicate: TokenPredicate, blocks: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    """The predicate on all pairs, for as many batches and heads as the indices or the partial `blocks` have."""
    b, h = (max(t.shape[i] for t in (blocks, q_index, k_index)) for i in (0, 1))
    batch = torch.arange(b, device=q_index.device)[:, None, None, None]
    head = torch.arange(h, device=q_index.device)[None, :, None, None]
    return predicate(batch, head, q_index[..., :, None], k_index[..., None, :])


def _coverage(block_of: Tensor, num_blocks: int, size: int) -> Tensor:
    """`[B|1, H|1, ceil(N/size), M]` float32: how many tokens of each block fall into each even block of `size`."""
    even = torch.arange(block_of.shape[-1], device=block_of.device) // size
    flat = even.expand_as(block_of) * num_blocks + block_of
    rows = -(-block_of.shape[-1] // size)
    counts = torch.zeros(*block_of.shape[:2], rows * num_blocks, device=block_of.device)
    return counts.scatter_add_(-1, flat, torch.ones_like(flat, dtype=counts.dtype)).unflatten(-1, (rows, num_blocks))


def _at(table: Tensor, b: Tensor, h: Tensor, i: Tensor) -> Tensor:
    return table[b % table.shape[0], h % table.shape[1], i]


def pack_bits(blocks: Tensor) -> Tensor:
    """`[..., M]` bool as `[..., ceil(M/8)]` uint8, lowest bit first."""
    padded = torch.nn.functional.pad(blocks, (0, -blocks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=blocks.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def pack_words(blocks: Tensor) -> Tensor:
    """`[..., M]` bool as `[..., ceil(M/32)]` int32, lowest bit first, as kernels read them."""
    return pack_bits(torch.nn.functional.pad(blocks, (0, -blocks.shape[-1] % 32))).view(torch.int32)


def unpack_bits(bits: Tensor, blocks: int) -> Tensor:
    """The `[..., blocks]` bool that `pack_bits` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., :blocks]
