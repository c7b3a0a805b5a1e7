"""Scores videos on the workers of a Ray cluster: a job to each, in a process of VBench on the worker's machine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from dit_sparse.cluster import ActorPool, WorkerLost, connect
from dit_sparse.vbench.job import JobReport, ScoreJob, run_job
from dit_sparse.vbench.scoring import Told

__all__ = ["RayRunner"]


class RayRunner:
    """A `Runner` over a cluster; a context manager, which ends its workers.

    All machines must see the same videos, weights, environment of VBench and folder of scores, by the same paths.

    Args:
        address: of the cluster, as `connect` takes it.
        device, workers: as `ActorPool` takes them.

    Raises:
        ValueError: no ray, no such cluster, or a device that it does not have.
    """

    def __init__(self, address: str = "auto", *, device: str = "auto", workers: int | None = None) -> None:
        self._connected = connect(address)
        try:
            self._pool = ActorPool(_Worker, device=device, workers=workers)
        except BaseException:
            self._disconnect()
            raise
        self.workers = self._pool.workers

    def __enter__(self) -> RayRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.close()
        self._disconnect()

    def __call__(self, jobs: Sequence[ScoreJob], told: Told) -> Generator[JobReport, None, None]:
        """See `Runner`; videos are told of when their job is done."""
        for index, result in self._pool.map("run", [(job,) for job in jobs]):
            if isinstance(result, WorkerLost):
                yield JobReport(jobs[index], (), (), str(result))
                continue
            if isinstance(result, Exception):
                raise result
            for name in result.scored:
                told(result.job, name, None)
            for name, error in result.failures:
                told(result.job, name, error)
            yield result

    def _disconnect(self) -> None:
        import ray

        if self._connected:
            ray.shutdown()


class _Worker:
    """What an actor holds. Its process of VBench leaves when it dies."""

    def __init__(self, device: str) -> None:
        self._device = device

    def run(self, job: ScoreJob) -> JobReport:
        """Score what a worker before, which died of it, has not scored."""
        done = [item.name for item in job.items if Path(item.out).exists()]
        left = tuple(item for item in job.items if item.name not in done)
        if not left:
            return JobReport(job, tuple(done), (), None)
        report = run_job(replace(job, items=left, device=self._device))
        return replace(report, job=job, scored=(*done, *report.scored))
