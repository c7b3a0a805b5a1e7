"""A tiny model, a comparison on it, and one thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_sparse.compare import Case, Job, floor_cases, make_cases, prepare, run
from dit_sparse.eval import CONVENTIONS
from dit_sparse.generate import Request
from tests.pipelines.tiny import make_tiny_wan

PROMPTS = ("a red ball", "a blue square")
SCHEDULE = {"warmup": 0.3}
SMALL = {"method": "adaspa", "block": 8}


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """The tiny model's operations are so small that threads which wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_wan(tmp_path_factory.mktemp("compare-model") / "tiny"))


@pytest.fixture(scope="session")
def request_of(model: str) -> Request:
    """What all comparisons here share."""
    size = {"height": 64, "width": 64, "frames": 5, "steps": 4, "guidance": 5.0}
    return Request(prompts=PROMPTS, config={}, out=Path(), model=model, device="cpu", format="gif", **size)


def cases() -> list[Case]:
    methods = make_cases([SMALL], [0.6, 0.3], SCHEDULE)
    return [*methods, *floor_cases(methods[1:], SCHEDULE)]


def compare_into(request: Request, out: Path, chosen: list[Case] | None = None, **changes: object) -> Job:
    """Prepare a comparison in the folder `out`; `run` runs it."""
    return prepare(replace(request, out=out, **changes), cases() if chosen is None else chosen, [*CONVENTIONS.values()])


@pytest.fixture(scope="session")
def finished(request_of: Request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison; copy it before changing anything."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert run(compare_into(request_of, out)) == 10
    return out
