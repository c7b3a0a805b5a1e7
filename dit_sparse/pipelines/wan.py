"""Wan 2.1 and 2.2: where its attention lets the toolkit in."""

import math
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
    WanTransformerBlock,
    _get_qkv_projections,
)
from torch.utils.hooks import RemovableHandle

from dit_sparse.kernels import norm_rope
from dit_sparse.kernels.norm_rope import rotate
from dit_sparse.pipelines.adapter import (
    FamilyAdapter,
    Inputs,
    SparseProcessor,
    check_size,
    latent_frames,
    modules_of,
    moves,
)
from dit_sparse.pipelines.layout import Layout
from dit_sparse.pipelines.norm_rotate import RotaryEmbedding, is_watched
from dit_sparse.pipelines.wan_block import forget_text, fuse_block, merge_text, unfuse_block
from dit_sparse.types import TokenGrid, TokenOrder


class SparseWanAttnProcessor(SparseProcessor, WanAttnProcessor):
    """Wan's processor with its self-attention handed to a session; cross-attention stays upstream's."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attention_mask is not None:
            raise ValueError("Wan's self-attention has no mask to combine with sparse blocks, got an attention_mask")
        query, key, value = project(attn, hidden_states, rotary_emb)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        out = self.attend(q, k, v)
        out = out.transpose(1, 2).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def project(
    attn: WanAttention, hidden_states: torch.Tensor, rotary_emb: RotaryEmbedding | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `[B, N, H, D]` of Wan's self-attention, after norm and rotary embedding."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    value = value.unflatten(2, (attn.heads, -1))
    return (
        prepare(query, attn.norm_q, attn.heads, rotary_emb),
        prepare(key, attn.norm_k, attn.heads, rotary_emb),
        value,
    )


def prepare(x: torch.Tensor, norm: torch.nn.Module, heads: int, rotary_emb: RotaryEmbedding | None) -> torch.Tensor:
    """`x` `[B, N, H * D]` normed, cut into heads and rotated: `[B, N, H, D]`; in one pass if nothing hooks the norm."""
    if type(norm) is torch.nn.RMSNorm and norm.eps is not None and not is_watched(norm):
        return norm_rope(x.unflatten(2, (heads, -1)), norm.weight, norm.eps, *(rotary_emb or (None, None)))
    x = norm(x).unflatten(2, (heads, -1))
    return x if rotary_emb is None else rotate(x, *rotary_emb)


class WanAdapter(FamilyAdapter):
    """Wan: video tokens alone in self-attention (`attn1`); text goes through cross-attention, which stays as it is."""

    family = "Wan"
    transformer_class = "WanTransformer3DModel"
    processors: ClassVar = {WanAttnProcessor: SparseWanAttnProcessor}
    float32_vae = True
    relies_on = (WanTransformer3DModel.forward, WanTransformerBlock.forward, _get_qkv_projections)

    def attention_modules(self, transformer: Any) -> dict[str, Any]:
        return modules_of(transformer, "attn1", "blocks")

    def fuse(self, transformer: Any) -> None:
        for block in transformer.blocks:
            fuse_block(block)

    def unfuse(self, transformer: Any) -> None:
        for block in transformer.blocks:
            unfuse_block(block)

    def begin_forward(self, transformer: Any, inputs: Inputs) -> None:
        merge_text(transformer.blocks, inputs["encoder_hidden_states"])

    def end_forward(self, transformer: Any) -> None:
        forget_text(transformer.blocks)

    def layout(self, transformer: Any, inputs: Inputs) -> Layout:
        """`hidden_states` is `[B, C, F, H, W]`."""
        sizes = inputs["hidden_states"].shape[2:]
        return Layout(
            TokenGrid(*(size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True)))
        )

    def takes_order(self, transformer: Any, inputs: Inputs) -> bool:
        """Not for subclasses, which may add what depends on places, nor for a timestep a token (Wan 2.2 TI2V)."""
        return type(transformer).__name__ == self.transformer_class and inputs["timestep"].ndim == 1

    def put_in_order(
        self, transformer: Any, order: TokenOrder, inputs: Inputs
    ) -> tuple[list[RemovableHandle], dict[str, Any]]:
        """Moves the patches and their rotary tables, and the output's few channels back."""
        index, inverse = order.index[0, 0], order.inverse[0, 0]

        def patches(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            return out.flatten(2).index_select(2, index).view(out.shape)

        handles = moves({transformer.rope: (1, index), transformer.proj_out: (1, inverse)})
        return [*handles, transformer.patch_embedding.register_forward_hook(patches)], {}

    def token_grid(self, pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
        transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
        patch_f, patch_h, patch_w = transformer.config.patch_size
        temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
        for name, got, patch in (("height", height, patch_h), ("width", width, patch_w)):
            # WanPipeline.check_inputs asks for 16 whatever the model's own factor is.
            check_size(name, got, math.lcm(16, spatial * patch))
        latents = latent_frames(frames, temporal)
        if latents % patch_f:
            raise ValueError(f"frames must give latent frames that divide by {patch_f}, got {frames} frames")
        return TokenGrid(latents // patch_f, height // (spatial * patch_h), width // (spatial * patch_w))
