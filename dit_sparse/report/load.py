"""Finds out what kind of run a folder or file is of, and reads it."""

from __future__ import annotations

from pathlib import Path

from dit_sparse.compare.record import RECORD
from dit_sparse.generate.manifest import MANIFEST
from dit_sparse.report.bench import load_bench
from dit_sparse.report.compared import load_compared
from dit_sparse.report.content import Report
from dit_sparse.report.generated import load_generated

__all__ = ["load"]


def load(path: Path) -> Report:
    """The run at `path`: a folder of `generate` or `compare`, or the JSON file of `bench kernels`.

    Raises:
        ValueError: none of these, or one that is damaged, empty or of another version.
        OSError: it cannot be read.
    """
    if path.is_dir():
        if (path / RECORD).is_file():
            return load_compared(path)
        if (path / MANIFEST).is_file():
            return load_generated(path)
        raise ValueError(
            f"{path} has neither a {MANIFEST} of `generate` nor a {RECORD} of `compare`; "
            "give the --out folder of a run, or the JSON file of `bench kernels`"
        )
    if not path.exists():
        raise ValueError(f"no such folder or file: {path}")
    if path.name == RECORD:
        return load_compared(path.parent)
    if path.name == MANIFEST:
        return load_generated(path.parent)
    return load_bench(path)
