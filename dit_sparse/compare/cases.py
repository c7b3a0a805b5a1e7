"""What is compared with the dense video: methods at densities, other settings, and the floors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dit_sparse.eval.floors import RandomBlocks
from dit_sparse.generate.config import read_config
from dit_sparse.methods import nearest
from dit_sparse.methods.parameters import accepts_density, check_share, takes_density, with_density
from dit_sparse.schedule import Schedule

__all__ = [
    "DENSE",
    "Case",
    "Plan",
    "density_label",
    "floor_cases",
    "make_cases",
    "parse_config",
    "parse_densities",
    "read_plan",
    "refuse_alike",
]


@dataclass(frozen=True)
class Case:
    """One line of a comparison.

    Args:
        label: its name in tables and pictures.
        kind: "dense" is the reference, a "method" is compared with it, and a "floor" is what a figure is worth nothing
            without.
        schedule: what the pipeline is sparsified with; `None` leaves it as diffusers has it.
        density: what was asked for; `None` where the method's own threshold decides, or there is none.
        other_noise: whether the noise has another seed than the reference's.
    """

    label: str
    kind: Literal["dense", "method", "floor"] = "method"
    schedule: Schedule | None = None
    density: float | None = None
    other_noise: bool = False

    @property
    def config(self) -> dict[str, Any] | None:
        """The schedule, ready for JSON."""
        return None if self.schedule is None else self.schedule.to_config()


DENSE = Case("dense", "dense", density=1.0)


@dataclass(frozen=True)
class Plan:
    """What a config file says is compared, as far as it does.

    Args:
        methods: names, and configs as `Schedule.from_config` reads them, with a "label" if they like.
        densities: at which each is rendered that does not say its own.
        schedule: options of the schedule, such as a warm-up, for those that do not say theirs.
    """

    methods: tuple[str | Mapping[str, Any], ...] = ()
    densities: tuple[float, ...] | None = None
    schedule: Mapping[str, Any] | None = None


def read_plan(path: Path) -> Plan:
    """The plan in the JSON file `path`.

    Raises:
        ValueError: no such file, no JSON, unknown keys, or values of another type.
    """
    config = read_config(path)
    known = ("methods", "densities", "schedule")
    for key in config:
        if key not in known:
            raise ValueError(f"config file {path}: unknown key {key!r}; {nearest(key, known)}")
    methods, densities, schedule = (config.get(key) for key in known)
    if not isinstance(methods, list) or not all(isinstance(method, (str, dict)) for method in methods):
        raise ValueError(f'config file {path}: "methods" must be a list of names and objects, got {methods!r:.80}')
    if densities is not None and not isinstance(densities, list):
        raise ValueError(f'config file {path}: "densities" must be a list of numbers, got {densities!r:.80}')
    if schedule is not None and not isinstance(schedule, dict):
        raise ValueError(f'config file {path}: "schedule" must be an object, got {schedule!r:.80}')
    return Plan(tuple(methods), None if densities is None else tuple(densities), schedule)


def parse_config(text: str) -> dict[str, Any]:
    """A config from the command line.

    Raises:
        ValueError: no JSON object.
    """
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--also must be JSON, got {text!r}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f'--also must be an object such as {{"method": "adaspa"}}, got {text!r}')
    return config


def parse_densities(text: str) -> list[float]:
    """The numbers in `text`, which commas divide.

    Raises:
        ValueError: one is no number.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"--densities must be numbers with commas between, such as 0.5,0.25, got {text!r}") from None


def make_cases(
    methods: Sequence[str | Mapping[str, Any]],
    densities: Sequence[float] | None,
    schedule: Mapping[str, Any] | None = None,
) -> list[Case]:
    """Every one of `methods` at every one of `densities`.

    A config with a density of its own is one case, at that density, and so is one that takes none, such as a window;
    without `densities` every method is one case, as it is by default.

    Args:
        methods: names, and configs as `Schedule.from_config` reads them, with a "label" if they like.
        densities: shares of the query-key pairs.
        schedule: options of the schedule, such as a warm-up, for those that do not say theirs.

    Raises:
        ValueError: no method, an unknown one, a name whose method takes no density, a density outside (0, 1], a config
            that is not allowed, or two cases alike.
    """
    if not methods:
        raise ValueError("no methods: give --methods with names from `dit-sparse methods`, --also or --config")
    for density in densities or ():
        check_share("density", density)
    cases = []
    for method in methods:
        given = {"method": method} if isinstance(method, str) else dict(method)
        cases += _cases_of(given, densities, schedule or {}, as_set=not isinstance(method, str))
    refuse_alike("label", cases, [case.label for case in cases])
    refuse_alike("config", cases, [json.dumps(case.config, sort_keys=True) for case in cases])
    return cases


def floor_cases(cases: Sequence[Case], schedule: Mapping[str, Any] | None = None) -> list[Case]:
    """What the PSNR of `cases` has to be compared with: another seed of the same prompt, and random blocks.

    The random blocks are drawn at every density of `cases`, of as many tokens as their blocks where these agree, or 64,
    with the warm-up and dense layers of `schedule`.
    """
    options = {key: value for key, value in (schedule or {}).items() if key in ("warmup", "dense_layers")}
    wrapped = Schedule.from_config({"method": "dense", **_FAIR, **options})
    sizes = {getattr(case.schedule.method, "block", None) for case in cases if case.schedule is not None}
    block = sizes.pop() if len(sizes) == 1 else None
    random = []
    for density in sorted({case.density for case in cases if case.density is not None}, reverse=True):
        method = RandomBlocks(density) if block is None else RandomBlocks(density, block)
        own = replace(wrapped, method=method)
        random.append(Case(f"random blocks {density:g}", "floor", own, density))
    return [Case("another seed", "floor", density=1.0, other_noise=True), *random]


def density_label(method: Any) -> str:
    """The method's name, with its density where that decides."""
    return f"{method.name} {method.density:g}" if takes_density(method) else method.name


def _cases_of(
    given: dict[str, Any], densities: Sequence[float] | None, schedule: Mapping[str, Any], *, as_set: bool
) -> list[Case]:
    """The cases of one method; `as_set` takes it once where it has no density to vary."""
    label = given.pop("label", None)
    if label is not None and (not isinstance(label, str) or not label.strip()):
        raise ValueError(f'"label" must be a text, got {label!r}')
    base = Schedule.from_config({**_FAIR, **schedule, **given})
    extra = "".join(f" {key}={_short(value)}" for key, value in given.items() if key not in _LABELLED)
    varies = accepts_density(base.method)
    if densities is None or given.get("density") is not None or (as_set and not varies):
        at = [base]
    elif not varies:
        raise ValueError(
            f"method {base.method.name!r} as it is set takes no density, so it cannot be compared at "
            f"{', '.join(f'{density:g}' for density in densities)}: leave it out, or leave the densities out"
        )
    else:
        at = [replace(base, method=with_density(base.method, density)) for density in densities]
    cases = []
    for found in at:
        name = density_label(found.method) + extra
        if label is not None:
            name = label if len(at) == 1 else f"{label} {_density(found):g}"
        cases.append(Case(name, "method", found, _density(found)))
    return cases


_LABELLED = ("method", "version", "density")

# A layer that runs dense because that is as fast has nothing to compare.
_FAIR = {"never_slower": False}


def _density(schedule: Schedule) -> float | None:
    return schedule.method.density if takes_density(schedule.method) else None  # type: ignore[attr-defined]


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def refuse_alike(what: str, cases: Sequence[Case], values: Sequence[str]) -> None:
    """Raise ValueError where two of `cases` have one of `values`, which are called `what`."""
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        alike = [case.label for case, own in zip(cases, values, strict=True) if own == value]
        raise ValueError(f"two cases of one {what}: {' and '.join(map(repr, alike))}; leave one out or give it a label")
