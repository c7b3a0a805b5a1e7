"""Backend "gather", the CPU default: dense attention of each query block with the keys it keeps, gathered.

For a row of the block mask, out_i = softmax(scale * q_i K^T) V over the kept keys alone. Oracle: `reference`.

What makes it fast, measured on two cores:
- query blocks that keep the same keys are stacked: from 192 rows on, torch's flash operator runs at its dense rate;
- rows with equally many keys are the batch of one call; a batch copies about 3 MB of keys and values: less leaves more
  calls, more drops out of the caches before it is used;
- batches are shared out to threads in which torch runs on one core, so that no operator waits for another core;
- 96 to 191 rows go through `bmm`, softmax, `bmm` instead, 5 to 8% faster there: the flash operator would cut them into
  slices of 32 and pack every key for each; the row sum is then the largest score less the log of its probability;
- copies move `[N / unit, unit * D]` slices, where `unit` divides every block bound, and runs of blocks are views;
- what a predicate keeps of partial blocks is remembered with the plan, up to a limit.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dit_sparse.kernels.dense import flash_cpu, has_flash_cpu
from dit_sparse.types import AttentionPlan

__all__ = ["GatherBackend"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_COPY_BYTES = 3 << 20
# Stacked rows are cut here: the flash operator takes slices of 256 from 768 rows on.
_STACKED_ROWS = 1024
_REMEMBERED_BYTES = 256 << 20
# Query rows at which matmul wins: more than the flash operator's slices of 32, fewer than it needs for those of 64.
_MATMUL_ROWS = range(96, 192)


@dataclass(frozen=True)
class _Batch:
    """Rows of one head with equally many queries and keys.

    Args:
        q_units: `[R, mq]` int64 query units of each row.
        k_units: `[R, mk]` int64 key units of each row, those of partial blocks last.
        partial: tokens at the end of each row that the predicate refines.
        q_start, k_start: first unit where the units are one run, so that a view does; else `None`.
    """

    q_units: Tensor
    k_units: Tensor
    partial: int
    q_start: int | None
    k_start: int | None
    allowed: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass
class _Prepared:
    """A plan cut into batches: `batches[b][h]`, and the tokens in a unit of queries and of keys."""

    batches: list[list[list[_Batch]]]
    empty: list[list[Tensor]]
    q_unit: int
    k_unit: int
    remembered_bytes: int = 0


_prepared: weakref.WeakKeyDictionary[AttentionPlan, dict[int, _Prepared]] = weakref.WeakKeyDictionary()


_kept = threading.local()


class GatherBackend:
    """Block-sparse attention on CPU out of gathers and dense products; nothing to compile."""

    name = "gather"

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it runs on CPU only; use 'flex' or 'reference' here"

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
            return f"q, k, v must share one of float32, float64, float16, bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "it has no backward; use torch.no_grad() or 'reference'"
        return None

    @torch.no_grad()
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        dtype = q.dtype
        if dtype == torch.float16:
            # Half products on CPU are slower than converting once and computing in float32.
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        key_bytes = (k.shape[-1] + v.shape[-1]) * k.element_size()
        known = _prepared.setdefault(plan, {})
        if key_bytes not in known:
            known[key_bytes] = _prepare(plan, key_bytes)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = torch.empty(q.shape[:-1], dtype=_compute_dtype(q.dtype))
        _share_out(_Call(q, k, v, out, lse, known[key_bytes], plan, scale, return_lse))
        return out.to(dtype), lse if return_lse else None


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Call:
    """One call: its tensors and its prepared plan."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    prepared: _Prepared
    plan: AttentionPlan
    scale: float
    return_lse: bool

    def tasks(self) -> Iterator[tuple[int, int, _Batch]]:
        """Every batch of every head; rows that keep nothing are filled on the way."""
        plan = self.prepared
        for b in range(self.q.shape[0]):
            batches, empty = plan.batches[b % len(plan.batches)], plan.empty[b % len(plan.empty)]
            for h in range(self.q.shape[1]):
                self._fill_empty(b, h, empty[h % len(empty)])
                yield from ((b, h, batch) for batch in batches[h % len(batches)])

    def _fill_empty(self, b: int, h: int, units: Tensor) -> None:
        if units.numel():
            unit = self.prepared.q_unit
            self.out[b, h].view(-1, unit, self.out.shape[-1]).index_fill_(0, units, 0.0)
            self.lse[b, h].view(-1, unit).index_fill_(0, units, float("-inf"))


def _share_out(call: _Call) -> None:
    """Compute every task of `call`, on as many threads as torch has."""
    tasks = list(call.tasks())
    threads = min(torch.get_num_threads(), len(tasks))
    queue = iter(tasks)
    if threads < 2:
        _Worker(call).run(queue)
        return
    pool = _pool(torch.get_num_threads(), os.getpid())
    for done in [pool.submit(_Worker(call).run, queue) for _ in range(threads)]:
        done.result()


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads in which torch runs on one core; a forked `process` needs its own."""
    started = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, "dit_sparse-gather", torch.set_num_threads, (1,))
    list(pool.map(lambda _: started.wait(), range(threads)))
    # The workers' setting is their own, but also the default of threads that start later: put that back.
    torch.set_num_threads(threads)
    return pool


class _Worker:
    """One thread's share of a call, with buffers that the thread's batches reuse."""

    def __init__(self, call: _Call) -> None:
        self.call, self.prepared, self.plan = call, call.prepared, call.plan
        self.scale, self.return_lse = call.scale, call.return_lse
        self.flash = call.q.shape[-1] == call.v.shape[-1] and has_flash_cpu(call.q.dtype)
        self.buffers: dict[str, Tensor] = {}

    # Gradient mode is a thread's own.
    @torch.no_grad()
    def run(self, queue: Iterator[tuple[int, int, _Batch]]) -> None:
        """Take tasks from `queue`, a list's iterator, which hands each out once, until it is empty."""
        # Memory kept from call to call is mapped already; fresh pages cost as much as the copy into them.
        self.buffers = _kept.__dict__
        for b, h, batch in queue:
            out, lse = self._compute(b, h, batch)
            self._put(self.call.out[b, h], batch, out)
            if self.return_lse and lse is not None:
                self._put(self.call.lse[b, h], batch, lse)

    def _compute(self, b: int, h: int, batch: _Batch) -> tuple[Tensor, Tensor | None]:
        """Output `[R, m, D]` and, where wanted, row sums `[R, m]` of a batch of rows."""
        rows = self._take("q", self.call.q[b, h], batch.q_units, self.prepared.q_unit, batch.q_start)
        keys = self._take("k", self.call.k[b, h], batch.k_units, self.prepared.k_unit, batch.k_start)
        values = self._take("v", self.call.v[b, h], batch.k_units, self.prepared.k_unit, batch.k_start)
        if not batch.partial and self._takes_flash(rows):
            out, lse = flash_cpu(rows[:, None], keys[:, None], values[:, None], self.scale)
            return out[:, 0], lse[:, 0]
        keep = self._allowed(batch, b, h) if batch.partial else None
        return self._attend(rows, keys, values, keep, batch.partial)

    def _takes_flash(self, rows: Tensor) -> bool:
        return self.flash and (rows.dtype == torch.bfloat16 or rows.shape[1] not in _MATMUL_ROWS)

    def _take(self, name: str, x: Tensor, units: Tensor, unit: int, start: int | None) -> Tensor:
        """`[R, m * unit, D]` tokens of `x` `[N, D]`: a view where they are one run, else a copy in a buffer."""
        shape = (units.shape[0], units.shape[1] * unit, x.shape[-1])
        if start is not None:
            return x[start * unit : start * unit + shape[0] * shape[1]].view(shape)
        copy = self._buffer(name, shape, x.dtype)
        source = x.view(-1, unit * x.shape[-1])
        torch.index_select(source, 0, units.view(-1), out=copy.view(-1, source.shape[-1]))
        return copy

    def _put(self, target: Tensor, batch: _Batch, x: Tensor) -> None:
        """Write `x` `[R, m * unit, ...]` to the batch's rows of `target` `[N, ...]`."""
        x = x.reshape(-1, *x.shape[2:]).to(target.dtype)
        unit = self.prepared.q_unit
        if batch.q_start is not None:
            target[batch.q_start * unit : batch.q_start * unit + x.shape[0]] = x
        else:
            target.view(-1, unit, *x.shape[1:]).index_copy_(0, batch.q_units.view(-1), x.view(-1, unit, *x.shape[1:]))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        kept = self.buffers.get(name)
        if kept is None or kept.numel() < size or kept.dtype != dtype:
            kept = self.buffers[name] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)

    def _allowed(self, batch: _Batch, b: int, h: int) -> Tensor:
        """`[R, m, partial]` bool: what the predicate keeps of the partial blocks at the end of each row."""
        predicate = self.plan.block_mask.predicate
        assert predicate is not None
        orders = self.plan.q_order, self.plan.kv_order
        shared = getattr(predicate, "uniform", False) and all(o.index.shape[:2] == (1, 1) for o in orders)
        key = (0, 0) if shared else (b, h)
        if key in batch.allowed:
            return batch.allowed[key]
        q_index, k_index = (_at(order.index, b, h) for order in orders)
        q_token = q_index.view(-1, self.prepared.q_unit)[batch.q_units].flatten(1)
        k_token = k_index.view(-1, self.prepared.k_unit)[batch.k_units].flatten(1)[:, -batch.partial :]
        allowed = predicate(torch.tensor(b), torch.tensor(h), q_token[:, :, None], k_token[:, None, :])
        allowed = allowed.expand(q_token.shape[0], q_token.shape[1], k_token.shape[1])
        if self.prepared.remembered_bytes + allowed.numel() <= _REMEMBERED_BYTES:
            self.prepared.remembered_bytes += allowed.numel()
            batch.allowed[key] = allowed
        return allowed

    def _attend(
        self, rows: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None, width: int
    ) -> tuple[Tensor, Tensor | None]:
        """Output `[R, m, D]` and, where wanted, row sums `[R, m]` by matmul; `keep` masks the last `width` keys."""
        compute = _compute_dtype(rows.dtype)
        scores = self._buffer("scores", (*rows.shape[:2], keys.shape[1]), compute)
        torch.bmm(rows.to(compute) * self.scale, keys.to(compute).transpose(1, 2), out=scores)
        if keep is not None:
            scores[..., -width:].masked_fill_(~keep, float("-inf"))
        lse = scores.amax(-1) if self.return_lse or keep is not None else None
        torch.softmax(scores, -1, out=scores)
        if lse is not None:
            lse -= scores.amax(-1).log_()
        out = self._buffer("out", (*rows.shape[:2], values.shape[-1]), compute)
        torch.bmm(scores, values.to(compute), out=out)
        if keep is not None and lse is not None:
            nothing = lse.isnan()
            out.masked_fill_(nothing[..., None], 0.0)
            lse.masked_fill_(nothing, float("-inf"))
        return out, lse


def _prepare(plan: AttentionPlan, key_bytes: int) -> _Prepared:
    """Cut `plan` into batches, for keys and values of `key_bytes` a token; done once, as plans last many steps."""
    mask = plan.block_mask
    lists = [mask.kv_counts, mask.kv_indices, mask.q_offsets, mask.k_offsets]
    if mask.partial_counts is not None and mask.partial_indices is not None:
        lists += [mask.partial_counts, mask.partial_indices]
    q_unit, k_unit = _unit(mask.q_offsets), _unit(mask.k_offsets)
    prepared = _Prepared([], [], q_unit, k_unit)
    for b in range(max(x.shape[0] for x in lists)):
        heads = []
        for h in range(max(x.shape[1] for x in lists)):
            counts, indices, q_offsets, k_offsets, *partial = (_at(x, b, h).numpy() for x in lists)
            whole = [row[:count] for row, count in zip(indices, counts, strict=True)]
            parts = [row[:count] for row, count in zip(partial[1], partial[0], strict=True)] if partial else []
            heads.append(_Rows(q_offsets // q_unit, k_offsets // k_unit, q_unit, k_unit, key_bytes).cut(whole, parts))
        prepared.batches.append([batches for batches, _ in heads])
        prepared.empty.append([empty for _, empty in heads])
    return prepared


def _unit(offsets: Tensor) -> int:
    """Most tokens that divide every block bound."""
    return max(1, int(np.gcd.reduce(offsets.numpy().ravel())))


@dataclass(frozen=True)
class _Rows:
    """Block bounds of one head in units, and how its rows become batches."""

    q_bounds: np.ndarray
    k_bounds: np.ndarray
    q_unit: int
    k_unit: int
    key_bytes: int

    def cut(self, whole: list[np.ndarray], parts: list[np.ndarray]) -> tuple[list[_Batch], Tensor]:
        """Batches of the rows that keep the key blocks `whole` and `parts`, and the query units that keep nothing."""
        classes: dict[tuple[int, int, int], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        empty = [np.empty(0, np.int64)]
        for q_units, keys, partial in self._stacked(whole, parts):
            k_units = _units(self.k_bounds, keys)
            refined = _units(self.k_bounds, partial)
            if k_units.size + refined.size == 0:
                empty.append(q_units)
            elif q_units.size:
                row = (q_units, np.concatenate([k_units, refined]))
                classes[q_units.size, k_units.size, refined.size].append(row)
        batches = [
            self._batch(rows[i : i + size], partial * self.k_unit)
            for (_, mk, partial), rows in classes.items()
            for size in [self._batch_size(mk + partial)]
            for i in range(0, len(rows), size)
        ]
        return batches, torch.from_numpy(np.concatenate(empty))

    def _stacked(
        self, whole: list[np.ndarray], parts: list[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(query units, whole key blocks, partial key blocks), the query blocks that keep the same keys as one row."""
        nothing = np.empty(0, np.int32)
        same: dict[bytes, list[int]] = defaultdict(list)
        for i, keys in enumerate(whole):
            if parts and parts[i].size:
                yield _units(self.q_bounds, np.array([i])), keys, parts[i]
            else:
                same[keys.tobytes()].append(i)
        most = max(1, _STACKED_ROWS // self.q_unit)
        for blocks in same.values():
            units = _units(self.q_bounds, np.array(blocks))
            for start in range(0, units.size, most):
                yield units[start : start + most], whole[blocks[0]], nothing

    def _batch_size(self, mk: int) -> int:
        return max(1, _COPY_BYTES // (mk * self.k_unit * self.key_bytes))

    def _batch(self, rows: list[tuple[np.ndarray, np.ndarray]], partial: int) -> _Batch:
        q_units, k_units = (np.stack(units) for units in zip(*rows, strict=True))
        return _Batch(
            torch.from_numpy(q_units), torch.from_numpy(k_units), partial, _run_start(q_units), _run_start(k_units)
        )


def _units(bounds: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Units of `blocks` in turn, int64."""
    starts, sizes = bounds[blocks].astype(np.int64), (bounds[blocks + 1] - bounds[blocks]).astype(np.int64)
    before = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) + np.repeat(starts - before, sizes)


def _run_start(units: np.ndarray) -> int | None:
    """First of `units` if they are consecutive."""
    flat = units.ravel()
    return int(flat[0]) if bool((np.diff(flat) == 1).all()) else None


def _at(x: Tensor, b: int, h: int) -> Tensor:
    return x[b % x.shape[0], h % x.shape[1]]
