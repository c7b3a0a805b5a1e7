"""Settings, their PSNR and who beats whom, on reports written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from bench_frontier import at_density_of, main, schedule_of, settings_of, table, unbeaten

from dit_sparse import AdaSpa, Dense, LoSA, RadialAttention, Schedule


def video(schedule: Schedule, label: str, psnr: float | None, prompt: str) -> dict[str, Any]:
    return {
        "label": label,
        "config": schedule.to_config() | {"seed": 0},
        "psnr": psnr,
        "prompt": prompt,
        "density": 0.4,
    }


def row(method: str, seconds: float, psnr: float) -> dict[str, Any]:
    found = {"median": psnr, "min": psnr - 1, "prompts": 2}
    return {
        "label": f"{method} {seconds}",
        "method": method,
        "config": {"method": method, "density": 0.25},
        "psnr": found,
        "seconds": seconds,
        "speedup": 4 / seconds,
    }


def test_a_setting_is_that_of_the_last_report_with_it() -> None:
    old, new = Schedule(AdaSpa(0.5)), Schedule(AdaSpa(0.25), remainder="mean")
    first = {"videos": [video(new, "x", 10.0, "a"), video(old, "adaspa 0.5", 50.0, "a")]}
    floors = [{"label": "dense", "config": {"seed": 1}, "psnr": 20.0, "prompt": "a", "density": 1.0}]
    second = {"videos": [video(new, "x", 30.0, "a"), video(new, "x", None, "b"), video(new, "x", 33.0, "c"), *floors]}
    found = {setting["label"]: setting for setting in settings_of([first, second])}
    assert set(found) == {"adaspa 0.5", "x"}
    assert found["x"]["psnr"] == {"median": 33.0, "min": 30.0, "prompts": 3}
    schedule = schedule_of(found["x"])
    assert isinstance(schedule, Schedule)
    assert (schedule.method, schedule.remainder, schedule.never_slower) == (AdaSpa(0.25), "mean", False)


def test_what_belongs_to_the_demo_model_is_left_out() -> None:
    assert schedule_of({"config": {"method": "paro", "plan_file": "a.safetensors"}}) == (
        "its plan_file is for the demo model"
    )
    assert "densty" in str(schedule_of({"config": {"method": "adaspa", "densty": 1}}))


def test_densities_that_came_out_of_the_data_are_those_of_the_demo_model() -> None:
    losa = Schedule(LoSA(), warmup=0.2)
    assert at_density_of(losa, 0.6, 20).method.density == pytest.approx(0.5)
    for other in (Schedule(LoSA(density=0.25)), Schedule(RadialAttention()), Schedule(Dense())):
        assert at_density_of(other, 0.6, 20) == other


def test_beaten_is_as_fast_and_as_near() -> None:
    rows = [row("lea", 1.0, 30.0), row("lea", 2.0, 40.0), row("a", 1.5, 29.0), row("a", 1.5, 31.0), row("b", 0.9, 1.0)]
    rows += [row("c", 2.0, 40.0)]
    assert unbeaten(rows) == ["a 1.5", "b 0.9"]
    text = table({"rows": rows})
    assert "| **lea 0.25** | 4.00x | 30.0 (29.0) | |" in text
    assert "| a 0.25 | 2.67x | 31.0 (30.0) | 30.0 |" in text
    assert "| b 0.25 | 4.44x | 1.0 (0.0) | none is as fast |" in text
    assert text.endswith("Of 4 settings of other methods 2 are not beaten: a 1.5, b 0.9.\n")


def test_no_report_is_an_error(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--table", "--out", str(tmp_path / "none.json")], ["--out", str(tmp_path / "x.json")]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "--fidelity must name at least one report" in capsys.readouterr().err
