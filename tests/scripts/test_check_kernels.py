"""Reports of random cases put together."""

from __future__ import annotations

import json
from pathlib import Path

from check_kernels import draw, merge


def test_reports_of_other_seeds_are_counted_together(tmp_path: Path) -> None:
    parts = []
    for number in (1, 2):
        counts = {"passed": 10 * number, "refused": number, "undecided": 0, "failed": []}
        report = {
            "environment": {"device": "a GPU", "commit": "abc"},
            "backends": {"triton": counts | {"worst_error": {"float16": 1e-4 * number, "float32": 1e-7 / number}}},
        }
        parts.append(tmp_path / f"{number}.json")
        parts[-1].write_text(json.dumps(report), "utf-8")
    found = merge(parts)["backends"]["triton"]
    assert (found["passed"], found["refused"], found["failed"]) == (30, 3, [])
    assert found["worst_error"] == {"float16": 2e-4, "float32": 1e-7}


def test_only_cases_with_a_remainder_have_heads_with_their_own() -> None:
    drawn = [draw(seed, 100, ["none", "value"]) for seed in range(200)]
    assert {case.remainder for case in drawn if case.own_remainders} == {"value"}
    assert any(case.remainder == "value" and not case.own_remainders for case in drawn)
