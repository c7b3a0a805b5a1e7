"""The picture of a comparison: what is in it, where, and that nothing written overlaps."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from dit_sparse.compare.chart import Drawing, _Text, text_width, ticks
from dit_sparse.compare.pareto import _draw, draw_pareto, front, series_of
from dit_sparse.compare.summary import summarize

METHODS = ("adaspa", "neighborhood", "paro", "svg", "radial", "sparge")


def run_of(
    label: str, density: float | None, psnr: float | None, speedup: float, kind: str = "method"
) -> dict[str, Any]:
    method = None if label in ("dense", "another seed") else label.split()[0]
    share = 0.2 + 0.8 * (1.0 if density is None else density)
    return {
        "label": label,
        "kind": kind,
        "method": method,
        "density": density,
        "psnr": psnr,
        "ssim": 0.9,
        "seconds": 1 / speedup,
        "speedup": speedup,
        "achieved_density": share,
        "sparse_density": density,
    }


def crowded() -> dict[str, Any]:
    """Six methods at three densities, close to each other, with both floors."""
    rng = np.random.default_rng(0)
    runs = [run_of("dense", 1.0, None, 1.0, "dense"), run_of("another seed", 1.0, 19.5, 1.0, "floor")]
    for density in (0.5, 0.25, 0.125):
        for name in METHODS:
            psnr = 24 + 12 * density + rng.normal()
            runs.append(run_of(f"{name} {density:g}", density, psnr, 1.6 - density + 0.05 * rng.normal()))
        runs.append(run_of(f"random blocks {density:g}", density, 10 + 4 * density, 1.7 - density, "floor"))
    settings = {"model": "demo", "frames": 29, "height": 96, "width": 128, "steps": 20, "dtype": "bfloat16"}
    return {"settings": settings, "environment": {"device": "NVIDIA H100 80GB HBM3"}, "runs": runs}


def drawing_of(record: dict[str, Any]) -> Drawing:
    rows = summarize(record["runs"])
    return _draw(record, rows, series_of(rows))


def test_series_are_methods_by_density() -> None:
    series = series_of(summarize(crowded()["runs"]))
    assert [one.name for one in series] == [*METHODS, "random blocks"]
    assert [one.floor for one in series] == [False] * 6 + [True]
    for one in series:
        assert [row["density"] for row in one.rows] == [0.125, 0.25, 0.5]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_front_is_what_none_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(p != point and p[0] >= point[0] and p[1] >= point[1] for p in points)

    assert front(points) == sorted(point for point in set(points) if not beaten(point))


def test_nothing_written_overlaps_or_leaves_the_picture() -> None:
    drawing = drawing_of(crowded())
    areas = []
    for shape in drawing.shapes:
        if isinstance(shape, _Text):
            long, high = text_width(shape.text, shape.size), shape.size
            back = {"start": 0.0, "middle": 0.5, "end": 1.0}[shape.anchor] * long
            x, y = shape.at
            area = (x - back, y - high / 2, x - back + long, y + high / 2)
            if shape.turned:
                area = (x - high / 2, y - long / 2, x + high / 2, y + long / 2)
            assert area[0] >= 0 <= area[1]
            assert area[2] <= drawing.width
            assert area[3] <= drawing.height
            areas.append((shape.text, area))
    for (text, a), (other, b) in itertools.combinations(areas, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{text!r} overlaps {other!r}"
    texts = [text for text, _ in areas]
    assert {*METHODS, "random blocks", "no other is better in both"} <= set(texts)
    assert texts.count("another seed") == 2
    assert texts.count("0.5") >= 4


def test_both_files_show_the_points(tmp_path: Path) -> None:
    record = crowded()
    files = draw_pareto(record, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    root = ElementTree.parse(tmp_path / "pareto.svg").getroot()
    drawing = drawing_of(record)
    assert (root.get("width"), root.get("height")) == (str(drawing.width), str(drawing.height))
    fills = [element.get("fill") for element in root.iter("{http://www.w3.org/2000/svg}polygon")]
    assert fills.count("#4477aa") == 2 * 3 + 1  # adaspa's, in both panels, and the legend's
    with Image.open(tmp_path / "pareto.png") as image:
        assert image.size == (drawing.width, drawing.height)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (np.abs(pixels.astype(int) - [0x44, 0x77, 0xAA]).max(-1) < 8).sum() > 7 * 40


def test_places_are_those_of_the_figures(tmp_path: Path) -> None:
    """Two points: the faster stands further right, the better one higher, by the axis's own scale."""
    record = crowded() | {"runs": [run_of("adaspa 0.5", 0.5, 30.0, 1.0), run_of("adaspa 0.25", 0.25, 20.0, 2.0)]}
    drawing = drawing_of(record)
    markers = [shape for shape in drawing.shapes if getattr(shape, "fill", None) == "#4477aa"]
    centres = [np.mean(marker.points, 0) for marker in markers[:4]]
    low, high = centres[:2]  # by density
    assert low[0] < high[0]
    assert low[1] > high[1]
    fast, slow = centres[2:]
    assert fast[0] > slow[0]
    assert fast[1] == pytest.approx(low[1])


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    record = crowded() | {"runs": [run_of("dense", 1.0, None, 1.0, "dense")]}
    assert draw_pareto(record, tmp_path) == []
    record["runs"].append(run_of("random blocks 0.5", 0.5, 12.0, 1.3, "floor"))
    assert len(draw_pareto(record, tmp_path)) == 2
    assert "random blocks" in (tmp_path / "pareto.svg").read_text()
    record["runs"].append(run_of("adaspa <&> 0.5", 0.5, 30.0, 1.2))
    draw_pareto(record, tmp_path)
    assert "adaspa &lt;&amp;&gt;" in (tmp_path / "pareto.svg").read_text()


@pytest.mark.parametrize(
    ("least", "largest", "want"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (19.2, 31, [20, 22, 24, 26, 28, 30])]
)
def test_ticks_are_round(least: float, largest: float, want: list[float]) -> None:
    assert ticks(least, largest) == want
