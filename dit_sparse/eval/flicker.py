"""Temporal flickering: how little a video changes from one frame to the next."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["temporal_flickering"]


def temporal_flickering(frames: Iterable[np.ndarray]) -> float:
    """1 minus the mean absolute difference of neighbouring `frames`, `[H, W, 3]` uint8 each, over 255.

    1 is a still video. The order of the channels does not matter.

    Raises:
        ValueError: fewer than two frames, or frames that are no uint8 or differ in shape.

    Source: VBench, arXiv 2311.17982, section 3.1; equal to VBench 0.1.5's `temporal_flickering`.
    """
    differences: list[float] = []
    last: np.ndarray | None = None
    for frame in frames:
        if frame.dtype != np.uint8 or (last is not None and frame.shape != last.shape):
            kept = "" if last is None else f" after {list(last.shape)}"
            raise ValueError(f"frames must be uint8 of one shape, got {frame.dtype} {list(frame.shape)}{kept}")
        if last is not None:
            # VBench's mean is one in float32.
            differences.append(float(np.abs(frame.astype(np.float32) - last.astype(np.float32)).mean()))
        last = frame
    if not differences:
        raise ValueError("frames must be at least two")
    return 1 - sum(differences) / len(differences) / 255
