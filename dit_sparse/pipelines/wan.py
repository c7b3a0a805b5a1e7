"""Wan 2.1 and 2.2: where its attention lets the toolkit in."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch.utils.hooks import RemovableHandle

from dit_sparse.kernels import dense_attention, norm_rope
from dit_sparse.kernels.norm_rope import rotate
from dit_sparse.pipelines.adapter import FamilyAdapter, is_watched, uses_default_backend
from dit_sparse.pipelines.session import Session
from dit_sparse.pipelines.wan_block import fuse_block, unfuse_block
from dit_sparse.types import TokenGrid, TokenOrder

RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]


class SparseWanAttnProcessor(WanAttnProcessor):
    """Wan's processor with its self-attention handed to a session; cross-attention stays upstream's.

    Args:
        session: runs the attention.
        layer, num_layers: which transformer block of how many.
        original: the processor this one replaces; its backend setting is kept.
    """

    def __init__(self, session: Session, layer: int, num_layers: int, original: WanAttnProcessor) -> None:
        super().__init__()
        self.session = session
        self.layer = layer
        self.num_layers = num_layers
        self._attention_backend = original._attention_backend
        self._parallel_config = original._parallel_config

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        if self._parallel_config is not None:
            raise ValueError("context parallelism must be off with sparse attention, got a parallel config; unsparsify")
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attention_mask is not None:
            raise ValueError("Wan's self-attention has no mask to combine with sparse blocks, got an attention_mask")
        query, key, value = project(attn, hidden_states, rotary_emb)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))

        def dense() -> torch.Tensor:
            if q.is_cuda and uses_default_backend(self):
                return dense_attention(q, k, v)
            return dispatch_attention_fn(query, key, value, backend=self._attention_backend).transpose(1, 2)

        out = self.session.attend(self.layer, self.num_layers, q, k, v, dense)
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

    def install(self, transformer: Any, model: str, session: Session) -> dict[str, Any]:
        originals = {}
        for layer, block in enumerate(transformer.blocks):
            path, processor = f"{model}.blocks.{layer}.attn1", block.attn1.processor
            if type(processor) is not WanAttnProcessor:
                raise ValueError(
                    f"{path}.processor must be diffusers' WanAttnProcessor, got {type(processor).__name__}; "
                    "sparsify before installing another processor"
                )
            if processor._parallel_config is not None:
                raise ValueError("context parallelism must be off with sparse attention, got a parallel config")
            originals[path] = processor
        for layer, block in enumerate(transformer.blocks):
            original = originals[f"{model}.blocks.{layer}.attn1"]
            block.attn1.processor = SparseWanAttnProcessor(session, layer, self.num_layers(transformer), original)
        return originals

    def fuse(self, transformer: Any) -> None:
        for block in transformer.blocks:
            fuse_block(block)

    def unfuse(self, transformer: Any) -> None:
        for block in transformer.blocks:
            unfuse_block(block)

    def num_layers(self, transformer: Any) -> int:
        return len(transformer.blocks)

    def grid_of_latents(self, transformer: Any, hidden_states: torch.Tensor) -> TokenGrid:
        """`hidden_states` is `[B, C, F, H, W]`."""
        sizes = (
            size // patch for size, patch in zip(hidden_states.shape[2:], transformer.config.patch_size, strict=True)
        )
        return TokenGrid(*sizes)

    def takes_order(self, transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Not for subclasses, which may add what depends on places, nor for a timestep a token (Wan 2.2 TI2V)."""
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        return type(transformer).__name__ == self.transformer_class and timestep.ndim == 1

    def put_in_order(self, transformer: Any, order: TokenOrder) -> list[RemovableHandle]:
        """Moves the patches and their rotary tables, and the output's few channels back."""
        index, inverse = order.index[0, 0], order.inverse[0, 0]

        def patches(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            return out.flatten(2).index_select(2, index).view(out.shape)

        def tables(_: Any, __: Any, out: RotaryEmbedding) -> RotaryEmbedding:
            cos, sin = (table.index_select(1, index) for table in out)
            return cos, sin

        def output(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            return out.index_select(1, inverse)

        modules = ((transformer.patch_embedding, patches), (transformer.rope, tables), (transformer.proj_out, output))
        return [module.register_forward_hook(hook) for module, hook in modules]

    def token_grid(self, pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
        transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
        patch_f, patch_h, patch_w = transformer.config.patch_size
        temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
        for name, got, patch in (("height", height, patch_h), ("width", width, patch_w)):
            # WanPipeline.check_inputs asks for 16 whatever the model's own factor is.
            multiple = math.lcm(16, spatial * patch)
            if got < multiple or got % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple}, got {got}; try {_near(got, multiple)}")
        if frames < 1 or (frames - 1) % temporal:
            raise ValueError(
                f"frames must be 1 more than a multiple of {temporal}, got {frames}; "
                f"try {max(0, (frames - 1) // temporal) * temporal + 1}"
            )
        latent_frames = (frames - 1) // temporal + 1
        if latent_frames % patch_f:
            raise ValueError(f"frames must give latent frames that divide by {patch_f}, got {frames} frames")
        return TokenGrid(latent_frames // patch_f, height // (spatial * patch_h), width // (spatial * patch_w))


def _near(value: int, multiple: int) -> int:
    return max(multiple, value // multiple * multiple)
