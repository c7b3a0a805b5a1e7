"""What a page shows, whatever kind of run it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Group", "Report", "Run", "Table"]

Fact = tuple[str, str]
"""A name and a value, as they are shown."""


@dataclass(frozen=True)
class Run:
    """One video, and how it was made.

    Args:
        label: what tells it from the others of its group, such as "adaspa 0.25".
        file: the video, image or folder of frames; `None` where it is missing.
        fps: frames a second, where `file` is no video that says so itself.
        trace: the file that `generate --trace` wrote; `None` without one.
        facts: figures to show under the video.
        command: the command that makes it again; empty where there is none.
    """

    label: str
    file: Path | None
    fps: int
    trace: Path | None = None
    facts: Sequence[Fact] = ()
    command: str = ""


@dataclass(frozen=True)
class Group:
    """Videos that belong side by side: of one prompt, seed and size, the dense one first."""

    title: str
    facts: Sequence[Fact]
    runs: Sequence[Run]


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        columns: their headings.
        rows: a text, a number or `None` for each column.
        bars: headings of the columns whose numbers get a bar.
        note: what the figures mean.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    bars: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything on a page.

    Args:
        kind: "generate", "compare" or "bench".
        source: name of the folder or file that it was made from.
        headline: the few figures that matter most.
        facts: device, versions, sizes.
        points: of the chart of speed against fidelity: `label`, `group`, `x`, `y`.
        commands: how to make the whole run again.
        notes: what is missing, a line each.
    """

    kind: str
    source: str
    headline: Sequence[Fact] = ()
    facts: Sequence[Fact] = ()
    groups: Sequence[Group] = ()
    tables: Sequence[Table] = ()
    points: Sequence[dict[str, Any]] = ()
    commands: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)
