"""What diffusers is today is what the adapters were written for; where it is not, sparsify refuses, or runs dense."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

from dit_sparse import AdaSpa, Schedule, sparsify, statistics, unsparsify
from dit_sparse.pipelines import NotSparseError, observe, session_of
from dit_sparse.pipelines.families import adapter_for
from dit_sparse.pipelines.statistics import CHANGED
from dit_sparse.pipelines.upstream import changes, fingerprint, fingerprints
from tests.pipelines.families import FAMILIES, Family

pytestmark = pytest.mark.guard


@pytest.fixture(params=FAMILIES, ids=str)
def family(request) -> Family:
    return request.param


@pytest.fixture
def pipe(family: Family) -> Any:
    return family.make()


@pytest.fixture
def changed(pipe, monkeypatch) -> str:
    """The family's processors take one argument more, and the name of one of them."""

    def grown(call: Any) -> Any:
        def grown_call(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        taken = inspect.signature(call)
        new = inspect.Parameter("new", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        grown_call.__signature__ = taken.replace(parameters=[*taken.parameters.values(), new])
        return grown_call

    processors = list(adapter_for(pipe).processors)
    for processor in processors:
        monkeypatch.setattr(processor, "__call__", grown(processor.__call__))
    return processors[0].__name__


def test_the_installed_diffusers_is_what_the_adapters_were_written_for(pipe) -> None:
    adapter = adapter_for(pipe)
    assert changes(adapter) == []
    assert None not in fingerprints(adapter).values()


def test_a_changed_signature_is_an_error_before_anything_is_touched(pipe, family, changed) -> None:
    with pytest.raises(NotSparseError, match=rf"{changed}.__call__ takes .* or allow it with strict=False"):
        sparsify(pipe, AdaSpa(block=16))
    assert session_of(pipe) is None
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


def test_allowed_a_changed_signature_runs_dense_with_one_warning(pipe, family, changed) -> None:
    want = family.run(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsify(pipe, Schedule(AdaSpa(block=16), warmup=0, strict=False))
        for _ in range(2):
            assert torch.equal(family.run(pipe), want)
    (found,) = [w for w in caught if "cannot run sparse" in str(w.message)]
    warning = str(found.message)
    assert f"{changed}.__call__ takes (self, attn, hidden_states" in warning
    assert "new) instead of (self, attn, hidden_states" in warning
    assert found.filename == __file__
    run = statistics(pipe)
    assert run.dense_calls == {CHANGED: run.calls}
    assert {(r.step, r.layer) for r in run.records} == {
        (step, layer) for step in range(4) for layer in range(adapter_for(pipe).num_layers(pipe.transformer))
    }
    assert run.attention_seconds > 0
    assert torch.equal(family.run(unsparsify(pipe)), want)
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


def test_allowed_another_source_runs_dense_too(pipe, family, monkeypatch) -> None:
    """Such as a block's forward that gives attention something else."""
    adapter = adapter_for(pipe)
    relied = adapter.relies_on[-1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return relied(*args, **kwargs)

    forward.__module__, forward.__qualname__ = relied.__module__, relied.__qualname__
    monkeypatch.setattr(type(adapter), "relies_on", (*adapter.relies_on[:-1], forward))
    assert changes(adapter) == [
        f"{relied.__module__.removeprefix('diffusers.models.')}.{relied.__qualname__} has another source"
    ]
    with pytest.warns(UserWarning, match=f"{relied.__qualname__} has another source"):
        family.run(sparsify(pipe, AdaSpa(block=16), strict=False))
    assert set(statistics(pipe).dense_calls) == {CHANGED}


def test_calibration_refuses_what_it_could_not_see(pipe, changed) -> None:
    with pytest.raises(ValueError, match=f"cannot run sparse: .*{changed}"), observe(pipe, lambda *_: None):
        pass


def test_sparsify_does_not_warn_otherwise(pipe) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(pipe, AdaSpa())


def _twice(x: int, y: str = "a") -> int:
    """Doubles."""
    return x * 2  # two


def test_a_fingerprint_is_of_what_a_function_does() -> None:
    ours = fingerprint(_twice)

    def _twice_at_heart(x, y="a"):
        return x * 2

    def _another(x: int, y: str = "b") -> int:
        """Doubles."""
        return x * 2  # two

    source = inspect.getsource
    renamed = {_twice_at_heart: source(_twice_at_heart).replace("_at_heart", ""), _another: source(_another)}
    renamed[_another] = renamed[_another].replace("_another", "_twice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", renamed.__getitem__)
        assert fingerprint(_twice_at_heart) == ours
        assert fingerprint(_another) != ours


def test_without_a_source_there_is_no_fingerprint() -> None:
    assert fingerprint(eval("lambda: 1")) is None
