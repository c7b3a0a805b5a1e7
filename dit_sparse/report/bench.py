"""The report of a JSON file of `bench kernels`."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from dit_sparse.bench.sections import Row
from dit_sparse.report.content import Report, Table
from dit_sparse.report.read import number, read_object, require

__all__ = ["load_bench"]

_KEYS = ("environment", "rounds", "rows", "failed", "skipped", "seconds")
_TITLES = {
    "kernels": "Attention of random block masks",
    "neighborhood": "Attention of a neighborhood",
    "search": "Search for blocks",
    "movement": "Movement of tokens",
}


def load_bench(path: Path) -> Report:
    """The benchmark in the file `path`, a table for each of its sections.

    Raises:
        ValueError: no benchmark, one of another version, or one without a row.
        OSError: it cannot be read.
    """
    found = read_object(path)
    require(found, _KEYS, f"{path} is no report of `bench kernels`, or it")
    known = [f.name for f in fields(Row)]
    for row in found["rows"]:
        require(row, known, f"{path}, a row of the benchmark,")
    if not found["rows"]:
        raise ValueError(f"{path} has no row: every part failed or was skipped")
    sections = dict.fromkeys(row["section"] for row in found["rows"])
    best = min((row for row in found["rows"] if row["kernel"] != "dense"), key=lambda row: row["ideal_ratio"])
    command = ["dit-sparse", "bench", "kernels", "--rounds", str(found["rounds"]), "--sections", ",".join(sections)]
    return Report(
        kind="bench",
        source=path.name,
        headline=[
            ("device", str(found["environment"].get("device"))),
            ("measurements", str(len(found["rows"]))),
            ("nearest to ideal", f"{number(best['ideal_ratio'], '.2f')} ({best['kernel']})"),
        ],
        facts=[(name, "-" if value is None else str(value)) for name, value in found["environment"].items()],
        tables=[_table(section, [r for r in found["rows"] if r["section"] == section]) for section in sections],
        commands=[shlex.join([*command, "--out", path.name])],
        notes=[
            *(f"skipped {name}: {why}" for name, why in found["skipped"].items()),
            *(f"failed: {name}: {why}" for name, why in found["failed"].items()),
        ],
    )


def _table(section: str, rows: list[dict[str, Any]]) -> Table:
    columns = ["shape", "block", "kernel", "density", "remainder", "ms", "TFLOP/s", "x ideal", "relative error"]
    return Table(
        _TITLES.get(section, section),
        columns,
        [
            [
                *(row["shape"], row["block"] or None, row["kernel"], row["density"], row["remainder"] or None),
                *(row["time_ms"], row["tflops"] or None, row["ideal_ratio"], row["error"]),
            ]
            for row in rows
        ],
        ["x ideal"],
        "x ideal: time over density times that of the fastest dense attention of the same turns. "
        "Relative error: against float64.",
    )
