"""HunyuanVideo: where its attention lets the toolkit in."""

import math
from typing import Any, ClassVar

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformer3DModel,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dit_sparse.pipelines.adapter import (
    FamilyAdapter,
    Inputs,
    SparseProcessor,
    check_size,
    latent_frames,
    modules_of,
    moves,
    uses_default_backend,
)
from dit_sparse.pipelines.host import on_host
from dit_sparse.pipelines.layout import Layout
from dit_sparse.pipelines.norm_rotate import RotaryEmbedding, for_longer, norm_and_rotate
from dit_sparse.types import TokenGrid, TokenOrder

_TEXT_LEN = 256
"""Tokens that HunyuanVideo's pipelines pad a prompt to."""


class SparseHunyuanVideoAttnProcessor(SparseProcessor, HunyuanVideoAttnProcessor2_0):
    """HunyuanVideo's processor with its joint attention, text last, handed to a session.

    The session knows how long the prompts really are and leaves their padding out of sparse attention.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, video_len = hidden_states.shape[:2]
        text_len = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        padding = (batch, 1, 1, self.session.sequence_len(video_len + text_len))
        if attention_mask is not None and attention_mask.shape != padding:
            raise ValueError(f"attention_mask must be key padding {padding}, got {tuple(attention_mask.shape)}")
        query, key, value = project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = self.attend(q, k, v, attention_mask)
        out = out.transpose(1, 2).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out, None
        video, text = out[:, :video_len], out[:, video_len:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text

    def dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Where the padding is known it is left out instead of masked."""
        if q.is_cuda and self.session.knows_padding and uses_default_backend(self):
            return self.session.attend_densely(q, k, v)
        return super().dense(q, k, v, mask)


def project(
    attn: Attention, video: Tensor, text: Tensor | None, rotary_emb: RotaryEmbedding | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, N, H, D]` of video and text, after norms and rotary embedding of the video."""
    if text is not None and attn.add_q_proj is None:
        rotary_emb = for_longer(rotary_emb, text.shape[1]) if video.is_cuda else rotary_emb
        video, text = torch.cat([video, text], dim=1), None
    q, k, v = (to(video).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q, k = _rotate_start(q, attn.norm_q, rotary_emb), _rotate_start(k, attn.norm_k, rotary_emb)
    if text is None:
        return q, k, v
    to_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_q, text_k, text_v = (to(text).unflatten(2, (attn.heads, -1)) for to in to_text)
    text_q, text_k = norm_and_rotate(text_q, attn.norm_added_q, None), norm_and_rotate(text_k, attn.norm_added_k, None)
    return torch.cat([q, text_q], dim=1), torch.cat([k, text_k], dim=1), torch.cat([v, text_v], dim=1)


def _rotate_start(x: Tensor, norm: torch.nn.Module | None, rotary_emb: RotaryEmbedding | None) -> Tensor:
    """`x` normed, and rotated as far as the tables reach."""
    reach = x.shape[1] if rotary_emb is None else rotary_emb[0].shape[0]
    if reach == x.shape[1]:
        return norm_and_rotate(x, norm, rotary_emb)
    x = norm_and_rotate(x, norm, None)
    return torch.cat([norm_and_rotate(x[:, :reach], None, rotary_emb), x[:, reach:]], dim=1)


class HunyuanVideoAdapter(FamilyAdapter):
    """HunyuanVideo: video and a padded prompt in one sequence, text last; first the dual blocks, then the single ones.

    The text's own refiner stays as it is.
    """

    family = "HunyuanVideo"
    transformer_class = "HunyuanVideoTransformer3DModel"
    processors: ClassVar = {HunyuanVideoAttnProcessor2_0: SparseHunyuanVideoAttnProcessor}
    relies_on = (
        HunyuanVideoTransformer3DModel.forward,
        HunyuanVideoTransformerBlock.forward,
        HunyuanVideoSingleTransformerBlock.forward,
    )
    context_parallel_plan: ClassVar = {
        "rope": {i: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True) for i in (0, 1)},
        "transformer_blocks.0": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
            "encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    def attention_modules(self, transformer: Any) -> dict[str, Any]:
        return modules_of(transformer, "attn", "transformer_blocks", "single_transformer_blocks")

    def check_parallel(self, transformer: Any, ulysses: int) -> None:
        """Not where an image stands in the place of the first frame's tokens, which one rank alone would have."""
        if transformer.config.image_condition_type == "token_replace":
            raise ValueError("image_condition_type must not be 'token_replace' on several ranks, got it")
        super().check_parallel(transformer, ulysses)

    def layout(self, transformer: Any, inputs: Inputs) -> Layout:
        """`hidden_states` is `[B, C, F, H, W]`, `encoder_attention_mask` `[B, text]`."""
        frames, height, width = inputs["hidden_states"].shape[2:]
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
        grid = TokenGrid(frames // patch_t, height // patch, width // patch, inputs["encoder_hidden_states"].shape[1])
        return Layout(grid, on_host(inputs["encoder_attention_mask"], _row_sums))

    def takes_order(self, transformer: Any, inputs: Inputs) -> bool:
        """Not where an image stands in the place of the first frame's tokens, nor for subclasses."""
        replaces = transformer.config.image_condition_type == "token_replace"
        return type(transformer).__name__ == self.transformer_class and not replaces

    def put_in_order(
        self, transformer: Any, order: TokenOrder, inputs: Inputs
    ) -> tuple[list[RemovableHandle], dict[str, Any]]:
        """Moves the video's patches and their rotary tables, and the output's few channels back."""
        frames, height, width = inputs["hidden_states"].shape[2:]
        config = transformer.config
        tokens = frames // config.patch_size_t * (height // config.patch_size) * (width // config.patch_size)
        index, inverse = order.index[0, 0, :tokens], order.inverse[0, 0, :tokens]
        places = {transformer.x_embedder: (1, index), transformer.rope: (0, index), transformer.proj_out: (1, inverse)}
        return moves(places), {}

    def token_grid(self, pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
        config = pipe.transformer.config
        spatial = pipe.vae_scale_factor_spatial * config.patch_size
        for name, got in (("height", height), ("width", width)):
            # HunyuanVideoPipeline.check_inputs asks for 16 whatever the model's own factor is.
            check_size(name, got, math.lcm(16, spatial))
        latents = latent_frames(frames, pipe.vae_scale_factor_temporal)
        return TokenGrid(latents // config.patch_size_t, height // spatial, width // spatial, _TEXT_LEN)


def _row_sums(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.sum(1, dtype=torch.int).tolist())
