"""Runs diffusers' own pipeline tests on our pipelines at density 1.

python scripts/run_upstream_tests.py --diffusers CHECKOUT [--out report.json] [--method adaspa] [TESTS ...]

CHECKOUT is a clone of diffusers, of which only `tests/` is read: the installed diffusers is what runs. Nothing is
fetched: what the tests want from the hub is made by `upstream_plugin.py`. A test that fails is run again on diffusers'
own pipelines; where it fails there too, as one does that compares with pixels made with the hub's files, it is left out
and listed. The tests need the packages `parameterized` and `requests_mock`. Exit code 1 if a test passes on diffusers'
pipelines and not on ours, and is not one of those that we refuse by design.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "wan/test_wan.py",
    "wan/test_wan_22.py",
    "wan/test_wan_image_to_video.py",
    "wan/test_wan_22_image_to_video.py",
    "wan/test_wan_video_to_video.py",
    "cogvideo/test_cogvideox.py",
    "cogvideo/test_cogvideox_image2video.py",
    "cogvideo/test_cogvideox_video2video.py",
    "cogvideo/test_cogvideox_fun_control.py",
    "hunyuan_video/test_hunyuan_video.py",
    "hunyuan_video/test_hunyuan_image2video.py",
    "hunyuan_video/test_hunyuan_skyreels_image2video.py",
    "flux/test_pipeline_flux.py",
    "flux/test_pipeline_flux_control.py",
    "flux/test_pipeline_flux_fill.py",
    "flux/test_pipeline_flux_img2img.py",
    "flux/test_pipeline_flux_inpaint.py",
    "ltx/test_ltx.py",
    "ltx/test_ltx_image2video.py",
)
# Tests of what is refused on a sparse pipeline, by what the refusal says.
REFUSED = ("was replaced after sparsify", "must be made by sparsify")


class Result(NamedTuple):
    """How a test ended: "passed", "failed" or "skipped", and why."""

    outcome: str
    reason: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a clone of diffusers, for its tests")
    parser.add_argument("--method", default="adaspa", help="which method runs at density 1")
    parser.add_argument("--backend", default="auto", help="kernel backend of the sparse calls")
    parser.add_argument("--out", type=Path, help="JSON file for the report")
    parser.add_argument("tests", nargs="*", default=TESTS, help="files under the clone's tests/pipelines")
    options = parser.parse_args()
    if not (options.diffusers / "tests" / "pipelines").is_dir():
        parser.error(f"--diffusers must be a clone of diffusers, got {options.diffusers} without tests/pipelines")
    report: dict[str, Any] = {"versions": versions(options.diffusers), "method": options.method, "files": {}}
    report["backend"] = options.backend
    for file in options.tests:
        report["files"][file] = compare(file, options)
        print(f"{file}: {line(report['files'][file])}", flush=True)
    print("all:", line(*report["files"].values()))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    sys.exit(1 if any(file["failed"] for file in report["files"].values()) else 0)


def compare(file: str, options: argparse.Namespace) -> dict[str, Any]:
    """The tests of `file` by what became of them; those that did not simply pass with their reasons."""
    ours = run([file], options, "sparse")
    failed = [test for test, result in ours.items() if result.outcome == "failed"]
    upstream = run([f"{file}::{test}" for test in failed], options, "upstream") if failed else {}
    groups: dict[str, Any] = {"passed": [], "failed": {}, "refused": {}, "left out": {}, "skipped": {}}
    for test, (outcome, reason) in ours.items():
        if outcome == "passed":
            groups["passed"].append(test)
        elif outcome == "skipped":
            groups["skipped"][test] = reason
        elif any(text in reason for text in REFUSED):
            groups["refused"][test] = reason
        else:
            groups["left out" if upstream[test].outcome == "failed" else "failed"][test] = reason
    return groups


def run(tests: list[str], options: argparse.Namespace, pipelines: str) -> dict[str, Result]:
    """How `tests`, files or single ones, end on `pipelines`, "upstream" or "sparse"."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-p", "upstream_plugin", "-p", "no:cacheprovider", "-q"]
        command += ["--pipelines", pipelines, "--method", options.method, "--backend", options.backend]
        command += [f"--junit-xml={results}", *(f"tests/pipelines/{test}" for test in tests)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=options.diffusers, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1) or not results.is_file():
            sys.exit(f"{tests} cannot be run on {pipelines} pipelines:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return dict(map(read, ElementTree.parse(results).iter("testcase")))


def read(case: ElementTree.Element) -> tuple[str, Result]:
    """Name and end of a test, from its element in pytest's report."""
    name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
    for outcome, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
        for tag in tags:
            found = case.find(tag)
            if found is not None:
                return name, Result(outcome, " ".join(found.get("message", "").split())[:300])
    return name, Result("passed", "")


def line(*files: dict[str, Any]) -> str:
    """Numbers of tests by what became of them."""
    counts = Counter({name: sum(len(file[name]) for file in files) for name in files[0]})
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def versions(clone: Path) -> dict[str, str]:
    """What ran: packages, and the commit of the clone where it is one."""
    names = ("dit-sparse", "diffusers", "transformers", "torch")
    told = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    commit = told.stdout.strip() if told.returncode == 0 and (clone / ".git").exists() else "unknown"
    packages = {name: version(name) for name in names}
    return {"python": platform.python_version(), **packages, "tests of diffusers at": commit}


if __name__ == "__main__":
    main()
