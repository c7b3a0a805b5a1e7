"""Methods of other packages, found through their entry points in the group `dit_sparse.methods`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dit_sparse.types import Method

GROUP = "dit_sparse.methods"
_ATTRIBUTES = ("name", "version", "paper", "scope", "refresh", "uses_lse", "check", "shared_order", "plan")


@dataclass(frozen=True)
class Plugins:
    """What entry points gave.

    Args:
        methods: usable classes by name.
        refused: why a name cannot be used.
    """

    methods: Mapping[str, type[Method]]
    refused: Mapping[str, str]


def load_plugins(built_in: Mapping[str, type[Method]]) -> Plugins:
    """The methods of installed packages; a plug-in that cannot be used is left out with one warning that names it.

    Args:
        built_in: the library's own methods, whose names nobody else may take.
    """
    return _load(tuple(sorted(entry_points(group=GROUP), key=_label)), tuple(built_in))


@lru_cache(maxsize=4)
def _load(points: tuple[EntryPoint, ...], built_in: tuple[str, ...]) -> Plugins:
    methods: dict[str, type[Method]] = {}
    refused: dict[str, str] = {}
    owners: dict[str, list[str]] = {}
    for point in points:
        owners.setdefault(point.name, []).append(_label(point))
    for point in points:
        try:
            if point.name in built_in:
                raise ValueError(f"{point.name!r} is a method of dit-sparse itself: choose another name")
            if len(owners[point.name]) > 1:
                raise ValueError(f"{point.name!r} is claimed by {' and by '.join(owners[point.name])}: uninstall one")
            methods[point.name] = _method(point)
        # Whatever another package's import raises, the library goes on without it and says so.
        except Exception as error:  # noqa: BLE001
            refused[point.name] = f"plug-in {_label(point)} is left out: {type(error).__name__}: {error}"
            warnings.warn(refused[point.name], stacklevel=2)
    return Plugins(methods, refused)


def _method(point: EntryPoint) -> type[Method]:
    cls = point.load()
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise TypeError(f"{point.value} must be a frozen dataclass, got {cls!r}")
    found: Any = cls
    missing = [name for name in _ATTRIBUTES if not hasattr(cls, name)]
    if missing:
        raise TypeError(f"{point.value} lacks {', '.join(missing)}: see docs/add-a-method.md")
    if found.name != point.name:
        raise ValueError(f"{point.value} is called {found.name!r}: name the entry point like the method")
    if not found.__dataclass_params__.frozen:
        raise TypeError(f"{point.value} must be a frozen dataclass: methods keep no state")
    return found


def _label(point: EntryPoint) -> str:
    package = "an unknown package" if point.dist is None else point.dist.name
    return f"{point.name!r} of {package} ({point.value})"
