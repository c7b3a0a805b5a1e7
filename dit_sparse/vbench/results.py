"""The folder of scores: for each dimension a plan of its videos, and a file for each video's result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dit_sparse.vbench.dimensions import VERSION, Dimension
from dit_sparse.vbench.files import read_json, write_json
from dit_sparse.vbench.prompts import Prompt

__all__ = ["DimensionPlan", "read_plan", "read_result", "result_file", "result_key", "write_plan"]

_PLAN = "plan.json"


@dataclass(frozen=True)
class DimensionPlan:
    """Which results make up a dimension's score.

    Args:
        dimension: its name.
        custom: the videos are of other prompts than the official ones.
        keys: name of each result by the video's file name.
        missing: names of official videos that are not there.
        unusable: what is wrong with videos that are there.
        static_filter: what the filter of still videos kept: "judged", "kept" and the "prompts_without" any; `None`
            where it was not applied.
        weights: hash of the dimension's weights.
    """

    dimension: str
    custom: bool
    keys: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unusable: tuple[str, ...] = ()
    static_filter: Mapping[str, Any] | None = None
    weights: str = ""
    version: str = field(default=VERSION)


def result_key(dimension: Dimension, sha256: str, weights: str, prompt: Prompt) -> str:
    """Name of the result for a video: it changes with all that the score depends on."""
    content = [sha256, VERSION, dimension.name, weights, prompt.text, prompt.auxiliary.get(dimension.name)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def result_file(folder: Path, dimension: str, key: str) -> Path:
    """Where the result `key` of `dimension` is kept."""
    return folder / dimension / f"{key}.json"


def read_result(folder: Path, dimension: str, key: str) -> dict[str, Any] | None:
    """The result `key`, or `None` where there is none.

    Raises:
        ValueError: the file is no result.
    """
    path = result_file(folder, dimension, key)
    if not path.exists():
        return None
    result = read_json(path)
    if not isinstance(result, dict) or "score" not in result:
        raise ValueError(f"{path} is no result of VBench; remove it and score again")
    return result


def write_plan(folder: Path, plan: DimensionPlan) -> None:
    """Keep `plan` in `folder`, in place of an older one of its dimension."""
    write_json(folder / plan.dimension / _PLAN, asdict(plan))


def read_plan(folder: Path, dimension: str) -> DimensionPlan | None:
    """The plan of `dimension` in `folder`, or `None` where there is none.

    Raises:
        ValueError: the file is no plan.
    """
    path = folder / dimension / _PLAN
    if not path.exists():
        return None
    try:
        content = read_json(path)
        content |= {name: tuple(content[name]) for name in ("missing", "unusable")}
        return DimensionPlan(**content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no plan of VBench's scores ({error}); remove it and score again") from None
