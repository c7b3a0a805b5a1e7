"""The families as the tests see them: a tiny pipeline, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_sparse import (
    AdaSpa,
    AnchorAttention,
    BigBird,
    Blade,
    DfsAttention,
    Dhsa,
    DraftAttention,
    LeastError,
    LoSA,
    LServe,
    Lvsa,
    MInference,
    Neighborhood,
    Oracle,
    Paro,
    PbsAttention,
    Pisa,
    ProxyAttention,
    RadialAttention,
    Sale,
    SkipSoftmax,
    SlidingTile,
    SolAttention,
    SpargeAttention,
    SparseVideoGen,
    SparseVideoGen2,
    Strided,
    SvgEar,
    Svoo,
    TokenGrid,
    VMoBA,
    XAttention,
)
from tests.pipelines.tiny import tiny_wan
from tests.pipelines.tiny_families import COGVIDEOX_TEXT, tiny_cogvideox, tiny_flux, tiny_hunyuan_video, tiny_ltx_video

METHODS = [
    Neighborhood(density=0.5, tile=(1, 4, 4)),
    AdaSpa(density=0.5, block=16),
    Paro(density=0.5, block=16),
    SparseVideoGen(density=0.5, block=16),
    SparseVideoGen2(density=0.5, q_tokens=32, k_tokens=16),
    RadialAttention(density=0.5, block=16),
    SlidingTile(density=0.5, tile=(1, 4, 4)),
    XAttention(density=0.5, block=16),
    DraftAttention(density=0.5, short=4, long=4),
    SpargeAttention(density=0.5, block_q=16, block_k=8),
    VMoBA(density=0.5, tile=(1, 4, 4), block=16),
    Blade(density=0.5, block=16, samples=4),
    Oracle(density=0.5, block=16),
    MInference(density=0.5, block=16),
    BigBird(density=0.5, block=16),
    Strided(density=0.5, block=16),
    PbsAttention(density=0.5, block=16, segment=64),
    ProxyAttention(density=0.5, block=16),
    AnchorAttention(density=0.5, block=16, segment=64),
    LServe(density=0.5, block=16),
    Dhsa(density=0.5, tile=(1, 4, 4)),
    Sale(density=0.5, block=16),
    LeastError(density=0.5, tile=(1, 4, 4), rows=4),
    SvgEar(density=0.5, q_tokens=32, k_tokens=16),
    Svoo(density=0.5, q_tokens=32, k_tokens=16),
    Pisa(density=0.5, block=16),
    SolAttention(density=0.5, block=16),
    DfsAttention(density=0.5, block=16, tokens=4),
    LoSA(density=0.5, block=16),
    Lvsa(share=0.34, first=0, block=16),
    SkipSoftmax(scale_factor=1e6, block=16),
]

_KINDS = (Neighborhood, AdaSpa, Paro, SparseVideoGen, SparseVideoGen2, XAttention, PbsAttention, LeastError, Pisa, Lvsa)
KINDS = [method for method in METHODS if isinstance(method, _KINDS)]
"""One method of each way to deal with plans: static, by row sums, with orders by head, uneven blocks, new ones at every
step, key orders of their own, one plan for both branches, remainders, densities that follow from the grid."""


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: in test ids.
        make: its tiny pipeline.
        grid: the layout of a run with `arguments`; real text only where prompts are padded.
        arguments: of a call, beside prompt and steps.
        branches: the names that its guidance branches have.
        guided: arguments that bring a second branch, in families that need not have one.
    """

    name: str
    make: Callable[[], Any]
    grid: TokenGrid
    arguments: dict[str, Any]
    branches: set[str] = field(default_factory=lambda: {"cond", "uncond"})
    guided: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def run(
        self, pipe: Any, prompt: str | list[str] = "a red ball", steps: int = 4, seed: int = 0, **options: Any
    ) -> Tensor:
        """Latents of one run."""
        generator = torch.Generator().manual_seed(seed)
        result = pipe(
            prompt,
            num_inference_steps=steps,
            **{"output_type": "latent", "generator": generator, **self.arguments, **options},
        )
        return result.images if hasattr(result, "images") else result.frames

    def dense(self, prompt: str | list[str] = "a red ball", **options: Any) -> Tensor:
        """`run` of its pipeline as it is made, which is the same for all tests and so runs once."""
        key = f"{self.name} {prompt} {sorted(options.items())}"
        if key not in _dense:
            _dense[key] = self.run(self.make(), prompt, **options)
        return _dense[key].clone()


_dense: dict[str, Tensor] = {}

_TEMPLATE = {"template": "{}", "crop_start": 0}

FAMILIES = [
    Family(
        "wan",
        lambda: tiny_wan(fine=True),
        TokenGrid(3, 8, 12),
        {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16},
    ),
    Family(
        "cogvideox",
        tiny_cogvideox,
        TokenGrid(3, 8, 12, COGVIDEOX_TEXT, text_first=True),
        {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": COGVIDEOX_TEXT},
        {"cond_uncond"},
    ),
    Family(
        "hunyuan_video",
        tiny_hunyuan_video,
        TokenGrid(3, 8, 12, 4),
        {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16, "prompt_template": _TEMPLATE},
        guided={"true_cfg_scale": 3.0, "negative_prompt": "a big blue square moving left"},
    ),
    Family(
        "flux",
        tiny_flux,
        TokenGrid(1, 16, 24, 16, text_first=True),
        {"height": 32, "width": 48, "max_sequence_length": 16},
        guided={"true_cfg_scale": 3.0, "negative_prompt": "a big blue square"},
    ),
    Family(
        "ltx_video",
        tiny_ltx_video,
        TokenGrid(3, 8, 12),
        {"height": 64, "width": 96, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16},
        {"cond_uncond"},
    ),
]
