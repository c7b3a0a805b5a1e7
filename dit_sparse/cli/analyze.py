"""`dit-sparse analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dit_sparse.cli import options as opt
from dit_sparse.cli.app import print_json, user_errors

_SAMPLE = "What is sampled"


def analyze(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS", help="Text file, UTF-8, one prompt a line; one or two are enough."),
    ] = None,
    prompt: opt.Prompt = None,
    model: opt.Model = None,
    methods: Annotated[
        str | None,
        opt.option(
            "Methods with commas between, or name:parameter=value+other=value.",
            default="all that need no file, but paro",
        ),
    ] = None,
    densities: Annotated[str, opt.option("Densities of methods that take one.")] = "0.5,0.25,0.125",
    target: Annotated[float, opt.option("Share of the attention mass to keep, a mean over heads.")] = 0.9,
    at: Annotated[str, opt.option("Shares of the run at which a step is looked at.", _SAMPLE)] = "0.2,0.5,0.8",
    layers: Annotated[int, opt.option("Transformer blocks looked at, evenly spread.", _SAMPLE)] = 4,
    heads: Annotated[int, opt.option("Heads a layer.", _SAMPLE)] = 8,
    rows: Annotated[int, opt.option("Query rows a head.", _SAMPLE)] = 64,
    out: Annotated[Path | None, opt.option("Write the recommended config here.", opt.OUTPUT)] = None,
    report: Annotated[Path | None, opt.option("Write everything that was measured here, as JSON.", opt.OUTPUT)] = None,
    height: opt.Height = None,
    width: opt.Width = None,
    frames: opt.Frames = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    seed: Annotated[int, opt.option("Seed of each prompt's noise.", opt.SAMPLING)] = 0,
    negative_prompt: opt.NegativePrompt = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    offload: opt.Offload = "none",
    as_json: opt.Json = False,
) -> None:
    """Say which method and density suit a model, and write a config for `generate --config`.

    The model runs dense up to the last step that is looked at. There every method plans, and what its plan keeps of the
    attention is measured on a few query rows; its time is predicted by the cost model.
    """
    console = Console(stderr=True)
    with user_errors():
        from dit_sparse.analyze import Analysis, candidates
        from dit_sparse.analyze.command import check_files, print_report, run, write_config
        from dit_sparse.generate import Request
        from dit_sparse.generate import report as reporting

        names = None if methods is None else methods.split(",")
        compared = candidates(names, opt.numbers("--densities", densities))
        analysis = Analysis(compared, opt.numbers("--at", at), layers=layers, heads=heads, rows=rows)
        check_files(target, opt.prompt_file(arguments), out, report)
        request = Request(
            prompts=tuple(opt.collect_prompts(list(arguments or ()), prompt)),
            config={},
            out=Path(),
            model=model,
            height=height,
            width=width,
            frames=frames,
            steps=steps,
            guidance=guidance,
            seed=seed,
            negative_prompt=negative_prompt,
            dtype=dtype,
            device=device,
            offload=offload,
        )
        reporting.warn_of_unknown_words(console, model, request.prompts)
        with reporting.warnings_as_lines(console):
            found = run(request, analysis, target, report, console)
        if out is not None:
            write_config(found, out)
    if as_json:
        print_json(found)
    else:
        print_report(found, reporting.output_console())
        if out is not None:
            console.print(f"the config is in {out}", markup=False, highlight=False, soft_wrap=True)
