"""`dit-sparse report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.cli import options as opt
from dit_sparse.cli.app import user_errors


def report(
    run: Annotated[Path, typer.Argument(help="The --out folder of generate or compare, or a JSON file of bench.")],
    out: Annotated[Path | None, opt.option("The page, an .html file.", default="report.html in the folder")] = None,
    link: Annotated[
        bool, opt.option("Refer to the videos where they lie instead of embedding them.", flag="--link")
    ] = False,
    max_size: Annotated[float, typer.Option(min=0, help="Megabytes of videos that may be embedded.")] = 256,
) -> None:
    """Write one HTML file that shows a run: videos in step, their difference, densities, masks, times, tables."""
    with user_errors():
        from dit_sparse.report import load, write_page

        page = out or (run if run.is_dir() else run.parent) / "report.html"
        found = load(run)
        size = write_page(found, page, link=link, max_size=max_size)
    for note in found.notes:
        sys.stderr.write(f"note: {note}\n")
    sys.stdout.write(f"{page}: {size / 1e6:.1f} MB\n")
