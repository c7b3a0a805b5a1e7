"""VBench's official prompts, read from the info file of the installed package, and the videos that they ask for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_sparse.vbench.dimensions import DIMENSIONS, Dimension

__all__ = ["FLICKERING_SAMPLES", "SAMPLES", "Prompt", "Sample", "read_prompts", "samples"]

SAMPLES = 5
"""Videos a prompt."""

FLICKERING_SAMPLES = 25
"""Videos a prompt of `temporal_flickering`, of which the static filter keeps up to `SAMPLES`."""

_FLICKERING = "temporal_flickering"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the names of its dimensions, and what they need to know beside it, by dimension."""

    text: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """One video that the benchmark asks for."""

    prompt: Prompt
    index: int

    @property
    def stem(self) -> str:
        """Its official file name without the ending: the prompt, a hyphen and the index."""
        return f"{self.prompt.text}-{self.index}"


def read_prompts(path: Path, dimensions: Iterable[Dimension] = ()) -> tuple[Prompt, ...]:
    """The prompts in the info file `path`, those of `dimensions` alone if any are given.

    A prompt that stands there twice, for different dimensions, comes once: its videos serve all of them.

    Raises:
        ValueError: no such file, or not an info file of VBench.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, tuple[list[str], dict[str, Any]]] = {}
        for entry in entries:
            names, auxiliary = found.setdefault(str(entry["prompt_en"]), ([], {}))
            names += [name for name in entry["dimension"] if name not in names]
            auxiliary |= entry.get("auxiliary_info", {})
    except OSError as error:
        raise ValueError(f"VBench's info file {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no info file of VBench: {type(error).__name__}: {error}") from None
    wanted = {dimension.name for dimension in dimensions} or set(DIMENSIONS)
    return tuple(
        Prompt(text, tuple(names), auxiliary) for text, (names, auxiliary) in found.items() if wanted & set(names)
    )


def samples(prompts: Sequence[Prompt], dimensions: Iterable[Dimension] = ()) -> list[Sample]:
    """Every video that `prompts` need for `dimensions` (all of them if none are given), in a fixed order."""
    wanted = {dimension.name for dimension in dimensions} or set(DIMENSIONS)
    result = []
    for prompt in prompts:
        still = _FLICKERING in wanted and _FLICKERING in prompt.dimensions
        result += [Sample(prompt, index) for index in range(FLICKERING_SAMPLES if still else SAMPLES)]
    return result
