"""One file a published method, found here by name."""

from __future__ import annotations

from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.dense import Dense
from dit_sparse.methods.neighborhood import Neighborhood
from dit_sparse.methods.parameters import Parameter, nearest, parameters, parse_parameter, read_parameter
from dit_sparse.methods.paro import Paro
from dit_sparse.methods.svg import SparseVideoGen
from dit_sparse.methods.svg2 import SparseVideoGen2
from dit_sparse.types import Method

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Dense, Neighborhood, AdaSpa, Paro, SparseVideoGen, SparseVideoGen2)
}


def find_method(name: str) -> type[Method]:
    """The method class called `name`.

    Raises:
        ValueError: no such method; the nearest name is given.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "AdaSpa",
    "Dense",
    "Neighborhood",
    "Parameter",
    "Paro",
    "SparseVideoGen",
    "SparseVideoGen2",
    "find_method",
    "nearest",
    "parameters",
    "parse_parameter",
    "read_parameter",
]
