"""VBench's own environment: made by `setup`, found by `find_environment`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dit_sparse.vbench.dimensions import VERSION

__all__ = ["PYTHON_VARIABLE", "Environment", "default_folder", "find_environment", "setup"]

PYTHON_VARIABLE = "DIT_SPARSE_VBENCH_PYTHON"
"""The environment variable that names the Python of VBench's environment."""

PYTHON_VERSION = (3, 11)
"""What `requirements.txt` was resolved for."""

_HERE = Path(__file__).parent
_PROBE = """
import importlib.metadata, importlib.util, json, sys
spec = importlib.util.find_spec("vbench")
print(json.dumps({
    "folder": spec and spec.submodule_search_locations[0],
    "version": spec and importlib.metadata.version("vbench"),
    "missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None],
}))
"""


@dataclass(frozen=True)
class Environment:
    """A Python that has VBench, the info file of its prompts, and which of the packages asked for it lacks."""

    python: Path
    info: Path
    missing: tuple[str, ...] = ()


def default_folder() -> Path:
    """Where `setup` makes the environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dit-sparse" / f"vbench-{VERSION}"


def find_environment(python: Path | None = None, packages: tuple[str, ...] = ()) -> Environment:
    """The environment of `python`, or of what `PYTHON_VARIABLE` names, or the one that `setup` made.

    Raises:
        ValueError: no such Python, or no VBench of the right version in it; the line says how to get it.
    """
    given = python or os.environ.get(PYTHON_VARIABLE)
    path = Path(given) if given else default_folder() / "bin" / "python"
    help = f"`dit-sparse vbench setup` makes one, and --vbench-python or ${PYTHON_VARIABLE} names another"
    if not path.exists():
        raise ValueError(f"no VBench: {path} is missing; {help}")
    try:
        done = subprocess.run([path, "-I", "-c", _PROBE, *packages], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ValueError(f"{path} is no Python that runs: {error}; {help}") from None
    if found["folder"] is None:
        raise ValueError(f"{path} has no VBench; {help}")
    if found["version"] != VERSION:
        raise ValueError(f"{path} has VBench {found['version']}, and {VERSION} is needed; {help}")
    return Environment(path.absolute(), Path(found["folder"]) / "VBench_full_info.json", tuple(found["missing"]))


def setup(folder: Path, *, light: bool = False, python: Path | None = None, report: Callable[[str], None]) -> Path:
    """Make VBench's environment in `folder`, and return its Python; one that is whole is left as it is.

    Args:
        light: for `temporal_flickering` and `dynamic_degree` alone; uses the running environment's torch and OpenCV.
        python: what makes it, of `PYTHON_VERSION`; by default the running one.
        report: is told what is done.

    Raises:
        ValueError: `folder` holds something else, a Python of another version, or a step that failed.
    """
    requirements = _HERE / ("requirements-light.txt" if light else "requirements.txt")
    made_from = hashlib.sha256(f"{requirements.read_text('utf-8')}|{sys.prefix if light else ''}".encode()).hexdigest()
    marker, own = folder / ".ready", folder / "bin" / "python"
    if marker.exists() and marker.read_text("utf-8") == made_from:
        report(f"VBench {VERSION} is ready in {folder}")
        return own
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise ValueError(f"{folder} holds something else than an environment; name an empty folder with --folder")
    maker = Path(sys.executable) if light or python is None else python
    if not light:
        _check_python(maker)
    # An interrupted set-up starts again.
    _step([maker, "-m", "venv", "--clear", folder], f"making {folder}", report)
    if light:
        shared = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "shared.pth"
        shared.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip: list[Path | str] = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # The requirements are complete, and VBench's own would not resolve beside a newer torch.
    _step([*pip, "--no-deps", "--requirement", requirements], f"installing {requirements.name}", report)
    for package in find_environment(own, ("torchvision", "scipy") if light else ()).missing:
        what = _torchvision(own) if package == "torchvision" else [package]
        _step([*pip, *what], f"installing {package}", report)
    marker.write_text(made_from, encoding="utf-8")
    report(f"VBench {VERSION} is ready in {folder}")
    return own


def _torchvision(python: Path) -> list[str]:
    """The release of torchvision for the torch that `python` sees; each follows its torch by fifteen minor releases."""
    code = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    major, minor = done.stdout.split(".")[:2]
    if major != "2":
        raise ValueError(f"torchvision for torch {done.stdout.strip()} is not known; install it into {python} yourself")
    return ["--no-deps", f"torchvision==0.{int(minor) + 15}.*"]


def _check_python(python: Path) -> None:
    code = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{python} is no Python that runs: {error}") from None
    version = tuple(map(int, done.stdout.split()))
    if version != PYTHON_VERSION:
        wanted, got = (".".join(map(str, v)) for v in (PYTHON_VERSION, version))
        raise ValueError(
            f"VBench's requirements are pinned for Python {wanted}, got {got}; use --python python{wanted}"
        )


def _step(command: list[Path | str], what: str, report: Callable[[str], None]) -> None:
    report(what)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        errors = [line for line in lines if "ERROR" in line or "error" in line] or lines
        raise ValueError(f"{what} failed: {errors[-1]}")
