"""Tiny pipelines and how the tests call them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from tests.pipelines.families import FAMILIES, Family
from tests.pipelines.tiny import make_tiny_wan, tiny_wan

Render = Callable[..., Tensor]


@pytest.fixture
def pipe() -> WanPipeline:
    return tiny_wan(fine=True)


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture
def render() -> Render:
    def render(
        pipe: Any, prompt: str | list[str] = "a red ball", steps: int = 5, seed: int = 0, **options: Any
    ) -> Tensor:
        """Latents of one run, `[B, C, F, H, W]`."""
        arguments = {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16}
        return pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **{**arguments, **options},
        ).frames

    return render
