"""Scores the videos of a survey that have no result yet, a process of VBench a job."""

from __future__ import annotations

import contextlib
import queue
import subprocess
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dit_sparse.partials import remove_partials
from dit_sparse.vbench.dimensions import FILTER, Dimension
from dit_sparse.vbench.job import JobReport, ScoreItem, ScoreJob, run_job
from dit_sparse.vbench.preflight import FLICKERING, Survey
from dit_sparse.vbench.prompts import SAMPLES
from dit_sparse.vbench.results import DimensionPlan, read_result, result_file, result_key, write_plan
from dit_sparse.vbench.weights import weights_hash

__all__ = ["Listener", "Outcome", "Runner", "Told", "parse_devices", "score"]


class Listener:
    """Is told how scoring goes; the methods do nothing unless overridden."""

    def started(self, todo: int, done: int) -> None:
        """Before the jobs of a stage: results to make, and results that are there."""

    def scored(self, dimension: str, name: str) -> None:
        """After a video has its result."""

    def failed(self, dimension: str, name: str, error: str) -> None:
        """After a video could not be scored, or (with no name) a process failed."""


@dataclass
class Outcome:
    """How many results were made and how many were there, and lines on what failed."""

    made: int = 0
    done: int = 0
    failures: list[str] = field(default_factory=list)


def parse_devices(text: str) -> tuple[str, ...]:
    """The devices in a text such as "cuda:0,cuda:1"; "auto" is every GPU, or else the CPU.

    Raises:
        ValueError: no such device, or not here.
    """
    import torch

    from dit_sparse.generate.models import resolve_device

    count = torch.cuda.device_count()
    if text == "auto":
        return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)
    return tuple(resolve_device(name) for name in text.split(","))


def score(
    found: Survey,
    out: Path,
    *,
    devices: Sequence[str] = ("cpu",),
    shards: int = 1,
    listener: Listener | None = None,
    run: Callable[..., JobReport] = run_job,
    runner: Runner | None = None,
) -> Outcome:
    """Score the videos of `found` into the folder `out`; a result that is there is not made again.

    Args:
        devices: where jobs run, one at a time on each.
        shards: processes that a dimension's videos are divided among.
        run: runs a job, as `run_job` does.
        runner: runs the jobs of a stage, on other machines for example, instead of `run` on `devices`.

    Raises:
        ValueError: the survey found what keeps VBench from running, or videos that are not complete.
        OSError: `out` cannot be written.
        KeyboardInterrupt: passed on; every result is then whole or not there.
    """
    lines = (*found.blocking, *(() if found.request.allow_partial else found.incomplete))
    if lines:
        more = f" (and {len(lines) - 1} more; `dit-sparse vbench check` names all)" if len(lines) > 1 else ""
        raise ValueError(f"{lines[0]}{more}")
    out.mkdir(parents=True, exist_ok=True)
    stage = _Stage(found, out, shards, listener or Listener(), runner or _OnDevices(tuple(devices), run))
    plans = [_plan(found, dimension, out, found.usable(dimension)) for dimension in found.dimensions]
    if found.filters:
        judged = _plan(found, FILTER, out, found.usable(FILTER))
        stage.do([judged])
        plans = [
            _of_still_videos(found, out, plan, judged) if plan.dimension == FLICKERING.name else plan for plan in plans
        ]
    stage.do(plans)
    return stage.outcome


Told = Callable[[ScoreJob, str, str | None], None]
Runner = Callable[[Sequence[ScoreJob], Told], Generator[JobReport, None, None]]
"""Runs jobs and gives their reports as they get ready; tells of each video's job, name, and error, if it has one."""


@dataclass(frozen=True)
class _OnDevices:
    """Runs jobs in processes of this machine, one at a time on each device."""

    devices: tuple[str, ...]
    run: Callable[..., JobReport]

    def __call__(self, jobs: Sequence[ScoreJob], told: Told) -> Generator[JobReport, None, None]:
        free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in self.devices:
            free.put(device)
        processes: list[subprocess.Popen[str]] = []

        def on_a_device(job: ScoreJob) -> JobReport:
            device = free.get()
            try:
                return self.run(replace(job, device=device), told=partial(told, job), started=processes.append)
            finally:
                free.put(device)

        with ThreadPoolExecutor(len(self.devices)) as pool:
            futures = [pool.submit(on_a_device, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    process.kill()
                raise


@dataclass
class _Stage:
    found: Survey
    out: Path
    shards: int
    listener: Listener
    runner: Runner
    outcome: Outcome = field(default_factory=Outcome)

    def do(self, plans: Iterable[DimensionPlan]) -> None:
        """Keep the plans and make the results that they lack."""
        jobs: list[ScoreJob] = []
        done = 0
        for plan in plans:
            write_plan(self.out, plan)
            remove_partials(self.out / plan.dimension)
            todo = [name for name, key in plan.keys.items() if read_result(self.out, plan.dimension, key) is None]
            done += len(plan.keys) - len(todo)
            jobs += _jobs(self.found, plan, self.out, todo, self.shards)
        self.outcome.done += done
        self.listener.started(sum(len(job.items) for job in jobs), done)
        with contextlib.closing(self.runner(jobs, self._told)) as reports:
            for report in reports:
                self._note(report)

    def _told(self, job: ScoreJob, name: str, error: str | None) -> None:
        if error is None:
            self.listener.scored(job.dimension, name)
        else:
            self.listener.failed(job.dimension, name, error)

    def _note(self, report: JobReport) -> None:
        name = report.job.dimension
        self.outcome.made += len(report.scored)
        self.outcome.failures += [f"{name}: {video}: {error}" for video, error in report.failures]
        if report.error is not None:
            self.outcome.failures.append(f"{name}, shard {report.job.shard}: {report.error}")
            self.listener.failed(name, "", report.error)


def _plan(found: Survey, dimension: Dimension, out: Path, names: Iterable[str]) -> DimensionPlan:
    weights = weights_hash(dimension, found.weights, out / "hashes")
    wanted, missing, unsuited = found.wanted[dimension.name], set(found.missing), found.unsuited[dimension.name]
    keys = {n: result_key(dimension, found.facts[n].sha256, weights, found.videos[n].prompt) for n in names}
    return DimensionPlan(
        dimension=dimension.name,
        custom=found.request.custom,
        keys=keys,
        missing=tuple(name for name in wanted if name in missing),
        unusable=(*(found.unusable[name] for name in wanted if name in found.unusable), *unsuited.values()),
        weights=weights,
    )


def _of_still_videos(found: Survey, out: Path, plan: DimensionPlan, judged: DimensionPlan) -> DimensionPlan:
    """`plan` for the first `SAMPLES` still videos of each prompt, which are those that VBench's filter copies."""
    still: dict[str, list[str]] = {found.videos[name].prompt.text: [] for name in judged.keys}
    unjudged = []
    # VBench goes through the files by name, so that -10 comes before -2.
    for name in sorted(judged.keys, key=lambda name: found.videos[name].path.name):
        kept = still[found.videos[name].prompt.text]
        result = read_result(out, FILTER.name, judged.keys[name])
        if result is None:
            unjudged.append(name)
        elif result["score"] == 1 and len(kept) < SAMPLES:
            kept.append(name)
    names = {name for kept in still.values() for name in kept}
    summary = {
        "judged": len(judged.keys) - len(unjudged),
        "kept": len(names),
        "unjudged": unjudged,
        "prompts_without": [prompt for prompt, kept in still.items() if not kept],
    }
    keys = {name: key for name, key in plan.keys.items() if name in names}
    return replace(plan, keys=keys, static_filter=summary)


def _jobs(found: Survey, plan: DimensionPlan, out: Path, todo: Sequence[str], shards: int) -> list[ScoreJob]:
    items = [_item(found, plan, out, name) for name in todo]
    return [
        ScoreJob(
            dimension=plan.dimension,
            shard=shard + 1,
            items=tuple(items[shard::shards]),
            python=str(found.environment.python),
            weights=str(found.weights),
            log=str((out / "logs" / f"{plan.dimension}-{shard + 1}.log").absolute()),
        )
        for shard in range(min(shards, len(items)))
    ]


def _item(found: Survey, plan: DimensionPlan, out: Path, name: str) -> ScoreItem:
    video, facts = found.videos[name], found.facts[name]
    record: Mapping[str, Any] = {
        "name": name,
        "sha256": facts.sha256,
        "dimension": plan.dimension,
        "vbench": plan.version,
        "weights": plan.weights,
        "prompt": video.prompt.text,
    }
    return ScoreItem(
        name=name,
        path=str(video.path.absolute()),
        prompt=video.prompt.text,
        auxiliary=video.prompt.auxiliary,
        out=str(result_file(out, plan.dimension, plan.keys[name]).absolute()),
        record=record,
    )
