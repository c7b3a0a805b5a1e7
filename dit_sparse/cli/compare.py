"""`dit-sparse compare` and `fidelity`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dit_sparse.cli import options as opt
from dit_sparse.cli.app import INTERRUPTED, print_error, print_json, user_errors

if TYPE_CHECKING:
    from dit_sparse.compare import Job
    from dit_sparse.eval import Convention

Conventions = Annotated[
    str, opt.option("How figures are defined, with commas between: skimage, svg, fastvideo.", opt.OUTPUT)
]
Lpips = Annotated[bool, opt.option("Measure LPIPS too; needs its weights.", opt.OUTPUT, flag="--lpips")]


def compare(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS", help="Text file, UTF-8, one prompt a line; - is standard input."),
    ] = None,
    prompt: opt.Prompt = None,
    methods: Annotated[str | None, opt.option("Names with commas between: see `dit-sparse methods`.")] = None,
    also: Annotated[
        list[str] | None, opt.option('More, as JSON: {"method": "adaspa", "block": 128}; may be given often.')
    ] = None,
    densities: Annotated[
        str | None, opt.option("Shares of query-key pairs, with commas between.", default="each method's own")
    ] = None,
    config: Annotated[
        Path | None, opt.option('JSON file with "methods", and "densities" and "schedule" if you like.')
    ] = None,
    warmup: Annotated[
        float | None, opt.option("Share of the steps that run dense at the start.", default="0.2")
    ] = None,
    floors: Annotated[bool, typer.Option(help="Render another seed and random blocks too.")] = True,
    model: opt.Model = None,
    height: opt.Height = None,
    width: opt.Width = None,
    frames: opt.Frames = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    seed: Annotated[int, opt.option("Seed of a prompt's first video.", opt.SAMPLING)] = 0,
    num_samples: Annotated[int, opt.option("Seeds a prompt, from the first on.", opt.SAMPLING)] = 1,
    negative_prompt: opt.NegativePrompt = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    offload: opt.Offload = "none",
    out: Annotated[Path, opt.option("Folder of the comparison.", opt.OUTPUT)] = Path("comparison"),
    format: Annotated[
        str | None, opt.option("mp4, gif, or png for frames.", opt.OUTPUT, default="mp4, png for an image")
    ] = None,
    fps: Annotated[int | None, opt.option("Frames a second.", opt.OUTPUT, default="the preset's, or 16")] = None,
    conventions: Conventions = "skimage,svg,fastvideo",
    lpips: Lpips = False,
    trace: Annotated[
        bool,
        opt.option(
            "Keep what every layer did, for `dit-sparse report`; takes a little time.", opt.OUTPUT, flag="--trace"
        ),
    ] = False,
    commit: Annotated[str | None, opt.option("Recorded where there is no checkout to ask.", opt.OUTPUT)] = None,
    draw_only: Annotated[
        bool, opt.option("Draw and print what --out holds; renders nothing.", opt.OUTPUT, flag="--draw-only")
    ] = False,
) -> None:
    """Render methods at densities against dense attention, and measure speed and fidelity.

    Every prompt and seed is rendered dense once and with every method at every density. The same command again goes on
    where it stopped; with more methods, densities or prompts it adds them.
    """
    console = Console(stderr=True)
    if draw_only:
        with user_errors():
            _finish(out)
        return
    with user_errors():
        from dit_sparse.compare import floor_cases, make_cases
        from dit_sparse.generate import Request

        named, wanted, schedule = _plan(methods, also, densities, config, warmup)
        cases = make_cases(named, wanted, schedule)
        request = Request(
            prompts=tuple(opt.collect_prompts(prompts or [], prompt)),
            config={},
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
            trace=trace,
        )
        every = [*cases, *(floor_cases(cases, schedule) if floors else [])]
    raise typer.Exit(_compare(request, every, _conventions(conventions), lpips, commit, console))


def fidelity(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of PNG files, PNG file or lossless video.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What it is compared with.")],
    convention: Conventions = "skimage",
    lpips: Lpips = False,
    allow_lossy: Annotated[bool, opt.option("Take lossy videos too, such as H.264.", flag="--allow-lossy")] = False,
    as_json: opt.Json = False,
) -> None:
    """Say how near two videos are to each other: PSNR, SSIM, and LPIPS if you like."""
    with user_errors():
        from dit_sparse.compare.pair import compare_files, pair_lines

        report = compare_files(a, b, _conventions(convention), lpips=lpips, allow_lossy=allow_lossy)
    if as_json:
        print_json(report)
        return
    for line in pair_lines(report):
        typer.echo(line)


def _plan(
    methods: str | None, also: Sequence[str] | None, densities: str | None, config: Path | None, warmup: float | None
) -> tuple[list[Any], list[float] | None, dict[str, Any]]:
    """Methods, densities and options of the schedule, from the command line and the config file; the former win."""
    from dit_sparse.compare.cases import Plan, parse_config, parse_densities, read_plan

    plan = Plan() if config is None else read_plan(config)
    named: list[Any] = [name.strip() for name in (methods or "").split(",") if name.strip()]
    named += [*plan.methods, *(parse_config(text) for text in also or ())]
    wanted = parse_densities(densities) if densities is not None else plan.densities
    schedule = dict(plan.schedule or {}) | ({} if warmup is None else {"warmup": warmup})
    return named, None if wanted is None else list(wanted), schedule


def _conventions(text: str) -> list[Convention]:
    from dit_sparse.eval import find_convention

    with user_errors():
        return [find_convention(name) for name in dict.fromkeys(part.strip() for part in text.split(","))]


def _compare(
    request: Any,
    cases: Sequence[Any],
    conventions: Sequence[Convention],
    lpips: bool,
    commit: str | None,
    console: Console,
) -> int:
    from dit_sparse.compare import prepare, run
    from dit_sparse.compare.report import ConsoleListener
    from dit_sparse.generate import hold, report

    report.warn_of_unknown_words(console, request.model, request.prompts)
    with report.warnings_as_lines(console), ExitStack() as stack:
        try:
            with user_errors():
                stack.enter_context(hold(request))
            with user_errors(), report.loading(console, request.model):
                job = prepare(request, cases, conventions, lpips=lpips, commit=commit)
            with ConsoleListener(console) as listener:
                run(job, listener)
        except KeyboardInterrupt:
            text = f"interrupted; finished runs are in {request.out}, and the same command goes on from there"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            return INTERRUPTED
        except OSError as error:
            print_error(f"{request.out} cannot be written: {error}")
            return 1
    return _close(job)


def _close(job: Job) -> int:
    with user_errors():
        _finish(job.request.out)
    return 1 if job.record.failed else 0


def _finish(out: Path) -> None:
    """Draw the pictures and print the table of what is in `out`."""
    from dit_sparse.compare import read_record
    from dit_sparse.compare.pareto import draw_pareto
    from dit_sparse.compare.report import print_summary
    from dit_sparse.generate.report import output_console

    record = read_record(out)
    drawn = draw_pareto(record, out) if record["runs"] else []
    print_summary(record, drawn, output_console())
