"""How a backend is chosen: by name or by default, never by falling back."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.kernels import BACKENDS, Backend, BackendUnavailableError, get_backend, register, select
from tests.kernels import cases


def test_auto_on_cpu() -> None:
    sparse, full = cases.random_plan(cases.EVEN), cases.full_plan(96)
    q, k, v = cases.inputs(sparse, 1, 1, 16)
    assert select("auto", q, k, v, sparse).name == "gather"
    assert select("auto", q, k, v, full).name == "sdpa"


@pytest.mark.parametrize("name", list(BACKENDS))
def test_backends_keep_the_protocol(name: str) -> None:
    assert isinstance(BACKENDS[name], Backend)
    assert get_backend(name).name == name


def test_an_unknown_name_gets_the_nearest() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    with pytest.raises(ValueError, match="got 'gathr'; did you mean 'gather'"):
        select("gathr", q, k, v, plan)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of reference, sdpa"):
        select("zzz", q, k, v, plan)
    for name in (None, 3, ["gather"]):
        with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*, got "):
            select(name, q, k, v, plan)


def test_a_refusal_is_an_error_that_says_why() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    with pytest.raises(ValueError, match="'sdpa' cannot compute this call: sdpa is dense"):
        select("sdpa", q, k, v, plan)


@pytest.mark.parametrize("name", ["flex", "fa4", "flashinfer"])
def test_a_remainder_that_a_backend_lacks_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.random_plan(cases.EVEN).with_remainder("mean")
    q, k, v = cases.inputs(plan, 1, 1, 16)
    monkeypatch.setattr(get_backend(name), "unavailable", lambda device: None, raising=False)
    with pytest.raises(ValueError, match=f"'{name}' cannot compute this call: it has no remainder 'mean'; use 'ref"):
        select(name, q, k, v, plan)


def test_auto_takes_a_backend_with_the_plans_remainder() -> None:
    sparse, full = (plan.with_remainder("value") for plan in (cases.random_plan(cases.EVEN), cases.full_plan(96)))
    q, k, v = cases.inputs(sparse, 1, 1, 16)
    assert select("auto", q, k, v, sparse).name == "gather"
    assert select("auto", q, k, v, full).name == "sdpa"


def test_an_unavailable_backend_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.full_plan(96)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    monkeypatch.setattr(get_backend("xformers"), "unavailable", lambda device: "pip install it", raising=False)
    with pytest.raises(BackendUnavailableError, match="'xformers' is not available on cpu: pip install it"):
        select("xformers", q, k, v, plan)


def test_names_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="got 'gather'"):
        register(get_backend("gather"))


def test_training_is_refused_by_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    with pytest.raises(ValueError, match=r"no backward; use torch.no_grad\(\)"):
        select("auto", q.requires_grad_(), k, v, plan)
    with torch.no_grad():
        assert select("auto", q, k, v, plan).name == "gather"
