"""What only one of CogVideoX, HunyuanVideo and FLUX has."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from dit_sparse import AdaSpa, Schedule, TokenGrid, sparsify, statistics, unsparsify
from dit_sparse.pipelines import session_of, token_grid
from dit_sparse.pipelines.flux import FluxAdapter, _grid_of_ids
from dit_sparse.pipelines.hunyuan_video import HunyuanVideoAdapter
from dit_sparse.pipelines.ltx_video import LTXVideoAdapter
from tests.pipelines.families import FAMILIES, KINDS, METHODS
from tests.pipelines.tiny_families import tiny_cogvideox, tiny_flux, tiny_hunyuan_video

BY_NAME = {family.name: family for family in FAMILIES}
COGVIDEOX, HUNYUAN, FLUX = (BY_NAME[name] for name in ("cogvideox", "hunyuan_video", "flux"))


def test_cogvideox_2b_has_no_rotary_embedding() -> None:
    pipe = tiny_cogvideox(rotary=False)
    want = COGVIDEOX.run(pipe)
    for method in KINDS:
        got = COGVIDEOX.run(sparsify(pipe, Schedule(method, dense_layers=(0, 1))))
        # In tile order the rows are added up in another order.
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    COGVIDEOX.run(sparsify(pipe, METHODS[0]))
    assert 0.3 < statistics(pipe).sparse_density < 0.7


@pytest.mark.parametrize(("frames", "tokens"), [(9, 2), (13, 2)])
def test_cogvideox_1_5_patches_frames_too(frames: int, tokens: int) -> None:
    """An odd number of latent frames is filled up by the pipeline."""
    pipe = tiny_cogvideox(patch_size_t=2)
    assert token_grid(pipe, 32, 48, frames) == TokenGrid(tokens, 8, 12, 16, text_first=True)
    COGVIDEOX.run(sparsify(pipe, AdaSpa(density=0.5, block=16)), num_frames=frames)
    assert {key[0] for key in session_of(pipe).previous} == {TokenGrid(tokens, 8, 12, 16, text_first=True)}


def test_cogvideox_refuses_an_attention_mask() -> None:
    pipe = sparsify(tiny_cogvideox(), AdaSpa())
    with pytest.raises(ValueError, match="attention_mask must be None with sparse attention"):
        COGVIDEOX.run(pipe, attention_kwargs={"attention_mask": torch.ones(1, 304)})


def test_cogvideox_projections_are_fused_and_parted_at_any_time() -> None:
    """It puts other processors in, and keeps the ones it finds to put them back."""
    want, fused = COGVIDEOX.run(tiny_cogvideox()), tiny_cogvideox()
    fused.fuse_qkv_projections()
    want_fused = COGVIDEOX.run(fused)
    pipe = sparsify(tiny_cogvideox(), Schedule(AdaSpa(), warmup=1.0))
    for _ in range(2):
        pipe.fuse_qkv_projections()
        assert torch.equal(COGVIDEOX.run(pipe), want_fused)
        assert statistics(pipe).dense_calls == {"warm-up": 8}
        pipe.unfuse_qkv_projections()
        assert torch.equal(COGVIDEOX.run(pipe), want)
        assert statistics(pipe).dense_calls == {"warm-up": 8}


@pytest.mark.parametrize("runs", [True, False])
def test_cogvideox_projections_fused_while_sparse_stay_fused(runs: bool) -> None:
    pipe = sparsify(tiny_cogvideox(), AdaSpa(density=0.5, block=16))
    pipe.fuse_qkv_projections()
    if runs:
        COGVIDEOX.run(pipe)
    unsparsify(pipe)
    names = {type(processor).__name__ for processor in pipe.transformer.attn_processors.values()}
    assert names == {"FusedCogVideoXAttnProcessor2_0"}
    pipe.unfuse_qkv_projections()
    names = {type(processor).__name__ for processor in pipe.transformer.attn_processors.values()}
    assert names == {"CogVideoXAttnProcessor2_0"}
    assert torch.equal(COGVIDEOX.run(pipe), COGVIDEOX.run(tiny_cogvideox()))


def test_hunyuan_video_leaves_the_texts_refiner_alone() -> None:
    pipe = tiny_hunyuan_video()
    before = pipe.transformer.context_embedder.token_refiner.refiner_blocks[0].attn.processor
    sparsify(pipe, AdaSpa())
    assert pipe.transformer.context_embedder.token_refiner.refiner_blocks[0].attn.processor is before


def test_hunyuan_video_with_an_image_in_the_first_frames_place_keeps_its_order() -> None:
    pipe = tiny_hunyuan_video(image_condition_type="token_replace")
    assert not HunyuanVideoAdapter().takes_order(pipe.transformer, {})
    got = HUNYUAN.run(sparsify(pipe, METHODS[0]))
    assert torch.isfinite(got).all()
    assert 0.3 < statistics(pipe).sparse_density < 0.7


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 3, 4), (1, 1, 1)])
@pytest.mark.parametrize("batched", [False, True])
def test_flux_reads_its_grid_from_the_image_ids(shape, batched: bool) -> None:
    ids = torch.cartesian_prod(*(torch.arange(n) for n in shape)).to(torch.bfloat16)
    assert _grid_of_ids(ids[None] if batched else ids) == shape


def test_flux_refuses_ids_that_are_no_grid() -> None:
    image = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    reference = torch.cartesian_prod(torch.ones(1), torch.arange(2.0), torch.arange(6.0))
    with pytest.raises(ValueError, match="got 36 tokens of 2 images, 4 rows and 6 columns; reference images"):
        _grid_of_ids(torch.cat([image, reference]))
    with pytest.raises(ValueError, match="img_ids must number one grid in raster order"):
        _grid_of_ids(image.flip(0))


def test_flux_keeps_the_order_under_a_controlnet() -> None:
    """Its residuals stand in raster order."""
    transformer = tiny_flux().transformer
    assert FluxAdapter().takes_order(transformer, {})
    assert not FluxAdapter().takes_order(transformer, {"controlnet_block_samples": [torch.zeros(1)]})


def test_flux_refuses_ip_adapters_before_and_after_sparsify() -> None:
    pipe = tiny_flux()
    block = pipe.transformer.transformer_blocks[0]
    upstream, adapter = block.attn.processor, FluxIPAdapterAttnProcessor(32, 32)
    block.attn.processor = adapter
    with pytest.raises(ValueError, match="must be diffusers' FluxAttnProcessor, got FluxIPAdapterAttnProcessor"):
        sparsify(pipe, AdaSpa())
    del block.attn.processor
    block.attn.processor = upstream
    sparsify(pipe, AdaSpa())
    del block.attn.processor
    block.attn.processor = adapter
    with pytest.raises(ValueError, match="was replaced after sparsify, got FluxIPAdapterAttnProcessor"):
        FLUX.run(pipe)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        (COGVIDEOX, (36, 48, 9), "height must be a multiple of 8, got 36; try 32"),
        (COGVIDEOX, (32, 48, 10), "frames must be 1 more than a multiple of 4, got 10; try 9"),
        (HUNYUAN, (64, 90, 9), "width must be a multiple of 16, got 90; try 80"),
        (FLUX, (33, 48, 1), "height must be a multiple of 2, got 33; try 32"),
        (FLUX, (32, 48, 5), "frames must be 1, got 5: FLUX makes single images"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(family, size, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_grid(family.make(), *size)


def test_ltx_video_refuses_tokens_that_are_no_grid() -> None:
    adapter, hidden = LTXVideoAdapter(), torch.zeros(1, 300, 8)
    for sizes in ((3, 8, 12), (None, 8, 12)):
        inputs = {"hidden_states": hidden, **dict(zip(("num_frames", "height", "width"), sizes, strict=True))}
        with pytest.raises(ValueError, match="must multiply to the 300 tokens"):
            adapter.layout(None, inputs)


def test_flux_refuses_an_ip_adapter_that_is_loaded_after_sparsify() -> None:
    """diffusers makes the processors that have no adapter anew, by their class alone."""
    pipe = sparsify(tiny_flux(), AdaSpa())
    with pytest.raises(
        ValueError, match="SparseFluxAttnProcessor must be made by sparsify, got no session; unsparsify"
    ):
        pipe.transformer._convert_ip_adapter_attn_to_diffusers([])
