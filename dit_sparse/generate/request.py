"""What is asked of `generate`, validated as far as that needs no model; nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_sparse.generate.config import flag

__all__ = ["FORMATS", "MAX_SEED", "Clip", "Request", "Settings", "clips", "slug"]

FORMATS = ("mp4", "gif", "png")
MAX_SEED = 2**63 - 1
_MAX_FPS = 240


@dataclass(frozen=True)
class Request:
    """Everything the caller asks for; `None` leaves a choice to the model.

    Args:
        prompts: at least one.
        config: flat config of the schedule and its method, as `Schedule.to_config` gives it.
        out: folder of the videos.
        model: folder or hub id; `None` or "demo" is the bundled model.
        height, width: in pixels.
        frames, steps, guidance, negative_prompt: as the pipeline takes them.
        seed: of a prompt's first video; its `num_samples` videos take the seeds from there on.
        dtype, device: "auto" chooses by the machine.
        offload: how the weights are kept off the GPU, as `load_pipeline` names it.
        format: "mp4", "gif", or "png" for a folder of frames; `None` is mp4, and png where there is one frame, which
            is always an image of its own.
        fps: frames a second of the file; `None` is the preset's, or 16.
        compare_dense: also render every video dense, write that too, and compare.
        overwrite: make finished videos again.
        parallel: ranks that share each video, as `Degrees.of` reads them; `None` is one process.
        clips: the videos to make, in place of those that the prompts, `seed` and `num_samples` mean.
        trace: also write what each step, layer and head did, for `dit-sparse report`.

    Raises:
        ValueError: a value out of range.
    """

    prompts: tuple[str, ...]
    config: Mapping[str, Any]
    out: Path
    model: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    num_samples: int = 1
    negative_prompt: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    format: str | None = None
    fps: int | None = None
    compare_dense: bool = False
    overwrite: bool = False
    parallel: str | None = None
    clips: tuple[Clip, ...] = ()
    trace: bool = False

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        for name in ("height", "width", "frames", "steps", "num_samples", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {value}")
        if self.fps is not None and self.fps > _MAX_FPS:
            raise ValueError(f"--fps must be at most {_MAX_FPS}, got {self.fps}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"--guidance must be a finite number of at least 0, got {self.guidance}")
        if not 0 <= self.seed <= MAX_SEED - (self.num_samples - 1):
            raise ValueError(f"--seed must be from 0 to 2**63 - 1, for every sample, got {self.seed}")
        if self.parallel is not None:
            Degrees.of(self.parallel)
            if self.offload != "none":
                raise ValueError(f"--offload must be none with --parallel, got {self.offload}")
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {self.format!r}")


@dataclass(frozen=True)
class Degrees:
    """How many ranks share a video.

    Args:
        ulysses: ranks that exchange heads for tokens.
        ring: ranks round which keys and values go.
        timeout: seconds after which a rank that does not answer counts as lost.
    """

    ulysses: int = 1
    ring: int = 1
    timeout: int = 300

    @classmethod
    def of(cls, text: str) -> Degrees:
        """Degrees from "ulysses=2", "ring=2" or "ulysses=2,ring=2", and perhaps a "timeout=600".

        Raises:
            ValueError: anything else.
        """
        found: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if (
                name not in ("ulysses", "ring", "timeout")
                or name in found
                or not re.fullmatch(r"[1-9][0-9]{0,5}", number)
            ):
                raise ValueError(
                    f"--parallel must be such as ulysses=2, ring=2 or ulysses=2,ring=2,timeout=600, got {text!r}"
                )
            found[name] = int(number)
        degrees = cls(**found)
        if degrees.ranks < 2:
            raise ValueError(f"--parallel must name at least 2 ranks, got {text!r}")
        return degrees

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.ulysses * self.ring


@dataclass(frozen=True)
class Settings:
    """All that decides a video's file beside its prompt and seed; nothing is left open."""

    model: str
    config: Mapping[str, Any]
    height: int
    width: int
    frames: int
    steps: int
    guidance: float | None
    negative_prompt: str | None
    dtype: str
    format: str
    fps: int

    def key(self, clip: Clip) -> str:
        """Hash that two videos share only if they are the same video."""
        content = asdict(self) | {"prompt": clip.prompt, "seed": clip.seed, "repeat": clip.repeat}
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


@dataclass(frozen=True)
class Clip:
    """One video to make.

    Args:
        index: of its prompt in the file, from 1.
        repeat: how many equal prompts stand before it.
        name: its file name without the ending, where others have settled it.
    """

    index: int
    prompt: str
    seed: int
    repeat: int = 0
    name: str | None = None

    @property
    def stem(self) -> str:
        """File name without its ending, such as `0001-a-big-red-ball-seed0`."""
        return self.name or f"{self.index:04d}-{slug(self.prompt)}-seed{self.seed}"


def clips(prompts: Sequence[str], seed: int, num_samples: int) -> list[Clip]:
    """The videos of `prompts`, `num_samples` each with the seeds from `seed` on, in order."""
    seen: dict[str, int] = {}
    result = []
    for index, prompt in enumerate(prompts, 1):
        repeat = seen.get(prompt, 0)
        seen[prompt] = repeat + 1
        result += [Clip(index, prompt, seed + sample, repeat) for sample in range(num_samples)]
    return result


def slug(text: str, length: int = 60) -> str:
    """At most `length` characters of `a-z`, `0-9` and single inner hyphens that remind of `text`; never empty."""
    # "ß" and the like have no decomposition, so case folding comes first.
    plain = unicodedata.normalize("NFKD", text.casefold()).encode("ascii", "ignore").decode("ascii")
    words = re.findall(r"[a-z0-9]+", plain.lower().replace("'", ""))
    whole = "-".join(words)
    if len(whole) > length:
        cut = whole[: length + 1]
        whole = cut[: cut.rfind("-")] if "-" in cut else cut[:length]
    return whole or "prompt"
