"""What quality a second buys: time of whole runs at a large model's shape, beside the PSNR of the same settings.

    python scripts/bench_frontier.py --fidelity docs/fidelity*.json --model wan-1.3b --layers 2 --out docs/frontier.json
    python scripts/bench_frontier.py --table --out docs/frontier.json      # the table of an earlier run, in Markdown
    python scripts/bench_frontier.py --merge a.json b.json --out docs/frontier.json   # runs of one machine as one

The settings and their PSNR are those of the reports of `bench_fidelity.py`, made on the demo model; later reports win.
The demo model is too small for its time to mean anything on a GPU, so every setting runs a whole denoising loop of as
many steps with random weights in the shape of `--model`, planning and remainders in it. Methods whose density comes out
of the data would find another one there, so they run at the density that they had on the demo model. Plan files and
gates belong to the demo model, so their settings are left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_e2e import Runner, dense_kernels, measure_dense
from e2e_models import MODELS
from fidelity_tables import read_report
from merged_reports import merged_environment

from dit_sparse.bench.report import environment, write_report
from dit_sparse.methods.parameters import takes_density, with_density
from dit_sparse.pipelines.sparsify import session_of, sparsify, unsparsify
from dit_sparse.schedule import Schedule

OURS = "lea"
_PARTS = ("environment", "model", "rows")


def settings_of(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each setting of a method with its PSNR over the prompts; one that several reports have is that of the last."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        own: dict[str, list[Mapping[str, Any]]] = {}
        for row in report["videos"]:
            method = row["config"].get("method")
            if method not in (None, "dense") and not row["label"].startswith("random blocks"):
                own.setdefault(row["label"], []).append(row)
        found |= own
    return [_setting(label, rows) for label, rows in found.items()]


def _setting(label: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    psnr = [float("inf") if row["psnr"] is None else row["psnr"] for row in rows]
    return {
        "label": label,
        "method": rows[0]["config"]["method"],
        "config": {name: value for name, value in rows[0]["config"].items() if name not in ("seed", "kernel")},
        "psnr": {"median": statistics.median(psnr), "min": min(psnr), "prompts": len(psnr)},
        "demo_density": statistics.median(row["density"] for row in rows),
    }


def schedule_of(setting: Mapping[str, Any]) -> Schedule | str:
    """The schedule of a setting, or why it cannot run on another model."""
    config = setting["config"]
    for name in ("plan_file", "weights"):
        if config.get(name):
            return f"its {name} is for the demo model"
    try:
        # Random weights may have a layer keep everything.
        return replace(Schedule.from_config(config), never_slower=False, strict=False)
    except ValueError as error:
        return str(error)


def at_density_of(schedule: Schedule, density: float, num_steps: int) -> Schedule:
    """`schedule` with the density that its sparse steps had on the demo model, where that came out of the data.

    Args:
        density: mean over the whole run there, dense steps counted.
    """
    method = schedule.method
    if method.scope not in ("call", "sample") or takes_density(method) or not hasattr(method, "density"):
        return schedule
    dense = schedule.warmup_steps(num_steps) / num_steps
    return replace(schedule, method=with_density(method, (density - dense) / (1 - dense)))


def measure(runner: Runner, schedule: Schedule, rounds: int) -> dict[str, Any]:
    """Seconds of whole loops under `schedule`, the first of which only warms up, and the density over a run."""
    sparsify(runner.pipe, schedule)
    try:
        times = []
        for _ in range(rounds + 1):
            session = session_of(runner.pipe)
            assert session is not None
            session.statistics.records.clear()
            times.append(runner.complete())
        density = session.statistics.density
    finally:
        unsparsify(runner.pipe)
    return {"seconds": statistics.median(times[1:]), "density": density}


def unbeaten(rows: Sequence[Mapping[str, Any]], ours: str = OURS) -> list[str]:
    """Labels of the others' settings that no setting of `ours` beats: as fast or faster, and as near or nearer."""
    own = [row for row in rows if row["method"] == ours]
    others = [row for row in rows if row["method"] != ours]

    def is_beaten(row: Mapping[str, Any]) -> bool:
        return any(
            mine["seconds"] <= row["seconds"] and mine["psnr"]["median"] >= row["psnr"]["median"] for mine in own
        )

    return [row["label"] for row in others if not is_beaten(row)]


def table(report: Mapping[str, Any]) -> str:
    """Markdown: our settings, then for each other method the setting that comes nearest to ours in time and quality."""
    rows = report["rows"]
    own = sorted((row for row in rows if row["method"] == OURS), key=lambda row: row["seconds"])
    lines = ["| | speed-up | PSNR, dB | of `lea` in no more time |", "|---|---|---|---|"]
    for row in own:
        lines.append(f"| **{_name(row)}** | {row['speedup']:.2f}x | {_psnr(row)} | |")
    others: dict[str, tuple[float, str]] = {}
    for row in (row for row in rows if row["method"] != OURS):
        as_fast = [mine["psnr"]["median"] for mine in own if mine["seconds"] <= row["seconds"]]
        best = max(as_fast, default=None)
        margin = float("-inf") if best is None else best - row["psnr"]["median"]
        cell = "none is as fast" if best is None else f"{best:.1f}"
        line = f"| {_name(row)} | {row['speedup']:.2f}x | {_psnr(row)} | {cell} |"
        others[row["method"]] = min(others.get(row["method"], (float("inf"), "")), (margin, line))
    lines += [line for _, line in sorted(others.values())]
    left = unbeaten(rows)
    said = f"Of {len(rows) - len(own)} settings of other methods {len(left) or 'none'} are not beaten"
    return "\n".join(lines) + f"\n\n{said}{': ' + ', '.join(left) if left else ''}.\n"


def _name(row: Mapping[str, Any]) -> str:
    config = row["config"]
    asked = f" {config['density']:g}" if config.get("density") is not None else ""
    if isinstance(config.get("window"), list):
        asked = f" {'x'.join(map(str, config['window']))}"
    remainder = "" if config.get("remainder", "method") == "method" else f", remainder {config['remainder']}"
    warmup = ", no dense step" if config.get("warmup") == 0 else ""
    return f"{row['method']}{asked}{remainder}{warmup}"


def _psnr(row: Mapping[str, Any]) -> str:
    return f"{row['psnr']['median']:.1f} ({row['psnr']['min']:.1f})"


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time every setting; the report is written after each."""
    reports = [read_report(path) for path in options.fidelity]
    steps = {report["settings"]["steps"] for report in reports}
    if len(steps) > 1:
        raise SystemExit(f"--fidelity: reports must be of equally many steps, got {sorted(steps)}")
    device = torch.device(options.device)
    where = environment(device)
    where["commit"] = options.commit or where["commit"]
    runner = Runner(MODELS[options.model], options.layers, steps.pop(), device)
    dense = measure_dense(runner, dense_kernels(device), 1, True)["complete_seconds"]
    report: dict[str, Any] = {
        "environment": where,
        "model": options.model,
        "layers": runner.layers,
        "steps": runner.steps,
        "dense": [dense],
        "left_out": {},
        "rows": [],
    }
    (baseline,) = dense.values()
    for setting in settings_of(reports):
        schedule = schedule_of(setting)
        if isinstance(schedule, Schedule):
            schedule = at_density_of(schedule, setting["demo_density"], runner.steps)
        try:
            found = schedule if isinstance(schedule, str) else measure(runner, schedule, options.rounds)
        except Exception as error:  # noqa: BLE001  # one setting's failure may not lose the others
            found = f"{type(error).__name__}: {str(error)[:300]}"
        if isinstance(found, str):
            report["left_out"][setting["label"]] = found
        else:
            report["rows"].append(setting | found | {"speedup": baseline / found["seconds"]})
            print(f"{setting['label'][:80]}: {found['seconds']:.3f} s, {setting['psnr']['median']:.1f} dB", flush=True)
        write_report(report, options.out)
    return report


def merge(parts: Sequence[Path]) -> dict[str, Any]:
    """One report of several; a setting that several have is that of the last. Each row keeps the speed-up of its run.

    Raises:
        ValueError: no reports, or of different devices, versions, models or steps.
    """
    reports = [read_report(part, _PARTS) for part in parts]
    where = merged_environment(reports, parts, ("model", "layers", "steps"))
    rows = {row["label"]: row for report in reports for row in report["rows"]}
    left_out = {label: text for report in reports for label, text in report["left_out"].items() if label not in rows}
    dense = [found for report in reports for found in report["dense"]]
    return reports[0] | {"environment": where, "rows": list(rows.values()), "left_out": left_out, "dense": dense}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fidelity", nargs="+", type=Path, default=[], help="reports of bench_fidelity.py")
    parser.add_argument("--model", choices=tuple(MODELS), default="wan-1.3b")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="recorded where there is no checkout to ask")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="PART", help="make --out of these; times nothing")
    parser.add_argument("--table", action="store_true", help="print the table of --out and run nothing")
    parser.add_argument("--out", type=Path, required=True, help="the report, JSON")
    options = parser.parse_args(arguments)
    if not options.table and not options.merge and not options.fidelity:
        parser.error("--fidelity must name at least one report, got none")
    try:
        if options.merge:
            report = merge(options.merge)
            write_report(report, options.out)
        else:
            report = read_report(options.out, _PARTS) if options.table else run(options)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(table(report))


if __name__ == "__main__":
    main()
