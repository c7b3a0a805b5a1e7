"""Draws the pictures of docs/report.md from a folder that `generate` or `compare` made, in headless Chromium.

PROMPT="A big red ball moving left on a gray background."
dit-sparse generate --prompt "$PROMPT" --steps 10 --method adaspa --density 0.25 --compare-dense --out build/run
python scripts/draw_report.py build/run --out docs/images
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from browser import Browser, missing

from dit_sparse.report import load, write_page

READY = "return [...document.querySelectorAll('video')].every((video) => video.readyState >= 3 && !video.seeking)"


def settle(window: Browser) -> None:
    while not window.run(READY):
        time.sleep(0.05)
    time.sleep(0.5)  # the last frame is drawn, and colours have changed


def draw(page: Path, out: Path, frame: int) -> None:
    """Two pictures: the videos in light colours, the maps in dark ones."""
    with Browser((1240, 900)) as window:
        for scheme, selector, name in (
            ("light", ".videos", "report-videos.png"),
            ("dark", ".maps", "report-maps.png"),
        ):
            window.prefer(scheme)
            window.open(page)
            settle(window)
            window.press("Home", *["ArrowRight"] * frame)
            settle(window)
            window.picture(out / name, of=selector)
            if messages := window.console():
                raise RuntimeError(f"the page says {messages}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--frame", type=int, default=12, help="frame that is shown")
    arguments = parser.parse_args()
    if why := missing():
        print(f"error: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_page(load(arguments.run), page)
        arguments.out.mkdir(parents=True, exist_ok=True)
        draw(page, arguments.out, arguments.frame)
    return 0


if __name__ == "__main__":
    sys.exit(main())
