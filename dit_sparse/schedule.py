"""When a method plans anew, when its plan is reused, and when attention runs dense; wraps any method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch

from dit_sparse.methods import find_method, nearest, read_parameter
from dit_sparse.methods.parameters import check_share, takes_density, with_density
from dit_sparse.types import REMAINDERS, AttentionPlan, Method, Previous, Site, TokenGrid, TokenOrder

Action = Literal["dense", "reuse", "plan"]


@dataclass(frozen=True)
class Decision:
    """What one attention call does.

    Args:
        action: run "dense", "reuse" the plan there is, or "plan" anew.
        reason: why it is dense; empty otherwise.
        keep_lse: whether the dense call should hand its LSE to the method's next plan.
    """

    action: Action
    reason: str = ""
    keep_lse: bool = False


@dataclass(frozen=True)
class Schedule:
    """A method with the steps and layers at which it applies.

    Args:
        method: any method.
        warmup: share of the steps that run dense at the start; rounded up to whole steps.
        dense_layers: transformer blocks that always run dense; negative ones count from the end.
        refresh: where in the run a plan that depends on the data is made anew, beside the first one: a number below 1
            is a share of the run, a whole number from 1 on is a step; `None` takes the method's own.
        ramp: densities that replace the method's own: the sparse steps are cut into as many equal parts, and each
            part has its density. Where a part begins, a plan is made anew. (0.5, 0.4, 0.3, 0.2) goes from 0.5 to 0.2.
        remainder: what stands in for the blocks that the method does not keep, as in `AttentionPlan`; "method" leaves
            it to the method, of which most say "none".

    Raises:
        ValueError: a share outside its range, an unknown remainder, or a ramp for a method that has no density to
            change.
    """

    method: Method
    warmup: float = field(default=0.2, metadata={"help": "share of the steps that run dense at the start"})
    dense_layers: tuple[int, ...] = field(default=(), metadata={"help": "transformer blocks that always run dense"})
    refresh: tuple[float, ...] | None = field(
        default=None,
        metadata={"help": "shares of the run, or steps from 1 on, where a plan is made anew; none: the method's own"},
    )
    ramp: tuple[float, ...] | None = field(
        default=None, metadata={"help": "densities of equal parts of the sparse steps, such as 0.5,0.35,0.2"}
    )
    remainder: Literal["method", "none", "mean", "value", "mass"] = field(
        default="method",
        metadata={"help": "what stands in for blocks not kept: none, mean, value or mass; method: as the method says"},
    )

    def __post_init__(self) -> None:
        if not _is_share(self.warmup):
            raise ValueError(f"warmup must be from 0 to 1, got {self.warmup!r}")
        if self.remainder not in ("method", *REMAINDERS):
            raise ValueError(f"remainder must be one of method, {', '.join(REMAINDERS)}, got {self.remainder!r}")
        for at in self.refresh or ():
            if not (_is_number(at) and (0 <= at < 1 or (at >= 1 and at == int(at)))):
                raise ValueError(f"refresh must be shares below 1, or whole steps from 1 on, got {at!r}")
        if self.ramp is not None:
            if not self.ramp:
                raise ValueError("ramp must hold at least one density, got none: leave it out for the method's own")
            for density in self.ramp:
                check_share("ramp", density)
            if not takes_density(self.method):
                raise ValueError(
                    f"ramp must have a density to change, but {self.method.name!r} as it is set uses none: "
                    "leave the ramp out, or what overrides the density"
                )

    @classmethod
    def of(cls, method: Method | Schedule) -> Schedule:
        """`method` itself if it is a schedule already, else the default schedule around it."""
        return method if isinstance(method, Schedule) else cls(method)

    def check(self, grid: TokenGrid, num_layers: int) -> None:
        """Whether method and schedule fit a model; called before a run, so that nothing fails in its middle.

        Raises:
            ValueError: a parameter that does not fit `grid`, or a dense layer that the model does not have.
        """
        for method in self._methods:
            method.check(grid)
        self.check_layers(num_layers)

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError for a dense layer that a model of `num_layers` does not have."""
        for layer in self.dense_layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"dense_layers must be from {-num_layers} to {num_layers - 1}, got {layer}")

    def warmup_steps(self, num_steps: int) -> int:
        """Dense steps at the start of a run of `num_steps`."""
        # The rounding keeps 0.2 * 15 = 3.0000000000000004 at three steps.
        return math.ceil(round(self.warmup * num_steps, 6))

    def refresh_steps(self, num_steps: int) -> frozenset[int]:
        """Steps at which a plan is made anew, beside the first sparse one."""
        places = self.method.refresh if self.refresh is None else self.refresh
        return frozenset(int(at) if at >= 1 else round(at * num_steps) for at in places)

    @cached_property
    def _methods(self) -> tuple[Method, ...]:
        """The method of each part of the sparse steps."""
        return (self.method,) if self.ramp is None else tuple(with_density(self.method, d) for d in self.ramp)

    def _part(self, step: int, num_steps: int) -> int:
        warmup, parts = self.warmup_steps(num_steps), len(self._methods)
        return min(parts - 1, max(0, step - warmup) * parts // max(1, num_steps - warmup))

    def method_at(self, step: int, num_steps: int) -> Method:
        """The method with the density of `step`; always the same object in the same part of the ramp."""
        return self._methods[self._part(step, num_steps)]

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder | None:
        """The order that all steps share; `None` without one, and where parts of the ramp have orders of their own.

        It never changes within a run, because caches add what they kept from one step to the tokens of another.
        """
        orders = [method.shared_order(grid, device) for method in self._methods]
        return orders[0] if all(order is orders[0] for order in orders) else None

    def finish(self, plan: AttentionPlan) -> AttentionPlan:
        """What a method planned, with the remainder that this schedule asks for."""
        return plan if self.remainder == "method" else plan.with_remainder(self.remainder)

    def key(self, site: Site) -> tuple[Any, ...]:
        """What shares a plan with this site: branches, layers and models never mix unless the method is static."""
        scope = self.method.scope
        if scope == "grid":
            return (site.grid, *([] if self.ramp is None else [self.ramp[self._part(site.step, site.num_steps)]]))
        return (site.grid, site.model, site.layer) + ((site.branch,) if scope == "call" else ())

    def unit(self, model: str, layer: int, branch: str) -> tuple[Any, ...]:
        """What of `key` stands behind the grid: what shares a plan on whatever grid."""
        place = (model, layer, branch)
        return place[: {"grid": 0, "layer": 2, "call": 3}[self.method.scope]]

    def decide(self, site: Site, previous: Previous | None) -> Decision:
        """What the call at `site` does, given what is there from before."""
        if site.layer in {layer % site.num_layers for layer in self.dense_layers}:
            return Decision("dense", "layer")
        warmup = self.warmup_steps(site.num_steps)
        if site.step < warmup:
            return Decision("dense", "warm-up", keep_lse=self.method.uses_lse and site.step == warmup - 1)
        if self.method.uses_lse and (previous is None or previous.lse is None):
            return Decision("dense", "search", keep_lse=True)
        if previous is None or previous.plan is None:
            return Decision("plan")
        if self.method.scope != "grid" and self._new_part(previous.step, site):
            return Decision("plan")
        due = site.step in self.refresh_steps(site.num_steps) and previous.step != site.step
        return Decision("plan" if due and self.method.scope != "grid" else "reuse")

    def _new_part(self, planned_at: int, site: Site) -> bool:
        return self._part(planned_at, site.num_steps) != self._part(site.step, site.num_steps)

    def to_config(self) -> dict[str, Any]:
        """A flat JSON-ready dict with the method's name, version and parameters and this schedule's."""
        config: dict[str, Any] = {"method": self.method.name, "version": self.method.version}
        for owner in (self.method, self):
            for f in fields(owner):  # type: ignore[arg-type]
                if f.name != "method":
                    value = getattr(owner, f.name)
                    config[f.name] = list(value) if isinstance(value, tuple) else value
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """The schedule that `to_config` wrote, here or in an earlier version; missing parameters take their defaults.

        Raises:
            ValueError: no dict, an unknown method, key or version, or a value that is not allowed.
        """
        if not isinstance(config, dict) or not isinstance(config.get("method"), str):
            raise ValueError(f'a config must be an object with a "method", got {config!r:.80}')
        method_class = find_method(config["method"])
        version = config.get("version", method_class.version)
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= method_class.version:
            raise ValueError(
                f"{method_class.name} has version {method_class.version} here and reads those from 1 on, "
                f"got version {version!r}"
            )
        own = {f.name for f in fields(cls)} - {"method"}
        of_method = {f.name for f in fields(method_class)}  # type: ignore[arg-type]
        for key in config.keys() - {"method", "version"} - own - of_method:
            raise ValueError(f"unknown key {key!r} for {method_class.name}; {nearest(key, own | of_method)}")
        parameters = {key: read_parameter(method_class, key, config[key]) for key in of_method & config.keys()}
        options = {key: read_parameter(cls, key, config[key]) for key in own & config.keys()}
        return cls(method_class(**parameters), **options)


def _is_number(value: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: float) -> bool:
    return _is_number(value) and 0 <= value <= 1
