"""Tables of coefficients by device: the package's own, and one that `dit-sparse doctor --measure` writes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE_VARIABLE = "DIT_SPARSE_COSTS"
"""Environment variable that names a table to look a device up in before all others."""

OWN_TABLE = Path(__file__).with_name("devices.json")


@dataclass(frozen=True)
class KernelCosts:
    """Coefficients of one sparse backend.

    Args:
        call: seconds a sparse call takes beyond its work.
        kernel: time over density x dense attention, by tokens a block.
        partial: time of a block that a predicate cuts, over a whole one's.
        move: seconds a token, head and channel for moving q, k, v and the output into another order and back.
        remainder: time of each remainder over dense attention, for blocks of 64; half of that for 128.
    """

    call: float
    kernel: Mapping[int, float]
    partial: float
    move: float
    remainder: Mapping[str, float]


@dataclass(frozen=True)
class DeviceCosts:
    """Coefficients of one device.

    Args:
        source: where they come from, for people.
        flops: operations a second of dense attention, where 4 x heads x tokens^2 x channels are needed.
        threads: of the CPU that `flops` was measured with; 0 on a GPU.
        backends: coefficients by backend.
        plans: time of one plan by method, over dense attention: `(a, b)` for `a + b / tokens`.
        other_plans: the same of a method that is not among them.
    """

    source: str
    flops: float
    threads: int
    backends: Mapping[str, KernelCosts]
    plans: Mapping[str, tuple[float, float]]
    other_plans: tuple[float, float]

    def plan(self, method: str, tokens: int) -> float:
        """Time of one plan over dense attention."""
        a, b = self.plans.get(method, self.other_plans)
        return a + b / tokens


def costs_of(device: torch.device) -> DeviceCosts:
    """The coefficients of `device`: those that the variable `DIT_SPARSE_COSTS` or the user's own table has, else ours.

    A GPU that is in none gets cautious ones, for the portable kernel.

    Raises:
        ValueError: a table that cannot be read.
    """
    name, given = device_name(device).lower(), os.environ.get(TABLE_VARIABLE)
    paths = [OWN_TABLE]
    if user_table().is_file():
        paths.insert(0, user_table())
    if given is not None:
        paths.insert(0, Path(given))
    for path in paths:
        found = next((costs for key, costs in _table(path).items() if key.lower() in name), None)
        if found is not None:
            return found
    return _table(OWN_TABLE)["unknown GPU"]


def _table(path: Path) -> dict[str, DeviceCosts]:
    return _read_once(path, path.stat().st_mtime_ns) if path.is_file() else read_table(path)


@lru_cache(maxsize=8)
def _read_once(path: Path, changed: int) -> dict[str, DeviceCosts]:
    return read_table(path)


def device_name(device: torch.device) -> str:
    """By what a table knows `device`: a GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def user_table() -> Path:
    """Where `dit-sparse doctor --measure` writes its table."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "dit-sparse" / "costs.json"


def read_table(path: Path) -> dict[str, DeviceCosts]:
    """The coefficients in the file `path`, by a part of the device's name.

    Raises:
        ValueError: no such file, or no such table.
    """
    try:
        return {name: _device(entry) for name, entry in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"cost table {str(path)!r} cannot be used: {type(error).__name__}: {error}; delete it, or write it again "
            f"with `dit-sparse doctor --measure` (the variable {TABLE_VARIABLE} names another)"
        ) from None


def _device(entry: dict[str, Any]) -> DeviceCosts:
    own = {f.name: entry[f.name] for f in fields(DeviceCosts)}
    own["backends"] = {name: _kernel(costs) for name, costs in own["backends"].items()}
    own["plans"] = {name: _pair(pair) for name, pair in own["plans"].items()}
    own["other_plans"] = _pair(own["other_plans"])
    if not own["flops"] > 0:
        raise ValueError(f"flops must be above 0, got {own['flops']}")
    return DeviceCosts(**own)


def _kernel(entry: dict[str, Any]) -> KernelCosts:
    own = {f.name: entry[f.name] for f in fields(KernelCosts)}
    own["kernel"] = {int(block): float(ratio) for block, ratio in own["kernel"].items()}
    if not own["kernel"]:
        raise ValueError("kernel must have a block size")
    return KernelCosts(**own)


def _pair(pair: Any) -> tuple[float, float]:
    a, b = pair
    return float(a), float(b)
