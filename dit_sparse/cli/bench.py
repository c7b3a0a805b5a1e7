"""`dit-sparse bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dit_sparse.cli.app import user_errors
from dit_sparse.output_file import check_file

bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)


@bench.command()
def kernels(
    shapes: Annotated[str | None, typer.Option(help="Such as wan-1.3b,flux.", show_default="all")] = None,
    blocks: Annotated[str, typer.Option(help="Tokens a block.")] = "128,64",
    densities: Annotated[str, typer.Option(help="Shares of the query-key pairs.")] = "1,0.5,0.25,0.1",
    backends: Annotated[
        str | None, typer.Option(help="Such as hopper,triton.", show_default="those that run here")
    ] = None,
    sections: Annotated[str, typer.Option(help="What is timed.")] = "kernels,neighborhood,search,movement",
    remainders: Annotated[str, typer.Option(help="Such as none,mean,value.")] = "none",
    rounds: Annotated[int, typer.Option(min=1, help="Times each kernel is timed.")] = 9,
    out: Annotated[Path | None, typer.Option(help="JSON file for the report.")] = None,
) -> None:
    """Time the GPU kernels against the fastest dense attention; needs an NVIDIA GPU and takes some minutes."""
    import torch

    with user_errors():
        from dit_sparse.bench import SHAPES, print_table, run_sections, write_report

        if not torch.cuda.is_available():
            raise ValueError("bench kernels needs an NVIDIA GPU, got none; scripts/bench_cpu.py times the CPU kernels")
        if out is not None:
            check_file("--out", out, example="kernels.json")
        report = run_sections(
            shapes=tuple(SHAPES) if shapes is None else shapes.split(","),
            blocks=[int(block) for block in blocks.split(",")],
            densities=[float(density) for density in densities.split(",")],
            backends=None if backends is None else backends.split(","),
            sections=sections.split(","),
            remainders=remainders.split(","),  # type: ignore[arg-type]
            rounds=rounds,
            save=lambda report: None if out is None else write_report(report, out),
        )
    print_table(report, Console(width=None if sys.stdout.isatty() else 120))
    raise typer.Exit(1 if report["failed"] else 0)
