"""FlexAttention as a backend; one small compilation on CPU."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.kernels import flex, get_backend
from dit_sparse.types import AttentionPlan
from tests.kernels import cases

FLEX = get_backend("flex")
MISSING = FLEX.unavailable(torch.device("cpu"))


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_compiled_flex_equals_dense_attention_under_the_mask() -> None:
    kept = torch.rand(1, 2, 4, 4, generator=cases.generator()) < 0.5
    kept[:, :, 1] = False
    plan = cases.keeping(kept, [0, 64, 128, 192, 230])
    q, k, v = cases.inputs(plan, 1, 2, 32)
    with torch.no_grad():
        got = FLEX.forward(q, k, v, plan, scale=0.3, return_lse=False)
    cases.assert_as_good_as_torch(got, q, k, v, cases.position_mask(plan), 0.3)
    assert plan in flex._masks


def test_row_sums_on_cpu_are_an_error() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    with pytest.raises(ValueError, match="return_lse must be False with 'flex' on CPU, got True; use 'gather'"):
        FLEX.forward(q, k, v, plan, scale=0.3, return_lse=True)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(flex.shutil, "which", lambda name: None)
    assert "C++ compiler" in str(FLEX.unavailable(torch.device("cpu")))
    monkeypatch.setattr(flex.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in str(FLEX.unavailable(torch.device("cpu")))
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'dit-sparse[gpu]'" in str(FLEX.unavailable(torch.device("cuda")))
    assert "CPU and CUDA only" in str(FLEX.unavailable(torch.device("meta")))


def test_refuses_float64_and_training_on_cpu() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 16)
    assert FLEX.refuses(q, k, v, plan) is None
    assert "float64" in str(FLEX.refuses(q.double(), k, v, plan))
    assert "no backward on CPU" in str(FLEX.refuses(q.requires_grad_(), k, v, plan))


@pytest.mark.parametrize(
    ("bounds", "size"), [([0, 64, 128, 200], 64), ([0, 128, 256, 300], 128), ([0, 50, 100], 128), ([0, 64], 128)]
)
def test_flex_blocks_follow_the_plans(bounds: list[int], size: int) -> None:
    count = len(bounds) - 1
    plan: AttentionPlan = cases.keeping(torch.ones(1, 1, count, count, dtype=torch.bool), bounds)
    assert (size, size) == flex._convert(plan).BLOCK_SIZE
