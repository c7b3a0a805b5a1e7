"""Calibration as the command line asks for it: what it writes is whole or not there."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dit_sparse import LeastError, Schedule
from dit_sparse.calibrate import command
from dit_sparse.calibrate.quality import Reached
from dit_sparse.generate import Request


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(LeastError(density=0.3))
    monkeypatch.setattr(command, "prepare", lambda *_: (None, {"num_inference_steps": 2}))
    monkeypatch.setattr(command, "for_psnr", lambda *_, **__: Reached(schedule, "density", {0.3: [30.0]}))
    path = tmp_path / "lea.json"
    write = Path.write_text

    def full(self: Path, text: str, *arguments: Any, **options: Any) -> int:
        write(self, text[: len(text) // 2], *arguments, **options)
        raise OSError(28, "No space left on device")

    def calibrate() -> None:
        request = Request(("a ball",), {"method": "lea"}, tmp_path / "out")
        command.calibrate_quality(request, path, schedule, None, 30.0, Console(file=io.StringIO()))

    calibrate()
    whole = path.read_text()
    assert Schedule.from_config(json.loads(whole)) == schedule
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        calibrate()
    assert path.read_text() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
