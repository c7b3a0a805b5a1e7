"""When a method plans anew, when its plan is reused, and when attention runs dense; wraps any method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch

from dit_sparse.methods import find_method, nearest, read_parameter
from dit_sparse.methods.parameters import (
    at_density,
    check_densities,
    check_flag,
    check_list,
    check_method,
    check_skip_factor,
    check_thresholds,
    density_at,
    freeze_lists,
    is_number,
    overridden,
    skip_threshold,
    threshold_at,
    threshold_name,
    with_density,
    with_threshold,
)
from dit_sparse.types import REMAINDERS, AttentionPlan, Method, Previous, Remainder, Site, TokenGrid, TokenOrder

Action = Literal["dense", "reuse", "plan"]

_TUPLES = ("dense_layers", "refresh", "ramp", "noise_densities", "layer_densities", "layer_thresholds")
_DENSITIES = ("ramp", "noise_densities", "layer_densities")
_LEVELS = 8  # of noise, for a static method


@dataclass(frozen=True)
class Decision:
    """What one attention call does.

    Args:
        action: run "dense", "reuse" the plan there is, or "plan" anew.
        reason: why it is dense; empty otherwise.
        keep_lse: whether the dense call should hand its LSE to the method's next plan.
        predicted: time that sparse attention would take over dense attention's, where that is why it is dense.
    """

    action: Action
    reason: str = ""
    keep_lse: bool = False
    predicted: float | None = None


@dataclass(frozen=True)
class Schedule:
    """A method with the steps and layers at which it applies.

    Args:
        method: any method.
        warmup: share of the steps that run dense at the start; rounded up to whole steps.
        dense_layers: transformer blocks that always run dense; negative ones count from the end.
        refresh: where in the run a plan that depends on the data is made anew, beside the first one and where the
            method's density changes: a number below 1 is a share of the run, a whole number from 1 on is a step; `None`
            takes the method's own. A layer that a cache skips there plans at its next call.
        ramp: densities that replace the method's own, and how that varies over a run: the sparse steps are cut into as
            many equal parts, and each has its density and begins with a new plan. (0.5, 0.3, 0.2) goes from 0.5 to 0.2.
        remainder: what stands in for the blocks that the method does not keep, as in `AttentionPlan`; "method" leaves
            it to the method, of which most say "none".
        skip_factor: on top of the method, key blocks are skipped as attention is computed (see `AttentionPlan`), with
            this over the number of tokens as the threshold, or 1 if that is more; `None` leaves it to the method, of
            which most skip nothing, and 0 skips nothing.
        drift: a plan is kept until the mean queries and keys of its layer have moved by more than this share of what
            they were when it was made, instead of at the method's own `refresh`; see `pipelines.drift`.
        noise_densities: densities at pure noise and without any, in place of the method's own, as a ramp; a plan has
            that of its step, `low + (high - low) (1 - sigmoid(noise_slope x))`, where x is the step's log-SNR; plans of
            a static method have the nearest of nine between the two.
        noise_slope: how steep that is.
        layer_densities: a density for each layer, in place of the method's own; with a ramp or `noise_densities` each
            layer takes theirs times its own over the mean of all.
        layer_thresholds: a value for each layer of the parameter that decides where a method has no density, such as
            `top_p` or `tau`.
        strict: whether a call that was to be sparse and would run dense for a reason that is not in this schedule is an
            error; otherwise the statistics count it.
        never_slower: whether a layer for which the cost model predicts no gain runs dense; the statistics say so.

    Source: BLASST (arXiv 2512.12087) for `skip_factor`, HEART (arXiv 2605.14513) for `drift`, iCATS for
    `noise_densities`.

    Raises:
        ValueError: no method, a number outside its range, an unknown remainder, or an option that the method cannot
            follow: a density for one that has none to change, a threshold for one that goes by density, a `drift` for
            one whose plan is not of queries and keys, or a remainder where blocks are skipped.
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
    skip_factor: float | None = field(
        default=None,
        metadata={"help": "key blocks are skipped with this over the tokens as threshold; none: as the method says"},
    )
    drift: float | None = field(
        default=None, metadata={"help": "a plan is kept until mean queries and keys move by this share; none: refresh"}
    )
    noise_densities: tuple[float, float] | None = field(
        default=None, metadata={"help": "densities at pure noise and without, such as 0.5,0.1; between by log-SNR"}
    )
    noise_slope: float = field(default=1.0, metadata={"help": "how steep the density falls with log-SNR"})
    layer_densities: tuple[float, ...] | None = field(
        default=None, metadata={"help": "a density for each layer, such as 0.5,0.2,0.2,0.3"}
    )
    layer_thresholds: tuple[float, ...] | None = field(
        default=None, metadata={"help": "a value for each layer of what decides without a density, such as top_p"}
    )
    strict: bool = field(
        default=True, metadata={"help": "whether a sparse layer that would run dense without being told to is an error"}
    )
    never_slower: bool = field(
        default=True, metadata={"help": "whether a layer for which the cost model predicts no gain runs dense"}
    )

    def __post_init__(self) -> None:
        freeze_lists(self)
        for name in _TUPLES:
            if name == "dense_layers" or getattr(self, name) is not None:
                check_list(name, getattr(self, name))
        for layer in self.dense_layers:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise ValueError(f"dense_layers must be whole numbers, negative ones from the end, got {layer!r}")
        check_flag("strict", self.strict)
        check_flag("never_slower", self.never_slower)
        if not (is_number(self.warmup) and 0 <= self.warmup <= 1):
            raise ValueError(f"warmup must be from 0 to 1, got {self.warmup!r}")
        check_method(self.method)
        if self.remainder not in ("method", *REMAINDERS):
            raise ValueError(f"remainder must be one of method, {', '.join(REMAINDERS)}, got {self.remainder!r}")
        for at in self.refresh or ():
            if not (is_number(at) and (0 <= at < 1 or (at >= 1 and at == int(at)))):
                raise ValueError(f"refresh must be shares below 1, or whole steps from 1 on, got {at!r}")
        self._check_densities()
        if self.skip_factor is not None:
            check_skip_factor("skip_factor", self.skip_factor)
        if self.skips and self.planned_remainder != "none":
            raise ValueError(
                f"remainder must be 'none' where blocks are skipped, got {self.planned_remainder!r} for "
                f"{self.method.name!r}: a skipped block leaves nothing; set remainder to none, or the factor to 0"
            )
        if self.skips and self.routes:
            raise ValueError(
                f"skip_factor must be 0 where blocks are routed in the kernel, got {self.skip_factor:g} and in_kernel; "
                "leave one of them out"
            )
        if self.drift is not None and (not is_number(self.drift) or self.drift < 0):
            raise ValueError(f"drift must be a number from 0 on, got {self.drift!r}: 0.1 is a tenth")
        if not is_number(self.noise_slope) or self.noise_slope <= 0:
            raise ValueError(f"noise_slope must be a number above 0, got {self.noise_slope!r}")
        if self.drift is not None and self.method.scope not in ("call", "sample"):
            raise ValueError(
                f"drift must be none for {self.method.name!r}, whose plan is not of queries and keys; drop it"
            )

    def _check_densities(self) -> None:
        if self.ramp is not None and self.noise_densities is not None:
            raise ValueError("ramp and noise_densities both say the density of a step; give one of them")
        for name in _DENSITIES:
            if getattr(self, name) is not None:
                check_densities(name, getattr(self, name), self.method)
        if self.noise_densities is not None and len(self.noise_densities) != 2:
            raise ValueError(f"noise_densities must be two, at pure noise and without, got {self.noise_densities!r}")
        if self.layer_thresholds is not None:
            check_thresholds("layer_thresholds", self.layer_thresholds, self.method)

    @classmethod
    def of(cls, method: Method | Schedule) -> Schedule:
        """`method` itself if it is a schedule already, else the default schedule around it."""
        return method if isinstance(method, Schedule) else cls(method)

    def check(self, grid: TokenGrid, num_layers: int) -> None:
        """Whether method and schedule fit a model; called before a run, so that nothing fails in its middle.

        Raises:
            ValueError: a parameter that does not fit `grid`, or a dense layer that the model does not have.
        """
        for method in self._variants:
            method.check(grid)
        self.check_layers(num_layers)

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError for a dense layer that a model of `num_layers` does not have, or values for other layers."""
        for name in ("layer_densities", "layer_thresholds"):
            values = getattr(self, name)
            if values is not None and len(values) != num_layers:
                raise ValueError(f"{name} must have one value for each of {num_layers} layers, got {len(values)}")
        for layer in self.dense_layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"dense_layers must be from {-num_layers} to {num_layers - 1}, got {layer}")

    def is_dense_layer(self, layer: int, num_layers: int) -> bool:
        """Whether `layer` of `num_layers` always runs dense."""
        return layer in {own % num_layers for own in self.dense_layers}

    def warmup_steps(self, num_steps: int) -> int:
        """Dense steps at the start of a run of `num_steps`."""
        # The rounding keeps 0.2 * 15 = 3.0000000000000004 at three steps.
        return math.ceil(round(self.warmup * num_steps, 6))

    def refresh_steps(self, num_steps: int) -> frozenset[int]:
        """Steps at which a plan is made anew, beside the first sparse one."""
        own = self.method.refresh if self.drift is None else ()
        places = own if self.refresh is None else self.refresh
        return frozenset(int(at) if at >= 1 else round(at * num_steps) for at in places)

    @cached_property
    def _methods(self) -> tuple[Method, ...]:
        """The method of each part of the sparse steps."""
        return (self.method,) if self.ramp is None else tuple(at_density(self.method, d) for d in self.ramp)

    def _part(self, step: int, num_steps: int) -> int:
        warmup, parts = self.warmup_steps(num_steps), len(self._methods)
        return min(parts - 1, max(0, step - warmup) * parts // max(1, num_steps - warmup))

    def method_at(self, step: int, num_steps: int) -> Method:
        """The method with the density of `step`; always the same object in the same part of the ramp."""
        return self._methods[self._part(step, num_steps)]

    def method_for(self, site: Site) -> Method:
        """The method with the density or the threshold of a site: of its step, its noise level and its layer.

        Raises:
            ValueError: `noise_densities`, and the scheduler has no noise level.
        """
        method = self.method_at(site.step, site.num_steps)
        if self.layer_thresholds is not None:
            return with_threshold(method, self.layer_thresholds[site.layer])
        if self.noise_densities is not None:
            method = at_density(method, self._noise_density(site))
        if self.layer_densities is None:
            return method
        return with_density(method, self._layer_density(method, site.layer))

    def _noise_density(self, site: Site) -> float:
        assert self.noise_densities is not None
        if site.sigma is None:
            raise ValueError("noise_densities need a scheduler with noise levels, got one without; use a ramp instead")
        high, low = self.noise_densities
        # 1 - sigmoid(slope x) with x = 2 ln((1 - sigma) / sigma), without the logarithms of 0.
        noise, signal = (share ** (2 * self.noise_slope) for share in (site.sigma, 1 - site.sigma))
        return low + (high - low) * self._level(noise / (noise + signal))

    def _level(self, noise: float) -> float:
        """A static method keeps a plan of each density, so it gets a few levels of `noise`."""
        return round(noise * _LEVELS) / _LEVELS if self.method.scope == "grid" else noise

    def _layer_density(self, method: Method, layer: int) -> float:
        """Density of a layer: its own, or where the step has one, that times its own over the mean of all."""
        assert self.layer_densities is not None
        own = self.layer_densities[layer]
        if self.ramp is None and self.noise_densities is None:
            return own
        return min(1.0, float(method.density) * own * len(self.layer_densities) / sum(self.layer_densities))  # type: ignore[attr-defined]

    @cached_property
    def _variants(self) -> tuple[Method, ...]:
        """Every method of a run; with `noise_densities` of a static method, of others those at both ends."""
        steps = self._methods
        if self.noise_densities is not None:
            high, low = self.noise_densities
            count = _LEVELS if self.method.scope == "grid" else 1
            steps = tuple(at_density(self.method, low + (high - low) * (n / count)) for n in range(count + 1))
        if self.layer_densities is None:
            return steps
        layers = range(len(self.layer_densities))
        return tuple(with_density(m, self._layer_density(m, layer)) for m in steps for layer in layers)

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder | None:
        """The order that all steps share; `None` without one, and where parts of the ramp have orders of their own.

        It never changes within a run, because caches add what they kept from one step to the tokens of another.
        """
        orders = [method.shared_order(grid, device) for method in self._variants]
        return orders[0] if all(order is orders[0] for order in orders) else None

    @property
    def planned_remainder(self) -> Remainder:
        """The remainder of this schedule's plans: the one asked for, or the method's own, its `own_remainder`."""
        return getattr(self.method, "own_remainder", "none") if self.remainder == "method" else self.remainder

    @property
    def skips(self) -> bool:
        """Whether plans skip blocks, by the method itself, its `own_skip_factor`, or by this schedule."""
        if self.skip_factor is not None:
            return bool(self.skip_factor)
        thresholds = self.layer_thresholds or ()
        methods = [with_threshold(self.method, value) for value in thresholds] or [self.method]
        return any(getattr(method, "own_skip_factor", 0) for method in methods)

    @property
    def routes(self) -> bool:
        """Whether a kernel finds the method's blocks as it attends, so that nothing is planned before."""
        return getattr(self.method, "in_kernel", False)

    @property
    def overridden(self) -> dict[str, str]:
        """Parameters of the method that have no effect, by name, each with what overrides it: a parameter or option."""
        own = overridden(self.method)
        if self.layer_thresholds is not None and (control := threshold_name(self.method)) is not None:
            own |= {control: "layer_thresholds"}
        by = next((name for name in _DENSITIES if getattr(self, name) is not None), None)
        return own if by is None else own | {"density": by}

    def finish(self, plan: AttentionPlan) -> AttentionPlan:
        """What a method planned, with the remainder and the skipping that this schedule asks for."""
        remainder = plan.remainder if self.remainder == "method" else self.remainder
        skip = plan.skip_threshold
        if self.skip_factor is not None:
            skip = skip_threshold(self.skip_factor, plan.kv_order.num_tokens)
        if (remainder, skip) == (plan.remainder, plan.skip_threshold):
            return plan
        # Both at once, because a plan has one of them at most.
        return replace(plan, remainder=remainder, skip_threshold=skip, head_remainders=None)

    def key(self, site: Site) -> tuple[Any, ...]:
        """What shares a plan with this site: branches, layers and models never mix unless the method is static."""
        scope = self.method.scope
        if scope == "grid":
            method = self.method_for(site)
            if self.layer_thresholds is not None:
                return (site.grid, getattr(method, threshold_name(method) or ""))
            varies = any(getattr(self, name) is not None for name in _DENSITIES)
            return (site.grid, *([method.density] if varies else []))  # type: ignore[attr-defined]
        return (site.grid, site.model, site.layer) + ((site.branch,) if scope == "call" else ())

    def unit(self, model: str, layer: int, branch: str) -> tuple[Any, ...]:
        """What of `key` stands behind the grid: what shares a plan on whatever grid."""
        place = (model, layer, branch)
        return place[: {"grid": 0, "layer": 2, "sample": 2, "call": 3}[self.method.scope]]

    def decide(self, site: Site, previous: Previous | None) -> Decision:
        """What the call at `site` does, given what is there from before."""
        if self.noise_densities is not None:
            self._noise_density(site)  # before the first dense step, not in the middle of a run
        if self.is_dense_layer(site.layer, site.num_layers):
            return Decision("dense", "layer")
        warmup = self.warmup_steps(site.num_steps)
        if site.step < warmup:
            return Decision("dense", "warm-up", keep_lse=self.method.uses_lse and site.step == warmup - 1)
        if self.method.uses_lse and (previous is None or (previous.plan is None and previous.lse is None)):
            return Decision("dense", "search", keep_lse=True)
        if previous is None or previous.plan is None:
            return Decision("plan")
        moved = self.drift is not None and previous.drift is not None and previous.drift > self.drift
        return Decision("plan" if moved or self.is_outdated(previous.step, site) else "reuse")

    def is_outdated(self, planned_at: int, site: Site) -> bool:
        """Whether a plan of the step `planned_at` is made anew at `site`, whatever has drifted.

        It is where a refresh fell on a step since, also one at which a cache skipped the layer, where another part of
        the ramp has begun, and where the method has another density or threshold than at `planned_at`.
        """
        if self.method.scope == "grid" or planned_at == site.step:
            return False
        if any(planned_at < at <= site.step for at in self.refresh_steps(site.num_steps)):
            return True
        if self._part(planned_at, site.num_steps) != self._part(site.step, site.num_steps):
            return True
        # By noise the density is another at every step, so there a plan keeps that of its own.
        return self.noise_densities is None and self._control(site) != self._control(replace(site, step=planned_at))

    def _control(self, site: Site) -> tuple[float | None, ...]:
        """Density and threshold at `site`, without the last bits, which say nothing."""
        method = self.method_for(site)
        found = (density_at(method, site), threshold_at(method, site))
        return tuple(None if value is None else round(value, 9) for value in found)

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
