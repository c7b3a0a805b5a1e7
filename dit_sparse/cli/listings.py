"""Commands that only print: `dit-sparse methods`, `presets`, `neighborhood` and `doctor`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dit_sparse.cli.app import print_json, user_errors
from dit_sparse.cli.options import Json


def methods(as_json: Json = False) -> None:
    """List the methods, their parameters and papers."""
    from dit_sparse.methods import all_methods, parameters

    listing: list[dict[str, Any]] = [
        {"name": name, "paper": cls.paper, "parameters": [vars(p) for p in parameters(cls)]}
        for name, cls in all_methods().items()
    ]
    if as_json:
        print_json(listing)
        return
    console = Console()
    for entry in listing:
        console.print(f"[bold]{entry['name']}[/bold]  {escape(entry['paper'])}", highlight=False, soft_wrap=True)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for parameter in entry["parameters"]:
            flag = "--" + parameter["name"].replace("_", "-")
            table.add_row(flag, escape(str(parameter["default"])), escape(parameter["help"]))
        console.print(table)


def presets(as_json: Json = False) -> None:
    """List the presets: what `generate` starts from with a public checkpoint, and where it comes from."""
    from dit_sparse.generate.report import output_console
    from dit_sparse.presets import PRESETS

    listing = [preset.row() for preset in PRESETS.values()]
    if as_json:
        print_json(listing)
        return
    console = output_console()
    hidden = ("checkpoints", "from", "measured")
    table = Table(*(column for column in listing[0] if column not in hidden), box=None, pad_edge=False)
    for row in listing:
        table.add_row(*(value for column, value in row.items() if column not in hidden))
    console.print(table)
    for row in listing:
        console.print(f"[bold]{row['name']}[/bold]  {escape(row['checkpoints'])}", highlight=False, soft_wrap=True)
        console.print(f"  {escape(row['from'])}; measured here: {row['measured']}", highlight=False, soft_wrap=True)


def neighborhood(
    grid: Annotated[str, typer.Option(help="Tokens along frames, height, width: 30x48x80; 256x256 is one frame.")],
    window: Annotated[str | None, typer.Option(help="Keys a query sees.", show_default="from the density")] = None,
    stride: Annotated[
        str | None,
        typer.Option(help="Queries that share a window.", show_default="1; with a window from the density what suits"),
    ] = None,
    dilation: Annotated[str, typer.Option(help="Distance between the keys of a window.")] = "1",
    causal: Annotated[str, typer.Option(help="true, false, or one an axis: true,false,false.")] = "false",
    tile: Annotated[str | None, typer.Option(help="Tokens of a tile.", show_default="the best")] = None,
    exact: Annotated[bool, typer.Option(help="Compute tiles that a window cuts to the token, or whole.")] = True,
    text: Annotated[int, typer.Option(min=0, help="Text tokens in the sequence.")] = 0,
    density: Annotated[
        float | None, typer.Option(help="List the best settings near this share of the query-key pairs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a neighborhood would cost, and which settings suit a grid; counts tiles and needs no GPU."""
    with user_errors():
        from dit_sparse.simulator import parse_setting, print_report, simulate

        given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal, "tile": tile}
        report = simulate(*parse_setting(grid, given, exact=exact, text=text, density=density), density)
    if as_json:
        print_json(report)
    else:
        print_report(report, Console())


def doctor(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure what sparse attention costs here first, so that it is never slower."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what works on this machine, what is missing and how to get it."""
    from dit_sparse.doctor import diagnose

    if measure:
        with user_errors():
            _measure()
    report = diagnose()
    if as_json:
        print_json(report)
    else:
        _print_report(report, Console())
    raise typer.Exit(0 if report["ready"] else 1)


def _measure() -> None:
    import torch

    from dit_sparse.bench.costs import measure_for_user

    console = Console(stderr=True)
    with console.status("measuring what sparse attention costs here"):
        path = measure_for_user("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"measured costs are in {path}", markup=False, highlight=False, soft_wrap=True)


def _print_report(report: dict[str, Any], console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in report.items():
        if name in ("problems", "ready"):
            continue
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in entries:
            ready = "ready" if name == "backends" else "missing"
            table.add_row(f"{name} {key}".strip(), escape(ready if entry is None else str(entry)))
    console.print(table)
    for problem in report["problems"]:
        kind = "[red]missing[/red]" if problem["required"] else "[yellow]note[/yellow]"
        console.print(f"{kind}: {escape(problem['what'])}; {escape(problem['fix'])}", highlight=False, soft_wrap=True)
    console.print("generate can run" if report["ready"] else "generate cannot run", style="bold")
