"""A tiny model, and a folder of its own for every command."""

import pytest
import torch

from tests.pipelines.tiny import make_tiny_wan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_wan(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tiny model's operations are so small that threads which wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
