"""`dit-sparse calibrate` and `inspect`: plan files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dit_sparse.cli import options as opt
from dit_sparse.cli.app import print_json, user_errors
from dit_sparse.output_file import check_file


def calibrate(
    context: typer.Context,
    prompts: Annotated[Path | None, opt.option("Text file, UTF-8, one prompt a line; one or two are enough.")] = None,
    prompt: opt.Prompt = None,
    model: opt.Model = None,
    method: Annotated[
        str | None,
        opt.option("paro, or where a config is written any that takes a density or an error.", default="paro"),
    ] = None,
    error: Annotated[
        float | None, opt.option("Relative error of a layer's attention; each gets the threshold or density it needs.")
    ] = None,
    psnr: Annotated[float | None, opt.option("Least PSNR in dB of every prompt's video against dense.")] = None,
    velocity_ramp: Annotated[
        bool,
        opt.option("A density for each step, by how much the predicted velocity changes.", flag="--velocity-ramp"),
    ] = False,
    warmup: Annotated[
        float | None,
        opt.option("For a config: share of the steps that run dense.", default="0; with --velocity-ramp 0.2"),
    ] = None,
    density: Annotated[
        float | None,
        opt.option("Share of query-key pairs computed.", default="0.3; with --velocity-ramp the method's"),
    ] = None,
    threshold: Annotated[
        str | None, opt.option("head: each head gets the density; global: one threshold for all heads.", default="head")
    ] = None,
    shared_from: Annotated[
        float | None, opt.option("Share of the run from which one mask serves all steps.", default="0.5")
    ] = None,
    out: Annotated[
        Path | None,
        opt.option("The plan file, or the config.", opt.OUTPUT, default="plan.safetensors, or METHOD.json"),
    ] = None,
    scratch: Annotated[Path | None, opt.option("Folder for large files meanwhile.", opt.OUTPUT)] = None,
    height: opt.Height = None,
    width: opt.Width = None,
    frames: opt.Frames = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    seed: Annotated[int, opt.option("Seed of each prompt's noise.", opt.SAMPLING)] = 0,
    negative_prompt: opt.NegativePrompt = None,
    block: Annotated[
        int | None, opt.option("Tokens a block, where no tile is given.", opt.METRICS, default="64")
    ] = None,
    tile: Annotated[
        str | None, opt.option("Blocks are tiles, such as 4x4x4: sides along a head's axes.", opt.METRICS)
    ] = None,
    sigma: Annotated[
        float | None, opt.option("A block is sparse when this share of it is small.", opt.METRICS, default="0.99")
    ] = None,
    epsilon: Annotated[
        float | None, opt.option("A weight below this is small.", opt.METRICS, default="the mean weight")
    ] = None,
    alpha: Annotated[
        float | None, opt.option("Sparsity against quantisation incoherence.", opt.METRICS, default="1")
    ] = None,
    sample_blocks: Annotated[int | None, opt.option("Query blocks compared a head.", opt.METRICS, default="16")] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    offload: opt.Offload = "none",
) -> None:
    """Choose token orders and masks once, for `generate --method paro --plan-file`, or densities for a config.

    The model runs dense over the prompts twice. The plan serves this model and size, and any prompt and steps.

    With --error or --psnr it writes a config for `generate --config` instead: with lea a threshold for each layer, with
    other methods the least densities, with which the error is small enough or the video near enough to the dense one.
    With --velocity-ramp the config has a density for each step, whose mean is --density: the model runs dense over the
    prompts once, and steps at which its predicted velocity changes more get more.
    Parameters of the method and the schedule are options then, as for `generate`: `--tile 4x4x4`, `--remainder mean`.
    """
    console = Console(stderr=True)
    with user_errors():
        from dit_sparse.calibrate import command, summary
        from dit_sparse.calibrate.describe import describe
        from dit_sparse.generate import Request, report
        from dit_sparse.generate.config import split_arguments

        own = [parameter.name or "" for parameter in context.command.params]
        positional, others = split_arguments(context.args)
        if positional:
            raise ValueError(f"calibrate takes options alone, got {positional[0]!r}: give a file by --prompts")
        wanted = command.what_is_wanted(method, error, psnr, velocity_ramp)
        method = "paro" if method is None else method
        if out is None:
            out = Path("plan.safetensors" if wanted == "plan file" else f"{method}.json")
        check_file("--out", out, example="plan.safetensors", kept={"the prompt file": prompts})
        options: dict[str, Any] = {"density": density, "threshold": threshold, "shared_from": shared_from}
        options |= {"warmup": warmup, "scratch": scratch, "block": block, "tile": tile, "sigma": sigma}
        options |= {"epsilon": epsilon, "alpha": alpha, "sample_blocks": sample_blocks, **others}
        given = {name: str(value) for name, value in options.items() if value is not None}
        if wanted == "plan file":
            calibration = command.plan_calibration(given, seed, own)
        elif wanted == "quality":
            schedule = command.quality_schedule(method, given, own)
        else:
            schedule = command.ramp_schedule(method, given, own)
        request = Request(
            prompts=tuple(opt.collect_prompts([] if prompts is None else [str(prompts)], prompt)),
            config={},
            out=out.absolute().parent,
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
        report.warn_of_unknown_words(console, model, request.prompts)
        with report.warnings_as_lines(console):
            if wanted != "plan file":
                if wanted == "quality":
                    table = command.calibrate_quality(request, out, schedule, error, psnr, console)
                else:
                    table = command.calibrate_ramp(request, out, schedule, console)
                report.output_console().print(table)
                report.output_console().print(f"config: {out}", markup=False, highlight=False, soft_wrap=True)
                return
            with report.loading(console, model):
                pipe, arguments = command.prepare(request, calibration.method)
            file = command.calibrate_with_progress(pipe, request, out, calibration, arguments, scratch, console)
    report.output_console().print(summary(describe(file)))


def inspect(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    out: Annotated[Path | None, typer.Option(help="File to draw orders and masks to, which ends in .png.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Show what is in a plan file: orders, densities and masks of every layer and head."""
    with user_errors():
        from dit_sparse.calibrate import describe, draw, layer_table, slot_table, summary
        from dit_sparse.generate.report import output_console
        from dit_sparse.methods.plan_file import PlanFile

        if out is not None:
            check_file("--out", out, example="plan.png", ending=".png", kept={"the plan file": plan})
        file = PlanFile.open(plan)
        description = describe(file)
        if out is not None:
            draw(file, out)
    if as_json:
        print_json(description)
        return
    console = output_console()
    console.print(summary(description))
    for name, plans in description["models"].items():
        console.print(slot_table(name, plans), layer_table(name, plans))
