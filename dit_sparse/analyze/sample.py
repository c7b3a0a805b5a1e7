"""Samples the attention of a dense run, and measures what the plans of methods would keep of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.block_mask import BlockMask
from dit_sparse.masks import probe_rows
from dit_sparse.methods import all_methods, parse_method
from dit_sparse.methods.parameters import accepts_density, with_density, without_density
from dit_sparse.pipelines.judge import predicted_time, work_of
from dit_sparse.schedule import Schedule
from dit_sparse.types import AttentionPlan, Method, PackedPlan, Previous, Site

BOUND = "oracle"
"""The method that is measured as an upper bound and never recommended."""

_LEFT_OUT = ("dense", "paro", "seer")
"""Left out unless they are named: one keeps everything, one plans for longer than it attends, one needs a file."""


@dataclass(frozen=True)
class Candidate:
    """A method at a density, or as it is where `density` is `None`; `name` is how it was named."""

    name: str
    method: Method
    density: float | None

    @property
    def label(self) -> str:
        return self.name if self.density is None else f"{self.name} {self.density:g}"


def candidates(names: Sequence[str] | None, densities: Sequence[float]) -> list[Candidate]:
    """Every method at every density, and by its own threshold where it has one.

    Args:
        names: of the methods, perhaps with parameters, as `parse_method` reads them; `None` takes all but `paro`, which
            plans for longer than it attends, and `seer`, which needs a file.
        densities: in (0, 1].

    Raises:
        ValueError: an unknown method or parameter, no method, or a density out of range.
    """
    chosen = [name for name in all_methods() if name not in _LEFT_OUT] if names is None else list(names)
    found = []
    for name in chosen:
        method = parse_method(name)
        if not accepts_density(method):
            found.append(Candidate(name, method, None))
            continue
        found += [Candidate(name, with_density(method, density), density) for density in densities]
        free = without_density(method)
        if free is not None:
            found.append(Candidate(name, free, None))
    if not found:
        raise ValueError("methods and densities must leave something to compare, got none of them")
    return found


@dataclass(frozen=True)
class Measured:
    """One candidate at one sampled call.

    Args:
        label: of the candidate.
        model, layer, step: where.
        kept: density of the plan, a mean over the sampled heads.
        recall: share of the attention mass that the plan keeps, of each sampled head.
        error: norm of the difference to dense attention's output over that output's norm, likewise; with the plan's
            remainder and skipping.
        reused: recall of the plan that was made at the sampled step before, over that of this step's; `None` at the
            first.
        time: predicted, over dense attention's, planning counted; `None` where nobody has measured the kernel.
    """

    label: str
    model: str
    layer: int
    step: int
    kept: float
    recall: tuple[float, ...]
    error: tuple[float, ...]
    reused: float | None
    time: float | None


class Analysis:
    """An observer, for `observe_values`, that measures candidates at sampled calls.

    Only the conditional guidance branch is looked at. Methods plan for the sampled heads alone: one that compares heads
    with one another compares these.

    Args:
        candidates: what is compared.
        shares: of the run, in [0, 1): the steps that are sampled.
        layers, heads, rows: how many are sampled, evenly spread; `rows` are queries.

    Attributes:
        rows: what was measured.
        skipped: candidates that do not fit the model, with the reason.
        sampled: heads and layers that were looked at.

    Raises:
        ValueError: a share outside [0, 1), or a count below 1.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        shares: Sequence[float] = (0.2, 0.5, 0.8),
        *,
        layers: int = 4,
        heads: int = 8,
        rows: int = 64,
    ) -> None:
        if not shares or not all(0 <= share < 1 for share in shares):
            raise ValueError(f"shares of the run (--at) must be at least 0 and below 1, got {tuple(shares)}")
        for name, count in (("layers", layers), ("heads", heads), ("rows", rows)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.candidates = list(candidates)
        self.shares = tuple(sorted(shares))
        self.counts = {"layers": layers, "heads": heads, "rows": rows}
        self.rows: list[Measured] = []
        self.skipped: dict[str, str] = {}
        self.sampled: dict[str, list[int]] = {}
        self._before: dict[tuple[str, str, int], AttentionPlan | PackedPlan] = {}

    def forget_plans(self) -> None:
        """Before each run: plans of another prompt say nothing of how long a plan lasts."""
        self._before.clear()

    def steps(self, num_steps: int) -> list[int]:
        """The sampled steps of a run of `num_steps`."""
        return sorted({int(share * num_steps) for share in self.shares})

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        layers = _spread(site.num_layers, self.counts["layers"])
        if site.branch == "uncond" or site.layer not in layers or site.step not in self.steps(site.num_steps):
            return
        heads = _spread(q.shape[1], self.counts["heads"])
        self.sampled = {"layers": layers, "heads": heads, "steps": self.steps(site.num_steps)}
        tokens = probe_rows(site.grid, self.counts["rows"], q.device)
        probe = Probe(q[:, heads], k[:, heads], v[:, heads], lse[:, heads], tokens)
        for candidate in self.candidates:
            if candidate.label not in self.skipped:
                try:
                    self._measure(candidate, site, probe, q)
                except ValueError as error:
                    self.skipped[candidate.label] = str(error)
                    self.rows = [row for row in self.rows if row.label != candidate.label]

    def _measure(self, candidate: Candidate, site: Site, probe: Probe, q: Tensor) -> None:
        own, key = replace(site, in_order=False), (candidate.label, site.model, site.layer)
        candidate.method.check(site.grid)
        plan = candidate.method.plan(probe.q, probe.k, probe.v, own, Previous(lse=probe.lse, step=site.step))
        recall, error = probe.measure(plan)
        before = self._before.get(key)
        reused = None if before is None else probe.recall(before.unpack()).mean() / recall.mean()
        self._before[key] = plan.pack()
        self.rows.append(
            Measured(
                candidate.label,
                site.model,
                site.layer,
                site.step,
                kept=float(plan.density.mean()),
                recall=tuple(recall.mean(0).tolist()),
                error=tuple(error.mean(0).tolist()),
                reused=None if reused is None else float(reused),
                time=predicted_time(Schedule(candidate.method), own, q, **work_of(plan, own)),
            )
        )


class Probe:
    """A few query rows of one attention call, with their exact attention.

    Args:
        q, k, v: `[B, H, N, D]`.
        lse: `[B, H, N]` natural-log row sums.
        tokens: `[R]` int64 numbers of the query rows.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, tokens: Tensor) -> None:
        self.q, self.k, self.v, self.lse, self.tokens = q, k, v, lse, tokens
        scores = q[:, :, tokens].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        self._weights = (scores - lse[:, :, tokens, None]).exp()
        self._out = self._weights @ v.float()

    def recall(self, plan: AttentionPlan) -> Tensor:
        """`[B, H]` share of the attention mass of the query rows that `plan`'s mask keeps."""
        return self._kept(plan).sum(-1).mean(-1)

    def measure(self, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Recall, and relative error of the query rows under `plan`, its remainder and skipping too, each `[B, H]`."""
        kept = self._kept(plan)
        mass = kept.sum(-1, keepdim=True)
        if plan.remainder == "none" and not plan.skip_threshold:
            out = kept @ self.v.float() / mass.clamp_min(torch.finfo(mass.dtype).tiny)
        else:
            # Both go by whole query blocks, so that the sampled rows are not enough.
            out = sparse_attention(self.q, self.k, self.v, plan)[:, :, self.tokens].float()
        error = (out - self._out).norm(dim=(-1, -2)) / self._out.norm(dim=(-1, -2))
        return mass.mean((-1, -2)), error

    def _kept(self, plan: AttentionPlan) -> Tensor:
        return self._weights * token_rows(plan, self.q.shape[0], self.q.shape[1], self.tokens)


def token_rows(plan: AttentionPlan, batch: int, heads: int, tokens: Tensor) -> Tensor:
    """Which keys the queries `tokens` `[R]` see under `plan`, `[B, H, R, N]` bool in the sequence's own order."""
    mask = plan.block_mask

    def places(of: Tensor) -> Tensor:
        return of.expand(batch, heads, -1)

    positions = places(plan.q_order.inverse)[..., tokens]
    rows = places(BlockMask.block_of(mask.q_offsets)).gather(2, positions)
    columns = places(BlockMask.block_of(mask.k_offsets)).gather(2, places(plan.kv_order.inverse))

    def spread(blocks: Tensor) -> Tensor:
        blocks = blocks.expand(batch, heads, -1, -1)
        blocks = blocks.gather(2, rows[..., None].expand(-1, -1, -1, blocks.shape[-1]))
        return blocks.gather(3, columns[..., None, :].expand(-1, -1, len(tokens), -1))

    kept = spread(mask.full_blocks)
    if mask.partial_blocks is None or mask.predicate is None:
        return kept
    b = torch.arange(batch, device=kept.device)[:, None, None, None]
    h = torch.arange(heads, device=kept.device)[None, :, None, None]
    keys = torch.arange(columns.shape[-1], device=kept.device)
    return kept | (spread(mask.partial_blocks) & mask.predicate(b, h, tokens[:, None], keys))


def _spread(of: int, count: int) -> list[int]:
    """At most `count` of the numbers below `of`, evenly spread, the first and the last among them."""
    if count == 1:
        return [of // 2]
    return sorted({round(place * (of - 1) / (count - 1)) for place in range(count)})


def as_json(rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """`rows` ready for JSON, to four digits."""

    def short(value: Any) -> Any:
        if isinstance(value, tuple):
            return [short(x) for x in value]
        return round(value, 4) if isinstance(value, float) else value

    return [{name: short(value) for name, value in vars(row).items()} for row in rows]


def by_label(rows: Sequence[Measured]) -> Mapping[str, list[Measured]]:
    """`rows` by their candidate."""
    found: dict[str, list[Measured]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row)
    return found
