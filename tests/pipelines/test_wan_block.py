"""Wan's fused block: it computes what upstream's does, gives way to what stands around a block, and comes off."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dit_sparse import AdaSpa, sparsify, unsparsify
from dit_sparse.pipelines import wan_block

pytestmark = pytest.mark.guard


class CountingHook(ModelHook):
    """Stands around a block as a cache does."""

    calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def arguments(transformer, dtype: torch.dtype) -> list:
    """Arguments of a block's forward."""
    block, draw = transformer.blocks[0], torch.Generator().manual_seed(0)
    channels = block.scale_shift_table.shape[-1]
    hidden = torch.randn(2, 3 * 8 * 12, channels, generator=draw).to(dtype)
    prompt = torch.randn(2, 7, channels, generator=draw).to(dtype)
    modulation = torch.randn(2, 6, channels, generator=draw)
    return [hidden, prompt, modulation, transformer.rope(torch.empty(2, 8, 3, 8, 12))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_on_torchs_path_it_is_upstreams_bit_for_bit(pipe, dtype, affine, monkeypatch) -> None:
    block = pipe.transformer.to(dtype).blocks[0]
    block.norm2 = block.norm2 if affine else torch.nn.Identity()
    with torch.no_grad():
        given = arguments(pipe.transformer, dtype)
        want = block(*given)
        monkeypatch.setattr(wan_block, "_applies", lambda *_: True)
        wan_block.fuse_block(block)
        assert torch.equal(block(*given), want)


def test_another_norm_is_left_to_upstream(pipe) -> None:
    block, given = pipe.transformer.blocks[0], arguments(pipe.transformer, torch.float32)
    on_gpu = type("OnGpu", (), {"is_cuda": True})()
    assert wan_block._applies(block, on_gpu, given[2])
    block.norm1 = torch.nn.Identity()
    assert not wan_block._applies(block, on_gpu, given[2])


def test_its_signature_is_upstreams() -> None:
    ours = list(inspect.signature(wan_block.fused_forward).parameters)[1:]
    assert ours == list(inspect.signature(WanTransformerBlock.forward).parameters)[1:]


def test_it_stays_away_from_a_cpu(pipe, monkeypatch) -> None:
    monkeypatch.setattr(wan_block, "layer_norm", None)
    block = pipe.transformer.blocks[0]
    wan_block.fuse_block(block)
    assert block(*arguments(pipe.transformer, torch.float32)).isfinite().all()


def test_a_hook_from_before_keeps_its_place(pipe) -> None:
    block, hook = pipe.transformer.blocks[0], CountingHook()
    HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "counting")
    sparsify(pipe, AdaSpa(block=16), strict=False)
    block(*arguments(pipe.transformer, torch.float32))
    assert hook.calls == 1


def test_a_hook_from_after_outlives_unsparsify(pipe) -> None:
    block, hook = pipe.transformer.blocks[0], CountingHook()
    sparsify(pipe, AdaSpa(block=16))
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(hook, "counting")
    unsparsify(pipe)
    given = arguments(pipe.transformer, torch.float32)
    assert not wan_block._applies(block, given[0], given[2])
    block(*given)
    assert hook.calls == 1
    registry.remove_hook("counting")
    sparsify(pipe, AdaSpa(block=16))
    assert wan_block._OFF not in block.__dict__


def test_unsparsify_takes_it_off_and_a_copy_has_its_own(pipe) -> None:
    sparsify(pipe, AdaSpa(block=16))
    twin = copy.deepcopy(pipe.transformer)
    assert twin.blocks[0].forward.__self__ is twin.blocks[0]
    unsparsify(pipe)
    assert all("forward" not in block.__dict__ for block in pipe.transformer.blocks)
