"""The tables of `bench_fidelity.py`, from its report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dit_sparse.eval.fidelity import CONVENTION


def read_report(out: Path, parts: Sequence[str] = ("environment", "settings", "videos", "searches")) -> dict[str, Any]:
    """The report at `out`, of which `parts` must be there.

    Raises:
        ValueError: no file of a report.
    """
    try:
        report = json.loads(out.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--out must be a report of this script, got {out}: {error}") from None
    if not isinstance(report, dict) or not set(parts) <= set(report):
        raise ValueError(f"--out must be a report of this script, got {out}, which is another JSON file")
    return report


def merge_reports(parts: Sequence[Path]) -> dict[str, Any]:
    """One report of those of several prompts each.

    Raises:
        ValueError: no reports, or of different settings, devices, versions or commits, or a prompt is in two of them.
    """
    reports = [read_report(part) for part in parts]
    first = reports[0]
    for part, report in zip(parts, reports, strict=True):
        for name in ("environment", "settings"):
            if report[name] != first[name]:
                raise ValueError(f"--merge: the {name} of {part} is not that of {parts[0]}: merge like with like")
    prompts = [prompt for report in reports for prompt in {row["prompt"] for row in report["videos"]}]
    if twice := {prompt for prompt in prompts if prompts.count(prompt) > 1}:
        raise ValueError(f"--merge: two parts have the prompt {twice.pop()!r}: give each prompts of its own")
    merged = {"environment": first["environment"], "settings": first["settings"], "failed": {}}
    for name in ("videos", "searches"):
        merged[name] = [row for report in reports for row in report[name]]
    for report in reports:
        merged["failed"] |= report["failed"]
    return merged


def span(values: Sequence[float | None], form: str) -> tuple[str, str]:
    """The median of `values`, and the least to the largest; `None` is the PSNR of an identical video."""
    numbers = sorted(float("inf") if value is None else value for value in values)
    return format(statistics.median(numbers), form), f"{numbers[0]:{form}} to {numbers[-1]:{form}}"


def video_table(report: dict[str, Any]) -> Table:
    """PSNR and SSIM of every case over its prompts."""
    table = Table(title=f"Against plain diffusers, {CONVENTION}")
    columns = ("", "prompts", "density", "whole run", "PSNR, dB", "min to max", "SSIM", "min to max", "s")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    labels = list(dict.fromkeys(row["label"] for row in report["videos"]))
    for label in labels:
        rows = [row for row in report["videos"] if row["label"] == label]
        densities = [
            "-" if rows[0].get(name) is None else f"{statistics.median(row[name] for row in rows):.3f}"
            for name in ("sparse_density", "density")
        ]
        psnr, ssim = span([row["psnr"] for row in rows], ".2f"), span([row["ssim"] for row in rows], ".4f")
        seconds = f"{statistics.median(row['seconds'] for row in rows):.2f}"
        table.add_row(label, str(len(rows)), *densities, *psnr, *ssim, seconds)
    return table


def search_table(searches: Sequence[dict[str, Any]]) -> Table:
    """Agreement and recall of AdaSpa's searches by layer: means over prompts, steps and heads, and the worst head."""
    budgets = "budgets by head" if searches[0].get("head_adaptive", True) else "one budget"
    table = Table(title=f"AdaSpa at density 0.25, {budgets}: blocks that a search with the cached row sums finds again")
    table.add_column("layer")
    for column in (
        "rows read",
        "same rows, new sums",
        "worst",
        "all rows, new sums",
        "worst",
        "recall",
        "full search's",
    ):
        table.add_column(column, justify="right")
    full = np.array([search["recall_full"] for search in searches])  # prompts, steps, layers, heads
    for place, stride in enumerate(row["row_stride"] for row in searches[0]["row_strides"]):
        found = [search["row_strides"][place] for search in searches]
        same, every, recall = (np.array([f[name] for f in found]) for name in ("agreement", "agreement_full", "recall"))
        for layer in [*range(full.shape[2]), slice(None)]:
            figures = [f"1 of {stride}"]
            for values in (same[:, :, layer], every[:, :, layer]):
                figures += [f"{values.mean():.3f}", f"{values.min():.3f}"]
            figures += [f"{recall[:, :, layer].mean():.3f}", f"{full[:, :, layer].mean():.3f}"]
            table.add_row("all" if isinstance(layer, slice) else str(layer), *figures)
        table.add_section()
    return table


def print_report(report: dict[str, Any], console: Console) -> None:
    console.print({**report["environment"], **report["settings"]}, highlight=False)
    if report["videos"]:
        console.print(video_table(report))
    for adaptive in (True, False):
        searches = [search for search in report["searches"] if search.get("head_adaptive", True) is adaptive]
        if searches:
            console.print(search_table(searches))
    for label, why in report["failed"].items():
        console.print(f"failed: {label}: {why}", style="red", markup=False, highlight=False, soft_wrap=True)
