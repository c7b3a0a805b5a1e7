"""The worked example of docs/add-a-method.md, as it stands on the page."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_worked_example_runs(tmp_path: Path) -> None:
    """The method, its test and its entry point, installed as a package would be."""
    names = re.findall(r"^`(\w+\.py)`:$", PAGE, re.MULTILINE)
    assert names == ["pooled.py", "test_pooled.py"]
    for name, code in zip(names, blocks("python"), strict=True):
        (tmp_path / name).write_text(code)
    (registration,) = blocks("toml")
    points = tomllib.loads(registration)["project"]["entry-points"]["dit_sparse.methods"]
    metadata = tmp_path / "pooled-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pooled\nVersion: 1.0\n")
    lines = ["[dit_sparse.methods]", *(f"{name} = {place}" for name, place in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "test_found.py").write_text(
        "from dit_sparse import Schedule\n"
        "def test_found():\n"
        "    assert Schedule.from_config({'method': 'pooled', 'density': 0.5}).method.density == 0.5\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "."]
    path = f"{tmp_path}:{ROOT}"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
