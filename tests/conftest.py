"""What must be in the environment before anything is imported.

Without a GPU, Triton's kernels run under its interpreter. Tiny models would run dense, because nothing is faster there,
so tests have a table of costs in which sparse attention always pays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.parallel.ranks import Ranks

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["DIT_SPARSE_COSTS"] = str(Path(__file__).with_name("costs.json"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster with three cores in name for all tests of the process; starting one takes seconds."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'dit-sparse[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=3, num_gpus=0, include_dashboard=False, object_store_memory=2**27, **quiet)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Four processes that are ranks of torch.distributed; started once a file, because they take time when idle too."""
    from tests.parallel.ranks import Ranks

    started = Ranks(4)
    yield started
    started.stop()
