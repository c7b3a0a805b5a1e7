"""Reading method parameters from text and JSON."""

from __future__ import annotations

import math

import pytest

from dit_sparse.methods import (
    METHODS,
    AdaSpa,
    Dense,
    Neighborhood,
    Paro,
    PbsAttention,
    SolAttention,
    find_method,
    parameters,
    parse_parameter,
)
from dit_sparse.methods.parameters import accepts_density, check_share
from dit_sparse.schedule import Schedule


@pytest.mark.parametrize(
    ("cls", "name", "text", "value"),
    [
        (AdaSpa, "density", "0.5", 0.5),
        (AdaSpa, "block", "128", 128),
        (AdaSpa, "head-adaptive", "false", False),
        (Neighborhood, "window", "4x12x16", (4, 12, 16)),
        (Neighborhood, "window", "4,12,16", (4, 12, 16)),
        (Neighborhood, "window", "none", None),
        (Paro, "plan_file", "a.safetensors", "a.safetensors"),
        (Schedule, "dense_layers", "0,-1", (0, -1)),
        (Schedule, "dense_layers", "none", ()),
        (Schedule, "refresh", "none", None),
    ],
)
def test_text_becomes_a_value(cls: type, name: str, text: str, value: object) -> None:
    assert parse_parameter(cls, name, text) == value


@pytest.mark.parametrize(
    ("cls", "name", "text", "message"),
    [
        (AdaSpa, "density", "lots", "--density must be a number, got 'lots'"),
        (AdaSpa, "block", "1.5", "--block must be a whole number"),
        (AdaSpa, "head_adaptive", "maybe", "--head-adaptive must be true or false"),
        (AdaSpa, "dnsity", "0.5", "did you mean 'density'"),
        (Neighborhood, "window", "4xtwo", "--window must be"),
        (Neighborhood, "causal", "yes", "--causal must be true or false or 3 of true and false such as true,false"),
        (
            Schedule,
            "dense_layers",
            "a",
            "--dense-layers must be whole numbers, such as 0,1, with commas between or none",
        ),
        (
            Schedule,
            "dense_layers",
            "",
            "--dense-layers must be whole numbers, such as 0,1, with commas between or none, got ''",
        ),
        (Schedule, "refresh", "0.5,a", "--refresh must be numbers, such as 0.2,0.5, with commas between or none, got"),
        (Schedule, "noise_densities", "0.5", "--noise-densities must be 2 numbers such as 0.5,0.25 or none, got '0.5'"),
    ],
)
def test_bad_text_is_named(cls: type, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_parameter(cls, name, text)


LISTS = {
    (cls, p.name): [0.1, 0.2] if p.name == "floors" else [1, 2, 3]
    for cls in METHODS.values()
    for p in parameters(cls)
    if "tuple" in p.type
}
LISTS |= {key: [2, 3] for key in LISTS if key[1] == "place"} | {
    key: [True, False, False] for key in LISTS if key[1] == "causal"
}


@pytest.mark.parametrize(("cls", "name"), LISTS, ids=str)
def test_a_list_becomes_a_tuple(cls: type, name: str) -> None:
    """A run looks methods up by their hash."""
    given = LISTS[cls, name]
    method = cls(**{name: given})
    assert getattr(method, name) == tuple(given)
    assert hash(method) == hash(cls(**{name: tuple(given)}))


@pytest.mark.parametrize("value", [0, -0.1, 1.01, math.nan, math.inf, True, "0.5", None])
def test_shares_out_of_range(value: object) -> None:
    with pytest.raises(ValueError, match="density must be above 0 and at most 1"):
        check_share("density", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["para", "PARO", "Pero"])
def test_an_unknown_method_names_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown method '{name}'; did you mean 'paro'"):
        find_method(name)


def test_every_parameter_has_a_help_text() -> None:
    for cls in METHODS.values():
        assert all(parameter.help for parameter in parameters(cls)), cls


def test_which_methods_accept_a_density() -> None:
    accept = AdaSpa(), PbsAttention(), PbsAttention(density=None), Neighborhood(density=0.3)
    assert all(accepts_density(method) for method in accept)
    none = Dense(), Neighborhood(window=(1, 3, 3)), SolAttention(in_kernel=True)
    assert not any(accepts_density(method) for method in none)
