"""A tiny Wan pipeline with random weights, made without any download: for tests that need a whole pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM = 32
_SPECIAL = ("<pad>", "</s>", "<unk>")
_WORDS = ("a", "big", "small", "red", "green", "blue", "ball", "square", "moving", "left", "right", "on", "black")


def make_tiny_wan(folder: str | Path, *, fine: bool = False, num_layers: int = 2, seed: int = 0) -> Path:
    """Save a tiny random `WanPipeline` to `folder` and return the folder.

    Args:
        folder: where to save it, in diffusers' format.
        fine: a 4x VAE and patches of one latent, so that 96x96 pixels and 33 frames give 9x24x24 tokens;
            otherwise an 8x VAE and 1x2x2 patches, so that 64x64 pixels and 9 frames give 3x4x4 tokens.
        num_layers: number of transformer blocks.
        seed: of the weights.
    """
    folder = Path(folder)
    tiny_wan(fine=fine, num_layers=num_layers, seed=seed).save_pretrained(folder)
    return folder


def tiny_wan(*, fine: bool = False, num_layers: int = 2, seed: int = 0, heads: int = 2) -> WanPipeline:
    """The pipeline of `make_tiny_wan`, in memory; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _vae(fine)
        transformer = _transformer(vae.config.z_dim, patch=1 if fine else 2, num_layers=num_layers, heads=heads)
        tokenizer = tiny_tokenizer()
        text_encoder = _text_encoder(len(tokenizer))
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _vae(fine: bool) -> AutoencoderKLWan:
    if not fine:
        return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()


def _transformer(channels: int, *, patch: int, num_layers: int, heads: int) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        patch_size=(1, patch, patch),
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    # Weights large enough that a change of attention shows in the frames.
    for name, parameter in transformer.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return transformer.eval()


def _text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary_size, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def tiny_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """Words to numbers; id 0 pads and 1 ends a prompt."""
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )
