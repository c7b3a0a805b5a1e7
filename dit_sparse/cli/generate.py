"""`dit-sparse generate`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dit_sparse.cli import options as opt
from dit_sparse.cli.app import INTERRUPTED, print_error, user_errors

if TYPE_CHECKING:
    from dit_sparse.generate import Request
    from dit_sparse.generate.render import Executor


def generate(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS", help="Text file, UTF-8, one prompt a line; - is standard input."),
    ] = None,
    prompt: opt.Prompt = None,
    model: opt.Model = None,
    method: Annotated[
        str | None, opt.option("Method: see `dit-sparse methods`.", default="the model's preset, or adaspa")
    ] = None,
    density: Annotated[str | None, opt.option("Share of query-key pairs computed.", default="the method's")] = None,
    config: Annotated[
        Path | None, opt.option("JSON file with the method and its parameters; options override it.")
    ] = None,
    no_strict: Annotated[
        bool,
        opt.option("Let a sparse layer run dense, where it has to, instead of failing.", flag="--no-strict"),
    ] = False,
    height: opt.Height = None,
    width: opt.Width = None,
    frames: opt.Frames = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    seed: Annotated[int, opt.option("Seed of a prompt's first video.", opt.SAMPLING)] = 0,
    num_samples: Annotated[int, opt.option("Videos a prompt, with the next seeds.", opt.SAMPLING)] = 1,
    negative_prompt: opt.NegativePrompt = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    offload: opt.Offload = "none",
    parallel: opt.Parallel = None,
    out: Annotated[Path, opt.option("Folder of the videos.", opt.OUTPUT)] = Path("videos"),
    format: Annotated[
        str | None, opt.option("mp4, gif, or png for frames.", opt.OUTPUT, default="mp4, png for an image")
    ] = None,
    fps: Annotated[
        int | None, opt.option("Frames a second of the file.", opt.OUTPUT, default="the preset's, or 16")
    ] = None,
    compare_dense: Annotated[
        bool, opt.option("Also render and write dense, and compare.", opt.OUTPUT, flag="--compare-dense")
    ] = False,
    trace: opt.Trace = True,
    overwrite: Annotated[bool, opt.option("Make finished videos again.", opt.OUTPUT, flag="--overwrite")] = False,
    ray: opt.Ray = None,
    ray_workers: opt.RayWorkers = None,
) -> None:
    """Make a video of every prompt, or an image with a model that makes images.

    The method's own parameters are options too, such as `--window 4x12x16`, and so are those of the schedule:
    `--warmup 0.2`, `--dense-layers 0,1`, `--refresh 0.5,0.75`, `--remainder mean`. The same command again goes on where
    it stopped.
    """
    own = [parameter.name or "" for parameter in context.command.params if parameter.name != "arguments"]
    console = Console(stderr=True)
    with interruptible(console, out):
        with user_errors():
            from dit_sparse.generate.config import build_schedule, split_arguments
            from dit_sparse.generate.models import DEMO
            from dit_sparse.generate.report import preset_line
            from dit_sparse.generate.request import Request
            from dit_sparse.presets import find_preset

            positional, options = split_arguments([*(arguments or ()), *context.args])
            if density is not None:
                options["density"] = density
            if no_strict:
                options["strict"] = "false"
            prompts = opt.collect_prompts(positional, prompt)
            preset = find_preset(DEMO if model is None else model)
            takes_method = method is None and config is None
            start = preset.schedule if preset is not None and takes_method else None
            schedule = build_schedule(method, config, options, own, start)
            request = Request(
                prompts=tuple(prompts),
                config=schedule.to_config(),
                out=out,
                model=model,
                height=height,
                width=width,
                frames=frames,
                steps=steps,
                guidance=guidance,
                seed=seed,
                num_samples=num_samples,
                negative_prompt=negative_prompt,
                dtype=dtype,
                device=device,
                offload=offload,
                format=format,
                fps=fps,
                compare_dense=compare_dense,
                overwrite=overwrite,
                parallel=parallel,
                trace=trace,
            )
        if preset is not None and os.environ.get("RANK", "0") == "0":
            console.print(preset_line(preset, takes_method), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(make_videos(request, console, ray, ray_workers))


def make_videos(request: Request, console: Console, ray: str | None, ray_workers: int | None) -> int:
    """Make the videos of `request` in this process, on ranks or on Ray's workers; returns the exit code."""
    from dit_sparse.generate import models
    from dit_sparse.generate.ranks import is_rank

    with user_errors():
        if ray is None and ray_workers is not None:
            raise ValueError("--ray-workers needs --ray auto, local or HOST:PORT")
        if ray is not None and is_rank():
            raise ValueError("--ray starts the ranks of its workers itself: give the command without torchrun")
        if request.parallel is not None:
            models.check_ranks(request)
    if request.parallel is not None and ray is None:
        return _on_ranks(request)
    return _generate(request, console, ray, ray_workers)


def _on_ranks(request: Request) -> int:
    """Start the ranks, or be one of those that torchrun has started."""
    from dit_sparse.generate import ranks
    from dit_sparse.lost_ranks import RankLostError

    with user_errors():
        try:
            return _rank(request) if ranks.is_rank() else ranks.launch(request, _rank)
        except RankLostError as error:
            print_error(str(error))
            return 1


def _rank(request: Request) -> int:
    """What one rank does: rank 0 generates, the others follow."""
    from dit_sparse.generate import ranks
    from dit_sparse.generate.render import LocalExecutor
    from dit_sparse.lost_ranks import RankLostError

    try:
        together = ranks.join(request)
        if together.rank > 0:
            ranks.follow(request, together)
            together.leave()
            return 0
        leader = ranks.Leader(request, together)
        try:
            code = _generate(request, Console(stderr=True), executor=LocalExecutor(request, leader))
        except typer.Exit as end:
            code = end.exit_code
        leader.stop()
        together.leave()
    except (ValueError, OSError, RankLostError) as error:
        print_error(f"rank {os.environ['RANK']}: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _generate(
    request: Request,
    console: Console,
    ray: str | None = None,
    ray_workers: int | None = None,
    executor: Executor | None = None,
) -> int:
    from dit_sparse.cluster import NoWorkers
    from dit_sparse.generate import report
    from dit_sparse.generate.hold import hold
    from dit_sparse.generate.run import prepare, run

    try:
        with report.warnings_as_lines(console), ExitStack() as stack:
            with user_errors():
                stack.enter_context(hold(request))
            with user_errors(), report.loading(console, request.model):
                job = prepare(request, executor or _executor(request, ray, ray_workers, stack))
            report.warn_of_unknown_words(console, job.settings.model, [clip.prompt for clip in job.todo])
            with report.ConsoleListener(console) as listener:
                outcome = run(job, listener)
    except OSError as error:
        print_error(f"{request.out} cannot be written: {error}")
        return 1
    except NoWorkers as error:
        print_error(str(error))
        return 1
    output = report.output_console()
    if outcome.lines:
        output.print(report.result_table(outcome.lines))
    output.print(report.closing_line(job, outcome), markup=False, highlight=False, soft_wrap=True)
    return 1 if outcome.failures else 0


def _executor(request: Request, ray: str | None, workers: int | None, stack: ExitStack) -> Executor | None:
    if ray is None:
        return None
    from dit_sparse.generate.on_ray import RayExecutor

    return stack.enter_context(RayExecutor(request, ray, workers))


@contextmanager
def interruptible(console: Console, out: Path) -> Iterator[None]:
    """Within it Ctrl-C ends the command with one line."""
    try:
        yield
    except KeyboardInterrupt:
        text = f"interrupted; finished videos are in {out}, and the same command goes on from there"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
