"""What is checked of a file that a command will write, before its work begins."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["check_file"]


def check_file(
    flag: str,
    path: Path,
    *,
    example: str = "",
    ending: str = "",
    kept: Mapping[str, Path | None] | None = None,
    makes_folder: bool = False,
) -> None:
    """Make sure that the file `path` can be written and that nothing is lost by it; leaves no trace.

    Args:
        flag: the option that names it.
        example: such a file.
        ending: that it must have.
        kept: files that it must not replace, by what they are; `None` is none.
        makes_folder: its folder is made where there is none.

    Raises:
        ValueError: a folder or device, another ending, one of `kept`, or a folder that is not there or takes no file.
    """
    such = f"a file such as {example}" if example else "a file"
    if path.is_dir():
        raise ValueError(f"{flag} must be {such}, got the folder {str(path)!r}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{flag} must be {such}, got {str(path)!r}, which is a device or pipe")
    if ending and path.suffix.lower() != ending:
        raise ValueError(f"{flag} must be {such}, with the ending {ending}, got {str(path)!r}")
    for what, other in (kept or {}).items():
        if other is not None and _same(path, other):
            raise ValueError(f"{flag} must not be {what}, got {str(path)!r} for both: name another file")
    folder = path.absolute().parent
    if folder.is_dir():
        _check_writable(flag, path, folder)
    elif not makes_folder:
        raise ValueError(f"{flag} must be in a folder that exists, got {str(path)!r}: make it first")


def _check_writable(flag: str, path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {str(path)!r} cannot be written: {error.strerror or error}") from None


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()
