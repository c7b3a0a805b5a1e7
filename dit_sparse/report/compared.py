"""The report of a folder of `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_sparse.compare.record import RECORD, read_record
from dit_sparse.report.content import Fact, Group, Report, Run, Table
from dit_sparse.report.read import inside, number, require, require_config, require_kinds
from dit_sparse.report.reproduce import generate_command

__all__ = ["load_compared"]

_RUN_KEYS = (
    "label",
    "kind",
    "config",
    "prompt",
    "seed",
    "seconds",
    "speedup",
    "achieved_density",
    "video",
    "psnr",
    "ssim",
)

_KINDS = {
    **dict.fromkeys(("label", "kind", "prompt"), "a text"),
    **dict.fromkeys(("seed", "seconds", "speedup", "achieved_density", "psnr", "ssim"), "a number"),
}
_PARTS = {
    **dict.fromkeys(("settings", "environment", "conventions"), "an object"),
    **dict.fromkeys(("runs", "failed", "summary"), "a list"),
}


def load_compared(folder: Path) -> Report:
    """The runs of a folder of `compare`, grouped by prompt and seed, and their medians.

    Raises:
        ValueError: a file of another version, or one without a run.
        OSError: it cannot be read.
    """
    path = folder / RECORD
    found = read_record(folder)
    require(found, ("failed", "summary"), str(path))
    require_kinds(found, _PARTS, str(path))
    for number_, run in enumerate(found["runs"], 1):
        _check(run, f"{path}, run {number_},")
    notes = [f"failed: {f['label']}, seed {f['seed']}: {f['error']}" for f in found["failed"]]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in found["runs"]:
        groups.setdefault((run["prompt"], run["seed"]), []).append(run)
    if not groups:
        raise ValueError(f"{path} has no run yet; let `compare` finish one")
    settings = found["settings"]
    return Report(
        kind="compare",
        source=folder.resolve().name,
        headline=_headline(found),
        facts=[
            (name, "-" if value is None else str(value)) for name, value in (settings | found["environment"]).items()
        ],
        groups=[_group(folder, settings, runs, notes) for runs in groups.values()],
        tables=[_medians(found["summary"], found["conventions"]), _all_runs(found["runs"])],
        points=_points(found["summary"]),
        notes=notes,
    )


def _check(run: dict[str, Any], what: str) -> None:
    require(run, _RUN_KEYS, what)
    require_kinds(run, _KINDS, what)
    if run["config"] is not None:
        require_kinds(run, {"config": "an object"}, what)
        require_config(run["config"], what)


def _headline(found: dict[str, Any]) -> list[Fact]:
    fast = max((r for r in found["summary"] if r["kind"] == "method"), key=lambda r: r["speedup"], default=None)
    near = max((r for r in found["summary"] if r["kind"] == "method"), key=lambda r: r["psnr"] or 1e9, default=None)
    facts = [("runs", str(len(found["runs"])))]
    if fast is not None and near is not None:
        facts += [("fastest", f"{fast['label']}, {number(fast['speedup'], '.2f', 'x')}")]
        facts += [("nearest to dense", f"{near['label']}, {number(near['psnr'], '.1f', ' dB')}")]
    return facts


def _group(folder: Path, settings: dict[str, Any], runs: Sequence[dict[str, Any]], notes: list[str]) -> Group:
    ordered = sorted(runs, key=lambda run: run["kind"] != "dense")
    size = f"{settings['width']}x{settings['height']}, {settings['frames']} frames"
    facts = [("seed", str(runs[0]["seed"])), ("size", size), ("steps", str(settings["steps"]))]
    return Group(runs[0]["prompt"], facts, [_run(folder, settings, run, notes) for run in ordered])


def _run(folder: Path, settings: dict[str, Any], run: dict[str, Any], notes: list[str]) -> Run:
    video, trace = inside(folder, run["video"]), run.get("trace")
    if not video.exists():
        notes.append(f"{run['video']} is missing: it was removed since")
    file = inside(folder, trace) if trace is not None else None
    if file is not None and not file.exists():
        notes.append(f"{trace} is missing: no maps and no timeline of {run['label']}")
        file = None
    facts = [("seconds", number(run["seconds"], ".1f")), ("attention density", number(run["achieved_density"], ".3f"))]
    if run["kind"] != "dense":
        facts += [
            ("speed-up", number(run["speedup"], ".2f", "x")),
            ("PSNR", "identical" if run.get("identical") else number(run["psnr"], ".2f", " dB")),
            ("SSIM", number(run["ssim"], ".4f")),
        ]
    command = "" if run["config"] is None or run["kind"] == "floor" else generate_command(settings | run)
    return Run(run["label"], video if video.exists() else None, settings["fps"], file, facts, command)


def _medians(summary: Sequence[dict[str, Any]], conventions: dict[str, Any]) -> Table:
    keys = ("runs", "seconds", "speedup", "achieved_density", "psnr", "psnr_min", "psnr_max", "ssim")
    columns = ["runs", "seconds", "speed-up", "attention density", "PSNR dB", "lowest", "highest", "SSIM"]
    rows = [[row["label"], row["kind"], *(row.get(key) for key in keys)] for row in summary]
    note = "Medians over prompts and seeds; speed-up is over the dense run of the same prompt and seed. "
    note += " ".join(f"{name}: {text}." for name, text in conventions.items())
    return Table("Methods", ["method", "kind", *columns], rows, ["speed-up", "attention density"], note)


def _all_runs(runs: Sequence[dict[str, Any]]) -> Table:
    keys = ("label", "prompt", "seed", "seconds", "speedup", "achieved_density", "psnr", "ssim")
    columns = ["method", "prompt", "seed", "seconds", "speed-up", "attention density", "PSNR dB", "SSIM"]
    return Table("Every run", columns, [[run[key] for key in keys] for run in runs])


def _points(summary: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"label": row["label"], "group": row["method"] or row["kind"], "x": row["speedup"], "y": row["psnr"]}
        for row in summary
        if row["psnr"] is not None and row["speedup"] is not None
    ]
