"""Tiny CogVideoX, HunyuanVideo, FLUX and LTX-Video pipelines with random weights, made without any download."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from tests.pipelines.tiny import TEXT_DIM, tiny_tokenizer

POOLED_DIM = 16
COGVIDEOX_TEXT = 16
"""Tokens that the tiny CogVideoX pads a prompt to."""


def tiny_cogvideox(*, patch_size_t: int | None = None, rotary: bool = True, **options: Any) -> CogVideoXPipeline:
    """32x48 pixels and 9 frames give 3x8x12 tokens (2x8x12 with `patch_size_t` 2) after 16 of text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=options.pop("heads", 2),
            attention_head_dim=16,
            in_channels=options.pop("in_channels", 4),
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=TEXT_DIM,
            num_layers=2,
            sample_width=24,
            sample_height=16,
            sample_frames=9,
            patch_size=2,
            patch_size_t=patch_size_t,
            patch_bias=patch_size_t is None,
            max_text_seq_length=COGVIDEOX_TEXT,
            use_rotary_positional_embeddings=rotary,
            **options,
        )
        widened(transformer)
        tokenizer = tiny_tokenizer()
        text_encoder = _t5(len(tokenizer))
    pipe = CogVideoXPipeline(tokenizer, text_encoder, vae.eval(), transformer, CogVideoXDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_hunyuan_video(**options: Any) -> HunyuanVideoPipeline:
    """64x96 pixels and 9 frames give 3x8x12 tokens before the padded prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        )
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=options.pop("in_channels", 4),
            out_channels=4,
            num_attention_heads=options.pop("heads", 2),
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=POOLED_DIM,
            rope_axes_dim=(4, 6, 6),
            **options,
        )
        widened(transformer)
        tokenizer = tiny_tokenizer()
        llama = LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_DIM,
                intermediate_size=32,
                num_attention_heads=4,
                num_hidden_layers=2,
                pad_token_id=0,
            )
        )
        clip = _clip(len(tokenizer))
    pipe = HunyuanVideoPipeline(
        llama.eval(),
        tokenizer,
        transformer,
        vae.eval(),
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        clip,
        tiny_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux(**options: Any) -> FluxPipeline:
    """32x48 pixels give 1x16x24 tokens after the text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
        )
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=options.pop("heads", 2),
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=POOLED_DIM,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
            **options,
        )
        widened(transformer)
        tokenizer = tiny_tokenizer(77)
        clip, t5 = _clip(len(tokenizer)), _t5(len(tokenizer))
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae.eval(), clip, tokenizer, t5, tiny_tokenizer(), transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ltx_video(**options: Any) -> LTXPipeline:
    """64x96 pixels and 9 frames give 3x8x12 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            patch_size=2,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        )
        vae.use_framewise_encoding = False
        vae.use_framewise_decoding = False
        transformer = LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=options.pop("heads", 2),
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=TEXT_DIM,
            **options,
        )
        widened(transformer)
        tokenizer = tiny_tokenizer()
        t5 = _t5(len(tokenizer))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = LTXPipeline(scheduler, vae.eval(), t5, tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def widened(transformer: Any) -> Any:
    """`transformer` with weights so large that a change of attention shows in the pictures."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return transformer.eval()


def _t5(vocabulary: int) -> T5EncoderModel:
    config = T5Config(vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval()


def _clip(vocabulary: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=POOLED_DIM,
        projection_dim=POOLED_DIM,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=77,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
    )
    return CLIPTextModel(config).eval()
