"""Every family through `generate`: files, manifest, going on, and the sizes that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_sparse.generate import Request, prepare, run
from dit_sparse.generate.manifest import MANIFEST
from tests.pipelines.families import FAMILIES, Family

VIDEOS = [family for family in FAMILIES if "num_frames" in family.arguments]
FLUX = next(family for family in FAMILIES if family.name == "flux")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A saved tiny model of every family."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        family.make().save_pretrained(root / family.name)
    return {family.name: str(root / family.name) for family in FAMILIES}


@pytest.fixture
def request_of(folders, tmp_path):
    def make(family: Family, **changes: Any) -> Request:
        sizes = {"height": family.arguments["height"], "width": family.arguments["width"], "steps": 2}
        frames = {"frames": family.arguments["num_frames"]} if family in VIDEOS else {}
        config = {"method": "adaspa", "density": 0.5, "block": 16, "warmup": 0.5}
        values = {"prompts": ("a red ball",), "config": config, "out": tmp_path / "out", "device": "cpu"}
        return Request(**{**values, **sizes, **frames, "model": folders[family.name], **changes})

    return make


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text("utf-8").splitlines()]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_is_a_file_and_is_made_once(request_of, family, dtype, tmp_path) -> None:
    request = request_of(family, num_samples=2, dtype=dtype)
    outcome = run(prepare(request))
    assert outcome.failures == []
    ending = "mp4" if family in VIDEOS else "png"
    assert _names(tmp_path / "out") == [f"0001-a-red-ball-seed{seed}.{ending}" for seed in (0, 1)]
    assert _lines(tmp_path / "out") == outcome.lines
    for line in outcome.lines:
        assert line["frames"] == family.arguments.get("num_frames", 1)
        assert line["format"] == ending
        assert 0.3 < line["sparse_density"] < 0.9  # the text, up to half of the tokens, is always kept
        assert 0 < line["dense_calls"]["warm-up"] < line["calls"]
    assert prepare(request).todo == ()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_dense_and_sparse_are_compared(request_of, family) -> None:
    (line,) = run(prepare(request_of(family, compare_dense=True))).lines
    assert 5 < line["psnr"] < 100


def test_an_image_holds_its_pixels(request_of, tmp_path) -> None:
    (line,) = run(prepare(request_of(FLUX))).lines
    image = Image.open(tmp_path / "out" / line["file"])
    assert (image.format, image.size, image.mode) == ("PNG", (48, 32), "RGB")
    assert np.asarray(image).std() > 1
    run(prepare(request_of(FLUX, overwrite=True)))
    assert _names(tmp_path / "out") == [line["file"]]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / line["file"])), np.asarray(image))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("cogvideox", "flux")], ids=str)
def test_sizes_left_open_are_the_models_own(request_of, family) -> None:
    """CogVideoX and FLUX take them from their configs."""
    settings = prepare(request_of(family, height=None, width=None, frames=None)).settings
    got = (settings.height, settings.width, settings.frames)
    pipe = family.make()
    config, scale = pipe.transformer.config, getattr(pipe, "vae_scale_factor_spatial", 0)
    if family is FLUX:
        assert got == (128 * pipe.vae_scale_factor, 128 * pipe.vae_scale_factor, 1)
    else:
        assert got == (config.sample_height * scale, config.sample_width * scale, config.sample_frames)


def test_a_preset_gives_size_steps_and_rate(folders, tmp_path) -> None:
    """And what is asked for wins. With everything known the model is not loaded to go on."""
    folder = tmp_path / "CogVideoX-2b"
    shutil.copytree(folders["cogvideox"], folder)
    values = {"prompts": ("a red ball",), "config": {"method": "dense"}, "out": tmp_path / "out", "device": "cpu"}
    settings = prepare(Request(**values, model=str(folder))).settings
    assert (settings.height, settings.width, settings.frames) == (480, 720, 49)
    assert (settings.steps, settings.guidance, settings.fps) == (50, 6.0, 8)
    request = Request(**values, model=str(folder), height=32, width=48, frames=9, steps=2, fps=12)
    job = prepare(request)
    assert (job.settings.height, job.settings.frames, job.settings.guidance, job.settings.fps) == (32, 9, 6.0, 12)
    run(job)
    assert "pipe" not in vars(prepare(request).executor.renderer)


REFUSED = [
    ("wan", {"height": 33}, "height must be a multiple of 16, got 33; try 32"),
    ("wan", {"frames": 8}, "frames must be 1 more than a multiple of 4, got 8; try 5"),
    ("cogvideox", {"width": 50}, "width must be a multiple of 8, got 50; try 48"),
    ("cogvideox", {"frames": 10}, "frames must be 1 more than a multiple of 4, got 10; try 9"),
    ("hunyuan_video", {"height": 70}, "height must be a multiple of 16, got 70; try 64"),
    ("hunyuan_video", {"frames": 2}, "frames must be 1 more than a multiple of 4, got 2; try 1"),
    ("hunyuan_video", {"negative_prompt": "x"}, "--negative-prompt: HunyuanVideoPipeline heeds one only with"),
    ("ltx_video", {"width": 100}, "width must be a multiple of 32, got 100; try 96"),
    ("ltx_video", {"frames": 12}, "frames must be 1 more than a multiple of "),
    ("flux", {"height": 33}, "height must be a multiple of 2, got 33; try 32"),
    ("flux", {"frames": 5}, "--frames must be 1: FluxPipeline makes single images, got 5"),
    ("flux", {"format": "mp4"}, "--format must be png: FluxPipeline makes single images, got mp4"),
    ("flux", {"negative_prompt": "x"}, "--negative-prompt: FluxPipeline heeds one only with true_cfg_scale"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_family_cannot_make_is_refused_in_one_line(request_of, name, changes, message, tmp_path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(request_of(family, **changes))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
