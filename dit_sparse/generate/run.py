"""Makes the videos of a request: checks everything first, then renders what is not finished yet."""

from __future__ import annotations

import gc
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.generate import models
from dit_sparse.generate.manifest import Manifest
from dit_sparse.generate.request import Clip, Request, Settings, clips
from dit_sparse.generate.video import check_writer, remove_partials, to_uint8, write_video

if TYPE_CHECKING:
    from dit_sparse.schedule import Schedule

__all__ = ["Job", "Listener", "Outcome", "prepare", "run"]


class Listener:
    """Is told how a run goes; the methods do nothing unless overridden."""

    def started(self, job: Job) -> None:
        """Before the first video."""

    def rendering(self, clip: Clip, what: str, steps: int) -> None:
        """Before each call of the pipeline: the "warm-up", or the "sparse" or "dense" rendering of `clip`."""

    def stepped(self) -> None:
        """After each denoising step."""

    def finished(self, clip: Clip, line: dict[str, Any]) -> None:
        """After a video is written; `line` is its line in the manifest."""

    def failed(self, clip: Clip, error: Exception) -> None:
        """After a video could not be made."""


@dataclass(frozen=True)
class Job:
    """A request that was found possible, with what is left to do.

    Args:
        schedule: the method and when it applies.
        pipe: the loaded pipeline; `None` where nothing is left to do.
        todo, done: videos to make, and manifest lines of those that are finished.
    """

    request: Request
    settings: Settings
    schedule: Schedule
    pipe: Any
    manifest: Manifest
    todo: tuple[Clip, ...]
    done: tuple[dict[str, Any], ...]


@dataclass
class Outcome:
    """What a run made: manifest lines of the new videos, and the errors of those that failed."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[Clip, Exception]] = field(default_factory=list)


def prepare(request: Request) -> Job:
    """Check everything that can be checked before the first video; writes nothing.

    The model is loaded, unless every video is finished and that can be told without it.

    Raises:
        ValueError, OSError: one line that says what is wrong and what is allowed.
    """
    from dit_sparse.pipelines import check
    from dit_sparse.schedule import Schedule

    schedule = Schedule.from_config(dict(request.config))
    check_folder(request.out)
    manifest = Manifest(request.out)
    pipe = None
    values = models.known_defaults(request)
    if values is None:
        pipe = models.load_model(request)
        values = models.pipeline_defaults(request, pipe)
    settings = _settings(request, schedule, values)
    check_writer(settings.format)
    todo, done = _divide(request, settings, manifest)
    if todo:
        pipe = pipe or models.load_model(request)
        models.pipeline_defaults(request, pipe)
        check(pipe, schedule, settings.height, settings.width, settings.frames)
    return Job(request, settings, schedule, pipe, manifest, tuple(todo), tuple(done))


def run(job: Job, listener: Listener | None = None) -> Outcome:
    """Make the videos of `job` that are not finished; one that fails does not keep the others from being made.

    Raises:
        OSError: the folder or a file in it cannot be written; what is finished stays.
        KeyboardInterrupt: passed on; every video is then whole or not there.
    """
    listener = listener or Listener()
    outcome = Outcome()
    listener.started(job)
    if not job.todo:
        return outcome
    job.request.out.mkdir(parents=True, exist_ok=True)
    remove_partials(job.request.out)
    warm = not job.request.compare_dense
    for clip in job.todo:
        try:
            if not warm:
                _warm_up(job, clip, listener)
                warm = True
            frames, line = _make(job, clip, listener)
        # A model can fail on one prompt in any way, and the other prompts are still wanted.
        except Exception as error:  # noqa: BLE001
            outcome.failures.append((clip, error.with_traceback(None)))
            listener.failed(clip, error)
            _free_memory()
        else:
            _write(job, frames, line)
            outcome.lines.append(line)
            listener.finished(clip, line)
    return outcome


def check_folder(folder: Path) -> None:
    """Make sure that `folder` can be written to, or made; leaves no trace.

    Raises:
        ValueError: it cannot.
    """
    try:
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(20, f"{existing} is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
        if existing != folder.absolute():
            # Some folders take files but no folders, such as those of /proc.
            Path(tempfile.mkdtemp(dir=existing)).rmdir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--out {str(folder)!r} cannot be written: {reason}") from None


def _settings(request: Request, schedule: Schedule, values: dict[str, Any]) -> Settings:
    return Settings(
        model=models.model_name(request.model),
        config=schedule.to_config(),
        negative_prompt=request.negative_prompt,
        dtype=models.resolve_dtype(request.dtype, models.resolve_device(request.device)),
        format=request.format or ("png" if values["frames"] == 1 else "mp4"),
        fps=request.fps or models.default_fps(request),
        **values,
    )


def _divide(request: Request, settings: Settings, manifest: Manifest) -> tuple[list[Clip], list[dict[str, Any]]]:
    todo, done = [], []
    for clip in clips(request.prompts, request.seed, request.num_samples):
        line = None if request.overwrite else manifest.finished(settings.key(clip))
        # A comparison needs both renderings in memory, so a video without one is made again.
        if line is None or (request.compare_dense and "dense_seconds" not in line):
            todo.append(clip)
        else:
            done.append(line)
    return todo, done


def _make(job: Job, clip: Clip, listener: Listener) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames `[T, H, W, 3]` uint8 of `clip` and its manifest line."""
    with _sparse(job.pipe, job.schedule):
        frames, seconds = _render(job, clip, "sparse", listener)
        line = _line(job, clip, seconds)
    pixels = to_uint8(frames)
    if job.request.compare_dense:
        dense, dense_seconds = _render(job, clip, "dense", listener)
        line |= _comparison(frames, dense, seconds, dense_seconds)
    return pixels, line


def _write(job: Job, frames: np.ndarray, line: dict[str, Any]) -> None:
    # The line comes before the file: a crash in between leaves a line without its file, which is not finished.
    write_video(
        frames,
        job.request.out / line["file"],
        format=job.settings.format,
        fps=job.settings.fps,
        when_whole=lambda: job.manifest.append(line),
    )


def _warm_up(job: Job, clip: Clip, listener: Listener) -> None:
    """One step each, sparse and dense, so that neither timing pays for compilation and first allocations."""
    with _sparse(job.pipe, replace(job.schedule, warmup=0.0)):
        _render(job, clip, "warm-up", listener, steps=1)
    _render(job, clip, "warm-up", listener, steps=1)


@contextmanager
def _sparse(pipe: Any, schedule: Schedule) -> Iterator[None]:
    from dit_sparse.pipelines import sparsify, unsparsify

    sparsify(pipe, schedule)
    try:
        yield
    finally:
        unsparsify(pipe)


def _render(job: Job, clip: Clip, what: str, listener: Listener, steps: int | None = None) -> tuple[np.ndarray, float]:
    """Frames `[T, H, W, 3]` float in [0, 1] of `clip`, and the wall time in seconds, decoding included."""
    import torch

    steps = steps or job.settings.steps
    listener.rendering(clip, what, steps)
    # A generator on the CPU draws the same noise whatever the device.
    arguments = _arguments(job, clip, steps) | {
        "generator": torch.Generator("cpu").manual_seed(clip.seed),
        "callback_on_step_end": _step_callback(listener),
    }
    start = time.perf_counter()
    output = job.pipe(**arguments)
    seconds = time.perf_counter() - start
    frames = output.frames[0] if hasattr(output, "frames") else output.images
    return np.asarray(frames), seconds


def _arguments(job: Job, clip: Clip, steps: int) -> dict[str, Any]:
    settings = job.settings
    values = {
        "height": settings.height,
        "width": settings.width,
        "frames": settings.frames,
        "steps": steps,
        "guidance": settings.guidance,
    }
    texts = {"prompt": clip.prompt, "negative_prompt": settings.negative_prompt}
    arguments = models.call_arguments(job.pipe, values) | {"output_type": "np"}
    return arguments | {name: text for name, text in texts.items() if text is not None}


def _step_callback(listener: Listener) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        listener.stepped()
        return tensors

    return callback


def _line(job: Job, clip: Clip, seconds: float) -> dict[str, Any]:
    """The manifest line of a video just rendered, read before the pipeline is restored."""
    from dit_sparse.pipelines import statistics

    settings, run_statistics = job.settings, statistics(job.pipe)
    return {
        "prompt": clip.prompt,
        "seed": clip.seed,
        "negative_prompt": settings.negative_prompt,
        "model": settings.model,
        "method": job.schedule.method.name,
        "config": dict(settings.config),
        "height": settings.height,
        "width": settings.width,
        "frames": settings.frames,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "dtype": settings.dtype,
        "device": models.resolve_device(job.request.device),
        "offload": job.request.offload,
        "format": settings.format,
        "fps": settings.fps,
        "seconds": seconds,
        "attention_density": run_statistics.density,
        "sparse_density": run_statistics.sparse_density,
        "calls": run_statistics.calls,
        "dense_calls": dict(run_statistics.dense_calls),
        "attention_seconds": run_statistics.attention_seconds,
        "plan_seconds": run_statistics.plan_seconds,
        "file": job.manifest.file_name(clip, settings),
        "key": settings.key(clip),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }


def _comparison(frames: np.ndarray, dense: np.ndarray, seconds: float, dense_seconds: float) -> dict[str, Any]:
    from dit_sparse.eval.fidelity import compare

    fidelity = compare(frames.clip(0, 1), dense.clip(0, 1))
    return {
        "dense_seconds": dense_seconds,
        "speedup": dense_seconds / seconds,
        "psnr": None if fidelity.identical else fidelity.psnr,
        "ssim": fidelity.ssim,
        "identical": fidelity.identical,
        "convention": fidelity.convention,
    }


def _versions() -> dict[str, str]:
    packages = ("dit-sparse", "torch", "diffusers", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
