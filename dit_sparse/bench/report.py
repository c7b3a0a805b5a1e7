"""Runs the sections, and writes what they found."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dit_sparse.bench.sections import Row, kernel_rows, least_error_rows, movement_rows, neighborhood_rows, search_rows
from dit_sparse.bench.shapes import SHAPES
from dit_sparse.kernels import BACKENDS
from dit_sparse.partials import replacing
from dit_sparse.types import REMAINDERS, Remainder

SECTIONS = ("kernels", "neighborhood", "search", "movement")
_SPARSE = ("hopper", "triton", "flex")


def run_sections(
    *,
    shapes: Sequence[str] = tuple(SHAPES),
    blocks: Sequence[int] = (128, 64),
    densities: Sequence[float] = (1.0, 0.5, 0.25, 0.1),
    backends: Sequence[str] | None = None,
    sections: Sequence[str] = SECTIONS,
    remainders: Sequence[Remainder] = ("none",),
    rounds: int = 9,
    device: torch.device | str = "cuda",
    save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Run the benchmark; a part that fails is reported and the others go on.

    Args:
        shapes, blocks, densities: of the section "kernels".
        backends: sparse backends; by default all of hopper, triton and flex that run here.
        sections: any of `SECTIONS`.
        remainders: of the section "kernels".
        rounds: turns of every kernel; a third of them for sequences above 50,000 tokens.
        device: where.
        save: called with the report after every part.

    Returns:
        `{"environment", "rounds", "rows", "failed", "skipped", "seconds"}`, ready for JSON; `seconds` of every part,
        compiling and checking included.

    Raises:
        ValueError: an unknown shape, section or backend, a block below 16, or a density outside (0, 1].
    """
    device = torch.device(device)
    _check_names("shapes", shapes, SHAPES)
    _check_names("sections", sections, SECTIONS)
    _check_names("remainders", remainders, REMAINDERS)
    _check_names("backends", backends or (), BACKENDS)
    for name, values, valid in (("blocks", blocks, lambda x: x >= 16), ("densities", densities, lambda x: 0 < x <= 1)):
        for value in values:
            if not valid(value):
                raise ValueError(
                    f"{name} must be {'at least 16' if name == 'blocks' else 'above 0 and at most 1'}, got {value}"
                )
    missing = {name: BACKENDS[name].unavailable(device) for name in backends or _SPARSE}
    report: dict[str, Any] = {
        "environment": environment(device),
        "rounds": rounds,
        "skipped": {name: why for name, why in missing.items() if why is not None},
        "failed": {},
        "rows": [],
        "seconds": {},
    }
    able = [name for name, why in missing.items() if why is None]
    parts = _parts(sections, shapes, blocks, densities, able, remainders, rounds, device)
    with torch.no_grad():
        for label, rows in parts:
            start = time.perf_counter()
            try:
                report["rows"] += [asdict(row) for row in rows]
            except Exception as error:  # noqa: BLE001  # no part's failure may lose what the others found
                report["failed"][label] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            report["seconds"][label] = round(time.perf_counter() - start, 1)
            save(report)
            torch.compiler.reset()  # FlexAttention may be compiled for a few shapes only before torch refuses
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return report


def _parts(
    sections: Sequence[str],
    shapes: Sequence[str],
    blocks: Sequence[int],
    densities: Sequence[float],
    backends: Sequence[str],
    remainders: Sequence[Remainder],
    rounds: int,
    device: torch.device,
) -> Iterator[tuple[str, Iterable[Row]]]:
    few = max(3, rounds // 3)
    if "neighborhood" in sections:
        yield "neighborhood", neighborhood_rows(backends, few, device)
    if "search" in sections:
        yield "search wan-1.3b", search_rows("wan-1.3b", rounds, device)
        yield "search wan-14b", search_rows("wan-14b", few, device)
        yield "search of lea wan-1.3b", least_error_rows("wan-1.3b", rounds, device)
        yield "search of lea wan-14b", least_error_rows("wan-14b", few, device)
    if "movement" in sections:
        yield "movement wan-1.3b", movement_rows("wan-1.3b", rounds, device)
        yield "movement wan-14b", movement_rows("wan-14b", few, device)
    if "kernels" in sections:
        for shape in shapes:
            for block in blocks:
                turns = few if SHAPES[shape].tokens > 50_000 else rounds
                rows = kernel_rows(shape, block, densities, backends, turns, device, remainders)
                yield f"kernels {shape} {block}", rows


def _check_names(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} must be among {', '.join(known)}, got {name!r}")


def environment(device: torch.device) -> dict[str, str | None]:
    """Where the numbers come from: device, versions, commit."""
    found: dict[str, str | None] = {"device": str(device), "torch": torch.__version__}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cudnn": str(torch.backends.cudnn.version())}
    for package in ("dit-sparse", "diffusers", "triton", "fa3-fwd"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"commit": commit()}


def commit() -> str | None:
    """The checkout's commit; `None` outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON, under a temporary name first."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def print_table(report: dict[str, Any], console: Console) -> None:
    """The rows as a table, then what was skipped and what failed."""
    table = Table(title="x ideal: time / (density x the fastest dense attention of the same turns)")
    for column in ("section", "shape", "block", "kernel", "density", "remainder", "ms", "TFLOP/s", "x ideal", "error"):
        table.add_column(column, justify="left" if column in ("section", "shape", "kernel") else "right")
    for row in report["rows"]:
        numbers = (
            f"{row['density']:.3f}",
            row["remainder"],
            f"{row['time_ms']:.3f}",
            f"{row['tflops']:.0f}" if row["tflops"] else "-",
        )
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        block = str(row["block"] or "-")
        table.add_row(row["section"], row["shape"], block, row["kernel"], *numbers, f"{row['ideal_ratio']:.2f}", error)
    console.print(table)
    console.print(f"took {sum(report['seconds'].values()):.0f} s", highlight=False)
    for name, why in report["skipped"].items():
        console.print(f"skipped {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    for name, why in report["failed"].items():
        console.print(f"failed: {name}: {why}", style="red", markup=False, highlight=False, soft_wrap=True)
