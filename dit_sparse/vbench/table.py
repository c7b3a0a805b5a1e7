"""VBench's leaderboard figures from the scores of videos, and what they lack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_sparse.vbench.dimensions import DIMENSIONS, QUALITY_WEIGHT, SEMANTIC_WEIGHT, Dimension
from dit_sparse.vbench.results import DimensionPlan, read_plan, read_result

__all__ = ["DimensionScore", "Scores", "merge", "read_scores", "totals"]


@dataclass(frozen=True)
class DimensionScore:
    """A dimension's score as VBench gives it and normalised, over how many videos, and what it lacks."""

    dimension: str
    score: float
    normalised: float
    videos: int
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Scores of a folder, and what stands in the way of the totals.

    Args:
        custom: of videos of other prompts, for which there are no totals.
        quality, semantic, total: `None` unless every dimension is there and complete.
    """

    dimensions: tuple[DimensionScore, ...]
    lacks: tuple[str, ...]
    custom: bool = False
    quality: float | None = None
    semantic: float | None = None
    total: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rows = {row.dimension: {k: v for k, v in vars(row).items() if k != "dimension"} for row in self.dimensions}
        return vars(self) | {"dimensions": rows}


def read_scores(folder: Path, *, allow_partial: bool = False) -> Scores:
    """The scores in `folder`.

    Raises:
        ValueError: no scores there, or incomplete ones without `allow_partial`.
    """
    plans = [plan for name in DIMENSIONS if (plan := read_plan(folder, name)) is not None]
    if not plans:
        raise ValueError(f"{folder} holds no scores of VBench; `dit-sparse vbench score` makes them")
    if len({plan.custom for plan in plans}) > 1:
        raise ValueError(f"{folder} holds scores of official and of other videos; score them into folders of their own")
    rows = tuple(row for plan in plans if (row := _row(folder, plan)) is not None)
    custom = plans[0].custom
    absent = [name for name in DIMENSIONS if name not in {row.dimension for row in rows}]
    lacks = tuple(f"{row.dimension}: {line}" for row in rows for line in row.lacks)
    if custom:
        lacks += tuple(f"{plan.dimension}: not scored" for plan in plans if plan.dimension in absent)
    else:
        lacks += tuple(f"{name}: not scored" for name in absent)
    if lacks and not allow_partial:
        more = f" (and {len(lacks) - 1} more)" if len(lacks) > 1 else ""
        raise ValueError(
            f"{folder} is incomplete: {lacks[0]}{more}; --allow-partial shows what is there, without totals"
        )
    if custom or lacks:
        return Scores(rows, lacks, custom)
    return Scores(rows, lacks, custom, **totals({row.dimension: row.score for row in rows}))


def merge(dimension: Dimension, results: Iterable[Mapping[str, Any]]) -> float | None:
    """The dimension's score from those of its videos, or `None` where no video has one.

    The same mean as VBench takes on one GPU, whatever the shards: over videos, over their frames, or, for
    consistency, over pairs of neighbouring frames.
    """
    pairs = [(result["score"], _weight(dimension, result)) for result in results if result["score"] is not None]
    total = sum(weight for _, weight in pairs)
    return dimension.scale * sum(score * weight for score, weight in pairs) / total if total else None


def totals(scores: Mapping[str, float]) -> dict[Literal["quality", "semantic", "total"], float]:
    """Quality, Semantic and Total of the leaderboard, from the scores of all dimensions as VBench gives them.

    Raises:
        ValueError: a dimension is not there, which VBench's own script would count as 0.
    """
    absent = [name for name in DIMENSIONS if name not in scores]
    if absent:
        raise ValueError(f"scores must hold every dimension; {', '.join(absent)} is not there")
    quality, semantic = (_group(scores, group) for group in ("quality", "semantic"))
    total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {"quality": quality, "semantic": semantic, "total": total}


def _group(scores: Mapping[str, float], group: str) -> float:
    members = [dimension for dimension in DIMENSIONS.values() if dimension.group == group]
    weighted = sum(dimension.weight * dimension.normalise(scores[dimension.name]) for dimension in members)
    return weighted / sum(dimension.weight for dimension in members)


def _weight(dimension: Dimension, result: Mapping[str, Any]) -> int:
    if dimension.average == "video":
        return 1
    if dimension.average == "transition":
        return int(result["frames"]) - 1
    details = result["details"]
    return len(details["frame_results"]) if "frame_results" in details else int(details["frame_count"])


def _row(folder: Path, plan: DimensionPlan) -> DimensionScore | None:
    dimension = DIMENSIONS[plan.dimension]
    found = {name: read_result(folder, plan.dimension, key) for name, key in plan.keys.items()}
    results = [result for result in found.values() if result is not None]
    score = merge(dimension, results)
    if score is None:
        return None
    return DimensionScore(plan.dimension, score, dimension.normalise(score), len(results), tuple(_lacks(plan, found)))


def _lacks(plan: DimensionPlan, found: Mapping[str, Any]) -> list[str]:
    lines = list(plan.unusable)
    if plan.missing:
        lines.append(f"{len(plan.missing)} videos are missing, such as {plan.missing[0]!r}")
    unscored = [name for name, result in found.items() if result is None]
    if unscored:
        lines.append(f"{len(unscored)} videos are not scored, such as {unscored[0]!r}")
    if plan.dimension == "temporal_flickering" and not plan.custom:
        lines += _filter_lacks(plan.static_filter)
    return lines


def _filter_lacks(static_filter: Mapping[str, Any] | None) -> list[str]:
    if static_filter is None:
        return ["the static filter was not applied"]
    unjudged = static_filter["unjudged"]
    return [f"the static filter failed on {len(unjudged)} videos, such as {unjudged[0]!r}"] if unjudged else []
