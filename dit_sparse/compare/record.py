"""The record of a comparison, `compare.json`: rewritten whole after every run, so that it is never half-written."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_sparse.bench.report import write_report
from dit_sparse.compare.cases import Case
from dit_sparse.compare.summary import summarize
from dit_sparse.partials import replacing

__all__ = ["CSV", "RECORD", "VERSION", "Record", "read_record"]

RECORD, CSV = "compare.json", "compare.csv"
VERSION = 1
_COLUMNS = (
    *("label", "kind", "method", "density", "prompt", "seed", "noise_seed", "session", "seconds", "dense_seconds"),
    *("speedup", "achieved_density", "sparse_density", "psnr", "ssim", "identical", "identical_frames", "frames"),
    *("attention_seconds", "plan_seconds", "video", "made"),
)


class Record:
    """The runs of a folder, each with its video.

    Args:
        folder: where `compare.json` is, or will be.
        settings: model, size, steps and the like, in which all runs of a folder agree.
        environment: device, versions and commit, likewise.
        conventions: how the figures are defined, by name, likewise.

    Raises:
        ValueError: the folder holds no record of ours, or one of other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        conventions: Mapping[str, str],
    ) -> None:
        self.folder = folder
        agreed = {"settings": dict(settings), "environment": dict(environment), "conventions": dict(conventions)}
        self._content: dict[str, Any] = {"version": VERSION, **agreed, "runs": [], "failed": [], "summary": []}
        if (folder / RECORD).exists():
            self._content = read_record(folder) | {"failed": []}
            _check_agreement(self._content, agreed, folder)
        self.session = 1 + max((run["session"] for run in self.runs), default=0)

    @property
    def runs(self) -> list[dict[str, Any]]:
        """All runs, in the order in which they were made."""
        return self._content["runs"]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """What could not be made in this session."""
        return self._content["failed"]

    def key(self, case: Case, prompt: str, seed: int) -> str:
        """Hash that two runs share only if they are the same run."""
        content = [self._content["settings"], prompt, seed, case.config, case.other_noise]
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]

    def find(self, case: Case, prompt: str, seed: int) -> dict[str, Any] | None:
        """The finished run of `case`: its line, if its video is there too."""
        key = self.key(case, prompt, seed)
        found = next((run for run in self.runs if run["key"] == key), None)
        return found if found is not None and (self.folder / found["video"]).exists() else None

    def check_labels(self, cases: list[Case]) -> None:
        """Raise ValueError where a label stands for another config in the runs that are there."""
        for case in cases:
            for run in self.runs:
                if run["label"] == case.label and run["config"] != _plain(case.config):
                    raise ValueError(
                        f"--out {self.folder}: {case.label!r} stands for other settings there; give another --out"
                    )

    def drop(self, prompt: str, seed: int, but: str) -> None:
        """Forget the runs of `prompt` and `seed`, but those that were compared with the dense video of digest `but`."""
        pair = (prompt, seed)
        runs = [run for run in self.runs if (run["prompt"], run["seed"]) != pair or run["reference_sha256"] == but]
        self._content["runs"] = runs

    def add(self, run: Mapping[str, Any]) -> None:
        """Add `run`, in place of one of the same key, and write.

        Raises:
            ValueError: NaN or infinity in it.
            OSError: the files cannot be written.
        """
        json.dumps(run, allow_nan=False)
        self._content["runs"] = [*(other for other in self.runs if other["key"] != run["key"]), dict(run)]
        self.write()

    def fail(self, label: str, prompt: str, seed: int, error: Exception) -> None:
        """Note that a run could not be made, and write."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        self.failed.append({"label": label, "prompt": prompt, "seed": seed, "error": text})
        self.write()

    def write(self) -> None:
        """Write `compare.json` and `compare.csv`, each through a temporary name."""
        self._content["summary"] = summarize(self.runs)
        write_report(self._content, self.folder / RECORD)
        _write_csv(self.runs, self.folder / CSV)

    def to_dict(self) -> dict[str, Any]:
        """What `compare.json` holds."""
        return self._content


def read_record(folder: Path) -> dict[str, Any]:
    """What `compare.json` in `folder` holds.

    Raises:
        ValueError: it is not there, or is no record of ours.
    """
    path = folder / RECORD
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no comparison in {folder}: there is no {RECORD}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a comparison: {error}") from None
    if not isinstance(content, dict) or not {"settings", "environment", "conventions", "runs"} <= content.keys():
        raise ValueError(f"{path} is no comparison; move it away or give another --out")
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}, and {VERSION} is read here")
    for run in content["runs"]:
        # A name that leads out of the folder is not one of ours.
        if not isinstance(run, dict) or not all(_inside(run.get(name)) for name in ("video", "reference")):
            raise ValueError(f"{path} holds a run that is none of ours; move it away or give another --out")
    return content


def _inside(name: Any) -> bool:
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _check_agreement(content: Mapping[str, Any], agreed: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    for part, now in agreed.items():
        was = content[part]
        for name in {**now, **was}:
            if was.get(name) != _plain(now.get(name)):
                raise ValueError(
                    f"--out {folder} was made with {name} {was.get(name)!r}, got {now.get(name)!r}: give another --out"
                )


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back."""
    return json.loads(json.dumps(value))


def _write_csv(runs: list[dict[str, Any]], path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        # JSON has no infinity; CSV's readers know "inf".
        writer.writerow(run | {"psnr": "inf" if run["psnr"] is None else run["psnr"]})
    with replacing(path) as partial:
        partial.write_text(text.getvalue(), "utf-8")
