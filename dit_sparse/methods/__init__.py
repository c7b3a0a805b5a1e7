"""One file a published method, found here by name."""

from __future__ import annotations

from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.anchor import AnchorAttention
from dit_sparse.methods.bigbird import BigBird
from dit_sparse.methods.blade import Blade
from dit_sparse.methods.dense import Dense
from dit_sparse.methods.dfsattn import DfsAttention
from dit_sparse.methods.dhsa import Dhsa
from dit_sparse.methods.draft import DraftAttention
from dit_sparse.methods.lea import LeastError
from dit_sparse.methods.losa import LoSA
from dit_sparse.methods.lserve import LServe
from dit_sparse.methods.lvsa import Lvsa
from dit_sparse.methods.minference import MInference
from dit_sparse.methods.neighborhood import Neighborhood
from dit_sparse.methods.oracle import Oracle
from dit_sparse.methods.parameters import Parameter, nearest, parameters, parse_parameter, read_parameter
from dit_sparse.methods.paro import Paro
from dit_sparse.methods.pbs import PbsAttention
from dit_sparse.methods.pisa import Pisa
from dit_sparse.methods.plugins import load_plugins
from dit_sparse.methods.proxy import ProxyAttention
from dit_sparse.methods.radial import RadialAttention
from dit_sparse.methods.sale import Sale
from dit_sparse.methods.seer import SeerAttention
from dit_sparse.methods.skip import SkipSoftmax
from dit_sparse.methods.solattn import SolAttention
from dit_sparse.methods.sparge import SpargeAttention
from dit_sparse.methods.sta import SlidingTile
from dit_sparse.methods.strided import Strided
from dit_sparse.methods.svg import SparseVideoGen
from dit_sparse.methods.svg2 import SparseVideoGen2
from dit_sparse.methods.svgear import SvgEar
from dit_sparse.methods.svoo import Svoo
from dit_sparse.methods.vmoba import VMoBA
from dit_sparse.methods.xattention import XAttention
from dit_sparse.types import Method

_OWN: tuple[type[Method], ...] = (
    Dense,
    Neighborhood,
    AdaSpa,
    Paro,
    SparseVideoGen,
    SparseVideoGen2,
    RadialAttention,
    SlidingTile,
    XAttention,
    DraftAttention,
    SpargeAttention,
    VMoBA,
    Blade,
    MInference,
    PbsAttention,
    ProxyAttention,
    AnchorAttention,
    LServe,
    Dhsa,
    Sale,
    SeerAttention,
    BigBird,
    Strided,
    SvgEar,
    Svoo,
    Pisa,
    SolAttention,
    DfsAttention,
    LoSA,
    Lvsa,
    SkipSoftmax,
    LeastError,
    Oracle,
)

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _OWN}
"""The library's own methods by name; `all_methods` has those of other packages too."""


def all_methods() -> dict[str, type[Method]]:
    """The library's methods and those that installed packages register, by name."""
    return METHODS | dict(load_plugins(METHODS).methods)


def find_method(name: str) -> type[Method]:
    """The method class called `name`, here or in a package that registers it.

    Raises:
        ValueError: no such method; the nearest name is given, or why a plug-in of that name is left out.
    """
    if name in METHODS:
        return METHODS[name]
    plugins = load_plugins(METHODS)
    if name in plugins.refused:
        raise ValueError(plugins.refused[name])
    if name not in plugins.methods:
        raise ValueError(f"unknown method {name!r}; {nearest(name, [*METHODS, *plugins.methods])}")
    return plugins.methods[name]


def parse_method(text: str) -> Method:
    """The method that `text` names: a name, or `name:parameter=value+parameter=value`.

    Raises:
        ValueError: an unknown method or parameter, or a bad value.
    """
    name, _, given = text.strip().partition(":")
    cls = find_method(name)
    pairs = [pair.partition("=") for pair in given.split("+") if pair]
    return cls(**{key: parse_parameter(cls, key, value) for key, _, value in pairs})


__all__ = [
    "METHODS",
    "AdaSpa",
    "AnchorAttention",
    "BigBird",
    "Blade",
    "Dense",
    "DfsAttention",
    "Dhsa",
    "DraftAttention",
    "LServe",
    "LeastError",
    "LoSA",
    "Lvsa",
    "MInference",
    "Neighborhood",
    "Oracle",
    "Parameter",
    "Paro",
    "PbsAttention",
    "Pisa",
    "ProxyAttention",
    "RadialAttention",
    "Sale",
    "SeerAttention",
    "SkipSoftmax",
    "SlidingTile",
    "SolAttention",
    "SpargeAttention",
    "SparseVideoGen",
    "SparseVideoGen2",
    "Strided",
    "SvgEar",
    "Svoo",
    "VMoBA",
    "XAttention",
    "all_methods",
    "find_method",
    "nearest",
    "parameters",
    "parse_method",
    "parse_parameter",
    "read_parameter",
]
