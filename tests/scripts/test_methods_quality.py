"""`scripts/methods_quality.py`: medians of made-up reports, and the page that it keeps."""

from __future__ import annotations

import json
from typing import Any

import methods_quality as quality
import pytest


def video(label: str, psnr: float | None, prompt: str = "a", **config: Any) -> dict[str, Any]:
    row = {"label": label, "config": config, "prompt": prompt, "psnr": psnr, "ssim": 0.9}
    return row | {"sparse_density": config.get("density")}


def report(*videos: dict[str, Any]) -> dict[str, Any]:
    floors = [video(name, 50.0) for name in ("another seed", "dense, torch's math kernel", "dense, ours")]
    return {"environment": {"device": "x"}, "settings": {"steps": 4}, "videos": [*videos, *floors]}


def recall(*rows: tuple[str, float, float]) -> dict[str, Any]:
    found = [{"method": m, "density": d, "achieved": d, "recall": r, "worst": r / 2} for m, d, r in rows]
    return {"environment": {"device": "y"}, "calls": ["call"], "steps": 8, "rows": found}


def test_medians_over_prompts_recall_and_the_default() -> None:
    videos = [
        video("adaspa 0.25 (default)", psnr, prompt, method="adaspa", density=0.25)
        for prompt, psnr in zip("abc", (30.0, 34.0, 31.0), strict=True)
    ]
    more = [
        video("random blocks 0.25", 12.0, method="random", density=0.25),
        video("sparge (default)", None, method="sparge") | {"sparse_density": 0.9},
    ]
    found = quality.collect([report(*videos, *more)], recall(("adaspa", 0.25, 0.7), ("adaspa", 0.5, 0.9)))
    figures = found["methods"]["adaspa"]
    assert list(figures) == ["0.25"]
    assert figures["0.25"]["psnr"] == {"median": 31.0, "min": 30.0, "max": 34.0}
    assert (figures["0.25"]["prompts"], figures["0.25"]["recall"], figures["0.25"]["recall_worst"]) == (3, 0.7, 0.35)
    assert found["defaults"]["adaspa"]["psnr"]["median"] == 31.0
    assert found["defaults"]["sparge"]["psnr"]["median"] == float("inf")
    assert quality.ranked(found) == ["adaspa", "random blocks", "sparge"]
    table = quality.quality_table(found).splitlines()
    assert table[2].startswith("| `adaspa` |  | 31.0 (30.0 to 34.0) |  | ")
    assert table[3].startswith("| random blocks |  | 12.0 (12.0 to 12.0) |")


def test_a_later_report_replaces_the_settings_that_it_has() -> None:
    old = report(*(video(f"svg {d}", 20.0, method="svg", density=d) for d in (0.5, 0.25)))
    new = report(video("svg 0.25", 25.0, method="svg", density=0.25))
    found = quality.collect([old, new], recall())["methods"]["svg"]
    assert {density: figures["psnr"]["median"] for density, figures in found.items()} == {
        "0.5": 20.0,
        "0.25": 25.0,
    }
    assert found["0.25"]["prompts"] == 1


def test_planning_is_spread_over_the_sparse_steps() -> None:
    rows = [{"method": name, "share_of_dense": 0.16} for name in ("neighborhood", "xattention", "dhsa")]
    found = quality.costs({"rows": rows}, warmup=0.2, steps=20)
    assert found["neighborhood"] == pytest.approx(0.16 / 16)
    assert found["xattention"] == pytest.approx(0.16)  # at every step
    assert found["dhsa"] == pytest.approx(0.16 * 4 / 16)  # after the warm-up and three times more


def test_the_page_has_the_table_of_the_file() -> None:
    page = quality.PAGE.read_text("utf-8")
    assert quality.with_table(page, json.loads(quality.OUT.read_text("utf-8"))) == page
    with pytest.raises(ValueError, match="must have the lines"):
        quality.with_table("nothing", {})
