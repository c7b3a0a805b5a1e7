"""The judge against rendered clips, where the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from dit_sparse.demo.clips import ClipSpec, held_out_clips, render_clips, sample_clip
from dit_sparse.demo.judge import read_clip


def rendered(specs: list[ClipSpec]) -> np.ndarray:
    videos = render_clips(specs)
    return (videos.permute(0, 2, 3, 4, 1) * 127.5 + 127.5).round().byte().numpy()


def assert_right(specs: list[ClipSpec], videos: np.ndarray) -> None:
    for spec, video in zip(specs, videos, strict=True):
        reading, item = read_clip(video), spec.objects[0]
        seen = (reading.background, reading.colour, reading.shape, reading.motion)
        assert seen == (spec.background, item.colour, item.shape, item.motion), spec


def test_it_reads_every_held_out_clip_right():
    specs = list(held_out_clips())
    assert_right(specs, rendered(specs))


def test_it_reads_other_clips_right():
    specs = [sample_clip(seed, objects=1) for seed in range(8)]
    assert_right(specs, rendered(specs))


def test_noise_does_not_mislead_it():
    specs = list(held_out_clips())[:6]
    noise = np.random.default_rng(0).normal(0, 8, (29, 96, 128, 3))
    assert_right(specs, np.clip(rendered(specs) + noise, 0, 255).astype(np.uint8))


def test_an_empty_clip_shows_no_object():
    reading = read_clip(np.full((29, 96, 128, 3), 5, np.uint8))
    assert (reading.background, reading.colour, reading.shape, reading.motion) == ("black", None, None, None)


@pytest.mark.parametrize("frames", [np.zeros((29, 96, 128, 3), np.float32), np.zeros((96, 128, 3), np.uint8)])
def test_bad_frames_are_named(frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[T, H, W, 3\]"):
        read_clip(frames)
