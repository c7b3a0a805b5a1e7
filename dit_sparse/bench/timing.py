"""Times in turns, and the check that comes before them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.bench.plain import exact_terms, plain_attention
from dit_sparse.kernels.remainder import RemainderTerms
from dit_sparse.types import AttentionPlan, BlockMask

Call = Callable[[int], object]

_CHECKED_ROWS = 32


def in_turns(calls: dict[str, Call], rounds: int, *, repeat: bool = True) -> dict[str, float]:
    """Median milliseconds of every call, all of them taking turns so that clocks and temperature are shared.

    A kernel's clock also follows the power that the one before it drew, so every round has an order of its own, by
    `_orders`. Nothing waits for the device inside a round.

    Args:
        calls: by name; each gets the number of its call, to rotate its inputs by.
        rounds: how many times each is timed.
        repeat: make every call twice in a row and time the second, which short kernels need.
    """
    names = list(calls)
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for name in names:
        calls[name](0)
    random.shuffle(names)
    for turn, order in enumerate(_orders(names, rounds)):
        for name in order:
            if repeat:
                calls[name](turn)
            times[name].append(_timed(calls[name], turn + 1))
        _wait()
    return {name: statistics.median(read() for read in reads) for name, reads in times.items()}


def _orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """A Williams design: in so many rounds as there are names each stands once at every place, and after every other.

    With an odd number of names it takes twice as many rounds until each has stood after every other equally often.
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]
    for turn in range(rounds):
        order = [names[(number + turn) % count] for number in zigzag]
        yield order[::-1] if count % 2 and turn // count % 2 else order


def _timed(call: Call, number: int) -> Callable[[], float]:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call(number)
        elapsed = 1e3 * (time.perf_counter() - start)
        return lambda: elapsed
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    call(number)
    events[1].record()
    return lambda: events[0].elapsed_time(events[1])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None) -> float:
    """Relative error of sampled rows of every head against float64.

    Args:
        out, q, k, v: `[1, H, N, D]` in the plan's order.
        plan: `None` for dense attention.

    Raises:
        RuntimeError: it is not a number, or above twice the error of torch's own attention in the inputs' dtype on the
            same rows, plus an eighth of a unit in the last place.
    """
    rows = torch.randint(0, q.shape[2], (_CHECKED_ROWS,), device=q.device)
    rows[0] = q.shape[2] - 1
    scale = q.shape[-1] ** -0.5
    worst = 0.0
    for head in range(q.shape[1]):
        part = slice(head, head + 1)
        keep = None if plan is None else _kept_keys(plan, head, rows)[None, None]
        queries, keys, values = q[:, part, rows], k[:, part], v[:, part]
        if plan is None or plan.remainder == "none":
            low = F.scaled_dot_product_attention(queries, keys, values, attn_mask=keep, scale=scale)
            terms = blocks = None
        else:
            terms = _terms(plan, head, q[:, part], keys, values, scale)
            blocks = BlockMask.block_of(plan.block_mask.q_offsets)[..., rows]
            low = plain_attention(queries, keys, values, keep, scale, terms, blocks)[0]
        exact = queries.double(), keys.double(), values.double()
        want = plain_attention(*exact, keep, scale, terms, blocks)[0]
        error, allowed = _relative(out[:, part, rows], want), 2 * _relative(low, want)
        allowed += torch.finfo(q.dtype).eps / 8
        if not error <= allowed:
            raise RuntimeError(f"head {head}: relative error {error:.1e} against float64, allowed is {allowed:.1e}")
        worst = max(worst, error)
    return worst


def _terms(plan: AttentionPlan, head: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> RemainderTerms | None:
    """The terms of one head, `[1, 1, ...]`, of a plan whose orders all heads share."""
    kept = plan.block_mask.kept_blocks
    mask = BlockMask.from_bool(kept[:, head % kept.shape[1]][:, None], plan.q_order.offsets, plan.kv_order.offsets)
    return exact_terms(q, k, v, replace(plan, block_mask=mask), scale)


def _kept_keys(plan: AttentionPlan, head: int, rows: Tensor) -> Tensor:
    """`[rows, N]` bool: keys that rows of one head keep, at positions of the plan's orders."""
    mask = plan.block_mask
    of_rows, of_keys = mask.block_of(mask.q_offsets)[0, 0][rows], mask.block_of(mask.k_offsets)[0, 0]
    kept = _of_head(mask.full_blocks, head)[of_rows][:, of_keys]
    if mask.partial_blocks is None or mask.predicate is None:
        return kept
    i, j = _of_head(plan.q_order.index, head)[rows], _of_head(plan.kv_order.index, head)
    seen = mask.predicate(rows.new_zeros(()), rows.new_full((), head), i[:, None], j[None])
    return kept | (_of_head(mask.partial_blocks, head)[of_rows][:, of_keys] & seen)


def _of_head(table: Tensor, head: int) -> Tensor:
    return table[0, head % table.shape[1]]


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())
