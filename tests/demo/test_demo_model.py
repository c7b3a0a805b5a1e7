"""The bundled model: its files, its card, plain WanPipeline."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from diffusers import WanPipeline
from eval_demo import prompts_of

from dit_sparse.demo import demo_defaults, demo_model_path, unknown_words
from dit_sparse.demo.clips import held_out_clips

MODEL = demo_model_path()


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(MODEL, dtype=torch.float32)


def test_the_files_are_small():
    sizes = {path.name: path.stat().st_size for path in MODEL.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 25e6
    assert max(sizes.values()) <= 16 * 2**20


def test_plain_wan_pipeline_opens_it(pipe):
    assert json.loads((MODEL / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert all(torch.isfinite(parameter).all() for parameter in pipe.transformer.parameters())
    assert pipe.scheduler.config.flow_shift == 3.0
    assert all(value > 0 for value in pipe.vae.config.latents_std)


def test_the_default_size_has_enough_tokens_for_attention_to_dominate(pipe):
    frames = (demo_defaults["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    pixels = demo_defaults["height"] * demo_defaults["width"]
    assert frames * pixels / pipe.vae_scale_factor_spatial**2 == 6144


def test_it_generates(pipe):
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    frames = pipe("A red ball.", **size, output_type="np", generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (1, 5, 32, 32, 3)


def test_the_measured_figures_are_the_shipped_models():
    measured = json.loads((MODEL / "eval.json").read_text())
    weights = (MODEL / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert measured["transformer_sha256"] == hashlib.sha256(weights).hexdigest()
    assert measured["totals"]["prompts"] == len(held_out_clips())
    for aspect in ("colour", "shape", "motion", "background"):
        assert measured["totals"][aspect] == sum(clip["right"][aspect] for clip in measured["clips"])
    settings = {name: measured["settings"][name] for name in demo_defaults}
    assert settings == dict(demo_defaults)


def test_the_model_card_states_the_measured_figures():
    card = (MODEL / "README.md").read_text()
    measured = json.loads((MODEL / "eval.json").read_text())
    for aspect in ("colour", "shape", "motion", "background"):
        assert f"| {aspect} | {measured['totals'][aspect]} of 40 |" in card
    assert measured["command"] in card
    assert measured["date"][:10] in card
    assert "Apache-2.0" in card


def test_evaluation_prompts_are_in_the_models_words():
    prompts = prompts_of(list(held_out_clips()))
    assert len(set(prompts)) == len(prompts)
    assert [unknown_words(prompt) for prompt in prompts] == [[]] * len(prompts)
