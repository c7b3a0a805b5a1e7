"""Backend "gather", the CPU default: dense attention of each query block with the keys it keeps, gathered.

For a row of the block mask, out_i = softmax(scale * q_i K^T) V over the kept keys alone, and the block means of a
remainder beside them. Oracle: `reference`.

What makes it fast, measured on two cores:
- rows with equally many keys, or any with a remainder, run in groups of one row a thread, or a few more where rows are
  short, so that a thread finds the keys it copied and the scores it wrote in its own cache;
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
        if plan.remainder == "none":  # else they are copied with the means
            k, v = k.contiguous(), v.contiguous()
        # Strides as of `q`, so that a model's `[B, N, H, D]` comes back as one and need not be copied.
        out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = torch.empty(q.shape[:-1], dtype=_compute_dtype(q.dtype))
        if plan.skip_threshold:
            skipped = attend_skipping(q, k, v, plan, scale, out, lse)
        else:
            skipped = torch.zeros(*q.shape[:2], plan.block_mask.num_q_blocks, dtype=torch.int64)
            rows = prepared(plan, max(k.shape[-1], v.shape[-1]), torch.get_num_threads())
            _Call(q, k, v, out, lse, rows, plan, scale, return_lse).run()
        return out.to(dtype), lse if return_lse else None, skipped


def _bias(rest: HeadRemainder, batch: Batch) -> Tensor:
    """`[n, 1, means + f]` added to the scores of each row's means, and -inf to those of what fills it up."""
    own = rest.bias.index_select(0, batch.blocks)
    hidden = own.new_zeros(batch.filling.shape).masked_fill_(batch.filling, float("-inf"))
    return torch.cat([own, hidden], 1)[:, None]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Source:
    """Keys or values of one head `[N, D]`, also by units, and a buffer with room for those of any group of a batch."""

    tokens: Tensor
    units: Tensor
    room: Tensor

    def take(self, group: Group) -> Tensor:
        """`[g, keys, D]` tokens of a group: a view where they are one run, else a copy in the buffer."""
        count, dim = group.k_units.numel(), self.tokens.shape[-1]
        if group.k_start is not None:
            unit = self.units.shape[-1] // dim
            run = self.tokens[group.k_start * unit : (group.k_start + count) * unit]
            return run.view(-1, group.keys, dim)
        copy = self.room[:count]
        torch.index_select(self.units, 0, group.k_units, out=copy)
        return copy.view(-1, group.keys, dim)


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
        tokens = k.shape[0]
        k, v = self._extended("k and means", k), self._extended("v and means", v)
        own = (self.q[b : b + 1, h : h + 1], k[None, None, :tokens], v[None, None, :tokens])
        rest = head_remainder(*own, self.plan, self.scale, b, h, self.lse.dtype)
        blocks = rest.keys.shape[0]
        for x, means in ((k, rest.keys), (v, rest.values)):
            x[tokens : tokens + blocks] = means
            x[tokens + blocks :] = 0.0
        bias = F.pad(rest.bias, (0, self.prepared.means - blocks), value=float("-inf"))
        return _Head(k, v, replace(rest, bias=bias))

    def _extended(self, name: str, x: Tensor) -> Tensor:
        """`x` `[N, D]` with room for means behind it."""
        tokens = x.shape[0]
        extended = self._buffer(name, (tokens + self.prepared.means, x.shape[1]), x.dtype)
        extended[:tokens] = x
        return extended

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
        sizes = [group.rows.stop - group.rows.start for group in batch.groups]
        most = max(size * group.keys for size, group in zip(sizes, batch.groups, strict=True))
        room = self._buffer("scores", (rows.shape[1] * most,), out.dtype)
        means, rest = self.prepared.means, head.remainder
        bias = None if rest is None else _bias(rest, batch)
        slopes = None if rest is None or rest.slopes is None else rest.slopes.index_select(0, batch.blocks)
        for group, q, attended in zip(batch.groups, rows.split(sizes), out.split(sizes), strict=True):
            keys = k.take(group).to(out.dtype)
            scores = room[: q.shape[0] * q.shape[1] * group.keys].view(*q.shape[:2], group.keys)
            torch.baddbmm(scores, q, keys.transpose(1, 2), beta=0, alpha=self.scale, out=scores)
            if bias is not None:
                scores[..., : group.biased].add_(bias[group.rows, :, : group.biased])
            if batch.partial:
                allowed = self._allowed(b, h, batch, group)
                scores[..., -batch.partial :].masked_fill_(~allowed, float("-inf"))
            nothing = scores.amax(-1).isneginf() if group.may_be_empty else None
            sums = scores.amax(-1) if lse is not None else None
            torch.softmax(scores, -1, out=scores)
            if sums is not None:
                sums -= scores.amax(-1).log_()
            torch.bmm(scores, v.take(group).to(out.dtype), out=attended)
            if slopes is not None:
                share = scores[..., :means].sum(-1, keepdim=True)
                attended.baddbmm_(q * share, slopes[group.rows])
            if nothing is not None:
                attended.masked_fill_(nothing[..., None], 0.0)
                if sums is not None:
                    sums.masked_fill_(nothing, float("-inf"))
            if lse is not None and sums is not None:
                lse[group.rows] = sums

    def _source(self, name: str, x: Tensor, batch: Batch) -> _Source:
        """Tokens of `x` `[N, D]` for a batch's rows, copied group by group into the buffer `name`."""
        width = self.prepared.k_unit * x.shape[-1]
        most = max(group.k_units.numel() for group in batch.groups)
        return _Source(x, x.view(-1, width), self._buffer(name, (most, width), x.dtype))

    def _queries(self, x: Tensor, batch: Batch) -> Tensor:
        """`[n, m, D]` rows of `x` `[N, D]`: a view where they are one run, else a copy."""
        unit, rows = self.prepared.q_unit, batch.q_units.shape[0]
        if batch.q_start is not None:
            return x[batch.q_start * unit :][: batch.q_units.numel() * unit].view(rows, -1, x.shape[-1])
        return x.unflatten(0, (-1, unit)).index_select(0, batch.q_units.view(-1)).view(rows, -1, x.shape[-1])

    def _destination(self, target: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Where to compute a batch's output `[n, m, D]`: its rows of `target` `[N, D]` where those are one run."""
        if batch.q_start is not None and dtype == target.dtype and target.is_contiguous():
            return self._queries(target, batch)
        shape = (batch.q_units.shape[0], batch.q_units.shape[1] * self.prepared.q_unit, target.shape[-1])
        return self._buffer("out", shape, dtype)

    def _put(self, target: Tensor, batch: Batch, x: Tensor) -> None:
        """Write `x` `[n, m, ...]` to the batch's rows of `target` `[N, ...]`, unless it is those rows."""
        unit = self.prepared.q_unit
        if batch.q_start is None:
            units = x.reshape(-1, unit, *target.shape[1:]).to(target.dtype)
            places = target.view(-1, unit, *target.shape[1:])
            if batch.q_inverse is None:
                places.index_copy_(0, batch.q_units.view(-1), units)
            else:
                torch.index_select(units, 0, batch.q_inverse, out=places)
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
