"""Runs the guard tests on other releases of diffusers, each in a throw-away environment; exit code 1 if one fails.

python scripts/check_diffusers.py                     # the oldest and the newest release that pyproject admits
python scripts/check_diffusers.py --version 0.42.0    # this one
python scripts/check_diffusers.py --fingerprints      # of the installed one, for dit_sparse/pipelines/upstream.py

An environment holds the release, with whatever versions pip resolves for it and this project together; packages that
fit already are taken from the environment that runs the script.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
_SHOWN = ("diffusers", "transformers", "huggingface_hub", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="append", help="a release, such as 0.42.0; may be given again")
    parser.add_argument("--tests", default="tests/pipelines", help="which tests; only those marked guard run")
    parser.add_argument("--fingerprints", action="store_true", help="print those of the installed release and stop")
    options = parser.parse_args()
    if options.fingerprints:
        print_fingerprints()
        return
    requirements = [Requirement(text) for text in project()["dependencies"]]
    releases = [f"diffusers=={version}" for version in options.version or ()] or admitted(requirements)
    failed = [release for release in releases if not passes(release, requirements, options.tests)]
    if failed:
        sys.exit(f"guard tests fail for {', '.join(failed)}")


def project() -> dict[str, list[str]]:
    """The project table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def admitted(requirements: list[Requirement]) -> list[str]:
    """What to ask pip for to get the oldest and the newest release of diffusers within `requirements`."""
    (own,) = [requirement for requirement in requirements if requirement.name == "diffusers"]
    (oldest,) = [bound.version for bound in own.specifier if bound.operator == ">="]
    return [f"diffusers=={oldest}", str(own)]


def passes(release: str, requirements: list[Requirement], tests: str) -> bool:
    """Whether the guard tests pass on `release`, such as "diffusers==0.42.0", in an environment of its own."""
    others = [str(requirement) for requirement in requirements if requirement.name != "diffusers"]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        inside = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        # Packages of the calling environment come after those that pip puts here.
        (Path(inside) / "calling.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [python, "-m", "pip", "install", "--quiet"]
        # The newest release of a range is only looked for with --upgrade, which must not reach the other packages.
        for request in ([*install, "--upgrade", "--no-deps", release], [*install, release, *others]):
            if subprocess.run(request, check=False).returncode:
                print(f"{release} cannot be installed with what this project asks for", flush=True)
                return False
        show = f"from importlib.metadata import version as v; print(*[n + ' ' + v(n) for n in {_SHOWN}], sep=', ')"
        print(
            "testing",
            subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip(),
            flush=True,
        )
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "guard", tests]
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def print_fingerprints() -> None:
    """Print the lines of `WRITTEN_FOR` for the installed release."""
    from dit_sparse.pipelines.families import FAMILIES
    from dit_sparse.pipelines.upstream import fingerprints

    for adapter in FAMILIES.values():
        for path, fingerprint in fingerprints(adapter).items():
            print(f'    "{path}": ("{fingerprint}",),')


if __name__ == "__main__":
    main()
