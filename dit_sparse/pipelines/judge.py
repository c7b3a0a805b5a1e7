"""Decides for each layer whether sparse attention pays, by the cost model."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_sparse.cost import Call, DeviceCosts, costs_of, predict
from dit_sparse.course import plans_per_call
from dit_sparse.kernels import BACKENDS
from dit_sparse.methods.parameters import block_of, density_at, threshold_at
from dit_sparse.schedule import Decision, Schedule
from dit_sparse.types import AttentionPlan, Method, Remainder, Site

NOT_FASTER = "would not be faster"
"""The reason of calls that run dense because the cost model says that sparse attention would take as long or longer."""

Key = tuple[Any, ...]


class Judge:
    """Knows which layers run dense because sparse attention would not be faster there.

    A method that has a density and plans from the data is judged before it plans, by its parameters. Every method is
    judged by its first plan of each layer, guidance branch and part of the run with a density or threshold of its own,
    and that verdict stands for the part: later plans would have to be made, or read back from the device, to be judged.

    Args:
        schedule, backend: as of the session.
    """

    def __init__(self, schedule: Schedule, backend: str) -> None:
        self._schedule = schedule
        self._backend = backend
        self._predicted: dict[Key, float] = {}
        self._planned: set[Key] = set()
        self._warned = False

    def forget(self) -> None:
        """Forget the verdicts of an earlier run."""
        self._predicted.clear()
        self._planned.clear()

    def before(self, site: Site, key: Key, q: Tensor, forwards: int = 1) -> Decision | None:
        """To run the call at `site` with `q` `[B, H, N, D]` dense, if it is known to be no gain.

        Args:
            key: that of its plan.
            forwards: how many a step of the run has, one a guidance branch.

        Warns:
            UserWarning: at the first layer of a session that is found to run dense, unless the method's density falls
                over the run and pays later.
        """
        method = self._method(site)
        if self._is_free(method):
            return None
        density = _stated(method, site)
        key = (*key, method, density, threshold_at(method, site))
        if key not in self._predicted and density is not None:
            self._predicted[key] = self._before_planning(site, q, density, forwards)
        return self._refused(key, site, q, forwards)

    def after(self, plan: AttentionPlan, site: Site, key: Key, q: Tensor, forwards: int = 1) -> Decision | None:
        """As `before`, by the first plan of the layer."""
        method = self._method(site)
        if self._is_free(method):
            return None
        density = _stated(method, site)
        key = (*key, method, density, threshold_at(method, site))
        if key not in self._planned:
            self._planned.add(key)
            self._predicted[key] = self._predict(site, q, forwards=forwards, **work_of(plan, site, density))
        return self._refused(key, site, q, forwards)

    def _method(self, site: Site) -> Method:
        return self._schedule.method_for(site)

    def _is_free(self, method: Method) -> bool:
        """Whether nothing is judged: nobody asked for it, it is dense attention, or the share it skips is unknown."""
        return not self._schedule.never_slower or method.name == "dense" or self._schedule.skips

    def _before_planning(self, site: Site, q: Tensor, density: float, forwards: int) -> float:
        work = {
            "density": density,
            "block": block_of(self._method(site)),
            "remainder": self._schedule.planned_remainder,
        }
        return self._predict(site, q, forwards=forwards, **work)

    def _predict(self, site: Site, q: Tensor, **work: Any) -> float:
        """0 for a backend that was asked for by name and that nobody has measured."""
        return predicted_time(self._schedule, site, q, backend=self._backend, **work) or 0.0

    def _refused(self, key: Key, site: Site, q: Tensor, forwards: int) -> Decision | None:
        predicted = self._predicted.get(key, 0.0)
        if predicted <= 1:
            return None
        if not self._warned and not self._pays_later(site, q, forwards):
            self._warned = True
            warnings.warn(_warning(self._method(site), site, predicted, costs_of(q.device)), stacklevel=2)
        return Decision("dense", NOT_FASTER, predicted=predicted)

    def _pays_later(self, site: Site, q: Tensor, forwards: int) -> bool:
        """Whether the method has less density at the last step, and pays there."""
        last = replace(site, step=site.num_steps - 1)
        least, now = (_stated(self._method(at), at) for at in (last, site))
        return least is not None and least != now and self._before_planning(last, q, least, forwards) <= 1


def predicted_time(
    schedule: Schedule,
    site: Site,
    q: Tensor,
    *,
    backend: str = "auto",
    remainder: Remainder = "none",
    forwards: int = 1,
    **work: Any,
) -> float | None:
    """Time of a sparse call over dense attention's, planning counted; `None` for a backend that nobody has measured.

    Args:
        schedule, site, q: of the call; of `q` `[B, H, N, D]` only shape and device matter.
        backend: as in `sparse_attention`.
        remainder, work: of its plan, as `work_of` gives them.
        forwards: how many a step has, one a guidance branch; with some methods the first plans for all.
    """
    costs, method = costs_of(q.device), schedule.method_for(site)
    backend = "triton" if schedule.routes else _backend(backend, q.device, remainder)
    if backend not in costs.backends:
        return None
    plans = plans_per_call(schedule, site.num_steps, forwards)
    batch, heads, tokens, dim = q.shape
    call = Call(
        tokens, batch * heads, dim, backend=backend, method=method.name, plans=plans, remainder=remainder, **work
    )
    return predict(call, costs)


def work_of(plan: AttentionPlan, site: Site, density: float | None = None) -> dict[str, Any]:
    """What of `plan` decides its cost: the arguments of `predicted_time`.

    Args:
        density: where it is known, so that it need not be read back from the device.
    """
    order, mask = plan.q_order, plan.block_mask
    if mask.is_full or mask.num_k_blocks == 1:
        whole, partial = 1.0, 0.0
    else:
        whole, partial = _visited(plan) if density is None else (density, 0.0)
    return {
        "density": whole,
        "partial": partial,
        "block": order.num_tokens / order.num_blocks,
        "remainder": plan.remainder,
        "moved": not (site.in_order or order.is_identity),
    }


def _warning(method: Method, site: Site, predicted: float, costs: DeviceCosts) -> str:
    return (
        f"layer {site.layer} runs dense, and maybe others: {method.name} would take {predicted:.2f} times as long as "
        f"dense attention of its {site.grid.num_tokens} tokens, planning counted ({costs.source}); never_slower=False "
        "(`--never-slower false`) runs it sparse all the same, and `dit-sparse doctor --measure` measures this device"
    )


def _backend(name: str, device: torch.device, remainder: Remainder) -> str:
    """The backend that will run, as far as it can be told before there is a plan."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "gather"
    hopper = BACKENDS["hopper"]
    able = remainder in getattr(hopper, "remainders", ("none",)) and hopper.unavailable(device) is None
    return "hopper" if able else "triton"


def _stated(method: Method, site: Site) -> float | None:
    """The density that `method` will keep to at `site`, if it says so; that of a static plan is read off it."""
    return density_at(method, site) if method.scope in ("sample", "call") else None


def _visited(plan: AttentionPlan) -> tuple[float, float]:
    """Shares of the query-key pairs in blocks kept whole and in blocks that a predicate cuts; means over heads."""
    mask = plan.block_mask
    if mask.partial_blocks is None:
        return float(plan.density.mean()), 0.0
    q_sizes, k_sizes = mask.q_offsets.diff(dim=-1).float(), mask.k_offsets.diff(dim=-1).float()
    pairs = plan.q_order.num_tokens * plan.kv_order.num_tokens

    def share(blocks: Tensor) -> float:
        return float((((blocks.float() @ k_sizes[..., None])[..., 0] * q_sizes).sum(-1) / pairs).mean())

    return share(mask.full_blocks), share(mask.partial_blocks)
