"""The transformers that bench_e2e.py times: public configurations, random weights, inputs of the real sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor

from dit_sparse.methods import Neighborhood

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Model:
    """One model at one size.

    Args:
        transformer: its diffusers class.
        config: what its public configuration says beyond the class's defaults.
        layers: names of the entries of `config` that count transformer blocks, with their public values.
        inputs: the transformer's arguments but the timestep, drawn by the function it is given.
        neighborhood: one whose blocks are all full there: every window is an odd number of tiles.
    """

    transformer: type[torch.nn.Module]
    config: dict[str, Any]
    layers: dict[str, int]
    inputs: Callable[[Make], dict[str, Any]]
    neighborhood: Neighborhood

    def build(self, layers: int | None, device: str, dtype: torch.dtype) -> torch.nn.Module:
        """The transformer with random weights; `layers` blocks in all, kinds in the public proportion."""
        torch.manual_seed(0)
        config = self.config | (self.layers if layers is None else self._fewer(layers))
        with torch.device(device):
            transformer = self.transformer(**config).eval()
        keep = tuple(transformer._keep_in_fp32_modules or ())
        for name, parameter in transformer.named_parameters():
            if not any(part in name for part in keep):
                parameter.data = parameter.data.to(dtype)
        return transformer

    def _fewer(self, layers: int) -> dict[str, int]:
        total = sum(self.layers.values())
        counts = {name: max(1, layers * count // total) for name, count in self.layers.items()}
        last = list(counts)[-1]
        return counts | {last: max(1, layers - sum(counts.values()) + counts[last])}


class Bare:
    """What `sparsify` needs of a pipeline: a transformer and a scheduler."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


def _wan(heads: int, ffn_dim: int, layers: int, latents: tuple[int, int, int], tile: Any, window: Any, dim: int = 128):
    def inputs(make: Make) -> dict[str, Any]:
        return {"hidden_states": make(1, 16, *latents), "encoder_hidden_states": make(1, 512, 4096)}

    return Model(
        WanTransformer3DModel,
        {"num_attention_heads": heads, "attention_head_dim": dim, "ffn_dim": ffn_dim},
        {"num_layers": layers},
        inputs,
        Neighborhood(window=window, stride=tile, tile=tile),
    )


def _cogvideox(make: Make) -> dict[str, Any]:
    """Guidance runs in one batch of two."""
    angles = make(17550, 32).float().repeat_interleave(2, -1)
    return {
        "hidden_states": make(2, 13, 16, 60, 90),
        "encoder_hidden_states": make(2, 226, 4096),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _hunyuan(make: Make) -> dict[str, Any]:
    """A prompt of 60 tokens, padded to 256."""
    padding = make(1, 256).zero_().long()
    padding[:, :60] = 1
    return {
        "hidden_states": make(1, 16, 33, 90, 160),
        "encoder_hidden_states": make(1, 256, 4096),
        "encoder_attention_mask": padding,
        "pooled_projections": make(1, 768),
        "guidance": make(1).fill_(6000.0),
    }


def _flux(side: int, tile: Any, window: Any) -> Model:
    def inputs(make: Make) -> dict[str, Any]:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        image_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        return {
            "hidden_states": make(1, side * side, 64),
            "encoder_hidden_states": make(1, 512, 4096),
            "pooled_projections": make(1, 768),
            "guidance": make(1).fill_(3.5),
            "img_ids": make(side * side, 3).copy_(image_ids),
            "txt_ids": make(512, 3).zero_(),
        }

    return Model(
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        {"num_layers": 19, "num_single_layers": 38},
        inputs,
        Neighborhood(window=window, stride=tile, tile=tile),
    )


MODELS = {
    "wan-1.3b": _wan(12, 8960, 30, (21, 60, 104), (3, 10, 4), (9, 30, 28)),
    "wan-14b": _wan(40, 13824, 40, (21, 90, 160), (3, 5, 8), (15, 25, 40)),
    "cogvideox-5b": Model(
        CogVideoXTransformer3DModel,
        {"num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        {"num_layers": 42},
        _cogvideox,
        Neighborhood(window=(13, 15, 21), stride=(13, 3, 3), tile=(13, 3, 3)),
    ),
    "hunyuan": Model(
        HunyuanVideoTransformer3DModel,
        {},
        {"num_layers": 20, "num_single_layers": 40},
        _hunyuan,
        Neighborhood(window=(21, 25, 40), stride=(3, 5, 8), tile=(3, 5, 8)),
    ),
    "flux": _flux(64, (1, 8, 16), (1, 24, 48)),
    "flux-2k": _flux(128, (1, 8, 16), (1, 56, 48)),
    "tiny": _wan(2, 64, 2, (3, 16, 16), (1, 4, 4), (3, 4, 4), dim=16),
}
