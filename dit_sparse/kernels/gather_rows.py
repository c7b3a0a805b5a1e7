"""How the gather backend cuts a plan into batches of equal rows; done once, as plans last many steps.

With a remainder the block means stand behind the keys as more key units, and every row begins with them. Their scores
get a bias anyway, which can hide keys too: so rows of unlike length run together, the shorter ones filled up.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_sparse.types import AttentionPlan

__all__ = ["FLASH_ROWS", "Batch", "Group", "Prepared", "prepared"]

# Query rows from which torch's flash operator takes slices of 64 or more and beats matmul.
FLASH_ROWS = 192
# Keys and scores of one thread's rows; a core's L2 cache has 1 to 2 MB.
_CACHE_BYTES = 1 << 20
# Tokens of a key unit at most where block means are units too: the last of those is filled up.
_LARGEST_MEANS_UNIT = 32


@dataclass(frozen=True)
class Group:
    """Rows of a batch that are computed together.

    Args:
        rows: which rows of the batch.
        k_units: int64 key units of each row in turn, first those of block means, then what fills the row up, last those
            of partial blocks.
        k_start: the first of them where they are one run, so that a view does; else `None`.
        keys: key tokens of a row, block means and filling among them.
        biased: of those the first, which means and filling lie in.
        may_be_empty: whether a query may find none of the keys of its row allowed.
    """

    rows: slice
    k_units: Tensor
    k_start: int | None
    keys: int
    biased: int
    may_be_empty: bool
    allowed: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Rows of one head with equally many queries, and without block means equally many keys.

    Args:
        q_units: `[n, mq]` int64 query units of each row.
        q_start: the first of them where they are one run; else `None`.
        q_inverse: where each unit of the head is among them if all are, so that they can be put back in turn.
        blocks: `[n]` int64 query block of each row, the first one of stacked ones.
        filling: `[n, f]` bool, which of the keys behind the means only fill up a row.
        partial: tokens at the end of each row that the predicate refines.
        groups: all rows in turn.
    """

    q_units: Tensor
    q_start: int | None
    q_inverse: Tensor | None
    blocks: Tensor
    filling: Tensor
    partial: int
    groups: list[Group]


@dataclass
class Prepared:
    """A plan cut up.

    Args:
        batches: of each batch and head.
        empty: query units that have no key, of each batch and head.
        q_unit, k_unit: tokens in a unit of queries and of keys.
        means: block means in whole units, the last ones of no block; 0 without a remainder.
    """

    batches: list[list[list[Batch]]]
    empty: list[list[Tensor]]
    q_unit: int
    k_unit: int
    means: int
    remembered_bytes: int = 0


# By plan, then by channels of a head and threads.
_known: weakref.WeakKeyDictionary[AttentionPlan, dict[tuple[int, int], Prepared]] = weakref.WeakKeyDictionary()


def prepared(plan: AttentionPlan, dim: int, threads: int) -> Prepared:
    """Return `plan` cut up for heads of `dim` channels and this many threads; the answer lasts as long as the plan."""
    known = _known.setdefault(plan, {})
    if (dim, threads) not in known:
        known[dim, threads] = _prepare(plan, dim, threads)
    return known[dim, threads]


def _prepare(plan: AttentionPlan, dim: int, threads: int) -> Prepared:
    mask = plan.block_mask
    lists = [mask.kv_counts, mask.kv_indices, mask.q_offsets, mask.k_offsets]
    if mask.partial_counts is not None and mask.partial_indices is not None:
        lists += [mask.partial_counts, mask.partial_indices]
    q_unit, k_unit, means = _unit(mask.q_offsets), _unit(mask.k_offsets), 0
    if plan.remainder != "none":
        k_unit = math.gcd(k_unit, _LARGEST_MEANS_UNIT)
        means = -(-mask.num_k_blocks // k_unit) * k_unit
    prepared = Prepared([], [], q_unit, k_unit, means)
    for b in range(max(x.shape[0] for x in lists)):
        heads = []
        for h in range(max(x.shape[1] for x in lists)):
            counts, indices, q_offsets, k_offsets, *partial = (x[b % x.shape[0], h % x.shape[1]].numpy() for x in lists)
            whole = [row[:count] for row, count in zip(indices, counts, strict=True)]
            parts = [row[:count] for row, count in zip(partial[1], partial[0], strict=True)] if partial else []
            rows = _Rows(q_offsets // q_unit, k_offsets // k_unit, q_unit, k_unit, means, dim, threads)
            heads.append(rows.cut(whole, parts))
        prepared.batches.append([batches for batches, _ in heads])
        prepared.empty.append([empty for _, empty in heads])
    return prepared


def _unit(offsets: Tensor) -> int:
    """Most tokens that divide every block bound."""
    return max(1, int(np.gcd.reduce(offsets.numpy().ravel())))


class _Row(NamedTuple):
    """Query blocks that keep the same keys, and the key units of their whole and partial blocks."""

    blocks: np.ndarray
    q_units: np.ndarray
    whole: np.ndarray
    partial: np.ndarray


@dataclass(frozen=True)
class _Rows:
    """Block bounds of one head in units, and how its rows become batches."""

    q_bounds: np.ndarray
    k_bounds: np.ndarray
    q_unit: int
    k_unit: int
    means: int
    dim: int
    threads: int

    def cut(self, whole: list[np.ndarray], parts: list[np.ndarray]) -> tuple[list[Batch], Tensor]:
        """Batches of the rows that keep the key blocks `whole` and `parts`, and the query units that keep nothing."""
        classes: dict[tuple[int, ...], list[_Row]] = defaultdict(list)
        empty = [np.empty(0, np.int64)]
        for row in self._stacked(whole, parts):
            if self.means + row.whole.size + row.partial.size == 0:
                empty.append(row.q_units)
            elif row.q_units.size:
                length = () if self.means else (row.whole.size,)
                classes[row.q_units.size, row.partial.size, *length].append(row)
        batches = [self._batch(sorted(rows, key=lambda row: -row.whole.size)) for rows in classes.values()]
        return batches, torch.from_numpy(np.concatenate(empty))

    def _stacked(self, whole: list[np.ndarray], parts: list[np.ndarray]) -> Iterator[_Row]:
        """The rows, query blocks that keep the same keys as one.

        Not so with block means, whose bias is the query block's own: such rows go through matmul, which holds all their
        scores, and stacked ones would have too many.
        """
        nothing = np.empty(0, np.int32)
        same: dict[bytes, list[int]] = defaultdict(list)
        for i, keys in enumerate(whole):
            partial = parts[i] if parts else nothing
            if partial.size or self.means:
                yield self._row([i], keys, partial)
            else:
                same[keys.tobytes()].append(i)
        for blocks in same.values():
            yield self._row(blocks, whole[blocks[0]], nothing)

    def _row(self, blocks: list[int], keys: np.ndarray, partial: np.ndarray) -> _Row:
        own = np.array(blocks)
        return _Row(own, _units(self.q_bounds, own), _units(self.k_bounds, keys), _units(self.k_bounds, partial))

    def _batch(self, rows: list[_Row]) -> Batch:
        """A batch of `rows`, the longest first."""
        q_units = np.stack([row.q_units for row in rows])
        lengths = np.array([row.whole.size for row in rows])
        groups, filling = [], np.zeros_like(lengths)
        start = 0
        while start < len(rows):
            longest = self._keys(rows[start])
            size = min(len(rows) - start, self._group_size(q_units.shape[1] * self.q_unit, longest))
            part = slice(start, start + size)
            filling[part] = lengths[start] - lengths[part]
            groups.append(self._group(part, rows[part], filling[part]))
            start += size
        hidden = np.arange(filling.max(initial=0) * self.k_unit) < filling[:, None] * self.k_unit
        blocks = torch.tensor([row.blocks[0] for row in rows])
        refined = rows[0].partial.size * self.k_unit
        inverse = torch.from_numpy(q_units.ravel().argsort()) if q_units.size == self.q_bounds[-1] else None
        return Batch(
            torch.from_numpy(q_units),
            _run_start(q_units),
            inverse,
            blocks,
            torch.from_numpy(hidden),
            refined,
            groups,
        )

    def _group(self, part: slice, rows: list[_Row], filling: np.ndarray) -> Group:
        """The rows that are `part` of a batch, each with `filling` units behind the means; any units do, its own least.

        A key that is not its own could bring it a NaN.
        """
        means = np.arange(self.means // self.k_unit) + self.k_bounds[-1]
        units = [
            np.concatenate([means, np.resize(np.append(row.whole, means), fill), row.whole, row.partial])
            for row, fill in zip(rows, filling, strict=True)
        ]
        k_units = np.concatenate(units)
        biased = self.means + int(filling.max()) * self.k_unit
        may_be_empty = rows[-1].whole.size == 0
        return Group(part, torch.from_numpy(k_units), _run_start(k_units), self._keys(rows[0]), biased, may_be_empty)

    def _keys(self, row: _Row) -> int:
        return self.means + (row.whole.size + row.partial.size) * self.k_unit

    def _group_size(self, queries: int, keys: int) -> int:
        if queries >= FLASH_ROWS:
            return 1  # slices of one row's queries keep the threads busy
        return self.threads * max(1, _CACHE_BYTES // (4 * keys * (self.dim + queries)))


def _units(bounds: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Units of `blocks` in turn, int64."""
    starts, sizes = bounds[blocks].astype(np.int64), (bounds[blocks + 1] - bounds[blocks]).astype(np.int64)
    before = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) + np.repeat(starts - before, sizes)


def _run_start(units: np.ndarray) -> int | None:
    """First of `units` if they are consecutive."""
    flat = units.ravel()
    return int(flat[0]) if bool((np.diff(flat) == 1).all()) else None
