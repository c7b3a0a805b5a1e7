"""Two files against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_sparse.eval.fidelity import Convention, compare
from dit_sparse.eval.frames import read_clip

__all__ = ["compare_files", "pair_lines"]


def compare_files(
    a: Path, b: Path, conventions: Sequence[Convention], *, lpips: bool = False, allow_lossy: bool = False
) -> dict[str, Any]:
    """Fidelity of `a` to `b`, each what `read_clip` reads, by every convention; ready for JSON.

    Raises:
        ValueError: as `read_clip`; another number of frames, another size, or another speed.
        FileNotFoundError: weights of LPIPS are missing.
    """
    one, other = (read_clip(path, allow_lossy=allow_lossy) for path in (a, b))
    for what, here, there in (
        ("number of frames", len(one.frames), len(other.frames)),
        ("size", *(f"{clip.frames.shape[2]}x{clip.frames.shape[1]}" for clip in (one, other))),
        ("frames a second", one.fps, other.fps),
    ):
        # Images have no speed, and go with any.
        if here != there and here is not None and there is not None:
            raise ValueError(f"{a} and {b} must have one {what}, got {here} and {there}")
    found = {c.name: compare(one.frames, other.frames, convention=c, lpips=lpips).to_dict() for c in conventions}
    first = next(iter(found.values()))
    return {
        "a": str(a),
        "b": str(b),
        "sources": [one.source, other.source],
        "lossy": one.lossy or other.lossy,
        "size": list(one.frames.shape[2:0:-1]),
        **{name: first[name] for name in ("frames", "identical", "identical_frames")},
        "fidelity": {name: {f: own[f] for f in ("psnr", "ssim", "lpips", "convention")} for name, own in found.items()},
    }


def pair_lines(report: Mapping[str, Any]) -> list[str]:
    """What `compare_files` found, for people."""
    width, height = report["size"]
    lines = [f"{report['frames']} frames of {height}x{width}; {' and '.join(report['sources'])}"]
    if report["lossy"]:
        lines.append("lossy: the figures measure the codec too")
    for name, own in report["fidelity"].items():
        psnr = "infinite" if own["psnr"] is None else f"{own['psnr']:.4f} dB"
        lpips = "" if own["lpips"] is None else f", LPIPS {own['lpips']:.4f}"
        lines.append(f"{name}: PSNR {psnr}, SSIM {own['ssim']:.5f}{lpips} ({own['convention']})")
    if report["identical"]:
        lines.append("identical")
    return lines
