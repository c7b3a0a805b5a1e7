"""`dit-sparse vbench`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dit_sparse.cli import options as opt
from dit_sparse.cli.app import print_error, print_json, user_errors

if TYPE_CHECKING:
    from dit_sparse.vbench import Survey
    from dit_sparse.vbench.prompts import Sample

vbench = typer.Typer(help="VBench: videos of its prompts, scores in its own environment, the leaderboard's table.")

Python = Annotated[Path | None, opt.option("Python of VBench's environment.", default="the one that setup makes")]
Dimensions = Annotated[
    list[str] | None, opt.option("A dimension; can be given again.", flag="--dimension", default="all")
]
Videos = Annotated[Path, typer.Argument(help="Folder of the videos.")]
Custom = Annotated[bool, opt.option("The videos are of other prompts than VBench's.", flag="--custom")]
PromptFile = Annotated[
    Path | None,
    opt.option("With --custom: JSON file, {file name: prompt}.", default="the manifest, or the file names"),
]
Weights = Annotated[
    Path | None, opt.option("Folder of VBench's weights.", default="$VBENCH_CACHE_DIR or ~/.cache/vbench")
]
NoStaticFilter = Annotated[
    bool, opt.option("Measure flickering on moving videos too; not VBench's protocol.", flag="--no-static-filter")
]
AllowPartial = Annotated[bool, opt.option("Take what is there; gives no totals.", flag="--allow-partial")]


@vbench.command()
def prompts(
    dimension: Dimensions = None,
    vbench_python: Python = None,
    as_json: opt.Json = False,
) -> None:
    """Print VBench's prompts, one a line, or with their dimensions and numbers of videos as JSON."""
    with user_errors():
        from dit_sparse.vbench import find_dimensions
        from dit_sparse.vbench.environment import find_environment
        from dit_sparse.vbench.prompts import read_prompts, samples

        chosen = find_dimensions(dimension)
        found = read_prompts(find_environment(vbench_python).info, chosen)
    if as_json:
        rows = [{"prompt": p.text, "dimensions": p.dimensions, "videos": len(samples([p], chosen))} for p in found]
        print_json(rows)
    else:
        sys.stdout.write("".join(f"{prompt.text}\n" for prompt in found))


@vbench.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def generate(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPTS]", help="Text file of prompts, in place of VBench's own.")
    ] = None,
    dimension: Dimensions = None,
    shard: Annotated[str, opt.option("Which part of the videos to make, such as 2/8.")] = "1/1",
    model: opt.Model = None,
    method: Annotated[
        str | None, opt.option("Method: see `dit-sparse methods`.", default="the model's preset, or adaspa")
    ] = None,
    density: Annotated[str | None, opt.option("Share of query-key pairs computed.", default="the method's")] = None,
    config: Annotated[
        Path | None, opt.option("JSON file with the method and its parameters; options override it.")
    ] = None,
    height: opt.Height = None,
    width: opt.Width = None,
    frames: opt.Frames = None,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    seed: Annotated[int, opt.option("Seed of a prompt's first video; the others take the next.", opt.SAMPLING)] = 0,
    negative_prompt: opt.NegativePrompt = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    offload: opt.Offload = "none",
    parallel: opt.Parallel = None,
    out: Annotated[Path, opt.option("Folder of the videos.", opt.OUTPUT)] = Path("vbench-videos"),
    fps: Annotated[
        int | None, opt.option("Frames a second of the file.", opt.OUTPUT, default="the preset's, or 16")
    ] = None,
    vbench_python: Python = None,
    ray: opt.Ray = None,
    ray_workers: opt.RayWorkers = None,
) -> None:
    """Make the videos that VBench asks for, under their official names.

    Five a prompt, and 25 of those that flickering is measured on. Takes the method's own parameters, as `dit-sparse
    generate` does, and like it goes on where it stopped. Layers for which sparse attention would be slower are sparse
    all the same, unless `--never-slower true` is given.
    """
    from dit_sparse.cli.generate import interruptible, make_videos

    own = [parameter.name or "" for parameter in context.command.params if parameter.name != "arguments"]
    console = Console(stderr=True)
    with interruptible(console, out):
        with user_errors():
            from dit_sparse.generate.config import build_schedule, read_config, split_arguments
            from dit_sparse.generate.models import DEMO
            from dit_sparse.generate.request import Request
            from dit_sparse.presets import find_preset
            from dit_sparse.vbench.clips import parse_shard, shard_clips

            positional, options = split_arguments([*(arguments or ()), *context.args])
            if density is not None:
                options["density"] = density
            # What is scored is the method, and not what is fastest here.
            if config is None or "never_slower" not in read_config(config):
                options.setdefault("never_slower", "false")
            part = parse_shard(shard)
            samples = _samples(positional, dimension, vbench_python)
            preset = find_preset(DEMO if model is None else model)
            start = preset.schedule if preset is not None and method is None and config is None else None
            request = Request(
                prompts=tuple(dict.fromkeys(sample.prompt.text for sample in samples)),
                config=build_schedule(method, config, options, own, start).to_config(),
                out=out,
                model=model,
                height=height,
                width=width,
                frames=frames,
                steps=steps,
                guidance=guidance,
                seed=seed,
                num_samples=max(sample.index for sample in samples) + 1,
                negative_prompt=negative_prompt,
                dtype=dtype,
                device=device,
                offload=offload,
                format="mp4",
                fps=fps,
                parallel=parallel,
                clips=tuple(shard_clips(samples, seed, part)),
            )
        raise typer.Exit(make_videos(request, console, ray, ray_workers))


@vbench.command()
def setup(
    folder: Annotated[Path | None, opt.option("Where to make it.", default="~/.cache/dit-sparse/vbench-0.1.5")] = None,
    light: Annotated[
        bool, opt.option("For flickering and dynamic degree alone, beside this torch.", flag="--light")
    ] = False,
    python: Annotated[Path | None, opt.option("Python 3.11 that makes it.", default="the running one")] = None,
) -> None:
    """Make VBench's own environment, with everything pinned.

    detectron2, which object_class, multiple_objects, color and spatial_relationship need, is on no package index:
    `FOLDER/bin/pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git`.
    """
    console = Console(stderr=True)
    with user_errors():
        from dit_sparse.vbench.environment import default_folder, setup

        made = setup(folder or default_folder(), light=light, python=python, report=console.print)
    sys.stdout.write(f"{made}\n")


@vbench.command()
def check(
    videos: Videos,
    dimension: Dimensions = None,
    custom: Custom = False,
    prompt_file: PromptFile = None,
    weights: Weights = None,
    no_static_filter: NoStaticFilter = False,
    vbench_python: Python = None,
    as_json: opt.Json = False,
) -> None:
    """Say which videos, weights and packages are missing, cut short or unlike the others; leaves with 1 if any is."""
    with user_errors():
        found = _survey(
            videos,
            dimension,
            custom,
            prompt_file,
            vbench_python,
            weights=weights,
            static_filter=not no_static_filter,
        )
    lines = [*found.blocking, *found.incomplete]
    if as_json:
        facts = {name: vars(fact) for name, fact in found.facts.items()}
        print_json({"problems": lines, "missing": found.missing, "videos": facts})
    else:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.write("".join(f"missing: {name}\n" for name in found.missing))
        sys.stdout.write(f"{len(found.facts)} videos can be scored, {len(lines)} problems\n")
    raise typer.Exit(1 if lines else 0)


@vbench.command()
def score(
    videos: Videos,
    out: Annotated[Path, opt.option("Folder of the scores.")] = Path("vbench-scores"),
    dimension: Dimensions = None,
    custom: Custom = False,
    prompt_file: PromptFile = None,
    device: Annotated[str, opt.option("auto, cpu, or GPUs such as cuda:0,cuda:1; a job on each.")] = "auto",
    shards: Annotated[int | None, opt.option("Processes that a dimension is divided among.", default="devices")] = None,
    weights: Weights = None,
    allow_download: Annotated[bool, opt.option("Fetch missing weights.", flag="--allow-download")] = False,
    allow_partial: AllowPartial = False,
    no_static_filter: NoStaticFilter = False,
    vbench_python: Python = None,
    ray: opt.Ray = None,
    ray_workers: opt.RayWorkers = None,
) -> None:
    """Score videos with VBench in its own environment; the same command again goes on where it stopped."""
    from dit_sparse.vbench.report import ConsoleListener

    console = Console(stderr=True)
    with user_errors():
        from dit_sparse.vbench import score
        from dit_sparse.vbench.scoring import parse_devices

        if ray is None and ray_workers is not None:
            raise ValueError("--ray-workers needs --ray auto, local or HOST:PORT")
        devices = parse_devices(device) if ray is None else ()
        if shards is not None and shards < 1:
            raise ValueError(f"--shards must be at least 1, got {shards}")
        found = _survey(
            videos,
            dimension,
            custom,
            prompt_file,
            vbench_python,
            weights=weights,
            static_filter=not no_static_filter,
            allow_download=allow_download,
            allow_partial=allow_partial,
            cache=out / "videos",
        )
        with ExitStack() as stack:
            options: dict[str, Any] = {"devices": devices, "shards": shards or len(devices)}
            if ray is not None:
                from dit_sparse.vbench.on_ray import RayRunner

                runner = stack.enter_context(RayRunner(ray, device=device, workers=ray_workers))
                options = {"runner": runner, "shards": shards or runner.workers}
            outcome = score(found, out, listener=stack.enter_context(ConsoleListener(console)), **options)
    for line in outcome.failures:
        print_error(line)
    sys.stdout.write(
        f"{outcome.made} scored, {outcome.done} already there, {len(outcome.failures)} failed; "
        f"`dit-sparse vbench table {out}` sums up\n"
    )
    raise typer.Exit(1 if outcome.failures else 0)


@vbench.command()
def table(
    scores: Annotated[list[Path], typer.Argument(help="Folders of scores; each becomes a column.")],
    allow_partial: AllowPartial = False,
    as_json: opt.Json = False,
) -> None:
    """Print the leaderboard's figures: every dimension, Quality, Semantic and Total."""
    with user_errors():
        from dit_sparse.vbench import read_scores
        from dit_sparse.vbench.report import score_table

        found = {str(folder): read_scores(folder, allow_partial=allow_partial) for folder in scores}
    if as_json:
        print_json({name: entry.to_dict() for name, entry in found.items()})
        return
    from dit_sparse.generate.report import output_console

    output_console().print(score_table(found))
    for name, entry in found.items():
        sys.stdout.write("".join(f"{name}: {line}\n" for line in entry.lacks))


def _samples(positional: list[str], dimension: list[str] | None, python: Path | None) -> list[Sample]:
    from dit_sparse.vbench import find_dimensions
    from dit_sparse.vbench.clips import custom_samples
    from dit_sparse.vbench.environment import find_environment
    from dit_sparse.vbench.prompts import read_prompts, samples

    if positional and dimension:
        raise ValueError("--dimension chooses among VBench's own prompts; leave it out with a file of prompts")
    if positional:
        return custom_samples(opt.collect_prompts(positional, None))
    chosen = find_dimensions(dimension)
    return samples(read_prompts(find_environment(python).info, chosen), chosen)


def _survey(
    videos: Path,
    dimension: list[str] | None,
    custom: bool,
    prompt_file: Path | None,
    python: Path | None,
    **options: Any,
) -> Survey:
    from dit_sparse.vbench import Request, survey
    from dit_sparse.vbench.files import read_json

    if prompt_file is not None and not custom:
        raise ValueError("--prompt-file needs --custom")
    prompts = None if prompt_file is None else read_json(prompt_file)
    if prompts is not None and not (isinstance(prompts, dict) and all(isinstance(p, str) for p in prompts.values())):
        raise ValueError(f"{prompt_file} must hold an object such as {{'a.mp4': 'a red ball'}}")
    return survey(Request(videos, tuple(dimension or ()), custom, prompts, python, **options))
