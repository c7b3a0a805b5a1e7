"""The command line: parses and calls. Heavy imports wait until a command needs them."""

from dit_sparse.cli import analyze, bench, calibrate, compare, estimate, generate, listings, report, vbench
from dit_sparse.cli.app import app, main

__all__ = ["app", "main"]

# The method's own parameters are options too.
_WITH_OTHERS = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_WITH_OTHERS)(generate.generate)
app.command(context_settings=_WITH_OTHERS)(calibrate.calibrate)
for command in (
    analyze.analyze,
    calibrate.inspect,
    compare.compare,
    compare.fidelity,
    estimate.estimate,
    listings.methods,
    listings.presets,
    listings.neighborhood,
    listings.doctor,
    report.report,
):
    app.command()(command)
app.add_typer(bench.bench, name="bench")
app.add_typer(vbench.vbench, name="vbench", no_args_is_help=True)
