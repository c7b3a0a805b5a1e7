"""CogVideoX 1.0 and 1.5: where its attention lets the toolkit in."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_processor import (
    Attention,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dit_sparse.kernels import dense_attention
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
from dit_sparse.pipelines.norm_rotate import RotaryEmbedding
from dit_sparse.pipelines.session import Session
from dit_sparse.types import TokenGrid, TokenOrder


class SparseCogVideoXAttnProcessor(SparseProcessor, CogVideoXAttnProcessor2_0):
    """CogVideoX's processor with its joint attention, text first, handed to a session."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if attention_mask is not None:
            raise ValueError("CogVideoX's attention_mask must be None with sparse attention, got one; unsparsify")
        text_len = encoder_hidden_states.shape[1]
        projected = self.project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        q = prepare(q, attn.norm_q, image_rotary_emb, text_len)
        k = prepare(k, attn.norm_k, image_rotary_emb, text_len)
        out = self.attend(q, k, v)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2, 3)))
        return out[:, text_len:], out[:, :text_len]

    def dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """CogVideoX leaves the user no choice of an attention backend."""
        return dense_attention(q, k, v) if q.is_cuda else F.scaled_dot_product_attention(q, k, v)

    def project(self, attn: Attention, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value `[B, N, H * D]` of `x`."""
        return attn.to_q(x), attn.to_k(x), attn.to_v(x)


class SparseFusedCogVideoXAttnProcessor(SparseCogVideoXAttnProcessor):
    """The same after `fuse_qkv_projections`."""

    def project(self, attn: Attention, x: Tensor) -> tuple[Tensor, ...]:
        return attn.to_qkv(x).chunk(3, dim=-1)


def prepare(x: Tensor, norm: torch.nn.Module | None, rotary_emb: RotaryEmbedding | None, text_len: int) -> Tensor:
    """`x` `[B, H, N, D]` normed, its video part rotated; `x` itself may be changed."""
    x = x if norm is None else norm(x)
    if rotary_emb is not None:
        x[:, :, text_len:] = apply_rotary_emb(x[:, :, text_len:], rotary_emb)
    return x


class CogVideoXAdapter(FamilyAdapter):
    """CogVideoX: text and video in one sequence, text first, guidance in one batch."""

    family = "CogVideoX"
    transformer_class = "CogVideoXTransformer3DModel"
    processors: ClassVar = {
        CogVideoXAttnProcessor2_0: SparseCogVideoXAttnProcessor,
        FusedCogVideoXAttnProcessor2_0: SparseFusedCogVideoXAttnProcessor,
    }
    relies_on = (CogVideoXTransformer3DModel.forward, CogVideoXBlock.forward)
    context_parallel_plan: ClassVar = {
        "": {"image_rotary_emb": [ContextParallelInput(split_dim=0, expected_dims=2)] * 2},
        "transformer_blocks.0": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    def attention_modules(self, transformer: Any) -> dict[str, Any]:
        return modules_of(transformer, "attn1", "transformer_blocks")

    def follow(self, transformer: Any, session: Session, originals: dict[str, Any]) -> None:
        """`fuse_qkv_projections` replaces all processors and keeps the ones it found, which `unfuse_...` puts back."""
        kept = getattr(transformer, "original_attn_processors", None)
        if kept is None:
            return
        modules = self.attention_modules(transformer)
        for layer, (path, module) in enumerate(modules.items()):
            if isinstance(kept.get(f"{path}.processor"), SparseProcessor):
                kept[f"{path}.processor"] = originals[path]
            sparse = self.processors.get(type(module.processor))
            if sparse is not None:
                originals[path] = module.processor
                module.processor = sparse(session, layer, len(modules), module.processor)

    def layout(self, transformer: Any, inputs: Inputs) -> Layout:
        """`hidden_states` is `[B, F, C, H, W]`."""
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t or 1
        text_len = inputs["encoder_hidden_states"].shape[1]
        return Layout(TokenGrid(frames // patch_t, height // patch, width // patch, text_len, text_first=True))

    def takes_order(self, transformer: Any, inputs: Inputs) -> bool:
        """Not for subclasses, which may add what depends on places."""
        return type(transformer).__name__ == self.transformer_class

    def put_in_order(
        self, transformer: Any, order: TokenOrder, inputs: Inputs
    ) -> tuple[list[RemovableHandle], dict[str, Any]]:
        """Moves the embedded tokens and their rotary tables, and the output's few channels back."""
        text_len = inputs["encoder_hidden_states"].shape[1]
        index, inverse = order.index[0, 0], order.inverse[0, 0]
        handles = moves({transformer.patch_embed: (1, index), transformer.proj_out: (1, inverse[text_len:] - text_len)})
        tables = inputs.get("image_rotary_emb")
        if tables is None:
            return handles, {}
        video = index[text_len:] - text_len
        return handles, {"image_rotary_emb": tuple(table.index_select(0, video.to(table.device)) for table in tables)}

    def token_grid(self, pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
        config = pipe.transformer.config
        spatial = pipe.vae_scale_factor_spatial * config.patch_size
        for name, got in (("height", height), ("width", width)):
            # CogVideoXPipeline.check_inputs asks for 8 whatever the model's own factor is.
            check_size(name, got, math.lcm(8, spatial))
        latents, patch_t = latent_frames(frames, pipe.vae_scale_factor_temporal), config.patch_size_t or 1
        # The pipeline of 1.5 makes as many latent frames more as whole patches take.
        tokens = -(-latents // patch_t)
        return TokenGrid(tokens, height // spatial, width // spatial, config.max_text_seq_length, text_first=True)
