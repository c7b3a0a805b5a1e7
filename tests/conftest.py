"""Without a GPU, Triton's kernels run under its interpreter; it decides so when it is first imported."""

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


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes that are ranks of torch.distributed; started once, because that takes long."""
    from tests.parallel.ranks import Ranks

    started = Ranks(4)
    yield started
    started.stop()
