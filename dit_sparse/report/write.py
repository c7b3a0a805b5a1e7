"""Writes a report as one HTML file that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from dit_sparse.output_file import check_file
from dit_sparse.partials import partial_path, remove
from dit_sparse.report.content import Group, Report, Run
from dit_sparse.report.media import Media, prepare
from dit_sparse.report.read import read_object, require

__all__ = ["MAX_SIZE", "write_page"]

MAX_SIZE = 256
"""Megabytes of videos that a page may embed, unless told otherwise."""

_TRACE_FORMAT = 1
_SCRIPTS = ("elements.js", "player.js", "maps.js", "chart.js", "tables.js", "page.js")


def write_page(report: Report, path: Path, *, link: bool = False, max_size: float = MAX_SIZE) -> int:
    """Write `report` to `path`, under another name until it is whole.

    Args:
        link: refer to the videos where they lie; the page then works only beside them.
        max_size: megabytes of videos that may be embedded.

    Returns:
        The bytes written.

    Raises:
        ValueError: a `path` that is a folder or has another ending than .html, so that no file of a run is replaced; a
            video or trace that cannot be read, videos of different sizes side by side, or too many megabytes.
        OSError: a file cannot be read or written.
    """
    check_file("--out", path, example="FOLDER/report.html", ending=".html", makes_folder=True)
    embedded = _Embedded(path.absolute().parent, link, max_size)
    content = asdict(report) | {
        "groups": [embedded.group(group) for group in report.groups],
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "version": version("dit-sparse"),
    }
    text = _fill(report, content, embedded.parts)
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"--out {str(path)!r} cannot be written: {error.strerror or error}") from None
    finally:
        # Below a file there is nothing to remove.
        with suppress(NotADirectoryError):
            remove(partial)
    return path.stat().st_size


class _Embedded:
    """The groups of a page as the page reads them, and the videos and traces that it carries.

    Args:
        folder: of the page.
        link, max_size: as in `write_page`.

    Attributes:
        parts: type and text of each, by its id.
    """

    def __init__(self, folder: Path, link: bool, max_size: float) -> None:
        self.parts: dict[str, tuple[str, str]] = {}
        self._folder = folder
        self._link = link
        self._limit = max_size
        self._size = 0

    def group(self, group: Group) -> dict[str, Any]:
        media = [None if run.file is None else prepare(run.file, run.fps, link=self._link) for run in group.runs]
        _check_sizes([one for one in media if one is not None])
        self._size += sum(one.size for one in media if one is not None)
        if self._size > self._limit * 1e6:
            raise ValueError(
                f"the videos take more than --max-size {self._limit:g} MB: "
                "--link refers to them where they lie, or raise --max-size"
            )
        runs = [self._run(run, one) for run, one in zip(group.runs, media, strict=True)]
        return {"title": group.title, "facts": group.facts, "runs": runs}

    def _run(self, run: Run, media: Media | None) -> dict[str, Any]:
        trace = None
        if run.trace is not None:
            found = read_object(run.trace)
            require(found, ("format", "steps", "tracks", "masks"), str(run.trace))
            if found["format"] != _TRACE_FORMAT:
                raise ValueError(f"{run.trace} has format {found['format']!r}, this dit-sparse reads {_TRACE_FORMAT}")
            trace = self._add("trace", "application/json", _script_json(found))
        return {
            "label": run.label,
            "facts": run.facts,
            "command": run.command,
            "trace": trace,
            "media": None if media is None else self._media(media),
        }

    def _media(self, media: Media) -> dict[str, Any]:
        found = {key: getattr(media, key) for key in ("width", "height", "frames", "fps", "encoded")}
        found["image"] = media.is_image
        if media.data is None:
            return found | {"link": quote(os.path.relpath(media.path.absolute(), self._folder))}
        return found | {"part": self._add("media", "text/plain", media.data_uri())}

    def _add(self, kind: str, type: str, text: str) -> str:
        name = f"{kind}-{len(self.parts)}"
        self.parts[name] = (type, text)
        return name


def _check_sizes(media: Sequence[Media]) -> None:
    for one in media[1:]:
        first = media[0]
        if (one.width, one.height, one.frames) != (first.width, first.height, first.frames):
            raise ValueError(
                f"{first.path} ({_size(first)}) and {one.path} ({_size(one)}) belong side by side "
                "and must be of one size: make the one that is wrong again"
            )


def _size(media: Media) -> str:
    return f"{media.width}x{media.height}, {media.frames} frames"


def _fill(report: Report, content: dict[str, Any], parts: dict[str, tuple[str, str]]) -> str:
    page = files("dit_sparse.report") / "page"
    script = "\n".join((page / name).read_text("utf-8") for name in _SCRIPTS)
    style = (page / "style.css").read_text("utf-8")
    blocks = [f'<script type="{type}" id="{name}">{text}</script>' for name, (type, text) in parts.items()]
    return Template((page / "page.html").read_text("utf-8")).substitute(
        title=html.escape(f"{report.source}: {report.kind}"),
        # Only this very script may run, and nothing may be loaded but what the page carries or lies beside it.
        script_hash=_hash(script),
        style_hash=_hash(style),
        style=style,
        script=script,
        content=_script_json(content),
        parts="\n".join(blocks),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, default=str, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
