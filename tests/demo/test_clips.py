"""The procedural clips: reproducible, captioned in known words, and drawn where their description says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.demo.clips import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    ClipSpec,
    ObjectSpec,
    caption,
    held_out_clips,
    render_clips,
    sample_clip,
    shape_distance,
    vocabulary,
)

seeds = st.integers(min_value=0, max_value=2**48)


@given(seeds)
def test_a_clip_follows_from_its_seed(seed):
    assert sample_clip(seed) == sample_clip(seed)


@given(seeds)
def test_training_never_shows_a_held_out_object(seed):
    held_out = {(c.background, o.colour, o.shape, o.motion) for c in held_out_clips() for o in c.objects}
    clip = sample_clip(seed)
    assert not held_out & {(clip.background, o.colour, o.shape, o.motion) for o in clip.objects}


@given(seeds)
def test_two_objects_differ_in_colour_and_shape(seed):
    first, second = sample_clip(seed, objects=2).objects
    assert first.colour != second.colour
    assert first.shape != second.shape


def test_object_count_is_checked():
    with pytest.raises(ValueError, match="objects must be None, 1 or 2, got 3"):
        sample_clip(0, objects=3)


def test_held_out_clips_are_spread_evenly():
    clips = held_out_clips()
    assert len(clips) == len({(c.background, c.objects) for c in clips}) == 40
    for table, name in ((COLOURS, "colour"), (MOTIONS, "motion"), (SHAPES, "shape")):
        counts = [sum(getattr(c.objects[0], name) == word for c in clips) for word in table]
        assert max(counts) - min(counts) <= 2
    assert {c.background for c in clips} == set(BACKGROUNDS)


def test_the_usual_caption_reads_like_a_sentence():
    clip = ClipSpec("gray", (ObjectSpec("red", "ball", "left", "small"), ObjectSpec("orange", "star", "up", "big")), 0)
    assert caption(clip) == "A small red ball moving left and a big orange star moving up on a gray background."


@given(seeds)
def test_a_complete_caption_leaves_nothing_out(seed):
    clip = sample_clip(seed, objects=1)
    text = caption(clip, np.random.default_rng(seed), complete=True).lower()
    assert any(wording in text for wording in MOTIONS[clip.objects[0].motion])
    assert any(wording in text for wording in SHAPES[clip.objects[0].shape])
    assert "background" in text


@given(seeds)
def test_captions_keep_to_the_vocabulary(seed):
    text = caption(sample_clip(seed), np.random.default_rng(seed))
    assert set(text.lower().replace(",", " ").rstrip(".").split()) <= set(vocabulary())


def test_rendered_size_and_range():
    video = render_clips([sample_clip(i) for i in range(3)], frames=5, height=32, width=48)
    assert video.shape == (3, 3, 5, 32, 48)
    assert video.dtype == torch.float32
    assert video.min() >= -1
    assert video.max() <= 1


def test_rendering_does_not_depend_on_the_batch():
    specs = [sample_clip(i) for i in range(6)]
    together = render_clips(specs, frames=5, height=32, width=48)
    alone = torch.cat([render_clips([spec], frames=5, height=32, width=48) for spec in specs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_objects_go_where_their_motion_says():
    def path(motion: str) -> np.ndarray:
        clip = ClipSpec("black", (ObjectSpec("white", "ball", motion, "small"),), 7)
        seen = render_clips([clip], frames=9)[0].amax(0) > 0
        return np.array([[m.nonzero().float().mean(0)[1], m.nonzero().float().mean(0)[0], m.sum()] for m in seen])

    start_to_end = {motion: path(motion)[-1] - path(motion)[0] for motion in MOTIONS}
    assert start_to_end["right"][0] > 50 > -50 > start_to_end["left"][0]
    assert start_to_end["down"][1] > 30 > -30 > start_to_end["up"][1]
    assert start_to_end["grow"][2] > 100 > -100 > start_to_end["shrink"][2]
    assert np.abs(start_to_end["still"]).max() < 1e-3
    assert np.ptp(path("bounce")[:, 1]) > 20


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_an_inside_and_an_outside(shape):
    axis = torch.linspace(-2, 2, 81)
    distance = shape_distance(shape, axis[None, :], axis[:, None], torch.ones(1, 1))
    assert torch.isfinite(distance).all()
    assert (distance < 0).any()
    assert (distance[[0, -1]] > 0).all()
    assert (distance[:, [0, -1]] > 0).all()
    torch.testing.assert_close(distance, distance.flip(1), rtol=0, atol=1e-5)
