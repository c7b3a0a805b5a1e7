"""Compare the GPU kernels with float64 attention on random cases: shapes, blocks, masks, layouts, dtypes.

    python scripts/check_kernels.py --cases 2000 --out check.json
    python scripts/check_kernels.py --cases 2000 --backends triton --remainder mean value mass
    python scripts/check_kernels.py --merge a.json b.json --out check.json    # reports with other seeds as one
    compute-sanitizer --tool memcheck python scripts/check_kernels.py --cases 5 --tokens 300

A case passes if the output's error is at most twice that of torch's own attention in the same dtype on the same inputs,
plus a floor of one unit in the last place, two with a remainder; the row sums likewise. Outputs are filled with NaN
first, so that what is not written shows. With `--remainder` each case has one of those named; one in which the limit of
the spread, 2, is so near that rounding decides about it is counted as undecided. Exit status 1 if any case fails.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from merged_reports import merged_environment
from torch import Tensor

from dit_sparse.bench.plain import exact_terms, plain_attention
from dit_sparse.bench.report import environment, write_report
from dit_sparse.kernels import BACKENDS, refusal
from dit_sparse.kernels.remainder import RemainderTerms
from dit_sparse.types import REMAINDERS, AttentionPlan, BlockMask, Remainder, TokenOrder


@dataclass(frozen=True)
class Case:
    """One random problem; `seed` draws its tensors."""

    seed: int
    batch: int
    heads: int
    tokens: int
    text: int
    dim: int
    dtype: str
    q_block: int
    k_block: int
    uneven: bool
    own_mask: bool
    density: float
    partial: bool
    tokens_first: bool
    scale: float
    remainder: Remainder
    own_remainders: bool


def draw(seed: int, largest: int, remainders: list[Remainder]) -> Case:
    r = random.Random(seed)
    remainder = remainders[seed % len(remainders)]
    # With 4 every block would be left out of a remainder; with 2 it is some of them.
    largest_scale = 4.0 if remainder == "none" else 2.0
    return Case(
        seed=seed,
        batch=r.choice((1, 1, 2)),
        heads=r.choice((1, 2, 3)),
        tokens=r.randint(1, largest),
        text=r.choice((0, 0, 7, 77, 226)),
        dim=r.choice((64, 128, 128, 64, 96, 40, 256, 16)),
        dtype=r.choice(("bfloat16", "bfloat16", "float16", "float32")),
        q_block=r.choice((64, 128, 64, 128, 32, 256, 100)),
        k_block=r.choice((64, 128, 64, 128, 32, 256, 100)),
        uneven=r.random() < 0.15,
        own_mask=r.random() < 0.7,
        density=r.choice((0.0, 0.1, 0.25, 0.5, 0.9, 1.0)),
        partial=r.random() < 0.3,
        tokens_first=r.random() < 0.5,
        scale=r.choice((1.0, 1.0, largest_scale, -1.0)),
        remainder=remainder,
        own_remainders=remainder != "none" and r.random() < 0.25,
    )


def bounds(case: Case, block: int, generator: random.Random) -> list[int]:
    """Block bounds: text in blocks of its own at the start or the end, then even or uneven blocks."""
    total = case.tokens + case.text
    if case.uneven:
        inner = sorted(generator.randint(0, total) for _ in range(generator.randint(0, 9)))
        return [0, *inner, total]
    start = case.text if case.seed % 2 else 0
    text_start = 0 if start else case.tokens
    edges = {0, total, start, start + case.tokens, text_start}
    edges |= set(range(start, start + case.tokens, block)) | set(range(text_start, text_start + case.text, block))
    return sorted(edges)


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor, AttentionPlan]:
    """Inputs in the plan's order, and the plan, on the GPU."""
    r = random.Random(case.seed)
    g = torch.Generator("cuda").manual_seed(case.seed)
    total = case.tokens + case.text
    orders = []
    for block in (case.q_block, case.k_block):
        index = torch.randperm(total, generator=g, device="cuda")
        orders.append(TokenOrder.from_index(index, torch.tensor(bounds(case, block, r), device="cuda")))
    lead = (case.batch, case.heads) if case.own_mask else (1, 1)
    shape = (*lead, orders[0].num_blocks, orders[1].num_blocks)
    kept = torch.rand(shape, generator=g, device="cuda") < case.density
    options = {}
    if case.partial:
        options = {
            "partial": torch.rand(shape, generator=g, device="cuda") < 0.5,
            # Only a mask with a head dimension may have a predicate that tells heads apart.
            "predicate": lambda b, h, i, j: (3 * i + 5 * j + case.own_mask * h) % 7 < 4,
        }
    mask = BlockMask.from_bool(kept, orders[0].offsets, orders[1].offsets, **options)
    size = (case.batch, total, case.heads, case.dim) if case.tokens_first else (case.batch, case.heads, total, case.dim)
    q, k, v = (torch.randn(size, generator=g, device="cuda").to(getattr(torch, case.dtype)) for _ in range(3))
    if case.tokens_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    own = None
    if case.own_remainders:
        levels = REMAINDERS.index(case.remainder) + 1
        own = torch.randint(levels, (case.batch, case.heads), generator=g, device="cuda", dtype=torch.int8)
    return q, k, v, AttentionPlan(*orders, mask, case.remainder, head_remainders=own)


def undecided(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, terms: RemainderTerms) -> bool:
    """Whether other blocks would be left out if the spread were a little larger or smaller, as kernels may see it."""
    # Kernels for 16 bits take the spread to 16 bits.
    step = 1e-6 if q.dtype == torch.float32 else 1e-5
    near = (exact_terms(q, k, v, plan, scale * factor) for factor in (1 - step, 1 + step))
    return any(not torch.equal(other.bias.isneginf(), terms.bias.isneginf()) for other in near if other is not None)


def relative(got: Tensor, want: Tensor) -> float:
    norm = want.norm()
    return float((got.double() - want).norm() / norm) if norm > 0 else float((got.double() - want).norm())


def check(case: Case, backend: str) -> tuple[str, float]:
    """What went wrong, empty if nothing did, and the error of the output."""
    q, k, v, plan = problem(case)
    chosen = BACKENDS[backend]
    if refusal(chosen, q, k, v, plan) is not None:
        return "refused", 0.0
    allowed = plan.block_mask.to_bool(plan.q_order.index, plan.kv_order.index)
    allowed = allowed.expand(case.batch, case.heads, -1, -1)
    scale = case.scale * case.dim**-0.5
    terms = exact_terms(q, k, v, plan, scale)
    if terms is not None and undecided(q, k, v, plan, scale, terms):
        return "undecided", 0.0
    blocks = plan.block_mask.block_of(plan.block_mask.q_offsets)
    want, sums = plain_attention(q.double(), k.double(), v.double(), allowed, scale, terms, blocks)
    low, _ = plain_attention(q, k, v, allowed, scale, terms, blocks)
    # What the caching allocator hands out next is likely this block.
    torch.full_like(q, float("nan"))
    out, lse = chosen.forward(q, k, v, plan, scale=scale, return_lse=True)
    torch.cuda.synchronize()
    assert lse is not None
    # A remainder's terms are exact in `low` and rounded in the kernel.
    floor = torch.finfo(q.dtype).eps * (1 if terms is None else 2)
    error, limit = relative(out, want), 2 * relative(low, want) + floor
    if not error <= limit:
        return f"output: error {error:.1e}, allowed {limit:.1e}", error
    empty = sums.isneginf()
    if not torch.equal(lse.isneginf(), empty):
        return "row sums: -inf in other rows than those that keep nothing", error
    worst = (lse.double() - sums).masked_fill(empty, 0.0).abs().max()
    allowance = 1e-4 if q.dtype == torch.float32 else 2e-2 * max(1.0, abs(case.scale))
    return ("" if worst <= allowance else f"row sums: off by {float(worst):.1e}, allowed {allowance:.1e}"), error


def merge(parts: Sequence[Path]) -> dict[str, Any]:
    """One report of several, with all their cases counted."""
    reports = [json.loads(part.read_text("utf-8")) for part in parts]
    merged: dict[str, dict[str, Any]] = {}
    for name, counts in (item for report in reports for item in report["backends"].items()):
        into = merged.setdefault(name, {"passed": 0, "refused": 0, "undecided": 0, "failed": [], "worst_error": {}})
        for key in ("passed", "refused", "undecided", "failed"):
            into[key] += counts[key]
        for dtype, error in counts["worst_error"].items():
            into["worst_error"][dtype] = max(error, into["worst_error"].get(dtype, 0.0))
    return {"environment": merged_environment(reports, parts, ()), "backends": merged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--seconds", type=float, help="draw no more cases of a backend after so long")
    parser.add_argument("--tokens", type=int, default=1500, help="at most so many video tokens")
    parser.add_argument("--backends", nargs="+", default=["hopper", "triton"])
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--remainder", nargs="+", choices=REMAINDERS, default=["none"], help="of the plans, in turn")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="PART", help="make --out of these; checks nothing")
    options = parser.parse_args()
    if options.merge:
        if options.out is None:
            parser.error("--merge needs --out, a JSON file")
        write_report(merge(options.merge), options.out)
        return
    if not torch.cuda.is_available():
        parser.error("this check needs a CUDA device; the tests run the kernels under Triton's interpreter without one")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_grad_enabled(False)
    report: dict[str, dict] = {}
    for backend in options.backends:
        missing = BACKENDS[backend].unavailable(device)
        if missing is not None:
            parser.error(f"backend {backend!r} is not available here: {missing}")
        started = time.monotonic()
        counts = {"passed": 0, "refused": 0, "undecided": 0, "failed": [], "worst_error": {}}
        for seed in range(options.first, options.first + options.cases):
            if options.seconds is not None and time.monotonic() - started > options.seconds:
                break
            case = draw(seed, options.tokens, options.remainder)
            wrong, error = check(case, backend)
            if wrong in ("refused", "undecided"):
                counts[wrong] += 1
            elif wrong:
                counts["failed"].append({"case": asdict(case), "wrong": wrong})
                print(f"{backend}: case {seed}: {wrong}: {case}", flush=True)
                if len(counts["failed"]) > 20:
                    break
            else:
                counts["passed"] += 1
                counts["worst_error"][case.dtype] = max(error, counts["worst_error"].get(case.dtype, 0.0))
        report[backend] = counts
        numbers = ", ".join(f"{counts[name]} {name}" for name in ("passed", "refused", "undecided"))
        print(f"{backend}: {numbers}, {len(counts['failed'])} failed; ", counts["worst_error"], flush=True)
    if options.out is not None:
        write_report({"environment": environment(device), "backends": report}, options.out)
    sys.exit(any(counts["failed"] for counts in report.values()))


if __name__ == "__main__":
    main()
