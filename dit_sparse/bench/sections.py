"""What is timed: block-sparse kernels, a neighborhood, the pieces of two searches, and what moves tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.bench.dense import Inputs, dense_calls
from dit_sparse.bench.shapes import SHAPES, Shape, inputs, random_plan
from dit_sparse.bench.timing import Call, check, in_turns
from dit_sparse.kernels import BACKENDS, attend_rows, block_mass, dense_attention, norm_rope, permute, refusal, restore
from dit_sparse.kernels.norm_rope import norm_rope_by_torch
from dit_sparse.masks import select_density
from dit_sparse.methods import AdaSpa, LeastError, Neighborhood
from dit_sparse.types import AttentionPlan, Previous, Remainder, Site, TokenGrid, TokenOrder

SEARCH_GRIDS = {"wan-1.3b": TokenGrid(21, 30, 52), "wan-14b": TokenGrid(21, 45, 80)}
_LONG = 50_000


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        section, shape, block, kernel: what was timed; block 0 where there is none.
        density: share of the query-key pairs.
        time_ms: median of its turns.
        ideal_ratio: time over density x the fastest dense kernel of the same turns.
        tflops: of the pairs computed; 0 where that means nothing.
        error: relative, against float64; `None` where the result is no attention.
        remainder: of the plan; empty where there is none to have.
    """

    section: str
    shape: str
    block: int
    kernel: str
    density: float
    time_ms: float
    ideal_ratio: float
    tflops: float = 0.0
    error: float | None = None
    remainder: str = ""


def kernel_rows(
    name: str,
    block: int,
    densities: Sequence[float],
    backends: Sequence[str],
    rounds: int,
    device: torch.device,
    remainders: Sequence[Remainder] = ("none",),
) -> Iterator[Row]:
    """Random masks at several densities and remainders under every backend, and dense attention, all in turns."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    sets = inputs(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    calls: dict[str, Call] = dense_calls(sets)
    dense = list(calls)
    plans: dict[str, AttentionPlan | None] = dict.fromkeys(dense)
    for density in densities:
        drawn = random_plan(shape, block, density, device)
        for backend, remainder in itertools.product(backends, remainders):
            own = drawn.with_remainder(remainder)
            if refusal(BACKENDS[backend], *sets[0], own) is None:
                calls[f"{backend} {density:g} {remainder}"] = _kernel(backend, sets, own)
                plans[f"{backend} {density:g} {remainder}"] = own
    errors = {key: check(_output(calls[key]), *sets[0], plan) for key, plan in plans.items()}
    times = in_turns(calls, rounds, repeat=shape.tokens < _LONG)
    fastest = min(times[key] for key in dense)
    for key, plan in plans.items():
        density = 1.0 if plan is None else float(plan.density.mean())
        ideal = times[key] / (density * fastest)
        rate = density * shape.flops / times[key] / 1e9
        size, own_remainder = (0, "") if plan is None else (block, plan.remainder)
        kernel = key.split()[0]
        yield Row("kernels", name, size, kernel, density, times[key], ideal, rate, errors[key], own_remainder)


def neighborhood_rows(backends: Sequence[str], rounds: int, device: torch.device, scale: int = 1) -> Iterator[Row]:
    """NATTEN's case (arXiv 2504.16922, section 5): 30x48x80 tokens, window 18x24x24, stride 16x8x8, density 0.09.

    Kernel alone, with the permutation of q, k, v and of the output, and with stride 1, where windows cut tiles. `scale`
    divides the grid, for tests.
    """
    grid = TokenGrid(30, 48 // scale, 80 // scale)
    tile = (2, 8 // scale, 8 // scale)
    whole = Neighborhood(window=(18, 24 // scale, 24 // scale), stride=(16, 8 // scale, 8 // scale), tile=tile)
    shape = Shape(24 // scale, 128, grid.num_tokens)
    torch.manual_seed(0)
    sets = inputs(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    plan, cutting = (method.plan(*sets[0], Site(grid), None) for method in (whole, replace(whole, stride=(1, 1, 1))))
    permuted: Inputs = [tuple(plan.q_order.permute(x) for x in s) for s in sets]  # type: ignore[misc]
    calls = dense_calls(sets)
    dense = list(calls)
    plans: dict[str, AttentionPlan] = {}
    for backend in backends:
        for key, of in ((backend, plan), (f"{backend}, stride 1", cutting)):
            calls[key], plans[key] = _kernel(backend, permuted, of), of
        calls[f"{backend}, permuted"] = functools.partial(_whole, backend, sets, plan)
    errors = {key: check(_output(calls[key]), *permuted[0], of) for key, of in plans.items()}
    times = in_turns(calls, rounds, repeat=shape.tokens < _LONG)
    fastest = min(times[key] for key in dense)
    for key, time in times.items():
        share = 1.0 if key in dense else float(plans.get(key, plan).density.mean())
        rate = share * shape.flops / time / 1e9
        ideal = time / (share * fastest)
        yield Row("neighborhood", str(grid), 0 if key in dense else 128, key, share, time, ideal, rate, errors.get(key))


def search_rows(name: str, rounds: int, device: torch.device, density: float = 0.25) -> Iterator[Row]:
    """The pieces of AdaSpa's search; their ratio is to one dense attention."""
    grid, shape = SEARCH_GRIDS[name], SHAPES[name]
    torch.manual_seed(0)
    sets = inputs(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)[:1]
    q, k, v = sets[0]
    method, site = AdaSpa(density=density), Site(grid)
    _, lse = dense_attention(q, k, v, return_lse=True)
    plan = method.plan(q, k, v, site, Previous(None, lse, 0))
    order = plan.q_order
    mass = block_mass(q, k, lse, order.offsets, order.offsets, scale=q.shape[-1] ** -0.5)
    calls = dense_calls(sets)
    dense = list(calls)
    calls["dense with LSE"] = lambda _: dense_attention(q, k, v, return_lse=True)
    calls["block mass, all rows"] = lambda _: block_mass(
        q, k, lse, order.offsets, order.offsets, scale=q.shape[-1] ** -0.5
    )
    calls["selection"] = lambda _: select_density(mass, density, order, order, grid)
    calls["mask from blocks"] = lambda _: AttentionPlan.from_kept(order, plan.block_mask.full_blocks)
    calls["first search"] = lambda _: method.plan(q, k, v, site, None)
    calls["later search"] = lambda _: method.plan(q, k, v, site, Previous(None, lse, 0))
    times = in_turns(calls, rounds, repeat=shape.tokens < _LONG)
    fastest = min(times[key] for key in dense)
    for key, time in times.items():
        yield Row("search", name, 0 if key in dense else method.block, key, 1.0, time, time / fastest)


def least_error_rows(name: str, rounds: int, device: torch.device, density: float = 0.125) -> Iterator[Row]:
    """The pieces of a search of least-error attention; their ratio is to one dense attention."""
    grid, shape = SEARCH_GRIDS[name], SHAPES[name]
    torch.manual_seed(0)
    sets = inputs(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)[:1]
    q, k, v = sets[0]
    method, site = LeastError(density=density), Site(grid, in_order=True)
    orders = method.query_order(grid, device), method.shared_order(grid, device)
    probes = attend_rows(q, k, v, orders[0], method.rows)
    errors = method.errors(q, k, v, orders, probes)
    calls = dense_calls(sets)
    dense = list(calls)
    calls["lea: attention of the rows"] = lambda _: attend_rows(q, k, v, orders[0], method.rows)
    calls["lea: errors"] = lambda _: method.errors(q, k, v, orders, probes)
    calls["lea: choice"] = lambda _: method.choose(errors, density, orders, grid)
    calls["lea: search"] = lambda _: method.plan(q, k, v, site, None)
    times = in_turns(calls, rounds, repeat=shape.tokens < _LONG)
    fastest = min(times[key] for key in dense)
    for key, time in times.items():
        yield Row("search", name, 0 if key in dense else orders[1].geometry.largest, key, 1.0, time, time / fastest)


def movement_rows(name: str, rounds: int, device: torch.device, density: float = 0.25) -> Iterator[Row]:
    """Permutation, and norm with rotary embedding; their ratio is to the sparse attention of the same turns.

    Tensors are `[1, N, H, D]` in memory, as in the pipelines, and all heads share a random order.
    """
    shape = SHAPES[name]
    torch.manual_seed(0)
    sets = inputs(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    sets = [tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in s) for s in sets]  # type: ignore[misc]
    plan = random_plan(shape, 128, density, device)
    order = TokenOrder.from_index(torch.randperm(shape.tokens, device=device), plan.q_order.offsets)
    weight = torch.randn(shape.heads * shape.dim, device=device, dtype=sets[0][0].dtype)
    angles = torch.randn(shape.tokens, shape.dim // 2, device=device).repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    attention = f"attention at {density:g}"
    calls: dict[str, Call] = {
        attention: lambda i: sparse_attention(*sets[i % len(sets)], plan, in_order=True),
        "copy q, k, v": lambda i: [x.clone() for x in sets[i % len(sets)]],
        "permute q, k, v": lambda i: permute(order, *sets[i % len(sets)]),
        "permute q, k, v, torch": lambda i: [order.permute(x) for x in sets[i % len(sets)]],
        "restore the output": lambda i: restore(order, sets[i % len(sets)][0]),
        "norm and rotary of q": lambda i: norm_rope(sets[i % len(sets)][0].transpose(1, 2), weight, 1e-6, cos, sin),
        "norm and rotary of q, torch": lambda i: norm_rope_by_torch(
            sets[i % len(sets)][0].transpose(1, 2), weight, 1e-6, cos, sin
        ),
    }
    _check_movements(sets[0], order, weight, cos, sin)
    times = in_turns(calls, rounds, repeat=shape.tokens < _LONG)
    for key, time in times.items():
        yield Row("movement", name, 128 if key == attention else 0, key, density, time, time / times[attention])


def _check_movements(tensors: Sequence[Tensor], order: TokenOrder, weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    for x, got in zip(tensors, permute(order, *tensors), strict=True):
        if not torch.equal(got, order.permute(x)):
            raise RuntimeError("permute: it is not torch's gather")
        if not torch.equal(restore(order, got)[0], x):
            raise RuntimeError("restore: it does not undo permute")
    x = tensors[0].transpose(1, 2)
    got, want = (norm(x, weight, 1e-6, cos, sin).double() for norm in (norm_rope, norm_rope_by_torch))
    error = float((got - want).norm() / want.norm())
    if not error <= 4e-3:
        raise RuntimeError(f"norm and rotary: off by {error:.1e} from torch's")


def _kernel(backend: str, sets: Inputs, plan: AttentionPlan) -> Call:
    forward = BACKENDS[backend].forward
    scale = sets[0][0].shape[-1] ** -0.5
    return lambda i: forward(*sets[i % len(sets)], plan, scale=scale, return_lse=False)


def _whole(backend: str, sets: Inputs, plan: AttentionPlan, number: int) -> Tensor:
    return sparse_attention(*sets[number % len(sets)], plan, backend=backend)


def _output(call: Call) -> Tensor:
    out = call(0)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[return-value]
