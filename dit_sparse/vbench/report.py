"""What people see of scoring: a bar, a line for what fails, and the table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dit_sparse.vbench.dimensions import DIMENSIONS
from dit_sparse.vbench.scoring import Listener
from dit_sparse.vbench.table import Scores

__all__ = ["ConsoleListener", "score_table"]


class ConsoleListener(Listener):
    """Shows a bar on `console` where that is a terminal; what fails is told by the caller.

    Use it as a context manager, so that the bar is closed whatever happens.
    """

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("scoring", total=None)

    def __enter__(self) -> ConsoleListener:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, todo: int, done: int) -> None:
        self._progress.reset(self._task, total=todo + done, completed=done)

    def scored(self, dimension: str, name: str) -> None:
        self._progress.update(self._task, advance=1, description=dimension)

    def failed(self, dimension: str, name: str, error: str) -> None:
        self._progress.update(self._task, advance=1 if name else 0, description=dimension)


def score_table(scores: Mapping[str, Scores]) -> Table:
    """A row a dimension and total; for each folder VBench's own score, and the leaderboard's in percent."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("dimension", no_wrap=True)
    for name in scores:
        for heading in (f"{escape(name)}\nscore", "\n%", "\nvideos"):
            table.add_column(heading, justify="right")
    by_name = [{row.dimension: row for row in entry.dimensions} for entry in scores.values()]
    for dimension in DIMENSIONS:
        if any(dimension in rows for rows in by_name):
            cells: list[str] = []
            for rows in by_name:
                row = rows.get(dimension)
                found = () if row is None else (f"{row.score:.4f}", f"{100 * row.normalised:.2f}", str(row.videos))
                cells += found or ("", "", "")
            table.add_row(dimension, *cells)
    for total in ("quality", "semantic", "total"):
        values = [getattr(entry, total) for entry in scores.values()]
        if any(value is not None for value in values):
            cells = [cell for v in values for cell in ("", "" if v is None else f"{100 * v:.2f}", "")]
            table.add_row(total.capitalize(), *cells, style="bold")
    return table
