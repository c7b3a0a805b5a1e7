"""Calibration as the command line asks for it: a model by name, sizes that it fills in, progress on a console."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dit_sparse.calibrate.quality import Reached, check_schedule, for_error, for_psnr
from dit_sparse.calibrate.run import Calibration, Listener, calibrate, run_dense
from dit_sparse.generate import Request, models
from dit_sparse.generate.config import build_schedule, flag
from dit_sparse.generate.report import loading
from dit_sparse.generate.run import check_folder
from dit_sparse.methods import Paro, nearest
from dit_sparse.methods.parameters import accepts_density, parameters, parse_parameter, takes_density
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.partials import replacing
from dit_sparse.pipelines import check, velocity_ramp
from dit_sparse.pipelines.velocity import check_mean
from dit_sparse.schedule import Schedule
from dit_sparse.types import Method


def prepare(request: Request, method: Method | Schedule) -> tuple[Any, dict[str, Any]]:
    """The pipeline that `request` means and the arguments of its call, both checked, for `method`.

    Raises:
        ValueError, OSError: one line that says what is wrong and what is allowed.
    """
    check_folder(request.out)
    pipe = models.load_model(request)
    values = models.pipeline_defaults(request, pipe) | (models.known_defaults(request) or {})
    check(pipe, method, values["height"], values["width"], values["frames"])
    arguments = models.call_arguments(pipe, values)
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    return pipe, arguments


def public_name(request: Request) -> str:
    """The model's name for files that are handed on: a folder's own path is nobody's business but its owner's."""
    name = models.model_name(request.model)
    return Path(name).name if Path(name).is_absolute() else name


def calibrate_with_progress(
    pipe: Any,
    request: Request,
    path: str | os.PathLike[str],
    calibration: Calibration,
    arguments: dict[str, Any],
    scratch: Path | None,
    console: Console,
) -> PlanFile:
    """`calibrate` with a bar on `console`."""
    name = public_name(request)
    total = 2 * len(request.prompts) * int(arguments["num_inference_steps"])
    with ProgressListener(console, total) as listener:
        return calibrate(
            pipe,
            request.prompts,
            path,
            calibration,
            model=name,
            scratch=scratch,
            listener=listener,
            **arguments,
        )


def what_is_wanted(
    method: str | None, error: float | None, psnr: float | None, velocity_ramp: bool
) -> Literal["plan file", "quality", "ramp"]:
    """What `calibrate` is to write: a plan file, or a config of densities by quality or by step.

    Raises:
        ValueError: several at once, a ramp without a method, or another method than `paro` for a plan file.
    """
    asked = {"--error": error is not None, "--psnr": psnr is not None, "--velocity-ramp": velocity_ramp}
    given = [name for name, value in asked.items() if value]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(asked)}, not both of {' and '.join(given[:2])}")
    if velocity_ramp and method is None:
        raise ValueError(
            "--velocity-ramp needs --method, got none: each step plans anew, which suits methods that do so anyway, "
            "such as pisa"
        )
    if not given and method not in (None, "paro"):
        raise ValueError(
            f"method must be paro to make a plan file, got {method!r}: give --error, --psnr or --velocity-ramp with it"
        )
    return "ramp" if velocity_ramp else "quality" if given else "plan file"


def quality_schedule(method: str, options: Mapping[str, str], own: Iterable[str]) -> Schedule:
    """The schedule of `method` whose density or thresholds are to be found; no step is dense unless `options` say so.

    Args:
        options: what was given of plan files and of the method's and the schedule's parameters, by name, as text.
        own: names of the command's own options, for suggestions.

    Raises:
        ValueError: an unknown option or method, a bad value, or an option that would have no effect.
    """
    _refuse_unused(options, ("density",), "with --error or --psnr, which find it")
    schedule = _config_schedule(method, {"warmup": "0", **options}, own)
    check_schedule(schedule)
    return schedule


def ramp_schedule(method: str, options: Mapping[str, str], own: Iterable[str]) -> Schedule:
    """The schedule of `method` whose ramp is to be measured; options as `quality_schedule` takes them.

    Raises:
        ValueError: as `quality_schedule`, or the method has no density that a ramp could change.
    """
    _refuse_unused(options, ("ramp", "noise_densities"), "with --velocity-ramp, which finds the density of each step")
    schedule = _config_schedule(method, options, own)
    if not accepts_density(schedule.method):
        raise ValueError(
            f"--velocity-ramp needs a method with a density, got {method!r}, which has none as it is set: "
            "leave out what overrides it, or take another such as pisa"
        )
    if not takes_density(schedule.method):
        raise ValueError(
            f"--velocity-ramp needs a density, got none for {method!r}, which goes by a threshold without: "
            "give --density, the mean over the sparse steps"
        )
    check_mean(_mean_density(schedule))
    return schedule


def _config_schedule(method: str, options: Mapping[str, str], own: Iterable[str]) -> Schedule:
    _refuse_unused(options, ("shared_from", "scratch"), "without a plan file")
    # An option of plan files that the method lacks is no suggestion for itself.
    others = [name for name in own if name not in options]
    return build_schedule(method, None, dict(options), others)


def _mean_density(schedule: Schedule) -> float:
    return float(schedule.method.density)  # type: ignore[attr-defined]


def plan_calibration(options: Mapping[str, str], seed: int, own: Iterable[str]) -> Calibration:
    """How a plan file is made with `options`, as `quality_schedule` takes them.

    Raises:
        ValueError: an unknown option, a bad value, or an option that would have no effect.
    """
    known = [flag(name) for name in own]
    for name in map(flag, options):
        if name not in known:
            raise ValueError(
                f"no such option for a plan file: {name}, --error, --psnr or --velocity-ramp may take it; "
                f"{nearest(name, known)}"
            )
    _refuse_unused(options, ("warmup",), "on a plan file, which every warm-up can use")
    metrics = {p.name: parse_parameter(Paro, p.name, options[p.name]) for p in parameters(Paro) if p.name in options}
    shared = {} if "shared_from" not in options else {"shared_from": float(options["shared_from"])}
    threshold: Any = options.get("threshold", "head")
    return Calibration(Paro(**{"density": 0.3, **metrics}), threshold, seed=seed, **shared)


def _refuse_unused(given: Iterable[str], unused: Iterable[str], where: str) -> None:
    found = [flag(name) for name in unused if name in given]
    if found:
        raise ValueError(f"{', '.join(found)} would have no effect {where}: leave it out")


def calibrate_quality(
    request: Request,
    path: Path,
    schedule: Schedule,
    error: float | None,
    psnr: float | None,
    console: Console,
) -> Table:
    """Write the config of `schedule` that has the quality asked for to `path`; what was measured, as a table.

    Raises:
        ValueError, OSError: as `prepare`, `for_error` and `for_psnr`.
    """
    with loading(console, request.model):
        pipe, arguments = prepare(request, schedule)
    steps = int(arguments["num_inference_steps"])
    with ProgressListener(console, steps * len(request.prompts) if psnr is None else None) as listener:
        calls = {"seed": request.seed, "listener": listener, **arguments}
        if error is not None:
            found = for_error(pipe, request.prompts, schedule, error, **calls)
        else:
            assert psnr is not None
            found = for_psnr(pipe, request.prompts, schedule, psnr, **calls)
    _write_config(path, found.schedule)
    return quality_table(found)


def calibrate_ramp(request: Request, path: Path, schedule: Schedule, console: Console) -> Table:
    """Write the config of `schedule` with a ramp by how the velocity changes to `path`; the ramp, as a table.

    The model runs dense, once a prompt.

    Raises:
        ValueError, OSError: as `prepare` and `velocity_ramp`, or no step would be sparse.
    """
    with loading(console, request.model):
        pipe, arguments = prepare(request, schedule)
    steps = int(arguments["num_inference_steps"])
    first = schedule.warmup_steps(steps)
    if steps < 2 or first >= steps:
        raise ValueError(
            f"--steps must be at least 2 for --velocity-ramp, and one sparse, got {steps} of which {first} run dense: "
            "raise it, or lower --warmup"
        )

    def run() -> None:
        for prompt in request.prompts:
            listener.began("velocity", prompt)
            run_dense(pipe, prompt, request.seed, listener, arguments)

    with ProgressListener(console, steps * len(request.prompts)) as listener:
        ramp = velocity_ramp(pipe, run, _mean_density(schedule), schedule.warmup)
    _write_config(path, replace(schedule, ramp=ramp))
    return ramp_table(ramp, first)


def _write_config(path: Path, schedule: Schedule) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(schedule.to_config(), indent=2) + "\n", encoding="utf-8")


def ramp_table(ramp: Sequence[float], first: int) -> Table:
    """The density of each sparse step from `first` on."""
    table = _table()
    table.add_column("step", justify="right")
    table.add_column("density", justify="right")
    for step, density in enumerate(ramp, first + 1):
        table.add_row(str(step), f"{density:.3f}")
    return table


def quality_table(found: Reached) -> Table:
    """What was measured: a row for each layer or prompt, and a column for all that was tried."""
    by_layer, tried = bool(found.kept), sorted(found.measured)
    title = f"Relative error (density) by layer and {found.varied}" if by_layer else f"PSNR, dB, by {found.varied}"
    table = _table(title)
    table.add_column("layer" if by_layer else "prompt", justify="right")
    for value in tried:
        table.add_column(f"{value:g}", justify="right")
    chosen = found.schedule.layer_thresholds if by_layer else None
    if chosen is not None:
        table.add_column("chosen", justify="right")
    for number in range(len(found.measured[tried[0]])):
        measured = [found.measured[value][number] for value in tried]
        if by_layer:
            kept = [found.kept[value][number] for value in tried]
            cells = [f"{error:.3f} ({density:.2f})" for error, density in zip(measured, kept, strict=True)]
        else:
            cells = [f"{value:.2f}" for value in measured]
        if chosen is not None:
            cells.append("dense" if found.schedule.is_dense_layer(number, len(chosen)) else f"{chosen[number]:.4f}")
        table.add_row(str(number if by_layer else number + 1), *cells)
    return table


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)


class ProgressListener(Listener):
    """Shows a calibration of `total` steps on `console`: a bar where it is a terminal, else a line a run."""

    def __init__(self, console: Console, total: int | None) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> ProgressListener:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def began(self, what: str, prompt: str) -> None:
        text = f"{what}: {prompt[:60]}"
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stepped(self) -> None:
        self._progress.advance(self._task)
