"""The bundled model: its files, its card, plain WanPipeline, and what its training script relies on."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import WanPipeline

from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.demo.clips import held_out_clips

MODEL = demo_model_path()
SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up by name
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return script("train_demo")


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


def test_training_embeds_a_prompt_as_the_pipeline_does(pipe, training):
    net = training.Denoiser(layers=1)
    net.text.load_state_dict(pipe.text_encoder.state_dict())
    for prompt in ("A big blue star rising on a pink background.", ""):
        ids = torch.zeros(1, training.CAPTION_TOKENS, dtype=torch.long)
        tokens = pipe.tokenizer(prompt).input_ids
        ids[0, : len(tokens)] = torch.tensor(tokens)
        expected, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        torch.testing.assert_close(net.embed(ids, (ids != 0).long()), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_whole_clip_vae_is_the_chunked_one(training):
    torch.manual_seed(0)
    vae = training.make_vae().eval()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    moments = vae._encode(video)
    torch.testing.assert_close(training.encode_whole(vae, video), moments, rtol=1e-4, atol=1e-5)
    latents = moments[:, : training.LATENT_CHANNELS]
    decoded = training.decode_whole(vae, latents).clamp(-1, 1)
    torch.testing.assert_close(decoded, vae._decode(latents).sample, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_survives_the_disk(training, tmp_path):
    progress = training.Progress(layers=1, clips_drawn=5, coarse_steps=3)
    trainer = training.Trainer(progress, torch.device("cpu"))
    pool = training.LatentPool(torch.randn(4, 8, 2, 4, 4), progress.draw(4))
    assert trainer.run(pool, batch=2, seconds=0.01, schedule=lambda fraction: 1.0) >= 1
    vae = training.make_vae()
    training.save_checkpoint(tmp_path / "checkpoint", progress, vae, trainer)

    loaded, tensors = training.load_checkpoint(tmp_path / "checkpoint")
    assert loaded == progress
    resumed = training.Trainer(loaded, torch.device("cpu"))
    resumed.load_state(tensors)
    for name, parameter in trainer.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], parameter), name
    momentum = trainer.muon.state[next(iter(trainer.matrices.values()))]["momentum_buffer"]
    kept = resumed.muon.state[next(iter(resumed.matrices.values()))]["momentum_buffer"]
    torch.testing.assert_close(kept, momentum, rtol=1e-2, atol=1e-4)
    assert all(p.stat().st_size <= 16 * 2**20 for p in (tmp_path / "checkpoint").iterdir())


def test_the_learning_rate_spans_all_calls(training):
    whole = training.full_grid_schedule(0.0, 1.0)
    first, second = training.full_grid_schedule(0.0, 0.4), training.full_grid_schedule(0.4, 1.0)
    assert first(1.0) == pytest.approx(second(0.0)) == pytest.approx(whole(0.4))
    assert whole(0.0) == whole(0.35) == 1.0
    assert whole(1.0) == pytest.approx(0.01)


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
    from dit_sparse.demo import unknown_words

    prompts = script("eval_demo").prompts_of(list(held_out_clips()))
    assert len(set(prompts)) == len(prompts)
    assert [unknown_words(prompt) for prompt in prompts] == [[]] * len(prompts)
