"""The picture of a comparison: fidelity against what was computed, and against speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dit_sparse.compare.chart import INK, MARKERS, Axes, Drawing, text_width
from dit_sparse.compare.summary import summarize

__all__ = ["Series", "draw_pareto", "front", "series_of"]

_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#aa3377",
    "#66ccee",
    "#ccbb44",
    "#bb5500",
    "#332288",
    "#117733",
    "#882255",
)
"""Told apart by most colour-blind people too; the markers differ as well."""
_GREY, _FRONT = "#888888", "#f3dfa2"
_PANEL, _LEFT, _TOP, _HEIGHT, _GAP, _RIGHT = 380, 64, 92, 340, 84, 24
_ROW, _SWATCH = 20, 26


@dataclass(frozen=True)
class Series:
    """The rows of one method, by density.

    Args:
        name: the rows' label without the density.
        rows: of the summary, all with a finite PSNR.
    """

    name: str
    floor: bool
    rows: tuple[Mapping[str, Any], ...]


def series_of(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """The rows of a summary that can be drawn, one series a method, floors last.

    The dense video and others of infinite PSNR are left out, and so is another seed, which is no point but a line.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["psnr"] is not None and not _is_line(row):
            groups.setdefault(_name(row), []).append(row)
    found = [
        Series(name, own[0]["kind"] == "floor", tuple(sorted(own, key=lambda row: row["achieved_density"])))
        for name, own in groups.items()
    ]
    return sorted(found, key=lambda series: series.floor)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of `points` that no other beats in both coordinates, more being better, by the first coordinate."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def draw_pareto(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `pareto.png` and `pareto.svg` of a record into `folder`.

    Args:
        record: as `read_record` gives it, with runs.

    Returns:
        The files; none where no row can be drawn.

    Raises:
        OSError: a file cannot be written.
    """
    rows = summarize(record["runs"])
    series = series_of(rows)
    if not series:
        return []
    drawing = _draw(record, rows, series)
    files = [folder / "pareto.png", folder / "pareto.svg"]
    drawing.save_png(files[0])
    drawing.save_svg(files[1])
    return files


def _draw(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], series: Sequence[Series]) -> Drawing:
    width = _LEFT + 2 * _PANEL + _GAP + _RIGHT
    entries = list(_legend_rows([one.name for one in series] + ["best"], width - 2 * _RIGHT))
    bottom = _TOP + _HEIGHT
    drawing = Drawing(
        width, bottom + 68 + _ROW * len(entries), "Fidelity of sparse attention against density and speed"
    )
    drawing.text((_RIGHT, 22), "Fidelity to the dense video of the same prompt and seed", 17)
    drawing.text((_RIGHT, 46), _about(record, rows), 12, colour="#555555")
    looks = _looks(series)
    lines = [row for row in rows if _is_line(row) and row["psnr"] is not None]
    psnr = [row["psnr"] for one in series for row in one.rows] + [row["psnr"] for row in lines]
    for panel, (key, title, label) in enumerate(_PANELS):
        left = _LEFT + panel * (_PANEL + _GAP)
        values = [row[key] for one in series for row in one.rows]
        around = [1.0] if key == "speedup" else []
        axes = Axes(drawing, left, _TOP, left + _PANEL, bottom, _span(values + around), _span(psnr))
        axes.frame(title, label, "PSNR, dB", "{:g}x" if key == "speedup" else "{:g}")
        _draw_panel(axes, key, series, looks, lines)
    _draw_legend(drawing, entries, looks, bottom + 66)
    return drawing


_PANELS = (
    ("achieved_density", "What was computed", "share of query-key pairs, whole run"),
    ("speedup", "How fast it was", "speed-up over dense, whole run"),
)


def _draw_panel(
    axes: Axes,
    key: str,
    series: Sequence[Series],
    looks: Mapping[str, tuple[str, str]],
    lines: Sequence[Mapping[str, Any]],
) -> None:
    sign = 1 if key == "speedup" else -1
    best = front([(sign * row[key], row["psnr"]) for one in series if not one.floor for row in one.rows])
    axes.drawing.line([axes.at(sign * x, y) for x, y in best], _FRONT, 9)
    taken: list[_Area] = []
    for row in lines:
        _, y = axes.at(axes.x[0], row["psnr"])
        axes.drawing.line([(axes.left, y), (axes.right, y)], _GREY, 1.5, dashed=True)
        x = axes.right - 8
        taken.append((x - text_width(row["label"], 11), y - 17, x, y - 3))
        axes.drawing.text((x, y - 10), row["label"], 11, "end", _GREY)
    if key == "speedup":
        x, _ = axes.at(1.0, axes.y[0])
        axes.drawing.line([(x, axes.top), (x, axes.bottom)], INK, 1.5)
    places = {id(row): axes.at(row[key], row["psnr"]) for one in series for row in one.rows}
    taken += [(x - 6, y - 6, x + 6, y + 6) for x, y in places.values()]
    taken += [area for one in series for area in _along([places[id(row)] for row in one.rows])]
    for one in series:
        colour, marker = looks[one.name]
        axes.drawing.line([places[id(row)] for row in one.rows], colour, 1.5, dashed=one.floor)
        for row in one.rows:
            axes.drawing.marker(places[id(row)], marker, colour, 6)
    if key == "speedup":
        for one in series:
            for row in one.rows:
                _label(axes, places[id(row)], row, looks[one.name][0], taken)


_Area = tuple[float, float, float, float]


def _label(axes: Axes, at: tuple[float, float], row: Mapping[str, Any], colour: str, taken: list[_Area]) -> None:
    """Write the density beside a point where there is room; where there is none, the line's order tells it."""
    if row["density"] is None:
        return
    text = f"{row['density']:g}"
    half = text_width(text, 10) / 2 + 1
    for dx, dy in ((0, -14), (0, 14), (half + 9, 0), (-half - 9, 0), (half + 6, -10), (-half - 6, -10)):
        x, y = at[0] + dx, at[1] + dy
        area = (x - half, y - 6, x + half, y + 6)
        inside = area[0] > axes.left and area[1] > axes.top and area[2] < axes.right and area[3] < axes.bottom
        if inside and not any(_overlap(area, other) for other in taken):
            taken.append(area)
            axes.drawing.text((x, y), text, 10, "middle", colour)
            return


def _along(points: Sequence[tuple[float, float]], step: float = 4) -> Iterator[_Area]:
    """Small areas that cover a line."""
    for (x, y), (u, v) in pairwise(points):
        count = math.ceil(math.hypot(u - x, v - y) / step)
        for number in range(count):
            at = (x + (u - x) * number / count, y + (v - y) * number / count)
            yield at[0] - step / 2, at[1] - step / 2, at[0] + step / 2, at[1] + step / 2


def _overlap(a: _Area, b: _Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _looks(series: Sequence[Series]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series."""
    methods = [one.name for one in series if not one.floor]
    found = {
        name: (_COLOURS[number % len(_COLOURS)], MARKERS[number % len(MARKERS)]) for number, name in enumerate(methods)
    }
    return found | {one.name: (_GREY, "circle") for one in series if one.floor}


def _legend_rows(names: Sequence[str], width: float) -> Iterator[list[str]]:
    row: list[str] = []
    used = 0.0
    for name in names:
        needed = _SWATCH + text_width(_legend_text(name), 12) + 22
        if row and used + needed > width:
            yield row
            row, used = [], 0.0
        row.append(name)
        used += needed
    yield row


def _draw_legend(
    drawing: Drawing, rows: Sequence[Sequence[str]], looks: Mapping[str, tuple[str, str]], top: float
) -> None:
    for number, names in enumerate(rows):
        x, y = float(_RIGHT), top + number * _ROW
        for name in names:
            colour, marker = looks.get(name, (_FRONT, ""))
            drawing.line([(x, y), (x + _SWATCH - 6, y)], colour, 1.5 if marker else 9)
            if marker:
                drawing.marker((x + (_SWATCH - 6) / 2, y), marker, colour, 5)
            drawing.text((x + _SWATCH, y), _legend_text(name), 12)
            x += _SWATCH + text_width(_legend_text(name), 12) + 22


def _legend_text(name: str) -> str:
    return "no other is better in both" if name == "best" else name


def _about(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    settings = record["settings"]
    size = f"{settings['frames']} frames of {settings['height']}x{settings['width']}, {settings['steps']} steps"
    runs = max(row["runs"] for row in rows)
    device = record["environment"]["device"]
    medians = "one run each" if runs == 1 else f"medians of {runs} runs"
    model = settings["model"].rsplit("/", 1)[-1]
    return f"{model}, {size}, {settings['dtype']}, {device}; {medians}; numbers: density asked for"


def _span(values: Sequence[float]) -> tuple[float, float]:
    least, largest = min(values), max(values)
    room = (largest - least) * 0.08 or max(abs(least) * 0.05, 0.01)
    return least - room, largest + room


def _is_line(row: Mapping[str, Any]) -> bool:
    """Whether a row is a floor without a density: it has one PSNR, whatever is computed."""
    return row["kind"] == "floor" and row["method"] is None


def _name(row: Mapping[str, Any]) -> str:
    return row["label"] if row["density"] is None else row["label"].replace(f" {row['density']:g}", "", 1)
