"""Renders one video at a time with a loaded pipeline, and says what was run."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from dit_sparse.generate import models
from dit_sparse.generate.call import free_memory, interrupt_after, render_frames, sparsified, warm_up_steps
from dit_sparse.generate.listener import Listener
from dit_sparse.generate.request import Clip, Request, Settings
from dit_sparse.generate.video import extension, to_uint8, write_partial
from dit_sparse.partials import partial_path

if TYPE_CHECKING:
    from dit_sparse.pipelines import Trace

__all__ = ["Drawn", "Executor", "Failed", "LocalExecutor", "Rendered", "Renderer"]


@dataclass(frozen=True)
class Rendered:
    """A video that is written under a name of its own, and its manifest line but for the names of files.

    Args:
        partial: the video.
        others: what is to lie beside it, by key of the manifest line: the end of its name, and the file as yet.
    """

    clip: Clip
    line: dict[str, Any]
    partial: Path
    others: Mapping[str, tuple[str, Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A video that could not be made, and why."""

    clip: Clip
    error: Exception


class Executor(Protocol):
    """Where the videos of a request are rendered.

    `device` is what they are rendered on: "cpu", "cuda" or "cuda:N".
    """

    device: str

    def defaults(self) -> dict[str, Any]:
        """Size, steps and guidance, with the model's own where the request leaves them open."""

    def check(self, settings: Settings) -> None:
        """Make sure that the model can be loaded and takes `settings`; raises ValueError or OSError."""

    def render(self, settings: Settings, clips: Sequence[Clip], listener: Listener) -> Iterator[Rendered | Failed]:
        """Render `clips`, in whatever order they get ready; raises OSError where a file cannot be written."""


class Renderer:
    """Renders the clips of a request with one pipeline, which is loaded when it is first needed.

    Raises:
        ValueError: the request's config is no schedule.
    """

    def __init__(self, request: Request) -> None:
        from dit_sparse.schedule import Schedule

        self.request = request
        self.schedule = Schedule.from_config(dict(request.config))
        self._warm = not request.compare_dense

    @cached_property
    def pipe(self) -> Any:
        """The loaded pipeline."""
        return models.load_model(self.request)

    def load(self) -> None:
        """Load the pipeline now; raises ValueError or OSError where that cannot be."""
        _ = self.pipe

    def defaults(self) -> dict[str, Any]:
        """See `Executor.defaults`."""
        return models.pipeline_defaults(self.request, self.pipe)

    def check(self, settings: Settings) -> None:
        """See `Executor.check`."""
        from dit_sparse.pipelines import check

        models.pipeline_defaults(self.request, self.pipe)
        check(self.pipe, self.schedule, settings.height, settings.width, settings.frames)

    def render(self, settings: Settings, clip: Clip, partial: Path, listener: Listener) -> Rendered | Failed:
        """Render `clip` and write it to `partial`.

        Raises:
            OSError: it cannot be written.
        """
        drawn = self.draw(settings, clip, listener)
        if isinstance(drawn, Failed):
            return drawn
        return Rendered(clip, drawn.line, partial, _write(settings, drawn, partial))

    def draw(self, settings: Settings, clip: Clip, listener: Listener) -> Drawn | Failed:
        """Render `clip`, and write nothing."""
        try:
            if not self._warm:
                _warm_up(self, settings, clip, listener)
                self._warm = True
            return _draw(self, settings, clip, listener)
        # A model can fail on one prompt in any way, and the other prompts are still wanted.
        except Exception as error:  # noqa: BLE001
            free_memory()
            return Failed(clip, error.with_traceback(None))


class LocalExecutor:
    """Renders one clip after another in this process, with a renderer of its own unless one is given."""

    def __init__(self, request: Request, renderer: Renderer | None = None) -> None:
        self.renderer = renderer or Renderer(request)
        self.device = models.resolve_device(request.device)
        self.defaults = self.renderer.defaults
        self.check = self.renderer.check

    def render(self, settings: Settings, clips: Sequence[Clip], listener: Listener) -> Iterator[Rendered | Failed]:
        """See `Executor.render`."""
        for clip in clips:
            partial = partial_path(self.renderer.request.out / partial_name(settings, clip))
            yield self.renderer.render(settings, clip, partial, listener)


def partial_name(settings: Settings, clip: Clip) -> str:
    """The name that `clip` has before the manifest says how its file is called."""
    return clip.stem + extension(settings.format, settings.frames)


class Drawn(NamedTuple):
    """Frames `[T, H, W, 3]` uint8 of a clip, its manifest line, the frames of the dense rendering, the trace."""

    frames: np.ndarray
    line: dict[str, Any]
    dense: np.ndarray | None
    trace: dict[str, Any] | None


def _draw(renderer: Renderer, settings: Settings, clip: Clip, listener: Listener) -> Drawn:
    with sparsified(renderer.pipe, renderer.schedule):
        with _tracing(renderer) as recorder:
            frames, seconds = _render(renderer, settings, clip, "sparse", listener)
        line = _line(renderer, settings, clip, seconds)
        trace = None if recorder is None else recorder.to_dict()
    pixels, dense_pixels = to_uint8(frames), None
    if renderer.request.compare_dense:
        with _dense(renderer):
            dense, dense_seconds = _render(renderer, settings, clip, "dense", listener)
        line |= _comparison(frames, dense, seconds, dense_seconds)
        dense_pixels = to_uint8(dense)
    return Drawn(pixels, line, dense_pixels, trace)


def _write(settings: Settings, drawn: Drawn, partial: Path) -> dict[str, tuple[str, Path]]:
    """Write everything under partial names; returns all but the video, as `Rendered.others`."""
    others = {}
    ending = extension(settings.format, settings.frames)
    if drawn.trace is not None:
        others["trace"] = (".trace.json", partial.with_name(partial.name + ".trace"))
        others["trace"][1].write_text(json.dumps(drawn.trace, allow_nan=False) + "\n", "utf-8")
    if drawn.dense is not None:
        others["dense_file"] = (f".dense{ending}", partial.with_name(f"{partial.name}.dense{ending}"))
        write_partial(drawn.dense, others["dense_file"][1], format=settings.format, fps=settings.fps)
    write_partial(drawn.frames, partial, format=settings.format, fps=settings.fps)
    return others


def _tracing(renderer: Renderer) -> AbstractContextManager[Trace | None]:
    from dit_sparse.pipelines import record_trace

    return record_trace(renderer.pipe) if renderer.request.trace else nullcontext()


def _warm_up(renderer: Renderer, settings: Settings, clip: Clip, listener: Listener) -> None:
    """The first steps, sparse and dense, so that neither timing pays for compilation and first allocations."""
    with sparsified(renderer.pipe, renderer.schedule):
        _render(renderer, settings, clip, "warm-up", listener, warm_up_steps(renderer.schedule, settings.steps))
    with _dense(renderer):
        _render(renderer, settings, clip, "warm-up", listener, warm_up_steps(None, settings.steps))


def _dense(renderer: Renderer) -> AbstractContextManager[None]:
    """Within it attention is dense: the model's own, or on several ranks our exchange around it."""
    from dit_sparse.methods import Dense
    from dit_sparse.schedule import Schedule

    return nullcontext() if renderer.request.parallel is None else sparsified(renderer.pipe, Schedule(Dense()))


def _render(
    renderer: Renderer, settings: Settings, clip: Clip, what: str, listener: Listener, steps: int | None = None
) -> tuple[np.ndarray, float]:
    """Frames `[T, H, W, 3]` float in [0, 1] of `clip`, and the wall time in seconds, decoding included.

    With `steps` the run ends after so many of its own.
    """
    listener.rendering(clip, what, steps or settings.steps)
    arguments = _arguments(renderer.pipe, settings, clip) | {"callback_on_step_end": _step_callback(listener, steps)}
    return render_frames(renderer.pipe, arguments, clip.seed)


def _arguments(pipe: Any, settings: Settings, clip: Clip) -> dict[str, Any]:
    values = {name: getattr(settings, name) for name in ("height", "width", "frames", "steps", "guidance")}
    texts = {"prompt": clip.prompt, "negative_prompt": settings.negative_prompt}
    return models.call_arguments(pipe, values) | {name: text for name, text in texts.items() if text is not None}


def _step_callback(listener: Listener, steps: int | None) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    interrupt = None if steps is None else interrupt_after(steps - 1)

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        listener.stepped()
        return tensors if interrupt is None else interrupt(pipe, step, timestep, tensors)

    return callback


def _line(renderer: Renderer, settings: Settings, clip: Clip, seconds: float) -> dict[str, Any]:
    """The manifest line of a video just rendered, read before the pipeline is restored."""
    from dit_sparse.pipelines import statistics

    run_statistics = statistics(renderer.pipe)
    return {
        "prompt": clip.prompt,
        "seed": clip.seed,
        "negative_prompt": settings.negative_prompt,
        "model": settings.model,
        "method": renderer.schedule.method.name,
        "config": dict(settings.config),
        "height": settings.height,
        "width": settings.width,
        "frames": settings.frames,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "dtype": settings.dtype,
        "device": models.resolve_device(renderer.request.device),
        "offload": renderer.request.offload,
        "parallel": renderer.request.parallel,
        "format": settings.format,
        "fps": settings.fps,
        "seconds": seconds,
        "attention_density": run_statistics.density,
        "sparse_density": run_statistics.sparse_density,
        "calls": run_statistics.calls,
        "dense_calls": dict(run_statistics.dense_calls),
        "receipts": run_statistics.receipts(),
        "attention_seconds": run_statistics.attention_seconds,
        "plan_seconds": run_statistics.plan_seconds,
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
