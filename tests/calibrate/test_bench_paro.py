"""The memory of a calibration, as `scripts/bench_paro.py` measures it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_paro import main, memory


def test_memory_grows_with_what_is_held() -> None:
    now = memory("VmRSS")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    grown = memory("VmRSS") - now
    assert held.nbytes * 0.9 < grown < held.nbytes * 2
    assert memory("VmHWM") >= now + grown


def test_a_long_layer_takes_less_than_one_attention_map(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    main(["--memory-tokens", "4096", "--out", str(out)])
    found = json.loads(out.read_text("utf-8"))["memory"]
    assert found["attention_map_a_head"] == 4096 * 4096 * 4
    assert found["block_map_a_head"] == 64 * 64 * 4
    assert found["heads"] * found["block_map_a_head"] < found["calibration"] < found["attention_map_a_head"]
    assert found["process"] > found["calibration"] + found["inputs"]


@pytest.mark.parametrize("tokens", ["0", "-4096", "5000"])
def test_tokens_that_make_no_grid_are_refused(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--memory-tokens", tokens, "--out", str(tmp_path / "memory.json")])
    assert f"must be a multiple of 4096 (frames of 64x64), got {tokens}" in capsys.readouterr().err
