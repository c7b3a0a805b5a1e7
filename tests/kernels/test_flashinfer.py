"""FlashInfer: what is passed to it, what it refuses, how one gets it; its package is a stand-in here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels import BackendUnavailableError, flashinfer, get_backend, select
from dit_sparse.types import AttentionPlan, BlockMask
from tests.kernels import cases, fakes

FLASHINFER = get_backend("flashinfer")
CUDA = torch.device("cuda")
MISSING = FLASHINFER.unavailable(CUDA) if torch.cuda.is_available() else "no NVIDIA GPU"


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(flashinfer, "_workspace", lambda device, stream: torch.empty(16, dtype=torch.uint8))


@settings(max_examples=25, deadline=None)
@given(
    bounds=st.sampled_from([cases.EVEN, cases.RAGGED, cases.TEXT, cases.UNEVEN]),
    leading=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]),
    density=st.sampled_from([0.2, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.2, -0.2]),
)
def test_passes_the_mask(
    bounds: list[int], leading: tuple[int, int], density: float, dtype: torch.dtype, scale: float
) -> None:
    plan = cases.random_plan(bounds, batch=leading[0], heads=leading[1], density=density)
    if not plan.block_mask.full_blocks.any():
        return
    q, k, v = cases.inputs(plan, 2, 3, 64, dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(flashinfer, "_workspace", lambda device, stream: torch.empty(16, dtype=torch.uint8))
        fakes.install_flashinfer(monkeypatch)
        refusal = FLASHINFER.refuses(q, k, v, plan)
        if refusal is not None:
            # Nothing but blocks without a token is kept.
            assert not cases.position_mask(plan).any()
            return
        out, lse = FLASHINFER.forward(q, k, v, plan, scale=scale, return_lse=True)
        alone, none = FLASHINFER.forward(q, k, v, plan, scale=scale, return_lse=False)
    assert none is None
    assert torch.equal(alone, out)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), scale)


def test_rows_that_keep_nothing_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install_flashinfer(monkeypatch)
    kept = torch.tensor([[[[True, False], [False, False]]]])
    plan = cases.keeping(kept, [0, 30, 50])
    q, k, v = cases.inputs(plan, 1, 2, 64, torch.bfloat16)
    out, lse = FLASHINFER.forward(q, k, v, plan, scale=0.3, return_lse=True)
    assert lse is not None
    assert not out[:, :, 30:].any()
    assert lse[:, :, 30:].isneginf().all()
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)


def test_plans_once_for_a_shape_dtype_and_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install_flashinfer(monkeypatch)
    made = []
    monkeypatch.setattr(
        fakes.VariableBlockSparseAttentionWrapper, "__init__", lambda self, workspace: made.append(workspace)
    )
    plan = cases.random_plan(cases.EVEN, density=1.0)
    for heads, dtype, scale in ((1, torch.float16, 0.3), (2, torch.float16, 0.3), (2, torch.bfloat16, 0.3)):
        q, k, v = cases.inputs(plan, 1, heads, 64, dtype)
        FLASHINFER.forward(q, k, v, plan, scale=scale, return_lse=False)
        FLASHINFER.forward(q, k, v, plan, scale=scale, return_lse=False)
    assert len(made) == 3
    FLASHINFER.forward(q, k, v, plan, scale=0.5, return_lse=False)
    assert len(made) == 4


def test_refuses_what_it_cannot_compute() -> None:
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 64, torch.bfloat16)
    assert FLASHINFER.refuses(q, k, v, plan) is None
    assert "got torch.float32" in str(FLASHINFER.refuses(q.float(), k.float(), v.float(), plan))
    assert "64, 128 or 256" in str(FLASHINFER.refuses(q[..., :32], k[..., :32], v[..., :32], plan))
    assert "got 64 and 32" in str(FLASHINFER.refuses(q, k, v[..., :32], plan))
    assert "no backward" in str(FLASHINFER.refuses(q.clone().requires_grad_(), k, v, plan))
    every = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    partial = cases.keeping(every, cases.EVEN, partial=every, predicate=lambda b, h, i, j: i >= j)
    assert "got 36 partial ones" in str(FLASHINFER.refuses(q, k, v, partial))
    nothing = cases.keeping(~every, cases.EVEN)
    assert "at least one block, got none" in str(FLASHINFER.refuses(q, k, v, nothing))


def test_refuses_an_index_beyond_int32() -> None:
    tokens = 1 << 25
    offsets = torch.arange(0, tokens + 1, tokens // 16, dtype=torch.int32)[None, None]
    order = cases.full_plan(16, 1).q_order
    every = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    plan = AttentionPlan(order, order, BlockMask.from_bool(every, offsets, offsets))
    shapes = [torch.empty(1, heads, tokens, 64, dtype=torch.bfloat16, device="meta") for heads in (3, 4)]
    assert FLASHINFER.refuses(*[shapes[0]] * 3, plan) is None
    assert f"got {4 * 16 * tokens}" in str(FLASHINFER.refuses(*[shapes[1]] * 3, plan))


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer.importlib.util, "find_spec", lambda name: None)
    plan = cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(plan, 1, 1, 64, torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'dit-sparse\[flashinfer\]'"):
        select("flashinfer", q, k, v, plan)
    monkeypatch.setattr(flashinfer.importlib.util, "find_spec", lambda name: object())
    assert "CUDA only" in str(FLASHINFER.unavailable(torch.device("cpu")))
    for capability, ready in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, got=capability: got)
        assert (FLASHINFER.unavailable(CUDA) is None) == ready


@pytest.mark.gpu
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu(dim: int) -> None:
    plan = cases.random_plan([0, 128, 300, 300, 555, 900, 1000], batch=1, heads=3)
    kept = plan.block_mask.full_blocks.clone()
    kept[0, 1, 0] = False
    plan = AttentionPlan.from_kept(plan.q_order, kept)
    q, k, v = cases.inputs(plan, 2, 3, dim, torch.bfloat16)
    on_gpu = (q.cuda(), k.cuda(), v.cuda())
    assert select("flashinfer", *on_gpu, plan.to("cuda")).name == "flashinfer"
    out, lse = FLASHINFER.forward(*on_gpu, plan.to("cuda"), scale=0.1, return_lse=True)
    assert lse is not None
    cases.assert_as_good_as_torch((out.cpu(), lse.cpu()), q, k, v, cases.position_mask(plan), 0.1)
