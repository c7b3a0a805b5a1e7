"""What people see of a comparison: a line a run, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dit_sparse.compare.cases import Case
from dit_sparse.compare.run import Listener
from dit_sparse.compare.summary import summarize, summary_table
from dit_sparse.generate.request import Clip

__all__ = ["ConsoleListener", "print_summary"]


class ConsoleListener(Listener):
    """Shows a comparison on `console`; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._total = self._done = 0

    def __enter__(self) -> ConsoleListener:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def started(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        if done:
            self._say(f"{done} of {total} already done")

    def rendering(self, what: str) -> None:
        self._status.update(what.replace("[", "\\["))

    def finished(self, clip: Clip, line: Mapping[str, Any]) -> None:
        self._done += 1
        psnr = "same" if line["psnr"] is None else f"{line['psnr']:.2f} dB"
        figures = "" if line["kind"] == "dense" else f", {line['speedup']:.2f}x, {psnr}"
        self._say(f"{self._done} of {self._total}: {line['label']}, {_place(clip)}: {line['seconds']:.2f} s{figures}")

    def failed(self, clip: Clip, case: Case, error: Exception) -> None:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._say(f"failed: {case.label}, {_place(clip)}: {text}", style="red")

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _place(clip: Clip) -> str:
    return f"prompt {clip.index}, seed {clip.seed}"


def print_summary(record: Mapping[str, Any], drawn: Sequence[Path], console: Console) -> None:
    """Print the table of `record` as `read_record` gives it, what failed, and which pictures were drawn."""
    name, definition = next(iter(record["conventions"].items()))
    settings, where = record["settings"], record["environment"]
    size = f"{settings['frames']} frames of {settings['height']}x{settings['width']}, {settings['steps']} steps"
    about = f"{settings['model']}, {size}, {settings['dtype']}, {where['device']}"
    console.print(about, markup=False, highlight=False, soft_wrap=True)
    console.print(summary_table(summarize(record["runs"])))
    text = f"medians over prompts and seeds; {name}: {definition}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    sessions = {run["session"] for run in record["runs"]}
    if len(sessions) > 1:
        text = f"made in {len(sessions)} sessions: a speed-up may compare seconds of two of them"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for failure in record["failed"]:
        text = f"failed: {failure['label']}: {failure['prompt']!r}: {failure['error']}"
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    for path in drawn:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
