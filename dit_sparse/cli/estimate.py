"""`dit-sparse estimate`."""

from __future__ import annotations

from typing import Annotated

import typer

from dit_sparse.cli import options as opt
from dit_sparse.cli.app import print_json, user_errors


def estimate(
    model: Annotated[str, typer.Option(help="Such as wan2.1-14b, or a checkpoint that has a preset.")],
    method: Annotated[str | None, typer.Option(help="Method.", show_default="the model's preset")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of query-key pairs computed.", show_default="the method's")
    ] = None,
    block: Annotated[int | None, typer.Option(help="Tokens a block.", show_default="the method's")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", show_default="the preset's")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels.", show_default="the preset's")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the preset's")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps that run dense.", show_default="the schedule's")
    ] = None,
    guided: Annotated[bool, typer.Option(help="Both guidance branches, where the model has two.")] = True,
    gpus: Annotated[int, typer.Option(help="How many devices share one video.")] = 1,
    device: Annotated[str, typer.Option(help="Such as h100 or h200.")] = "h100",
    as_json: opt.Json = False,
) -> None:
    """Predict time, memory and the bottleneck of a video on devices that are not here; needs no GPU."""
    with user_errors():
        from dit_sparse.estimate import estimate as predict
        from dit_sparse.estimate import print_estimate
        from dit_sparse.estimate.request import build_run

        run = build_run(
            model,
            method=method,
            density=density,
            block=block,
            frames=frames,
            size=size,
            steps=steps,
            warmup=warmup,
            guided=guided,
            device=device,
        )
        found = predict(run, gpus)
    if as_json:
        print_json({"model": model} | found.to_json())
        return
    from dit_sparse.generate.report import output_console

    print_estimate(found, output_console())
