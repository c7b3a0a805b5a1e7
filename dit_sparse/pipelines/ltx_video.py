"""LTX-Video: where its attention lets the toolkit in."""

from typing import Any, ClassVar

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    LTXVideoTransformer3DModel,
    LTXVideoTransformerBlock,
    apply_rotary_emb,
)
from torch.utils.hooks import RemovableHandle

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
from dit_sparse.types import TokenGrid, TokenOrder


class SparseLTXVideoAttnProcessor(SparseProcessor, LTXVideoAttnProcessor):
    """LTX-Video's processor with its self-attention handed to a session; cross-attention stays upstream's."""

    def __call__(
        self,
        attn: LTXAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise ValueError("LTX-Video's attention_mask must be None with sparse attention, got one; unsparsify")
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        if image_rotary_emb is not None:
            # The angles run through all heads, so they are applied before the heads are cut.
            query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = self.attend(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2, 3).to(query.dtype)))


class LTXVideoAdapter(FamilyAdapter):
    """LTX-Video: video tokens alone in self-attention (`attn1`), guidance in one batch."""

    family = "LTX-Video"
    transformer_class = "LTXVideoTransformer3DModel"
    processors: ClassVar = {LTXVideoAttnProcessor: SparseLTXVideoAttnProcessor}
    relies_on = (LTXVideoTransformer3DModel.forward, LTXVideoTransformerBlock.forward)
    # diffusers' own plan cuts the text too, which its cross-attention cannot put together again.
    context_parallel_plan: ClassVar = {
        "": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "rope": {i: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True) for i in (0, 1)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    def attention_modules(self, transformer: Any) -> dict[str, Any]:
        return modules_of(transformer, "attn1", "transformer_blocks")

    def layout(self, transformer: Any, inputs: Inputs) -> Layout:
        """`hidden_states` is packed, `[B, N, C]`; `num_frames`, `height` and `width` count its tokens."""
        sizes = frames, height, width = tuple(inputs.get(name) or 0 for name in ("num_frames", "height", "width"))
        tokens = inputs["hidden_states"].shape[1]
        if frames * height * width != tokens:
            raise ValueError(
                f"num_frames, height and width must multiply to the {tokens} tokens, got {sizes}; conditions that add "
                "tokens are not supported: unsparsify"
            )
        return Layout(TokenGrid(frames, height, width))

    def takes_order(self, transformer: Any, inputs: Inputs) -> bool:
        """Not for subclasses, nor for a timestep a token (image-to-video)."""
        return type(transformer).__name__ == self.transformer_class and inputs["timestep"].ndim == 1

    def put_in_order(
        self, transformer: Any, order: TokenOrder, inputs: Inputs
    ) -> tuple[list[RemovableHandle], dict[str, Any]]:
        """Moves the embedded tokens and their rotary tables, and the output's few channels back."""
        index, inverse = order.index[0, 0], order.inverse[0, 0]
        places = {transformer.proj_in: (1, index), transformer.rope: (1, index), transformer.proj_out: (1, inverse)}
        return moves(places), {}

    def token_grid(self, pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
        spatial = pipe.vae_spatial_compression_ratio * pipe.transformer_spatial_patch_size
        for name, got in (("height", height), ("width", width)):
            # LTXPipeline.check_inputs asks for 32 whatever the model's own factor is.
            check_size(name, got, max(32, spatial))
        latents = latent_frames(frames, pipe.vae_temporal_compression_ratio)
        return TokenGrid(latents // pipe.transformer_temporal_patch_size, height // spatial, width // spatial)
