"""Reads colour, shape, motion and background off a clip of one object with OpenCV, without knowing the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch

from dit_sparse.demo.clips import BACKGROUNDS, COLOURS, SHAPES, shape_distance

__all__ = ["Reading", "read_clip"]

_CONTRAST = 48.0  # smallest difference from the background, in 0..255 of one channel, that counts as object
_MIN_AREA = 0.0012  # of the frame; smaller specks are noise
_MIN_TRAVEL = 0.2  # of the frame's height
_MIN_GROWTH = 2.0  # ratio of last to first area
_ZOOM = 4  # masks are cut out at this multiple of the clip's resolution
_TEMPLATE = 64  # pixels along a template's longer side


@dataclass(frozen=True)
class Reading:
    """What a clip shows, in the words of `dit_sparse.demo.clips`; None where no object was found."""

    background: str
    colour: str | None
    shape: str | None
    motion: str | None
    shape_overlap: float
    """Intersection over union of the object with the best template, 0..1."""


@dataclass(frozen=True)
class _Sight:
    """The object in one frame: its alpha `[H, W]` in 0..1, area in pixels and centre in frame heights."""

    index: int
    alpha: np.ndarray
    area: float
    x: float
    y: float
    whole: bool


def read_clip(frames: np.ndarray) -> Reading:
    """Return what a clip of one object in front of a plain background shows.

    The background is the median colour of each row near the frame's sides, the object the largest connected region
    that differs from it; the motion is the path of its centroid and its area, the shape the template with the best
    overlap.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB.

    Raises:
        ValueError: `frames` has another dtype or shape.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    background = _background_rows(frames)
    name = _nearest(np.median(background, axis=0), BACKGROUNDS)
    sights = [s for i, frame in enumerate(frames) if (s := _find_object(frame, background, i)) is not None]
    if len(sights) < 0.6 * len(frames):
        return Reading(name, None, None, None, 0.0)

    # Shape and colour are read where the object is whole and large enough to have a shape.
    clear = [s for s in sights if s.whole] or sights
    clear = sorted(clear, key=lambda s: s.area)[len(clear) // 2 :]
    chosen = [clear[i] for i in np.linspace(0, len(clear) - 1, min(5, len(clear))).astype(int)]
    colour = np.median(np.concatenate([_core_pixels(frames[s.index], s.alpha) for s in chosen]), axis=0)
    overlaps = {shape: float(np.mean([_overlap(s.alpha, shape) for s in chosen])) for shape in SHAPES}
    shape = max(overlaps, key=overlaps.__getitem__)
    return Reading(name, _nearest(colour, COLOURS), shape, _motion(sights), overlaps[shape])


def _background_rows(frames: np.ndarray) -> np.ndarray:
    """Return the background's colour in every row, `[H, 3]`: it has a vertical gradient and no other detail."""
    margin = max(2, frames.shape[2] // 16)
    sides = np.concatenate([frames[:, :, :margin], frames[:, :, -margin:]], axis=2)
    return np.median(sides.transpose(1, 0, 2, 3).reshape(frames.shape[1], -1, 3), axis=1)


def _find_object(frame: np.ndarray, background: np.ndarray, index: int) -> _Sight | None:
    difference = np.abs(frame.astype(np.float32) - background[:, None]).max(axis=-1).astype(np.float32)
    mask = (difference > _CONTRAST).astype(np.uint8)
    count, labels, stats, centres = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    height, width = mask.shape
    left, top, columns, rows, area = (int(value) for value in stats[largest])
    if area < _MIN_AREA * height * width:
        return None
    region = cv2.dilate((labels == largest).astype(np.uint8), np.ones((3, 3), np.uint8))
    full = float(np.percentile(difference[labels == largest], 60))
    alpha = np.clip(difference / full, 0, 1) * region
    whole = left > 0 and top > 0 and left + columns < width and top + rows < height
    return _Sight(index, alpha, float(area), centres[largest][0] / height, centres[largest][1] / height, whole)


def _core_pixels(frame: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return the object's pixels `[n, 3]` without its blended edge, where it is thick enough to have any."""
    mask = (alpha > 0.8).astype(np.uint8)
    core = cv2.erode(mask, np.ones((3, 3), np.uint8))
    chosen = core if core.sum() >= 8 else mask
    return frame[chosen.astype(bool)] if chosen.any() else frame[alpha > 0]


def _motion(sights: list[_Sight]) -> str:
    xs, ys = np.array([s.x for s in sights]), np.array([s.y for s in sights])
    areas = np.array([s.area for s in sights])
    dx, dy = xs[-2:].mean() - xs[:2].mean(), ys[-2:].mean() - ys[:2].mean()
    path = np.abs(np.diff(ys[::2])).sum()
    if path > 0.6 and path > 2 * max(abs(dx), abs(dy)):
        return "bounce"
    if max(abs(dx), abs(dy)) > _MIN_TRAVEL:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    growth = areas[-2:].mean() / areas[:2].mean()
    if growth > _MIN_GROWTH:
        return "grow"
    if growth < 1 / _MIN_GROWTH:
        return "shrink"
    return "still"


def _overlap(alpha: np.ndarray, shape: str) -> float:
    zoomed = cv2.resize(alpha, None, fx=_ZOOM, fy=_ZOOM, interpolation=cv2.INTER_LINEAR)
    seen, template = _fit(zoomed > 0.5), _template(shape)
    return float((seen & template).sum() / max(1, (seen | template).sum()))


def _fit(mask: np.ndarray) -> np.ndarray:
    """Cut a mask out, scale it to the template's size without distortion, and centre it."""
    square = np.zeros((_TEMPLATE, _TEMPLATE), bool)
    if not mask.any():
        return square
    left, top, columns, rows = cv2.boundingRect(mask.astype(np.uint8))
    scale = _TEMPLATE / max(columns, rows)
    width, height = max(1, round(columns * scale)), max(1, round(rows * scale))
    cut = mask[top : top + rows, left : left + columns].astype(np.float32)
    resized = cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA) > 0.5
    y, x = (_TEMPLATE - height) // 2, (_TEMPLATE - width) // 2
    square[y : y + height, x : x + width] = resized
    return square


@lru_cache
def _template(shape: str) -> np.ndarray:
    axis = torch.linspace(-1.3, 1.3, 4 * _TEMPLATE)
    distance = shape_distance(shape, axis[None, :], axis[:, None], torch.ones(1, 1))
    return _fit((distance < 0).numpy())


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> str:
    """Return the palette's colour that looks nearest to `rgb` (0..255), by distance in CIE Lab."""
    names = list(palette)
    colours = np.concatenate([rgb[None] / 255, np.array(list(palette.values()))]).astype(np.float32)
    lab = cv2.cvtColor(colours[None], cv2.COLOR_RGB2Lab)[0]
    return names[int(np.linalg.norm(lab[1:] - lab[0], axis=1).argmin())]
