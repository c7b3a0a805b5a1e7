"""The videos that VBench asks for, as clips that the project's own generation makes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dit_sparse.generate.request import Clip
from dit_sparse.vbench.prompts import SAMPLES, Prompt, Sample

__all__ = ["custom_samples", "parse_shard", "shard_clips"]

_LONGEST_NAME = 215
"""Bytes of a prompt that still make a file name, with its index, its ending and what marks it as unfinished."""


def parse_shard(text: str) -> tuple[int, int]:
    """The part and the number of parts in a text such as "2/8".

    Raises:
        ValueError: another text, or no such part.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    shard, shards = map(int, match.groups()) if match else (0, 0)
    if not 1 <= shard <= shards:
        raise ValueError(f"--shard must be such as 2/8, from 1/8 to 8/8, got {text!r}")
    return shard, shards


def custom_samples(prompts: Sequence[str]) -> list[Sample]:
    """`SAMPLES` videos for each of `prompts`, which are not VBench's own.

    Raises:
        ValueError: a prompt that stands there twice, whose videos would bear one name.
    """
    twice = [text for text in dict.fromkeys(prompts) if prompts.count(text) > 1]
    if twice:
        raise ValueError(f"a prompt stands there twice: {twice[0]!r}; its videos would bear the same names")
    return [Sample(Prompt(text, (), {}), index) for text in prompts for index in range(SAMPLES)]


def shard_clips(samples: Sequence[Sample], seed: int, shard: tuple[int, int] = (1, 1)) -> list[Clip]:
    """The clips of part `shard` of `samples`; the sample of index i is made with the seed `seed` + i.

    They bear the official names, but for prompts that make no file name: those are told by the manifest alone.
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(s.prompt.text for s in samples), 1)}
    clips = [
        Clip(
            numbers[s.prompt.text], s.prompt.text, seed + s.index, name=s.stem if _names_a_file(s.prompt.text) else None
        )
        for s in samples
    ]
    return clips[shard[0] - 1 :: shard[1]]


def _names_a_file(text: str) -> bool:
    return len(text.encode()) <= _LONGEST_NAME and "/" not in text and not text.startswith(".")
