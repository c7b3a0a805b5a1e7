"""The `manifest.jsonl` of an output folder: one line a finished video, with all that is needed to make it again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_sparse.generate.request import Clip, Settings
from dit_sparse.generate.video import extension

__all__ = ["MANIFEST", "Manifest"]

MANIFEST = "manifest.jsonl"


class Manifest:
    """The lines of a folder's manifest by key; a later line replaces an earlier one of the same key.

    Raises:
        ValueError: a line, other than a last one cut short by a crash, that is no manifest line.
        OSError: the file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / MANIFEST
        self._lines = _read(self.path)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of every video, finished or not, in order."""
        return list(self._lines.values())

    def finished(self, key: str, file: str | None = None) -> dict[str, Any] | None:
        """The line of the video `key` if its file, which has to be called `file` where that is given, is there too."""
        line = self._lines.get(key)
        if line is None or (file is not None and line["file"] != file):
            return None
        return line if (self.folder / line["file"]).exists() else None

    def file_name(self, clip: Clip, settings: Settings) -> str:
        """A name for `clip` that no other video and no foreign file has; its own line's, where it has one.

        Raises:
            FileExistsError: others have taken every such name.
        """
        key = settings.key(clip)
        if clip.name is not None:
            return self._settled_name(clip.name + extension(settings.format, settings.frames), key)
        if key in self._lines:
            return self._lines[key]["file"]
        taken = {line["file"] for line in self._lines.values()}
        stems = [clip.stem, f"{clip.stem}-{key[:8]}", f"{clip.stem}-{key}"]
        names = [stem + extension(settings.format, settings.frames) for stem in stems]
        free = [name for name in names if name not in taken and not (self.folder / name).exists()]
        if not free:
            raise FileExistsError(f"{names[0]} exists in {self.folder} and is not in its {MANIFEST}; move it away")
        return free[0]

    def _settled_name(self, name: str, key: str) -> str:
        owners = {other for other, line in self._lines.items() if line["file"] == name}
        if owners - {key} or (not owners and (self.folder / name).exists()):
            what = "was made with other settings" if owners else f"is not in the {MANIFEST} there"
            raise FileExistsError(f"{name} in {self.folder} {what}; use another --out, or move it away")
        return name

    def append(self, line: Mapping[str, Any]) -> None:
        """Add `line` (with `key` and `file`) and make sure that it is on the disk.

        Raises:
            ValueError: NaN or infinity in it.
            OSError: the file cannot be written.
        """
        data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        with open(descriptor, "ab", buffering=0) as file:
            # Shards of one run share the file, and each would cut off another's line as long as it is half written.
            fcntl.flock(file, fcntl.LOCK_EX)
            _mend(self.path)
            file.write(data)
            os.fsync(file.fileno())
        self._lines[line["key"]] = dict(line)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines: dict[str, dict[str, Any]] = {}
    *whole, last = path.read_bytes().split(b"\n")
    for number, data in enumerate(whole, 1):
        line = _parse(data)
        if line is None:
            raise ValueError(f"{path}, line {number} is no manifest line; mend it or move the file away")
        lines[line["key"]] = line
    if (line := _parse(last)) is not None:
        lines[line["key"]] = line
    return lines


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data)
    except ValueError:
        return None
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in ("key", "file")):
        return None
    # A name that leads out of the folder is not one of ours.
    return line if Path(line["file"]).name == line["file"] else None


def _mend(path: Path) -> None:
    """Cut off a half last line, or end a whole one that lacks its newline."""
    if not path.exists():
        return
    data = path.read_bytes()
    last = data[data.rfind(b"\n") + 1 :]
    if not last:
        return
    with path.open("r+b") as file:
        if _parse(last) is None:
            file.truncate(len(data) - len(last))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
