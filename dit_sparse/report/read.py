"""Reads what runs wrote, and says in one line what is wrong with it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["inside", "median", "number", "read_object", "require", "require_config", "require_kinds"]

_KINDS: dict[str, Any] = {
    "a number": (int, float, type(None)),
    "a text": (str, type(None)),
    "an object": dict,
    "a list": list,
}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        ValueError: not JSON, cut short, or no object.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path} is no JSON, or was cut short{where}: make it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def require(value: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    """Raise ValueError where `value` lacks one of `keys`; `what` says whose they are."""
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{what} has no {missing[0]!r}: another version of dit-sparse wrote it; run it again")


def require_kinds(value: Mapping[str, Any], kinds: Mapping[str, str], what: str) -> None:
    """Raise ValueError where `value` has something of another kind than `kinds` names for it.

    Args:
        kinds: "a number" or "a text", both of which `None` is too, "an object" or "a list".
        what: whose they are.
    """
    for key in kinds.keys() & value.keys():
        one, kind = value[key], kinds[key]
        if isinstance(one, bool) or not isinstance(one, _KINDS[kind]):
            raise ValueError(f"{what} must have {kind} as {key!r}, got {one!r:.80}: mend it, or run it again")


def require_config(config: Mapping[str, Any], what: str) -> None:
    """Raise ValueError where `config` is none of a method; `what` says whose it is."""
    require(config, ("method",), what)
    require_kinds(config, {"method": "a text", "density": "a number"}, what)


def inside(folder: Path, name: object) -> Path:
    """The path of the file called `name` in `folder`.

    Raises:
        ValueError: no name, or one that leads out of the folder.
    """
    path = folder / str(name)
    if not isinstance(name, str) or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} must name files of its own, got {name!r}")
    return path


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def number(value: float | None, form: str, unit: str = "") -> str:
    """`value` as text; a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"
