"""FlashAttention-4: what is passed to it, what it refuses, how one gets it; its package is a stand-in here."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels import BackendUnavailableError, flash_attention_4, get_backend, select
from dit_sparse.types import AttentionPlan, BlockMask
from tests.kernels import cases, fakes

FA4 = get_backend("fa4")
CUDA = torch.device("cuda")
MISSING = FA4.unavailable(CUDA) if torch.cuda.is_available() else "no NVIDIA GPU"


@pytest.fixture(autouse=True)
def fresh_import():
    flash_attention_4._interface.cache_clear()
    yield
    flash_attention_4._interface.cache_clear()


def stand_in(monkeypatch: pytest.MonkeyPatch, major: int, tile: tuple[int, int] = (128, 128)) -> None:
    fakes.install_fa4(monkeypatch, tile, any_key_multiple=major >= 10)
    monkeypatch.setattr(flash_attention_4, "_major", lambda device: major)


def bounds(tokens: int, block: int) -> list[int]:
    return [*range(0, tokens, block), tokens]


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(2, 520),
    leading=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    density=st.sampled_from([0.0, 0.4, 1.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.2, -0.2]),
    major=st.sampled_from([9, 10]),
)
def test_passes_the_mask(
    tokens: int, leading: tuple[int, int], density: float, dtype: torch.dtype, scale: float, major: int
) -> None:
    query_block = 256 if major == 10 and tokens > 128 else 128
    q_order, kv_order = (cases.random_order([bounds(tokens, b)], 1, 1) for b in (query_block, 128))
    kept = torch.rand(*leading, q_order.num_blocks, kv_order.num_blocks, generator=cases.generator(tokens)) < density
    plan = AttentionPlan(q_order, kv_order, BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets))
    q, k, v = cases.inputs(plan, 2, 2, 16, dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        flash_attention_4._interface.cache_clear()
        stand_in(monkeypatch, major, (query_block, 128))
        assert FA4.refuses(q, k, v, plan) is None
        out, lse = FA4.forward(q, k, v, plan, scale=scale, return_lse=True)
        alone, none = FA4.forward(q, k, v, plan, scale=scale, return_lse=False)
    assert none is None
    assert torch.equal(alone, out)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), scale)


@pytest.mark.parametrize(("dim", "block_k"), [(64, 128), (96, 128), (128, 128), (192, 112), (256, 80)])
def test_hopper_blocks_follow_the_head_size(dim: int, block_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 9, (128, block_k))
    plan = cases.full_plan(300)
    q, k, v = cases.inputs(plan, 1, 1, dim, torch.bfloat16)
    assert FA4.refuses(q, k, v, plan) is None
    got = FA4.forward(q, k, v, plan, scale=0.1, return_lse=True)
    cases.assert_as_good_as_torch(got, q, k, v, cases.position_mask(plan), 0.1)


def test_larger_blocks_and_uneven_ones_that_fit_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 9)
    kept = torch.tensor([[[[True, False, False], [False, True, True], [True, True, True]]]])
    plan = cases.keeping(kept, [0, 256, 384, 500])
    q, k, v = cases.inputs(plan, 1, 2, 16, torch.bfloat16)
    assert FA4.refuses(q, k, v, plan) is None
    got = FA4.forward(q, k, v, plan, scale=0.3, return_lse=True)
    cases.assert_as_good_as_torch(got, q, k, v, cases.position_mask(plan), 0.3)


def test_refuses_blocks_kept_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 9)
    small = cases.keeping(torch.eye(4, dtype=torch.bool)[None, None], bounds(256, 64))
    q, k, v = cases.inputs(small, 1, 1, 16, torch.bfloat16)
    message = str(FA4.refuses(q, k, v, small))
    assert "its blocks are 128 queries x 128 keys here" in message
    assert "got 2 kept in part" in message
    every = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    partial = cases.keeping(every, bounds(256, 128), partial=every, predicate=lambda b, h, i, j: i >= j)
    assert "got 4 kept in part" in str(FA4.refuses(q, k, v, partial))
    monkeypatch.setattr(flash_attention_4, "_major", lambda device: 10)
    even = cases.keeping(torch.eye(2, dtype=torch.bool)[None, None], bounds(256, 128))
    assert "256 queries x 128 keys" in str(FA4.refuses(q, k, v, even))


def test_refuses_dtypes_head_sizes_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 9)
    plan = cases.full_plan(128)
    q, k, v = cases.inputs(plan, 1, 1, 16, torch.bfloat16)
    assert "got torch.float32" in str(FA4.refuses(q.float(), k.float(), v.float(), plan))
    assert "multiple of 8 up to 256" in str(FA4.refuses(q[..., :12], k[..., :12], v[..., :12], plan))
    assert "got 16 and 8" in str(FA4.refuses(q, k, v[..., :8], plan))
    wide = torch.zeros(1, 1, 128, 136, dtype=torch.bfloat16)
    monkeypatch.setattr(flash_attention_4, "_major", lambda device: 10)
    assert "multiple of 8 up to 128" in str(FA4.refuses(wide, wide, wide, plan))
    assert "no backward" in str(FA4.refuses(q.requires_grad_(), k, v, plan))


def test_converts_a_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 9)
    plan = cases.full_plan(128)
    q, k, v = cases.inputs(plan, 1, 1, 16, torch.bfloat16)
    assert FA4.refuses(q, k, v, plan) is None
    monkeypatch.setattr(BlockMask, "to_fa4", lambda self, block_size: pytest.fail("converted twice"))
    FA4.forward(q, k, v, plan, scale=0.3, return_lse=False)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    plan = cases.full_plan(128)
    q, k, v = cases.inputs(plan, 1, 1, 16, torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match=r"cannot be imported .*pip install 'dit-sparse\[fa4\]'"):
        select("fa4", q, k, v, plan)


def test_says_which_machine_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install_fa4(monkeypatch, (128, 128), any_key_multiple=False)
    assert "CUDA only" in str(FA4.unavailable(torch.device("cpu")))
    for capability, ready in (((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, got=capability: got)
        assert (FA4.unavailable(CUDA) is None) == ready
    assert "this GPU has 12.0" in str(FA4.unavailable(CUDA))


def test_an_older_interface_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install_fa4(monkeypatch, (128, 128), any_key_multiple=False)
    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_func", lambda q, k, v, full_block_cnt=None: None)
    assert "older than 4.0.0b11" in str(FA4.unavailable(CUDA))


@pytest.mark.gpu
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu(dim: int) -> None:
    block_q = 128 if torch.cuda.get_device_capability()[0] == 9 else 256
    q_order, kv_order = (cases.random_order([bounds(1000, b)], 1, 3) for b in (block_q, 128))
    kept = torch.rand(1, 3, q_order.num_blocks, kv_order.num_blocks, generator=cases.generator(1)) < 0.4
    kept[:, 1, 0] = False
    plan = AttentionPlan(q_order, kv_order, BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets))
    q, k, v = cases.inputs(plan, 2, 3, dim, torch.bfloat16)
    on_gpu = (q.cuda(), k.cuda(), v.cuda())
    assert select("fa4", *on_gpu, plan.to("cuda")).name == "fa4"
    out, lse = FA4.forward(*on_gpu, plan.to("cuda"), scale=0.1, return_lse=True)
    assert lse is not None
    cases.assert_as_good_as_torch((out.cpu(), lse.cpu()), q, k, v, cases.position_mask(plan), 0.1)
