"""Writes the lock file: pyproject's ranges, resolved by pip in a throw-away environment and frozen.

python scripts/lock.py requirements.lock
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A looser request takes the newest build, which nobody has tested here.
# Torch's published wheel of that version requires exactly this triton; its CPU builds do not say so.
PINNED = ("torch==2.13.0", "triton==3.7.1")
HEADER = "# Tested versions for Python {python}; written by scripts/lock.py. Library users take pyproject's ranges.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINNED], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINNED, f"{ROOT}[dev]"], check=True)
        frozen = subprocess.run(
            [python, "-m", "pip", "freeze", "--exclude", "dit-sparse"], check=True, capture_output=True, text=True
        ).stdout
    # A wheel taken from a local folder is frozen as a path, or with a local version that no index has.
    lines = [line.split(" @ ")[0] if " @ " in line else line.split("+")[0] for line in frozen.splitlines()]
    pins = {pin.split("==")[0]: pin for pin in PINNED}
    lines = [pins.get(line.split("==")[0], line) for line in lines]
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    temporary.write_text(HEADER.format(python=version) + "\n".join(lines) + "\n")
    os.replace(temporary, output)


if __name__ == "__main__":
    main()
