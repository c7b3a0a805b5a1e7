"""A comparison in one line a case: medians over prompts and seeds, and the worst and best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

__all__ = ["summarize", "summary_table"]

_MEDIANS = ("seconds", "speedup", "achieved_density", "sparse_density")


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a label, in the order of first appearance; an infinite PSNR is `None`."""
    rows = []
    for label in dict.fromkeys(run["label"] for run in runs):
        own = [run for run in runs if run["label"] == label]
        row = {name: own[0][name] for name in ("label", "kind", "method", "density")} | {"runs": len(own)}
        row |= {name: _median([run[name] for run in own]) for name in _MEDIANS}
        for name in ("psnr", "ssim"):
            values = [math.inf if run[name] is None else run[name] for run in own]
            figures = (statistics.median(values), min(values), max(values))
            named = zip((name, f"{name}_min", f"{name}_max"), figures, strict=True)
            row |= {key: None if math.isinf(value) else value for key, value in named}
        rows.append(row)
    return rows


def summary_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `summarize` as a table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", overflow="fold", min_width=12)
    for heading in ("runs", "density", "whole\nrun", "seconds", "speed-\nup"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("PSNR\ndB", "worst", "SSIM", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown = [_number(row["sparse_density"], ".3f"), _number(row["achieved_density"], ".3f")]
        shown += [f"{row['seconds']:.2f}", f"{row['speedup']:.2f}x"]
        shown += ["same" if row[name] is None else f"{row[name]:.2f}" for name in ("psnr", "psnr_min")]
        shown += [f"{row[name]:.4f}" for name in ("ssim", "ssim_min")]
        table.add_row(row["label"], str(row["runs"]), *shown)
    return table


def _median(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
