"""VBench's environment, real and stood in for."""

import os
from pathlib import Path

import pytest

from dit_sparse.vbench.environment import PYTHON_VARIABLE
from tests.vbench.standin import make_standin

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    return make_standin(tmp_path_factory.mktemp("standin") / "environment")


@pytest.fixture(scope="session")
def real():
    """The Python of an environment that has VBench itself."""
    python = Path(os.environ.get(PYTHON_VARIABLE) or ROOT / ".venv-vbench" / "bin" / "python")
    if not python.exists():
        reason = f"VBench's environment is missing ({python}): make vbench-env"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return python


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty folder of weights, which is also where the stand-in writes what it is asked to do."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(folder))
    return folder
