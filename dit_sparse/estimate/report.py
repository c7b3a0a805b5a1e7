"""An estimate for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dit_sparse.estimate.predict import Estimate

__all__ = ["print_estimate"]

_NAMES = {
    "attention": "attention",
    "planning": "planning",
    "linear": "linear layers",
    "passes": "norms, modulation and the like",
    "exchange": "exchange between devices",
}


def print_estimate(found: Estimate, console: Console) -> None:
    """Print time, memory and the bottleneck."""
    run = found.run
    mesh = "" if found.mesh.size == 1 else f" ({found.mesh})"
    density = f"at density {run.share:.3g} in sparse steps" if run.sparse_densities else "without a sparse step"
    console.print(
        f"{run.tokens:,} tokens, {run.steps} steps, {run.schedule.method.name} {density}, {found.mesh.size} x "
        f"{run.machine.costs}{mesh}",
        highlight=False,
    )
    console.print(
        f"[bold]denoising {_seconds(found.seconds)}[/bold], dense {_seconds(found.dense)}: "
        f"{found.dense / found.seconds:.2f}x; a prediction, not a measurement",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("part", "seconds", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, seconds in found.parts.items():
        mark = "  <- bottleneck" if part == found.bottleneck else ""
        table.add_row(_NAMES[part], f"{seconds:.1f}", f"{seconds / found.seconds:.0%}{mark}")
    console.print(table)
    kinds = (f"{count} {kind} of {each:.2f} s" for kind, (count, each) in found.steps.items() if count)
    console.print(f"steps: {', '.join(kinds)}", highlight=False)
    if found.mesh.size > 1:
        console.print(f"with every exchange hidden: {_seconds(found.hidden)}", highlight=False)
    if run.sparse_densities and not found.sparse_pays:
        console.print("sparse attention would not be faster than dense here", style="yellow")
    needs = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in found.memory.items() if size)
    total, have = sum(found.memory.values()) / 2**30, run.machine.memory / 2**30
    console.print(f"memory a device: {total:.1f} of {have:.0f} GiB ({needs})", highlight=False)
    if not found.fits:
        console.print("does not fit; --offload model keeps text encoders and VAE off the device", style="yellow")
    console.print(escape(f"from: {run.machine.source}; {run.machine.attention.source}"), style="dim", soft_wrap=True)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{int(value // 60)} min {value % 60:.0f} s"
