"""The command line: parses and calls. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from dit_sparse.generate import Job, Request

BAD_INPUT = 2
INTERRUPTED = 130

# Newer typers carry their own copy of click, so the class is reached by a way that both kinds share.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="dit-sparse",
    help="Sparse attention for Hugging Face diffusers' video transformers.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SIZE, _SAMPLING, _OUTPUT, _MACHINE, _METRICS = "Size", "Sampling", "Output", "Machine", "Choice of orders"


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show_version:
        sys.stdout.write(f"dit-sparse {version('dit-sparse')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def generate(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS", help="Text file, UTF-8, one prompt a line; - is standard input."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt itself, instead of a file.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a diffusers model.", show_default="the demo model")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Sparse attention method: see `dit-sparse methods`.", show_default="adaspa")
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Share of query-key pairs computed.", show_default="the method's")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with the method and its parameters; options override it.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=_SIZE)] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=_SIZE)] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", rich_help_panel=_SIZE)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_SAMPLING)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", rich_help_panel=_SAMPLING)] = None,
    seed: Annotated[int, typer.Option(help="Seed of a prompt's first video.", rich_help_panel=_SAMPLING)] = 0,
    num_samples: Annotated[
        int, typer.Option(help="Videos a prompt, with the next seeds.", rich_help_panel=_SAMPLING)
    ] = 1,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.", rich_help_panel=_SAMPLING)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.", rich_help_panel=_MACHINE)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MACHINE)] = "auto",
    offload: Annotated[
        str, typer.Option(help="none, model or group: keep weights off the GPU.", rich_help_panel=_MACHINE)
    ] = "none",
    out: Annotated[Path, typer.Option(help="Folder of the videos.", rich_help_panel=_OUTPUT)] = Path("videos"),
    format: Annotated[str, typer.Option(help="mp4, gif, or png for frames.", rich_help_panel=_OUTPUT)] = "mp4",
    fps: Annotated[int, typer.Option(help="Frames a second of the file.", rich_help_panel=_OUTPUT)] = 16,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Also render dense, and compare.", rich_help_panel=_OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make finished videos again.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Make a video of every prompt.

    The method's own parameters are options too, such as `--window 4x12x16`, and so are those of the schedule:
    `--warmup 0.2`, `--dense-layers 0,1`, `--refresh 0.5,0.75`. The same command again goes on where it stopped.
    """
    own = [parameter.name or "" for parameter in context.command.params if parameter.name != "arguments"]
    console = Console(stderr=True)
    with _interruptible(console, out):
        with _user_errors():
            from dit_sparse.generate.config import build_schedule, split_arguments
            from dit_sparse.generate.request import Request

            positional, options = split_arguments([*(arguments or ()), *context.args])
            if density is not None:
                options["density"] = density
            prompts = _prompts(positional, prompt)
            schedule = build_schedule(method, config, options, own)
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
            )
        raise typer.Exit(_generate(request, console))


@app.command()
def calibrate(
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, UTF-8, one prompt a line; one or two are enough.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt itself, instead of a file.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a diffusers model.", show_default="the demo model")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of query-key pairs computed.")] = 0.3,
    threshold: Annotated[
        str, typer.Option(help="head: each head gets the density; global: one threshold for all heads.")
    ] = "head",
    shared_from: Annotated[float, typer.Option(help="Share of the run from which one mask serves all steps.")] = 0.5,
    out: Annotated[Path, typer.Option(help="The plan file.", rich_help_panel=_OUTPUT)] = Path("plan.safetensors"),
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for large files meanwhile.", rich_help_panel=_OUTPUT)
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=_SIZE)] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=_SIZE)] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", rich_help_panel=_SIZE)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_SAMPLING)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", rich_help_panel=_SAMPLING)] = None,
    seed: Annotated[int, typer.Option(help="Seed of each prompt's noise.", rich_help_panel=_SAMPLING)] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.", rich_help_panel=_SAMPLING)] = None,
    block: Annotated[int, typer.Option(help="Tokens a block.", rich_help_panel=_METRICS)] = 64,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="A block is sparse when this share of it is small.", show_default="0.99", rich_help_panel=_METRICS
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="A weight below this is small.", show_default="the mean weight", rich_help_panel=_METRICS),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Sparsity against quantisation incoherence.", show_default="1", rich_help_panel=_METRICS),
    ] = None,
    sample_blocks: Annotated[
        int | None,
        typer.Option(help="Query blocks compared a head.", show_default="16", rich_help_panel=_METRICS),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.", rich_help_panel=_MACHINE)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MACHINE)] = "auto",
    offload: Annotated[
        str, typer.Option(help="none, model or group: keep weights off the GPU.", rich_help_panel=_MACHINE)
    ] = "none",
) -> None:
    """Choose token orders and masks once, for `generate --method paro --plan-file`.

    The model runs dense over the prompts twice. The plan serves this model and size, and any prompt and steps.
    """
    console = Console(stderr=True)
    with _user_errors():
        from dit_sparse.calibrate import Calibration, command, summary
        from dit_sparse.calibrate.describe import describe
        from dit_sparse.generate import Request, report
        from dit_sparse.methods import Paro

        given: dict[str, Any] = {"sigma": sigma, "epsilon": epsilon, "alpha": alpha, "sample_blocks": sample_blocks}
        method = Paro(density, block, **{name: value for name, value in given.items() if value is not None})
        calibration = Calibration(method, threshold, shared_from, seed)  # type: ignore[arg-type]
        request = Request(
            prompts=tuple(_prompts([] if prompts is None else [str(prompts)], prompt)),
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
        with report.warnings_as_lines(console):
            with report.loading(console, model):
                pipe, arguments = command.prepare(request, calibration)
            file = command.calibrate_with_progress(pipe, request, out, calibration, arguments, scratch, console)
    report.output_console().print(summary(describe(file)))


@app.command()
def inspect(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    out: Annotated[Path | None, typer.Option(help="PNG file to draw orders and masks to.")] = None,
    as_json: _Json = False,
) -> None:
    """Show what is in a plan file: orders, densities and masks of every layer and head."""
    with _user_errors():
        from dit_sparse.calibrate import describe, draw, layer_table, slot_table, summary
        from dit_sparse.generate.report import output_console
        from dit_sparse.methods.plan_file import PlanFile

        file = PlanFile.open(plan)
        description = describe(file)
        if out is not None:
            draw(file, out)
    if as_json:
        _print_json(description)
        return
    console = output_console()
    console.print(summary(description))
    for name, plans in description["models"].items():
        console.print(slot_table(name, plans), layer_table(name, plans))


@app.command()
def methods(as_json: _Json = False) -> None:
    """List the methods, their parameters and papers."""
    from dit_sparse.methods import all_methods, parameters

    listing: list[dict[str, Any]] = [
        {"name": name, "paper": cls.paper, "parameters": [vars(p) for p in parameters(cls)]}
        for name, cls in all_methods().items()
    ]
    if as_json:
        _print_json(listing)
        return
    console = Console()
    for entry in listing:
        console.print(f"[bold]{entry['name']}[/bold]  {escape(entry['paper'])}", highlight=False, soft_wrap=True)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for parameter in entry["parameters"]:
            flag = "--" + parameter["name"].replace("_", "-")
            table.add_row(flag, escape(str(parameter["default"])), escape(parameter["help"]))
        console.print(table)


@app.command()
def neighborhood(
    grid: Annotated[str, typer.Option(help="Tokens along frames, height, width: 30x48x80; 256x256 is one frame.")],
    window: Annotated[str | None, typer.Option(help="Keys a query sees.", show_default="from the density")] = None,
    stride: Annotated[str, typer.Option(help="Queries that share a window.")] = "1",
    dilation: Annotated[str, typer.Option(help="Distance between the keys of a window.")] = "1",
    causal: Annotated[str, typer.Option(help="true, false, or one an axis: true,false,false.")] = "false",
    tile: Annotated[str | None, typer.Option(help="Tokens of a tile.", show_default="the best")] = None,
    exact: Annotated[bool, typer.Option(help="Compute tiles that a window cuts to the token, or whole.")] = True,
    text: Annotated[int, typer.Option(min=0, help="Text tokens in the sequence.")] = 0,
    density: Annotated[
        float | None, typer.Option(help="List the best settings near this share of the query-key pairs.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Say what a neighborhood would cost, and which settings suit a grid; counts tiles and needs no GPU."""
    with _user_errors():
        from dit_sparse.simulator import parse_setting, print_report, simulate

        given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal, "tile": tile}
        report = simulate(*parse_setting(grid, given, exact=exact, text=text, density=density), density)
    if as_json:
        _print_json(report)
    else:
        print_report(report, Console())


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Say what works on this machine, what is missing and how to get it."""
    from dit_sparse.doctor import diagnose

    report = diagnose()
    if as_json:
        _print_json(report)
    else:
        _print_report(report, Console())
    raise typer.Exit(0 if report["ready"] else 1)


bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def kernels(
    shapes: Annotated[str | None, typer.Option(help="Such as wan-1.3b,flux.", show_default="all")] = None,
    blocks: Annotated[str, typer.Option(help="Tokens a block.")] = "128,64",
    densities: Annotated[str, typer.Option(help="Shares of the query-key pairs.")] = "1,0.5,0.25,0.1",
    backends: Annotated[
        str | None, typer.Option(help="Such as hopper,triton.", show_default="those that run here")
    ] = None,
    sections: Annotated[str, typer.Option(help="What is timed.")] = "kernels,neighborhood,search,movement",
    rounds: Annotated[int, typer.Option(min=1, help="Times each kernel is timed.")] = 9,
    out: Annotated[Path | None, typer.Option(help="JSON file for the report.")] = None,
) -> None:
    """Time the GPU kernels against the fastest dense attention; needs an NVIDIA GPU and takes some minutes."""
    import torch

    with _user_errors():
        from dit_sparse.bench import SHAPES, print_table, run_sections, write_report

        if not torch.cuda.is_available():
            raise ValueError("bench kernels needs an NVIDIA GPU, got none; scripts/bench_cpu.py times the CPU kernels")
        report = run_sections(
            shapes=tuple(SHAPES) if shapes is None else shapes.split(","),
            blocks=[int(block) for block in blocks.split(",")],
            densities=[float(density) for density in densities.split(",")],
            backends=None if backends is None else backends.split(","),
            sections=sections.split(","),
            rounds=rounds,
            save=lambda report: None if out is None else write_report(report, out),
        )
    print_table(report, Console(width=None if sys.stdout.isatty() else 120))
    raise typer.Exit(1 if report["failed"] else 0)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 0, 1 (a video failed), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        code = app(args=arguments, prog_name="dit-sparse", standalone_mode=False)
    except _UsageError as error:
        _error(error.format_message())  # type: ignore[attr-defined]
        code = BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        _error("interrupted")
        code = INTERRUPTED
    sys.exit(code or 0)


def _prompts(positional: list[str], prompts: list[str] | None) -> list[str]:
    from dit_sparse.generate.prompts import clean_prompt, read_prompts

    if len(positional) > 1:
        raise ValueError(f"one prompt file is taken, got {len(positional)}: {', '.join(map(repr, positional))}")
    if positional and prompts:
        raise ValueError("give a prompt file or --prompt, not both")
    if not positional and not prompts:
        raise ValueError("no prompts: give a text file, - for standard input, or --prompt TEXT")
    return [clean_prompt(text) for text in prompts] if prompts else read_prompts(positional[0])


def _generate(request: Request, console: Console) -> int:
    from dit_sparse.generate import report
    from dit_sparse.generate.run import prepare, run

    with report.warnings_as_lines(console):
        with _user_errors(), report.loading(console, request.model):
            job = prepare(request)
        _warn_of_unknown_words(job, console)
        try:
            with report.ConsoleListener(console) as listener:
                outcome = run(job, listener)
        except OSError as error:
            _error(f"{request.out} cannot be written: {error}")
            return 1
    output = report.output_console()
    if outcome.lines:
        output.print(report.result_table(outcome.lines))
    output.print(report.closing_line(job, outcome), markup=False, highlight=False, soft_wrap=True)
    return 1 if outcome.failures else 0


def _warn_of_unknown_words(job: Job, console: Console) -> None:
    from dit_sparse.demo import unknown_words
    from dit_sparse.generate.models import DEMO

    if job.settings.model != DEMO:
        return
    unknown = dict.fromkeys(word for clip in job.todo for word in unknown_words(clip.prompt))
    if unknown:
        text = f"warning: the demo model ignores words that it does not know: {', '.join(unknown)}"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn errors of the checks before a run into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        _error(str(error))
        raise typer.Exit(BAD_INPUT) from None


@contextmanager
def _interruptible(console: Console, out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        text = f"interrupted; finished videos are in {out}, and the same command goes on from there"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


def _error(message: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
