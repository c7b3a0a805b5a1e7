"""Wan's fused block: it computes what upstream's does, gives way to what stands around a block, and comes off."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dit_sparse import AdaSpa, Schedule, sparsify, unsparsify
from dit_sparse.kernels import gelu_tanh_
from dit_sparse.pipelines import wan_block
from dit_sparse.pipelines.wan import WanAdapter

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


@pytest.mark.parametrize(
    ("tokens", "alike"),
    [([[1, 2, 3]], 1), ([[1, 0, 0]], 2), ([[0, 0, 0]], 3), ([[0, 5, 0]], 1), ([[1, 0, 0], [1, 2, 0]], 1)],
)
def test_tokens_alike_at_the_end_are_counted(tokens, alike) -> None:
    assert wan_block.alike_at_end(torch.tensor(tokens)[..., None].expand(-1, -1, 4).float()) == alike


@pytest.mark.parametrize("alike", [1, 2, 48, 63, 64])
def test_merged_text_attends_as_the_whole(pipe, alike) -> None:
    attn, hidden = pipe.transformer.blocks[0].attn2.double(), torch.randn(2, 30, 24).double()
    text = torch.randn(2, 64, 24).double()
    text[:, -alike:] = text[:, -1:]
    kept, mask = wan_block.merged(text, alike)
    assert kept.shape[1] == min(64, -(-(65 - alike) // 16) * 16)
    want = attn(hidden, text, None, None)
    assert (attn(hidden, kept, mask, None) - want).abs().max() <= 1e-12
    if mask is not None and alike < 64:
        assert (attn(hidden, kept, None, None) - want).abs().max() > 1e-4, "the mask changed nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [7, 50, 300])
@torch.no_grad()
def test_merged_text_errs_as_torch_in_16_bits(pipe, tokens, dtype) -> None:
    """The logarithm that stands for hundreds of tokens must not be rounded to these types."""
    attn, hidden, text = pipe.transformer.blocks[0].attn2.to(dtype), torch.randn(2, 30, 24), torch.randn(2, 512, 24)
    hidden, text = hidden.to(dtype), text.to(dtype)
    text[:, tokens:] = 0.0
    want = copy.deepcopy(attn).double()(hidden.double(), text.double(), None, None)
    low = (attn(hidden, text, None, None) - want).norm()
    assert (attn(hidden, *wan_block.merged(text, 512 - tokens), None) - want).norm() <= 2 * low


def keys_seen(pipe, run) -> list[int]:
    """Text tokens of every cross-attention of the first block while `run` runs."""
    seen = []
    handle = pipe.transformer.blocks[0].attn2.register_forward_pre_hook(lambda _, args: seen.append(args[1].shape[1]))
    run()
    handle.remove()
    return seen


def test_prompts_are_merged_in_sparse_steps_alone(pipe, render, monkeypatch) -> None:
    """A step has two forwards; the dense ones see all of the padding, and no picture changes."""
    sparsify(pipe, Schedule(AdaSpa(density=0.5, block=16), warmup=0.4))
    got = []
    run = lambda: got.append(render(pipe, max_sequence_length=64))  # noqa: E731
    assert keys_seen(pipe, run) == [64] * 4 + [16] * 6
    assert not any(wan_block._ALIKE in block.__dict__ for block in pipe.transformer.blocks)
    monkeypatch.setattr(WanAdapter, "begin_forward", lambda *_: None)
    assert keys_seen(pipe, run) == [64] * 10
    assert (got[0] - got[-1]).abs().max() <= 1e-4 * got[-1].abs().max()


def test_prompts_stay_whole_in_a_dense_layer(pipe, render) -> None:
    sparsify(pipe, Schedule(AdaSpa(density=0.5, block=16), warmup=0.4, dense_layers=(0,)))
    assert keys_seen(pipe, lambda: render(pipe, max_sequence_length=64)) == [64] * 10


def test_prompts_are_left_whole_where_somebody_chose_how_to_attend(pipe, render) -> None:
    sparsify(pipe, Schedule(AdaSpa(density=0.5, block=16), warmup=0.4))
    pipe.transformer.blocks[0].attn2.set_attention_backend("_native_math")
    assert keys_seen(pipe, lambda: render(pipe, max_sequence_length=64)) == [64] * 10
    unsparsify(pipe)
    assert not any(wan_block._ALIKE in block.__dict__ for block in pipe.transformer.blocks)


def test_prompts_that_are_learnt_stay_whole(pipe) -> None:
    blocks, text = pipe.transformer.blocks, torch.zeros(1, 64, 24, requires_grad=True)
    wan_block.merge_text(blocks, text)
    assert wan_block._ALIKE not in blocks[0].__dict__
    with torch.no_grad():
        wan_block.merge_text(blocks, text)
    assert blocks[0].__dict__[wan_block._ALIKE] == 64


@torch.no_grad()
def test_a_feed_forward_in_parts_is_the_whole(pipe, monkeypatch) -> None:
    ffn, x = pipe.transformer.blocks[0].ffn, torch.randn(2, 30, 24)
    monkeypatch.setattr(wan_block, "_FFN_TOKENS", 8)
    exact = copy.deepcopy(ffn).double()(x.double())
    parts = []
    monkeypatch.setattr(wan_block, "gelu_tanh_", lambda h: parts.append(h.shape[1]) or gelu_tanh_(h))
    assert (wan_block.feed_forward(ffn, x) - exact).abs().max() <= 2 * (ffn(x) - exact).abs().max() + 1e-7
    assert parts == [8, 8, 8, 6]
    seen = []
    for layer in (ffn.net[0], ffn.net[0].proj):
        handle = layer.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
        wan_block.feed_forward(ffn, x)
        handle.remove()
    assert seen == [30, 30], "who hooks a layer sees its whole input"


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
