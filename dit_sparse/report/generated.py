"""The report of a folder of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_sparse.generate.manifest import MANIFEST, Manifest
from dit_sparse.report.content import Fact, Group, Report, Run, Table
from dit_sparse.report.read import inside, median, number, require, require_config, require_kinds
from dit_sparse.report.reproduce import generate_command

__all__ = ["describe", "load_generated"]

Line = dict[str, Any]

_SAME = ("prompt", "seed", "model", "height", "width", "frames", "steps", "guidance", "negative_prompt", "dtype")
"""What videos that stand side by side share."""

_KEYS = (
    *(*_SAME, "method", "config", "device", "fps", "format", "versions"),
    *("seconds", "attention_density", "calls", "dense_calls"),
)
_COMPARED_KEYS = ("dense_seconds", "psnr", "ssim", "identical", "convention")

_KINDS = {
    **dict.fromkeys(("prompt", "model", "negative_prompt", "dtype", "method", "device", "format"), "a text"),
    **dict.fromkeys(("seed", "height", "width", "frames", "steps", "guidance", "fps"), "a number"),
    **dict.fromkeys(("seconds", "calls", "attention_density", "attention_seconds", "plan_seconds"), "a number"),
    **dict.fromkeys(("dense_seconds", "speedup", "psnr", "ssim"), "a number"),
    **dict.fromkeys(("config", "dense_calls", "versions"), "an object"),
}


def load_generated(folder: Path) -> Report:
    """The videos of a folder of `generate`, grouped by prompt, seed and size.

    Raises:
        ValueError: a line that is none of this version's, or no finished video.
        OSError: the manifest cannot be read.
    """
    lines, notes = _finished(folder)
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in _SAME), []).append(line)
    compared = [line for line in lines if line.get("speedup") is not None]
    return Report(
        kind="generate",
        source=folder.resolve().name,
        headline=[
            ("videos", str(len(lines))),
            ("speed-up", number(median(line["speedup"] for line in compared), ".2f", "x")),
            ("attention density", number(median(line["attention_density"] for line in lines), ".3f")),
            ("PSNR", _psnr(compared)),
            ("SSIM", number(median(line["ssim"] for line in compared), ".4f")),
        ],
        facts=_facts(lines[-1]),
        groups=[_group(folder, own, notes) for own in groups.values()],
        tables=[_table(lines)],
        commands=[_command(line) for line in lines],
        notes=notes,
    )


def describe(config: dict[str, Any]) -> str:
    """A method and its density in a few characters."""
    density = config.get("density")
    return config["method"] if density is None else f"{config['method']} {density:g}"


def _finished(folder: Path) -> tuple[list[Line], list[str]]:
    lines, notes = [], []
    for number_, line in enumerate(Manifest(folder).lines, 1):
        _check(line, f"{folder / MANIFEST}, video {number_},")
        if inside(folder, line["file"]).exists():
            lines.append(line)
        else:
            notes.append(f"{line['file']} is in the manifest and not in the folder: not finished, or removed since")
    if not lines:
        raise ValueError(f"{folder} has no finished video; " + (notes[0] if notes else f"its {MANIFEST} is empty"))
    return lines, notes


def _check(line: Line, what: str) -> None:
    require(line, _KEYS, what)
    require_kinds(line, _KINDS, what)
    require_config(line["config"], what)
    require_kinds(line["dense_calls"], dict.fromkeys(line["dense_calls"], "a number"), what)
    if "speedup" in line:
        require(line, _COMPARED_KEYS, what)


def _group(folder: Path, lines: Sequence[Line], notes: list[str]) -> Group:
    first = lines[0]
    facts = [
        ("seed", str(first["seed"])),
        ("size", f"{first['width']}x{first['height']}, {first['frames']} frames"),
        ("steps", str(first["steps"])),
    ]
    runs = [_run(folder, line, label, notes) for line, label in zip(lines, _labels(lines), strict=True)]
    compared = next((line for line in lines if "dense_seconds" in line), None)
    if compared is not None:
        runs.insert(0, _dense_run(folder, compared, notes))
    return Group(first["prompt"], facts, runs)


def _labels(lines: Sequence[Line]) -> list[str]:
    """Method and density of each, and a number where those of several are the same."""
    plain = [describe(line["config"]) for line in lines]
    return [
        label if plain.count(label) == 1 else f"{label} ({plain[: place + 1].count(label)})"
        for place, label in enumerate(plain)
    ]


def _run(folder: Path, line: Line, label: str, notes: list[str]) -> Run:
    trace = None
    if "trace" in line:
        trace = inside(folder, line["trace"])
        if not trace.exists():
            notes.append(f"{line['trace']} is missing: no maps and no timeline of {line['file']}")
            trace = None
    facts = [("seconds", number(line["seconds"], ".1f")), *_figures(line)]
    return Run(label, folder / line["file"], line["fps"], trace, facts, _command(line))


def _figures(line: Line) -> list[Fact]:
    figures = [("attention density", number(line["attention_density"], ".3f"))]
    if "speedup" in line:
        figures += [
            ("speed-up", number(line["speedup"], ".2f", "x")),
            ("PSNR", _psnr([line])),
            ("SSIM", number(line["ssim"], ".4f")),
        ]
    return figures


def _dense_run(folder: Path, line: Line, notes: list[str]) -> Run:
    file = None
    if "dense_file" not in line:
        notes.append(f"{line['file']} was compared before dense videos were kept: --overwrite makes both again")
    elif not (file := inside(folder, line["dense_file"])).exists():
        notes.append(f"{line['dense_file']} is missing: no dense video beside {line['file']}")
        file = None
    return Run("dense", file, line["fps"], None, [("seconds", number(line["dense_seconds"], ".1f"))])


def _facts(line: Line) -> list[Fact]:
    return [
        ("model", line["model"]),
        ("device", line["device"]),
        ("precision", line["dtype"]),
        *line["versions"].items(),
    ]


def _table(lines: Sequence[Line]) -> Table:
    compared = [line for line in lines if "speedup" in line]
    columns = {"seconds": "seconds", "attention_density": "attention density"}
    note = "Attention density: query-key pairs computed over all pairs, in the whole run; a dense call counts 1."
    if compared:
        columns |= {"dense_seconds": "dense seconds", "speedup": "speed-up", "psnr": "PSNR dB", "ssim": "SSIM"}
        note += f" PSNR and SSIM: of the frames before compression; {compared[0]['convention']}."
    columns |= {"attention_seconds": "attention s", "plan_seconds": "planning s"}
    return Table(
        "Videos",
        ["video", "method", *columns.values(), "dense calls"],
        [[line["file"], describe(line["config"]), *map(line.get, columns), _dense_calls(line)] for line in lines],
        ["speed-up", "attention density"],
        note,
    )


def _dense_calls(line: Line) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in line["dense_calls"].items())
    return f"{sum(line['dense_calls'].values())} of {line['calls']}" + (f" ({reasons})" if reasons else "")


def _psnr(lines: Sequence[Line]) -> str:
    if lines and all(line["identical"] for line in lines):
        return "identical"
    return number(median(line["psnr"] for line in lines), ".2f", " dB")


def _command(line: Line) -> str:
    return generate_command(line, compare_dense="dense_seconds" in line)
