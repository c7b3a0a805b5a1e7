"""What a neighborhood costs on a grid, by counting tiles: the analytical simulator of arXiv 2504.16922, section 3.

`parse_setting` reads a setting as people write it, `simulate` counts, `print_report` shows what was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_sparse.masks import TileCounts, best_tile, count_tiles, suggest_settings
from dit_sparse.methods import Neighborhood, parse_parameter
from dit_sparse.types import TokenGrid

__all__ = ["parse_setting", "print_report", "simulate"]

_AXES = ("frames", "height", "width")
_LONGEST, _MOST = 1024, 1 << 24
"""Tokens along an axis and in all: what counting settings takes grows with the square of the one and with the other."""


def parse_setting(
    grid: str, options: Mapping[str, str | None], *, exact: bool, text: int, density: float | None
) -> tuple[Neighborhood, TokenGrid]:
    """The method and the grid that texts such as "30x48x80" mean; two sizes stand for a grid of one frame.

    Args:
        grid: tokens along frames, height and width.
        options: texts of the parameters of `Neighborhood`, `None` for its default.
        exact, density: of `Neighborhood`, `None` for its default density.
        text: text tokens in the sequence.

    Raises:
        ValueError: a text that cannot be read, or a value that is not allowed.
    """
    values: dict[str, Any] = {
        name: parse_parameter(Neighborhood, name, _three_axes(value)) for name, value in options.items() if value
    }
    if density is not None:
        values["density"] = density
    sizes = parse_parameter(Neighborhood, "window", _three_axes(grid))
    if not isinstance(sizes, tuple):
        raise ValueError(f"--grid must be two or three sizes such as 30x48x80, got {grid!r}")
    if max(sizes) > _LONGEST or prod(sizes) > _MOST:
        raise ValueError(
            f"--grid must have at most {_LONGEST} tokens along an axis and {_MOST:,} in all, got {grid!r}: "
            "720p video has 45x80 tokens a frame"
        )
    return Neighborhood(exact=exact, **values), TokenGrid(sizes[0], sizes[1], sizes[2], text_len=text)


def _three_axes(sizes: str) -> str:
    """`sizes` such as 24x24 with one frame put before them."""
    return f"1x{sizes}" if sizes.count("x") == 1 else sizes


def simulate(method: Neighborhood, grid: TokenGrid, density: float | None = None) -> dict[str, Any]:
    """Tiles, densities and speed-ups of `method` on `grid`, ready for JSON; needs no GPU and makes no mask.

    Args:
        method: its tile is reported beside the best one.
        grid: the layout of the sequence.
        density: also list the best settings near this share of the query-key pairs.

    Returns:
        The setting; `density` and `ideal_speedup` of the mask; `tile` and `best_tile`, each with its counts,
        `tile_speedup` (if visited tiles took equal time) and `expected_speedup` (by the cost model, over the fastest
        dense attention, without the permutation); and `suggestions`, best first.

    Raises:
        ValueError: a setting that does not fit `grid`, or a density outside (0, 1].
    """
    mask = method.predicate(grid)
    counts = count_tiles(mask, method.tile_for(grid))
    best = count_tiles(mask, best_tile(mask, method.exact))
    suggestions = [] if density is None else suggest_settings(grid, density)
    return {
        "grid": list(grid.shape),
        "text": grid.text_len,
        "tokens": grid.num_tokens,
        "window": list(mask.window),
        "stride": list(mask.stride),
        "dilation": list(mask.dilation),
        "causal": list(mask.causal),
        "exact": method.exact,
        "density": counts.density,
        "ideal_speedup": counts.ideal_speedup,
        "tile": _of_tile(counts, method.exact),
        "best_tile": _of_tile(best, method.exact),
        "suggestions": [
            {"window": list(s.window), "stride": list(s.stride), "density": s.counts.density}
            | _of_tile(s.counts, exact=True)
            for s in suggestions
        ],
    }


def _of_tile(counts: TileCounts, exact: bool) -> dict[str, Any]:
    return {
        "tile": list(counts.tile),
        "tiles": counts.total,
        "visited": counts.visited,
        "partial": counts.cut,
        "computed_density": counts.computed_density,
        "tile_speedup": counts.tile_speedup,
        "expected_speedup": counts.expected_speedup(exact=exact),
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """Show what `simulate` found."""
    window, stride, dilation = ("x".join(map(str, report[name])) for name in ("window", "stride", "dilation"))
    parts = ["x".join(map(str, report["grid"])) + " tokens"]
    parts += [f"{report['text']} of text"] if report["text"] else []
    parts += [f"window {window}", f"stride {stride}", f"dilation {dilation}"]
    parts += [f"causal in {axis}" for axis, on in zip(_AXES, report["causal"], strict=True) if on]
    parts += [f"density {report['density']:.4f}", f"ideal speed-up {report['ideal_speedup']:.2f}x"]
    console.print(", ".join(parts), highlight=False, soft_wrap=True)
    _print_tiles([{"": "this tile"} | report["tile"], {"": "best tile"} | report["best_tile"]], console)
    if report["suggestions"]:
        console.print("\nbest settings near that density, exact to the token", highlight=False)
        of_setting = ("window", "stride", "density", "tile", "visited", "expected_speedup")
        _print_tiles([{name: row[name] for name in of_setting} for row in report["suggestions"]], console)


def _print_tiles(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(name.replace("_", " ").replace("speedup", "speed-up"), justify="right" if name else "left")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    console.print(table, highlight=False)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.2f}x" if "speedup" in name else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
