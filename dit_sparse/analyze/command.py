"""The analysis of a pipeline, and as the command line asks for it: a model by name, tables, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_sparse.analyze.recommend import recommend, summaries
from dit_sparse.analyze.sample import Analysis, as_json
from dit_sparse.bench.report import environment, write_report
from dit_sparse.calibrate.command import ProgressListener, prepare, public_name
from dit_sparse.calibrate.run import Listener, run_dense
from dit_sparse.generate import Request
from dit_sparse.generate.report import loading
from dit_sparse.methods import Dense
from dit_sparse.methods.parameters import check_share
from dit_sparse.output_file import check_file
from dit_sparse.pipelines import observe_values


def analyze(
    pipe: Any,
    prompts: Sequence[str],
    analysis: Analysis,
    *,
    target: float = 0.9,
    seed: int = 0,
    listener: Listener | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Run `pipe` densely over `prompts`, up to the last sampled step, and say which method and density suit it.

    Args:
        pipe: a supported pipeline; it runs dense, and is dense afterwards.
        prompts: one or two that are typical are enough.
        analysis: what is compared, and what is sampled.
        target: mean recall that is asked for.
        seed: of each prompt's noise.
        listener: is told how it goes.
        arguments: of the pipeline's call, such as `height`, `num_frames` and `num_inference_steps`.

    Returns:
        Ready for JSON: "rows" of every candidate at every sampled call, "summary", "skipped", "sampled",
        "recommended" with a "config" for `generate --config`, and where it was measured.

    Raises:
        ValueError: no prompt, an unsupported family, or methods of which none fits the model.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}")
    listener, steps = listener or Listener(), _steps(arguments)
    with observe_values(pipe, analysis):
        for prompt in prompts:
            analysis.forget_plans()
            listener.began("sampling", prompt)
            run_dense(pipe, prompt, seed, listener, arguments, last=max(analysis.steps(steps)))
    if not analysis.rows:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in analysis.skipped.items())
        raise ValueError(f"methods must fit the model, got none that does: {reasons}")
    chosen = recommend(analysis.candidates, analysis.rows, target, steps)
    return {
        "environment": environment(pipe.device),
        "prompts": list(prompts),
        "steps": steps,
        "target": target,
        "sampled": analysis.sampled | {"rows": analysis.counts["rows"]},
        "skipped": analysis.skipped,
        "summary": [asdict(row) for row in summaries(analysis.rows)],
        "rows": as_json(analysis.rows),
        "recommended": {
            "label": chosen.label,
            "reached": chosen.reached,
            "reasons": chosen.reasons,
            "config": chosen.schedule.to_config(),
        },
    }


def run(request: Request, analysis: Analysis, target: float, path: Path | None, console: Console) -> dict[str, Any]:
    """`analyze` of the model that `request` means, with progress on `console`; the report goes to `path` too.

    Raises:
        ValueError, OSError: one line that says what is wrong and what is allowed.
    """
    with loading(console, request.model):
        pipe, arguments = prepare(request, Dense())
    with ProgressListener(console, len(request.prompts) * (1 + max(analysis.steps(_steps(arguments))))) as listener:
        report = analyze(
            pipe, request.prompts, analysis, target=target, seed=request.seed, listener=listener, **arguments
        )
    report = {"model": public_name(request), **report}
    if path is not None:
        write_report(report, path)
    return report


def check_files(target: float, prompts: Path | None, out: Path | None, report: Path | None) -> None:
    """What can be said before the model is loaded.

    Raises:
        ValueError: a target out of range, a file that cannot be written, or one for two purposes.
    """
    check_share("--target", target)
    if out is not None:
        check_file("--out", out, example="config.json", kept={"the prompt file": prompts, "--report": report})
    if report is not None:
        check_file("--report", report, example="report.json", kept={"the prompt file": prompts})


def _steps(arguments: dict[str, Any]) -> int:
    return int(arguments["num_inference_steps"])


def write_config(report: dict[str, Any], path: Path) -> None:
    """Write the recommended config of a report of `analyze`, for `generate --config`."""
    write_report(report["recommended"]["config"], path)


def summary_table(report: dict[str, Any], target: float) -> Table:
    """One row a candidate."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method and density")
    for heading in ("kept", "recall", "worst head", "error", "reused plan", "time / dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    chosen = report["recommended"]["label"]
    for row in report["summary"]:
        cells = (row["kept"], row["recall"], row["worst"], row["error"], row["reused"], row["time"])
        style = "bold green" if row["label"] == chosen else "" if row["recall"] >= target else "dim"
        table.add_row(row["label"], *("-" if cell is None else f"{cell:.3f}" for cell in cells), style=style)
    return table


def layer_table(report: dict[str, Any], label: str) -> Table:
    """Recall of one candidate by sampled layer and step: the mean, and the worst head."""
    rows = [row for row in report["rows"] if row["label"] == label]
    steps = sorted({row["step"] for row in rows})
    table = Table("layer", *(f"step {step}" for step in steps), box=None, header_style="bold", pad_edge=False)
    for place in sorted({(row["model"], row["layer"]) for row in rows}):
        cells = []
        for step in steps:
            here = (row for row in rows if (row["model"], row["layer"], row["step"]) == (*place, step))
            heads = [recall for row in here for recall in row["recall"]]
            cells.append(f"{sum(heads) / len(heads):.3f} ({min(heads):.3f})" if heads else "-")
        table.add_row(f"{place[1]} of {place[0]}", *cells)
    return table


def print_report(report: dict[str, Any], console: Console) -> None:
    """The tables, what was left out, and what is recommended."""
    console.print(summary_table(report, report["target"]))
    for label, reason in report["skipped"].items():
        console.print(f"skipped {label}: {reason}", markup=False, highlight=False, soft_wrap=True)
    chosen = report["recommended"]
    if chosen["label"]:
        console.print(f"\nrecall of {chosen['label']}, mean (worst head)", style="bold")
        console.print(layer_table(report, chosen["label"]))
    console.print("\nrecommended", style="bold")
    for reason in chosen["reasons"]:
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    console.print(json.dumps(chosen["config"]), markup=False, highlight=False, soft_wrap=True)
