"""Does AdaSpa's search find the blocks that a full search would find?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_sparse.course import plan_steps
from dit_sparse.kernels import sampled_block_mass
from dit_sparse.methods import AdaSpa
from dit_sparse.schedule import Schedule
from dit_sparse.types import Previous, Site


class SearchAgreement:
    """An observer of a dense run that makes AdaSpa's searches where `schedule` has them, with row sums old and new.

    A search with the cached row LSE, that of the last dense step, is compared with a full one: with the LSE of the
    search's own step. Both see the same q and k, those of the dense run.

    Args:
        schedule: AdaSpa, with a warm-up of at least one step.
        row_strides: values of `row_stride` to search with.

    Raises:
        ValueError: another method than AdaSpa, or no warm-up.
    """

    def __init__(self, schedule: Schedule, row_strides: tuple[int, ...] = (1, 4)) -> None:
        if not isinstance(schedule.method, AdaSpa):
            raise ValueError(f"schedule must be of adaspa, got {schedule.method.name!r}")
        if schedule.warmup == 0:
            raise ValueError("schedule must have a warm-up, whose last step gives the row LSE; got warmup 0")
        self.schedule = schedule
        self.row_strides = row_strides
        self._every_row = replace(schedule.method, row_stride=1)
        self._cached: dict[tuple[Any, ...], Previous] = {}
        self._found: dict[tuple[int, int], list[Tensor]] = {}

    def __call__(self, site: Site, q: Tensor, k: Tensor, lse: Tensor) -> None:
        first = self.schedule.warmup_steps(site.num_steps)
        key = self.schedule.key(site)
        if site.step == first - 1:
            self._cached[key] = Previous(None, lse.clone(), site.step)
        elif site.step in plan_steps(self.schedule, site.num_steps):
            self._found.setdefault((site.step, site.layer), []).append(self._compare(site, q, k, lse, key))

    def _compare(self, site: Site, q: Tensor, k: Tensor, lse: Tensor, key: tuple[Any, ...]) -> Tensor:
        """`[H, 1 + 3 S]`: recall of the full search, then agreement twice and recall of each row stride."""
        old, new = self._cached[key], Previous(None, lse, site.step)
        full = self._every_row.plan(q, k, k, site, new)
        order, whole = full.q_order, full.block_mask.kept_blocks
        mass = sampled_block_mass(q, k, lse, order, order, stride=1, scale=q.shape[-1] ** -0.5)
        columns = [_recall(mass, whole)]
        for stride in self.row_strides:
            method = replace(self._every_row, row_stride=stride)
            cached = method.plan(q, k, k, site, old).block_mask.kept_blocks
            same = method.plan(q, k, k, site, new).block_mask.kept_blocks
            columns += [_found_again(cached, same), _found_again(cached, whole), _recall(mass, cached)]
        return torch.stack(columns, -1)

    def to_dict(self) -> dict[str, Any]:
        """What was found, ready for JSON.

        `steps` are those of the searches. Every figure is a list over steps, layers and heads, the mean over guidance
        branches: `recall_full`, the share of the attention mass that the full search keeps; and for each row stride
        `agreement`, the share of the blocks of a search with new row sums and the same stride that the cached search
        finds, `agreement_full`, the same of the full search with every row, and `recall` of the cached search.
        """
        steps, layers = (sorted({key[place] for key in self._found}) for place in (0, 1))
        table = torch.stack(
            [torch.stack([torch.stack(self._found[step, layer]).mean(0) for layer in layers]) for step in steps]
        ).cpu()
        columns = iter([[[[round(x, 4) for x in row] for row in step] for step in part] for part in _columns(table)])
        found: dict[str, Any] = {"steps": steps, "recall_full": next(columns), "row_strides": []}
        for stride in self.row_strides:
            row = {name: next(columns) for name in ("agreement", "agreement_full", "recall")}
            found["row_strides"].append({"row_stride": stride, **row})
        return found


def _columns(table: Tensor) -> list[list[list[list[float]]]]:
    return [column.tolist() for column in table.unbind(-1)]


def _recall(mass: Tensor, kept: Tensor) -> Tensor:
    """`[H]` share of the mass `[B, H, M, M]` in the blocks kept, the mean over the batch."""
    return ((mass * kept).sum((-1, -2)) / mass.sum((-1, -2))).double().mean(0)


def _found_again(kept: Tensor, wanted: Tensor) -> Tensor:
    """`[H]` share of the blocks `wanted` `[B, H, M, M]` that are in `kept`, the mean over the batch."""
    return ((kept & wanted).sum((-1, -2)) / wanted.sum((-1, -2))).double().mean(0)
