"""What a method's dataclass fields are, how they are read from text and JSON, and the checks they share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dit_sparse.types import Method, Site

EVERY_STEP = tuple(step / 100 for step in range(100))
"""The `refresh` of a method that plans at every step, of runs of up to 100."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, for help texts and listings."""

    name: str
    type: str
    default: Any
    help: str


def parameters(cls: type[Any]) -> list[Parameter]:
    """The parameters of a method or schedule class, a dataclass, in order."""
    return [
        Parameter(f.name, str(f.type), None if f.default is MISSING else f.default, f.metadata.get("help", ""))
        for f in _fields(cls)
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest of `known`, in whatever case `name` is written, and all of them."""
    known = sorted(known)
    spelt = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.5)
    guess = f"did you mean {spelt[close[0]]!r}? " if close else ""
    return f"{guess}known: {', '.join(known)}"


def parse_parameter(cls: type[Any], name: str, text: str) -> Any:
    """Value of parameter `name` read from a command line's `text`, such as `0.25`, `true` or `4x12x16`.

    Raises:
        ValueError: no such parameter (the nearest is named), or a text that is not of its type.
    """
    name = name.replace("-", "_")
    return _convert(f"--{name.replace('_', '-')}", _type_of(cls, name), text)


def read_parameter(cls: type[Any], name: str, value: Any) -> Any:
    """Value of parameter `name` from JSON's `value`; lists become tuples.

    Raises:
        ValueError: no such parameter (the nearest is named), or a value of another type.
    """
    return _convert(name, _type_of(cls, name), value)


def check_method(method: Any) -> None:
    """Raise ValueError unless `method` is a method, which a class, a name, a config and a schedule are not."""
    # Not `isinstance`, which reads properties, and so plan files.
    if all(hasattr(type(method), name) for name in ("name", "scope", "plan")):
        return
    got = repr(method)
    if isinstance(method, type):
        got = f"the class {method.__name__}: call it"
    elif isinstance(method, str):
        got = f"the text {method!r}: methods.parse_method reads it"
    elif isinstance(method, dict):
        got = f"the dict {method!r:.80}: Schedule.from_config reads a config"
    elif hasattr(method, "method"):
        got = f"a schedule of {method.method.name!r}: take it as it is"
    raise ValueError(f"method must be a method such as AdaSpa(density=0.25), got {got}")


def overridden(method: Method) -> dict[str, str]:
    """Parameters that have no effect as `method` is set, by name, each with the parameter that overrides it.

    A method says it itself in `overridden`; where it does not, a density overrides its `control`.
    """
    own = getattr(method, "overridden", None)
    if own is not None:
        return dict(own)
    control = threshold_name(method)
    return {} if control is None or getattr(method, "density", None) is None else {control: "density"}


def takes_density(method: Method) -> bool:
    """Whether the `density` of `method` has an effect: none leaves it to the method's own threshold."""
    return getattr(method, "density", None) is not None and "density" not in overridden(method)


def density_at(method: Method, site: Site) -> float | None:
    """The density of `method` at `site`; `None` where none has an effect.

    A method whose density varies over a run says it in `density_at(site)`.
    """
    if not takes_density(method):
        return None
    varying = getattr(method, "density_at", None)
    return float(method.density if varying is None else varying(site))  # type: ignore[attr-defined]


def block_of(method: Method) -> float:
    """Tokens a query block of `method`, as its `query_block` or its parameters say; 64 where they do not."""
    for name in ("query_block", "block", "block_q", "q_tokens"):
        if isinstance(size := getattr(method, name, None), int):
            return size
    tile = getattr(method, "tile", None)
    return math.prod(tile) if tile else 64


def key_block_of(method: Method) -> float:
    """Tokens a key block of `method`, as its `key_block` or its parameters say; those of its query blocks else."""
    for name in ("key_block", "block_k", "k_tokens"):
        if isinstance(size := getattr(method, name, None), int):
            return size
    return block_of(method)


def head_orders(method: Method) -> int:
    """How many orders of a plan are not the same for all heads, as `method.head_orders` says; without it none."""
    return getattr(method, "head_orders", 0)


def accepts_density(method: Method) -> bool:
    """Whether `with_density` gives a method that its density controls; it may have none to begin with."""
    if not any(f.name == "density" for f in _fields(type(method))):
        return False
    try:
        return takes_density(with_density(method, 1.0))
    except ValueError:  # it has none beside another parameter
        return False


def with_density(method: Method, density: float) -> Method:
    """`method` with another `density`."""
    return replace(method, density=density)  # type: ignore[type-var]


def at_density(method: Method, density: float) -> Method:
    """`method` with `density` at every step.

    A method whose density varies over a run says how that is done in `at_density(density)`.
    """
    own = getattr(method, "at_density", None)
    return with_density(method, density) if own is None else own(density)


def threshold_name(method: Method) -> str | None:
    """The parameter that decides how much `method` keeps where it has no density: its class attribute `control`."""
    return getattr(method, "control", None)


def with_threshold(method: Method, value: float) -> Method:
    """`method` with another value of the parameter that `threshold_name` names.

    Raises:
        ValueError: it has none, or refuses the value.
    """
    name = threshold_name(method)
    if name is None:
        raise ValueError(f"{method.name!r} has no threshold, so none can be set")
    return replace(method, **{name: value})  # type: ignore[type-var]


def threshold_at(method: Method, site: Site) -> float | None:
    """The threshold of `method` at `site`; `None` where a density decides, or there is none.

    A method whose threshold varies over a run says it in `threshold_at(site)`.
    """
    name = threshold_name(method)
    if name is None or takes_density(method):
        return None
    varying = getattr(method, "threshold_at", None)
    return float(getattr(method, name) if varying is None else varying(site))


def takes_error(method: Method) -> bool:
    """Whether `method` can choose by a bound on the error of its output: its `control` is its `error`."""
    return threshold_name(method) == "error"


def without_density(method: Method) -> Method | None:
    """`method` by its own threshold; `None` where it needs a density, or takes none."""
    if not accepts_density(method):
        return None
    try:
        read_parameter(type(method), "density", None)
    except ValueError:
        return None
    return replace(method, density=None)  # type: ignore[type-var]


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, which a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def check_densities(name: str, densities: Sequence[float], method: Method) -> None:
    """Raise ValueError unless `densities` are shares, one at least, that `method` can take in place of its own."""
    if not densities:
        raise ValueError(f"{name} must hold at least one density, got none: leave it out for the method's own")
    for density in densities:
        check_share(name, density)
    if not takes_density(method):
        raise ValueError(
            f"{name} must have a density to change, but {method.name!r} as it is set uses none: "
            f"leave the {name} out, or what overrides the density"
        )


def check_thresholds(name: str, values: Sequence[float], method: Method) -> None:
    """Raise ValueError unless `method` goes by its threshold and can take any of `values` for it."""
    if takes_density(method) or threshold_name(method) is None:
        raise ValueError(
            f"{name} must have a threshold to change, but {method.name!r} as it is set goes by its density or has "
            "none: leave out one or the other"
        )
    for value in values:
        with_threshold(method, value)


def check_skip_factor(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number from 0, where nothing is skipped, on, got {value!r}")


def skip_threshold(factor: float, tokens: int) -> float:
    """The `skip_threshold` of plans for `tokens` keys: `factor` over their number, at most 1.

    The longer a row, the less of it each key has, and the lower the threshold must be to leave out as much of it:
    calibrated thresholds are the inverse of the length. Source: BLASST (arXiv 2512.12087), section 3.
    """
    return min(1.0, factor / tokens)


def check_budget(density: float | None) -> None:
    """Raise ValueError unless `density` is a share, or None where a threshold decides."""
    if density is not None:
        check_share("density", density)


def check_block(name: str, value: int) -> None:
    """Raise ValueError unless `value` is a whole number of tokens, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of tokens, at least 1 (64 and 128 are fast), got {value!r}")


def check_tile(tile: tuple[int, int, int] | None) -> None:
    """Raise ValueError unless `tile` is three whole numbers of tokens, at least 1, or None."""
    if tile is not None and not (isinstance(tile, (tuple, list)) and len(tile) == 3):
        raise ValueError(f"tile must be three sides (frames, height, width) such as 4x4x4, got {tile!r}")
    for side in tile or ():
        check_block("tile", side)


def freeze_lists(owner: Any) -> None:
    """Make tuples of the lists and ranges among the fields of `owner`, a frozen dataclass, which has to be hashable."""
    for f in _fields(type(owner)):
        if isinstance(value := getattr(owner, f.name), (list, range)):
            object.__setattr__(owner, f.name, tuple(value))


def check_list(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a list, a tuple or a range."""
    if not isinstance(value, (list, tuple, range)):
        raise ValueError(f"{name} must be a list or a tuple of numbers, also where there is one, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """Raise ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")


def _fields(cls: type[Any]) -> tuple[Field[Any], ...]:
    return fields(cls)


def _type_of(cls: type[Any], name: str) -> Any:
    known = [f.name for f in _fields(cls)]
    if name not in known:
        owner = getattr(cls, "name", cls.__name__.lower())
        raise ValueError(f"{owner} has no parameter {name!r}; {nearest(name, known)}")
    return get_type_hints(cls)[name]


def _convert(name: str, kind: Any, value: Any) -> Any:
    options = get_args(kind) if get_origin(kind) is Union or type(kind).__name__ == "UnionType" else (kind,)
    if type(None) in options and (value is None or value == "none"):
        return None
    for option in options:
        converted = _as(option, value)
        if converted is not None:
            return converted
    words = [_words(option) for option in options]
    if type(None) not in options and any(_has_any_length(get_args(option)) for option in options):
        words.append("none")
    raise ValueError(f"{name} must be {' or '.join(words)}, got {value!r}")


def _as(kind: Any, value: Any) -> Any:
    """`value` as `kind`, or None where it is not one."""
    if get_origin(kind) is tuple:
        return _as_tuple(get_args(kind), value)
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())
    if isinstance(value, bool):
        return None
    if kind is str:
        return value if isinstance(value, str) else None
    if kind in (int, float) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
            return int(value) if kind is int and number == int(number) else number if kind is float else None
        except (ValueError, OverflowError):
            return None
    return None


def _as_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...] | None:
    if _has_any_length(kinds) and value == "none":
        return ()
    parts = value.replace("x", ",").split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        return None
    if _has_any_length(kinds):
        kinds = (kinds[0],) * len(parts)
    if len(parts) != len(kinds):
        return None
    converted = tuple(_as(kind, part) for kind, part in zip(kinds, parts, strict=True))
    return None if any(part is None for part in converted) else converted


def _has_any_length(kinds: tuple[Any, ...]) -> bool:
    return len(kinds) == 2 and kinds[1] is Ellipsis


def _words(kind: Any) -> str:
    if kind is type(None):
        return "none"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return _tuple_words(get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def _tuple_words(kinds: tuple[Any, ...]) -> str:
    if _has_any_length(kinds):
        example = {int: "whole numbers, such as 0,1", float: "numbers, such as 0.2,0.5"}
        return f"{example.get(kinds[0], 'values')}, with commas between"
    if kinds[0] is bool:
        return f"{len(kinds)} of true and false such as true,false,false"
    joined = "x".join(("4", "8", "8")[: len(kinds)]) if kinds[0] is int else ",".join(("0.5", "0.25")[: len(kinds)])
    return f"{len(kinds)} numbers such as {joined}"
