"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_sparse.partials import replacing

__all__ = ["file_hash", "read_json", "remembered", "write_json"]


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, under another name until it is whole and on the disk; its folder is made.

    Raises:
        ValueError: NaN or infinity in it.
        OSError: the file cannot be written.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """What is in the JSON file `path`.

    Raises:
        ValueError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the Python files of a folder, in hexadecimal."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*.py")):
        digest.update(f"{part.relative_to(path)}\0{file_hash(part)}\0".encode())
    return digest.hexdigest()


def remembered(path: Path, cache: Path | None, compute: Callable[[Path], Any]) -> Any:
    """`compute(path)`, ready for JSON, or what it gave before for a file of this path, size and time.

    Args:
        cache: folder of what was computed; `None` computes anew.
    """
    if cache is None:
        return compute(path)
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()[:32]
    entry = cache / f"{key}.json"
    if not entry.exists():
        write_json(entry, compute(path))
    return read_json(entry)
