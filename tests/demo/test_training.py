"""How the demo model is trained: `scripts/demo_training`."""

from __future__ import annotations

import pytest
import torch
import train_demo
from demo_training import denoiser
from demo_training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from demo_training.denoiser import CAPTION_TOKENS, Denoiser, Span, Trainer
from demo_training.run import LATENT_CHANNELS, Progress
from demo_training.vae import LatentPool, decode_whole, encode_whole, make_vae
from diffusers import WanPipeline

from dit_sparse.demo import demo_model_path
from dit_sparse.demo.clips import sample_clip


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(demo_model_path(), dtype=torch.float32)


def test_training_embeds_a_prompt_as_the_pipeline_does(pipe):
    net = Denoiser(layers=1)
    net.text.load_state_dict(pipe.text_encoder.state_dict())
    for prompt in ("A big blue star rising on a pink background.", ""):
        ids = torch.zeros(1, CAPTION_TOKENS, dtype=torch.long)
        tokens = pipe.tokenizer(prompt).input_ids
        ids[0, : len(tokens)] = torch.tensor(tokens)
        expected, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        torch.testing.assert_close(net.embed(ids, (ids != 0).long()), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_whole_clip_vae_is_the_chunked_one():
    torch.manual_seed(0)
    vae = make_vae().eval()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    moments = vae._encode(video)
    torch.testing.assert_close(encode_whole(vae, video), moments, rtol=1e-4, atol=1e-5)
    latents = moments[:, :LATENT_CHANNELS]
    decoded = decode_whole(vae, latents).clamp(-1, 1)
    torch.testing.assert_close(decoded, vae._decode(latents).sample, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_survives_the_disk(tmp_path):
    progress = Progress(layers=1, clips_drawn=5, coarse_steps=3)
    trainer = Trainer(progress, torch.device("cpu"))
    pool = LatentPool(torch.randn(4, 8, 2, 4, 4), progress.draw(4))
    assert trainer.run(pool, batch=2, seconds=0.01, schedule=lambda fraction: 1.0) >= 1
    vae = make_vae()
    save_checkpoint(tmp_path / "checkpoint", progress, vae, trainer)

    loaded, tensors = load_checkpoint(tmp_path / "checkpoint")
    assert loaded == progress
    resumed = Trainer(loaded, torch.device("cpu"))
    resumed.load_state(tensors)
    for name, parameter in trainer.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], parameter), name
    momentum = trainer.muon.state[next(iter(trainer.matrices.values()))]["momentum_buffer"]
    kept = resumed.muon.state[next(iter(resumed.matrices.values()))]["momentum_buffer"]
    torch.testing.assert_close(kept, momentum, rtol=1e-2, atol=1e-4)
    assert all(p.stat().st_size <= 16 * 2**20 for p in (tmp_path / "checkpoint").iterdir())


def test_the_learning_rate_spans_all_calls():
    whole, first, second = Span(0.0, 1.0), Span(0.0, 0.4), Span(0.4, 1.0)
    assert first.learning_rate(1.0) == pytest.approx(second.learning_rate(0.0))
    assert second.learning_rate(0.0) == pytest.approx(whole.learning_rate(0.4))
    assert whole.learning_rate(0.0) == whole.learning_rate(0.35) == 1.0
    assert whole.learning_rate(1.0) == pytest.approx(0.01)
    assert [span.ends(0.7) for span in (whole, first, second)] == pytest.approx([0.7, 1.75, 0.5])


@torch.no_grad()
def test_an_opening_is_what_the_vae_makes_of_a_shorter_clip():
    vae = make_vae().eval()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    whole = LatentPool(encode_whole(vae, video), [sample_clip(0)])
    torch.testing.assert_close(whole.openings(2).latents, encode_whole(vae, video[:, :, :5]), rtol=1e-4, atol=1e-5)


class FiveSteps:
    """A deadline that comes after five steps, however long they take."""

    fraction = 0.5
    elapsed = 1.0

    def __init__(self, seconds):
        self.checks = 0

    @property
    def left(self):
        self.checks += 1
        return 1.0 if self.checks <= 5 else 0.0


def test_steps_on_openings_are_counted_apart(monkeypatch):
    monkeypatch.setattr(denoiser, "Deadline", FiveSteps)
    progress = Progress(layers=1)
    trainer = Trainer(progress, torch.device("cpu"))
    pool = LatentPool(torch.randn(4, 8, 4, 4, 4), progress.draw(4))
    taken = trainer.run(pool, batch=2, seconds=1, schedule=lambda fraction: 1.0, openings_until=1.0)
    assert (taken, progress.opening_steps) == (5, 2)


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        save_checkpoint(tmp_path, Progress(layers=1), make_vae(), None)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("left", ["state", "state.new", "state.old"])
def test_a_checkpoint_outlives_a_crash_while_it_is_replaced(tmp_path, left):
    save_checkpoint(tmp_path / "state", Progress(layers=1, vae_steps=7), make_vae(), None)
    (tmp_path / "state").rename(tmp_path / left)
    found = find_checkpoint(tmp_path / "state")
    assert found == tmp_path / left
    assert load_checkpoint(found)[0].vae_steps == 7
    assert find_checkpoint(tmp_path / "other") is None


def test_nothing_is_exported_without_a_trained_model(tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint"):
        train_demo.main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "model"), "--export-only"])
    assert not (tmp_path / "model").exists()
