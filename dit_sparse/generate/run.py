"""Makes the videos of a request: checks everything first, then renders what is not finished yet."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.generate import models
from dit_sparse.generate.listener import Listener
from dit_sparse.generate.manifest import Manifest
from dit_sparse.generate.render import Executor, Failed, LocalExecutor, Rendered
from dit_sparse.generate.request import Clip, Request, Settings, clips
from dit_sparse.generate.video import check_writer, extension
from dit_sparse.partials import place, remove, remove_partials

if TYPE_CHECKING:
    from dit_sparse.schedule import Schedule

__all__ = ["Job", "Listener", "Outcome", "prepare", "run"]


@dataclass(frozen=True)
class Job:
    """A request that was found possible, with what is left to do.

    Args:
        executor: where the videos are rendered.
        todo, done: videos to make, and manifest lines of those that are finished.
    """

    request: Request
    settings: Settings
    executor: Executor
    manifest: Manifest
    todo: tuple[Clip, ...]
    done: tuple[dict[str, Any], ...]


@dataclass
class Outcome:
    """What a run made: manifest lines of the new videos, and the errors of those that failed."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[Clip, Exception]] = field(default_factory=list)


def prepare(request: Request, executor: Executor | None = None) -> Job:
    """Check everything that can be checked before the first video; writes nothing.

    The model is loaded, unless every video is finished and that can be told without it. Who holds the folder (`hold`)
    from here to the end of `run` makes no video that another run makes too.

    Args:
        executor: where the videos are rendered; `None` is this process.

    Raises:
        ValueError, OSError: one line that says what is wrong and what is allowed.
    """
    from dit_sparse.schedule import Schedule

    schedule = Schedule.from_config(dict(request.config))
    check_folder(request.out)
    manifest = Manifest(request.out)
    executor = executor or LocalExecutor(request)
    values = models.known_defaults(request)
    settings = _settings(request, schedule, executor.device, executor.defaults() if values is None else values)
    check_writer(settings.format)
    todo, done = _divide(request, settings, manifest)
    if todo:
        executor.check(settings)
    return Job(request, settings, executor, manifest, tuple(todo), tuple(done))


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
    for result in job.executor.render(job.settings, job.todo, listener):
        kept = result if isinstance(result, Failed) else _keep(job, result)
        if isinstance(kept, Failed):
            outcome.failures.append((kept.clip, kept.error))
            listener.failed(kept.clip, kept.error)
        else:
            outcome.lines.append(kept)
            listener.finished(result.clip, kept)
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


def _settings(request: Request, schedule: Schedule, device: str, values: dict[str, Any]) -> Settings:
    return Settings(
        model=models.model_name(request.model),
        config=schedule.to_config(),
        negative_prompt=request.negative_prompt,
        dtype=models.resolve_dtype(request.dtype, device),
        format=request.format or ("png" if values["frames"] == 1 else "mp4"),
        fps=request.fps or models.default_fps(request),
        **values,
    )


def _divide(request: Request, settings: Settings, manifest: Manifest) -> tuple[list[Clip], list[dict[str, Any]]]:
    todo, done = [], []
    for clip in request.clips or clips(request.prompts, request.seed, request.num_samples):
        # A name that others have settled is found taken now, and not when the video is rendered.
        name = None if clip.name is None else manifest.file_name(clip, settings)
        line = None if request.overwrite else manifest.finished(settings.key(clip), name)
        # A comparison needs both renderings in memory, so a video without one is made again.
        if line is None or (request.compare_dense and "dense_seconds" not in line):
            todo.append(clip)
        else:
            done.append(line)
    return todo, done


def _keep(job: Job, rendered: Rendered) -> dict[str, Any] | Failed:
    """Give a rendered video and what belongs to it their names, and it its line, which is returned."""
    partials = [rendered.partial, *(partial for _, partial in rendered.others.values())]
    try:
        file = job.manifest.file_name(rendered.clip, job.settings)
        stem = file.removesuffix(extension(job.settings.format, job.settings.frames))
        names = {key: stem + ending for key, (ending, _) in rendered.others.items()}
        line = rendered.line | {"file": file} | names
        for key, (_, partial) in rendered.others.items():
            place(partial, job.request.out / names[key])
        # The line comes before the file: a crash in between leaves a line without its file, which is not finished.
        job.manifest.append(line)
        place(rendered.partial, job.request.out / file)
    except FileExistsError as error:
        return Failed(rendered.clip, error)
    finally:
        for partial in partials:
            remove(partial)
    return line
