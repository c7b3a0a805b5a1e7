"""What people see of a run: progress bars, one line a video, and a table at the end."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from dit_sparse.demo import unknown_words
from dit_sparse.generate.listener import Listener
from dit_sparse.generate.models import DEMO, model_name
from dit_sparse.generate.request import Clip
from dit_sparse.generate.run import Job, Outcome

if TYPE_CHECKING:
    from dit_sparse.presets import Preset

__all__ = [
    "ConsoleListener",
    "closing_line",
    "loading",
    "output_console",
    "preset_line",
    "result_table",
    "warn_of_unknown_words",
    "warnings_as_lines",
]

_FILE_WIDTH = 160


class ConsoleListener(Listener):
    """Shows a run on `console`: bars where it is a terminal, else a line a video.

    Use it as a context manager, so that the bars are closed whatever happens.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._videos: TaskID | None = None
        self._steps = self._progress.add_task("steps", total=None, visible=False)
        self.made = 0

    def __enter__(self) -> ConsoleListener:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, job: Job) -> None:
        total = len(job.todo) + len(job.done)
        if job.done and job.todo:
            self._console.print(f"{len(job.done)} of {total} already done")
        if job.todo:
            self._videos = self._progress.add_task("videos", total=total, completed=len(job.done))

    def rendering(self, clip: Clip, what: str, steps: int) -> None:
        self._progress.reset(self._steps, total=steps, visible=True, description=f"{clip.stem[:40]}, {what}")

    def stepped(self) -> None:
        self._progress.advance(self._steps)

    def finished(self, clip: Clip, line: dict[str, Any]) -> None:
        self.made += 1
        self._advance()
        self._console.print(f"{escape(line['file'])}: {line['seconds']:.1f} s", highlight=False, soft_wrap=True)

    def failed(self, clip: Clip, error: Exception) -> None:
        self._advance()
        text = escape(f"{type(error).__name__}: {_one_line(error)}")
        self._console.print(f"failed: {escape(clip.stem)}: {text}", style="red", highlight=False, soft_wrap=True)

    def _advance(self) -> None:
        if self._videos is not None:
            self._progress.advance(self._videos)


def result_table(lines: Sequence[dict[str, Any]]) -> Table:
    """The table of the videos in the manifest lines `lines`."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    compared = any("speedup" in line for line in lines)
    # A file name has no spaces, so it is cut rather than wrapped, and before the figures are.
    table.add_column("video", overflow="ellipsis", min_width=8)
    for heading in ("seconds", "attn.\ndensity", "attn.\ntime"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("dense calls", overflow="fold", min_width=8)
    for heading in ("dense\nseconds", "speed-\nup", "PSNR\ndB", "SSIM") if compared else ():
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*_cells(line), *(_comparison_cells(line) if compared else ()))
    if compared and len(lines) > 1:
        table.add_row(*_median_cells(lines), style="bold")
    return table


def closing_line(job: Job, outcome: Outcome) -> str:
    """One sentence on what was made, what was there and what failed."""
    total = len(job.todo) + len(job.done)
    if not job.todo:
        return f"{total} of {total} already done in {job.request.out} (--overwrite makes them again)"
    parts = [f"{len(outcome.lines)} made"]
    if job.done:
        parts.append(f"{len(job.done)} already done")
    if outcome.failures:
        parts.append(f"{len(outcome.failures)} failed")
    return f"{', '.join(parts)}, of {total}, in {job.request.out}"


def preset_line(preset: Preset, takes_method: bool) -> str:
    """One line on the preset that a run uses, with its method or for the sizes alone."""
    row = preset.row()
    schedule = ", ".join(f"{name} {row[name]}" for name in ("density", "warm-up", "dense layers"))
    what = f"{row['method']}, {schedule}; its size, steps and guidance" if takes_method else "size, steps and guidance"
    return f"preset {preset.name}: {what} where no option says otherwise (`dit-sparse presets`)"


def output_console() -> Console:
    """A console on standard output, with room for whole lines where that is a file or a pipe."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_FILE_WIDTH)


@contextmanager
def loading(console: Console, model: str | None) -> Iterator[None]:
    """Say that the model is being loaded; a download shows bars of its own, which a spinner would break."""
    from dit_sparse.pipelines.quiet import quiet_libraries

    if model is None or model == DEMO or Path(model).exists():
        with console.status("loading the model"):
            quiet_libraries()
            yield
    else:
        quiet_libraries()
        yield


@contextmanager
def warnings_as_lines(console: Console) -> Iterator[None]:
    """Print each warning for users as one line on `console`; those for developers are dropped."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if issubclass(category, UserWarning) and text not in seen:
            seen.add(text)
            console.print(f"warning: {escape(text)}", style="yellow", highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def warn_of_unknown_words(console: Console, model: str | None, prompts: Iterable[str]) -> None:
    """Name on `console` the words of `prompts` that the demo model does not know, where `model` means that."""
    if model_name(model) != DEMO:
        return
    unknown = dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt))
    if unknown:
        text = f"warning: the demo model ignores words that it does not know: {', '.join(unknown)}"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _cells(line: dict[str, Any]) -> list[str]:
    dense = ", ".join(f"{count} {reason}" for reason, count in line["dense_calls"].items())
    return [
        escape(line["file"]),
        f"{line['seconds']:.2f}",
        _number(line["attention_density"], ".3f"),
        f"{line['attention_seconds'] / line['seconds']:.0%}",
        escape(f"{sum(line['dense_calls'].values())} of {line['calls']}" + (f" ({dense})" if dense else "")),
    ]


def _comparison_cells(line: dict[str, Any]) -> list[str]:
    if "speedup" not in line:
        return [""] * 4
    psnr = "same" if line["identical"] else _number(line["psnr"], ".2f")
    return [f"{line['dense_seconds']:.2f}", f"{line['speedup']:.2f}x", psnr, _number(line["ssim"], ".4f")]


def _median_cells(lines: Sequence[dict[str, Any]]) -> list[str]:
    def median(name: str, format: str) -> str:
        values = [line[name] for line in lines if line.get(name) is not None]
        return f"{statistics.median(values):{format}}" if values else "-"

    return [
        "median",
        median("seconds", ".2f"),
        median("attention_density", ".3f"),
        "",
        "",
        median("dense_seconds", ".2f"),
        f"{median('speedup', '.2f')}x",
        median("psnr", ".2f"),
        median("ssim", ".4f"),
    ]


def _number(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
