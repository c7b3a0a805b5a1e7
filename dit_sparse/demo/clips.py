"""Procedural captioned clips: the demo model's training data and the ground truth of its judge.

A clip shows one or two flat shapes with a gentle shading in front of a plain background with a vertical gradient.
Everything about a clip follows from its seed. Lengths are in units of the frame's height, the origin is the top left
corner, y points down, and time runs from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "MOTIONS",
    "SHAPES",
    "SIZES",
    "ClipSpec",
    "ObjectSpec",
    "caption",
    "held_out_clips",
    "render_clips",
    "sample_clip",
    "shape_distance",
    "vocabulary",
]

Rgb = tuple[float, float, float]

COLOURS: dict[str, Rgb] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.15, 0.65, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.95, 0.85, 0.15),
    "white": (0.96, 0.96, 0.96),
    "orange": (0.97, 0.52, 0.08),
    "purple": (0.55, 0.16, 0.70),
    "cyan": (0.15, 0.80, 0.85),
}
BACKGROUNDS: dict[str, Rgb] = {
    "black": (0.04, 0.04, 0.05),
    "gray": (0.45, 0.45, 0.46),
    "navy": (0.05, 0.08, 0.25),
    "pink": (0.95, 0.68, 0.74),
    "brown": (0.33, 0.20, 0.11),
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.10, 0.13), "big": (0.19, 0.24)}

# How captions say it: the first wording is the usual one.
SHAPES: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "circle"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "ring": ("ring",),
    "cross": ("cross", "plus"),
    "star": ("star",),
}
MOTIONS: dict[str, tuple[str, ...]] = {
    "left": ("moving left", "moving to the left", "going left", "sliding to the left"),
    "right": ("moving right", "moving to the right", "going right", "sliding to the right"),
    "up": ("moving up", "rising", "going up", "moving upwards"),
    "down": ("moving down", "falling", "going down", "moving downwards"),
    "still": ("standing still", "not moving", "at rest"),
    "grow": ("growing", "getting bigger", "getting larger"),
    "shrink": ("shrinking", "getting smaller"),
    "bounce": ("bouncing up and down", "bouncing", "jumping up and down"),
}
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "gray": ("gray", "grey"),
    "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"),
    "small": ("small", "little", "tiny"),
    "big": ("big", "large"),
}
_SENTENCES = (
    "{objects} on a {background} background",
    "{objects} in front of a {background} background",
    "{background} background, {objects}",
    "{objects}, {background} background",
    "a video of {objects} on a {background} background",
)

_HELD_OUT_SEED = 20_240_817
_HELD_OUT_CLIPS = 40


@dataclass(frozen=True)
class ObjectSpec:
    """One object of a clip, in the words of `COLOURS`, `SHAPES`, `MOTIONS` and `SIZES`."""

    colour: str
    shape: str
    motion: str
    size: str


@dataclass(frozen=True)
class ClipSpec:
    """A clip: its background, its one or two objects, and the seed of their exact places, sizes and shades."""

    background: str
    objects: tuple[ObjectSpec, ...]
    seed: int


@dataclass(frozen=True)
class _Track:
    """Where an object is in every frame: centre and radius `[T]`, and its colour `[3]` in 0..1."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    colour: np.ndarray


def sample_clip(seed: int, objects: int | None = None) -> ClipSpec:
    """Return the training clip of `seed`; never one that shows an object of `held_out_clips` on its background.

    Args:
        seed: any non-negative integer.
        objects: how many objects, 1 or 2; by default 2 in three of ten clips.

    Raises:
        ValueError: `objects` is neither None, 1 nor 2.
    """
    if objects not in (None, 1, 2):
        raise ValueError(f"objects must be None, 1 or 2, got {objects!r}")
    rng = np.random.default_rng(seed)
    count = objects or (2 if rng.random() < 0.3 else 1)
    while True:
        background = _pick(rng, BACKGROUNDS)
        drawn = tuple(
            ObjectSpec(_pick(rng, COLOURS), _pick(rng, SHAPES), _pick(rng, MOTIONS), _pick(rng, SIZES))
            for _ in range(count)
        )
        if any((background, o.colour, o.shape, o.motion) in _held_out_keys() for o in drawn):
            continue
        # Two objects alike in colour or shape cannot be told apart by the caption's words alone.
        if count == 2 and (drawn[0].colour == drawn[1].colour or drawn[0].shape == drawn[1].shape):
            continue
        return ClipSpec(background, drawn, seed)


@lru_cache(maxsize=1)
def held_out_clips() -> tuple[ClipSpec, ...]:
    """Return the 40 single-object clips that evaluation uses and training never shows.

    Colours, motions and backgrounds are spread evenly over them, shapes as evenly as 40 goes into 6.
    """
    rng = np.random.default_rng(_HELD_OUT_SEED)

    def spread(names: dict) -> list[str]:
        repeated = [name for _ in range(-(-_HELD_OUT_CLIPS // len(names))) for name in names]
        return [repeated[i] for i in rng.permutation(_HELD_OUT_CLIPS)]

    columns = zip(spread(BACKGROUNDS), spread(COLOURS), spread(SHAPES), spread(MOTIONS), spread(SIZES), strict=True)
    return tuple(
        ClipSpec(background, (ObjectSpec(*description),), _HELD_OUT_SEED + i)
        for i, (background, *description) in enumerate(columns)
    )


@lru_cache(maxsize=1)
def _held_out_keys() -> frozenset[tuple[str, str, str, str]]:
    return frozenset((clip.background, o.colour, o.shape, o.motion) for clip in held_out_clips() for o in clip.objects)


def caption(spec: ClipSpec, rng: np.random.Generator | None = None, complete: bool = False) -> str:
    """Return an English sentence that describes `spec`.

    Args:
        spec: the clip.
        rng: chooses among wordings; None gives the usual wording.
        complete: always name the background, the motions and the sizes, which a random caption now and then leaves out.
    """
    chance = rng.random if rng is not None else lambda: 1.0
    omit = 0.0 if complete or rng is None else 1.0
    objects = " and ".join(_describe(o, rng, omit) for o in spec.objects)
    if chance() < 0.06 * omit:
        sentence = objects
    else:
        pattern = _SENTENCES[0] if chance() > 0.5 else _SENTENCES[int(chance() * len(_SENTENCES))]
        sentence = pattern.format(objects=objects, background=_say(spec.background, rng))
    return sentence[0].upper() + sentence[1:] + "."


def _describe(item: ObjectSpec, rng: np.random.Generator | None, omit: float) -> str:
    chance = rng.random if rng is not None else lambda: 1.0
    words = [_say(item.colour, rng), _wording(SHAPES[item.shape], rng)]
    if chance() >= 0.3 * omit:
        words.insert(0, _say(item.size, rng))
    words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    if chance() >= 0.06 * omit:
        words.append(_wording(MOTIONS[item.motion], rng))
    return " ".join(words)


def _say(name: str, rng: np.random.Generator | None) -> str:
    return _wording(_SYNONYMS.get(name, (name,)), rng)


def _wording(wordings: Sequence[str], rng: np.random.Generator | None) -> str:
    if rng is None or rng.random() < 0.5:
        return wordings[0]
    return wordings[int(rng.integers(len(wordings)))]


def _pick(rng: np.random.Generator, names: dict) -> str:
    return list(names)[int(rng.integers(len(names)))]


def vocabulary() -> list[str]:
    """Return every word that a caption can hold, lower-cased and sorted."""
    phrases = [*COLOURS, *BACKGROUNDS, *SIZES, "a", "an", "and"]
    phrases += [pattern.format(objects="", background="") for pattern in _SENTENCES]
    for wordings in (*SHAPES.values(), *MOTIONS.values(), *_SYNONYMS.values()):
        phrases += wordings
    return sorted({word for phrase in phrases for word in phrase.replace(",", " ").split()})


def render_clips(
    specs: Sequence[ClipSpec],
    frames: int = 29,
    height: int = 96,
    width: int = 128,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Render clips with anti-aliased edges.

    Args:
        specs: the clips, B of them.
        frames, height, width: size of every clip in frames and pixels.
        device: where to render.

    Returns:
        float32 `[B, 3, frames, height, width]`, RGB in -1..1.
    """
    aspect = width / height
    rows = (torch.arange(height, device=device) + 0.5).view(1, 1, height, 1) / height
    columns = (torch.arange(width, device=device) + 0.5).view(1, 1, 1, width) / height
    scenes = [_scene(spec, frames, aspect) for spec in specs]

    def upload(arrays: Sequence[np.ndarray]) -> Tensor:
        # Non-blocking, so that rendering on a GPU never waits for the work queued before it.
        return torch.from_numpy(np.stack(arrays)).to(device, non_blocking=True)

    plain = upload([background for background, _ in scenes])
    gradient = (1.12 - 0.24 * rows).unsqueeze(1)
    video = (plain.view(-1, 3, 1, 1, 1) * gradient).expand(-1, -1, frames, -1, width).contiguous()

    for layer in range(max(len(spec.objects) for spec in specs)):
        for shape in SHAPES:
            members = [i for i, s in enumerate(specs) if len(s.objects) > layer and s.objects[layer].shape == shape]
            if not members:
                continue
            tracks = [scenes[i][1][layer] for i in members]

            x, y, radius = (
                upload([getattr(track, name) for track in tracks]).view(-1, frames, 1, 1)
                for name in ("x", "y", "radius")
            )
            dx, dy = columns - x, rows - y
            coverage = (0.5 - height * shape_distance(shape, dx, dy, radius)).clamp(0, 1).unsqueeze(1)
            shading = (1 - 0.22 * ((dx + dy) / (2 * radius)).clamp(-1, 1)).unsqueeze(1)
            colour = upload([track.colour for track in tracks]).view(-1, 3, 1, 1, 1)
            index = upload([np.asarray(i) for i in members])
            video[index] = video[index] * (1 - coverage) + colour * shading * coverage
    return video.clamp_(0, 1).mul_(2).sub_(1)


def _scene(spec: ClipSpec, frames: int, aspect: float) -> tuple[np.ndarray, list[_Track]]:
    """Draw the background's shade and the objects' tracks from the clip's seed."""
    rng = np.random.default_rng((spec.seed, 1))
    background = np.asarray(BACKGROUNDS[spec.background], np.float32) * np.float32(1 + 0.02 * rng.normal())
    first_side = 1 if rng.random() < 0.5 else -1
    tracks = []
    for i, item in enumerate(spec.objects):
        others = [o.motion for o in spec.objects if o is not item]
        tracks.append(_track(item, others, first_side * (-1) ** i, frames, aspect, rng))
    return background, tracks


def _track(
    item: ObjectSpec, others: list[str], side: int, frames: int, aspect: float, rng: np.random.Generator
) -> _Track:
    """Return an object's track; one of two objects keeps to its own side of the frame."""
    time = np.linspace(0, 1, frames, dtype=np.float32)
    shade = np.clip(np.asarray(COLOURS[item.colour], np.float32) * np.float32(1 + 0.03 * rng.normal()), 0, 1)
    radius = rng.uniform(*SIZES[item.size]) * (0.8 if others else 1.0)
    sideways = ("left", "right")
    x = aspect / 2 + rng.uniform(-0.2, 0.2)
    y = 0.5 + rng.uniform(-0.12, 0.12)
    if others and (item.motion in sideways or others[0] in sideways):
        y = 0.5 + 0.24 * side
    if others and item.motion not in sideways:
        x = aspect * (0.5 + 0.22 * side)
    xs, ys, radii = (np.full(frames, value, np.float32) for value in (x, y, radius))
    match item.motion:
        case "left" | "right":
            travel = rng.uniform(0.65, 0.95) * (1 if item.motion == "right" else -1)
            xs = aspect / 2 + rng.uniform(-0.08, 0.08) + travel * (time - 0.5)
        case "up" | "down":
            travel = rng.uniform(0.45, 0.65) * (1 if item.motion == "down" else -1)
            ys = 0.5 + rng.uniform(-0.05, 0.05) + travel * (time - 0.5)
        case "grow":
            radii = radius * (0.45 + time)
        case "shrink":
            radii = radius * (1.45 - time)
        case "bounce":
            ys = 0.78 - radius / 2 - 0.45 * np.abs(np.sin(math.pi * (2 * time + rng.uniform(0, 1))))
    return _Track(*(np.asarray(values, np.float32) for values in (xs, ys, radii, shade)))


def shape_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Return the signed distance to a shape's outline, negative inside; outside it may be a lower bound.

    Args:
        shape: a name of `SHAPES`.
        dx, dy: offset from the shape's centre, broadcastable with `radius`.
        radius: the shape's nominal radius.
    """
    return _DISTANCES[shape](dx, dy, radius)


def _ball(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(dx, dy) - radius


def _square(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius


def _triangle(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    slope = math.sqrt(3) / 2
    return torch.maximum(dx.abs() * slope - dy / 2, dy) - 0.55 * radius


def _ring(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return (torch.hypot(dx, dy) - 0.78 * radius).abs() - 0.24 * radius


def _cross(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    ax, ay = dx.abs(), dy.abs()
    lying = torch.maximum(ax - radius, ay - 0.34 * radius)
    standing = torch.maximum(ay - radius, ax - 0.34 * radius)
    return torch.minimum(lying, standing)


def _star(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Fold the plane into half of one of five points, where the outline is one straight edge."""
    fifth = 2 * math.pi / 5
    angle = (torch.atan2(dx, -dy) + fifth / 2) % fifth - fifth / 2
    length = torch.hypot(dx, dy)
    across, along = length * angle.sin().abs(), length * angle.cos()
    tip = 1.12 * radius
    inner_x, inner_y = 0.45 * tip * math.sin(fifth / 2), 0.45 * tip * math.cos(fifth / 2)
    normal_x, normal_y = tip - inner_y, inner_x
    return (across * normal_x + (along - tip) * normal_y) / torch.hypot(normal_x, normal_y)


_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ball": _ball,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
}
