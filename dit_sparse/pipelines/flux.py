"""FLUX.1: where its attention lets the toolkit in."""

from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
    _get_qkv_projections,
)
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dit_sparse.pipelines.adapter import (
    FamilyAdapter,
    Inputs,
    SparseProcessor,
    check_size,
    modules_of,
    moves,
)
from dit_sparse.pipelines.host import on_host
from dit_sparse.pipelines.layout import Layout
from dit_sparse.pipelines.norm_rotate import RotaryEmbedding, norm_and_rotate
from dit_sparse.types import TokenGrid, TokenOrder

_TEXT_LEN = 512
"""Tokens that FLUX's pipelines pad a prompt to by default; all of them are attended."""


class SparseFluxAttnProcessor(SparseProcessor, FluxAttnProcessor):
    """FLUX's processor with its joint attention, text first, handed to a session."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if attention_mask is not None:
            raise ValueError("FLUX's attention_mask must be None with sparse attention, got one; unsparsify")
        query, key, value = project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = self.attend(q, k, v)
        out = out.transpose(1, 2).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text_len = encoder_hidden_states.shape[1]
        text, image = out[:, :text_len].contiguous(), out[:, text_len:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def project(
    attn: FluxAttention, image: Tensor, text: Tensor | None, rotary_emb: RotaryEmbedding | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, N, H, D]` of text and image, after norms and rotary embedding."""
    projected = _get_qkv_projections(attn, image, text)
    q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[:3])
    if attn.added_kv_proj_dim is None:
        return norm_and_rotate(q, attn.norm_q, rotary_emb), norm_and_rotate(k, attn.norm_k, rotary_emb), v
    text_q, text_k, text_v = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[3:])
    of_text, of_image = _split(rotary_emb, text_q.shape[1])
    q = [norm_and_rotate(text_q, attn.norm_added_q, of_text), norm_and_rotate(q, attn.norm_q, of_image)]
    k = [norm_and_rotate(text_k, attn.norm_added_k, of_text), norm_and_rotate(k, attn.norm_k, of_image)]
    return torch.cat(q, dim=1), torch.cat(k, dim=1), torch.cat([text_v, v], dim=1)


def _split(rotary_emb: RotaryEmbedding | None, at: int) -> tuple[RotaryEmbedding | None, RotaryEmbedding | None]:
    if rotary_emb is None:
        return None, None
    cos, sin = rotary_emb
    return (cos[:at], sin[:at]), (cos[at:], sin[at:])


class FluxAdapter(FamilyAdapter):
    """FLUX.1: text and image in one sequence, text first; an image is a grid of one frame."""

    family = "FLUX.1"
    transformer_class = "FluxTransformer2DModel"
    exact_timesteps = False
    processors: ClassVar = {FluxAttnProcessor: SparseFluxAttnProcessor}
    relies_on = (FluxTransformer2DModel.forward, FluxTransformerBlock.forward, FluxSingleTransformerBlock.forward)

    def attention_modules(self, transformer: Any) -> dict[str, Any]:
        return modules_of(transformer, "attn", "transformer_blocks", "single_transformer_blocks")

    def layout(self, transformer: Any, inputs: Inputs) -> Layout:
        """`img_ids` is `[N, 3]` (or, deprecated, `[1, N, 3]`): image, row and column of each token."""
        frames, height, width = on_host(inputs["img_ids"], _grid_of_ids)
        text_len = inputs["encoder_hidden_states"].shape[1]
        return Layout(TokenGrid(frames, height, width, text_len, text_first=True))

    def takes_order(self, transformer: Any, inputs: Inputs) -> bool:
        """Not under a ControlNet, whose residuals stand in raster order, nor for subclasses."""
        names = ("controlnet_block_samples", "controlnet_single_block_samples")
        controlled = any(inputs.get(name) is not None for name in names)
        return type(transformer).__name__ == self.transformer_class and not controlled

    def put_in_order(
        self, transformer: Any, order: TokenOrder, inputs: Inputs
    ) -> tuple[list[RemovableHandle], dict[str, Any]]:
        """Moves the embedded tokens and the rotary tables, and the output's few channels back."""
        text_len = inputs["encoder_hidden_states"].shape[1]
        index = order.index[0, 0]
        image, inverse = index[text_len:] - text_len, order.inverse[0, 0, text_len:] - text_len
        places = {transformer.x_embedder: (1, image), transformer.pos_embed: (0, index)}
        return moves({**places, transformer.proj_out: (1, inverse)}), {}

    def token_grid(self, pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
        if frames != 1:
            raise ValueError(f"frames must be 1, got {frames}: FLUX makes single images")
        pixels = pipe.vae_scale_factor * 2
        check_size("height", height, pixels)
        check_size("width", width, pixels)
        return TokenGrid(1, height // pixels, width // pixels, _TEXT_LEN, text_first=True)


def _grid_of_ids(ids: Tensor) -> tuple[int, int, int]:
    """Frames, height and width of the grid that image ids `[N, 3]` or `[1, N, 3]` number in raster order.

    Raises:
        ValueError: ids that are no such grid, such as those of images of several sizes.
    """
    ids = (ids[0] if ids.ndim == 3 else ids).cpu().double()
    sizes = [axis.unique().numel() for axis in ids.unbind(-1)]
    raster = torch.cartesian_prod(*(axis.unique() for axis in ids.unbind(-1)))
    if raster.shape != ids.shape or not torch.equal(raster, ids):
        raise ValueError(
            f"img_ids must number one grid in raster order, got {len(ids)} tokens of {sizes[0]} images, {sizes[1]} "
            f"rows and {sizes[2]} columns; reference images of another size are not supported: unsparsify"
        )
    return sizes[0], sizes[1], sizes[2]
