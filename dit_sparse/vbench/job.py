"""One process of VBench: the videos of a dimension, or of a shard of it, on one device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_sparse.partials import partial_path
from dit_sparse.vbench.weights import VARIABLE

__all__ = ["JobReport", "ScoreItem", "ScoreJob", "run_job"]

_WORKER = Path(__file__).with_name("worker.py")
_SOME_FAILED = 3


@dataclass(frozen=True)
class ScoreItem:
    """A video to score.

    Args:
        name: the file's name.
        path: absolute.
        prompt, auxiliary: what the dimension may ask for beside it.
        out: file for the result.
        record: what the result file tells beside the score.
    """

    name: str
    path: str
    prompt: str
    auxiliary: Mapping[str, Any]
    out: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class ScoreJob:
    """The work of one process; plain data, so that it can be sent to another machine that sees the same files.

    Args:
        dimension: its name, or `static_filter`.
        shard: which part of the dimension's videos this is, from 1.
        python: of VBench's environment.
        weights: folder of VBench's weights.
        log: file for what VBench prints.
        device: "cpu", "cuda", or "cuda:N" for one of the GPUs that this process sees.
    """

    dimension: str
    shard: int
    items: tuple[ScoreItem, ...]
    python: str
    weights: str
    log: str
    device: str = "cpu"


@dataclass(frozen=True)
class JobReport:
    """What became of a job: videos scored, those that failed with why, and why the process itself failed, if it did."""

    job: ScoreJob
    scored: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]
    error: str | None


def run_job(
    job: ScoreJob,
    told: Callable[[str, str | None], None] = lambda name, error: None,
    started: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> JobReport:
    """Score the videos of `job` in a process of their own, each into its own file.

    Args:
        told: is called with the name of every video when it is scored, and with the error where it could not be.
        started: is called with the process.
    """
    scored: list[str] = []
    failures: list[tuple[str, str]] = []
    log = Path(job.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dit-sparse-vbench-") as scratch, log.open("w", encoding="utf-8") as errors:
        description = Path(scratch) / "job.json"
        device = job.device.partition(":")[0]
        videos = [asdict(item) | {"partial": str(partial_path(Path(item.out)))} for item in job.items]
        content = {"dimension": job.dimension, "device": device, "videos": videos}
        description.write_text(json.dumps(content), encoding="utf-8")
        # -I: neither this folder nor the caller's PYTHONPATH is seen by VBench. It leaves when standard input closes.
        with subprocess.Popen(
            [job.python, "-I", _WORKER, description],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(job),
            cwd=scratch,
        ) as process:
            started(process)
            for line in process.stdout or ():
                event = json.loads(line)
                if "error" in event:
                    failures.append((event["name"], event["error"]))
                else:
                    scored.append(event["name"])
                told(event["name"], event.get("error"))
            code = process.wait()
    return JobReport(job, tuple(scored), tuple(failures), _error(job, code, len(scored) + len(failures)))


def _environment(job: ScoreJob) -> dict[str, str]:
    kind, _, index = job.device.partition(":")
    environment = os.environ | {VARIABLE: job.weights, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if kind == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif index:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(index)] if seen else index
    return environment


def _error(job: ScoreJob, code: int, told: int) -> str | None:
    """Why the process failed: VBench's own command line does not look at the exit status of what it starts."""
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    if code not in (0, _SOME_FAILED):
        lines = Path(job.log).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"exit status {code}: {last} (all of it: {job.log})"
    return f"it told of {told} of {len(job.items)} videos" if told != len(job.items) else None
