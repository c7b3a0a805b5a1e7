"""What a pipeline takes of a request, and what it needs that a request has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dit_sparse.generate import Request
from dit_sparse.generate.models import call_arguments, load_model, pipeline_defaults


class TextToImage:
    def __call__(self, prompt: Any = None, height: int = 32, width: int = 48, num_inference_steps: int = 4) -> None: ...


class ImageToVideo:
    def __call__(self, image: Any, prompt: Any = None, height: int = 32, width: int = 48) -> None: ...


def test_values_go_by_the_pipelines_own_names() -> None:
    values = {"height": 64, "width": None, "frames": 1, "steps": 7}
    assert call_arguments(TextToImage(), values) == {"height": 64, "num_inference_steps": 7}


def test_a_pipeline_that_needs_an_image_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="ImageToVideo needs an image"):
        pipeline_defaults(Request(("a ball",), {}, Path("out")), ImageToVideo())


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "Wan2.1-1.3B"])
def test_the_name_of_a_preset_is_answered_by_its_checkpoint(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"is the name of a preset: give its checkpoint, Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers"
    ):
        load_model(Request(("a ball",), {}, Path("out"), model=name))
