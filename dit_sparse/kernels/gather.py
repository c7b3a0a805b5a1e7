"""Backend "gather", the CPU default: dense attention of each query block with the keys it keeps, gathered.

For a row of the block mask, out_i = softmax(scale * q_i K^T) V over the kept keys alone, and the block means of a
remainder beside them. Oracle: `reference`.

What makes it fast, measured on two cores:
- rows with equally many keys run in groups of one row a thread, or a few more where rows are short, so that a thread
  finds the keys it copied and the scores it wrote in its own cache;
- keys are copied, used, and overwritten by the values: one buffer is half of what the cache has to hold;
- torch's own threads share out each operator's group. Threads of our own would fight them for the cores, as those wait
  actively for a while after every dense operator;
- below 192 rows `baddbmm`, softmax, `bmm` beat the flash operator, which would cut them into slices of 32 and pack
  every key for each; the row sum is then the largest score less the log of its weight;
- query blocks that keep the same keys are stacked: from 192 rows on, the flash operator runs near its dense rate;
- copies move `[N / unit, unit * D]` slices, where `unit` divides every block bound, and runs of blocks are views;
- what a predicate keeps of partial blocks is remembered with the plan, up to a limit.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.dense import flash_cpu, has_flash_cpu
from dit_sparse.kernels.gather_rows import FLASH_ROWS, Batch, Group, Prepared, prepared
from dit_sparse.kernels.gather_skip import attend_skipping
from dit_sparse.kernels.remainder import HeadRemainder, head_remainder
from dit_sparse.types import REMAINDERS, AttentionPlan

__all__ = ["GatherBackend"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_REMEMBERED_BYTES = 256 << 20
_KEPT_ELEMENTS = 1 << 24  # of a buffer that outlives its call

# A thread's buffers, kept from call to call: fresh pages cost as much as the copy into them.
_kept = threading.local()


class GatherBackend:
    """Block-sparse attention on CPU out of gathers and dense products; nothing to compile."""

    name = "gather"
    remainders = REMAINDERS

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it runs on CPU only; use 'flex' or 'reference' here"

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
            return f"q, k, v must share one of float32, float64, float16, bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "it has no backward; use torch.no_grad() or 'reference'"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.forward_counting(q, k, v, plan, scale=scale, return_lse=return_lse)[:2]

    @torch.no_grad()
    def forward_counting(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        dtype = q.dtype
        if dtype == torch.float16:
            # Half products on CPU are slower than converting once and computing in float32.
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = torch.empty(q.shape[:-1], dtype=_compute_dtype(q.dtype))
        if plan.skip_threshold:
            skipped = attend_skipping(q, k, v, plan, scale, out, lse)
        else:
            skipped = torch.zeros(*q.shape[:2], plan.block_mask.num_q_blocks, dtype=torch.int64)
            rows = prepared(plan, max(k.shape[-1], v.shape[-1]), torch.get_num_threads())
            _Call(q, k, v, out, lse, rows, plan, scale, return_lse).run()
        return out.to(dtype), lse if return_lse else None, skipped


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Source:
    """Keys or values of one head, `[N, D]` and by units, and a buffer `[size, keys, D]` for a group's, the same way."""

    tokens: Tensor
    units: Tensor
    copy: Tensor
    copy_units: Tensor
    unit: int

    def take(self, group: Group) -> Tensor:
        """`[g, keys, D]` tokens of a group: a view where they are one run, else a copy in the buffer."""
        count = group.k_units.numel()
        if group.k_start is not None:
            run = self.tokens[group.k_start * self.unit : (group.k_start + count) * self.unit]
            return run.view(-1, *self.copy.shape[1:])
        if count == len(self.copy_units):
            torch.index_select(self.units, 0, group.k_units, out=self.copy_units)
            return self.copy
        torch.index_select(self.units, 0, group.k_units, out=self.copy_units[:count])
        return self.copy[: count * len(self.copy) // len(self.copy_units)]


@dataclass(frozen=True)
class _Head:
    """Keys and values of one head, block means behind them where there is a remainder."""

    k: Tensor
    v: Tensor
    remainder: HeadRemainder | None


@dataclass(frozen=True)
class _Call:
    """One call: its tensors and its prepared plan."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    prepared: Prepared
    plan: AttentionPlan
    scale: float
    return_lse: bool

    def run(self) -> None:
        plan = self.prepared
        for b in range(self.q.shape[0]):
            batches, empty = plan.batches[b % len(plan.batches)], plan.empty[b % len(plan.empty)]
            for h in range(self.q.shape[1]):
                head = self._head(b, h)
                self._fill_empty(b, h, empty[h % len(empty)])
                for batch in batches[h % len(batches)]:
                    self._compute(b, h, batch, head)

    def _head(self, b: int, h: int) -> _Head:
        k, v = self.k[b, h], self.v[b, h]
        if not self.prepared.means:
            return _Head(k, v, None)
        rest = head_remainder(self.q, self.k, self.v, self.plan, self.scale, b, h, self.lse.dtype)
        spare = self.prepared.means - rest.values.shape[0]
        k, v = (
            torch.cat([x, F.pad(means, (0, 0, 0, spare)).to(x.dtype)], out=self._extended(name, x))
            for name, x, means in (("k and means", k, rest.keys), ("v and means", v, rest.values))
        )
        return _Head(k, v, replace(rest, bias=F.pad(rest.bias, (0, spare), value=float("-inf"))))

    def _extended(self, name: str, x: Tensor) -> Tensor:
        return self._buffer(name, (x.shape[0] + self.prepared.means, x.shape[1]), x.dtype)

    def _fill_empty(self, b: int, h: int, units: Tensor) -> None:
        if units.numel():
            unit = self.prepared.q_unit
            self.out[b, h].view(-1, unit, self.out.shape[-1]).index_fill_(0, units, 0.0)
            self.lse[b, h].view(-1, unit).index_fill_(0, units, float("-inf"))

    def _compute(self, b: int, h: int, batch: Batch, head: _Head) -> None:
        """Write output and, where wanted, row sums of a batch of rows."""
        rows = self._queries(self.q[b, h], batch)
        flash = self._takes_flash(rows) and not batch.partial and head.remainder is None
        out = self._destination(self.out[b, h], batch, rows.dtype if flash else _compute_dtype(rows.dtype))
        lse = self._buffer("lse", rows.shape[:2], self.lse.dtype) if self.return_lse else None
        if flash:
            self._by_flash(head, batch, rows, out, lse)
        else:
            self._by_matmul(b, h, head, batch, rows, out, lse)
        self._put(self.out[b, h], batch, out)
        if lse is not None:
            self._put(self.lse[b, h], batch, lse)

    def _takes_flash(self, rows: Tensor) -> bool:
        if rows.shape[-1] != self.v.shape[-1] or not has_flash_cpu(rows.dtype):
            return False
        return rows.dtype == torch.bfloat16 or rows.shape[1] >= FLASH_ROWS

    def _by_flash(self, head: _Head, batch: Batch, rows: Tensor, out: Tensor, lse: Tensor | None) -> None:
        """Write output `[n, m, D]` and row sums `[n, m]` of the queries `rows`."""
        k, v = self._source("k", head.k, batch), self._source("v", head.v, batch)
        for group in batch.groups:
            q = rows[group.rows, None]
            attended, sums = flash_cpu(q, k.take(group)[:, None], v.take(group)[:, None], self.scale)
            out[group.rows] = attended[:, 0]
            if lse is not None:
                lse[group.rows] = sums[:, 0]

    def _by_matmul(
        self, b: int, h: int, head: _Head, batch: Batch, rows: Tensor, out: Tensor, lse: Tensor | None
    ) -> None:
        """Write output `[n, m, D]` and row sums `[n, m]` of the queries `rows`."""
        k, v = self._source("k", head.k, batch), self._source("k", head.v, batch)
        rows = rows.to(out.dtype)
        buffer = self._buffer("scores", (batch.size, rows.shape[1], batch.keys), out.dtype)
        means, rest = self.prepared.means, head.remainder
        blocks = None if rest is None else self._blocks(rest, batch)
        for group, q, attended in zip(batch.groups, rows.split(batch.size), out.split(batch.size), strict=True):
            scores = buffer[: len(q)]
            keys = k.take(group).to(out.dtype)
            torch.baddbmm(scores, q, keys.transpose(1, 2), beta=0, alpha=self.scale, out=scores)
            if rest is not None and blocks is not None:
                scores[..., :means] += rest.bias[blocks[group.rows]]
            nothing = None
            if batch.partial:
                allowed = self._allowed(b, h, batch, group)
                scores[..., -batch.partial :].masked_fill_(~allowed, float("-inf"))
            if batch.partial + means == batch.keys:
                nothing = scores.amax(-1).isneginf()  # rows without a key
            sums = scores.amax(-1) if lse is not None else None
            torch.softmax(scores, -1, out=scores)
            if sums is not None:
                sums -= scores.amax(-1).log_()
            torch.bmm(scores, v.take(group).to(out.dtype), out=attended)
            if rest is not None and rest.first_order is not None:
                share = scores[..., :means].sum(-1, keepdim=True)
                attended.addcmul_(share, self._queries(rest.first_order, batch)[group.rows])
            if nothing is not None:
                attended.masked_fill_(nothing[..., None], 0.0)
                if sums is not None:
                    sums.masked_fill_(nothing, float("-inf"))
            if lse is not None and sums is not None:
                lse[group.rows] = sums

    def _blocks(self, rest: HeadRemainder, batch: Batch) -> Tensor:
        """`[n, 1]` int64 query block of each row."""
        starts = rest.layout.offsets[0, 0, 1:].long()
        return torch.searchsorted(starts, batch.q_units[:, :1] * self.prepared.q_unit, right=True)

    def _source(self, name: str, x: Tensor, batch: Batch) -> _Source:
        """Tokens of `x` `[N, D]` for a batch's rows, copied group by group into the buffer `name`."""
        unit = self.prepared.k_unit
        copy = self._buffer(name, (batch.size, batch.keys, x.shape[-1]), x.dtype)
        return _Source(x, x.view(-1, unit * x.shape[-1]), copy, copy.view(-1, unit * x.shape[-1]), unit)

    def _queries(self, x: Tensor, batch: Batch) -> Tensor:
        """`[n, m, D]` rows of `x` `[N, D]`: a view where they are one run, else a copy."""
        unit, rows = self.prepared.q_unit, batch.q_units.shape[0]
        if batch.q_start is not None:
            return x[batch.q_start * unit :][: batch.q_units.numel() * unit].view(rows, -1, x.shape[-1])
        return x.view(-1, unit * x.shape[-1]).index_select(0, batch.q_units.view(-1)).view(rows, -1, x.shape[-1])

    def _destination(self, target: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Where to compute a batch's output `[n, m, D]`: its rows of `target` `[N, D]` where those are one run."""
        if batch.q_start is not None and dtype == target.dtype:
            return self._queries(target, batch)
        shape = (batch.q_units.shape[0], batch.q_units.shape[1] * self.prepared.q_unit, target.shape[-1])
        return self._buffer("out", shape, dtype)

    def _put(self, target: Tensor, batch: Batch, x: Tensor) -> None:
        """Write `x` `[n, m, ...]` to the batch's rows of `target` `[N, ...]`, unless it is those rows."""
        unit = self.prepared.q_unit
        if batch.q_start is None:
            units = x.reshape(-1, unit, *target.shape[1:]).to(target.dtype)
            target.view(-1, unit, *target.shape[1:]).index_copy_(0, batch.q_units.view(-1), units)
            return
        rows = target[batch.q_start * unit :][: batch.q_units.numel() * unit]
        if rows.data_ptr() != x.data_ptr():
            rows.copy_(x.reshape(rows.shape))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffers = _kept.__dict__
        size = math.prod(shape)
        kept = buffers.get(name)
        if kept is None or kept.numel() < size or kept.dtype != dtype:
            # A buffer made in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                kept = torch.empty(size, dtype=dtype)
            if size <= _KEPT_ELEMENTS:
                buffers[name] = kept
        return kept[:size].view(shape)

    def _allowed(self, b: int, h: int, batch: Batch, group: Group) -> Tensor:
        """`[g, m, partial]` bool: what the predicate keeps of the partial blocks at the end of each row."""
        predicate = self.plan.block_mask.predicate
        assert predicate is not None
        orders = self.plan.q_order, self.plan.kv_order
        shared = getattr(predicate, "uniform", False) and all(o.index.shape[:2] == (1, 1) for o in orders)
        key = (0, 0) if shared else (b, h)
        if key in group.allowed:
            return group.allowed[key]
        q_index, k_index = (order.index[b % order.index.shape[0], h % order.index.shape[1]] for order in orders)
        q_token = q_index.view(-1, self.prepared.q_unit)[batch.q_units[group.rows]].flatten(1)
        units = group.k_units.view(len(q_token), -1)[:, -(batch.partial // self.prepared.k_unit) :]
        k_token = k_index.view(-1, self.prepared.k_unit)[units].flatten(1)
        allowed = predicate(torch.tensor(b), torch.tensor(h), q_token[:, :, None], k_token[:, None, :])
        allowed = allowed.expand(q_token.shape[0], q_token.shape[1], k_token.shape[1])
        if self.prepared.remembered_bytes + allowed.numel() <= _REMEMBERED_BYTES:
            self.prepared.remembered_bytes += allowed.numel()
            group.allowed[key] = allowed
        return allowed
