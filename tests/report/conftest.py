"""A folder that `generate` made with a tiny model, and copies of it to spoil."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse.generate import Request, prepare, run
from dit_sparse.generate.manifest import MANIFEST
from dit_sparse.generate.video import write_video
from tests.pipelines.tiny import make_tiny_wan

PROMPT = "a red ball </script><script>document.title='run'</script><b>&amp; \u2028"
"""Would run as a script, or look bold, where a page does not escape it."""

CONFIG = {"method": "adaspa", "density": 0.3, "block": 8, "warmup": 0.3, "dense_layers": [0]}


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `generate --compare-dense --trace`: one prompt, three steps, 64x64 pixels, nine frames."""
    home = tmp_path_factory.mktemp("report")
    model = str(make_tiny_wan(home / "model", num_layers=3))
    sizes = {"height": 64, "width": 64, "frames": 9, "steps": 4, "guidance": 5.0}
    request = Request(
        prompts=(PROMPT,),
        config=CONFIG,
        out=home / "run",
        model=model,
        device="cpu",
        compare_dense=True,
        trace=True,
        **sizes,
    )
    outcome = run(prepare(request))
    assert not outcome.failures
    return home / "run"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def edit(folder: Path) -> Callable[..., None]:
    """Changes the manifest line of `folder`, where a value of `...` takes the key out."""

    def edit(**changes: Any) -> None:
        line = manifest_line(folder) | changes
        line = {key: value for key, value in line.items() if value is not ...}
        (folder / MANIFEST).write_text(json.dumps(line) + "\n", "utf-8")

    return edit


def manifest_line(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text("utf-8"))


def counting_video(path: Path, *, frames: int = 48, step: int = 5, offset: int = 0, size: int = 64) -> None:
    """A video that says by its gray, `offset + step * frame`, which frame it is at."""
    levels = (offset + step * np.arange(frames)).astype(np.uint8)
    write_video(
        np.broadcast_to(levels[:, None, None, None], (frames, size, size, 3)).copy(), path, format="mp4", fps=16
    )
