"""Quality of every method in one file, one table and one picture: PSNR of its videos and recall of its masks.

    python scripts/methods_quality.py          # docs/quality.json, its picture, and the table in docs/methods.md
    python scripts/methods_quality.py --check  # exit with 1 if the page has another table

Read are the reports of scripts/bench_fidelity.py (docs/fidelity*.json, later ones in the place of earlier ones, setting
by setting), scripts/bench_recall.py and scripts/bench_planning.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_sparse.bench.report import write_report
from dit_sparse.compare.chart import INK, Axes, Drawing, text_width
from dit_sparse.compare.pareto import front
from dit_sparse.methods import METHODS
from dit_sparse.schedule import Schedule

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, OUT, PICTURE = DOCS / "methods.md", DOCS / "quality.json", DOCS / "images" / "quality.png"
START, END = "<!-- made by scripts/methods_quality.py -->\n", "<!-- end of quality -->\n"
DENSITIES = (0.5, 0.25, 0.125)
RANDOM = "random blocks"
_COLOURS = {0.5: "#4477aa", 0.25: "#228833", 0.125: "#ee6677"}
_GREY = "#888888"


def collect(reports: Sequence[Mapping[str, Any]], recall: Mapping[str, Any]) -> dict[str, Any]:
    """PSNR over prompts and recall over calls, by method and density; random blocks and the floors among them."""
    settings: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        own: dict[str, list[Mapping[str, Any]]] = {}
        for row in report["videos"]:
            # What was asked for as JSON is another setting than the table's.
            if not row["label"].startswith("{"):
                own.setdefault(row["label"], []).append(row)
        settings |= own
    videos: dict[str, list[Mapping[str, Any]]] = {}
    for rows in settings.values():
        videos.setdefault(_name(rows[0]), []).extend(rows)
    recalled = {(row["method"], row["density"]): row for row in recall["rows"]}
    methods = {}
    for name, rows in videos.items():
        found = {f"{d:g}": _figures(rows, recalled.get((name, d)), d) for d in DENSITIES}
        methods[name] = {density: figures for density, figures in found.items() if figures}
    default = {name: _figures([r for r in rows if "(default)" in r["label"]], None) for name, rows in videos.items()}
    floors = {}
    for label in ("another seed", "dense, torch's math kernel", "dense, ours"):
        rows = [row for report in reports for row in report["videos"] if row["label"] == label]
        floors[label] = _span([row["psnr"] for row in rows])
    return {
        "fidelity": [{"environment": report["environment"], "settings": report["settings"]} for report in reports],
        "recall": {"environment": recall["environment"], "calls": recall["calls"], "steps": recall["steps"]},
        "methods": {name: found for name, found in methods.items() if found},
        "defaults": {name: figures for name, figures in default.items() if figures},
        "remainders": _remainders([row for report in reports for row in report["videos"]]),
        "floors": floors,
    }


def _remainders(videos: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose schedule sets a remainder, one entry a setting."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in videos:
        config = row["config"]
        if config.get("remainder", "method") != "method":
            blocks = {name: config[name] for name in ("block", "tile", "window", "stride") if config.get(name)}
            key = (*(config.get(name) for name in ("method", "density", "remainder", "warmup")), json.dumps(blocks))
            groups.setdefault(key, []).append(row)
    names = ("method", "asked", "remainder", "warmup", "blocks")
    return [dict(zip(names, key, strict=True)) | _figures(rows, None) for key, rows in groups.items()]


def _name(row: Mapping[str, Any]) -> str:
    """Method of a video; random blocks and plan files are known by their label."""
    label = row["label"]
    for name in (RANDOM, "paro, plan file"):
        if label.startswith(name):
            return name
    return row["config"].get("method", label)


def _figures(
    rows: Sequence[Mapping[str, Any]], recall: Mapping[str, Any] | None, density: float | None = None
) -> dict[str, Any]:
    """Medians and bounds of those of `rows` that asked for `density`, or of all."""
    own = [row for row in rows if density is None or row["config"].get("density") == density]
    if not own:
        return {}
    found: dict[str, Any] = {"prompts": len({row["prompt"] for row in own}), "psnr": _span([r["psnr"] for r in own])}
    found["ssim"] = statistics.median(row["ssim"] for row in own)
    found["density"] = statistics.median(row["sparse_density"] for row in own)
    if recall is not None:
        found |= {"recall": recall["recall"], "recall_worst": recall["worst"], "recall_density": recall["achieved"]}
    return found


def _span(values: Sequence[float | None]) -> dict[str, float]:
    numbers = [math.inf if value is None else value for value in values]
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def ranked(quality: Mapping[str, Any]) -> list[str]:
    """Methods by their PSNR at density .25, the best first; those without a density last, by that of their default."""
    methods = quality["methods"]
    found = sorted((m for m in methods if "0.25" in methods[m]), key=lambda m: -methods[m]["0.25"]["psnr"]["median"])
    others = [name for name in quality["defaults"] if name not in found]
    return found + sorted(others, key=lambda m: -quality["defaults"][m]["psnr"]["median"])


def quality_table(quality: Mapping[str, Any]) -> str:
    """The figures as a Markdown table, one method a row, the best at .25 first."""
    heads = ["", *(f"PSNR at {d:g}" for d in DENSITIES), *(f"recall at {d:g}" for d in DENSITIES), "default: PSNR"]
    lines = [heads, ["---"] * len(heads)]
    for name in ranked(quality):
        figures = [quality["methods"].get(name, {}).get(f"{d:g}", {}) for d in DENSITIES]
        psnr = [_cell(f["psnr"]) if f else "" for f in figures]
        recall = [f"{f['recall']:.3f}" if "recall" in f else "" for f in figures]
        default = quality["defaults"].get(name)
        last = f"{_cell(default['psnr'])} at {default['density']:.2f}" if default else ""
        lines.append([name if name not in METHODS else f"`{name}`", *psnr, *recall, last])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(span: Mapping[str, float]) -> str:
    return f"{span['median']:.1f} ({span['min']:.1f} to {span['max']:.1f})"


def with_table(page: str, quality: Mapping[str, Any]) -> str:
    """`page` with the table between its two marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{PAGE} must have the lines {START.strip()!r} and {END.strip()!r}, got a page without")
    return f"{before}{START}\n{quality_table(quality)}\n{END}{after}"


def costs(planning: Mapping[str, Any], warmup: float = 0.2, steps: int = 20) -> dict[str, float]:
    """Planning of each method a sparse step, as a share of one dense attention."""
    share = {row["method"]: row["share_of_dense"] for row in planning["rows"]}
    found = {}
    for name, cls in METHODS.items():
        if name in share:
            schedule = Schedule(cls(), warmup=warmup)
            first, again = schedule.warmup_steps(steps), schedule.refresh_steps(steps)
            plans = 1 + len([step for step in again if first < step < steps])
            found[name] = share[name] * (plans if cls.scope == "call" else 1) / (steps - first)
    return found


def draw(quality: Mapping[str, Any], planning: Mapping[str, float], path: Path) -> None:
    """A row of dots a method, and PSNR against what a sparse step costs, planning in it."""
    methods = quality["methods"]
    names = [name for name in ranked(quality) if "0.25" in methods.get(name, {})]
    row, top, left, panel = 19, 86, 150, 420
    bottom = top + row * len(names) + 10
    drawing = Drawing(left + 2 * panel + 110, bottom + 60, "PSNR of sparse attention methods")
    drawing.text((24, 22), "How near the videos of each method are to dense ones", 17)
    drawing.text((24, 46), "demo model, medians over prompts, same seed; the first fifth of the steps dense", 12)
    low, high = 10.0, 52.0
    dots = Axes(drawing, left, top, left + panel, bottom, (low, high), (0.0, 1.0))
    for tick in range(10, 51, 5):
        x, _ = dots.at(tick, 0)
        drawing.line([(x, top), (x, bottom)], "#dddddd")
        drawing.text((x, bottom + 14), str(tick), 11, "middle")
    drawing.text((left + panel / 2, bottom + 36), "PSNR, dB, by density of the sparse steps", 12, "middle")
    seed = quality["floors"]["another seed"]["median"]
    x, _ = dots.at(seed, 0)
    drawing.line([(x, top), (x, bottom)], _GREY, 1.5, dashed=True)
    drawing.text((x, top - 8), "another seed", 11, "middle", _GREY)
    for number, name in enumerate(names):
        y = top + 14 + number * row
        drawing.text((left - 10, y), name, 12, "end", _GREY if name not in METHODS else INK)
        found = [(d, methods[name][f"{d:g}"]["psnr"]["median"]) for d in DENSITIES if f"{d:g}" in methods[name]]
        places = [(dots.at(value, 0)[0], y) for _, value in found]
        drawing.line(places, "#bbbbbb", 2)
        for place, (density, _) in zip(places, found, strict=True):
            drawing.marker(place, "circle", _COLOURS[density], 5)
    for number, density in enumerate(DENSITIES):
        drawing.marker((left + 8 + 64 * number, 66), "circle", _COLOURS[density], 5)
        drawing.text((left + 18 + 64 * number, 66), f"{density:g}", 11)
    right = left + panel + 84
    _draw_front(Axes(drawing, right, top, right + panel, bottom, (0.05, 0.75), (low, high)), quality, planning)
    drawing.save_png(path)


def _points(quality: Mapping[str, Any], planning: Mapping[str, float]) -> Iterator[tuple[str, float, float, float]]:
    """Method, density, what a sparse step costs as a share of dense attention, and PSNR."""
    for name, found in quality["methods"].items():
        if name in planning or name == RANDOM:
            for density in DENSITIES:
                if figures := found.get(f"{density:g}"):
                    cost = figures["density"] + planning.get(name, 0.0)
                    yield name, density, cost, figures["psnr"]["median"]


def _draw_front(axes: Axes, quality: Mapping[str, Any], planning: Mapping[str, float]) -> None:
    drawing = axes.drawing
    points = [point for point in _points(quality, planning) if point[2] <= axes.x[1]]
    axes.frame("", "density + planning, as a share of dense attention", "PSNR, dB")
    best = front([(-cost, psnr) for name, _, cost, psnr in points if name != RANDOM])
    drawing.line([axes.at(-cost, psnr) for cost, psnr in best], "#f3dfa2", 9)
    for name, density, cost, psnr in points:
        drawing.marker(axes.at(cost, psnr), "circle", _GREY if name == RANDOM else _COLOURS[density], 4)
    written: list[tuple[float, float]] = []
    for name, _, cost, psnr in sorted(points, key=lambda point: -point[3]):
        x, y = axes.at(cost, psnr)
        crowded = any(abs(x - other) < 70 and abs(y - height) < 13 for other, height in written)
        if (-cost, psnr) in best and not crowded:
            written.append((x, y))
            side = 1 if x + 12 + text_width(name, 11) < axes.right else -1
            drawing.text((x + 9 * side, y - 9), name, 11, "start" if side > 0 else "end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the page's table with the file")
    options = parser.parse_args()
    page = PAGE.read_text("utf-8")
    if options.check:
        same = with_table(page, json.loads(OUT.read_text("utf-8"))) == page
        sys.exit(0 if same else f"{PAGE} has another table; run scripts/methods_quality.py")
    paths = sorted(DOCS.glob("fidelity*.json"), key=lambda path: path.stem)
    reports = [json.loads(path.read_text("utf-8")) for path in paths]
    quality = collect(reports, json.loads((DOCS / "recall.json").read_text("utf-8")))
    write_report(quality, OUT)
    PAGE.write_text(with_table(page, quality), "utf-8")
    draw(quality, costs(json.loads((DOCS / "planning.json").read_text("utf-8"))), PICTURE)


if __name__ == "__main__":
    main()
