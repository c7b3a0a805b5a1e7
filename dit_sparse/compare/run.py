"""Compares methods with dense attention: checks everything first, then renders what the record still lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse import __version__
from dit_sparse.bench.report import environment, write_report
from dit_sparse.compare.cases import DENSE, Case, refuse_alike
from dit_sparse.compare.record import Record
from dit_sparse.compare.render import Rendering, Stage
from dit_sparse.eval.fidelity import Convention, compare
from dit_sparse.eval.frames import read_clip
from dit_sparse.generate import models
from dit_sparse.generate.call import free_memory
from dit_sparse.generate.request import Clip, Request, clips, slug
from dit_sparse.generate.run import check_folder
from dit_sparse.generate.video import check_writer, extension, to_uint8, write_video
from dit_sparse.partials import remove_partials

__all__ = ["Job", "Listener", "prepare", "run"]

_LEAST_SIDE = 11


class Listener:
    """Is told how a comparison goes; the methods do nothing unless overridden."""

    def started(self, total: int, done: int) -> None:
        """Before the first video: how many runs there are, and how many of them are finished."""

    def rendering(self, what: str) -> None:
        """Before each call of the pipeline."""

    def finished(self, clip: Clip, line: Mapping[str, Any]) -> None:
        """After a run is recorded."""

    def failed(self, clip: Clip, case: Case, error: Exception) -> None:
        """After a run could not be made."""


@dataclass(frozen=True)
class Job:
    """A comparison that was found possible, with what is left to do.

    Args:
        request: model, prompts, seeds, size and folder; its config is not used.
        cases: what is compared, the dense reference first.
        stage: the loaded pipeline; `None` where nothing is left to do.
        record: of the folder.
        conventions: of the figures; the first gives the run's own `psnr` and `ssim`.
        lpips: whether LPIPS is measured too.
    """

    request: Request
    settings: Mapping[str, Any]
    cases: tuple[Case, ...]
    stage: Stage | None
    record: Record
    conventions: tuple[Convention, ...]
    lpips: bool

    @property
    def clips(self) -> list[Clip]:
        """The prompts and seeds, in order."""
        return clips(self.request.prompts, self.request.seed, self.request.num_samples)

    def missing(self, clip: Clip) -> list[Case]:
        """The cases that are not recorded for `clip`."""
        return [case for case in self.cases if self.record.find(case, clip.prompt, clip.seed) is None]


def prepare(
    request: Request,
    cases: Sequence[Case],
    conventions: Sequence[Convention],
    *,
    lpips: bool = False,
    commit: str | None = None,
) -> Job:
    """Check everything that can be checked before the first video; writes nothing.

    Args:
        request: model, prompts, seeds, size and folder; its config, `compare_dense` and `overwrite` are not used.
        cases: methods and floors; the dense reference comes by itself.
        conventions: of the figures.
        lpips: measure LPIPS too.
        commit: recorded where there is no checkout to ask.

    Raises:
        ValueError, OSError: one line that says what is wrong and what is allowed.
    """
    _refuse_prompts_alike(request.prompts)
    every = (DENSE, *cases)
    refuse_alike("label", every, [case.label for case in every])
    check_folder(request.out)
    pipe, values = None, models.known_defaults(request)
    if values is None:
        pipe = models.load_model(request)
        values = models.pipeline_defaults(request, pipe)
    if min(values["height"], values["width"]) < _LEAST_SIDE:
        raise ValueError(
            f"--height and --width must be at least {_LEAST_SIDE} for SSIM, got {values['height']}x{values['width']}"
        )
    settings = _settings(request, values)
    check_writer(settings["format"])
    texts = {c.name: f"{c}; {c.lpips_text}" if lpips else str(c) for c in conventions}
    record = Record(request.out, settings, _environment(settings["device"], commit), texts)
    record.check_labels([*cases])
    if lpips:
        from dit_sparse.eval.lpips import check_weights

        for convention in conventions:
            check_weights(convention.lpips)
    job = Job(request, settings, every, None, record, tuple(conventions), lpips)
    if not any(map(job.missing, job.clips)):
        return job
    stage = _stage(pipe or models.load_model(request), request, settings, cases)
    return Job(request, settings, job.cases, stage, record, job.conventions, lpips)


def run(job: Job, listener: Listener | None = None) -> int:
    """Make the runs that `job` lacks; one that fails does not keep the others from being made.

    A case that fails is left out for the other prompts too; the same job tries it again.

    Returns:
        The number of runs made.

    Raises:
        OSError: the folder or a file in it cannot be written; what is finished stays.
        KeyboardInterrupt: passed on; every run is then recorded whole or not at all.
    """
    listener = listener or Listener()
    missing = sum(len(job.missing(clip)) for clip in job.clips)
    total = len(job.clips) * len(job.cases)
    listener.started(total, total - missing)
    if job.stage is None:
        return 0
    for folder in (job.request.out / "videos", job.request.out / "reference"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder)
    runner = _Runner(job, job.stage, listener)
    for clip in job.clips:
        if job.missing(clip):
            runner.compare(clip)
    job.record.write()
    return runner.made


class _Runner:
    """Makes the runs of one prompt and seed after another."""

    def __init__(self, job: Job, stage: Stage, listener: Listener) -> None:
        self.job, self.stage, self.listener, self.made = job, stage, listener, 0
        self._warm: set[str] = set()
        self._broken: set[str] = set()

    def compare(self, clip: Clip) -> None:
        """Make the runs that `clip` lacks, against its dense video, which is rendered if it is not there whole."""
        found = _reference(self.job, clip)
        if found is None:
            found = self._attempt(DENSE, clip, None)
        if found is None:
            return
        for case in self.job.missing(clip):
            if case.label not in self._broken and case is not DENSE:
                self._attempt(case, clip, found)

    def _attempt(self, case: Case, clip: Clip, dense: _Dense | None) -> _Dense | None:
        """Render, compare and record; of the dense case, what the others are compared with."""
        job = self.job
        seed = (clip.seed + job.request.num_samples) % (1 << 63) if case.other_noise else clip.seed
        try:
            if case.label not in self._warm:
                self.listener.rendering(f"{case.label}: warm-up")
                self.stage.warm_up(case.schedule, clip.prompt, job.settings["steps"])
                self._warm.add(case.label)
            self.listener.rendering(f"{case.label}: {clip.stem}")
            rendering = self.stage.render(case.schedule, clip.prompt, seed, trace=job.request.trace)
            frames = to_uint8(rendering.frames)
            dense = dense or _Dense(frames, rendering.seconds, _digest(frames), _file(job, DENSE, clip, "reference"))
            line = _line(job, case, clip, seed, rendering, dense) | _fidelity(job, frames, dense.frames)
        # A method can fail in any way, and what the others give is still wanted.
        except Exception as error:  # noqa: BLE001
            self._broken.add(case.label)
            job.record.fail(case.label, clip.prompt, clip.seed, error)
            self.listener.failed(clip, case, error)
            free_memory()
            return None
        if rendering.trace is not None:
            line["trace"] = f"videos/{Path(line['video']).stem}.trace.json"
            write_report(rendering.trace, job.request.out / line["trace"])
        self._write(case, clip, frames, line, dense)
        return dense

    def _write(self, case: Case, clip: Clip, frames: np.ndarray, line: dict[str, Any], dense: _Dense) -> None:
        # The line comes last: files without their line are not counted, and are replaced.
        out, fps = self.job.request.out, self.job.settings["fps"]
        if case is DENSE:
            write_video(frames, out / dense.file, format="png", fps=fps)
            self.job.record.drop(clip.prompt, clip.seed, but=dense.digest)
        write_video(frames, out / line["video"], format=self.job.settings["format"], fps=fps)
        self.job.record.add(line)
        self.made += 1
        self.listener.finished(clip, line)


@dataclass(frozen=True)
class _Dense:
    """The dense video of a prompt and seed: frames `[T, H, W, 3]` uint8, and the name of its lossless copy."""

    frames: np.ndarray
    seconds: float
    digest: str
    file: str


def _reference(job: Job, clip: Clip) -> _Dense | None:
    """The recorded dense video of `clip`; `None` where it is not there, or not what was recorded."""
    line = job.record.find(DENSE, clip.prompt, clip.seed)
    if line is None:
        return None
    try:
        frames = read_clip(job.request.out / line["reference"]).frames
    except ValueError:
        return None
    digest = _digest(frames)
    if digest != line["reference_sha256"]:
        return None
    return _Dense(frames, line["seconds"], digest, line["reference"])


def _line(job: Job, case: Case, clip: Clip, seed: int, rendering: Rendering, dense: _Dense) -> dict[str, Any]:
    """What is recorded of a run, but for its fidelity."""
    done = rendering.statistics
    return {
        "key": job.record.key(case, clip.prompt, clip.seed),
        "label": case.label,
        "kind": case.kind,
        "method": None if case.schedule is None else case.schedule.method.name,
        "density": case.density,
        "config": case.config,
        "prompt": clip.prompt,
        "seed": clip.seed,
        "noise_seed": seed,
        "session": job.record.session,
        "seconds": rendering.seconds,
        "dense_seconds": dense.seconds,
        "speedup": dense.seconds / rendering.seconds,
        "achieved_density": done.get("density", 1.0),
        "sparse_density": done.get("sparse_density"),
        **{name: done.get(name) for name in ("calls", "dense_calls", "receipts", "backends")},
        **{name: done.get(name) for name in ("attention_seconds", "plan_seconds")},
        "video": _file(job, case, clip, "videos"),
        "reference": dense.file,
        "reference_sha256": dense.digest,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _fidelity(job: Job, frames: np.ndarray, dense: np.ndarray) -> dict[str, Any]:
    """The figures of every convention; both videos as 8-bit frames, so that a resumed run measures the same."""
    import torch

    a, b = (torch.from_numpy(x).to(job.settings["device"]) for x in (frames, dense))
    found = {c.name: compare(a, b, convention=c, lpips=job.lpips).to_dict() for c in job.conventions}
    first = found[job.conventions[0].name]
    shared = ("identical", "identical_frames", "frames")
    figures = ("psnr", "ssim", *(("lpips",) if job.lpips else ()))
    each = {name: {figure: own[figure] for figure in figures} for name, own in found.items()}
    return {name: first[name] for name in (*figures, *shared)} | {"fidelity": each}


def _file(job: Job, case: Case, clip: Clip, folder: str) -> str:
    """The name of a run's video, or of the dense video's lossless copy, in the folder of the comparison."""
    format = job.settings["format"] if folder == "videos" else "png"
    ending = extension(format, job.settings["frames"])
    # The key keeps files apart whose prompts or labels are alike up to their slugs.
    key = job.record.key(case, clip.prompt, clip.seed)[:8]
    return f"{folder}/{clip.stem}-{slug(case.label, 40)}-{key}{ending}"


def _settings(request: Request, values: Mapping[str, Any]) -> dict[str, Any]:
    device = models.resolve_device(request.device)
    return {
        "model": models.model_name(request.model),
        **values,
        "negative_prompt": request.negative_prompt,
        "dtype": models.resolve_dtype(request.dtype, device),
        "device": device,
        "offload": request.offload,
        "format": request.format or ("png" if values["frames"] == 1 else "mp4"),
        "fps": request.fps or models.default_fps(request),
    }


def _environment(device: str, commit: str | None) -> dict[str, Any]:
    import torch

    found = environment(torch.device(device))
    # A checkout that is not installed has a version too.
    return found | {"dit-sparse": __version__, "commit": found["commit"] or commit}


def _stage(pipe: Any, request: Request, settings: Mapping[str, Any], cases: Sequence[Case]) -> Stage:
    from dit_sparse.pipelines import check

    models.pipeline_defaults(request, pipe)
    size = (settings["height"], settings["width"], settings["frames"])
    for case in cases:
        if case.schedule is not None:
            try:
                check(pipe, case.schedule, *size)
            except ValueError as error:
                raise ValueError(f"{case.label}: {error}") from None
    values = {name: settings[name] for name in ("height", "width", "frames", "steps", "guidance")}
    negative = settings["negative_prompt"]
    texts = {} if negative is None else {"negative_prompt": negative}
    return Stage(pipe, models.call_arguments(pipe, values) | texts)


def _refuse_prompts_alike(prompts: Sequence[str]) -> None:
    for number, prompt in enumerate(prompts):
        if prompt in prompts[:number]:
            raise ValueError(f"two prompts alike: {prompt!r}; a prompt is compared with more seeds by --num-samples")


def _digest(frames: np.ndarray) -> str:
    return hashlib.sha256(frames.tobytes()).hexdigest()
