"""The command line: parses and calls. Heavy imports wait until a command needs them."""

from dit_sparse.cli import bench, calibrate, estimate, generate, listings
from dit_sparse.cli.app import app, main

__all__ = ["app", "main"]

# The method's own parameters are options too.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(generate.generate)
for command in (
    calibrate.calibrate,
    calibrate.inspect,
    estimate.estimate,
    listings.methods,
    listings.presets,
    listings.neighborhood,
    listings.doctor,
):
    app.command()(command)
app.add_typer(bench.bench, name="bench")
